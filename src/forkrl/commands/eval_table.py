"""An evaluation as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forkrl.commands.options import EvalOptions
from forkrl.evaluation.benchmarks import BENCHMARKS, GYM
from forkrl.evaluation.paper import TABLE_2
from forkrl.report.eval_page import unjudged_benchmarks

_PROMPTS = {"plain": "plain prompt", "chat": "chat prompt", "template": "the task's own prompt"}


def run_eval(options: EvalOptions) -> int:
    """``forkrl eval``."""
    if options.list_benchmarks:
        print(list_benchmarks())
        return 0
    from forkrl.commands.evaluate import evaluate_model  # which imports torch

    found = evaluate_model(options)
    print(describe_evaluation(found.results))
    print(f"report: {found.page}")
    return 0


def list_benchmarks() -> str:
    """The benchmarks that there are."""
    rows = [
        (entry.name, f"{entry.expected_questions:,}", entry.hub, entry.verifier.path.rpartition(":")[2])
        for entry in BENCHMARKS.values()
    ]
    rows.append((f"{GYM}NAME", "any", "made by reasoning-gym", "verify_gym"))
    return _table(("name", "questions", "data set", "verifier"), rows, right=(1,))


def describe_evaluation(results: Mapping[str, Any]) -> str:
    """The figures of every benchmark for a person, and what to know of them."""
    samples = results["samples"]
    header = (
        "benchmark", "questions", f"accuracy (avg@{samples})", "tokens", f"pass@{_largest(samples)}",
        f"maj@{_largest(samples)}", "cut", "unparsed", "unjudged", "tokens/s",
    )  # fmt: skip
    benchmarks = results["benchmarks"]
    lines = [
        *unjudged_benchmarks(benchmarks),
        f"{results['model']}: {samples} response(s) to each question, temperature {results['temperature']:g}, at most "
        f"{results['max_response_tokens']:,} tokens, {_PROMPTS[results['prompt_format']]}",
        "",
        _table(header, [_row(benchmark) for benchmark in benchmarks], right=range(1, len(header))),
    ]
    if paper := [benchmark for benchmark in benchmarks if benchmark["name"] in TABLE_2]:
        lines += ["", "Accuracy in % beside the paper's Table 2 (all tokens → forks alone; it gives no intervals):", ""]
        lines.append(_paper_table(paper))
    notes = [note for benchmark in benchmarks for note in _notes(benchmark)]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _row(figures: Mapping[str, Any]) -> tuple[str, ...]:
    failures = sum(figures["failures"].values())
    rate = figures["tokens_per_s"]
    of = f" of {figures['available_questions']}" if figures["questions"] < figures["available_questions"] else ""
    return (
        figures["title"],
        f"{figures['questions']}{of}",
        _interval(figures["accuracy"]),
        f"{figures['length']['mean']:,.0f}",
        _last(figures["pass@k"]),
        _last(figures["maj@k"]),
        f"{figures['truncated']:.1%}",
        "-" if figures["unparsed"] is None else f"{figures['unparsed']:.1%}",
        str(failures),
        "-" if rate is None else f"{rate:,.0f}",
    )


def _paper_table(benchmarks: Sequence[Mapping[str, Any]]) -> str:
    sizes = list(next(iter(TABLE_2.values())))
    rows = [
        (
            figures["title"],
            f"{100 * figures['accuracy']['mean']:.2f}",
            *(f"{pair.all_tokens:.2f} → {pair.forks:.2f}" for pair in TABLE_2[figures["name"]].values()),
        )
        for figures in benchmarks
    ]
    return _table(("benchmark", "here", *(f"paper, {size}" for size in sizes)), rows, right=range(1, 2 + len(sizes)))


def _notes(figures: Mapping[str, Any]) -> list[str]:
    notes = [figures["notice"]] if figures["notice"] else []
    if figures["failures"]:
        reasons = ", ".join(f"{count} by {reason}" for reason, count in figures["failures"].items())
        notes.append(
            f"{figures['title']}: responses that could not be judged count as wrong ({reasons}); the same command "
            f"judges them again"
        )
    return notes


def _largest(samples: int) -> int:
    """The largest k of pass@k: powers of two up to the number of samples."""
    return int(2 ** (samples.bit_length() - 1))


def _last(by_k: Mapping[str, Mapping[str, float]] | None) -> str:
    return f"{list(by_k.values())[-1]['mean']:.3f}" if by_k else "-"


def _interval(estimate: Mapping[str, float]) -> str:
    return f"{estimate['mean']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    )
