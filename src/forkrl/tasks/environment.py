"""Environments of the ``verifiers`` package as tasks: their prompts, and the process that runs them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from forkrl.config import TaskConfig
from forkrl.errors import UserError, printable
from forkrl.parallel.processes import Child, child_environment
from forkrl.tasks.dataset import fingerprint_of
from forkrl.types import Prompt, Task

OPENING_S = 300.0
"""Time in which an environment must list its tasks."""
_PROGRAM = """
from forkrl.environments import process
process.serve()
"""


class EnvironmentProcess:
    """A process with the recipe's environment. It runs rollouts if it gets the ``url`` and ``key`` of an endpoint.

    Raises UserError if the package is missing or the environment cannot be used.
    """

    def __init__(self, config: TaskConfig, *, url: str = "", key: str = "") -> None:
        if importlib.util.find_spec("verifiers") is None:
            raise UserError(
                "task.name = \"environment\" needs the verifiers package: pip install 'forkrl[environments]'"
            )
        self.child = Child(_PROGRAM, _without_proxy(child_environment(1)) | {"FORKRL_ENVIRONMENT_KEY": key}, quiet=True)
        request = {
            "environment": config.environment,
            "args": config.environment_args,
            "count": config.train_prompts + config.held_out_rows,
            "max_turns": config.max_turns,
            "url": url,
        }
        try:
            self.send(request)
            late = f"it has not listed its tasks in {OPENING_S:g} seconds"
            answer: dict[str, Any] = self.receive() if self.child.connection.poll(OPENING_S) else {"error": late}
        except (EOFError, OSError):
            death = self.child.death()
            self.close()
            raise _refusal(config, f"its process {death}") from None
        except BaseException:
            self.close()
            raise
        if "error" in answer:
            self.close()
            raise _refusal(config, answer["error"])
        self.tasks: list[dict[str, Any]] = answer["tasks"]

    def send(self, message: dict[str, Any]) -> None:
        self.child.connection.send_bytes(json.dumps(message).encode())

    def receive(self) -> dict[str, Any]:
        """The next message; raises EOFError or OSError once the process has ended."""
        message = json.loads(self.child.connection.recv_bytes())
        return message if isinstance(message, dict) else {}

    def close(self) -> None:
        """Kill the process and those it started."""
        self.child.close()


def environment_task(config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The environment's tasks as prompts. Which are held out does not depend on their order.

    Tasks with the same first messages are held out together: of a prompt that is trained on with other answers, a model
    would learn what the held-out answer is not. A rollout reads what the environment sends, which may differ from the
    prompt's text. ``Prompt.answer`` is the task's index.
    """
    if not tokenizer.chat_template:
        raise UserError(
            'task.name = "environment" needs a chat template, and the model\'s tokenizer has none; take an instruct '
            "model, or set one (docs/environments.md)"
        )
    process = EnvironmentProcess(config)
    process.close()
    prompts: dict[str, Prompt] = {}
    for task in process.tasks:
        text = task_text(config, tokenizer, task["messages"])
        place = f"task {task['index']} of {config.environment}"
        asked = next((each["content"] for each in reversed(task["messages"])), "")
        prompts.setdefault(
            task["key"], Prompt(task["key"][:16], text, str(task["index"]), place, templated=True, question=str(asked))
        )
    if len(prompts) <= config.held_out_rows:
        raise UserError(
            f"task.held_out_rows = {config.held_out_rows} leaves nothing to train on: {config.environment} has "
            f"{len(prompts)} distinct tasks; lower it"
        )
    alike: dict[str, list[Prompt]] = {}
    for key in sorted(prompts):
        alike.setdefault(prompts[key].text if prompts[key].question else key, []).append(prompts[key])
    aside: list[Prompt] = []
    for text in sorted(alike, key=lambda text: hashlib.sha256(text.encode()).hexdigest()):
        if len(aside) >= config.held_out_rows:
            break
        aside += alike.pop(text)
    left = {prompt.id for prompts_alike in alike.values() for prompt in prompts_alike}
    train = [prompt for prompt in prompts.values() if prompt.id in left]
    aside = aside[: config.held_out_rows]
    if not train:
        raise UserError(
            f"task.held_out_rows = {config.held_out_rows} leaves nothing to train on: tasks of {config.environment} "
            f"with the same first messages are held out together; lower it"
        )
    return Task(config.environment, train, aside, {}, fingerprint_of(train, aside))


def _without_proxy(environment: dict[str, str]) -> dict[str, str]:
    """Requests to the endpoint stay on this machine: they hold its key and the conversation."""
    for name in ("NO_PROXY", "no_proxy"):
        environment[name] = ",".join(filter(None, [environment.get(name), "127.0.0.1,localhost"]))
    return environment


def task_text(config: TaskConfig, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    """What the model reads first, as far as the task says; a task may leave it to the environment."""
    if not messages:
        return str(tokenizer.eos_token)
    return str(
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **config.chat_template_kwargs
        )
    )


def _refusal(config: TaskConfig, reason: str) -> UserError:
    return UserError(
        f"task.environment = {config.environment!r} cannot be used: {printable(str(reason))[:500]} "
        f"(docs/environments.md)"
    )
