"""Generates reasoning-gym questions and scores answers with reasoning-gym's scorers.

Prompts store only their origin; the worker regenerates the entry and fails if the question differs. Entry ``index`` is
drawn with ``seed + index``, so nearby seeds share questions. Needs PYTHONHASHSEED=0: some generators iterate over sets.
Nine scorers evaluate the answer as Python; those answers must first match ``_READABLE``.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import json
import random
import re
import string
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import reasoning_gym  # noqa: F401 - importing it registers the generators
from reasoning_gym.factory import CURRICULA, DATASETS

from forkrl.rewards.answer_format import last_tagged
from forkrl.rewards.reply import reply_of
from forkrl.types import Judgement

_MAX_ANSWER = 20_000
"""Characters; the longest correct answers (ARC grids) have about 2,000."""
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)
"""Raised by scorers on answers of an unexpected form."""

REFUSED = {
    "composite": 'it mixes other generators; task.name = "mix" does that, with metrics for each',
    "game_of_life_halting": "its scorer calls every answer right that is not empty",
}
"""Generators that cannot be used, and why."""


def verify_gym(answer: str, response: str, *, strict: bool = False) -> Judgement:
    """Score in [0, 1] (0 without a final answer) and final answer; ``strict`` makes partial scores 0."""
    _entry(answer)  # an unusable entry is an error whatever the response
    written = final_answer(response)
    return Judgement(0.0, "") if written is None else verify_gym_answer(answer, written, strict=strict)


def verify_gym_answer(answer: str, written: str, *, strict: bool = False) -> Judgement:
    """``verify_gym`` for a final answer that ``task.answer_format`` found."""
    dataset, entry = _entry(answer)
    score = _score(json.loads(answer)["generator"], dataset, entry, written)
    return Judgement(float(score == 1) if strict else score, " ".join(written.split()))


def final_answer(response: str) -> str | None:
    """The stripped content of the last complete ``<answer>...</answer>`` after the thinking, or None."""
    found = last_tagged(reply_of(response))
    return None if found is None else found.strip()


def _score(generator: str, dataset: Any, entry: Any, written: str) -> float:
    readable = _READABLE.get(generator)
    if len(written) > _MAX_ANSWER or (readable and not readable(written)):
        return 0.0
    try:
        score = float(dataset.score_answer(written, entry))
        if generator == "coin_flip" and score == 1 and not _is_close(written, entry["answer"]):
            return 0.0
    except _UNREADABLE:
        return 0.0
    return score


def _is_close(written: str, gold: str) -> bool:
    """coin_flip's own scorer accepts the first digits of a probability, even 0."""
    found, due = Fraction(written.replace(",", "")), Fraction(gold.replace(",", ""))
    return abs(found - due) <= min(Fraction(1, 10_000), due / 100)


@lru_cache(maxsize=256)
def _entry(answer: str) -> tuple[Any, Any]:
    place = json.loads(answer)
    settings = json.dumps(place["settings"], sort_keys=True)
    source = Source(place["generator"], settings, place["level"], place["seed"], place["size"])
    entry = make_entry(source, place["index"])
    if hashlib.sha256(entry["question"].encode()).hexdigest() != place["question_sha256"]:
        raise ValueError(
            f"reasoning-gym's {place['generator']} gives another question at seed {place['seed']}, index "
            f"{place['index']} than when the prompt was made; is it another version?"
        )
    return open_source(source), entry


_WORDS = re.compile(r"[A-Za-z0-9_\s]*")
_ARITHMETIC = re.compile(r"(?!.*\*\s*\*)[0-9+\-*/().\s]*", re.DOTALL)  # no powers: no correct answer needs them
_FORMULA = re.compile(r"(?:[0-9]++(?:\.[0-9]++)?|[A-Za-z]++|[-+*/^()\s])*+")  # possessive: linear in the length
_COMPLEX = re.compile(r"[0-9.+\-eijEIJ()\s]*")  # no nan: the scorer takes its distance as 0
_PROBABILITY = re.compile(r"[0-9.,/\s]*(?:[eE]-?[0-9]{1,2})?")  # small exponents: ``Fraction`` computes the power
_FUNCTIONS = ["sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh"]
_NAMES = frozenset([*_FUNCTIONS, "exp", "log", "ln", "sqrt", "pi", *string.ascii_letters])


def _is_words_or_literal(written: str) -> bool:
    """Bare words, which ``eval`` can only look up, or a Python literal."""
    if _WORDS.fullmatch(written):
        return True
    try:
        ast.literal_eval(written)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True


def _is_formula(written: str) -> bool:
    """Numbers, one-letter names, calculus functions, operators and brackets; no attributes, strings or indexing."""
    return _FORMULA.fullmatch(written) is not None and _NAMES.issuperset(re.findall("[A-Za-z]+", written))


_READABLE: dict[str, Callable[[str], object]] = {
    # Scorers that eval the answer.
    "binary_matrix": _is_words_or_literal,
    "n_queens": _is_words_or_literal,
    "spiral_matrix": _is_words_or_literal,
    "string_insertion": _is_words_or_literal,
    # Scorers that call sympy.parse_expr, which evals the transformed text.
    "countdown": _ARITHMETIC.fullmatch,
    "puzzle24": _ARITHMETIC.fullmatch,
    "simple_integration": _is_formula,
    "intermediate_integration": _is_formula,
    "polynomial_multiplication": _is_formula,
    # Inputs that would fool or stall these scorers.
    "coin_flip": _PROBABILITY.fullmatch,
    "complex_arithmetic": _COMPLEX.fullmatch,
}
"""By generator: whether its scorer may see an answer."""


class Source(NamedTuple):
    """Determines a generator's entries. ``settings`` is a JSON object."""

    generator: str
    settings: str
    level: int | None
    seed: int
    size: int


@lru_cache(maxsize=64)
def open_source(source: Source) -> Any:
    """The reasoning-gym data set; raises ValueError for an unusable generator, setting or value."""
    dataset_class, _ = DATASETS[_known(source.generator)]
    settings = json.loads(source.settings)
    _check_names(source.generator, settings)
    if source.level is not None:
        _check_levels(source.generator, settings)
    try:
        return dataset_class(config=_config(source, settings))
    except Exception as error:  # generators raise many types; all concern these settings
        where = f"task.settings = {source.settings}" if settings else "its settings"
        level = "" if source.level is None else f" at level {source.level}"
        raise ValueError(
            f"reasoning-gym's {source.generator} refuses {where}{level}: {_one_line(error)}; change them"
        ) from error


def make_entry(source: Source, index: int) -> Any:
    """Entry ``index``, the same in every process; raises whatever the generator raises."""
    dataset = open_source(source)
    # Some generators also use the global random state.
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
