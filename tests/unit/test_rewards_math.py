"""math-verify as we use it, against a table of answers with known truth (tests/data/math_cases.json).

A response in the table is text, or a list of [text, times] for the long ones.
"""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from forkrl.rewards import VerifierPool
from forkrl.rewards.math import verify_math
from forkrl.types import Prompt, VerifierSpec

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "data/math_cases.json").read_text())


def response_of(case: dict[str, Any]) -> str:
    parts = case["response"]
    return parts if isinstance(parts, str) else "".join(text * times for text, times in parts)


def test_the_table_holds_as_in_use() -> None:
    with VerifierPool({"": VerifierSpec("forkrl.rewards.math:verify_math")}, deadline_s=2) as pool:
        items = [(Prompt(str(row), "?", case["answer"]), response_of(case)) for row, case in enumerate(CASES)]
        verdicts = pool.verify(items)
    wrong = [
        (case["why"], case["answer"], case["score"], verdict)
        for case, verdict in zip(CASES, verdicts, strict=True)
        if verdict.score != case["score"]
        or verdict.failure not in (("", "deadline", "memory") if case.get("may_be_killed") else ("",))
    ]
    assert not wrong
    assert len(CASES) >= 80


@pytest.mark.parametrize("answer", ["???", r"\frac", "", "$$"])
def test_an_unreadable_gold_answer_is_an_error_whatever_the_response(answer: str) -> None:
    for response in (r"\boxed{1}", answer, ""):
        with pytest.raises(ValueError, match="gold answer"):
            verify_math(answer, response)


def test_an_unreadable_gold_answer_is_a_counted_failure_not_a_wrong_answer() -> None:
    with VerifierPool({"": VerifierSpec("forkrl.rewards.math:verify_math")}) as pool:
        (verdict,) = pool.verify([(Prompt("p", "?", "???"), r"\boxed{1}")])
    assert verdict.failure == "error"
    assert "???" in pool.first_failures["error"]


def test_no_alarm_is_set_and_threads_get_the_same_score() -> None:
    scores: list[float] = []
    thread = threading.Thread(target=lambda: scores.append(verify_math(r"\frac{1}{2}", r"\boxed{0.5}")))
    thread.start()
    thread.join()
    assert scores == [verify_math(r"\frac{1}{2}", r"\boxed{0.5}")] == [1.0]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_sympy_raises_is_not_taken_for_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> bool:
        raise MemoryError

    monkeypatch.setattr("forkrl.rewards.math.verify", exhausted)
    with pytest.raises(MemoryError):
        verify_math("12", r"\boxed{13}")
