"""``forkrl branch``: what it writes, that a kill costs nothing finished, and that it refuses before it samples."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from forkrl.commands.report import write_report
from forkrl.store.results import read_table
from tests.smoke.world import Outcome, Run, World, write_prompts

SIZES = ("--problems", "5", "--forks", "2", "--random", "1", "--low", "1", "--continuations", "6")
# Batches of 16: four of them hold the continuations of one prompt, so that there are five parts.
SMALL = ("--recipe", "recipe.toml", "rollout.max_sequences=16", *SIZES)


def branched(world: World, out: str, *argv: str, **how: Any) -> tuple[Outcome, dict[str, Any]]:
    """A branching that has to succeed, and its facts."""
    outcome = world.run("branch", *argv, "--out", out, **how)
    assert outcome.code == 0, outcome.stderr
    return outcome, json.loads((world.folder / out / "results.json").read_text())["facts"]


def branches(folder: Path) -> pd.DataFrame:
    """The table of branches, with the scores as lists."""
    table = read_table(folder / "tables" / "branches.csv")
    return table.assign(scores=table["scores"].map(json.loads))


def parts(world: World, out: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((world.folder / out / "parts").glob("part-*.parquet"))}


@pytest.fixture(scope="module")
def whole(world: World) -> dict[str, Any]:
    outcome, summary = branched(world, "whole", "model", *SMALL)
    return summary | {"stdout": outcome.stdout, "stderr": outcome.stderr}


def test_what_it_writes(world: World, whole: dict[str, Any]) -> None:
    folder = world.folder / "whole"
    table = branches(folder)
    assert len(table) == whole["branches"] == len(pd.read_csv(folder / "tables" / "branches.csv"))
    positions = table.groupby(["prompt", "sample", "position"])
    assert whole["positions"] == len(positions) == len(pd.read_csv(folder / "tables" / "positions.csv"))
    assert (positions["taken"].sum() == 1).all()
    assert positions.size().between(3, 4).all()
    assert (table["count"] == [1 if exact else 6 for exact in table["exact"]]).all()
    assert table["exact"].any(), "some alternative ends the response"
    assert not table["exact"].all()
    assert ((table["token"] == "<eos>") <= table["exact"]).all()
    assert ((table["position"] == 5) <= table["exact"]).all(), "nothing can follow the last token there is room for"
    assert (table["rate"] == [sum(scores) / len(scores) for scores in table["scores"]]).all()
    assert table["length"].max() <= 6
    assert whole["continuations"] == table.loc[~table["exact"], "count"].sum()
    assert json.loads((folder / "results.json").read_text())["schema"] == "forkrl-branch/2"
    assert set(pd.read_csv(folder / "tables" / "kinds.csv")["kind"]) == {"fork", "random", "low"}
    assert "% of the outcome" in whole["stdout"] or "of the outcome's variance" in whole["stdout"]
    page = (folder / "report.html").read_text()
    assert "one fork decides" in page
    assert write_report(folder).read_text() == page
    assert "report: whole/report.html" in whole["stdout"]
    assert "5 prompts, 1 response(s) to each; 4 positions a response (2 forks, 1 random, 1 of low" in whole["stderr"]
    assert "up to 480 continuations, roughly" in whole["stderr"]


def test_what_is_right_depends_on_the_first_token_alone(world: World, whole: dict[str, Any]) -> None:
    """The tiny verifier looks at the first character: a branch at position 0 has rate 0 or 1, and later ones none."""
    table = branches(world.folder / "whole")
    at_first = table[table["position"] == 0]
    assert (at_first["rate"] == at_first["token"].isin(list("13579"))).all()
    spreads = pd.read_csv(world.folder / "whole" / "tables" / "positions.csv")
    later = spreads.loc[spreads["position"] > 0, ["natural", "forced", "range", "gain"]]
    assert (later.abs() < 1e-12).all(axis=None)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_an_interrupted_one_goes_on(world: World, whole: dict[str, Any], signum: signal.Signals, code: int) -> None:
    out = f"interrupted-{code}"
    fault = {"point": "replace", "count": 4, "signal": signum, "after": True}  # settings, and three parts
    outcome = world.run("branch", "model", *SMALL, "--out", out, faults=[fault])
    assert outcome.code == code, outcome
    if code == 130:
        assert f"what was finished is kept in {out}; the same command resumes" in outcome.stderr
    kept = {path: path.stat().st_mtime_ns for path in (world.folder / out / "parts").glob("part-*")}
    assert len(kept) == 3
    resumed, summary = branched(world, out, "model", *SMALL)
    assert "3 of 5 prompts are in" in resumed.stderr
    assert "2 prompts, 1 response(s) to each" in resumed.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert parts(world, out) == parts(world, "whole")
    assert summary == {name: whole[name] for name in summary}
    for table in (world.folder / "whole" / "tables").iterdir():
        assert (world.folder / out / "tables" / table.name).read_bytes() == table.read_bytes()


def test_more_problems_are_added_and_fewer_are_read_from_what_is_there(world: World, whole: dict[str, Any]) -> None:
    fewer = (*SMALL, "--problems", "3")
    _, summary = branched(world, "grown", "model", *fewer)
    assert summary["prompts"] == 3
    outcome, summary = branched(world, "grown", "model", *SMALL)
    assert "3 of 5 prompts are in grown already" in outcome.stderr
    assert parts(world, "grown") == parts(world, "whole")
    outcome, summary = branched(world, "grown", "model", *fewer)
    assert (summary["prompts"], len(parts(world, "grown"))) == (3, 5)
    assert "continuations, roughly" not in outcome.stderr


def test_a_part_of_several_prompts_keeps_its_size_whatever_the_batch(world: World) -> None:
    large = ("--recipe", "recipe.toml", *SIZES)  # batches of 64: four prompts a part
    branched(world, "large", "model", *large)
    assert list(parts(world, "large")) == ["part-00000.parquet", "part-00001.parquet"]
    before = parts(world, "large")
    outcome, summary = branched(world, "large", "model", *large, "rollout.max_sequences=7", "--problems", "6")
    assert "4 of 6 prompts are in large already" in outcome.stderr
    assert summary["prompts"] == 6
    assert parts(world, "large")["part-00000.parquet"] == before["part-00000.parquet"]


def test_a_run_is_branched_in_its_own_folder(world: World) -> None:
    run: Run = world.trained("run", "training.steps=2")
    outcome = world.run("branch", "run", *SIZES, "--problems", "2", "--responses-per-problem", "2")
    assert outcome.code == 0, outcome.stderr
    results = json.loads((run.folder / "analysis" / "branch" / "results.json").read_text())
    assert (results["facts"]["responses"], results["settings"]["model"]) == (4, "run")
    assert results["settings"]["weights"].endswith("step-2")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--alternatives", "1"), "--alternatives 1: must be at least 2 (one alternative is not a fork)"),
        (("--continuations", "1"), "--continuations 1: must be at least 2 (one does not show the noise)"),
        (("--forks", "0"), "--forks 0: must be at least 1"),
        (("--random", "-1"), "--random -1: must be at least 0"),
        (("--problems", "0"), "--problems 0: must be at least 1"),
        (("--responses-per-problem", "0"), "--responses-per-problem 0: must be at least 1"),
        (
            ("--temperature", "0"),
            "temperature = 0: must be above 0, as greedy continuations of a branch are all the same",
        ),
        (("--temperature", "nan"), "--temperature nan: must be at least 0"),
        (("eval.samples=2",), "eval.samples=2: has no effect on branching; give --responses-per-problem"),
        (("eval.problems=2",), "eval.problems=2: has no effect on branching; give --problems"),
        (("training.steps=2",), "training.steps=2: has no effect on branching; drop it"),
        (("rollout.top_p=0.5",), "rollout.top_p=0.5: has no effect on branching"),
        (("rollout.max_response_tokens=90",), "more than the 64 positions of the model"),
        (("--out", "recipe.toml"), "recipe.toml: is a file; name another folder with --out"),
        (("--out", "model"), "model: is not empty (it holds config.json)"),
        (
            ("--out", "whole", "--forks", "3"),
            "whole: was created with different settings (forks = 2, now 3); name another folder with --out",
        ),
    ],
)
def test_what_cannot_be_is_refused(world: World, whole: dict[str, Any], argv: tuple[str, ...], says: str) -> None:
    outcome = world.run("branch", "model", *SMALL, *(() if "--out" in argv else ("--out", "refused")), *argv)
    assert outcome.code == 2, outcome
    assert says in outcome.line


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        (("model.precision=bf16",), "precision"),
        (('rollout.stop=["a"]',), "stop"),
        (("seed=1",), "seed"),
        (("rollout.max_response_tokens=5",), "max_response_tokens"),
        (("task.data=elsewhere/prompts.jsonl",), "data"),
        (("task.verifier=first_character:nobody",), "verifier"),
        (("--temperature", "0.5"), "temperature"),
        (("--responses-per-problem", "2"), "responses"),
        (("--random", "2"), "random"),
        (("--low", "0"), "low"),
        (("--alternatives", "2"), "alternatives"),
        (("--continuations", "5"), "continuations"),
    ],
)
def test_whatever_changes_the_branches_is_another_question(
    world: World, whole: dict[str, Any], changed: tuple[str, ...], key: str
) -> None:
    (world.folder / "elsewhere").mkdir(exist_ok=True)
    rows = [{"prompt": f"{left}-{right}=", "answer": "02468"} for left in range(6) for right in range(4)]
    write_prompts(world.folder / "elsewhere" / "prompts.jsonl", rows)
    before = parts(world, "whole")
    outcome = world.run("branch", "model", *SMALL, "--out", "whole", *changed)
    assert outcome.code == 2, outcome
    assert f"whole: was created with different settings ({key} = " in outcome.line
    assert parts(world, "whole") == before


def test_prompts_without_answers_are_refused(own_world: World) -> None:
    write_prompts(own_world.folder / "bare.jsonl", [{"prompt": f"{n}="} for n in range(9)])
    outcome = own_world.run("branch", "model", "--data", "bare.jsonl", "--out", "bare")
    assert outcome.code == 2
    assert "bare.jsonl line 1 has no column 'answer'" in outcome.stderr
    outcome = own_world.run("branch", "model", "--data", "bare.jsonl", "task.verifier=none", "--out", "bare")
    assert outcome.code == 2
    assert "bare.jsonl: its rows have no answers, so no branch can be judged" in outcome.line
    assert not (own_world.folder / "bare").exists()


def test_a_response_of_a_single_token_and_hostile_text_are_no_trouble(own_world: World) -> None:
    """Prompts with mark-up reach the page as text; responses cut after one token have one position."""
    rows = [{"prompt": f"{n}*", "answer": "13579", "id": f"=1+<script>{n}"} for n in range(3)]
    write_prompts(own_world.folder / "hostile.jsonl", rows)
    dataset = ("--data", "hostile.jsonl", "task.verifier=first_character:first_character", "runtime.device=cpu")
    outcome = own_world.run(
        "branch", "model", *dataset, "rollout.max_response_tokens=1", "--continuations", "4", "--out", "hostile"
    )
    assert outcome.code == 0, outcome.stderr
    summary = json.loads((own_world.folder / "hostile" / "results.json").read_text())["facts"]
    assert (summary["positions"], summary["continuations"], summary["exact_branches"]) == (3, 0, summary["branches"])
    folder: Path = own_world.folder / "hostile"
    assert "=1+<script>" not in (folder / "report.html").read_text()


def test_a_run_branches_at_its_own_temperature(world: World) -> None:
    world.trained("warm", "training.steps=1", "eval.temperature=0.5")
    for argv, temperature in (((), 0.5), (("--temperature", "0.7"), 0.7), (("eval.temperature=0.8",), 0.8)):
        outcome, _ = branched(world, f"warm-{temperature}", "warm", *SIZES, *argv)
        settings = json.loads((world.folder / f"warm-{temperature}" / "settings.json").read_text())
        assert settings["temperature"] == temperature
        assert f"temperature {temperature}\n" in outcome.stdout
    outcome = world.run("branch", "warm", *SIZES, "eval.temperature=0")
    assert outcome.code == 2
    assert "temperature = 0: must be above 0" in outcome.line
