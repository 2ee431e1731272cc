"""Scores Countdown responses; the game and its notation are described in ``forkrl.tasks.countdown``."""

from __future__ import annotations

import re
from typing import NamedTuple

from forkrl.rewards.reply import reply_of

LARGEST_RESULT = 999
_STEP = re.compile(r"(?:[,]? )?(\d{1,4})([-+*/])(\d{1,4})=(\d{1,4}) \[(\d{1,4}(?: \d{1,4})*)\]", re.ASCII)


class Step(NamedTuple):
    """One operation of a response; ``right``: correct arithmetic, available numbers, correct remainder."""

    right: bool
    remaining: tuple[int, ...]


def verify_countdown(answer: str, response: str) -> float:
    """1.0 if the last attempt claims success, reaches the target and has no wrong step. ``answer``: ``"2 5 9:90"``."""
    numbers, target = parse_problem(answer)
    response = reply_of(response)
    if not response.endswith("!"):
        return 0.0
    steps = judge_tries(numbers, response)[-1]
    return float(all(step.right for step in steps) and bool(steps) and steps[-1].remaining == (target,))


def judge_tries(numbers: tuple[int, ...], response: str) -> list[list[Step]]:
    """The steps of every attempt, each judged against the remaining numbers that the response states."""
    tries = []
    for text in response.split(";"):
        remaining, steps = numbers, []
        for written in re.split(r"(?<=\])", text)[:-1] or [text]:
            steps.append(_judge_step(remaining, written))
            remaining = steps[-1].remaining
        tries.append(steps)
    return tries


def parse_problem(answer: str) -> tuple[tuple[int, ...], int]:
    """Numbers and target of ``"2 5 9:90"``."""
    numbers, _, target = answer.partition(":")
    return tuple(map(int, numbers.split())), int(target)


def calculate(left: int, sign: str, right: int) -> int | None:
    """The result if it is an integer from 0 to 999, else None."""
    if sign == "/":
        return left // right if right and left % right == 0 else None
    result = left + right if sign == "+" else left - right if sign == "-" else left * right
    return result if 0 <= result <= LARGEST_RESULT else None


def _judge_step(available: tuple[int, ...], written: str) -> Step:
    match = _STEP.fullmatch(written)
    if not match:
        return Step(right=False, remaining=())
    left, sign, right, result = int(match[1]), match[2], int(match[3]), int(match[4])
    stated = tuple(map(int, match[5].split()))
    pool = list(available)
    for number in (left, right):
        if number not in pool:
            return Step(right=False, remaining=stated)
        pool.remove(number)
    expected = (*pool, result)
    return Step(right=calculate(left, sign, right) == result and stated == expected, remaining=stated)
