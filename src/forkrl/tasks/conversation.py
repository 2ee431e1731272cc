"""Prompts of messages that a person writes, rendered as a task renders its questions."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from forkrl.config import TaskConfig
from forkrl.errors import UserError
from forkrl.tasks import open_task
from forkrl.tasks.countdown import problem_text
from forkrl.tasks.rendering import chat_template, gym_question, prompt_renderer
from forkrl.types import Messages, Prompt


class Conversation:
    """Makes the prompt of each message; with a chat template it contains the turns before.

    Raises UserError for settings that the template ignores or rejects, and if ``task.few_shot`` needs data that cannot
    be read. A mixed task has no prompts of its own.
    """

    def __init__(self, config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        if config.name == "environment":
            raise UserError('task.name = "environment" has turns of its own; chat with the model alone')
        self._config = config
        self._turns: Messages = []
        examples = open_task(config, tokenizer).examples if config.few_shot else {}
        self._render = prompt_renderer(config, chat_template(config, tokenizer), list(examples.values()))

    def prompt(self, message: str) -> Prompt:
        place = "the message"
        asked = [*self._turns, {"role": "user", "content": self._question(message)}]
        text = self._render(asked, place)
        return Prompt("", text, "", place, templated=self._config.chat_template, question=message)

    def add(self, message: str, response: str) -> None:
        """Remember a turn, if there is a chat template."""
        if self._config.chat_template:
            asked = self._config.template.replace("{prompt}", self._question(message))
            answered = self._config.assistant_prefill + response
            self._turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]

    def reset(self) -> None:
        self._turns.clear()

    def _question(self, message: str) -> str:
        if self._config.name == "reasoning-gym":
            return gym_question(self._config, message)
        return message if self._config.name == "dataset" else problem_text(message)
