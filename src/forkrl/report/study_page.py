"""The page of ``forkrl study``: verdicts, differences from the baseline, and curves of all arms."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from forkrl.report.formatting import duration, interval_of, is_clear, percent, points
from forkrl.report.page import Card, Page, Section
from forkrl.report.plots import (
    COUNT,
    MUTED,
    PERCENT,
    POINTS,
    Curve,
    Panel,
    column_curve,
    finish,
    forest,
    plot,
)  # fmt: skip
from forkrl.store.results import Results
from forkrl.store.run_record import ACCURACY, LENGTH

_OVERLAP, _CHANGE = r"overlap with the first: step (\d+)", r"change of entropy: ([\d.]+)-([\d.]+)%"
"""Figures of drift in the table of measurements."""
CURVES = (
    ("learning", "Held-out accuracy", "eval/accuracy", "accuracy", PERCENT, 0),
    ("training", "Accuracy of training responses", "reward/accuracy", "accuracy", PERCENT, 0),
    ("entropy", "Entropy of training responses", "entropy/mean", "entropy (nats)", None, 0),
    ("length", "Length of training responses", "response/length", "tokens", COUNT, None),
    ("truncated", "Training responses cut at the limit", "response/truncated_fraction", "share", PERCENT, 0),
    ("kept", "Tokens that carried gradient", "selection/kept_fraction", "share", PERCENT, 0),
)
"""Section, title, metric, y label, format and lower end."""


def study_page(results: Results) -> Page:
    tables = results.tables
    return Page(
        name=str(results.settings["title"]),
        kind="study",
        headline=results.headline,
        sections=[*_result_sections(results), *_curve_sections(results)],
        sections_title="Results",
        notes=results.notes,
        cards=_cards(tables["claims"], tables["runs"]),
        settings=_settings(results.settings),
        provenance=[*results.versions.items(), *_origin(tables["runs"])],
        command=results.command,
        reproduce=str(results.facts["reproduce"]),
        source="the records in this study's folder",
    )


def study_headline(arms: pd.DataFrame, baseline: str) -> str:
    """One sentence per arm, best first."""
    labels = dict(zip(arms["arm"], arms["label"], strict=True))
    of_baseline = arms[arms["arm"] == baseline].iloc[0]
    text = f"{labels[baseline]} (the baseline) reaches {percent(interval_of(of_baseline, 'accuracy'))}"
    for row in arms[arms["arm"] != baseline].to_dict("records"):
        found = interval_of(row, "difference")
        clear = "" if is_clear(found) else ", not clearly different"
        text += f"; {row['label']} {points(found)}{clear}"
    seeds = sorted(set(arms["seeds"]))
    runs = f"{seeds[0]} seeds" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    return f"{text} (95% intervals, paired, {runs})."


def figures(results: Results) -> dict[str, Figure]:
    """The figures that stand alone: accuracy and entropy by step, differences, and drift if it was measured."""
    found = {"curves": _curve_figure(results, *CURVES[0][2:]), "differences": _difference_figure(results)}
    if (results.tables["curves"]["metric"] == CURVES[2][2]).any():
        found["entropy"] = _curve_figure(results, *CURVES[2][2:])
    drift = _drift_figure(results.tables["measurements"])
    return found if drift is None else found | {"drift": drift}


def _cards(claims: pd.DataFrame, runs: pd.DataFrame) -> list[Card]:
    made = [
        Card(
            row["claim"],
            row["verdict"],
            note=_why(row) + _needed(row["seeds_needed"]),
        )
        for row in claims.to_dict("records")
    ]
    seconds = runs["seconds"].sum(skipna=False)
    return [
        *made,
        Card("Runs", str(len(runs)), note=f"{duration(seconds)} of training steps in all" if seconds > 0 else ""),
    ]


def _needed(seeds: float) -> str:
    if math.isinf(seeds):
        return "; too close to the margin for more seeds alone"
    return f"; about {seeds:.0f} seeds needed" if seeds > 0 else ""


def _short_commit(commit: str) -> str:
    """Twelve digits, and the mark of uncommitted changes."""
    digits, dash, mark = commit.partition("-")
    return digits[:12] + dash + mark


def _why(row: dict[str, Any]) -> str:
    return points(interval_of(row, "difference")) if "difference" in row else ""


def _result_sections(results: Results) -> list[Section]:
    arms, claims = results.tables["arms"], results.tables["claims"]
    baseline = str(results.settings["baseline"])
    paper = f" The paper: {results.settings['paper']}" if results.settings["paper"] else ""
    sections = [
        Section(
            "Difference from the baseline",
            f"Final held-out accuracy minus that of {baseline}, paired by seed and problem. The interval covers new "
            "seeds and, where their scores are known, new problems; p-values are also given after Holm's correction "
            f"over arms. detectable: the smallest true difference that this design finds in 80% of studies.{paper}",
            "study-differences",
            _columns(arms[arms["arm"] != baseline], {
                "label": "arm", "seeds": "seeds", "difference": "difference", "difference_low": "low",
                "difference_high": "high", "p": "p", "p_holm": "p (Holm)", "detectable": "detectable",
                "equal_tokens": "at equal tokens", "equal_tokens_low": "low ", "equal_tokens_high": "high ",
                "equal_seconds": "at equal time", "equal_seconds_low": "low  ", "equal_seconds_high": "high  ",
            }),
            _difference_figure(results),
            printed=arms[arms["arm"] != baseline][["label", "seeds", *_estimate("difference"), "p", "p_holm"]],
        ),
        Section(
            "Final accuracy",
            "Best first. best: how often an arm comes first among those with all seeds when seeds and problems are "
            "drawn again. deviation: standard deviation between seeds.",
            "study-arms",
            _columns(arms, {
                "label": "arm", "seeds": "seeds", "accuracy": "accuracy", "accuracy_low": "low",
                "accuracy_high": "high", "start": "before training", "best": "best", "seed_deviation": "deviation",
                "length": "tokens", "truncated": "cut at limit", "entropy": "entropy", "kept": "tokens kept",
            }),
            _seeds_figure(results),
            printed=arms[["label", "seeds", *_estimate("accuracy"), "start", "length", "truncated", "kept"]],
        ),
    ]  # fmt: skip
    return [*_claim_sections(claims), *sections, *_measurement_sections(results.tables["measurements"], baseline)]


def _claim_sections(claims: pd.DataFrame) -> list[Section]:
    if not len(claims):
        return []
    return [
        Section(
            "Claims",
            "Supported: the 95% interval of the difference lies where the claim is true; contradicted: outside. "
            "supported from: the true difference from which this design supports the claim in about 80% of studies (of "
            "equal: up to which size); –: none. seeds needed: to decide the claim in 80% of studies if the true "
            "difference is the one observed; inf: too close to the margin for more seeds alone.",
            "study-claims",
            _columns(claims, {
                "claim": "claim", "measurement": "measured on", "says": "says", "margin": "margin",
                "difference": "difference",
                "difference_low": "low", "difference_high": "high", "verdict": "verdict",
                "supported_from": "supported from", "seeds_needed": "seeds needed",
            }),
        )
    ]  # fmt: skip


def _measurement_sections(measured: pd.DataFrame, baseline: str) -> list[Section]:
    sections: list[Section] = []
    if len(measured):
        sections.append(Section(
            "Measurements after training",
            f"Means over seeds; differences are from {baseline}, paired by seed and question; p-values are not "
            "corrected for their number. At equal length: responses of the model that writes more are stopped earlier, "
            "so that both spend the same mean tokens a response (interval over seeds only).",
            "study-measurements", measured.drop(columns=["arm"]), _measurement_figure(measured),
        ))  # fmt: skip
    if (drift := _drift_figure(measured)) is not None:
        sections.append(Section(
            "Which tokens stay forks",
            "Left: share of the top positions in common with the start, by training step (table 1 of the paper). "
            "Right: mean change of entropy in nats from start to end, by percentile of the start's entropy (figure 4). "
            "Means over seeds; bands: 95% intervals.",
            "study-drift", measured[measured["figure"].str.match(f"{_OVERLAP}|{_CHANGE}")], drift,
        ))  # fmt: skip
    return sections


def _estimate(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"


def _columns(table: pd.DataFrame, names: dict[str, str]) -> pd.DataFrame:
    present = [name for name in names if name in table]
    return table[present].rename(columns=names)


def _difference_figure(results: Results) -> Figure:
    arms = results.tables["arms"]
    others = arms[arms["arm"] != results.settings["baseline"]]
    found = [interval_of(row, "difference") for row in others.to_dict("records")]
    figure, axes = forest(others["label"].tolist(), [("difference", found, 0.0)], POINTS)
    axes.axvline(0, color=MUTED, linewidth=1)
    finish(axes, "", f"accuracy minus that of {results.settings['baseline']}, points", legend=False)
    return figure


def _measurement_figure(measured: pd.DataFrame) -> Figure | None:
    """Accuracy and length of every arm in each evaluation; None without evaluations."""
    evaluated = measured[measured["figure"].isin([ACCURACY, LENGTH])]
    if evaluated.empty:
        return None
    names, arms = (
        list(dict.fromkeys(evaluated["measurement"])),
        dict(zip(evaluated["arm"], evaluated["label"], strict=True)),
    )
    panels = []
    for figure, y_format in ((ACCURACY, PERCENT), (LENGTH, COUNT)):
        curves = []
        for place, (arm, name) in enumerate(arms.items()):
            of = evaluated[(evaluated["figure"] == figure) & (evaluated["arm"] == arm)]
            of = of.assign(value_low=of["value_low"].clip(lower=0))
            shift = 0.5 * ((place + 0.5) / len(arms) - 0.5)
            x = [names.index(each) + shift for each in of["measurement"]]
            curves.append(column_curve(of, x, "value", name, style="", marker=None))
        panels.append(Panel(figure, curves, y_format, names=names))
    return plot(panels, xlabel="", height=4.8)


def _drift_figure(measured: pd.DataFrame) -> Figure | None:
    """Overlap of the top positions by step, and change of entropy by percentile; None without a drift of one run."""
    if measured.empty or not measured["figure"].str.match(_OVERLAP).any():
        return None
    panels = []
    for pattern, title, y_format in (
        (_OVERLAP, "overlap with the start, by step", PERCENT),
        (_CHANGE, "change of entropy (nats), by percentile", None),
    ):
        curves = []
        for _, of in measured[measured["figure"].str.match(pattern)].groupby("arm", sort=False):
            numbers = of["figure"].str.extract(pattern).astype(float)
            curves.append(column_curve(of, numbers.mean(axis=1), "value", of["label"].iloc[0], kind="band"))
        panels.append(Panel("", curves, y_format, bottom=None, title=title))
    return plot(panels, xlabel="", columns=2, height=3.2)


def _seeds_figure(results: Results) -> Figure:
    """Final accuracy of every run, one row per arm."""
    arms, runs = results.tables["arms"], results.tables["runs"]
    found = [interval_of(row, "accuracy") for row in arms.to_dict("records")]
    figure, axes = forest(arms["label"].tolist(), [("mean", found, 0.0)], PERCENT)
    rows = {arm: -place for place, arm in enumerate(arms["arm"])}
    axes.plot(runs["final"], runs["arm"].map(rows), linestyle="", marker="o", color=MUTED, alpha=0.6, markersize=4)
    finish(axes, "", "held-out accuracy", legend=False)
    return figure


def _curve_sections(results: Results) -> list[Section]:
    curves = results.tables["curves"]
    return [
        Section(
            title,
            "Mean over seeds; bands: 95% interval of that mean, Student's over seeds.",
            f"study-{name}",
            curves[curves["metric"] == metric].drop(columns=["metric"]),
            _curve_figure(results, metric, *look),
        )
        for name, title, metric, *look in CURVES
        if (curves["metric"] == metric).any()
    ]


def _curve_figure(results: Results, metric: str, label: str, y_format: Any, bottom: float | None) -> Figure:
    curves, arms = results.tables["curves"], results.tables["arms"]
    labels = dict(zip(arms["arm"], arms["label"], strict=True))
    drawn = []
    for arm in results.settings["arms"]:
        of = curves[(curves["metric"] == metric) & (curves["arm"] == arm)]
        if len(of):
            low, high = of["value_low"], of["value_high"]
            if y_format is PERCENT:
                low, high = low.clip(0, 1), high.clip(0, 1)
            drawn.append(Curve(of["step"], of["value"].to_numpy(float), labels[arm], low=low, high=high, kind="band"))
    return plot([Panel(label, drawn, y_format=y_format, bottom=bottom)], height=3.4)


def _settings(settings: dict[str, Any]) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    groups = [("study", [(key, str(settings[key]), False) for key in ("recipe", "baseline", "seeds", "settings")])]
    return [*groups, ("arms", [(arm, text, False) for arm, text in settings["arms"].items()])]


def _origin(runs: pd.DataFrame) -> list[tuple[str, str]]:
    """Dates, commits and machines of the runs."""
    dates = sorted(str(date)[:10] for date in runs["date"])
    found = [("runs made", dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}")]
    for key in ("commit", "machine", "threads"):
        values = sorted({str(value) for value in runs[key] if not (isinstance(value, float) and math.isnan(value))})
        found.append((key, ", ".join(_short_commit(value) if key == "commit" else value for value in values)))
    return found
