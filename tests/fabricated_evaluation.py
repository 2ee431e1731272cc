"""An evaluation folder as ``forkrl eval`` leaves it, of random responses: no model, no verifier."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from forkrl.evaluation.responses import ScoredResponse
from forkrl.evaluation.summary import summarise_benchmark

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
            text = f"{HOSTILE} The response {sample} to {question}, \\boxed{{{answer}}}"
            made.append(
                ScoredResponse(
                    f"q{question:03}", sample, text, tokens, not cut, float(generator.gamma(4, 0.1)), float(right),
                    failure, answer,
                )
            )  # fmt: skip
    return made


def write_evaluation(
    folder: Path, benchmarks: Mapping[str, list[ScoredResponse]], *, model: str = "Qwen/Qwen3-0.6B", **changes: Any
) -> Path:
    """Write responses, results, questions and results of benchmarks; ``changes`` go into the results."""
    for part in ("responses", "scores", "questions"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    entries = []
    for name, responses in benchmarks.items():
        samples = max(Counter(response.question for response in responses).values())
        write_lines(folder / "responses" / f"{name}.jsonl", [
            {"question": r.question, "sample": r.sample, "text": r.text, "reasoning": "", "tokens": r.tokens,
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
        entries.append(
            {
                "name": name, "title": TITLES.get(name, name), "hub": f"made-up/{name}", "revision": "main",
                "fingerprint": f"f-{name}", "questions": len(ids), "available_questions": len(ids),
                "expected_questions": len(ids), "notice": "", "seconds": 12.5,
                "tokens_per_s": 1000.0, **summarise_benchmark(responses, samples),
            }
        )  # fmt: skip
    results = {
        "schema": "forkrl-eval/2", "model": model, "engine": "torch", "command": "forkrl eval MODEL", "seed": 0,
        "temperature": 1.0, "samples": entries[0]["samples"], "max_response_tokens": LIMIT, "prompt_format": "plain",
        "versions": {"forkrl": "0.1"}, "benchmarks": entries, **changes,
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps({"schema": "forkrl-eval/2"}))
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
