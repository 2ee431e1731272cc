"""An evaluation folder as ``forkrl eval`` leaves it, of random responses: no model, no verifier."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from forkrl.evaluation.folder import SCHEMA, ScoredResponse
from forkrl.evaluation.shelves import unanswered_responses
from forkrl.evaluation.summary import Tables, mean_over_benchmarks, summarise_benchmark
from forkrl.report.eval_page import eval_headline, eval_notes
from forkrl.store.results import write_results

HOSTILE = "<script>alert(1)</script>\x1b[2J\u202e$x_1$"
TITLES = {
    "aime24": "AIME'24", "aime25": "AIME'25", "amc23": "AMC'23", "math500": "MATH500", "minerva": "Minerva",
    "olympiad": "OlympiadBench",
}  # fmt: skip
LIMIT = 4000


def random_responses(
    questions: int, samples: int, *, seed: int = 0, ability: float = 0.0, longer: float = 1.0, answers: bool = True
) -> list[ScoredResponse]:
    """Questions of every difficulty, harder ones with longer responses; wrong answers are few, so that they agree."""
    generator = np.random.default_rng(seed)
    made = []
    for question, easiness in enumerate(np.random.default_rng(99).normal(0, 2, questions)):
        chance = 1 / (1 + np.exp(-easiness - ability))
        for sample in range(samples):
            right = bool(generator.random() < chance)
            tokens = int(np.clip(generator.lognormal(6.5 - 0.3 * easiness + 0.4 * (not right), 0.5) * longer, 1, LIMIT))
            failure = "timeout" if generator.random() < 0.01 else ""
            cut = tokens == LIMIT
            right = right and not failure and not cut
            read = "42" if right else "" if cut else str(generator.integers(0, 4))
            answer = None if failure or not answers else read
            made.append(
                ScoredResponse(
                    f"q{question:03}", sample, tokens, not cut, float(generator.gamma(4, 0.1)), float(right),
                    failure, answer,
                )
            )  # fmt: skip
    return made


def write_evaluation(
    folder: Path, benchmarks: Mapping[str, list[ScoredResponse]], *, model: str = "Qwen/Qwen3-0.6B", **changes: Any
) -> Path:
    """Write responses, results, questions and results of benchmarks; ``changes`` go into the settings."""
    for part in ("responses", "scores", "questions"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    tables: Tables = {}
    for name, responses in benchmarks.items():
        samples = max(Counter(response.question for response in responses).values())
        write_lines(folder / "responses" / f"{name}.jsonl", [
            {"question": r.question, "sample": r.sample, "text": text_of(r), "reasoning": "", "tokens": r.tokens,
             "finished": r.finished,
             "entropy": r.entropy} for r in responses
        ])  # fmt: skip
        write_lines(folder / "scores" / f"{name}.jsonl", [
            {"question": r.question, "sample": r.sample, "score": r.score, "failure": r.failure, "answer": r.answer}
            for r in responses
        ])  # fmt: skip
        ids = sorted({response.question for response in responses})
        lines = [{"question": each, "prompt": f"What is {each}? {HOSTILE}", "answer": "42"} for each in ids]
        write_lines(folder / "questions" / f"{name}.jsonl", lines)
        found = summarise_benchmark(name, responses, samples)
        found["benchmarks"][0] |= {
            "title": TITLES.get(name, name), "available_questions": len(ids), "expected_questions": len(ids),
            "hub": f"made-up/{name}", "revision": "main", "fingerprint": f"f-{name}", "notice": "",
            "first_failure": "", "seconds": 12.5, "tokens_per_s": 1000.0,
        }  # fmt: skip
        found["unanswered"] = unanswered_responses(folder, name, responses)
        for table, rows in found.items():
            tables.setdefault(table, []).extend(rows)
    tables["mean"] = mean_over_benchmarks(tables["benchmarks"])
    frames = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    settings = {
        "schema": SCHEMA, "model": model, "engine": "torch", "seed": 0, "temperature": 1.0, "samples": samples,
        "max_response_tokens": LIMIT, "prompt_format": "plain", **changes,
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    write_results(
        folder,
        SCHEMA,
        settings=settings,
        headline=eval_headline(frames["benchmarks"], frames["mean"]),
        notes=eval_notes(frames["benchmarks"]),
        facts={"verifiers": {}},
        tables=frames,
    )
    return folder


def text_of(response: ScoredResponse) -> str:
    """What the model wrote."""
    return f"{HOSTILE} The response {response.sample} to {int(response.question[1:])}, \\boxed{{{response.answer}}}"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
