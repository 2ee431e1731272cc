r"""How often the mathematics verifier errs and how fast it is, beside raw math-verify (docs/math-verifier.md).

    python -m benchmarks.verifiers [--rounds 3]

Errors: tests/data/math_pairs.json holds gold answers and responses with known truth. A false positive is a wrong answer
that is judged right, a false negative the reverse; their rates have Wilson's 95% intervals, every row a question of its
own. The rows of the sets "second" and "third" were first judged when the verifier was written; what it misjudged then
is marked, and makes the rates "at first sight", which nothing had been fitted to. The set "fourth" was chosen because
the LaTeX reader that both use errs there; it enters no rate but its category's. Raw math-verify is used as its README
says, gold answers in dollars.

tests/data/math_reports.jsonl holds pairs from public bug reports of comparable projects. The verifier was improved on
them; BEFORE says what it made of them until then.

Speed: 2,000 different responses to questions with integers and simple fractions for answers, half of them right,
through a ``VerifierPool`` of two workers that has been warmed with other ones; raw math-verify in this process.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from math_verify import parse, verify
from rich.console import Console
from rich.table import Table

from benchmarks._record import ROOT, describe_setting, write_result
from forkrl.rewards import VerifierPool
from forkrl.rewards.math import verify_math
from forkrl.stats.intervals import Estimate, as_columns, mean_with_interval
from forkrl.types import Prompt, VerifierSpec

PAIRS = ROOT / "tests" / "data" / "math_pairs.json"
REPORTS = ROOT / "tests" / "data" / "math_reports.jsonl"
BEFORE = {"reports": (4, 40), "sets 1 to 4": (0, 2)}
"""Wrong taken for right, right taken for wrong: ForkRL as it was before the reports."""
NUM_RESPONSES = 2000
WORKERS = 2
UNSEEN = ("second", "third")
CHOSEN_FOR_FAULTS = "fourth"
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description="Errors and speed of the mathematics verifier.")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of the speed measurement")
    options = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    setting = describe_setting() | {
        "seed": 0,
        "workers": WORKERS,
        "math_verify": importlib.metadata.version("math-verify"),
    }
    rows: list[Row] = json.loads(Path(PAIRS).read_text(encoding="utf-8"))
    judged = {"forkrl": judge(rows, by_forkrl), "math-verify": judge(rows, by_math_verify)}
    cases = error_cases(rows, judged) + [
        {"what": "speed", **figures} for number in range(options.rounds) for figures in measure_speed(seed=number)
    ]
    cases += report_cases(rows, judged)
    path = write_result("verifiers", setting, cases)
    show(cases)
    print(f"written to {path}")


def by_forkrl(gold: str, response: str) -> bool:
    return verify_math(gold, response).score == 1


def by_math_verify(gold: str, response: str) -> bool:
    in_dollars = gold if "$" in gold or r"\boxed" in gold else f"${gold}$"
    return bool(verify(parse(in_dollars) or parse(gold), parse(response)))


def judge(rows: Sequence[Row], verifier: Callable[[str, str], bool]) -> list[bool]:
    return [verifier(row["gold"], row["response"]) for row in rows]


def error_cases(rows: Sequence[Row], judged: dict[str, list[bool]]) -> list[dict[str, Any]]:
    """Rates over everything, at first sight, and by category; and the rows that are misjudged."""
    cases = []
    counted = [index for index, row in enumerate(rows) if row["set"] != CHOSEN_FOR_FAULTS]
    unseen = [index for index in counted if rows[index]["set"] in UNSEEN]
    at_first_sight = [bool(row["truth"]) != ("misjudged_at_first_sight" in row) for row in rows]
    for way, scores in judged.items():
        cases.append({"what": "errors", "rows": "sets 1 to 3", "way": way, **rates(rows, scores, counted)})
        first = at_first_sight if way == "forkrl" else scores
        cases.append({"what": "errors", "rows": "at first sight", "way": way, **rates(rows, first, unseen)})
        for category in dict.fromkeys(row["category"] for row in rows):
            chosen = [index for index, row in enumerate(rows) if row["category"] == category]
            cases.append({"what": "category", "rows": category, "way": way, **rates(rows, scores, chosen)})
        wrong = [row for row, score in zip(rows, scores, strict=True) if score != bool(row["truth"])]
        cases.append({"what": "misjudged", "way": way, "pairs": wrong})
    return cases


def report_cases(rows: Sequence[Row], judged: dict[str, list[bool]]) -> list[dict[str, Any]]:
    """Errors on the pairs from bug reports, and on all the others, next to what they were before."""
    reports = [json.loads(line) for line in REPORTS.read_text(encoding="utf-8").splitlines()]
    on_reports = {"forkrl": judge(reports, by_forkrl), "math-verify": judge(reports, by_math_verify)}
    cases = []
    for name, pairs, scores_of in (("reports", reports, on_reports), ("sets 1 to 4", rows, judged)):
        for way, scores in scores_of.items():
            figures = rates(pairs, scores, range(len(pairs)))
            cases.append({"what": "reports", "rows": name, "way": way, **figures})
            if way == "forkrl":
                counts = dict(zip(("false_positive_count", "false_negative_count"), BEFORE[name], strict=True))
                of = {key: value for key, value in figures.items() if key.endswith("_of")}
                cases.append({"what": "reports", "rows": name, "way": "forkrl, before", **of, **counts})
    return cases


def rates(rows: Sequence[Row], scores: Sequence[bool], chosen: Sequence[int]) -> dict[str, float]:
    """Both rates with their intervals over the chosen rows."""
    figures: dict[str, float] = {}
    for name, truth in (("false_positive", 0), ("false_negative", 1)):
        errors = [[float(scores[index] != bool(truth))] for index in chosen if rows[index]["truth"] == truth]
        figures[f"{name}_of"] = len(errors)
        if errors:
            figures[f"{name}_count"] = sum(error for (error,) in errors)
            figures |= as_columns(name, mean_with_interval(errors))
    return figures


def measure_speed(seed: int) -> list[dict[str, Any]]:
    """Responses per second of the pool, and of math-verify with and without the pool's work for it."""
    items = simple_items(seed)
    with VerifierPool({"": VerifierSpec("forkrl.rewards.math:verify_math")}, workers=WORKERS) as pool:
        pool.verify(simple_items(seed + 1000)[:200])
        began = time.perf_counter()
        scores = pool.verify(items)
        spent = time.perf_counter() - began
    right = sum(score.score for score in scores)
    figures = [{"way": "forkrl, pool of 2 workers", "responses_per_s": NUM_RESPONSES / spent, "judged_right": right}]
    for way, verifier in (("forkrl, one process", by_forkrl), ("math-verify, one process", by_math_verify)):
        began = time.perf_counter()
        right = sum(verifier(prompt.answer, response) for prompt, response in items)
        spent = time.perf_counter() - began
        figures.append({"way": way, "responses_per_s": NUM_RESPONSES / spent, "judged_right": right})
    return figures


