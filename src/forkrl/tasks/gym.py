"""reasoning-gym generators as tasks, with that package's scorers as verifiers.

Generators run in a separate process (``gym_questions.py``), scorers in the verifier workers (``rewards/gym.py``).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from forkrl.config import TaskConfig
from forkrl.errors import UserError, notice
from forkrl.parallel.processes import child_environment
from forkrl.report.progress import progress
from forkrl.tasks.dataset import fingerprint_of, question_id
from forkrl.tasks.rendering import ApplyChatTemplate, RenderPrompt, choose_examples, gym_question, prompt_renderer
from forkrl.types import Example, Prompt, Task, VerifierSpec

GYM_VERIFIER = VerifierSpec("forkrl.rewards.gym:verify_gym")


def gym_task(config: TaskConfig, *, apply_chat_template: ApplyChatTemplate | None) -> Task:
    """The questions of ``config.generator``, distinct by text; held-out ones are not trained on.

    They depend only on the recipe's ``task`` table, so runs with different seeds share their held-out questions. With a
    curriculum, every level has its own training questions, and the held-out ones are spread evenly over levels.
    """
    curriculum = config.curriculum
    levels = [config.difficulty] if curriculum.promote_above is None else [curriculum.start, curriculum.max_level]
    # The few-shot examples are taken from the training questions.
    prompts, examples = _prompts(config, levels, config.train_prompts + config.few_shot, apply_chat_template)
    train, held_out = prompts["train"], prompts["held_out"]
    _require_enough(config, train, held_out)
    spec = replace(
        GYM_VERIFIER,
        options={"strict": True} if config.strict else {},
        answer_format=config.answer_format or "",
        prefill=config.assistant_prefill,
    )
    return Task(config.generator, train, held_out, {"": spec}, fingerprint_of(train, held_out), examples)


def gym_prompts(name: str, *, count: int, seed: int = 0, settings: Mapping[str, Any] | None = None) -> list[Prompt]:
    """Distinct questions of one generator for evaluation, deterministic; ``GYM_VERIFIER`` scores responses.

    They equal the held-out questions of a training task with the same generator and settings, the default
    ``task.instruction``, ``task.question_seed = seed`` and ``task.held_out_rows = count`` (fewer if exhausted).
    """
    config = TaskConfig(
        name="reasoning-gym", generator=name, settings=dict(settings or {}), question_seed=seed, held_out_rows=count
    )
    return _prompts(config, [None], 0, None)[0]["held_out"]


def _prompts(
    config: TaskConfig, levels: list[int | None], train: int, apply_chat_template: ApplyChatTemplate | None
) -> tuple[dict[str, list[Prompt]], dict[str, Example]]:
    """Prompts by kind ("held_out" and "train"), and the few-shot examples by id."""
    render = prompt_renderer(config, apply_chat_template)
    first, last = levels[0], levels[-1]
    num_levels = 1 if first is None or last is None else last - first + 1
    request = {
        "generator": config.generator,
        "settings": config.settings,
        "seed": config.question_seed,
        "levels": levels,
        "held_out": config.held_out_rows,
        "train": train,
    }
    total = config.held_out_rows + train * num_levels
    lines = list(progress(_questions(request), f"making questions of {config.generator}", total=total))
    examples: dict[str, Example] = {}
    if config.few_shot:
        examples = choose_examples(
            config,
            {
                question_id(line["question"]): Example(gym_question(config, line["question"]), line["answer"])
                for line in lines
                if line["kind"] == "train" and line["answer"] is not None
            },
        )
        render = prompt_renderer(config, apply_chat_template, list(examples.values()))
    prompts: dict[str, list[Prompt]] = {"held_out": [], "train": []}
    for line in lines:
        prompt = _prompt(config, line, render)
        if prompt.id not in examples:
            prompts[line["kind"]].append(prompt)
    return prompts, examples


def _prompt(config: TaskConfig, line: Mapping[str, Any], render: RenderPrompt) -> Prompt:
    question, level, place = line["question"], line["level"], f"question {line['index']} of {config.generator}"
    answer = {
        "answer": line["answer"],
        "generator": config.generator,
        "settings": config.settings,
        "level": level,
        "seed": line["seed"],
        "size": line["size"],
        "index": line["index"],
        "question_sha256": hashlib.sha256(question.encode()).hexdigest(),
    }
    return Prompt(
        id=question_id(question),
        text=render(gym_question(config, question), place),
        answer=json.dumps(answer, ensure_ascii=False),
        place=place,
        level=level or 0,
        templated=config.chat_template,
        question=question,
    )


def _require_enough(config: TaskConfig, train: list[Prompt], held_out: list[Prompt]) -> None:
    """Reject a level without training prompts; report levels with fewer than requested."""
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


def _questions(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
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
