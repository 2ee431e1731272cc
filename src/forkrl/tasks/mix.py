"""Combines several tasks; each part has its own verifier and template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from forkrl.config import PartConfig, TaskConfig
from forkrl.errors import UserError, notice
from forkrl.tasks.dataset import fingerprint_of
from forkrl.tasks.stream import furthest_behind
from forkrl.types import Prompt, Task


def mix_task(config: TaskConfig, open_part: Callable[[TaskConfig], Task]) -> Task:
    """All parts of a mix; ``Prompt.source`` names the part, and ``open_part`` opens its task.

    A question held out by one part is not trained on in any other; if two parts hold it out, the first keeps it. Both
    cases are reported. Held-out prompts alternate as in the training stream, so any first N are mixed by weight as long
    as every part has prompts left.
    """
    tasks = {part.label: _open(part, open_part) for part in config.parts}
    left_out = sum((Counter(task.left_out) for task in tasks.values()), Counter[str]())
    held_out: dict[str, list[Prompt]] = {}
    aside: set[str] = set()
    for label, task in tasks.items():
        held_out[label] = [replace(prompt, source=label) for prompt in task.held_out if prompt.id not in aside]
        if dropped := len(task.held_out) - len(held_out[label]):
            notice(f"{label}: {dropped:,} held-out questions are held out by a part before it")
        aside.update(prompt.id for prompt in held_out[label])
    for label, task in tasks.items():
        if shown := task.examples.keys() & aside:
            raise UserError(
                f"task.parts: {label} shows {len(shown)} questions as few-shot examples that another part holds out; "
                f"set another task.question_seed for it, or task.few_shot = 0"
            )
    train: list[Prompt] = []
    for label, task in tasks.items():
        kept = [replace(prompt, source=label) for prompt in task.train if prompt.id not in aside]
        if task.train and not kept:
            raise UserError(f"task.parts: every question of {label} is held out by another part; nothing is left")
        if dropped := len(task.train) - len(kept):
            left_out["held_out"] += dropped
            notice(f"{label}: {dropped:,} questions are held out by another part and will not be trained on")
        train += kept
    verifiers = {label: spec for label, task in tasks.items() for spec in task.verifiers.values()}
    mixed = _mixed({part.label: part.weight for part in config.parts}, held_out)
    return Task("mix", train, mixed, verifiers, fingerprint_of(train, mixed), left_out=left_out)


def _open(part: PartConfig, open_part: Callable[[TaskConfig], Task]) -> Task:
    try:
        return open_part(part)
    except UserError as error:
        raise UserError(f"part {part.label} of task.parts: {error}") from error


def _mixed(weights: dict[str, float], prompts: dict[str, list[Prompt]]) -> list[Prompt]:
    """The parts' prompts in training-stream order; a part without prompts left skips its turns."""
    mixed: list[Prompt] = []
    shares = {label: weight / sum(weights.values()) for label, weight in weights.items()}
    turns = dict.fromkeys(prompts, 0)
    left = {label for label in prompts if prompts[label]}
    while len(left) > 1:
        label = furthest_behind(shares, turns)
        if label in left:
            mixed.append(prompts[label][turns[label]])
        turns[label] += 1
        if turns[label] == len(prompts[label]):
            left.discard(label)
    for label in left:
        mixed += prompts[label][turns[label] :]
    return mixed
