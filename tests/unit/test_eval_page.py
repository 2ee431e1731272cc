"""The pages of ``forkrl eval`` and ``forkrl compare``: their sentences, their numbers, and text that means harm."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from forkrl.commands.report import write_report
from forkrl.errors import UserError
from forkrl.evaluation.folder import read_evaluation, read_questions, read_results
from forkrl.evaluation.paper import TABLE_2
from forkrl.evaluation.shelves import shown_questions
from forkrl.report.compare_page import (
    budget_curves,
    compare_headline,
    compare_page,
    difference_forest,
    side_names,
    spending_curves,
)
from forkrl.report.eval_page import (
    accuracy_against_budget,
    accuracy_and_paper,
    eval_headline,
    eval_notes,
    eval_page,
    length_distributions,
    pass_and_majority,
)
from forkrl.report.formatting import READ_CHARACTERS, interval_of, percent, probability, shortened
from forkrl.report.page import write_page
from forkrl.report.terminal import describe_page
from forkrl.stats.intervals import Estimate, as_columns
from forkrl.store.results import Results
from tests.fabricated_evaluation import HOSTILE, random_responses, write_evaluation, write_lines
from tests.report_page import Page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    benchmarks = {"aime24": random_responses(30, 4), "mine": random_responses(12, 4, seed=1, answers=False)}
    return write_evaluation(tmp_path_factory.mktemp("evaluation"), benchmarks, model=f"model{HOSTILE}")


def test_a_folder_is_read_back_as_it_was_written(folder: Path) -> None:
    results, scored = read_evaluation(folder)
    assert results.settings["model"] == f"model{HOSTILE}"
    assert list(results.tables) == ["benchmarks", "passes", "budget", "lengths", "unanswered", "mean"]
    names = ("accuracy", "accuracy_low", "accuracy_high", "length_gap_high", "failed_timeout")
    assert set(names) <= set(pd.read_csv(folder / "tables/benchmarks.csv").columns)
    expected = random_responses(30, 4)
    assert [(r.question, r.sample, r.score, r.failure, r.answer, r.tokens, r.entropy) for r in scored["aime24"]] == [
        (r.question, r.sample, r.score, r.failure, r.answer, r.tokens, r.entropy) for r in expected
    ]
    assert read_questions(folder, "aime24")["q003"]["prompt"] == f"What is q003? {HOSTILE}"
    assert read_questions(folder, "other") == {}


def test_three_responses_without_an_answer_are_shown(tmp_path: Path) -> None:
    benchmarks = {"aime24": random_responses(30, 4, longer=4), "mine": random_responses(12, 4, answers=False)}
    results, scored = read_evaluation(write_evaluation(tmp_path, benchmarks))
    missing = [(response.question, response.sample) for response in scored["aime24"] if response.answer == ""]
    table = results.tables["unanswered"]
    shown = list(zip(table["question"], table["sample"], strict=True))
    assert len(missing) > 5 and shown == [missing[0], missing[round((len(missing) - 1) / 2)], missing[-1]]
    assert all(HOSTILE in text and len(text) <= 300 for text in table["end_of_response"])
    share = len(missing) / len(scored["aime24"])
    assert f"AIME'24: no answer was found in {share:.1%} of the responses." in results.notes
    assert not any("mine: no answer" in note for note in results.notes)  # its verifier does not say
    printed = describe_page(eval_page(results, [], TABLE_2)).partition("Responses without an answer:\n")[2]
    assert [line.split()[:2] for line in printed.splitlines()[1:4]] == [["aime24", str(sample)] for _, sample in shown]


def test_the_last_verdict_counts(tmp_path: Path) -> None:
    write_evaluation(tmp_path, {"x": random_responses(2, 2)})
    with (tmp_path / "scores" / "x.jsonl").open("a") as file:
        row = {"question": "q001", "sample": 0, "score": 0.25, "failure": "", "answer": "again"}
        file.write(json.dumps(row) + "\n")
    _, scored = read_evaluation(tmp_path)
    assert [(r.score, r.answer) for r in scored["x"] if (r.question, r.sample) == ("q001", 0)] == [(0.25, "again")]


def damage(path: Path, number: int, **changes: Any) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[number] |= changes
    write_lines(path, rows)


FINISH = "which samples and judges only what is missing"


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda f: (f / "results.json").unlink(), f"this evaluation is not finished; .*{FINISH}"),
        (lambda f: (f / "results.json").write_text("{"), "results.json: cannot be read"),
        (lambda f: (f / "results.json").write_text("[]"), "results.json: is not a JSON object"),
        (lambda f: (f / "results.json").write_text("{}"), "has schema None, not 'forkrl-eval/3'"),
        (lambda f: (f / "results.json").write_text('{"schema": "forkrl-eval/2"}'), "has schema 'forkrl-eval/2'"),
        (lambda f: (f / "tables" / "budget.csv").unlink(), "budget.csv: cannot be read"),
        (lambda f: (f / "responses" / "x.jsonl").unlink(), f"x.jsonl: is missing; .*{FINISH}"),
        (lambda f: (f / "responses" / "x.jsonl").write_text('{"question": "q000", "sam'), "x.jsonl line 1 is not JSON"),
        (lambda f: damage(f / "responses" / "x.jsonl", 1, tokens="many"), "responses/x.jsonl line 2: tokens is text"),
        (lambda f: damage(f / "responses" / "x.jsonl", 1, finished=None), "line 2: finished is missing"),
        (lambda f: damage(f / "scores" / "x.jsonl", 3, score=math.nan), "scores/x.jsonl line 4: score is nan"),
        (lambda f: damage(f / "scores" / "x.jsonl", 3, score=1.5), "line 4: score 1.5 is not in"),
        (lambda f: damage(f / "scores" / "x.jsonl", 0, sample=7), "sample 0 of question q000 of x has no result"),
        (lambda f: damage(f / "responses" / "x.jsonl", 0, question="q001"), "x has 3 responses to 2 questions, not 2"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused_in_a_line(tmp_path: Path, harm: Any, says: str) -> None:
    write_evaluation(tmp_path, {"x": random_responses(2, 2)})
    harm(tmp_path)
    with pytest.raises(UserError, match=says) as refused:
        read_evaluation(tmp_path)
    assert "\n" not in str(refused.value)


def test_shown_questions_go_from_hard_to_easy_with_each_outcome(folder: Path) -> None:
    _, scored = read_evaluation(folder)
    assert any(response.failure for response in scored["aime24"])
    shown = shown_questions(folder, "aime24", scored["aime24"], 4)
    accuracies = [question["accuracy"] for question in shown]
    assert accuracies == sorted(accuracies) and accuracies[0] < 0.5 < accuracies[-1]
    outcomes = {(r["score"], bool(r["failure"])) for question in shown for r in question["responses"]}
    assert outcomes == {(0.0, False), (1.0, False), (0.0, True)}
    for question in shown:
        for response in question["responses"]:
            assert f"The response {response['sample']} to {int(question['question'][1:])}," in response["text"]


def test_a_question_with_a_failure_is_shown_wherever_it_stands(tmp_path: Path) -> None:
    calm = [replace(each, failure="", answer=each.answer or "") for each in random_responses(30, 4)]
    by_place = sorted(
        {each.question for each in calm}, key=lambda q: (sum(r.score for r in calm if r.question == q), q)
    )
    failing = by_place[2]  # of 30, eight evenly spaced are 0, 4, 8, …
    assert failing not in [by_place[place] for place in (0, 4, 8, 12, 17, 21, 25, 29)]
    harmed = [replace(each, failure="crash", score=0.0) if each.question == failing else each for each in calm]
    write_evaluation(tmp_path, {"x": harmed})
    shown = shown_questions(tmp_path, "x", harmed, 4)
    assert "crash" in [response["failure"] for question in shown for response in question["responses"]]


def test_the_page_of_an_evaluation_shows_its_numbers_and_obeys_no_text(folder: Path) -> None:
    page = Page(write_report(folder))
    (first, second) = read_results(folder).tables["benchmarks"].to_dict("records")
    assert HOSTILE not in page.source and "<script>alert" not in page.source and "\u202e" not in page.source
    assert "from The response" not in page.text and "The response 0 to 0" not in page.source.partition("</style>")[0]
    mean = (first["accuracy"] + second["accuracy"]) / 2
    assert f"Acc@4 {100 * mean:.1f}% [" in page.text
    for text in (
        percent(interval_of(first, "accuracy")),
        "55.83 → 63.54",
        "responses that could not be judged count as wrong (",
        "no answer found",
    ):
        assert text in page.text, text
    assert page.text.count("What is q0") >= 8
    names = ("accuracy", "pass-majority", "budget", "lengths", "paper", "trouble")
    assert all(f"eval-{name}.csv" in page.source for name in names)


def test_a_page_of_one_benchmark_without_anything_beside_it(tmp_path: Path) -> None:
    write_evaluation(tmp_path, {"mine": random_responses(1, 1, answers=False)})
    results = read_results(tmp_path)
    page = Page(write_page(tmp_path / "report.html", eval_page(results, [], {})))
    assert "mine: Acc@1" in page.text and "on 1 questions" in page.text
    changed = results.tables["benchmarks"].assign(available_questions=5, notice="mine: 5 questions, not 6.")
    assert eval_notes(changed)[-2:] == ["mine: 5 questions, not 6.", "mine: the first 1 of 5 questions."]
    assert "the paper's Table 2" not in page.text and "Responses to read" not in page.text
    assert "nan" not in page.text.lower().split()


def test_the_verdict_names_the_hardest_and_the_easiest(folder: Path) -> None:
    benchmarks = read_results(folder).tables["benchmarks"].assign(accuracy=[0.75, 0.25])
    mean = pd.DataFrame([as_columns("accuracy", Estimate(0.5, 0.25, 0.75)) | {"length": 1234.5}])
    assert eval_headline(benchmarks, mean) == (
        "Acc@4 50.0% [25.0, 75.0] on average over 2 benchmarks, from 25.0% (mine) to 75.0% (AIME'24), with "
        "1,234 tokens a response."
    )


def test_a_benchmark_that_nothing_judged_comes_first(folder: Path) -> None:
    tables = read_results(folder).tables
    benchmarks = tables["benchmarks"].assign(failed_timeout=[120, 0], first_failure=["no 'x' here", ""])
    assert eval_headline(benchmarks, tables["mean"]) == (
        "AIME'24: none of the 120 responses could be judged; the verifier's first error: no 'x' here."
    )
    benchmarks = tables["benchmarks"].assign(
        failed_timeout=[2, 0], failed_error=[1, 0], notice=["", "odd"], unparsed=[0.0, math.nan]
    )
    assert eval_notes(benchmarks) == [
        "AIME'24: responses that could not be judged count as wrong (2 by timeout, 1 by error); the same command "
        "judges them again.",
        "odd",
    ]


def test_the_terminal_shows_the_main_figures(folder: Path) -> None:
    results = read_results(folder)
    text = describe_page(eval_page(results, [], TABLE_2))
    first = results.tables["benchmarks"].iloc[0]
    assert f"{first['accuracy']:.4g}"[:5] in text
    assert text.startswith(results.headline) and "pass@4" in text and "maj@4" in text
    assert "25.42 → 26.25" not in text and "33.33 → 34.58" in text


def test_figures_draw_the_numbers(folder: Path) -> None:
    tables = read_results(folder).tables
    benchmarks = tables["benchmarks"]
    (axes,) = accuracy_and_paper(benchmarks, TABLE_2).axes
    drawn = {round(float(x), 6) for line in axes.lines for x in np.atleast_1d(line.get_xdata())}
    assert {round(accuracy, 6) for accuracy in benchmarks["accuracy"]} <= drawn
    assert {0.3333, 0.6354} <= drawn
    above, below = pass_and_majority(tables).axes
    assert (len(above.lines), len(below.lines)) == (2, 1), "maj@k of a verifier that names no answers is not drawn"
    passes, budget = (tables[name].groupby("benchmark") for name in ("passes", "budget"))
    assert np.asarray(above.lines[0].get_ydata()).tolist() == passes.get_group("aime24")["pass"].tolist()
    assert len(pass_and_majority(tables | {"benchmarks": benchmarks[1:]}).axes) == 1
    (axes,) = accuracy_against_budget(tables).axes
    assert np.asarray(axes.lines[1].get_xdata()).tolist() == budget.get_group("mine")["tokens"].tolist()


def test_long_text_keeps_its_beginning_and_its_longer_end() -> None:
    text = "a" * READ_CHARACTERS + "b" * READ_CHARACTERS
    short = shortened(text)
    assert short.startswith("a" * (READ_CHARACTERS // 4) + "\n") and short.endswith("b" * (READ_CHARACTERS * 3 // 4))
    assert f"[… {READ_CHARACTERS:,} characters are left out here …]" in short
    assert shortened("b" * READ_CHARACTERS) == "b" * READ_CHARACTERS


def sides(measure: str, a: float, b: float, half: float) -> dict[str, float]:
    """Two estimates and their difference, all with intervals that reach ``half`` to either side."""
    means = {f"{measure}a": a, f"{measure}b": b, f"{measure}difference": b - a}
    return {
        column: value
        for name, mean in means.items()
        for column, value in as_columns(name, Estimate(mean, mean - half, mean + half)).items()
    }


def comparison(**changes: Any) -> Results:
    """A comparison of one made-up benchmark; ``changes``: cells of its row, an estimate as a tuple."""
    row = {
        "benchmark": "x", "title": HOSTILE, "questions": 30, "p": 0.0004, "p_holm": 0.0004, "better": 9, "worse": 2,
        "same": 19, **sides("accuracy_", 0.4, 0.5, 0.05), **sides("length_", 900, 1100, 110), "matched_a": 0.4,
        "matched_b": 0.42, **as_columns("matched_difference", Estimate(0.02, -0.01, 0.05)),
    }  # fmt: skip
    for name, value in changes.items():
        row |= as_columns(name, Estimate(*value)) if isinstance(value, tuple) else {name: value}
    at = {"a": 0.4, "b": 0.42, **as_columns("difference", Estimate(0.02, -0.01, 0.05))}
    question = {"question": "q1", "text": f"What? {HOSTILE}", "a": 0.0, "b": 1.0, "difference": 1.0}
    tables = {
        "benchmarks": [row],
        "mean": [],
        "passes": [{"benchmark": "x", "measure": "pass@k", "k": 1, **at}],
        "budget": [{"benchmark": "x", "tokens": n, **sides("", n / 1e4, 0.1, 0.05)} for n in (100, 1000)],
        "spending": [{"benchmark": "x", "spent": s, "budget_a": s, "budget_b": s, **at} for s in (50.0, 900.0)],
        "changes": [{"benchmark": "x", **question, "length_a": 5.0, "length_b": 9.0}],
    }
    a, b = ({"folder": f"evals/{name}", "model": name, "samples": 4} for name in ("base", "trained"))
    frames = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    return Results(
        folder=Path("analyses/x"), schema="forkrl-compare/2", command=f"forkrl compare {HOSTILE}",
        settings={"a": a, "b": b, "seed": 0}, headline=compare_headline(frames, ("base", "trained")),
        notes=["samples differs."], facts={}, tables=frames, versions={"forkrl": "0.1"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "trained is 10.0 points [5.0, 15.0] better than base on x, p < 0.001. Its responses are 200 tokens longer"
             ". No clear difference where both spend the same tokens: trained minus base is +2.0 points [-1.0, +5.0]."),
        ({"accuracy_difference": (-0.1, -0.15, -0.05), "p": 0.0312},
         "trained is 10.0 points [5.0, 15.0] worse than base on x, p = 0.031. Its"),
        ({"accuracy_difference": (0.012, -0.03, 0.05), "p": 0.59},
         "No clear difference on x: trained minus base is +1.2 points [-3.0, +5.0], p = 0.59. Its"),
        ({"accuracy_difference": (0.012, 0.0, 0.05), "p": 0.06}, "No clear difference on x"),
        ({"length_difference": (-15, -40, 10)},
         "p < 0.001. Its responses are neither clearly longer nor shorter (-15 tokens)."),
        ({"accuracy_difference": (0.1, math.nan, math.nan)},
         "No clear difference on x: trained minus base is +10.0 points, p"),
        ({"matched_difference": (-0.04, -0.06, -0.02)},
         "tokens longer. trained is 4.0 points [2.0, 6.0] worse than base where both spend the same tokens."),
    ],
)  # fmt: skip
def test_the_verdict_of_a_comparison(changes: dict[str, Any], says: str) -> None:
    assert says in comparison(title="x", **changes).headline


def test_p_values_are_never_zero() -> None:
    assert [probability(p) for p in (1.0, 0.04321, 0.001, 0.00099)] == ["p = 1", "p = 0.043", "p = 0.001", "p < 0.001"]


def test_the_page_of_a_comparison(tmp_path: Path) -> None:
    found = comparison()
    found.settings["b"]["model"] = HOSTILE
    page = Page(write_page(tmp_path / "report.html", compare_page(found)))
    assert "<script>alert" not in page.source and "\u202e" not in page.source
    for text in (
        "40.0% → 50.0%",
        "+10.0",
        "samples differs.",
        "What? <script>",
        "2 lower, 19 the same",
    ):
        assert text in page.text, text
    assert "nan" not in page.text.lower().split()
    row = found.tables["benchmarks"]
    several = found.tables | {"mean": row.drop(columns=["title", "p_holm"]), "benchmarks": pd.concat([row] * 3)}
    assert "on average over 3 benchmarks" in compare_headline(several, ("base", "trained"))
    page = Page(write_page(tmp_path / "report.html", compare_page(replace(found, tables=several))))
    assert "mean of the benchmarks" in page.text


def test_figures_of_a_comparison_draw_its_numbers() -> None:
    tables, names = comparison().tables, ("base", "trained")
    (axes,) = difference_forest(tables).axes
    drawn = {round(float(x), 6) for line in axes.lines for x in np.atleast_1d(line.get_xdata())}
    assert {0.1, 0.02, 0.05, 0.15} <= drawn
    assert np.asarray(budget_curves(tables, names).axes[0].lines[0].get_ydata()).tolist() == [0.01, 0.1]
    three = tables | {"benchmarks": pd.concat([tables["benchmarks"]] * 3)}
    assert np.asarray(spending_curves(three, names).axes[2].lines[1].get_xdata()).tolist() == [50.0, 900.0]


def test_an_average_without_an_interval_is_shown_without_one(folder: Path) -> None:
    results = read_results(folder)
    mean = pd.DataFrame([as_columns("accuracy", Estimate(0.5, math.nan, math.nan)) | {"length": 10.0}])
    page = eval_page(replace(results, tables=results.tables | {"mean": mean}), [], {})
    assert page.shelves == []
    assert (page.cards[0].value, page.cards[0].note) == ("50.0%", "mean of the benchmarks")


def test_lengths_have_a_y_axis(folder: Path) -> None:
    for axes in length_distributions(read_results(folder).tables).axes:
        ticks = axes.get_yticks()
        assert len(ticks) >= 3 and axes.yaxis.get_major_formatter()(0.25, None) == "25%"


@pytest.mark.parametrize(
    ("a", "b", "names"),
    [
        ({"model": "Qwen/base", "folder": "evals/a"}, {"model": "runs/x", "folder": "evals/b"}, ("base", "x")),
        ({"model": "m", "folder": "evals/hot"}, {"model": "m", "folder": "evals/cold"}, ("hot", "cold")),
        ({"model": "m", "folder": "one/e"}, {"model": "m", "folder": "two/e"}, ("one/e", "two/e")),
        ({"folder": "e"}, {"folder": "e"}, ("e (first)", "e (second)")),
    ],
)
def test_the_sides_of_a_comparison_have_names(a: dict[str, str], b: dict[str, str], names: tuple[str, str]) -> None:
    assert side_names(a, b) == names
