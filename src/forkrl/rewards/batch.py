"""Responses on their way through the pool, and what is known of their verifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from forkrl.errors import UserError
from forkrl.rewards.reply import strip_turn_end, with_opened_thinking
from forkrl.types import TERM, Prompt, VerifierResult, VerifierSpec

VERIFY_CODE = "forkrl.rewards.code:verify_code"
_UNANSWERED, _EXAMPLES, _EXAMPLE_CHARACTERS = 200, 3, 120
_REMEDY = "ask for that form in the prompt, or set task.answer_format to what the responses hold (docs/tasks.md)"
_REMEDY_FOR_CODE = "ask in the prompt for the program in a block fenced as Python (docs/code-rewards.md)"


@dataclass(eq=False, slots=True)
class Item:
    batch: Batch
    index: int
    prompt: Prompt
    response: str
    timeout_s: float

    @property
    def is_open(self) -> bool:
        return self.batch.results[self.index] is None and not self.batch.future.done()


class Source:
    """The verifier of one ``Prompt.source``, and its first responses until one has an answer."""

    def __init__(self, spec: VerifierSpec, timeout_s: float, remedy: str) -> None:
        self.spec, self.timeout_s = spec, timeout_s
        self._remedy = remedy or (_REMEDY_FOR_CODE if spec.path == VERIFY_CODE and not spec.answer_format else _REMEDY)
        self._num_unanswered: int | None = 0
        self._examples: list[str] = []

    def count(self, name: str, response: str, answer: str | None) -> str:
        """Count a judged response; a warning once the first ``_UNANSWERED`` all have no answer, else ""."""
        if self._num_unanswered is None:
            return ""
        if answer != "":
            self._num_unanswered = None
            return ""
        self._num_unanswered += 1
        if len(self._examples) < _EXAMPLES:
            self._examples.append(repr(response[-_EXAMPLE_CHARACTERS:]))
        if self._num_unanswered < _UNANSWERED:
            return ""
        self._num_unanswered = None
        chosen = self.spec.answer_format
        finder = f"task.answer_format = {chosen!r}" if chosen else f"the verifier {self.spec.path}"
        return (
            f"{f'{name}: ' if name else ''}{finder} found no answer in the first {_UNANSWERED} responses; "
            f"{self._remedy}; three of them end in {', '.join(self._examples)}"
        )


class Batch:
    def __init__(self, pairs: Sequence[tuple[Prompt, str]], sources: Mapping[str, Source]) -> None:
        self.future: Future[list[VerifierResult]] = Future()
        self.items: list[Item] = []
        for index, (prompt, response) in enumerate(pairs):
            name, of_term, task_source = prompt.source.partition("\0")  # see term_source
            source, of_task = sources.get(name), sources.get(task_source if of_term else name)
            if source is None or of_task is None:
                raise UserError(f"prompt {prompt.id}: no verifier for its source {prompt.source!r}")
            prefill = of_task.spec.prefill
            asked = prompt.text.removesuffix(prefill)
            text = with_opened_thinking(asked, prefill + strip_turn_end(response))
            self.items.append(Item(self, index, replace(prompt, source=name), text, source.timeout_s))
        self.results: list[VerifierResult | None] = [None] * len(self.items)
        self._num_open = len(self.items)
        if not self.items:
            self.future.set_result([])

    def settle(self, index: int, result: VerifierResult) -> None:
        self.results[index] = result
        self._num_open -= 1
        if not self._num_open and self.future.set_running_or_notify_cancel():
            self.future.set_result([result for result in self.results if result is not None])

    def fail(self, error: BaseException) -> None:
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


def setting_of(source: str = "", options: bool = False) -> str:
    """The setting that names the verifier of a source, or its options."""
    if source.startswith(TERM):
        return f"reward.terms ({source.removeprefix(TERM)}): {'options' if options else 'verifier'}"
    return "task.verifier_options" if options else "task.verifier"
