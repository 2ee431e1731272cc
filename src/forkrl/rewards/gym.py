"""Judges answers to reasoning-gym's questions with reasoning-gym's own scorers.

The answer is the content of the last ``<answer>...</answer>``. A prompt holds only its origin (generator, settings,
seed, index); the worker makes the entry again, since JSON cannot hold it, and fails if that gives another question.

Nine scorers pass the answer to ``eval`` or to sympy's parser, which evaluates Python. Model output must not run as
code, so their answers must first match a small language that cannot call anything: see ``_READABLE``.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import string
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

from forkrl.rewards.gym_entries import Source, make_entry, open_source
from forkrl.rewards.reply import reply_of
from forkrl.types import Judgement

_MAX_ANSWER = 20_000
"""Characters; the longest right answers, ARC's grids, have about 2,000."""
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)
"""What scorers raise on an answer of an unexpected form."""


def verify_gym(answer: str, response: str, *, strict: bool = False) -> Judgement:
    """reasoning-gym's score in [0, 1] of a response's final answer (0 without one), and that answer.

    Args:
        answer: the question's origin as JSON (written by ``tasks/gym.py``).
        response: what the model wrote.
        strict: partial scores become 0.
    """
    dataset, entry = _entry(answer)
    written = final_answer(response)
    if written is None:
        return Judgement(0.0, "")
    score = _score(json.loads(answer)["generator"], dataset, entry, written)
    return Judgement(float(score == 1) if strict else score, " ".join(written.split()))


def final_answer(response: str) -> str | None:
    """The content of the last complete ``<answer>...</answer>`` after the thinking, stripped; None without one."""
    response = reply_of(response)
    end = response.rfind("</answer>")
    start = response.rfind("<answer>", 0, max(end, 0))
    return response[start + len("<answer>") : end].strip() if start >= 0 else None


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
    """Whether a probability is the gold one: coin_flip's scorer accepts its first digits, even 0."""
    found, due = Fraction(written.replace(",", "")), Fraction(gold.replace(",", ""))
    return abs(found - due) <= min(Fraction(1, 10_000), due / 100)


@lru_cache(maxsize=256)
def _entry(answer: str) -> tuple[Any, Any]:
    """The generator and the entry that ``answer`` names."""
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
_ARITHMETIC = re.compile(r"(?!.*\*\s*\*)[0-9+\-*/().\s]*", re.DOTALL)  # no powers, which no right answer needs
_FORMULA = re.compile(r"(?:[0-9]++(?:\.[0-9]++)?|[A-Za-z]++|[-+*/^()\s])*+")  # possessive: linear in the length
_COMPLEX = re.compile(r"[0-9.+\-eijEIJ()\s]*")  # no nan: its distance from anything is 0 to the scorer
_PROBABILITY = re.compile(r"[0-9.,/\s]*(?:[eE]-?[0-9]{1,2})?")  # small exponents: ``Fraction`` computes the power
_FUNCTIONS = ["sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh"]
_NAMES = frozenset([*_FUNCTIONS, "exp", "log", "ln", "sqrt", "pi", *string.ascii_letters])


def _is_words_or_literal(written: str) -> bool:
    """Bare words, which ``eval`` can only look up, or a Python literal, which it can only build."""
    if _WORDS.fullmatch(written):
        return True
    try:
        ast.literal_eval(written)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True


def _is_formula(written: str) -> bool:
    """Numbers, one-letter names, functions of calculus, operations and brackets: no attribute, no string, no index."""
    return _FORMULA.fullmatch(written) is not None and _NAMES.issuperset(re.findall("[A-Za-z]+", written))


_READABLE: dict[str, Callable[[str], object]] = {
    # These scorers eval the answer.
    "binary_matrix": _is_words_or_literal,
    "n_queens": _is_words_or_literal,
    "spiral_matrix": _is_words_or_literal,
    "string_insertion": _is_words_or_literal,
    # These hand it to sympy.parse_expr, which evals what it makes of it.
    "countdown": _ARITHMETIC.fullmatch,
    "puzzle24": _ARITHMETIC.fullmatch,
    "simple_integration": _is_formula,
    "intermediate_integration": _is_formula,
    "polynomial_multiplication": _is_formula,
    # What these would be fooled or held up by.
    "coin_flip": _PROBABILITY.fullmatch,
    "complex_arithmetic": _COMPLEX.fullmatch,
}
"""By generator: whether its scorer may see an answer."""