def simple_items(seed: int) -> list[tuple[Prompt, str]]:
    """Different responses of some 600 characters; every other question is answered with a fraction, half are right."""
    draw = random.Random(seed)
    items = []
    for number in range(NUM_RESPONSES):
        top, bottom, off = draw.randint(1, 9999), draw.randint(2, 99), number // 2 % 2
        gold = str(top) if number % 2 else rf"\frac{{{top}}}{{{bottom}}}"
        answer = str(top + off) if number % 2 else rf"\frac{{{top + off}}}{{{bottom}}}"
        thoughts = f"Step {number} of {seed}: we add {top} to what there is. " * 12
        items.append((Prompt(str(number), "?", gold), rf"{thoughts}So the answer is $\boxed{{{answer}}}$."))
    return items


def show(cases: list[dict[str, Any]]) -> None:
    table = Table("rows", "way", "wrong taken for right", "right taken for wrong", box=None)
    for case in cases:
        if case["what"] == "errors":
            table.add_row(case["rows"], case["way"], rate(case, "false_positive"), rate(case, "false_negative"))
    Console().print(table)
    for case in cases:
        if case["what"] == "reports":
            counts = f"{count(case, 'false_positive')} false +, {count(case, 'false_negative')} false −"
            print(f"{case['rows']}, {case['way']}: {counts}")
    table = Table("category", "forkrl: false +", "false −", "math-verify: false +", "false −", box=None)
    categories = [case for case in cases if case["what"] == "category"]
    for ours, raw in zip(categories[: len(categories) // 2], categories[len(categories) // 2 :], strict=True):
        names = ("false_positive", "false_negative")
        table.add_row(ours["rows"], *(count(case, name) for case in (ours, raw) for name in names))
    Console().print(table)
    for case in cases:
        if case["what"] == "speed":
            print(
                f"{case['way']}: {case['responses_per_s']:,.0f} responses/s, {case['judged_right']:.0f} of 1,000 right"
            )


def rate(case: dict[str, Any], name: str) -> str:
    percent = Estimate(*(100 * case[column] for column in (name, f"{name}_low", f"{name}_high")))
    return f"{count(case, name)} = {percent.mean:.1f}% [{percent.low:.1f}, {percent.high:.1f}]"


def count(case: dict[str, Any], name: str) -> str:
    return f"{case.get(f'{name}_count', 0):.0f}/{case[f'{name}_of']}"


if __name__ == "__main__":
    main()
