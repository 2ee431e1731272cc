"""``report.html`` of a finished evaluation: its figures, and some of its responses to read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from forkrl.evaluation.folder import read_evaluation, read_questions, read_texts
from forkrl.evaluation.paper import TABLE_2
from forkrl.evaluation.responses import ScoredResponse
from forkrl.evaluation.summary import average_over_benchmarks, by_question
from forkrl.report.eval_page import write_eval_page
from forkrl.report.sampling import evenly_spaced

SHOWN_QUESTIONS = 8


def write_eval_report(folder: Path) -> Path:
    """Write the page of a finished evaluation from its folder, and return its path.

    Raises:
        UserError: see ``read_evaluation``; or the page cannot be written.
    """
    results, scored = read_evaluation(folder)
    samples = {each["name"]: each["samples"] for each in results["benchmarks"]}
    shown = {name: shown_questions(folder, name, scored[name], samples[name]) for name in scored}
    return write_eval_page(
        folder, results, average=average_over_benchmarks(scored, samples), shown=shown, paper=TABLE_2
    )


def shown_questions(folder: Path, name: str, responses: Sequence[ScoredResponse], samples: int) -> list[dict[str, Any]]:
    """Questions of every difficulty, from the hardest to the easiest, with the first response of each outcome.

    The first question with a response that could not be judged is among them.
    """
    rows = list(by_question(responses, samples).values())
    rows.sort(key=lambda row: (_accuracy(row), row[0].question))
    places = set(evenly_spaced(len(rows), SHOWN_QUESTIONS))
    failed = [place for place, row in enumerate(rows) if any(response.failure for response in row)]
    chosen = [rows[place] for place in sorted(places | set(failed[:1]))]
    questions = read_questions(folder, name)
    kept = {id(row): _one_of_each_outcome(row) for row in chosen}
    texts = read_texts(folder, name, {(r.question, r.sample) for responses in kept.values() for r in responses})
    return [
        {
            "question": row[0].question,
            "prompt": questions.get(row[0].question, {}).get("prompt", ""),
            "answer": questions.get(row[0].question, {}).get("answer", ""),
            "accuracy": _accuracy(row),
            "responses": [
                {
                    "sample": response.sample,
                    "score": response.score,
                    "failure": response.failure,
                    "answer": response.answer,
                    "tokens": response.tokens,
                    "finished": response.finished,
                    "text": texts[response.question, response.sample],
                }
                for response in kept[id(row)]
            ],
        }
        for row in chosen
    ]


def _accuracy(row: Sequence[ScoredResponse]) -> float:
    return float(np.mean([response.score for response in row]))


def _one_of_each_outcome(row: Sequence[ScoredResponse]) -> list[ScoredResponse]:
    """The first right, the first wrong and the first failed one."""
    first: dict[tuple[bool, bool], ScoredResponse] = {}
    for response in row:
        first.setdefault((response.score == 1, bool(response.failure)), response)
    return sorted(first.values(), key=lambda response: response.sample)
