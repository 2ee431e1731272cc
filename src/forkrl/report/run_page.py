"""The page of a training run: curves, and held-out responses before and after training."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from forkrl.config import PartConfig, TrainConfig
from forkrl.config.recipe import recipe_toml
from forkrl.report.fork_data import responses_of
from forkrl.report.fork_view import ForkView, Frame, ShownPrompt, ShownResponse, View
from forkrl.report.formatting import plain, visible
from forkrl.report.page import Page, Section, write_page
from forkrl.report.plots import HEIGHT, PERCENT, Curve, Kind, Panel, ellipsis, plot
from forkrl.report.run_data import Floats, RolloutSample, RunData, read_run
from forkrl.report.run_summary import cards, headline, status

FEW_POINTS = 40
MAX_PROMPTS = 48
MAX_RESPONSES_PER_STEP = 32
MAX_TRAIN_STEPS = 12
FORK_PERCENTILE = 80.0
PAPER_LOW_ENTROPY = 0.01  # nats; the paper finds 50.64% of tokens below it (Qwen3-8B, section 3)


def write_run_report(run_dir: Path) -> Path:
    """Write ``report.html``, which notes what is missing or damaged, into a run folder and return its path."""
    return write_page(Path(run_dir) / "report.html", run_folder_page(Path(run_dir)))


def run_folder_page(run_dir: Path) -> Page:
    return run_page(read_run(run_dir, MAX_TRAIN_STEPS))


def run_headline(run_dir: Path) -> str:
    """The headline of the report: accuracy before and after, with intervals, steps and time."""
    return headline(read_run(Path(run_dir), max_train_files=0))


def run_page(run: RunData) -> Page:
    return Page(
        name=run.name,
        kind="training run",
        headline=headline(run),
        sections=sections(run),
        status=status(run),
        notes=run.notes,
        cards=cards(run),
        forks=run_forks(run),
        settings=_settings(run),
        provenance=sorted((key, plain(value)) for key, value in run.provenance.items() if key != "command"),
        command=str(run.provenance.get("command", "")),
        reproduce=reproducing_command(run.settings),
        source="this run folder's config.toml, metrics.jsonl and rollouts/",
    )


def reproducing_command(settings: dict[str, Any]) -> str:
    """A command line with every non-default setting as an override."""
    of_part, overrides = recipe_toml(PartConfig()), []
    for section, table, defaults in _tables(settings):
        for key, value in _changed(table, defaults).items():
            if (section, key) == ("task", "parts") and isinstance(value, list):
                value = [_changed(part, of_part) for part in value]
            overrides.append(f"{section}.{key}={plain(value)}".removeprefix("."))
    return " ".join(["forkrl train", *(shlex.quote(visible(override)) for override in overrides)])


def _settings(run: RunData) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    return [
        (section or "run", [(key, plain(value), defaults.get(key) != value) for key, value in table.items()])
        for section, table, defaults in _tables(run.settings)
        if table
    ]


def _tables(settings: dict[str, Any]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, values and defaults of every section; top-level settings first, under ""."""
    defaults = recipe_toml(TrainConfig())
    loose = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    sections = [(key, value, defaults.get(key, {})) for key, value in settings.items() if isinstance(value, dict)]
    return [("", loose, defaults), *sections]


def _changed(table: Any, defaults: Mapping[str, Any]) -> Any:
    if not isinstance(table, dict):
        return table
    return {key: value for key, value in table.items() if defaults.get(key) != value}


