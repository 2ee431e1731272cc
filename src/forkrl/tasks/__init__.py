"""Prompts with a verifier, one file a task, and the endless stream that training draws from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain

from transformers import PreTrainedTokenizerBase

from forkrl.config import TaskConfig
from forkrl.errors import UserError
from forkrl.model.prompt_tokens import PromptCheck
from forkrl.tasks.bad_rows import BadRows
from forkrl.tasks.countdown import countdown_task
from forkrl.tasks.dataset import ApplyChatTemplate, load_dataset_task, load_evaluation_task
from forkrl.tasks.gym import gym_task
from forkrl.tasks.mix import mix_task
from forkrl.tasks.stream import PromptStream, open_stream, repeated_prompts
from forkrl.types import Prompt, Task

__all__ = ["PromptStream", "check_prompts", "open_evaluation_task", "open_stream", "open_task", "repeated_prompts"]


def open_task(
    config: TaskConfig, tokenizer: PreTrainedTokenizerBase | None, *, max_prompt_tokens: int | None = None
) -> Task:
    """The configured task, its prompts as the model will read them.

    Args:
        config: the recipe's ``task`` table.
        tokenizer: the model's, which every prompt is checked against; None where a server keeps it.
        max_prompt_tokens: longer prompts are rejected; None: any length.
    """
    return _open(config, tokenizer, _prompt_check(tokenizer, max_prompt_tokens), load_dataset_task)


def open_evaluation_task(
    config: TaskConfig, tokenizer: PreTrainedTokenizerBase | None, *, max_prompt_tokens: int | None = None
) -> Task:
    """The configured task with every prompt to evaluate on in ``held_out``, and, for a data set, none to train on.

    A data set gives all of ``held_out_data``, or where that is empty all of ``data``. Countdown and reasoning-gym give
    the problems that they always hold out; a mix what its parts give. Arguments and errors are those of ``open_task``.
    """
    return _open(config, tokenizer, _prompt_check(tokenizer, max_prompt_tokens), load_evaluation_task)


def check_prompts(prompts: Iterable[Prompt], check: PromptCheck, *, allow_unknown: bool) -> None:
    """Raise UserError if the model cannot read a prompt: the first ten with their reasons, and the count."""
    bad, total = BadRows(), 0
    for prompt in prompts:
        total += 1
        try:
            check(prompt, allow_unknown=allow_unknown)
        except UserError as error:
            bad.add(error)
    bad.require_none("prompts", total, "")


def _prompt_check(tokenizer: PreTrainedTokenizerBase | None, max_prompt_tokens: int | None) -> PromptCheck | None:
    return None if tokenizer is None else PromptCheck(tokenizer, max_tokens=max_prompt_tokens)


def _open(
    config: TaskConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    check: PromptCheck | None,
    load_dataset: Callable[..., Task],
) -> Task:
    if config.name == "mix":
        return mix_task(config, lambda part: _open(part, tokenizer, check, load_dataset))
    if config.name == "dataset":
        check_row = None if check is None else partial(check, allow_unknown=config.allow_unknown_tokens)
        return load_dataset(config, apply_chat_template=_chat_template(config, tokenizer), check=check_row)
    if config.name == "reasoning-gym":
        task = gym_task(config, apply_chat_template=_chat_template(config, tokenizer))
    else:
        task = countdown_task(validation=config.name == "countdown-validation")
    if check is not None:
        check_prompts(chain(task.train, task.held_out), check, allow_unknown=config.allow_unknown_tokens)
    return task


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
