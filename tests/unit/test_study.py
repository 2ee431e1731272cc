"""Study files, records, and the tables of a study, without training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from forkrl.commands.study import write_study as write_results_of
from forkrl.commands.study_measured import read_measurement
from forkrl.commands.study_runs import Places, read_records
from forkrl.config.study import MeasurementConfig, StudyConfig, load_study
from forkrl.errors import UserError
from forkrl.evaluation.study_tables import CONTRADICTED, SUPPORTED, UNDECIDED, study_tables
from forkrl.store.results import csv_text, read_table, write_results
from forkrl.store.run_record import (
    ACCURACY,
    CURVES,
    LENGTH,
    MOST_BYTES,
    SECONDS,
    TOKENS,
    Measured,
    RunRecord,
    read_record,
    write_record,
)

RECIPE = """
[rollout]
prompts_per_step = 8
[reward]
overlong_cache = 0
[checkpoint]
kind = "none"
[training]
steps = 4
mini_batch_prompts = 4
"""
STUDY = """
title = "A trial"
recipe = "recipe.toml"
baseline = "all"
seeds = [0, 1, 2]
settings = ["rollout.group_size=4"]
[arms.all]
settings = ["selection.rule=all"]
[arms.top]
label = "top 20%"
seeds = [1, 2]
[[claims]]
text = "as good"
arm = "top"
than = "all"
says = "not worse"
margin = 0.02
"""


def write_study(folder: Path, text: str = STUDY) -> Path:
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "study.toml").write_text(text)
    return folder / "study.toml"


def test_a_study_is_its_arms_times_its_seeds(tmp_path: Path) -> None:
    study, planned = load_study(write_study(tmp_path))
    assert [run.name for run in planned] == ["all-seed0", "all-seed1", "top-seed1", "all-seed2", "top-seed2"]
    assert [run.config.seed for run in planned] == [0, 1, 1, 2, 2]
    assert {run.config.rollout.group_size for run in planned} == {4}
    assert [run.config.selection.rule for run in planned[:3]] == ["all", "all", "top_entropy"]
    assert (study.label("all"), study.label("top")) == ("all", "top 20%")


LABEL = 'label = "top 20%"'
SEEDS = "seeds = [0, 1, 2]"
BAD = {
    "a baseline that is no arm": (
        'baseline = "all"', 'baseline = "every"', "baseline = 'every': is not an arm; the arms are all, top",
    ),
    "one seed": (SEEDS, "seeds = [0]", "seeds of arm all: 0; an interval over runs needs at least two"),
    "no seed": (SEEDS, "seeds = []", "seeds of arm all: none; an interval"),
    "a seed twice": (SEEDS, "seeds = [0, 1, 1]", "seeds of arm all: 1 is given twice; remove one"),
    "seeds of other pairs": ("seeds = [1, 2]", "seeds = [7, 8]", "at least two must be seeds of the baseline all"),
    "an arm that changes nothing": ('["selection.rule=all"]', "[]", "arms all and top have the same settings"),
    "an arm on other data": (
        LABEL, 'settings = ["task.name=countdown-validation"]', "arm top is not measured as the baseline all (task",
    ),
    "an arm with another model": (LABEL, 'settings = ["model.path=x"]', "(model.path: "),
    "other evaluation problems": (LABEL, 'settings = ["eval.problems=7"]', "(eval.problems: "),
    "another limit": (LABEL, 'settings = ["rollout.max_response_tokens=9"]', "(rollout.max_response_tokens: "),
    "a measurement of nothing": (
        "[[claims]]", '[measurements.m]\n[[claims]]', 'checkpoint.kind = "none" there is no trained model',
    ),
    "a claim about no measurement": (
        "margin = 0.02", 'margin = 0.02\nmeasurement = "m"', "measurement = 'm' is not an evaluation; name one of none",
    ),
    "runs of as many epochs": (
        LABEL, 'settings = ["training.epochs=2"]', "training.epochs = 2 runs differ in length; set it to 0",
    ),
    "runs of different lengths": (
        LABEL, 'settings = ["eval.every=2", "eval.patience=3"]', "eval.patience = 3 runs differ in length; set it to 0",
    ),
    "a seed as a setting": (LABEL, 'settings = ["seed=7"]', "arm top: the seed is set by seeds; remove seed="),
    "an unknown setting": (LABEL, 'settings = ["selection.rho=7"]', "arm top: selection.rho is not a setting"),
    "an unknown key": (LABEL, 'name = "top 20%"', "arms.top.name is not a setting"),
    "a claim about no arm": ('arm = "top"', 'arm = "tip"', "claims: arm = 'tip' is not an arm"),
    "a claim about one arm": ('than = "all"', 'than = "top"', "claims: arm and than are both 'top'"),
    "another word": ('says = "not worse"', 'says = "as good"', "claims.0.says = 'as good'"),
    "no recipe": ('recipe = "recipe.toml"', 'recipe = "other.toml"', "other.toml: no such recipe"),
    "a name for a path": ("[arms.top]", '[arms."../top"]', "'../top' cannot be a name"),
    "a reserved name": ("[arms.top]", "[arms.start]", "'start' cannot be a name"),
    "not TOML": ("title", "title =", "not valid TOML"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_study_that_cannot_be_is_refused_in_a_line(what: str, tmp_path: Path) -> None:
    old, new, message = BAD[what]
    assert old in STUDY
    path = write_study(tmp_path, STUDY.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        load_study(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_one_arm_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="arms: 1 given; a study compares at least two"):
        load_study(write_study(tmp_path, STUDY.partition("[arms.top]")[0]))
    with pytest.raises(UserError, match=r"no such study; shipped ones are in studies/"):
        load_study(tmp_path / "missing.toml")


def record(arm: str, seed: int, final: list[float], start: list[float] | None = None, **changes: Any) -> RunRecord:
    """Four steps, evaluated before and after; 100 tokens and 1 second each."""
    steps = [0.0, 1.0, 2.0, 3.0, 4.0]
    curves = {
        "eval/accuracy": ([0.0, 4.0], [0.1, float(np.mean(final))]),
        "eval/length": ([0.0, 4.0], [50.0, 60.0]),
        "selection/kept_fraction": (steps[1:], [0.2, 0.2, None, 0.2]),
        TOKENS: (steps, [100.0 * step for step in steps]),
        SECONDS: (steps, [1.0 * step for step in steps]),
    }
    values: dict[str, Any] = {
        "arm": arm, "seed": seed, "settings": {}, "weights": "w", "provenance": {"commit": "abc", "threads": 1},
        "machine": "m, 2 cores", "date": "2026-01-01T00:00:00+00:00", "curves": curves, "problems": "p",
        "scores": {0: start or [0.0] * len(final), 4: final},
    }  # fmt: skip
    return RunRecord(**(values | changes))


def configuration(**changes: Any) -> StudyConfig:
    values: dict[str, Any] = {
        "title": "t", "recipe": "r", "baseline": "all", "seeds": (0, 1, 2), "arms": {"all": {}, "top": {}},
    }  # fmt: skip
    return StudyConfig.model_validate(values | changes)


def scores(share: float, size: int = 50) -> list[float]:
    return [float(place < round(share * size)) for place in range(size)]


def test_differences_are_paired_by_seed_and_problem() -> None:
    """Seeds differ much and arms by 0.1 in each: paired, the difference is certain in the seeds."""
    records = [record("all", seed, scores(0.2 * seed + 0.2)) for seed in (0, 1, 2)]
    records += [record("top", seed, scores(0.2 * seed + 0.3)) for seed in (0, 1, 2)]
    rows = {row["arm"]: row for row in study_tables(configuration(), records)["arms"]}
    assert rows["all"]["accuracy"] == pytest.approx(0.4) and rows["top"]["accuracy"] == pytest.approx(0.5)
    assert rows["top"]["difference"] == pytest.approx(0.1)
    assert rows["top"]["difference_low"] > 0 and rows["top"]["p"] < 0.05
    assert rows["all"]["accuracy_low"] == 0, "three seeds say little about one arm"
    assert "p" not in rows["all"] and rows["top"]["p_holm"] == rows["top"]["p"]
    assert rows["top"]["seed_deviation"] == pytest.approx(0.2)
    assert rows["top"]["best"] > 0.95 and rows["top"]["kept"] == pytest.approx(0.2)


def test_a_share_of_wins_is_given_for_arms_with_all_seeds_only() -> None:
    records = [
        record(arm, seed, scores(0.4)) for arm in ("all", "top", "few") for seed in range(4 if arm != "few" else 2)
    ]
    arms: dict[str, Any] = {"all": {}, "top": {}, "few": {"seeds": (0, 1)}}
    rows = {row["arm"]: row for row in study_tables(configuration(arms=arms, seeds=(0, 1, 2, 3)), records)["arms"]}
    assert rows["all"]["best"] == rows["top"]["best"] == 0.5 and math.isnan(rows["few"]["best"])


def test_time_is_compared_on_one_machine_only() -> None:
    records = [record(arm, seed, scores(0.4)) for arm in ("all", "top") for seed in (0, 1)]
    records = [each.model_copy(update={"scores": {**each.scores, 2: scores(0.2)}}) for each in records]
    row = next(row for row in study_tables(configuration(), records)["arms"] if row["arm"] == "top")
    assert {"equal_tokens", "equal_seconds"} <= row.keys()
    records[3] = records[3].model_copy(update={"machine": "another"})
    row = next(row for row in study_tables(configuration(), records)["arms"] if row["arm"] == "top")
    assert "equal_tokens" in row and "equal_seconds" not in row


def test_only_common_seeds_are_paired() -> None:
    records = [record("all", seed, scores(0.2 * seed + 0.2)) for seed in (0, 1, 2)]
    records += [record("top", seed, scores(0.2 * seed + 0.3)) for seed in (1, 2)]
    rows = {row["arm"]: row for row in study_tables(configuration(), records)["arms"]}
    assert rows["top"]["difference"] == pytest.approx(0.1) and rows["top"]["seeds"] == 2


def test_holm_over_arms() -> None:
    generator = np.random.default_rng(0)
    arms = ("all", "a", "b", "c")
    records = [
        record(arm, seed, generator.integers(0, 2, 40).astype(float).tolist()) for arm in arms for seed in range(4)
    ]
    rows = study_tables(configuration(arms={arm: {} for arm in arms}, seeds=(0, 1, 2, 3)), records)["arms"]
    p = sorted((row["p"], row["p_holm"]) for row in rows if "p" in row)
    assert len(p) == 3 and p[0][1] == pytest.approx(min(1, 3 * p[0][0])) and p[1][1] >= p[0][1]


def test_at_equal_budgets_the_costlier_arm_is_read_earlier() -> None:
    """``top`` spends twice the tokens in the same time: at equal tokens it is judged halfway."""

    def halfway(share: float) -> dict[int, list[float]]:
        return {0: scores(0), 2: scores(share / 2), 4: scores(share)}

    cheap = [record("all", seed, scores(0.4), scores=halfway(0.4)) for seed in (0, 1)]
    dear = []
    for seed in (0, 1):
        costly = record("top", seed, scores(0.6), scores=halfway(0.6))
        curves = costly.curves | {TOKENS: (costly.curves[TOKENS][0], [200.0 * step for step in range(5)])}
        dear.append(costly.model_copy(update={"curves": curves}))
    rows = {row["arm"]: row for row in study_tables(configuration(), [*cheap, *dear])["arms"]}
    assert rows["top"]["difference"] == pytest.approx(0.2)
    assert rows["top"]["equal_tokens"] == pytest.approx(0.3 - 0.4)
    assert rows["top"]["equal_seconds"] == pytest.approx(0.2)


CLAIMS = {
    ("top", "all", "better", 0.0): SUPPORTED,
    ("top", "all", "not worse", 0.02): SUPPORTED,
    ("top", "all", "worse", 0.0): CONTRADICTED,
    ("top", "all", "equal", 0.02): CONTRADICTED,
    ("all", "top", "better", 0.0): CONTRADICTED,
    ("same", "all", "equal", 0.2): SUPPORTED,
    ("same", "all", "better", 0.0): UNDECIDED,
    ("same", "start", "better", 0.1): SUPPORTED,
    ("none", "start", "equal", 0.05): SUPPORTED,
    ("none", "start", "better", 0.05): CONTRADICTED,
}


@pytest.mark.parametrize(("arm", "than", "says", "margin"), CLAIMS)
def test_claims(arm: str, than: str, says: str, margin: float) -> None:
    generator = np.random.default_rng(1)
    shares = {"all": 0.4, "top": 0.6, "same": 0.4, "none": 0.0}
    records = [
        record(name, seed, (generator.random(400) < share).astype(float).tolist())
        for name, share in shares.items()
        for seed in range(3)
    ]
    claim = {"text": "c", "arm": arm, "than": than, "says": says, "margin": margin}
    found = configuration(arms={arm: {} for arm in shares}, claims=(claim,))
    row = study_tables(found, records)["claims"][0]
    assert row["verdict"] == CLAIMS[arm, than, says, margin]
    assert math.isnan(row["seeds_needed"]) or row["verdict"] == UNDECIDED


def test_runs_on_different_problems_are_refused() -> None:
    records = [record(arm, seed, scores(0.4)) for arm in ("all", "top") for seed in (0, 1)]
    records[3] = records[3].model_copy(update={"problems": "q"})
    with pytest.raises(UserError, match="runs all seed 0 and top seed 1 have different data or held-out problems"):
        study_tables(configuration(), records)


def test_too_few_runs_are_refused() -> None:
    records = [record("all", 0, scores(0.4)), record("all", 1, scores(0.4)), record("top", 0, scores(0.4))]
    with pytest.raises(UserError, match=r"the baseline all and another arm need two each \(all 2, top 1\)"):
        study_tables(configuration(), records)


def test_measurements_on_different_questions_are_refused() -> None:
    measured = [
        {"m": Measured(words=["eval"], problems=digest, scores={ACCURACY: scores(0.4)}, spending=([9.0], [0.4]))}
        for digest in "pppq"
    ]
    runs = [(arm, seed) for arm in ("all", "top") for seed in (0, 1)]
    records = [record(*run, scores(0.4), measured=found) for run, found in zip(runs, measured, strict=True)]
    with pytest.raises(UserError, match="measurement m: runs all seed 0 and top seed 1 were measured on different"):
        study_tables(configuration(measurements={"m": {}}), records)


def test_measurements_are_paired_too() -> None:
    """... and the model before training is compared with the baseline after it, seed by seed."""
    records = [evaluated("all", seed, longer=0.2, longer_start=0.1) for seed in (0, 1)]
    records += [evaluated("top", seed, longer=0.4) for seed in (0, 1)]
    rows = study_tables(configuration(measurements={"longer": {}}), records)["measurements"]
    frame = pd.DataFrame(rows).set_index(["arm", "figure"])
    assert frame.loc[("top", "accuracy"), "difference"] == pytest.approx(0.2)
    assert frame.loc[("start", "accuracy"), "difference"] == pytest.approx(-0.1)
    assert frame.loc[("top", LENGTH), "difference"] == pytest.approx(14)
    assert frame.loc[("start", LENGTH), "value"] == pytest.approx(7)
    assert frame.loc[("all", "truncated"), "value"] == 0.5
    assert frame.loc[("top", "accuracy at equal length"), "value"] == pytest.approx(0.2), "stopped at 14 of 28 tokens"
    assert frame.loc[("top", "accuracy at equal length"), "difference"] == pytest.approx(0)


def evaluated(arm: str, seed: int, **shares: float) -> RunRecord:
    """A run with evaluations: 70 tokens a response times the accuracy, and right answers spread evenly over them."""
    measured = {
        name.replace("_", "@"): Measured(
            words=["eval"],
            figures={"truncated": 0.5},
            problems="q",
            scores={ACCURACY: scores(share), LENGTH: [70 * share] * 50},
            spending=([0.0, 70 * share], [0.0, share]),
        )
        for name, share in shares.items()
    }
    return record(arm, seed, scores(0.4), measured=measured)


@pytest.mark.parametrize(
    ("command", "tables", "figures"),
    [
        (
            "drift",
            {
                "overlap": [
                    {"checkpoint": "step 0", "with_first": 1.0, "with_last": 0.8},
                    {"checkpoint": "step 4", "with_first": 0.8, "with_last": 1.0},
                ],
                "change": [{"from_percentile": 75, "to_percentile": 80, "change": -0.2}],
                "percentiles": [
                    {
                        "checkpoint": "step 0",
                        "mean": 0.1,
                        "percentile_50": 0.0,
                        "percentile_80": 0.5,
                        "percentile_95": 1.2,
                    }
                ],
            },
            {
                "overlap with the first: step 4": 0.8,
                "overlap with the last: step 0": 0.8,
                "change of entropy: 75-80%": -0.2,
                "mean: step 0": 0.1,
                "percentile 50: step 0": 0.0,
                "percentile 80: step 0": 0.5,
                "percentile 95: step 0": 1.2,
            },
        ),
        (
            "decode-temps",
            {"settings": [{"high": 0.3, "low": 1.0, "accuracy": 0.25}]},
            {"accuracy: T_high 0.3, T_low 1": 0.25},
        ),
    ],
)
def test_figures_of_other_measurements(
    command: str, tables: dict[str, list[dict[str, Any]]], figures: dict[str, float], tmp_path: Path
) -> None:
    frames = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    write_results(tmp_path, f"forkrl-{command}/1", settings={}, headline="", facts={}, tables=frames)
    measurement = MeasurementConfig.model_validate({"command": command})
    assert read_measurement(tmp_path, measurement).figures == figures


def test_scores_left_out_of_a_record_are_noted(tmp_path: Path) -> None:
    records = [record(arm, seed, scores(0.4)) for arm in ("all", "top") for seed in (0, 1)]
    assert not write_results_of(configuration(), records, tmp_path, "again", []).notes
    curves = records[0].curves | {"eval/accuracy": ([0.0, 2.0, 4.0], [0.1, 0.2, 0.4])}
    records[0] = records[0].model_copy(update={"curves": curves})
    (note,) = write_results_of(configuration(), records, tmp_path, "again", []).notes
    assert note.startswith("1 record had room")


def test_the_mean_over_evaluations_weighs_them_equally() -> None:
    records = [evaluated("all", seed, a=0.2, b=0.4, a_start=0.1, b_start=0.1) for seed in (0, 1)]
    records += [evaluated("top", seed, a=0.4, b=0.5) for seed in (0, 1)]
    for each in records:  # a tenth of the questions, with the same mean
        for name, measured in each.measured.items():
            if name.startswith("b"):
                measured.scores.update({figure: values[::10] for figure, values in measured.scores.items()})
    rows = study_tables(configuration(measurements={"a": {}, "b": {}}), records)["measurements"]
    frame = pd.DataFrame([row for row in rows if row["measurement"] == "mean"]).set_index(["arm", "figure"])
    assert frame.loc[("all", ACCURACY), "value"] == pytest.approx(0.3)
    assert frame.loc[("top", ACCURACY), "difference"] == pytest.approx((0.2 + 0.2) / 2)


def test_the_spread_between_evaluations_is_no_error_of_their_mean() -> None:
    """Every question is answered alike in every run, so nothing is uncertain, whatever the numbers of questions."""
    records = [evaluated("all", seed, a=0.2, b=0.4, a_start=0.2, b_start=0.4) for seed in (0, 1)]
    records += [evaluated("top", seed, a=0.2, b=0.4) for seed in (0, 1)]
    for each in records:
        for name, measured in each.measured.items():
            measured.scores[ACCURACY] = [0.2] * 50 if name.startswith("a") else [0.4] * 5
    rows = study_tables(configuration(measurements={"a": {}, "b": {}}), records)["measurements"]
    frame = pd.DataFrame([row for row in rows if row["measurement"] == "mean"]).set_index(["arm", "figure"])
    found = frame.loc[("top", ACCURACY)]
    assert [found["value_low"], found["value_high"]] == pytest.approx([0.3, 0.3])
    assert [found["difference_low"], found["difference_high"]] == pytest.approx([0, 0], abs=1e-12)


def test_no_accuracy_is_reached_within_fewer_tokens_than_any_response_has() -> None:
    records = [evaluated("all", seed, m=0.1) for seed in (0, 1)]
    records += [evaluated("top", seed, m=0.4) for seed in (0, 1)]
    for each in records[2:]:
        each.measured["m"].spending[0][:] = [28.0, 28.0]  # every response has 28 tokens, the baseline's 7
        each.measured["m"].spending[1][:] = [0.4, 0.4]
    rows = study_tables(configuration(measurements={"m": {}}), records)["measurements"]
    frame = pd.DataFrame(rows).set_index(["arm", "figure"])
    assert frame.loc[("top", "accuracy at equal length"), "value"] == pytest.approx(0.1), "7 of 28 tokens"


def test_a_claim_may_be_about_a_measurement() -> None:
    claims = [
        {"text": "c", "arm": "top", "than": than, "says": "better", "margin": 0.05, "measurement": "m"}
        for than in ("all", "start")
    ]
    records = [evaluated("all", seed, m=0.2, m_start=0.1) for seed in (0, 1)]
    records += [evaluated("top", seed, m=0.6) for seed in (0, 1)]
    found = study_tables(configuration(measurements={"m": {}}, claims=claims), records)["claims"]
    assert [row["difference"] for row in found] == pytest.approx([0.4, 0.5])
    assert [row["verdict"] for row in found] == [SUPPORTED, SUPPORTED]


def test_arms_without_two_common_seeds_are_not_compared() -> None:
    """As after failed runs; a pair of different seeds must not pass for one."""
    found = configuration(claims=({"text": "c", "arm": "top", "than": "all", "says": "better"},))
    for seeds in ((2, 3), (1, 2), (2, 3, 4)):
        records = [record("all", seed, scores(0.4)) for seed in (0, 1)]
        records += [record("top", seed, scores(0.6)) for seed in seeds]
        tables = study_tables(found, records)
        assert tables["claims"][0]["verdict"] == "not tested"
        assert all("difference" not in row for row in tables["arms"])


def test_the_model_before_training_is_measured_with_the_baseline() -> None:
    study = configuration(measurements={"m": {}, "d": {"command": "drift"}})
    assert list(study.measurements_of("top")) == ["m", "d"]
    assert list(study.measurements_of("all")) == ["m", "d", "m@start"]


@pytest.mark.parametrize(("says", "margin", "sign"), [("better", 0.1, 1), ("not worse", -0.1, 1), ("worse", -0.1, -1)])
def test_from_which_difference_a_claim_can_be_supported(says: str, margin: float, sign: int) -> None:
    generator = np.random.default_rng(2)
    records = [
        record(arm, seed, (generator.random(400) < 0.5).astype(float).tolist())
        for arm in ("all", "top")
        for seed in range(3)
    ]

    def row(says: str, margin: float) -> dict[str, Any]:
        claim = {"text": "c", "arm": "top", "than": "all", "says": says, "margin": margin}
        return study_tables(configuration(claims=(claim,)), records)["claims"][0]

    found = row(says, 0.1)
    assert found["supported_from"] == pytest.approx(margin + sign * found["detectable"])
    assert 0.1 < row("equal", 0.3)["supported_from"] < 0.3 - found["detectable"], "both ends must hold"
    assert math.isnan(row("equal", 0.01)["supported_from"])


def test_a_record_survives_the_disk_and_stays_small(tmp_path: Path) -> None:
    long = record("all", 3, [1 / 3] * 1024, start=[0.0] * 1024)
    steps = [float(step) for step in range(500)]
    curves = {name: (steps, [0.123456789 * step for step in steps]) for name in (*CURVES, TOKENS, SECONDS)}
    path = tmp_path / "runs" / "all-seed3.json"
    write_record(path, long.model_copy(update={"curves": curves}))
    assert path.stat().st_size <= MOST_BYTES, "15 curves of 500 steps and 2,048 scores"
    found = read_record(path)
    kept, values = found.curves[TOKENS]
    assert (kept[0], kept[-1], len(kept)) == (0, 499, 60)
    assert values[-1] == pytest.approx(0.123456789 * 499, rel=1e-4)
    assert found.scores[4][0] == pytest.approx(1 / 3, abs=1e-5)
    path.write_text(json.dumps({"schema": "other"}))
    with pytest.raises(UserError, match=r"cannot be read as a run record .*; remove it to train"):
        read_record(path)


def through_disk(rows: list[dict[str, Any]], folder: Path) -> pd.DataFrame:
    (folder / "table.csv").write_text(csv_text(pd.DataFrame(rows)))
    return read_table(folder / "table.csv")


STUDIES = Path(__file__).parents[2] / "studies"


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*/study.toml")), ids=lambda path: path.parent.name)
def test_a_study_of_this_repository_is_what_its_records_say(path: Path, tmp_path: Path) -> None:
    """The committed tables follow from the committed records, which were made with the settings in the file."""
    study, planned = load_study(path)
    records = read_records(study, Places(path.parent / "runs", path.parent), planned)
    if not (path.parent / "results.json").exists():
        assert len(records) < len(planned), "all records, and no results: run forkrl study"
        return
    assert len(records) == len(planned), "finish the study before committing its results"
    for name, rows in study_tables(study, list(records.values())).items():
        committed = read_table(path.parent / "tables" / f"{name}.csv")
        pd.testing.assert_frame_equal(committed, through_disk(rows, tmp_path), rtol=1e-6, check_dtype=False)
    files = [file for file in path.parent.rglob("*") if file.is_file() and file.name != "report.html"]
    assert all(file.stat().st_size < 200_000 for file in files), "too large for version control"
