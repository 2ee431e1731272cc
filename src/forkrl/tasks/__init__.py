"""Prompts with a verifier, one file a task, and the endless stream that training draws from."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from forkrl.config import TaskConfig
from forkrl.errors import UserError
from forkrl.tasks.countdown import countdown_task
from forkrl.tasks.dataset import ApplyChatTemplate, load_dataset_task, load_evaluation_task
from forkrl.tasks.gym import gym_task
from forkrl.tasks.mix import mix_task
from forkrl.tasks.stream import PromptStream, open_stream
from forkrl.types import Task

__all__ = ["PromptStream", "open_evaluation_task", "open_stream", "open_task"]


def open_task(config: TaskConfig, tokenizer: PreTrainedTokenizerBase | None) -> Task:
    """The configured task, its prompts as the model will read them.

    Raises:
        UserError: data that is missing or unusable, or a chat template that the tokenizer lacks.
    """
    if config.name == "mix":
        return mix_task(config, lambda part: open_task(part, tokenizer))
    if config.name == "reasoning-gym":
        return gym_task(config, apply_chat_template=_chat_template(config, tokenizer))
    if config.name == "dataset":
        return load_dataset_task(config, apply_chat_template=_chat_template(config, tokenizer))
    return countdown_task(validation=config.name == "countdown-validation")


def open_evaluation_task(config: TaskConfig, tokenizer: PreTrainedTokenizerBase | None) -> Task:
    """The configured task with every prompt to evaluate on in ``held_out``, and, for a data set, none to train on.

    A data set gives all of ``held_out_data``, or where that is empty all of ``data``. Countdown and reasoning-gym give
    the problems that they always hold out; a mix what its parts give.

    Raises:
        UserError: data that is missing or unusable, or a chat template that the tokenizer lacks.
    """
    if config.name == "mix":
        return mix_task(config, lambda part: open_evaluation_task(part, tokenizer))
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
