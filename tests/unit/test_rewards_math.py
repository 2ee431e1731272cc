"""The mathematics verifier against tables of answers with known truth (tests/data/math_*.json).

math_pairs.json: what is right and what only looks right, truth first, with the faults that remain marked "known".
math_reports.jsonl: pairs from public bug reports of comparable projects, labelled by hand. math_variants.jsonl: right
and wrong variants of every class of those bugs. math_cases.json: how the answer is found.
math_hostile.json: what must be judged soon, whatever it is; a response there is text, or a list of [text, times] for
the long ones.
"""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from math_verify import parse, verify

from forkrl.rewards import VerifierPool
from forkrl.rewards.math import verify_math
from forkrl.rewards.math.formula import TooLarge, read_formula
from forkrl.rewards.math.response import boxed_or_bare, final_answer
from forkrl.types import Judgement, Prompt, VerifierSpec

DATA = Path(__file__).parents[1] / "data"
PAIRS, CASES, HOSTILE = (
    json.loads((DATA / f"math_{name}.json").read_text(encoding="utf-8")) for name in ("pairs", "cases", "hostile")
)
REPORTS, VARIANTS = (
    [json.loads(line) for line in (DATA / f"math_{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    for name in ("reports", "variants")
)
SPEC = {"": VerifierSpec("forkrl.rewards.math:verify_math")}


def response_of(case: dict[str, Any]) -> str:
    parts = case["response"]
    return parts if isinstance(parts, str) else "".join(text * times for text, times in parts)


def test_every_pair_is_judged_as_is_true_except_for_the_known_faults() -> None:
    judged = [verify_math(row["gold"], row["response"]).score for row in PAIRS]
    surprises = [row for row, score in zip(PAIRS, judged, strict=True) if (score == row["truth"]) == ("known" in row)]
    assert not surprises
    assert len(PAIRS) >= 1000
    assert sum(row["truth"] == 0 for row in PAIRS) >= 0.4 * len(PAIRS)
    assert sum("known" in row for row in PAIRS) <= 0.02 * len(PAIRS)


def misjudged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if verify_math(row["gold"], row["response"]).score != row["truth"]]


def test_pairs_from_public_bug_reports_are_judged_right() -> None:
    assert not misjudged(REPORTS)
    assert len(REPORTS) >= 259


@pytest.mark.parametrize("kind", sorted({row["kind"] for row in VARIANTS}))
def test_variants_of_every_class_of_reported_bugs_are_judged_right(kind: str) -> None:
    rows = [row for row in VARIANTS if row["kind"] == kind]
    assert not misjudged(rows)
    assert len(rows) >= 2


@pytest.mark.parametrize("found", ["1,2", "1, 2", "(1,2)", "[1,2)", "]1,2]", r"\{1,2\}"])
def test_an_interval_needs_its_brackets(found: str) -> None:
    assert verify_math("[1,2]", rf"\boxed{{{found}}}").score == 0


@pytest.mark.parametrize(
    ("found", "score"),
    [("3 > y+2x", 1), ("-4x-2y > -6", 1), ("4x+2y < 6", 1), ("2x+y > 3", 0), (r"2x+y \le 3", 0), ("2x+z < 3", 0)],
)
def test_an_inequality_in_two_variables_is_judged_up_to_a_positive_factor(found: str, score: float) -> None:
    assert verify_math("2x+y < 3", rf"\boxed{{{found}}}").score == score


@pytest.mark.parametrize(
    "response",
    [
        r"<think>Maybe \boxed{17}",
        r"<think>Maybe \boxed{17}</think>",
        r"<think>Maybe \boxed{17}</think> I do not know.",
        r"<think>a</think> b <think>\boxed{17}",
    ],
)
def test_an_answer_inside_the_thinking_does_not_count(response: str) -> None:
    assert verify_math("17", response) == Judgement(0.0, "")


def test_thinking_that_the_prompt_opens_must_be_closed() -> None:
    prompt = Prompt("p", "User: what is 8 + 9?\nAssistant: <think>\n", "17")
    with VerifierPool(SPEC) as pool:
        results = pool.verify([(prompt, r"it is \boxed{17}"), (prompt, r"it is 3</think>\boxed{17}")])
    assert [(result.score, result.answer) for result in results] == [(0.0, ""), (1.0, "17")]


@pytest.mark.parametrize(
    "text", ["(" * 900, "((a," * 200, "]" * 900, "[1," * 300, r"\text{" * 150, r"\boxed " * 100, "** " * 300]
)
def test_long_answers_of_brackets_and_marks_take_no_time(text: str) -> None:
    began = time.process_time()
    for response in (
        rf"\boxed{{{text}}}",
        text,
        f"The answer is {text}",
        f"<answer>{text}</answer>",
        text + " " * 10**6,
    ):
        assert verify_math("7", response).score == 0
    assert time.process_time() - began < 5


def test_every_gold_answer_answers_itself() -> None:
    golds = sorted({row["gold"] for row in PAIRS})
    assert not [gold for gold in golds if verify_math(gold, rf"\boxed{{{boxed_or_bare(gold)}}}").score != 1]


def test_equal_answers_are_mostly_equal_text() -> None:
    same: dict[int, list[bool]] = {0: [], 1: []}
    for row in PAIRS:
        if "known" not in row:
            answers = [verify_math("7", text).answer for text in (rf"\boxed{{{row['gold']}}}", row["response"])]
            same[row["truth"]].append(answers[0] == answers[1])
    assert sum(same[1]) / len(same[1]) > 0.8
    assert sum(same[0]) / len(same[0]) < 0.04  # a unit or the name of a variable is not part of the text


def test_what_is_computed_from_a_gold_answer_is_judged_by_its_value() -> None:
    """Ways of writing every gold answer that is a value: the same value is right, another one is wrong."""
    golds = sorted({row["gold"] for row in PAIRS})
    values = [gold for gold in golds if re.fullmatch(r"[-+\d.]+|-?\\frac\{.*\}|[^=,<>]*\\(?:sqrt|pi)[^=,<>]*", gold)]
    values = [gold for gold in values if not re.search(r"text|over|pm|[$()[,]", gold)]
    wrong = []
    for gold in values:
        same = [f"1+{gold}-1", rf"\frac{{2({gold})}}{{2}}", rf"\left({gold}\right)\cdot 1", gold.replace("{", "{ ")]
        other = [f"{gold}+1", rf"2\cdot({gold})+\pi^3", *([f"-({gold})", f"10({gold})"] if gold != "0" else [])]
        wrong += [(gold, text) for text in same if verify_math(gold, rf"\boxed{{{text}}}").score != 1]
        wrong += [(gold, text) for text in other if verify_math(gold, rf"\boxed{{{text}}}").score != 0]
    assert not wrong
    assert len(values) >= 100


@pytest.mark.parametrize(("name", "rows"), [("cases", CASES), ("hostile", HOSTILE)])
def test_the_table_holds_as_in_use(name: str, rows: list[dict[str, Any]]) -> None:
    with VerifierPool(SPEC, timeout_s=5, memory_mb=1024) as pool:
        items = [(Prompt(str(row), "?", case["answer"]), response_of(case)) for row, case in enumerate(rows)]
        results = pool.verify(items)
    wrong = [
        (case["why"], case["answer"], case["score"], result)
        for case, result in zip(rows, results, strict=True)
        if result.score != case["score"] or result.failure
    ]
    assert not wrong, pool.first_failures
    assert len(rows) >= {"cases": 80, "hostile": 150}[name]
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("answer", "texts"),
    [
        ("1/2", ["1/2", "0.5", r"\frac12", r"\dfrac{2}{4}", "½", r"x = \frac{1}{2}", r"\frac{1}{2}\text{ cm}"]),
        ("1000", ["1000", "1,000", "1{,}000", r"1\,000", "10^3", "1e3", r"\$1000", "1000."]),
        ("3*sqrt(2)", [r"3\sqrt{2}", r"\sqrt{18}", r"\frac{6}{\sqrt2}", "3√2"]),
        ("x**2 + 2*x + 1", ["(x+1)^2", "x^2+2x+1", "1+2x+x²"]),
        ("{1, 2}", ["1,2", r"\{2,1\}", r"x=2\text{ or }x=1"]),
        ("[0, 1)", ["[0,1)", r"0\le x<1", r"x\in[0,1)"]),
        ("east", ["East", r"\text{east}", r"\textbf{East.}"]),
        ("A", ["A", "(A)", r"\text{(A)}", "A. 5"]),
        ("", ["", "???", r"\frac", "x" * 1001]),
    ],
)
def test_the_answer_is_given_in_one_form(answer: str, texts: list[str]) -> None:
    assert {verify_math("7", rf"\boxed{{{text}}}").answer for text in texts} == {answer}


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("no number here", ""),
        (r"\boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{1} and $\boxed{2}$", r"1 \text{ and } 2"),
        (r"\boxed{1}, \boxed{1}", "1"),
        (r"\boxed{\frac{1}{2}", ""),
        ("The answer is $x$ or $y$, I think.", r"x \text{ and } y"),
        ("Answer: 12 apples. Good!", "12 apples"),
        ("<answer>5</answer> #### 6", "5"),
        ("so we need 7x", ""),
        ("first 3.\n\nIn total 1,234.5 of them", "1,234.5"),
        ("The answer is that nobody of the 5 can know the 7.", "7"),
    ],
)
def test_where_the_answer_stands(response: str, answer: str) -> None:
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    "text",
    ["9^{9^{9^{9}}}", "(10!)!", r"\binom{99999}{5}", r"\sum_{n=1}^{9} n", "x+" * 300 + "x", "(" * 21 + "x" + ")" * 21],
)
def test_what_exceeds_a_bound_is_refused_before_it_is_computed(text: str) -> None:
    with pytest.raises(TooLarge):
        read_formula(text)


