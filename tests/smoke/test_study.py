"""``forkrl study`` end to end on the tiny world: trained, killed, resumed, extended, refused."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import pytest

from forkrl.commands.report import write_report
from forkrl.commands.study_measured import read_measurement
from forkrl.config.study import MeasurementConfig
from forkrl.store.results import csv_text, read_results
from tests.fabricated_evaluation import random_responses, write_evaluation
from tests.processes import wait_until
from tests.report_page import Page
from tests.smoke.world import STALL_TIMEOUT_S, World, make_model

HOT = 'arguments = ["--temperature", "1.5", "--problems", "4"]'
STUDY = """
title = "All tokens or half of them"
recipe = "recipe.toml"
baseline = "all"
seeds = [3, 4]
settings = ["training.steps=4", "eval.every=2", "runtime.workers=1", "runtime.threads=1"]
[arms.all]
settings = ["selection.rule=all"]
[arms.half]
settings = ["selection.ratio=0.5"]
[measurements.hot]
HOT
[[claims]]
text = "half the tokens are enough"
arm = "half"
than = "all"
says = "not worse"
margin = 0.1
""".replace("HOT", HOT)
RUNS = ["all-seed3", "all-seed4", "half-seed3", "half-seed4"]


@pytest.fixture(scope="module")
def studied(world: World) -> World:
    """The study, run to its end without interruption, in ``studies/halves``."""
    (world.folder / "halves.toml").write_text(STUDY)
    outcome = world.run("study", "halves.toml", "--jobs", "2")
    assert outcome.code == 0, outcome.stderr
    return world


def tables(folder: Path) -> dict[str, str]:
    """All tables without what the clock decides, and without the commit, which may change during the tests."""
    found = {}
    for name, table in read_results(folder).tables.items():
        if name == "curves":
            table = table[table["metric"] != "total/seconds"]
        timed = [
            column for column in table.columns if column.startswith(("seconds", "date", "equal_seconds", "commit"))
        ]
        found[name] = csv_text(table.drop(columns=timed))
    return found


def test_a_study_trains_measures_and_compares(studied: World) -> None:
    folder = studied.folder / "studies/halves"
    assert sorted(path.stem for path in (folder / "runs").glob("*.json")) == RUNS
    assert all(path.stat().st_size < 20_000 for path in (folder / "runs").iterdir())
    results = read_results(folder)
    assert results.facts["runs"] == 4
    arms = results.tables["arms"].set_index("arm")
    assert arms.loc["half", "kept"] == pytest.approx(0.5, abs=0.1) and arms.loc["all", "kept"] == 1
    assert pd.isna(arms.loc["all", "difference"]) and 0 < arms.loc["half", "p"] <= 1
    assert len(results.tables["claims"]) == 1 and set(results.tables["measurements"]["measurement"]) == {"hot"}
    measured = results.tables["measurements"].set_index(["arm", "figure"])["value"]
    assert {arm for arm, _ in measured.index} == {"all", "half", "start"}
    assert measured["half", "accuracy at equal length"] <= measured["half", "accuracy"]
    assert 1 <= measured["start", "tokens a response"] <= 6 and 0 <= measured["start", "truncated"] <= 1
    accuracy = results.tables["curves"].query("metric == 'eval/accuracy' and arm == 'all'")
    assert accuracy["step"].tolist() == [0, 2, 4]
    page = Page(folder / "report.html")
    assert "half the tokens are enough" in page.text and results.headline in page.text
    assert write_report(folder).read_text() == page.source
    assert studied.run("report", studied.folder / "runs/halves/all-seed3", "--figures", "--watch").code == 2
    drawn = studied.run("report", folder, "--figures")
    assert drawn.code == 0 and f"figures: {folder / 'figures'}" in drawn.stdout
    assert {path.name for path in (folder / "figures").iterdir()} >= {"study-learning.svg", "study-measurements.svg"}
    for name in ("curves", "differences"):
        assert (folder / f"{name}.svg").read_text().startswith("<?xml")
    run = studied.folder / "runs/halves/all-seed3"
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4


def test_the_same_command_trains_nothing_again(studied: World) -> None:
    folder = studied.folder / "studies/halves"
    before = {path: path.stat().st_mtime_ns for path in (studied.folder / "runs").rglob("*")}
    outcome = studied.run("study", "halves.toml")
    assert outcome.code == 0 and "half the tokens are enough" in outcome.stdout
    assert {path: path.stat().st_mtime_ns for path in (studied.folder / "runs").rglob("*")} == before
    planned = studied.run("study", "halves.toml", "--dry-run")
    assert "2 arms, 4 runs, 4 of them finished" in planned.stdout and "to train" not in planned.stdout
    assert folder.is_dir()


def test_it_continues_on_another_machine_from_its_records(studied: World) -> None:
    """Only the records travel; one is missing and trained again."""
    copy = shutil.copytree(studied.folder / "studies/halves", studied.folder / "elsewhere/halves")
    (copy / "runs/half-seed4.json").unlink()
    planned = studied.run("study", "halves.toml", "--out", copy, "--runs-dir", "elsewhere/runs", "--dry-run")
    assert "to train: 1 run, " in planned.stdout and "from finished runs" in planned.stdout
    outcome = studied.run("study", "halves.toml", "--out", copy, "--runs-dir", "elsewhere/runs")
    assert outcome.code == 0, outcome.stderr
    assert [path.name for path in (studied.folder / "elsewhere/runs").glob("*.toml")] == ["half-seed4.toml"]
    assert tables(copy) == tables(studied.folder / "studies/halves")


KILLS = ((RUNS[0], 1, signal.SIGKILL), (RUNS[2], 2, signal.SIGTERM), (RUNS[1], 3, signal.SIGKILL))


@pytest.mark.parametrize(("kind", "kills"), [("full", KILLS), ("none", KILLS[:1])])
def test_a_study_killed_three_times_gives_the_same_tables(studied: World, kind: str, kills: Any) -> None:
    """Without measurements, to be quick; runs resume from a checkpoint or start again."""
    unmeasured = STUDY.replace("[measurements.hot]", "").replace(HOT, "")
    (studied.folder / f"{kind}.toml").write_text(
        unmeasured.replace('"training', f'"checkpoint.kind={kind}", "training')
    )
    out = studied.folder / "studies" / kind
    argv = ("study", f"{kind}.toml")
    for run, wanted, signum in kills:
        started = studied.start(*argv)
        metrics = studied.folder / "runs" / kind / run / "metrics.jsonl"
        wait_until(lambda: metrics.is_file() and metrics.read_bytes().count(b"\n") >= wanted, STALL_TIMEOUT_S)  # noqa: B023
        started.send(signum)
        assert started.wait().code in (-signum, 128 + signum)
        assert not (out / "results.json").exists()
    outcome = studied.run(*argv)
    assert outcome.code == 0, outcome.stderr
    expected = tables(studied.folder / "studies/halves")
    assert tables(out) == expected | {"measurements": "\n"}


def test_a_failing_arm_is_named_and_the_others_are_compared(studied: World) -> None:
    text = STUDY.replace("[measurements.hot]", '[arms.broken]\nsettings = ["optimizer.lr=1e9"]\n[measurements.hot]')
    (studied.folder / "broken.toml").write_text(text)
    shutil.copytree(studied.folder / "studies/halves/runs", studied.folder / "studies/broken/runs")
    outcome = studied.run("study", "broken.toml")
    assert outcome.code == 1, outcome.stderr
    assert "broken seed 3 training failed with exit code 1: training stopped at step" in outcome.stderr
    results = read_results(studied.folder / "studies/broken")
    assert sorted(results.tables["arms"]["arm"]) == ["all", "half"]
    assert any(note.startswith("2 of 6 runs are missing: broken-seed3, broken-seed4") for note in results.notes)


def test_records_of_something_else_are_refused(studied: World) -> None:
    def refused(name: str, text: str, *argv: str) -> str:
        (studied.folder / f"{name}.toml").write_text(text)
        outcome = studied.run("study", f"{name}.toml", "--out", "studies/halves", *argv)
        assert (outcome.code, outcome.stderr.count("\n")) == (2, 1), outcome.stderr
        return outcome.stderr

    renamed = STUDY.replace("arms.half", "arms.part").replace('arm = "half"', 'arm = "part"')
    assert "half-seed3.json: is not a run of this study (it has all, part)" in refused("renamed", renamed)
    measured = STUDY.replace("1.5", "1.25")
    message = (
        "(hot: eval --temperature 1.5 --problems 4, now eval --temperature 1.25 --problems 4); remove it to measure"
    )
    assert message in refused("measured", measured)
    changed = STUDY.replace("ratio=0.5", "ratio=0.4")
    assert "(selection.ratio = 0.5, now 0.4); remove it to train" in refused("changed", changed)


def test_another_model_under_the_same_name_is_refused(studied: World, own_world: World) -> None:
    shutil.copytree(studied.folder / "studies/halves", own_world.folder / "studies/halves")
    (own_world.folder / "halves.toml").write_text(STUDY)
    make_model(own_world.folder / "model", initializer_range=0.3)
    outcome = own_world.run("study", "halves.toml")
    assert (outcome.code, outcome.stderr.count("\n")) == (2, 1)
    assert "(the files of model.path = model have changed)" in outcome.stderr
    shutil.copytree(studied.folder / "runs/halves", own_world.folder / "runs/halves")
    for path in (own_world.folder / "studies/halves/runs").glob("*.json"):
        path.unlink()
    outcome = own_world.run("study", "halves.toml")
    assert outcome.code == 1
    assert "runs/halves/all-seed3: holds a run from other base weights; remove it" in outcome.stderr


def test_two_studies_do_not_share_run_folders(studied: World) -> None:
    (studied.folder / "other.toml").write_text(STUDY.replace("ratio=0.5", "ratio=0.4"))
    outcome = studied.run("study", "other.toml", "--runs-dir", "runs/halves")
    assert outcome.code == 1
    assert "half-seed3: holds a run with other settings; remove it" in outcome.stderr
    assert "too few finished runs to compare" in outcome.stderr
    assert (studied.folder / "studies/other/runs/all-seed3.json").exists(), "what was fine before is kept"


def test_runs_that_exist_are_compared(studied: World) -> None:
    """The same four runs, whose settings make the arms: the same differences."""
    runs = [f"runs/halves/{name}" for name in RUNS]
    outcome = studied.run("study", "--runs", *runs, "--out", "analyses/given")
    assert outcome.code == 0, outcome.stderr
    given, studied_ = (read_results(studied.folder / path) for path in ("analyses/given", "studies/halves"))
    assert given.settings["baseline"] == "selection.rule-all-selection.ratio-0.2"
    columns = ["accuracy", "difference", "difference_low", "p"]
    assert given.tables["arms"][columns].equals(studied_.tables["arms"][columns])
    merged = studied.run("study", "--runs", f"x={runs[0]}", f"x={runs[3]}", *runs[1:3], "--out", "analyses/merged")
    assert merged.code == 2 and "arm x: seeds 3 and 4 differ in selection.r" in merged.stderr
    studied.trained("limited", "training.steps=1", "training.epochs=9")
    limited = studied.run("study", "--runs", "limited", *runs[:2], "--out", "analyses/limited")
    assert limited.code == 2 and "--runs limited: with training.epochs = 9 runs differ in length" in limited.stderr
    refused = studied.run("study", "--runs", *runs[:3], "--out", "analyses/three")
    assert refused.code == 2 and "an interval over runs needs at least two different seeds" in refused.stderr


def test_metrics_of_other_trainers_are_compared(studied: World) -> None:
    """JSON lines, W&B's CSV and TensorBoard's events say the same."""
    folder = studied.folder / "exports"
    folder.mkdir()
    values = {"a0": (0.1, 0.3), "a1": (0.1, 0.35), "b0": (0.1, 0.5), "b1": (0.12, 0.56)}
    for name, (first, last) in values.items():
        rows = [{"step": 0, "acc": first}, {"step": 5, "loss": 1.0}, {"step": 10, "acc": last}]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "b1.csv").write_text('"Step","run - acc","run - acc__MIN"\n0,0.12,0.12\n10,0.56,0.56\n')
    (folder / "two.csv").write_text("Step,r1 - acc,r2 - acc\n0,0.1,0.1\n10,0.5,0.6\n")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "a1")) as writer:
        for step, value in ((0, 0.1), (10, 0.35)):
            writer.add_scalar("acc", value, step)
    words = ["plain=exports/a0.jsonl", "plain=exports/a1", "forks=exports/b0.jsonl", "forks=exports/b1.csv"]
    outcome = studied.run("study", "--runs", *words, "--metric", "acc", "--out", "analyses/others")
    assert outcome.code == 0, outcome.stderr
    results = read_results(studied.folder / "analyses/others")
    arms = results.tables["arms"].set_index("arm")
    assert arms.loc["forks", "difference"] == pytest.approx(0.205)
    assert "intervals cover seeds only" in outcome.stdout and results.settings["baseline"] == "plain"
    for changed, message in (
        ({"acc": "none"}, "exports/a0.jsonl: has fewer than two values of none"),
        (
            {"plain=exports/a1": "plain=exports/two.csv"},
            "two.csv: has several columns of acc (r1 - acc, r2 - acc); export",
        ),
        ({"plain=exports/a1": "exports/b1.csv"}, "is not a run folder; name its arm: --runs ARM=exports/b1.csv"),
        ({"plain=exports/a1": "plain=exports/none"}, "exports/none: no such file or folder"),
    ):
        argv = ["study", "--runs", *words, "--metric", "acc", "--out", "analyses/others"]
        refused = studied.run(*(changed.get(word, word) for word in argv))
        assert (refused.code, message in refused.stderr) == (2, True), refused.stderr


def test_runs_are_listed_and_watched(studied: World) -> None:
    started = studied.start("train", "recipe.toml", "training.steps=1000000", "--out", "runs/endless")
    metrics = studied.folder / "runs/endless/metrics.jsonl"
    assert wait_until(lambda: metrics.is_file() and metrics.read_bytes().count(b"\n") >= 2, STALL_TIMEOUT_S)
    (studied.folder / "runs/broken-config").mkdir()
    (studied.folder / "runs/broken-config/config.toml").write_text("not toml")
    listed = {run["path"]: run for run in json.loads(studied.run("runs", "--json").stdout)}
    assert (listed["runs/endless"]["status"], listed["runs/endless"]["steps"]) == ("running", 1000000)
    assert listed["runs/broken-config"]["status"] == "unreadable"
    finished = listed["runs/halves/half-seed4"]
    assert (finished["status"], finished["step"], finished["seed"]) == ("finished", 4, 4)
    watching = studied.start("report", "runs/endless", "--watch")
    report = studied.folder / "runs/endless/report.html"
    assert wait_until(report.is_file, STALL_TIMEOUT_S)
    started.send(signal.SIGTERM)
    started.wait()
    outcome = watching.wait()
    assert outcome.code == 0 and "Held-out accuracy" in outcome.stdout.splitlines()[-1]
    text = studied.run("runs").stdout
    assert "runs/endless" in text and "stopped" in text
    assert studied.run("runs", "nowhere").code == 2
    assert "holds no run folder" in studied.run("runs", "model").stderr
    assert "--watch: studies/halves is not a run folder" in studied.run("report", "studies/halves", "--watch").stderr


def test_scores_of_a_measurement_are_sorted_by_question(tmp_path: Path) -> None:
    """Responses are written in the order in which they end."""
    responses = {"mine": random_responses(6, 2)}
    write_evaluation(tmp_path / "a", responses)
    write_evaluation(tmp_path / "b", responses)
    for path in (tmp_path / "b").glob("*/mine.jsonl"):
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    a, b = (read_measurement(tmp_path / name, MeasurementConfig()) for name in "ab")
    assert a == b and len(set(a.scores["accuracy"])) > 1
    spent, accuracy = a.spending
    assert spent == sorted(spent) and spent[-1] == pytest.approx(fmean(each.tokens for each in responses["mine"]))
    assert accuracy[-1] == pytest.approx(fmean(a.scores["accuracy"])) and accuracy[0] < accuracy[-1]


def test_the_time_of_a_new_study_is_measured_with_two_steps(studied: World) -> None:
    (studied.folder / "new.toml").write_text(STUDY)
    outcome = studied.run("study", "new.toml", "--dry-run")
    assert outcome.code == 0, outcome.stderr
    assert "to train: 4 runs, about " in outcome.stdout and "(from two steps of all-seed3; " in outcome.stdout
    assert not (studied.folder / "studies/new").exists() and not (studied.folder / "runs/new").exists()
