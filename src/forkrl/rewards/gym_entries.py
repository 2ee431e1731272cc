"""reasoning-gym's generators, opened so that one question can be made again in another process.

Runs only in the process that writes the questions (``gym_questions.py``) and in the verifiers' workers, since it
imports reasoning-gym. Errors in the recipe are raised as ``ValueError`` with the user's message.

A generator draws entry ``index`` with ``seed + index``, so nearby seeds give the same questions, shifted. Some iterate
over sets of strings, so both kinds of process run with PYTHONHASHSEED=0.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import random
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import reasoning_gym  # noqa: F401 - importing it registers the generators
from reasoning_gym.factory import CURRICULA, DATASETS

REFUSED = {
    "composite": 'it mixes other generators; task.name = "mix" does that, with metrics for each',
    "game_of_life_halting": "its scorer calls every answer right that is not empty",
}
"""Generators that cannot be used, and why."""


class Source(NamedTuple):
    """What determines the entries of a generator. ``settings`` is a JSON object."""

    generator: str
    settings: str
    level: int | None
    seed: int
    size: int


@lru_cache(maxsize=64)
def open_source(source: Source) -> Any:
    """The reasoning-gym data set of a source; raises ValueError for an unusable generator, setting or value."""
    dataset_class, _ = DATASETS[_known(source.generator)]
    settings = json.loads(source.settings)
    _check_names(source.generator, settings)
    if source.level is not None:
        _check_levels(source.generator, settings)
    try:
        return dataset_class(config=_config(source, settings))
    except Exception as error:  # asserts and type errors of a hundred generators: all are about these settings
        where = f"task.settings = {source.settings}" if settings else "its settings"
        level = "" if source.level is None else f" at level {source.level}"
        raise ValueError(
            f"reasoning-gym's {source.generator} refuses {where}{level}: {_one_line(error)}; change them"
        ) from error


def make_entry(source: Source, index: int) -> Any:
    """Entry ``index`` of a source, the same in every process; raises whatever the generator raises."""
    dataset = open_source(source)
    # Some generators also draw from the global random numbers.
    random.seed(f"{source.seed}/{index}")
    np.random.seed((source.seed + index) % 2**32)
    return dataset[index]


def highest_level(generator: str) -> int | None:
    """The last level of a generator's curriculum, or None."""
    if _known(generator) not in CURRICULA:
        return None
    return max((len(attribute.levels) for attribute in CURRICULA[generator]().attributes.values()), default=1) - 1


def _known(generator: str) -> str:
    if generator in REFUSED:
        raise ValueError(f'task.generator = "{generator}" cannot be used: {REFUSED[generator]}')
    if generator not in DATASETS:
        near = difflib.get_close_matches(generator, DATASETS, n=3, cutoff=0.4)
        meant = f"; did you mean {' or '.join(near)}?" if near else "; docs/tasks.md lists them"
        raise ValueError(f'task.generator = "{generator}" is not a generator of reasoning-gym{meant}')
    return generator


def _check_names(generator: str, settings: Mapping[str, Any]) -> None:
    names = [field.name for field in dataclasses.fields(DATASETS[generator][1]) if field.name not in ("seed", "size")]
    for name in settings:
        if name in ("seed", "size"):
            raise ValueError(f"task.settings.{name} cannot be set; use task.question_seed and task.train_prompts")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            meant = f"did you mean {near[0]}?" if near else f"it has: {', '.join(names) or 'none'}"
            raise ValueError(f"task.settings.{name} is not a setting of reasoning-gym's {generator}; {meant}")


def _config(source: Source, settings: Mapping[str, Any]) -> Any:
    values = {**settings, "seed": source.seed, "size": source.size}
    if source.level is None:
        return DATASETS[source.generator][1](**values)
    curriculum = CURRICULA[source.generator]()
    curriculum.set_global_level(source.level)
    return curriculum.generate_configuration(values)


def _check_levels(generator: str, settings: Mapping[str, Any]) -> None:
    """Refuse a setting that a level decides."""
    governed = {
        getattr(attribute, name)
        for attribute in CURRICULA[generator]().attributes.values()
        for name in ("field_name", "lower_field_name", "upper_field_name")
        if hasattr(attribute, name)
    }
    if both := sorted(governed & settings.keys()):
        raise ValueError(
            f"task.settings.{both[0]} of {generator} is decided by its level; drop it, or drop "
            f"task.difficulty and task.curriculum"
        )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or f"{type(error).__name__} without a message"
    return text if len(text) <= 200 else text[:200] + "…"