_ACCURACY = {"reward/accuracy": "training responses", "eval/accuracy": "held out, 95% interval"}
_PLAIN = (
    "level",
    "entropy (nats)",
    "tokens",
    "gradient norm",
    "difference (nats)",
    "learning rate",
    "weight",
)  # not shares
_CURVES: list[tuple[str, str, str, dict[str, dict[str, str]]]] = [
    (
        "learning",
        "Learning curve",
        "Training accuracy is that of the sampled responses of each step; held-out problems are the same each time, "
        "unless a note on this page says that evaluations changed.",
        {"accuracy": _ACCURACY},
    ),
    (
        "entropy",
        "Entropy",
        "Mean entropy of the tokens that carried gradient, of the others, and of all; the threshold between them.",
        {
            "entropy (nats)": {
                "entropy/mean": "all",
                "entropy/selected_mean": "selected",
                "entropy/unselected_mean": "unselected",
                "entropy/threshold": "threshold",
            }
        },
    ),
    (
        "kept",
        "Tokens kept",
        "The fraction of response tokens that carried gradient, by the sign of the advantage.",
        {
            "tokens kept": {
                "selection/kept_fraction": "all responses",
                "selection/kept_fraction_positive": "advantage > 0",
                "selection/kept_fraction_negative": "advantage < 0",
            }
        },
    ),
    (
        "length",
        "Response length",
        "Mean tokens per response, and the fraction that ran into the limit without a stop token.",
        {
            "tokens": {"response/length": "training", "eval/length": "held out"},
            "cut at limit": {"response/truncated_fraction": "training", "eval/truncated_fraction": "held out"},
        },
    ),
    (
        "gradient",
        "Gradient and clipping",
        "Gradient norm before clipping, and the fraction of trained tokens whose probability ratio was clipped.",
        {"gradient norm": {"grad/norm": "norm"}, "ratio clipped": {"loss/clip_fraction": "clipped"}},
    ),
    (
        "mismatch",
        "Sampler and trainer",
        "Before a step's first update: the mean absolute difference of their log-probs, and the fraction of tokens "
        "whose probabilities differ by more than a factor of 2.",
        {
            "difference (nats)": {"rollout/logprob_gap_mean": "mean"},
            "beyond factor 2": {"rollout/logprob_gap_beyond_2x": "fraction"},
        },
    ),
    (
        "rate",
        "Learning rate",
        "Mean over the gradient steps of a step.",
        {"learning rate": {"optimizer/lr": "lr"}},
    ),
]
"""Section name, title and caption, and its panels: y label, and label by metric."""


def sections(run: RunData) -> list[Section]:
    learning, entropy, *others = [_curves_section(run, *curves) for curves in _CURVES]
    found = [learning]
    if run.parts:
        panels = {part: {f"{name}/{part}": label for name, label in _ACCURACY.items()} for part in run.parts}
        caption = "The same for each part of the mixed task; 95% intervals clustered by problem."
        found.append(_curves_section(run, "parts", "Accuracy by part", caption, panels))
    if run.level_names:
        labels = {name: name.removeprefix("task/level").strip("/") or "level" for name in run.level_names}
        caption = "The level of each curriculum after the step."
        found.append(_curves_section(run, "levels", "Level of difficulty", caption, {"level": labels}))
    if len(run.series("loss/entropy_coef")):
        caption = "The weight of the bonus in each step; it applies below loss.entropy_target."
        weights = {"weight": {"loss/entropy_coef": "loss.entropy_coef"}}
        others.append(_curves_section(run, "bonus", "Adaptive entropy bonus", caption, weights))
    return [*found, entropy, _histogram(run), *others]


def _curves_section(
    run: RunData, name: str, title: str, caption: str, panels: Mapping[str, Mapping[str, str]]
) -> Section:
    metrics = [each for labels in panels.values() for metric in labels for each in _with_interval(metric)]
    missing = [metric for metric in metrics if not len(run.series(metric))]
    present = [metric for metric in metrics if metric not in missing]
    rows = {step: row for step, row in run.metrics.items() if any(metric in row for metric in present)}
    columns = {metric: [row.get(metric) for row in rows.values()] for metric in present}
    table = pd.DataFrame({"step": list(rows), **columns})
    drawn = [
        Panel(
            ellipsis(ylabel),
            [_curve(run, metric, label) for metric, label in labels.items() if metric in present],
            None if ylabel in _PLAIN else PERCENT,
            legend=ylabel == next(iter(panels)),
            hline=_clipping(run) if "grad/norm" in labels and "grad/norm" in present else None,
        )
        for ylabel, labels in panels.items()
    ]
    figure = plot(drawn, height=max(HEIGHT, 1.3 * len(drawn) + 0.3)) if present else None
    return Section(title, caption, name, table, figure, missing)


