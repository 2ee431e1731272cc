"""Draws docs/images/evidence.svg: top 20% minus all tokens, in published pairs and in the studies of this repository.

    python tools/evidence.py

Published pairs are in studies/published.csv; most are single runs without an error. Those with a deviation over three
runs get the interval of Welch's t-test. Studies have the two-level interval of docs/study.md.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t

from forkrl.config.study import load_study
from forkrl.evaluation.study_arms import at_start, final, runs_by_arm
from forkrl.report.plots import MUTED, POINTS, finish, forest, standalone_svg
from forkrl.stats.intervals import Estimate
from forkrl.store.atomic import write_text
from forkrl.store.run_record import read_record

ROOT = Path(__file__).parents[1]
DRAWS = 5000


def main() -> None:
    names, found = [], []
    for row in pd.read_csv(ROOT / "studies" / "published.csv").to_dict("records"):
        names.append(f"{row['source'].partition(' ')[0]}, {row['setting'].replace(';', ',')} ({row['runs']})")
        found.append(published_difference(row))
    for table in sorted((ROOT / "studies").glob("*/tables/arms.csv")):
        if table.parents[1].name == "drift" or table.parents[1].name.endswith("-again"):
            continue  # the runs of another study
        arms = pd.read_csv(table).set_index("arm")
        if "top20" in arms.index:
            of = arms.loc["top20"]
            names.append(f"ForkRL, {table.parents[1].name} ({of['seeds']:.0f})")
            found.append(Estimate(*(of[f"difference{end}"] for end in ("", "_low", "_high"))))
    figure, axes = forest(names, [("difference", found, 0.0)], POINTS)
    axes.axvline(0, color=MUTED, linewidth=1)
    finish(axes, "", "top 20% minus all tokens, points (number of runs of each)", legend=False)
    figure.set_size_inches(8, 0.32 * len(names) + 0.8)
    write_text(ROOT / "docs" / "images" / "evidence.svg", standalone_svg(figure))
    published = np.array([each.mean for name, each in zip(names, found, strict=True) if not name.startswith("ForkRL")])
    up, median, mean = (published > 0).sum(), np.median(published), published.mean()
    print(f"{len(published)} published pairs: {up} up, median {median:+.2%}, mean {mean:+.2%}")
    share, low, high = gained_share()
    print(f"Countdown: a random 20% gains {share:.0%} [{low:.0%}, {high:.0%}] of what all tokens gain")


def gained_share() -> tuple[float, float, float]:
    """Gain of a random 20% over that of all tokens, with a 95% interval: seeds and problems are drawn again."""
    study, _ = load_study(ROOT / "studies" / "countdown" / "study.toml")
    records = map(read_record, sorted((ROOT / "studies" / "countdown" / "runs").glob("*.json")))
    arms = runs_by_arm(study, records)
    gains_ASP = np.stack([arms[arm].scores(final) - arms[arm].scores(at_start) for arm in ("random20", "all")])
    _, S, P = gains_ASP.shape
    generator = np.random.default_rng(0)
    weights = (generator.multinomial(count, np.full(count, 1 / count), size=DRAWS) for count in (S, P))
    random_N, all_N = np.einsum("asp,ns,np->an", gains_ASP, *weights, optimize=True)
    low, high = np.quantile(random_N / all_N, (0.025, 0.975))
    random, every = gains_ASP.mean(axis=(1, 2))
    return random / every, float(low), float(high)


def published_difference(row: dict[str, float]) -> Estimate:
    """As a share; NaN ends for a single run."""
    mean = (row["top20"] - row["all"]) / 100
    variances = [row[f"{side}_error"] ** 2 / row["runs"] for side in ("all", "top20")]
    total = sum(variances)
    if math.isnan(total):
        return Estimate(mean, math.nan, math.nan)
    freedom = total**2 / sum(each**2 / (row["runs"] - 1) for each in variances)
    half = float(t.ppf(0.975, freedom)) * math.sqrt(total) / 100
    return Estimate(mean, mean - half, mean + half)


if __name__ == "__main__":
    main()
