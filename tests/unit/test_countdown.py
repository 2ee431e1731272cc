"""The Countdown task: an honest verifier, an honest searcher, and held-out problems that stay out."""

from __future__ import annotations

import random

import pytest

from forkrl.config import SearchHabits
from forkrl.rewards.countdown import judge_tries, parse_problem, verify_countdown
from forkrl.tasks import PromptStream
from forkrl.tasks.countdown import CHARACTERS, countdown_task, random_problem, write_solution, write_trace
from forkrl.types import Prompt

PROBLEM = "2 5 9:90"
RIGHT = "2*5=10 [9 10], 10*9=90 [90] 90:90 !"
WRONG_FIRST = "2+5=7 [9 7], 9+7=16 [16] 16:90 ; "

SCORE = [
    (RIGHT, 1),
    (WRONG_FIRST + RIGHT, 1),
    ("2*5=10 [9 10], 10*9=90 [90] !", 1),  # unchecked, and right all the same
    ("2*5=10 [9 10], 10*9=90 [90] 90:90 ?", 0),  # gave up on the answer
    ("2*5=10 [9 10], 10*9=90 [90] 90:90", 0),  # claims nothing
    ("2+5=7 [9 7], 9+7=16 [16] 16:90 !", 0),  # claims what is not so
    ("2+5=7 [9 7], 9+7=16 [90] 90:90 !", 0),  # restates another number
    ("2*5=90 [90] 90:90 !", 0),  # wrong arithmetic, and a number unused
    ("9*9=81 [2 81], 81+9=90 [90] 90:90 !", 0),  # a number used twice
    ("9*10=90 [90] 90:90 !", 0),  # a number that is not there
    ("2*5=10 [9 10], 10*9=90 [90] 90:90 !!", 1),
    ("90:90 !", 0),
    ("!", 0),
    ("", 0),
    ("90 !", 0),
    (WRONG_FIRST + "!", 0),
    (RIGHT + "; !", 0),  # the last try is what counts
    ("٢*٥=١٠ [٩ ١٠], ١٠*٩=٩٠ [٩٠] ٩٠:٩٠ !", 0),  # digits of another script
    ("2*5=10 [9 10], 10*9=90 [90] 90:90 !\x00!", 1),
    ("9" * 100_000 + "*1=1 [90] !", 0),
    ("[" * 100_000 + "!", 0),
    (";" * 100_000 + "!", 0),
    ("]" * 100_000 + "!", 0),
    ("<think>" + RIGHT, 0),  # thinking that never ends
    ("<think>" + WRONG_FIRST + "</think>" + RIGHT, 1),
    (RIGHT + "<|im_end|>", 1),
]


@pytest.mark.parametrize(("response", "score"), SCORE, ids=lambda value: repr(value)[:40])
def test_verdict(response: str, score: int) -> None:
    assert verify_countdown(PROBLEM, response) == score


def test_every_trace_executes_rightly_and_claims_decide_the_score() -> None:
    task, rng = countdown_task(), random.Random(0)
    solved = 0
    for _ in range(500):
        prompt, numbers, target = random_problem(task, rng)
        trace = write_trace(numbers, target, rng, SearchHabits())
        assert set(prompt.text + trace) <= set(CHARACTERS)
        tries = judge_tries(numbers, trace)
        assert all(step.right for steps in tries for step in steps)
        reached = tries[-1][-1].remaining == (target,)
        assert verify_countdown(prompt.answer, trace) == (reached and trace.endswith("!"))
        solved += verify_countdown(prompt.answer, trace) == 1
    assert 25 < solved < 125, "the searcher must be neither hopeless nor clever"


def test_the_searcher_does_not_know_the_answer() -> None:
    """Its first step is the same whatever the target: the target never enters a choice before the check."""
    numbers = (2, 5, 9)
    for seed in range(50):
        first = {write_trace(numbers, target, random.Random(seed), SearchHabits()).split("]")[0] for target in (16, 90)}
        assert len(first) == 1


@pytest.mark.parametrize(
    ("habits", "expected"),
    [
        (SearchHabits(give_up=1, skip_check=0), lambda trace: trace.count(";") == 0 and trace[-1] in "!?"),
        (SearchHabits(give_up=0, repeat=1, skip_check=0), lambda trace: len(set(_tries(trace))) == 1),
        (SearchHabits(give_up=0, repeat=0, skip_check=0), lambda trace: len(set(_tries(trace))) == len(_tries(trace))),
        (SearchHabits(skip_check=1), lambda trace: trace.endswith("] !") and ";" not in trace),
    ],
)
def test_each_habit_shows(habits: SearchHabits, expected: object) -> None:
    assert callable(expected)
    for seed in range(50):
        assert expected(write_trace((2, 5, 9), 97, random.Random(seed), habits)), seed


def _tries(trace: str) -> list[str]:
    return [text.partition("] ")[0].strip() for text in trace.split(";")]


def test_held_out_problems_are_no_training_problems_in_any_order() -> None:
    task = countdown_task()
    assert (len(task.train), len(task.held_out)) == (888, 1000)

    def key(prompt: Prompt) -> tuple[tuple[int, ...], int]:
        numbers, target = parse_problem(prompt.answer)
        return tuple(sorted(numbers)), target

    train, held_out = set(map(key, task.train)), set(map(key, task.held_out))
    assert len(train) == 888
    assert len(held_out) == 1000
    assert not train & held_out


def test_the_task_is_the_same_everywhere() -> None:
    assert countdown_task().fingerprint == countdown_task().fingerprint
    assert countdown_task().fingerprint.startswith("6f9e623af4c5472d")


def test_the_stream_goes_through_every_prompt_once_an_epoch_and_resumes_anywhere() -> None:
    prompts = [Prompt(str(index), str(index), "") for index in range(7)]
    stream = PromptStream(prompts, seed=3)
    drawn = [prompt.id for prompt in stream.take(21)]
    for epoch in range(3):
        assert sorted(drawn[7 * epoch : 7 * epoch + 7]) == [str(index) for index in range(7)]
    assert drawn[:7] != drawn[7:14]
    for position in (0, 6, 7, 13):
        resumed = PromptStream(prompts, seed=3)
        stopped = PromptStream(prompts, seed=3)
        stopped.take(position)
        resumed.restore(stopped.state())
        assert [prompt.id for prompt in resumed.take(21 - position)] == drawn[position:]


def test_every_problem_has_a_solution_that_its_verifier_accepts() -> None:
    task = countdown_task()
    for prompt in [*task.train, *task.held_out]:
        solution = write_solution(*parse_problem(prompt.answer))
        assert solution is not None and verify_countdown(prompt.answer, solution) == 1.0, prompt
    assert write_solution((1, 1, 1), 99) is None
