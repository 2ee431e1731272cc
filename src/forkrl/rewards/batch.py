"""What was handed in to be judged together, and what of it still waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from forkrl.rewards.reply import with_opened_thinking
from forkrl.types import Prompt, Verdict


@dataclass(eq=False, slots=True)
class Item:
    """One response to judge."""

    batch: Batch
    index: int
    prompt: Prompt
    response: str
    deadline_s: float

    @property
    def open(self) -> bool:
        """Whether a verdict is still wanted."""
        return self.batch.verdicts[self.index] is None and not self.batch.future.done()


class Batch:
    """The items of one ``submit`` call and the future that waits for their verdicts."""

    def __init__(self, pairs: Sequence[tuple[Prompt, str]], deadline_of: Callable[[Prompt], float]) -> None:
        self.future: Future[list[Verdict]] = Future()
        self.items = [
            Item(self, index, prompt, with_opened_thinking(prompt.text, response), deadline_of(prompt))
            for index, (prompt, response) in enumerate(pairs)
        ]
        self.verdicts: list[Verdict | None] = [None] * len(self.items)
        self._num_open = len(self.items)

    def settle(self, index: int, verdict: Verdict) -> None:
        """Note a verdict; the last one makes the future's result."""
        self.verdicts[index] = verdict
        self._num_open -= 1
        self.finish_if_settled()

    def finish_if_settled(self) -> None:
        """Make the future's result of the verdicts once all are there."""
        if not self._num_open and self.future.set_running_or_notify_cancel():
            self.future.set_result([verdict for verdict in self.verdicts if verdict is not None])

    def fail(self, error: BaseException) -> None:
        """Nobody will judge what is left."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)
