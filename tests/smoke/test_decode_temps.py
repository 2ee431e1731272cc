"""``forkrl decode-temps``: the whole sweep, taken up again after any end; refused in one line where it cannot be."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from forkrl.analysis import temperature_table
from forkrl.commands.report import write_report
from forkrl.store.results import read_results, read_table
from tests.smoke.test_eval import DATASET, SHORT
from tests.smoke.world import Run, World, write_prompts

SETTINGS = 15
SWEEP = ("--problems", "7", "--samples", "2")


def figures(folder: Path) -> dict[str, Any]:
    """What a sweep found, without the command line."""
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    del found["command"]
    rows = read_table(folder / "tables" / "settings.csv").to_dict("records")
    return found | {"rows": [{key: None if value != value else value for key, value in row.items()} for row in rows]}


def responses(folder: Path) -> pd.DataFrame:
    return pd.concat([pq.read_table(path).to_pandas() for path in sorted((folder / "responses").glob("*.parquet"))])


def refused(world: World, *argv: str) -> str:
    """The one line of a sweep that must not sample anything."""
    outcome = world.run("decode-temps", *argv, faults=[{"point": "setting", "count": 1, "signal": 9}])
    assert outcome.code == 2, outcome
    return outcome.line


@pytest.fixture(scope="module")
def run(world: World) -> Run:
    return world.trained("run", "training.steps=2", "rollout.max_sequences=5", "eval.problems=7", "eval.samples=2")


@pytest.fixture(scope="module")
def sweep(world: World, run: Run) -> Path:
    """A whole sweep of a run, in its own folder; each setting takes two waves."""
    outcome = world.run("decode-temps", "run", *SWEEP)
    assert outcome.code == 0, outcome.stderr
    (world.folder / "stdout").write_text(outcome.stdout)
    return world.folder / "run" / "analysis" / "decode-temps"


def test_every_setting_is_there_and_the_table_follows_from_the_files(world: World, sweep: Path) -> None:
    found, rows = figures(sweep), responses(sweep)
    assert found["schema"] == "forkrl-decode-temps/2"
    assert len(found["rows"]) == SETTINGS
    table = pd.read_csv(sweep / "tables" / "settings.csv")
    recomputed = temperature_table(rows).set_index(["high", "low"]).loc[list(zip(table.high, table.low, strict=True))]
    pd.testing.assert_frame_equal(table.set_index(["high", "low"]), recomputed, check_dtype=False)
    stdout = (world.folder / "stdout").read_text()
    assert found["headline"] in stdout and f"report: {Path('run/analysis/decode-temps/report.html')}" in stdout
    page = (sweep / "report.html").read_text()
    assert "Lowering the temperature at forks" in page and "forkrl decode-temps run" in page
    assert write_report(sweep).read_text() == page


def test_temperature_1_is_what_eval_measures(world: World, sweep: Path) -> None:
    outcome = world.run("eval", "run", *SWEEP, "--temperature", "1", "--out", "evaluation", without_report=True)
    assert outcome.code == 0, outcome.stderr
    evaluated = read_table(world.folder / "evaluation/tables/benchmarks.csv").iloc[0]
    base = figures(sweep)["rows"][0]
    assert (base["high"], base["low"]) == (1, 1)
    names = ["accuracy", "accuracy_low", "accuracy_high", "length"]
    assert evaluated[names].tolist() == pytest.approx([base[name] for name in names])
    assert base["cut"] == evaluated["truncated"]


def test_the_threshold_is_the_80th_percentile_at_temperature_1(sweep: Path) -> None:
    found, rows = figures(sweep), responses(sweep)
    base = rows[(rows.high == 1) & (rows.low == 1)]
    assert found["facts"]["threshold"] == pytest.approx(
        np.percentile(np.concatenate(base.entropy.to_list()), 80), rel=1e-6
    )
    assert set(rows.threshold) == {found["facts"]["threshold"]}


def test_rows_say_of_a_response_what_its_tokens_say(sweep: Path) -> None:
    for row in responses(sweep).to_dict("records"):
        assert row["length"] == len(row["token_ids"]) == len(row["logprobs"]) == len(row["entropy"])
        assert row["surprise"] == pytest.approx(-row["logprobs"].sum(), rel=1e-5)
        assert row["forks"] == (row["entropy"] > row["threshold"]).sum()
        assert row["cut"] == (row["token_ids"][-1] != 1), "token 1 is EOS"


def test_greedy_everywhere_it_applies(sweep: Path) -> None:
    """At temperature 0 elsewhere, no token below the threshold has a likelier one beside it."""
    rows = responses(sweep)
    for varied, fixed, chosen in (("high", "low", np.greater), ("low", "high", np.less_equal)):
        cold = rows[(rows[varied] == 0) & (rows[fixed] == 1)]
        entropy, logprobs = (np.concatenate(cold[name].to_list()) for name in ("entropy", "logprobs"))
        there = chosen(entropy, rows.threshold.iloc[0])
        # -ln of the largest probability is at most the entropy.
        assert there.any() and (-logprobs[there] <= entropy[there] + 1e-5).all()
        assert (-logprobs[~there] > entropy[~there] + 1e-5).any(), "drawn, not greedy"


def test_a_finished_sweep_samples_nothing_again(world: World, sweep: Path) -> None:
    before = figures(sweep)
    (sweep / "report.html").unlink()
    outcome = world.run("decode-temps", "run", *SWEEP, faults=[{"point": "setting", "count": 1, "signal": 9}])
    assert outcome.code == 0, outcome
    assert figures(sweep) == before
    assert (sweep / "report.html").exists()


@pytest.mark.parametrize("waves_before", [1, 3, 17])
def test_after_a_kill_only_what_is_missing_is_sampled(world: World, sweep: Path, waves_before: int) -> None:
    """Two waves a setting: a kill after so many of them leaves the finished settings, and the rest goes on."""
    argv, folder = ("decode-temps", "run", *SWEEP, "--out", f"killed-{waves_before}"), f"killed-{waves_before}"
    killed = world.run(*argv, faults=[{"point": "setting", "count": waves_before + 1, "signal": 9}])
    assert killed.code == -signal.SIGKILL
    files = list((world.folder / folder).glob("responses/high*.parquet"))
    assert len(files) == waves_before // 2
    assert not (world.folder / folder / "results.json").exists()
    stamps = {path: path.stat().st_mtime_ns for path in files}
    still_to_do = 2 * (SETTINGS - len(files))
    again = world.run(*argv, faults=[{"point": "setting", "count": still_to_do + 1, "signal": 9}])
    assert again.code == 0, "it sampled more than what was missing"
    assert figures(world.folder / folder) == figures(sweep)
    assert {path: path.stat().st_mtime_ns for path in files} == stamps


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(world: World, run: Run) -> None:
    argv = ("decode-temps", "run", *SWEEP, "--out", "interrupted")
    outcome = world.run(*argv, faults=[{"point": "token", "count": 40, "signal": signal.SIGINT}])
    assert outcome.code == 130, outcome
    assert "what was finished is kept in interrupted; the same command resumes" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not list((world.folder / "interrupted").rglob("*.writing"))
    assert world.run(*argv).code == 0


def test_a_given_threshold_and_temperatures_are_taken(world: World) -> None:
    argv = ("model", "--recipe", "recipe.toml", "--threshold", "1.25", "--temperatures", "2,0")
    outcome = world.run("decode-temps", *argv, *SWEEP)
    assert outcome.code == 0, outcome.stderr
    found = figures(world.folder / "analyses" / "model-decode-temps")
    assert found["facts"] == {"threshold": 1.25, "threshold_is": "given"}
    assert [(row["high"], row["low"]) for row in found["rows"]] == [(1, 1), (2, 1), (0, 1), (1, 2), (1, 0)]


def test_one_problem_is_a_sweep_without_intervals(world: World, run: Run) -> None:
    argv = ("--problems", "1", "--samples", "1", "--temperatures", "0", "--out", "one")
    outcome = world.run("decode-temps", "run", *argv)
    assert outcome.code == 0, outcome.stderr
    assert figures(world.folder / "one")["rows"][1]["difference_low"] is None


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("run", *SWEEP, "--threshold", "0.5"), "was created with different settings (threshold = None, now 0.5)"),
        (("run", "--problems", "6", "--samples", "2"), "different settings (prompts = 7, now 6)"),
        (("run", *SWEEP, "--temperatures", "0,1"), "different settings (temperatures ="),
        (("run", *SWEEP, "seed=4"), "different settings (seed = 3, now 4)"),
        (("run", *SWEEP, "--out", "model"), "is not empty"),
        (("run", "--out", "recipe.toml"), "recipe.toml: is a file"),
        (("run", "--threshold", "-1"), "--threshold -1: must be at least 0 (entropy in nats)"),
        (("run", "--threshold", "nan"), "--threshold nan: must be at least 0 (entropy in nats)"),
        (
            ("run", "--temperatures", "0,hot"),
            "--temperatures 0,hot: 'hot' is not a valid temperature; give numbers from 0 up",
        ),
        (("run", "--temperatures", "0,-1"), "'-1' is not a valid temperature"),
        (("run", "--temperatures", "inf"), "'inf' is not a valid temperature"),
        (("run", "--temperatures", ""), "'' is not a valid temperature"),
        (("run", "--temperatures", "0.3,.3"), "duplicate 0.3"),
        (("run", "--problems", "0"), "--problems 0: must be at least 1"),
        (("run", "--samples", "0"), "--samples 0: must be at least 1"),
        (("run", "eval.temperature=0.5", "--temperature", "1"), "has no effect along with --temperature"),
        (("run", "rollout.top_p=0.5"), "rollout.top_p=0.5: has no effect on decode-temps"),
        (("run", "eval.samples=2", "--samples", "3"), "has no effect along with --samples"),
        (("run", "--recipe", "recipe.toml"), "run is a run and keeps its own recipe"),
        (("nowhere/model/here",), "no such folder"),
    ],
)
def test_what_cannot_be_is_refused(world: World, sweep: Path, argv: tuple[str, ...], says: str) -> None:
    before = figures(sweep)
    assert says in refused(world, *argv)
    assert figures(sweep) == before


def test_problems_without_answers_are_refused(world: World) -> None:
    write_prompts(world.folder / "unanswered.jsonl", [{"prompt": "1="}])
    argv = ("model", *DATASET, *SHORT, "task.data=unanswered.jsonl")
    assert "unanswered.jsonl line 1" in refused(world, *argv)
    says = "unanswered.jsonl: its rows have no answers, so accuracy cannot be measured"
    assert says in refused(world, *argv, "task.verifier=none")


def test_a_damaged_file_says_how_to_mend_it(world: World, run: Run) -> None:
    argv = ("run", "--problems", "2", "--samples", "1", "--temperatures", "0", "--out", "damaged")
    assert world.run("decode-temps", *argv).code == 0
    before = figures(world.folder / "damaged")
    damaged = world.folder / "damaged" / "responses" / "high-0.0-low-1.0.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    assert "remove it and run the same command again" in refused(world, *argv)
    damaged.unlink()
    assert world.run("decode-temps", *argv).code == 0
    assert figures(world.folder / "damaged") == before


def test_weights_that_become_nan_stop_the_sweep(world: World, run: Run) -> None:
    poison = {"point": "token", "count": 9, "after": True, "action": "poison"}
    outcome = world.run("decode-temps", "run", *SWEEP, "--out", "poisoned", faults=[poison])
    assert outcome.code == 1, outcome
    assert outcome.stderr.splitlines()[-1].startswith("forkrl: the sweep stopped: the model's logits are NaN")
    assert not list((world.folder / "poisoned").glob("responses/*"))


def test_a_run_is_swept_around_its_own_temperature(world: World) -> None:
    """The baseline draws as an evaluation at that temperature does; entropies stay those of the unscaled model."""
    world.trained("warm", "training.steps=1", "eval.temperature=0.5", "eval.problems=7", "eval.samples=2")
    outcome = world.run("decode-temps", "warm", *SWEEP, "--temperatures", "0,1")
    assert outcome.code == 0, outcome.stderr
    assert "at temperature 0.5\n" in outcome.stdout and "from 0.5 to 0" in outcome.stdout
    sweep = world.folder / "warm" / "analysis" / "decode-temps"
    found = figures(sweep)
    assert [(row["high"], row["low"]) for row in found["rows"]] == [
        (0.5, 0.5), (0, 0.5), (1, 0.5), (0.5, 0), (0.5, 1),
    ]  # fmt: skip
    assert found["rows"][1]["difference"] is not None
    assert world.run("eval", "warm", *SWEEP, "--out", "at-half", without_report=True).code == 0
    (evaluated,) = read_results(world.folder / "at-half").tables["benchmarks"].to_dict("records")
    base = found["rows"][0]
    measured = (evaluated["accuracy"], evaluated["length"])
    assert measured == pytest.approx((base["accuracy"], base["length"]))
    rows = responses(sweep)
    first = rows[(rows.high == 0.5) & (rows.low == 0.5) & (rows["sample"] == 0)].iloc[0]
    greedy = rows[(rows.high == 0) & (rows.low == 0.5) & (rows.prompt == first.prompt)].iloc[0]
    assert first.entropy[0] == pytest.approx(greedy.entropy[0], rel=1e-5), "the first position has one distribution"
    given = ("--temperatures", "0", "--temperature", "1", "--out", "warmer")
    assert world.run("decode-temps", "warm", *SWEEP, *given).code == 0
    assert figures(world.folder / "warmer")["rows"][0]["high"] == 1