def test_a_gold_answer_beyond_the_bounds_is_compared_as_text() -> None:
    gold = r"2^{2^{100}}"
    assert verify_math(gold, rf"\boxed{{{gold}}}") == Judgement(1.0, gold)
    assert verify_math(gold, r"\boxed{2^{2^{101}}}").score == 0
    assert verify_math(gold, r"\boxed{7}").score == 0


INTEGERS = st.integers(-(10**12), 10**12).map(lambda number: (str(number), Fraction(number)))
FRACTIONS = st.tuples(st.integers(-999, 999), st.integers(1, 999)).map(
    lambda pair: (rf"\frac{{{pair[0]}}}{{{pair[1]}}}", Fraction(*pair))
)
DECIMALS = st.tuples(st.integers(-999, 999), st.integers(1, 999999)).map(
    lambda pair: (f"{pair[0]}.{pair[1]:06}", Fraction(f"{pair[0]}.{pair[1]:06}"))
)
NUMBERS = INTEGERS | FRACTIONS | DECIMALS


@settings(max_examples=150, deadline=None)
@given(NUMBERS, NUMBERS, st.booleans())
def test_plain_numbers_are_judged_as_math_verify_judges_them(
    gold: tuple[str, Fraction], other: tuple[str, Fraction], equal: bool
) -> None:
    found = (rf"\frac{{{gold[1].numerator * 3}}}{{{gold[1].denominator * 3}}}", gold[1]) if equal else other
    slow = verify(parse(f"${gold[0]}$"), parse(rf"\boxed{{{found[0]}}}"))
    assert verify_math(gold[0], rf"\boxed{{{found[0]}}}").score == slow == (gold[1] == found[1])


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789xyi\\{}()[]^_+-*/=<>,.;:|!%$& abfrctsqnpieoldz½²√π∞−", max_size=40), st.booleans())
def test_no_text_makes_it_raise(text: str, boxed: bool) -> None:
    judgement = verify_math("7", rf"\boxed{{{text}}}" if boxed else text)
    assert judgement.score in (0, 1)
    assert isinstance(judgement.answer, str)


