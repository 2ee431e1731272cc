"""A process that writes reasoning-gym's questions, one JSON line each: ``python -m forkrl.tasks.gym_questions``.

In a process of its own for three reasons: questions must not depend on the order in which this interpreter happens to
hash strings, generators print and may loop, and training need not hold what they import. Reads a ``QuestionRequest`` as
JSON from standard input. Writes questions, last ``{"done": true}``, or ``{"error": line}`` for a mistake of the recipe.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from forkrl.rewards.gym import Source, highest_level, make_entry, open_source

_MOST_TRIES = 4
"""Entries made for one that is kept: where questions repeat that often, there are no more to be had."""


def main() -> None:
    """Answer the one request."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # generators print
    request = json.load(sys.stdin)
    try:
        for question in questions(**request):
            print(json.dumps(question), file=out, flush=True)
    except ValueError as error:
        print(json.dumps({"error": str(error)}), file=out, flush=True)
    else:
        print(json.dumps({"done": True}), file=out, flush=True)


def questions(
    *,
    generator: str,
    settings: dict[str, Any],
    seed: int,
    levels: list[int | None],
    held_out: int,
    train: int,
) -> Iterator[dict[str, Any]]:
    """Distinct questions: those held out first, then those to train on, none of which is held out.

    Args:
        generator: its name in reasoning-gym.
        settings: its settings.
        seed: of the questions; the two kinds draw from far apart in what it spans.
        levels: ``[None]`` without difficulty; ``[level]``; or the first level of a curriculum and its last, which None
            makes the last that the generator can do.
        held_out: how many, spread evenly over the levels.
        train: how many at each level.

    Yields:
        kind ("held_out" or "train"), question, answer (text or None), and what ``Source`` and index need.
    """
    levels = _resolve(generator, settings, levels)
    seen: set[str] = set()
    for number, level in enumerate(levels):
        share = held_out // len(levels) + (number < held_out % len(levels))
        yield from _distinct("held_out", generator, settings, seed, level, share, seen)
    for level in levels:
        yield from _distinct("train", generator, settings, seed, level, train, seen)


def _distinct(
    kind: str, generator: str, settings: dict[str, Any], seed: int, level: int | None, count: int, seen: set[str]
) -> Iterator[dict[str, Any]]:
    size = _MOST_TRIES * count + 100
    start = int.from_bytes(hashlib.sha256(f"{kind}/{generator}/{level}/{seed}".encode()).digest()[:4], "big") % 2**31
    source = Source(generator, json.dumps(settings, sort_keys=True), level, start, size)
    open_source(source)  # what is wrong with the settings is said before the first question is made
    kept = 0
    for index in range(size):
        if kept == count:
            return
        entry = _entry(source, index)
        if entry["question"] in seen:
            continue
        seen.add(entry["question"])
        kept += 1
        yield {
            "kind": kind,
            "question": entry["question"],
            "answer": entry["answer"],
            "level": level,
            "seed": start,
            "size": size,
            "index": index,
        }


def _entry(source: Source, index: int) -> Any:
    """An entry; a generator that fails with its settings is an error in the settings."""
    try:
        return make_entry(source, index)
    except Exception as error:
        level = "" if source.level is None else f" at level {source.level}"
        text = " ".join(str(error).split())[:200]
        raise ValueError(
            f"reasoning-gym's {source.generator} made no question with task.settings = {source.settings}{level} "
            f"({type(error).__name__}: {text}); change them"
        ) from error


def _resolve(generator: str, settings: dict[str, Any], levels: list[int | None]) -> list[int | None]:
    """Every level that is asked for, each one that the generator can do."""
    if levels == [None]:
        return levels
    top = highest_level(generator)
    if top is None:
        raise ValueError(
            f"reasoning-gym's {generator} has no levels of difficulty; leave task.difficulty and task.curriculum out, "
            f"and choose task.settings"
        )
    first, last = levels[0], levels[-1]
    assert first is not None
    highest = top if last is None else last
    if not first <= highest <= top:
        wrong = first if first > top else highest
        raise ValueError(f"reasoning-gym's {generator} has levels 0 to {top}, not {wrong}; choose among them")
    found: list[int | None] = []
    for level in range(first, highest + 1):
        try:
            open_source(Source(generator, json.dumps(settings, sort_keys=True), level, 0, 10))
        except ValueError:
            if last is not None or not found:
                raise
            break  # some curricula name levels that their generators refuse
        found.append(level)
    return found


if __name__ == "__main__":
    main()
