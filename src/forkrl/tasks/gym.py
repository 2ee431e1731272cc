"""Questions of reasoning-gym: any of its generators as a task, judged by its own scorers.

reasoning-gym is an extra: ``pip install 'forkrl[gym]'``. Its generators run in a process of their own
(``gym_questions.py``) and its scorers in the verifiers' workers (``rewards/gym.py``).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from forkrl.config import TaskConfig
from forkrl.errors import UserError, notice
from forkrl.parallel.processes import child_environment
from forkrl.report.progress import progress
from forkrl.tasks.dataset import ApplyChatTemplate, fingerprint_of, question_id
from forkrl.types import Prompt, Task, VerifierSpec

GYM_VERIFIER = VerifierSpec("forkrl.rewards.gym:verify_gym")


def gym_task(config: TaskConfig, *, apply_chat_template: ApplyChatTemplate | None) -> Task:
    """The questions of ``config.generator``, distinct by their text; those held out are none of those to train on.

    They depend on the recipe's ``task`` table alone, so that runs of several seeds share their held-out questions. With
    a curriculum every level has its own training questions, and the held-out ones are spread evenly over the levels.

    Args:
        config: the recipe's ``task`` table.
        apply_chat_template: the tokenizer's, or None to take the text as it is.
    """
    curriculum = config.curriculum
    levels = [config.difficulty] if curriculum.promote_above is None else [curriculum.start, curriculum.max_level]
    held_out: list[Prompt] = []
    train: list[Prompt] = []
    wanted = config.held_out_rows + config.train_prompts * (1 if len(levels) == 1 else _count_levels(levels))
    lines = _questions(
        {
            "generator": config.generator,
            "settings": config.settings,
            "seed": config.question_seed,
            "levels": levels,
            "held_out": config.held_out_rows,
            "train": config.train_prompts,
        }
    )
    for line in progress(lines, f"making questions of {config.generator}", total=wanted):
        text = _render(config, line["question"], apply_chat_template)
        (train if line["kind"] == "train" else held_out).append(_prompt(config, line, text))
    _require_enough(config, train, held_out)
    spec = VerifierSpec(GYM_VERIFIER.path, {"strict": True} if config.strict else {})
    return Task(config.generator, train, held_out, {"": spec}, fingerprint_of(train, held_out))


def gym_prompts(name: str, *, count: int, seed: int = 0, settings: Mapping[str, Any] | None = None) -> list[Prompt]:
    """Questions of one generator, to evaluate on: distinct, and the same each time.

    Each ends with the default ``task.instruction``, and ``GYM_VERIFIER`` judges it. They are those that a training task
    of the same generator and settings holds out, with ``seed`` as its ``task.question_seed`` and ``count`` as its
    ``task.held_out_rows``.

    Args:
        name: the generator.
        count: how many; fewer where it has no more.
        seed: of the questions.
        settings: of the generator.
    """
    config = TaskConfig(
        name="reasoning-gym", generator=name, settings=dict(settings or {}), question_seed=seed, held_out_rows=count
    )
    request = {
        "generator": name, "settings": config.settings, "seed": seed, "levels": [None], "held_out": count, "train": 0,
    }  # fmt: skip
    lines = progress(_questions(request), f"making questions of {name}", total=count)
    return [_prompt(config, line, _render(config, line["question"], None)) for line in lines]


def _prompt(config: TaskConfig, line: Mapping[str, Any], text: str) -> Prompt:
    answer = {
        "answer": line["answer"],
        "generator": config.generator,
        "settings": config.settings,
        "level": line["level"],
        "seed": line["seed"],
        "size": line["size"],
        "index": line["index"],
        "question_sha256": hashlib.sha256(line["question"].encode()).hexdigest(),
    }
    place = f"question {line['index']} of {config.generator}"
    return Prompt(
        question_id(line["question"]),
        text,
        json.dumps(answer, ensure_ascii=False),
        place,
        level=line["level"] or 0,
        templated=config.chat_template,
    )


def _render(config: TaskConfig, question: str, apply_chat_template: ApplyChatTemplate | None) -> str:
    asked = f"{question.rstrip()}\n{config.instruction}" if config.instruction else question
    text = config.template.replace("{prompt}", asked)
    if apply_chat_template is not None:
        text = apply_chat_template([{"role": "user", "content": text}])
    return text


def _require_enough(config: TaskConfig, train: list[Prompt], held_out: list[Prompt]) -> None:
    """Refuse a level without training prompts; say where there are fewer than asked for."""
    found = {level: sum(prompt.level == level for prompt in train) for level in {p.level for p in held_out}}
    for level, count in sorted(found.items()):
        at_level = f" at level {level}" if len(found) > 1 else ""
        if not count:
            raise UserError(
                f"task.held_out_rows = {config.held_out_rows} leaves nothing to train on: {config.generator} has few "
                f"distinct questions with these settings{at_level} ({len(held_out)} were found); lower it, or widen "
                f"task.settings"
            )
        if count < config.train_prompts:
            notice(f"{config.generator}{at_level}: only {count:,} distinct questions to train on")


def _count_levels(levels: list[int | None]) -> int:
    first, last = levels
    return 1 if first is None or last is None else last - first + 1


def _questions(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the questions' process writes, line by line."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError("task.name = \"reasoning-gym\" needs the package of that name: pip install 'forkrl[gym]'")
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "forkrl.tasks.gym_questions"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=child_environment(1) | {"PYTHONHASHSEED": "0"},
        encoding="utf-8",
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(request))
        process.stdin.close()
        for line in process.stdout:
            message = json.loads(line)
            if "error" in message:
                raise UserError(message["error"])
            if "done" in message:
                return
            yield message
        raise UserError(
            f"the process that makes questions of {request['generator']} ended early (exit code {process.wait()}); "
            f"out of memory?"
        )
    finally:
        process.stdout.close()
        process.kill()
        process.wait()
