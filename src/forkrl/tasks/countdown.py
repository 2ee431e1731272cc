"""A small Countdown game (reach a target from three numbers), and the random searcher that writes pretraining traces.

A problem is ``2 5 9:90?``. Each step of a response restates the remaining numbers; each attempt checks the target::

    2*5=10 [9 10], 10+9=19 [19] 19:90 ; 2*5=10 [9 10], 10*9=90 [90] 90:90 !

``!`` claims success, ``?`` gives up, ``;`` tries again. The searcher chooses numbers and operations uniformly and makes
the mistakes of a base model: it gives up, repeats failed attempts, or claims success unchecked.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from functools import cache

from forkrl.config import SearchHabits
from forkrl.rewards.countdown import calculate, parse_problem
from forkrl.types import Prompt, Task, VerifierSpec

CHARACTERS = "0123456789+-*/=,:;!?[] "
NUM_NUMBERS = 3
LARGEST_NUMBER = 9
LARGEST_TARGET = 99
NUM_HELD_OUT = 1000
NUM_VALIDATION = 256


def countdown_task(*, validation: bool = False) -> Task:
    """All problems with three numbers from 1 to 9 and a reachable target up to 99, split by a hash.

    Problems are multisets, so none is held out in one order and trained on in another. ``validation`` holds out other
    problems, for choosing settings; the training problems are the same.
    """
    prompts = sorted(map(_prompt, _problems()), key=lambda prompt: hashlib.sha256(prompt.id.encode()).digest())
    held_out, rest = prompts[:NUM_HELD_OUT], prompts[NUM_HELD_OUT:]
    parts = (rest[NUM_VALIDATION:], rest[:NUM_VALIDATION] if validation else held_out)
    text = "\n\n".join("\n".join(prompt.text for prompt in part) for part in parts)
    return Task(
        name="countdown-validation" if validation else "countdown",
        train=tuple(parts[0]),
        held_out=tuple(parts[1]),
        verifiers={"": VerifierSpec("forkrl.rewards.countdown:verify_countdown")},
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
    )


def write_trace(numbers: tuple[int, ...], target: int, rng: random.Random, habits: SearchHabits) -> str:
    written = ""
    tried: list[tuple[str, int]] = []
    for attempt in range(1, habits.most_tries + 1):
        if tried and rng.random() < habits.repeat:
            text, result = tried[-1]
        else:
            text, result = _new_try(numbers, rng, tried)
        tried.append((text, result))
        written += text
        if rng.random() < habits.skip_check:
            return written + "!"
        written += f"{result}:{target} "
        if result == target:
            return written + "!"
        if attempt == habits.most_tries or rng.random() < habits.give_up:
            return written + "?"
        written += "; "
    raise AssertionError("unreachable: the last attempt returns")


def write_solution(numbers: tuple[int, ...], target: int) -> str | None:
    """A response that reaches the target at its first attempt; None if there is none."""
    steps = _solution(numbers, target)
    return None if steps is None else f"{', '.join(steps)} {target}:{target} !"


def random_problem(task: Task, rng: random.Random) -> tuple[Prompt, tuple[int, ...], int]:
    """A training problem with its numbers in random order: prompt, numbers, target."""
    numbers, target = parse_problem(rng.choice(task.train).answer)
    shuffled = tuple(rng.sample(numbers, len(numbers)))
    return _prompt((shuffled, target)), shuffled, target


def _prompt(problem: tuple[tuple[int, ...], int]) -> Prompt:
    numbers, target = problem
    text = " ".join(map(str, numbers)) + f":{target}"
    return Prompt(id=text, text=problem_text(text), answer=text, question=text)


def problem_text(problem: str) -> str:
    """What the model reads of ``2 5 9:90``."""
    return problem if problem.endswith("?") else f"{problem}?"


def _problems() -> list[tuple[tuple[int, ...], int]]:
    """Every multiset of numbers with every reachable target, the numbers in a fixed random order."""
    rng = random.Random("countdown")
    found = []
    for numbers in itertools.combinations_with_replacement(range(1, LARGEST_NUMBER + 1), NUM_NUMBERS):
        for target in sorted(_reachable(numbers)):
            if 1 <= target <= LARGEST_TARGET:
                found.append((tuple(rng.sample(numbers, NUM_NUMBERS)), target))
    return found


@cache
def _reachable(numbers: tuple[int, ...]) -> frozenset[int]:
    if len(numbers) == 1:
        return frozenset(numbers)
    results: set[int] = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
        for sign in "+-*/":
            result = calculate(numbers[i], sign, numbers[j])
            if result is not None:
                results |= _reachable(tuple(sorted([*rest, result])))
    return frozenset(results)


def _solution(pool: tuple[int, ...], target: int) -> list[str] | None:
    if len(pool) == 1:
        return [] if pool[0] == target else None
    for i, j in itertools.permutations(range(len(pool)), 2):
        for sign in "+-*/":
            result = calculate(pool[i], sign, pool[j])
            if result is None:
                continue
            rest = (*(number for k, number in enumerate(pool) if k not in (i, j)), result)
            if (further := _solution(rest, target)) is not None:
                return [f"{pool[i]}{sign}{pool[j]}={result} [{' '.join(map(str, rest))}]", *further]
    return None


def _new_try(numbers: tuple[int, ...], rng: random.Random, tried: list[tuple[str, int]]) -> tuple[str, int]:
    """A random attempt, a new one if 20 draws find one."""
    for _ in range(20):
        candidate = _random_try(numbers, rng)
        if candidate not in tried:
            return candidate
    return candidate


def _random_try(numbers: tuple[int, ...], rng: random.Random) -> tuple[str, int]:
    """Combine random pairs by random valid operations until one number is left: text and result."""
    pool, steps = list(numbers), []
    while len(pool) > 1:
        left, right = rng.sample(range(len(pool)), 2)
        signs = [sign for sign in "+-*/" if calculate(pool[left], sign, pool[right]) is not None]
        sign = rng.choice(signs)
        result = calculate(pool[left], sign, pool[right])
        assert result is not None
        written = f"{pool[left]}{sign}{pool[right]}={result}"
        pool = [number for k, number in enumerate(pool) if k not in (left, right)] + [result]
        steps.append(f"{written} [{' '.join(map(str, pool))}]")
    return ", ".join(steps) + " ", pool[0]
