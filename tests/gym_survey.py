"""What each of reasoning-gym's generators can do here, as the table of docs/tasks.md: ``python -m tests.gym_survey``.

Questions are made in one process and judged in another, as in training. For each generator: whether every question is
made again as it was, what its own gold answers score, and what the best of a few wrong ones does.
"""

from __future__ import annotations

import io
import json
import time
from contextlib import redirect_stdout
from typing import NamedTuple

from reasoning_gym.factory import DATASETS

from forkrl.rewards import VerifierPool
from forkrl.rewards.gym import _READABLE, REFUSED, Source, highest_level, make_entry, open_source
from forkrl.tasks.gym import GYM_VERIFIER, gym_prompts
from forkrl.types import Prompt

QUESTIONS = 20
WRONG = ("wrong", "[]", "{}", "None", "( )", "-", "banana banana", "x = x", '{"a": 1}', "1 2 3 4 5 6 7 8 9 10 11 12 13")
EXAMPLES = {
    "graph_color": "possible_answer",
    "propositional_logic": "example_answer",
    "rubiks_cube": "example_correct_answer",
}
"""Generators without a gold answer whose entries hold an example of a right one."""


class Finding(NamedTuple):
    """One generator's row."""

    generator: str
    levels: str
    ms_a_question: float
    gold: list[float]
    best_wrong: float
    failures: list[str]


def examine(generator: str, pool: VerifierPool) -> Finding:
    """Make questions, and have gold and wrong answers judged."""
    prompts = gym_prompts(generator, count=QUESTIONS)
    gold = [(prompt, answer) for prompt in prompts if (answer := gold_answer(prompt)) is not None]
    right = pool.verify([(prompt, f"<answer>{answer}</answer>") for prompt, answer in gold])
    wrong = pool.verify([(prompt, f"<answer>{text}</answer>") for prompt in prompts for text in WRONG])
    failures = [result.failure for result in (*right, *wrong) if result.failure]
    return Finding(
        generator,
        usable_levels(generator),
        ms_a_question(generator),
        [result.score for result in right],
        max(result.score for result in wrong),
        failures,
    )


def ms_a_question(generator: str) -> float:
    """Milliseconds to make one, once the generator is open."""
    source = Source(generator, "{}", None, 12345, 100)
    open_source(source)
    started = time.perf_counter()
    with redirect_stdout(io.StringIO()):  # some generators print
        for index in range(QUESTIONS):
            make_entry(source, index)
    return 1000 * (time.perf_counter() - started) / QUESTIONS


def gold_answer(prompt: Prompt) -> str | None:
    """The generator's own answer to a question, or an example of a right one."""
    place = json.loads(prompt.answer)
    if place["answer"] is not None or place["generator"] not in EXAMPLES:
        answer = place["answer"]
        return answer if answer is None else str(answer)
    settings = json.dumps(place["settings"])
    source = Source(place["generator"], settings, place["level"], place["seed"], place["size"])
    entry = make_entry(source, place["index"])
    example = entry["metadata"][EXAMPLES[place["generator"]]]
    return example if isinstance(example, str) else json.dumps(example)


def usable_levels(generator: str) -> str:
    """The levels whose settings the generator accepts, such as "0-3"; "-" where there are none."""
    top = highest_level(generator)
    good = []
    for level in range(0 if top is None else top + 1):
        try:
            open_source(Source(generator, "{}", level, 0, 10))
        except ValueError:
            continue
        good.append(level)
    if not good:
        return "-"
    return f"{good[0]}-{good[-1]}" if good == list(range(good[0], good[-1] + 1)) else ", ".join(map(str, good))


def main() -> None:
    """Print the table."""
    print("| generator | levels | ms a question | gold answers with full marks | best wrong answer | |")
    print("|---|---|---:|---|---:|---|")
    with VerifierPool({"": GYM_VERIFIER}, timeout_s=30) as pool:
        for generator in sorted(set(DATASETS) - set(REFUSED)):
            found = examine(generator, pool)
            gold = f"{sum(score == 1 for score in found.gold)} of {len(found.gold)}" if found.gold else "none known"
            note = "guarded" if generator in _READABLE else ""
            note += f" failures: {sorted(set(found.failures))}" if found.failures else ""
            row = (found.generator, found.levels, f"{found.ms_a_question:.3g}", gold, f"{found.best_wrong:.2g}", note)
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
