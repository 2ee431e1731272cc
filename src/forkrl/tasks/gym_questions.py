"""A process that writes reasoning-gym questions as JSON lines: ``python -m forkrl.tasks.gym_questions``.

A separate process, because questions depend on string hashing, and generators print and may loop. Reads the arguments
of ``questions`` from stdin as JSON; the last line is ``{"done": true}``, or ``{"error": line}`` for a recipe mistake.
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
"""Entries tried per distinct question before the generator counts as exhausted."""


def main() -> None:
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
    *, generator: str, settings: dict[str, Any], seed: int, levels: list[int | None], held_out: int, train: int
) -> Iterator[dict[str, Any]]:
    """Distinct questions: first the held-out ones, then the training ones, with distant seeds derived from ``seed``.

    ``levels`` is ``[None]`` (no level), ``[level]``, or the first and last level of a curriculum (None: the generator's
    last). ``held_out`` counts all levels, ``train`` each level. Yields kind ("held_out" or "train"), question, answer
    (text or None), the fields of its ``Source``, and its index.
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
    open_source(source)  # reports wrong settings before the first question
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
    """An entry; raises ValueError if the generator fails, since its settings are the cause."""
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
    """All requested levels, checked against the levels that the generator supports."""
    if levels == [None]:
        return levels
    top = highest_level(generator)
    if top is None:
        raise ValueError(
            f"reasoning-gym's {generator} has no levels of difficulty; remove task.difficulty and task.curriculum, "
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
            break  # some curricula have levels that their generators reject
        found.append(level)
    return found


if __name__ == "__main__":
    main()
