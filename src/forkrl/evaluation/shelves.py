"""Sample responses of an evaluation for its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from forkrl.evaluation.folder import ScoredResponse, read_evaluation, read_questions, read_texts
from forkrl.evaluation.summary import by_question
from forkrl.report.formatting import evenly_spaced, shortened
from forkrl.report.page import Shelf

SHOWN_QUESTIONS = 8
_SHOWN_UNANSWERED, _END_CHARACTERS = 3, 300


def read_shelves(folder: Path) -> list[Shelf]:
    results, scored = read_evaluation(folder)
    shelves = []
    for row in results.tables["benchmarks"].to_dict("records"):
        shown = shown_questions(folder, row["benchmark"], scored[row["benchmark"]], row["samples"])
        note = f"{len(shown)} of {row['questions']:,} questions, from the hardest to the easiest"
        shelves.append(Shelf(row["title"], note, shown))
    return shelves


def unanswered_responses(folder: Path, name: str, responses: Sequence[ScoredResponse]) -> list[dict[str, Any]]:
    """Three responses in which no answer was found, evenly spaced, with the end of each."""
    found = [(response.question, response.sample) for response in responses if response.answer == ""]
    chosen = [found[index] for index in evenly_spaced(len(found), _SHOWN_UNANSWERED)]
    texts = read_texts(folder, name, set(chosen)) if chosen else {}
    return [
        {"benchmark": name, "question": key[0], "sample": key[1], "end_of_response": texts[key][-_END_CHARACTERS:]}
        for key in chosen
    ]


def shown_questions(folder: Path, name: str, responses: Sequence[ScoredResponse], samples: int) -> list[dict[str, Any]]:
    """Questions from hardest to easiest, including one unjudged, with the first response of each outcome."""
    rows = list(by_question(responses, samples).values())
    rows.sort(key=lambda row: (_accuracy(row), row[0].question))
    failed = [place for place, row in enumerate(rows) if any(response.failure for response in row)]
    chosen = [rows[place] for place in sorted({*evenly_spaced(len(rows), SHOWN_QUESTIONS), *failed[:1]})]
    questions = read_questions(folder, name)
    kept = {row[0].question: _one_of_each_outcome(row) for row in chosen}
    texts = read_texts(folder, name, {(r.question, r.sample) for shown in kept.values() for r in shown})
    return [
        {
            "question": row[0].question,
            "prompt": shortened(questions.get(row[0].question, {}).get("prompt", "")),
            "answer": shortened(questions.get(row[0].question, {}).get("answer", "")),
            "accuracy": _accuracy(row),
            "outcome": f"{_accuracy(row):.0%} of {samples} right",
            "responses": [
                {
                    "sample": response.sample,
                    "score": response.score,
                    "failure": response.failure,
                    "outcome": "failed" if response.failure else "right" if response.score == 1 else "wrong",
                    "facts": _facts(response),
                    "text": shortened(texts[response.question, response.sample]),
                }
                for response in kept[row[0].question]
            ],
        }
        for row in chosen
    ]


def _facts(response: ScoredResponse) -> list[str]:
    facts = [f"sample {response.sample + 1}", f"{response.tokens:,} tokens"]
    if not response.finished:
        facts.append("cut at the limit")
    if response.failure:
        facts.append(response.failure)
    elif response.answer is not None:
        facts.append(f"answered {shortened(response.answer, 200)}" if response.answer else "no answer found")
    return facts


def _accuracy(row: Sequence[ScoredResponse]) -> float:
    return float(np.mean([response.score for response in row]))


def _one_of_each_outcome(row: Sequence[ScoredResponse]) -> list[ScoredResponse]:
    """The first right, wrong and failed response."""
    first: dict[tuple[bool, bool], ScoredResponse] = {}
    for response in row:
        first.setdefault((response.score == 1, bool(response.failure)), response)
    return sorted(first.values(), key=lambda response: response.sample)
