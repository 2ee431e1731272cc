"""``forkrl analyze``: where a model forks (arXiv 2506.01939v2, section 3), on sampled or given responses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.text import Text

from forkrl import analysis
from forkrl.analysis.patterns import PAPER_TEMPERATURE, share_by_cluster
from forkrl.analysis.token_table import tokens_of_prompts
from forkrl.commands.options import AnalyzeOptions
from forkrl.commands.reference import parse_reference
from forkrl.commands.token_parts import collect_tokens, entropy_temperature, open_response_subject, read_responses
from forkrl.commands.work_folder import model_settings, present, stored_settings
from forkrl.errors import printable
from forkrl.report.analyze_page import analyze_headline, analyze_page
from forkrl.report.colors import coloured_response, entropy_legend
from forkrl.report.fork_view import choose_prompts, shown_prompts
from forkrl.report.formatting import sentence
from forkrl.report.page import Page
from forkrl.rollout.scoring import none_judged
from forkrl.stats.intervals import as_columns
from forkrl.store.results import Results, write_results

SCHEMA = "forkrl-analyze/1"
SHOWN_IN_TERMINAL = 600  # tokens


def run_analyze(options: AnalyzeOptions) -> int:
    results = analyze_model(options)
    if sys.stdout.isatty():
        Console(highlight=False).print(coloured_sample(results))
    return present(results.folder, make_page(results))


def analyze_model(options: AnalyzeOptions) -> Results:
    """Sample or read responses, measure every token, and compute the pattern tables.

    Resumable: finished parts stay in the output folder. A finished folder only has its tables recomputed.
    """
    folder = options.out or parse_reference(options.model).default_folder("analyze")
    subject = open_response_subject(options)
    left_out = collect_tokens(folder, subject, options, model_settings(SCHEMA, subject))
    tokens, settings = folder / "tokens", stored_settings(folder)
    summary = analysis.entropy_summary(tokens)
    fork = float(summary["value"]["percentile_80"]) if options.threshold is None else options.threshold
    responses = analysis.response_table(tokens, fork)
    facts = {
        "temperature": entropy_temperature(subject),
        "threshold": fork,
        "threshold_is": "the 80th percentile" if options.threshold is None else "given",
        "min_count": options.min_count,
        "prompts": int(responses["prompt"].nunique()),
        "responses": len(responses),
        **_outcomes(folder),
        **{name: float(value) for name, value in summary["value"].items()},
    }
    return write_results(
        folder,
        SCHEMA,
        settings=settings,
        headline=analyze_headline(facts),
        notes=[*_warnings(facts), *left_out],
        facts=facts,
        tables={
            "summary": summary.reset_index(),
            "histogram": analysis.entropy_histogram(tokens),
            "types": analysis.token_types(tokens, options.min_count, fork),
            "contexts": analysis.fork_contexts(tokens, fork, min_count=options.min_count),
            "positions": analysis.fork_positions(tokens, fork),
            "correctness": analysis.correct_against_incorrect(tokens, fork),
            "density": analysis.density_against_correctness(responses),
            "responses": responses,
        },
    )


def make_page(results: Results) -> Page:
    numbers = choose_prompts(results.tables["responses"])
    responses = read_responses(results.folder, ["prompt", "sample", "prompt_text", "finished", "correct"], numbers)
    return analyze_page(results, shown_prompts(tokens_of_prompts(results.folder / "tokens", numbers), responses))


def coloured_sample(results: Results) -> Group:
    """The first response with entropy colours, for a terminal."""
    tokens = tokens_of_prompts(results.folder / "tokens", [0])
    rows = tokens[tokens["sample"] == 0].head(SHOWN_IN_TERMINAL)
    more = int(rows["length"].iloc[0]) - len(rows)
    prompt = read_responses(results.folder, ["prompt_text"], [0])["prompt_text"].iloc[0]
    top = float(results.facts["max"])
    response = coloured_response(rows["text"].astype(str).tolist(), rows["entropy"].tolist(), top=top)
    if more > 0:
        response.append(f" … {more:,} more tokens")
    return Group(Text(printable(prompt), style="bold"), response, Text(), entropy_legend(top), Text())


def _warnings(facts: dict[str, Any]) -> list[str]:
    found = []
    if reason := none_judged(facts["verifier_failures"], facts["responses"], {}):
        found.append(sentence(reason))
    if facts["temperature"] != PAPER_TEMPERATURE:
        found.append(
            f"Entropies are measured at temperature {facts['temperature']:g}, the paper's at {PAPER_TEMPERATURE:g}: "
            f"compare figures with those of the paper only at --temperature {PAPER_TEMPERATURE:g}."
        )
    return found


def _outcomes(folder: Path) -> dict[str, Any]:
    """Accuracy with its interval, truncated fraction and counts; NaN where unknown."""
    responses = read_responses(folder, ["prompt", "finished", "correct", "failure"])
    judged = responses[responses["correct"].notna()]
    correct = judged["correct"].astype(float).groupby(judged["prompt"])
    finished = responses["finished"].dropna().astype(bool)
    return {
        **as_columns("accuracy", share_by_cluster(correct.sum(), correct.size())),
        "truncated_fraction": float((~finished).mean()) if len(finished) else float("nan"),
        "judged": len(judged),
        "verifier_failures": int((responses["failure"] != "").sum()),
    }