@pytest.mark.parametrize("answer", ["???", r"\frac", "", "$$"])
def test_an_unreadable_gold_answer_is_an_error_whatever_the_response(answer: str) -> None:
    for response in (r"\boxed{1}", answer, ""):
        with pytest.raises(ValueError, match="gold answer"):
            verify_math(answer, response)


def test_an_unreadable_gold_answer_is_a_counted_failure_not_a_wrong_answer() -> None:
    with VerifierPool(SPEC) as pool:
        (result,) = pool.verify([(Prompt("p", "?", "???"), r"\boxed{1}")])
    assert result.failure == "error"
    assert "???" in pool.first_failures["error"]


def test_no_alarm_is_set_and_threads_get_the_same_score() -> None:
    gold, response = r"\frac{\sqrt{2}}{2}", r"\boxed{\frac{1}{\sqrt{2}}}"
    judged: list[Judgement] = []
    thread = threading.Thread(target=lambda: judged.append(verify_math(gold, response)))
    thread.start()
    thread.join()
    assert judged == [verify_math(gold, response)] == [(1.0, "sqrt(2)/2")]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_sympy_raises_is_not_taken_for_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> bool:
        raise MemoryError

    monkeypatch.setattr("forkrl.rewards.math.equality.same_formula", exhausted)
    with pytest.raises(MemoryError):
        verify_math(r"\sqrt{12}", r"\boxed{\sqrt{13}}")