def _with_interval(metric: str) -> list[str]:
    """The metric and its interval ends, if the trainer records them."""
    ends = ("", "_low", "_high") if metric.startswith("eval/accuracy") else ("",)
    return [metric.replace("accuracy", f"accuracy{end}", 1) for end in ends]


def _curve(run: RunData, metric: str, label: str) -> Curve:
    steps, values = run.series(metric)
    kind: Kind = "steps" if metric in run.level_names else "line"
    curve = Curve(steps, values, ellipsis(label), marker="." if len(steps) <= FEW_POINTS else "", kind=kind)
    if not (ends := _with_interval(metric)[1:]):
        return curve
    low, high = (np.array([run.metrics[int(step)].get(end, np.nan) for step in steps]) for end in ends)
    return replace(curve, marker="o", low=low, high=high)


def _clipping(run: RunData) -> tuple[float, str] | None:
    limit = run.setting("optimizer.max_grad_norm")
    return (float(limit), f"clipped at {limit:g}") if isinstance(limit, int | float) else None


def histogram_counts(samples: Sequence[Floats], bins: int = 60) -> tuple[Floats, list[Floats]]:
    """Common bin edges (nats) and the counts of each sample; tiny negative entropies (rounding) count as 0."""
    top = max((float(sample.max()) for sample in samples if len(sample)), default=1.0)
    edges = np.linspace(0.0, max(top, 0.1), bins + 1)
    return edges, [np.histogram(np.maximum(sample, 0.0), edges)[0].astype(np.float64) for sample in samples]


def _histogram(run: RunData) -> Section:
    """Share of tokens by entropy, with the run's last threshold (paper: figure 2a)."""
    samples = list(run.evals) or list(run.train[-1:])
    kept = {f"step {sample.step}": entropy for sample in samples if len(entropy := sample.entropy)}
    if not kept:
        return Section("Entropy histogram", "", "histogram", pd.DataFrame(), missing=["rollouts/*.parquet"])
    threshold = run.series("entropy/threshold").values
    facts = "; ".join(
        f"{label}: {len(entropy):,} tokens, {np.mean(entropy < PAPER_LOW_ENTROPY):.1%} below {PAPER_LOW_ENTROPY} nats, "
        f"80th percentile {np.percentile(entropy, 80):.3f} nats"
        for label, entropy in kept.items()
    )
    edges, counts = histogram_counts(list(kept.values()))
    low, high = zip(*pairwise(edges), strict=True)
    columns = {f"tokens, {label}": count.astype(int) for label, count in zip(kept, counts, strict=True)}
    curves = [
        Curve(edges, np.where(count > 0, count / max(count.sum(), 1), np.nan), label, kind="stairs")
        for label, count in zip(kept, counts, strict=True)
    ]
    last = (float(threshold[-1]), f"threshold {threshold[-1]:.2f}") if len(threshold) else None
    temperature = run.settings.get("eval" if run.evals else "rollout", {}).get("temperature")
    measured = "" if temperature is None else f", entropies at temperature {temperature or 1:g}"
    return Section(
        "Entropy histogram",
        f"All written {'held-out' if run.evals else 'training'} responses{measured}. {facts}.",
        "histogram",
        pd.DataFrame({"from (nats)": low, "to (nats)": high, **columns}),
        plot([Panel("share of tokens (log)", curves, PERCENT, bottom=None, log="y", vline=last)], "entropy (nats)"),
        () if last else ("entropy/threshold",),
    )


def run_forks(run: RunData) -> ForkView:
    outlined = run.setting("selection.rule") != "all"  # do not outline every token
    views = [*([_held_out(run, outlined)] if run.evals else []), *([_training(run, outlined)] if run.train else [])]
    if not views:
        return ForkView([], "This run folder has no sampled responses that can be read (rollouts/*.parquet).", None)
    return ForkView(views, _lead(run), _fork_mark(run, views))


