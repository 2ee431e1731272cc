"""``forkrl analyze``: where a model forks (arXiv 2506.01939v2, section 3), on its own responses or on given ones."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console, Group
from rich.text import Text

from forkrl import analysis
from forkrl.analysis.patterns import PAPER_TEMPERATURE
from forkrl.analysis.token_table import tokens_of_prompts
from forkrl.commands.collect_tokens import collect_tokens, make_request
from forkrl.commands.options import AnalyzeOptions
from forkrl.commands.reference import parse_reference
from forkrl.commands.token_parts import read_responses
from forkrl.commands.work_folder import command_line, read_json, stored_question, work_provenance
from forkrl.errors import printable
from forkrl.report.analyze_page import analyze_page
from forkrl.report.colors import coloured_response, entropy_legend
from forkrl.report.fork_view import choose_prompts, shown_prompts
from forkrl.report.page import write_page
from forkrl.rollout.scoring import none_judged
from forkrl.stats.intervals import ClusterSums, Estimate
from forkrl.store.atomic import write_json, write_text

SCHEMA = "forkrl-analysis/1"
SHOWN_IN_TERMINAL = 600  # tokens of a response


@dataclass(frozen=True, slots=True, eq=False)
class Analysis:
    """What an analysis found, beside the tables of tokens and responses in ``folder``."""

    folder: Path
    facts: dict[str, Any]
    tables: dict[str, pd.DataFrame]
    notes: list[str]

    @property
    def threshold(self) -> float:
        """Entropy above which a token is a fork, in nats."""
        return float(self.facts["threshold"])


def run_analyze(options: AnalyzeOptions) -> int:
    """``forkrl analyze``."""
    found = analyze_model(options)
    if sys.stdout.isatty():
        Console(highlight=False).print(coloured_sample(found))
    print(describe_analysis(found))
    print(f"report: {write_analysis_report(found)}")
    return 0


def analyze_model(options: AnalyzeOptions) -> Analysis:
    """Generate (or read) responses, measure every token, and find the patterns of the paper and some more.

    Work is kept part by part in the output folder: the same call continues an interrupted one, and after a finished
    one only makes the tables again.
    """
    request = make_request(options)
    folder = options.out or parse_reference(options.model).default_folder("analyze")
    notes = collect_tokens(folder, request, {"schema": SCHEMA})
    return summarise(folder, options.threshold, options.min_count, notes, command_line())


def summarise(folder: Path, threshold: float | None, min_count: int, left_out: list[str], command: str) -> Analysis:
    """Make every table from the parts in ``folder``, and write them: ``tables/*.csv`` and ``analysis.json``."""
    tokens = folder / "tokens"
    summary = analysis.entropy_summary(tokens)
    fork = float(summary["value"]["percentile_80"]) if threshold is None else threshold
    per_response = analysis.response_table(tokens, fork)
    tables = {
        "summary": summary,
        "histogram": analysis.entropy_histogram(tokens),
        "types": analysis.token_types(tokens, min_count, fork),
        "contexts": analysis.fork_contexts(tokens, fork, min_count=min_count),
        "positions": analysis.fork_positions(tokens, fork),
        "correctness": analysis.correct_against_incorrect(tokens, fork),
        "density": analysis.density_against_correctness(per_response),
        "responses": per_response,
    }
    notes, outcomes = left_out, _outcomes(folder)
    if reason := none_judged(outcomes["verifier_failures"], len(per_response), {}):
        notes = [f"{reason[0].upper()}{reason[1:]}.", *notes]
    question = stored_question(folder)
    temperature = question["temperature"] or 1.0
    if temperature != PAPER_TEMPERATURE:
        notes = [*notes, _another_temperature(temperature)]
    facts = {
        "schema": SCHEMA,
        "model": question["model"],
        "temperature": temperature,
        "threshold": fork,
        "threshold_is": "given" if threshold is not None else "the 80th percentile",
        "min_count": min_count,
        "prompts": int(per_response["prompt"].nunique()),
        "responses": len(per_response),
        **outcomes,
        **{name: float(value) for name, value in summary["value"].items()},
        "notes": left_out,
        "command": command,
    }
    (folder / "tables").mkdir(exist_ok=True)
    for name, table in tables.items():
        write_text(folder / "tables" / f"{name}.csv", table.to_csv(index=name == "summary"))
    write_json(folder / "analysis.json", facts)
    return Analysis(folder, facts, tables, notes)


def describe_analysis(found: Analysis) -> str:
    """The main figures as a few lines for a person."""
    facts, types = found.facts, found.tables["types"]
    paper = f"the paper's Qwen3-8B at temperature {PAPER_TEMPERATURE:g}"
    lines = [
        f"{facts['model']}: {facts['tokens']:,.0f} tokens of {facts['responses']:,} responses "
        f"to {facts['prompts']:,} prompts; entropies at temperature {facts['temperature']:g}",
        f"entropy below 0.01 nats  {facts['share_below_0.01']:.2%} of tokens  ({paper}: 50.64%)",
        f"80th percentile          {facts['percentile_80']:.3f} nats  ({paper}: 0.672)",
    ]
    if facts["accuracy"] is not None:
        interval = f"95% [{facts['accuracy_low']:.3f}, {facts['accuracy_high']:.3f}]"
        lines.append(f"accuracy                 {facts['accuracy']:.3f}  {interval}")
    if types.empty:
        lines.append(f"no token type was seen {facts['min_count']} times: lower --min-count for tables of types")
    else:
        lines.append(f"highest mean entropy     {_listed(types.head(8))}")
        lines.append(f"lowest mean entropy      {_listed(types.tail(8)[::-1])}")
    return "\n".join([*lines, *found.notes])


def _another_temperature(temperature: float) -> str:
    return (
        f"Entropies are measured at temperature {temperature:g}, the paper's at {PAPER_TEMPERATURE:g}: compare figures "
        f"with those of the paper only at --temperature {PAPER_TEMPERATURE:g}."
    )


def _listed(types: pd.DataFrame) -> str:
    return "  ".join(
        f"{printable(text)!r} {mean:.2f}" for text, mean in zip(types["text"], types["mean_entropy"], strict=True)
    )


def _outcomes(folder: Path) -> dict[str, Any]:
    """Accuracy with its interval, and the shares cut at the limit and not judged; None where nobody knows."""
    responses = read_responses(folder, ["number", "finished", "correct", "failure"])
    accuracy = Estimate(float("nan"), float("nan"), float("nan"))
    judged = responses[responses["correct"].notna()]
    sums = ClusterSums(2)
    for _, group in judged.groupby("number"):
        sums.add([float(group["correct"].astype(float).sum()), len(group)])
    if len(judged):
        accuracy = sums.share(0, 1)
    known = responses["finished"].dropna()
    values = {
        "accuracy": accuracy.mean,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "truncated_fraction": float((~known.astype(bool)).mean()) if len(known) else float("nan"),
    }
    figures: dict[str, Any] = {name: None if value != value else value for name, value in values.items()}
    return figures | {"judged": len(judged), "verifier_failures": int((responses["failure"] != "").sum())}


def coloured_sample(found: Analysis) -> Group:
    """The first response, each token on the colour of its entropy, for a terminal."""
    tokens = tokens_of_prompts(found.folder / "tokens", [0])
    rows = tokens[tokens["sample"] == 0].head(SHOWN_IN_TERMINAL)
    more = int(rows["length"].iloc[0]) - len(rows)
    prompt = read_responses(found.folder, ["prompt"], [0])["prompt"].iloc[0]
    top = float(found.facts["max"])
    response = coloured_response(rows["text"].astype(str).tolist(), rows["entropy"].tolist(), top=top)
    if more > 0:
        response.append(f" … {more:,} more tokens")
    return Group(Text(printable(prompt), style="bold"), response, Text(), entropy_legend(top), Text())


def rewrite_report(folder: Path) -> Path:
    """Make the page of a finished folder again."""
    return write_analysis_report(read_analysis(folder))


def write_analysis_report(found: Analysis) -> Path:
    """Write ``report.html`` beside the tables: the figures, and a sample of the responses to look at."""
    per_response = found.tables["responses"]
    numbers = choose_prompts(per_response)
    responses = read_responses(found.folder, ["number", "sample", "prompt", "finished", "correct"], numbers)
    shown = shown_prompts(tokens_of_prompts(found.folder / "tokens", numbers), responses)
    page = analyze_page(
        found.facts,
        found.tables,
        shown,
        notes=found.notes,
        provenance=work_provenance(found.folder),
        command=found.facts["command"],
    )
    return write_page(found.folder / "report.html", page)


def read_analysis(folder: Path) -> Analysis:
    """A finished analysis, from its folder."""
    facts = read_json(folder / "analysis.json")
    given = facts["threshold"] if facts["threshold_is"] == "given" else None
    return summarise(folder, given, facts["min_count"], facts["notes"], facts["command"])
