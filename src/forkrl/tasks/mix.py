"""Several tasks as one: each prompt knows its part, each part has its own verifier and template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace

from forkrl.config import PartConfig, TaskConfig
from forkrl.errors import UserError, notice
from forkrl.tasks.stream import furthest_behind
from forkrl.types import Prompt, Task


def mix_task(config: TaskConfig, open_part: Callable[[TaskConfig], Task]) -> Task:
    """All parts of a mix, told apart by ``Prompt.source``.

    A question that one part holds out is trained on in no other, and one that two parts hold out is kept by the first;
    both are reported. The held-out prompts of the parts take turns by the formula of the training stream, so that any
    number of them from the first is a mix in the proportions of the weights, as long as each part has some left.

    Args:
        config: the recipe's ``task`` table.
        open_part: the task of one part.
    """
    tasks = {part.label: _open(part, open_part) for part in config.parts}
    held_out: dict[str, list[Prompt]] = {}
    aside: set[str] = set()
    for label, task in tasks.items():
        held_out[label] = [replace(prompt, source=label) for prompt in task.held_out if prompt.id not in aside]
        _tell(label, "held-out questions are held out by a part before it", len(task.held_out) - len(held_out[label]))
        aside.update(prompt.id for prompt in held_out[label])
    train: list[Prompt] = []
    for label, task in tasks.items():
        kept = [replace(prompt, source=label) for prompt in task.train if prompt.id not in aside]
        _tell(label, "questions are held out by another part and will not be trained on", len(task.train) - len(kept))
        if task.train and not kept:
            raise UserError(f"task.parts: every question of {label} is held out by another part; nothing is left")
        train += kept
    verifiers = {label: spec for label, task in tasks.items() for spec in task.verifiers.values()}
    in_turns = _take_turns(config.parts, held_out)
    return Task("mix", train, in_turns, verifiers, _fingerprint(train, in_turns))


def _open(part: PartConfig, open_part: Callable[[TaskConfig], Task]) -> Task:
    try:
        return open_part(part)
    except UserError as error:
        raise UserError(f"part {part.label} of task.parts: {error}") from error


def _tell(label: str, what: str, count: int) -> None:
    if count:
        notice(f"{label}: {count:,} {what}")


def _take_turns(parts: Sequence[PartConfig], prompts: dict[str, list[Prompt]]) -> list[Prompt]:
    """The prompts in the order of the training stream's formula; a part that is used up misses its turns."""
    mixed: list[Prompt] = []
    weights = {part.label: part.weight for part in parts}
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


def _fingerprint(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompts in (train, held_out):
        digest.update(f"{len(prompts)}\n".encode())
        for prompt in prompts:
            digest.update(json.dumps([prompt.source, prompt.id, prompt.text, prompt.answer]).encode() + b"\n")
    return digest.hexdigest()