def _lead(run: RunData) -> str:
    rule = run.setting("selection.rule") or "not recorded"
    keys = "the keys visit the fifth of the tokens shown with the highest entropy."
    if rule == "all":
        return f"This run trained on every token, so none is outlined; {keys}"
    if rule in ("top_entropy", "threshold"):
        return "Outlined tokens are those the run's rule selects to carry gradient; the keys visit them one by one."
    return f"Outlined tokens are those the run's rule ({rule}) selects to carry gradient; {keys}"


def _fork_mark(run: RunData, views: Sequence[View]) -> float | None:
    """Fork threshold of the page; None: the run's selection decides."""
    if run.setting("selection.rule") in ("top_entropy", "threshold"):
        return None
    layers = [response.entropy[0] for view in views for response in responses_of(view.frames)]
    entropy_N = np.concatenate([np.asarray(layer, dtype=float) for layer in layers])
    entropy_N = entropy_N[np.isfinite(entropy_N)]
    return float(np.percentile(entropy_N, FORK_PERCENTILE)) if len(entropy_N) else 0.0


def _held_out(run: RunData, outlined: bool) -> View:
    """The first prompts in file order that both evaluations have, with the first response of each."""
    first_rows: list[dict[str, int]] = []
    for sample in run.evals:
        rows: dict[str, int] = {}
        for row, prompt_id in enumerate(sample.prompt_ids):
            rows.setdefault(prompt_id, row)
        first_rows.append(rows)
    shared = [prompt_id for prompt_id in first_rows[0] if all(prompt_id in rows for rows in first_rows)][:MAX_PROMPTS]
    columns = [sample.responses([rows[i] for i in shared]) for sample, rows in zip(run.evals, first_rows, strict=True)]
    labels = [f"Step {sample.step}" for sample in run.evals]
    prompts = [
        ShownPrompt(
            responses[0]["prompt"],
            _outcome([response["score"] > 0.5 for response in responses]),
            [_shown(label, response, outlined) for label, response in zip(labels, responses, strict=True)],
        )
        for responses in zip(*columns, strict=True)
    ]
    note = (
        f"The first {len(prompts)} of {len(first_rows[0]):,} held-out problems, "
        "in file order, one response to each: none was picked for its looks."
    )
    return View("Held out", note, [Frame("", prompts)])


def _outcome(right: Sequence[bool]) -> str:
    if right[0] != right[-1]:
        return "gained" if right[-1] else "lost"
    return ("right" if right[0] else "wrong") + (" both times" if len(right) > 1 else "")


def _training(run: RunData, outlined: bool) -> View:
    note = (
        f"{len(run.train)} of {run.num_train_files} sampled steps; of each, "
        f"the first {MAX_RESPONSES_PER_STEP} responses (or fewer) in file order."
    )
    frames = [Frame(str(sample.step), _training_prompts(sample, outlined)) for sample in run.train]
    return View("Training", note, frames, frame_name="Step")


def _training_prompts(sample: RolloutSample, outlined: bool) -> list[ShownPrompt]:
    prompts: dict[str, tuple[str, list[ShownResponse]]] = {}
    for response in sample.responses(range(min(MAX_RESPONSES_PER_STEP, sample.table.num_rows))):
        _, shown = prompts.setdefault(response["prompt_id"], (response["prompt"], []))
        shown.append(_shown(f"Response {len(shown) + 1}", response, outlined))
    return [ShownPrompt(prompt, "", responses) for prompt, responses in prompts.values()]


def _shown(label: str, response: Mapping[str, Any], outlined: bool) -> ShownResponse:
    figures = response["entropy"], response["logprobs"]  # both are NaN where an environment wrote the token
    return ShownResponse(
        label=label,
        entropy=[response["entropy"]],
        selected=response["selected"] if outlined else (),
        others=[math.isnan(own) and math.isnan(each) for own, each in zip(*figures, strict=True)],
        **{name: response[name] for name in ("tokens", "logprobs", "score", "reward", "advantage", "finished")},
    )