ZERO = r"(\sqrt{3+2\sqrt{2}}-1-\sqrt{2})"


@pytest.mark.parametrize(
    ("gold", "found", "score"),
    [
        ("42", rf"42+{ZERO}\approx 43", 1),  # two answers; the first one counts
        ("43", rf"42+{ZERO}\approx 43", 0),
        ("3.14", r"\pi\approx 3.14", 1),
        ("63", r"20\pi\approx 63", 1),
        ("10^{20}+x", "10^{20}+2x", 0),
        ("2^{2023}-n", "2^{2023}-2n", 0),
        (r"5\text{ cm}, 6\text{ cm}", r"5\text{ m}, 6\text{ m}", 0),
        (r"5\text{ m}, 6\text{ m}", r"500\text{ cm}, 600\text{ cm}", 1),
        (r"1:20\text{ a.m.}, 3:00\text{ p.m.}", r"1:20\text{ p.m.}, 3:00\text{ a.m.}", 0),
        ("5", r"5\text{ or six}", 0),
        ("5", r"5\text{ oranges}", 1),
        ("A", r"\text{(A) and (B)}", 0),
        ("A", "(A)(B)", 0),
        ("A", "(A) 7", 1),
        ("e^{-x^4}", r"\frac{1}{e^{x^4}}", 1),
        ("2^{2^{n}}", "4^{2^{n-1}}", 1),
    ],
)
def test_two_answers_in_one_do_not_pay(gold: str, found: str, score: float) -> None:
    assert verify_math(gold, rf"So \boxed{{{found}}}.").score == score


@pytest.mark.parametrize(
    "text",
    [
        r"\sin(10^{10^{10^{x}}})",
        r"\ln(\cos(10^{10^{x}}))",
        r"2^{2^{2^{2^{x}}}}",
        r"10^{10^6 x}",
        r"\begin{pmatrix}x&2\\3&4\end{pmatrix}^{399}",
        r"\Gamma(\Gamma(\Gamma(10)))",
        r"\Gamma(99999999)",
        r"\sqrt{10^{3999}+1}",
        "-" * 390 + "1",
        "x_{" * 18 + "1" + "}" * 18,
    ],
)
def test_functions_and_matrices_are_bounded_as_numbers_are(text: str) -> None:
    with pytest.raises(TooLarge):
        read_formula(text)


@pytest.mark.parametrize(
    ("gold", "response", "right"),
    [
        ("5", r"5\,{\rm cm}", True),
        (r"5\,{\rm cm}", "5 cm", True),
        ("5 m/s", r"5\,{\rm m/s}", True),
        ("2 or 3", r"2 {\rm ~or~} 3", True),
        ("1/2", r"\left.\frac{1}{2}\right.", True),
        ("3", r"\left.3\right.", True),
        ("3/10", r"\left.3\right.", False),
        (r"\frac{x+1}{2}", r"{x+1\over 2}", True),
        ("x+1/2", r"{x+1\over 2}", False),
        ("3/2", r"1{1\over 2}", True),
        (r"\frac{1}{x+1}", r"{1\over x+1}", True),
        ("1/2", r"\sqrt{1\over 4}", True),
        ("1/4", r"2^{-{4\over 2}}", True),
        ("(1,2)", r"\!\left(1,2\right)", True),
        ("1234", r"1\!234", True),
        ("3", r"2\frac{3} {2}", True),
        ("7/2", r"2\frac{3} {2}", False),
        ("1/2 cm", r"\frac {1} {2} cm", True),
    ],
)
def test_old_fonts_fractions_and_spaces(gold: str, response: str, right: bool) -> None:
    assert verify_math(gold, rf"\boxed{{{response}}}").score == right
