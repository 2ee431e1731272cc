"""Prompts with a verifier, one file a task, and the endless stream that training draws from."""

from __future__ import annotations

import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from forkrl.config import TaskConfig
from forkrl.errors import UserError
from forkrl.tasks.countdown import countdown_task
from forkrl.tasks.dataset import ApplyChatTemplate, load_dataset_task, load_evaluation_task
from forkrl.types import Prompt, Task

__all__ = ["PromptStream", "open_evaluation_task", "open_task"]


def open_task(config: TaskConfig, tokenizer: PreTrainedTokenizerBase | None) -> Task:
    """The configured task, its prompts as the model will read them.

    Raises:
        UserError: data that is missing or unusable, or a chat template that the tokenizer lacks.
    """
    if config.name != "dataset":
        return countdown_task(validation=config.name == "countdown-validation")
    return load_dataset_task(config, apply_chat_template=_chat_template(config, tokenizer))


def open_evaluation_task(config: TaskConfig, tokenizer: PreTrainedTokenizerBase | None) -> Task:
    """The configured task with every prompt to evaluate on in ``held_out``, and, for a data set, none to train on.

    A data set gives all of ``held_out_data``, or where that is empty all of ``data``. Countdown gives the problems
    that it always holds out.

    Raises:
        UserError: data that is missing or unusable, or a chat template that the tokenizer lacks.
    """
    if config.name != "dataset":
        return open_task(config, tokenizer)
    return load_evaluation_task(config, apply_chat_template=_chat_template(config, tokenizer))


def _chat_template(config: TaskConfig, tokenizer: PreTrainedTokenizerBase | None) -> ApplyChatTemplate | None:
    if not config.chat_template:
        return None
    if tokenizer is None or not tokenizer.chat_template:
        raise UserError(
            "task.chat_template = true, but the tokenizer has no chat template (base models often have none); "
            "set it to false and put the wording into task.template"
        )

    def apply_chat_template(messages: list[dict[str, str]]) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    return apply_chat_template


class PromptStream:
    """Prompts without end: epoch after epoch, each in its own seeded order. ``position`` alone restores it."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, position: int = 0) -> None:
        self.prompts = prompts
        self.seed = seed
        self.position = position
        self._epoch = -1
        self._order: list[int] = []

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Prompt:
        epoch, index = divmod(self.position, len(self.prompts))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = random.Random(f"{self.seed}/{epoch}").sample(range(len(self.prompts)), len(self.prompts))
        self.position += 1
        return self.prompts[self._order[index]]
