"""Tasks (prompts with a verifier), and the infinite prompt stream for training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain

from transformers import PreTrainedTokenizerBase

from forkrl.config import TaskConfig
from forkrl.errors import UserError
from forkrl.model.prompt_tokens import PromptCheck
from forkrl.tasks.countdown import countdown_task
from forkrl.tasks.dataset import load_dataset_task, load_evaluation_task
from forkrl.tasks.environment import environment_task
from forkrl.tasks.gym import gym_task
from forkrl.tasks.json_lines import BadRows
from forkrl.tasks.mix import mix_task
from forkrl.tasks.rendering import chat_template
from forkrl.tasks.stream import PromptStream, open_stream, repeated_prompts
from forkrl.types import Prompt, Task

_FOR_TRAINING = 'task.name = "environment" is for forkrl train; other commands cannot run its turns yet'

__all__ = ["PromptStream", "check_prompts", "open_evaluation_task", "open_stream", "open_task", "repeated_prompts"]


def open_task(
    config: TaskConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_prompt_tokens: int | None = None,
    environments: bool = False,
) -> Task:
    """The configured task, with its prompts exactly as the model reads them; raises UserError if it cannot be used.

    ``tokenizer`` checks every prompt; it is None if only a server has it. ``max_prompt_tokens`` None: any length.
    ``environments``: whether the caller can run rollouts of several turns.
    """
    if config.name == "environment" and not environments:
        raise UserError(_FOR_TRAINING)
    return _open(config, tokenizer, _prompt_check(tokenizer, max_prompt_tokens), load_dataset_task)


def open_evaluation_task(
    config: TaskConfig, tokenizer: PreTrainedTokenizerBase | None, *, max_prompt_tokens: int | None = None
) -> Task:
    """The configured task for evaluation, with all prompts in ``held_out``; arguments and errors as for ``open_task``.

    For a data set: all of ``held_out_data``, or if that is empty, of ``data``. For Countdown and reasoning-gym: the
    held-out problems of training.
    """
    return _open(config, tokenizer, _prompt_check(tokenizer, max_prompt_tokens), load_evaluation_task)


def check_prompts(prompts: Iterable[Prompt], check: PromptCheck, *, allow_unknown: bool) -> None:
    """Raise UserError with the first ten prompts that the model cannot read, and their count."""
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
        return load_dataset(config, apply_chat_template=chat_template(config, tokenizer), check=check_row)
    if config.name == "environment":
        if tokenizer is None or load_dataset is load_evaluation_task:
            raise UserError(_FOR_TRAINING)
        task = environment_task(config, tokenizer)
    elif config.name == "reasoning-gym":
        task = gym_task(config, apply_chat_template=chat_template(config, tokenizer))
    else:
        task = countdown_task(validation=config.name == "countdown-validation")
    if check is not None:
        check_prompts(chain(task.train, task.held_out), check, allow_unknown=config.allow_unknown_tokens)
    return task
