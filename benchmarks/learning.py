"""What the forks-only backward does to learning: the same recipe, dense and forks-only, several seeds each.

    python -m benchmarks.learning [--seeds 5] [--recipe recipes/countdown.toml] [section.key=value ...]
    python -m benchmarks.learning --plot docs/images/forks-only-learning.svg

Each run is ``forkrl train`` on one thread, evaluated every few steps on the held-out problems. Runs take turns, seed
by seed, so that whatever else the machine does falls on all of them; the result is written after each, and a run that
it holds already is not made again. Curves are means over seeds with 95% intervals (Student's t), against steps and
against the seconds of their steps; of a way that was added to a seed on a later occasion, the seconds do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from scipy import stats

from benchmarks._record import RESULTS, describe_setting, write_result

WAYS = {
    "dense": [],
    "forks-only": ["training.backward=forks_only"],
    "forks-only, projections": ["training.backward=forks_only", "forks_only.projections=true"],
}
COLOURS = {"dense": "#4e79a7", "forks-only": "#e15759", "forks-only, projections": "#59a14f"}
COLUMNS = ("step", "eval/accuracy", "reward/accuracy", "entropy/mean", "time/rollout_s", "time/update_s", "time/step_s")


def main() -> None:
    options = parse_options()
    path = RESULTS / f"{options.name}.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"setting": {}, "cases": []}
    if not options.plot:
        work = {"recipe": options.recipe, "overrides": options.overrides, "every": options.every}
        if known["cases"] and any(known["setting"][key] != value for key, value in work.items()):
            raise SystemExit(f"{path} holds runs of other settings; move it away, or choose another --name")
        run_missing(options, known["cases"], known["setting"] or {**describe_setting(), **work})
    show(known["cases"])
    if options.plot:
        plot(known["cases"], options.plot)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Learning curves of dense and forks-only updates.")
    parser.add_argument("overrides", nargs="*", help="of the recipe, for all runs")
    parser.add_argument("--recipe", default="recipes/countdown.toml")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--every", type=int, default=4, help="steps between evaluations")
    parser.add_argument("--name", default="learning", help="of the result")
    parser.add_argument("--plot", help="draw what the result holds into this file, and run nothing")
    return parser.parse_args()


def run_missing(options: argparse.Namespace, cases: list[dict[str, Any]], setting: dict[str, Any]) -> None:
    for seed in range(options.seeds):
        for way, changes in WAYS.items():
            if any((case["way"], case["seed"]) == (way, seed) for case in cases):
                continue
            records = train(options, [*options.overrides, *changes, f"seed={seed}"])
            cases.append({"way": way, "seed": seed, "commit": describe_setting()["commit"], "records": records})
            print(way, seed, [record["eval/accuracy"] for record in records if "eval/accuracy" in record], flush=True)
            write_result(options.name, setting, cases)


def train(options: argparse.Namespace, overrides: list[str]) -> list[dict[str, float]]:
    """The metrics of one run, on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "forkrl", "train", options.recipe, "--out", str(out), *overrides]
        command += ["runtime.threads=1", "runtime.workers=1", f"eval.every={options.every}", "log.rollouts_sampled=0"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stdout[-2000:]}")
        lines = (out / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{key: record[key] for key in COLUMNS if key in record} for record in records]


def curve(case: dict[str, Any]) -> tuple[list[int], list[float], list[float]]:
    """Steps evaluated, seconds of steps until then, held-out accuracy."""
    seconds, now, points = 0.0, {}, []
    for record in case["records"]:
        seconds += record.get("time/step_s", 0.0)
        now[int(record["step"])] = seconds
        if "eval/accuracy" in record:
            points.append((int(record["step"]), record["eval/accuracy"]))
    return [step for step, _ in points], [now[step] for step, _ in points], [accuracy for _, accuracy in points]


def beside_the_others(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs that took turns with the first way of their seed."""
    first = {case["seed"]: number for number, case in reversed(list(enumerate(cases)))}
    return [case for number, case in enumerate(cases) if number - first[case["seed"]] < len(WAYS)]


def mean_and_half_width(values_SX: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over seeds, with Student's t."""
    count = len(values_SX)
    factor = stats.t.ppf(0.975, count - 1) / np.sqrt(count) if count > 1 else np.nan
    return values_SX.mean(0), factor * values_SX.std(0, ddof=1 if count > 1 else 0)


def show(cases: list[dict[str, Any]]) -> None:
    for way in WAYS:
        curves = [curve(case) for case in cases if case["way"] == way]
        if not curves:
            continue
        accuracy_SX = np.array([accuracy for _, _, accuracy in curves])
        gain, half = mean_and_half_width(accuracy_SX[:, -1:] - accuracy_SX[:, :1])
        timed = [case for case in beside_the_others(cases) if case["way"] == way]
        update = [sum(record.get("time/update_s", 0.0) for record in case["records"]) for case in timed]
        whole = [curve(case)[1][-1] for case in timed]
        finals = " ".join(f"{value:.3f}" for value in accuracy_SX[:, -1])
        print(
            f"{way:25} seeds {len(curves)}  last {finals}  gain {100 * gain[0]:+.1f} ± {100 * half[0]:.1f} points  "
            f"updates {np.mean(update):.1f} s  steps {np.mean(whole):.1f} s of {len(timed)} seeds"
        )


def plot(cases: list[dict[str, Any]], path: str) -> None:
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "forkrl"
    import matplotlib.pyplot as plt

    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for way, colour in COLOURS.items():
        curves = [curve(case) for case in cases if case["way"] == way]
        if not curves:
            continue
        timed = [curve(case) for case in beside_the_others(cases) if case["way"] == way]
        grid_X = np.linspace(0, min(seconds[-1] for _, seconds, _ in timed), 60)
        at_SX = np.array([np.interp(grid_X, seconds, accuracy) for _, seconds, accuracy in timed])
        accuracy_SX = np.array([accuracy for _, _, accuracy in curves])
        for axes, x_X, values_SX in ((by_step, curves[0][0], accuracy_SX), (by_time, grid_X, at_SX)):
            mean_X, half_X = mean_and_half_width(values_SX)
            axes.plot(x_X, mean_X, color=colour, label=f"{way} ({len(values_SX)} seeds)")
            axes.fill_between(x_X, mean_X - half_X, mean_X + half_X, color=colour, alpha=0.15, linewidth=0)
    by_step.set(xlabel="step", ylabel="held-out accuracy", xticks=curve(cases[0])[0])
    by_time.set(xlabel="seconds of steps, one thread")
    for axes in (by_step, by_time):
        axes.legend(frameon=False, loc="lower right", fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, metadata={"Date": None})
    print(f"drawn into {path}")


if __name__ == "__main__":
    main()
