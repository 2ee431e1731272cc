"""``forkrl analyze`` and ``forkrl drift``: numbers of the model itself, resuming, and one line for bad input."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from forkrl.commands.report import write_report
from tests.smoke.world import Run, World, make_model, write_prompts

DATA = ("--data", "prompts.jsonl", "task.verifier=first_character:first_character")
SHORT = ("rollout.max_prompt_tokens=8", "rollout.max_response_tokens=12", "runtime.device=cpu")
SMALL = ("rollout.max_sequences=6", "runtime.workers=1")  # parts of three prompts, two samples each


def analyzed(world: World, *argv: str) -> dict[str, Any]:
    """The facts of an analysis that has to succeed, with what it printed."""
    outcome = world.run("analyze", *argv, "--out", "found")
    assert outcome.code == 0, outcome.stderr
    facts: dict[str, Any] = json.loads((world.folder / "found/results.json").read_text())["facts"]
    return facts | {"stdout": outcome.stdout, "stderr": outcome.stderr}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def run(world: World) -> Run:
    return world.trained("run", "training.steps=3", "checkpoint.every=1", "checkpoint.keep=9")


def test_tokens_are_what_the_model_says_of_them(own_world: World) -> None:
    facts = analyzed(own_world, "model", *DATA, *SHORT, *SMALL, "--samples", "2", "--min-count", "1")
    folder = own_world.folder / "found"
    tokens = pd.read_parquet(folder / "tokens")
    responses = pd.read_parquet(folder / "responses").set_index(["prompt", "sample"])
    assert facts["prompts"] == 24
    assert facts["responses"] == len(responses) == 48
    assert facts["tokens"] == len(tokens) == responses["token_ids"].map(len).sum()
    assert facts["percentile_80"] == pytest.approx(tokens["entropy"].astype(float).quantile(0.8))

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(own_world.folder / "model", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(own_world.folder / "model")
    for key, rows in list(tokens.groupby(["prompt", "sample"]))[::7]:
        response = responses.loc[key]
        ids = [*response["prompt_token_ids"], *response["token_ids"]]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, len(response["prompt_token_ids"]) - 1 : -1]
        log_p = torch.log_softmax(logits, -1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        target = log_p.gather(1, torch.tensor(rows["token_id"].to_numpy())[:, None].long())
        assert rows["entropy"].tolist() == pytest.approx(entropy.tolist(), abs=1e-5)
        assert rows["logprob"].tolist() == pytest.approx(target[:, 0].tolist(), abs=1e-4)
        assert rows["rank"].tolist() == ((log_p > target).sum(1) + 1).tolist()
        for found, expected in zip(rows["top_probs"], log_p.exp().topk(5).values.tolist(), strict=True):
            assert list(found) == pytest.approx(expected, abs=1e-5)
        for token_id, text in zip(rows["token_id"], rows["text"], strict=True):
            assert text == tokenizer.decode([token_id])
        first = response["response"][:1]
        assert bool(response["correct"]) == (first != "" and first in "13579")
    page = (folder / "report.html").read_text()
    assert "24 prompts, with every response" in page
    assert write_report(folder).read_text() == page
    assert all(
        (folder / "tables" / f"{name}.csv").is_file() for name in ("types", "contexts", "positions", "histogram")
    )


def test_a_killed_analysis_goes_on_without_repeating_work(own_world: World) -> None:
    command = ("model", *DATA, *SHORT, *SMALL, "--samples", "2", "--out", "found")
    whole = analyzed(own_world, *command[:-2])
    expected = {path.name: pd.read_parquet(path) for path in (own_world.folder / "found/tokens").iterdir()}
    assert len(expected) == 8
    (own_world.folder / "found").rename(own_world.folder / "whole")

    fault = {"point": "replace", "count": 8, "signal": signal.SIGKILL}  # settings, then two files a part
    killed = own_world.run("analyze", *command, faults=[fault])
    assert killed.code == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in (own_world.folder / "found").rglob("part-*.parquet")}
    assert 0 < len(done) < 16
    facts = analyzed(own_world, *command[:-2])
    finished = [path for path in done if path.parent.name == "responses"]
    assert f"{len(finished)} of 8 parts are in found already" in facts["stderr"]
    for path in finished:
        assert path.stat().st_mtime_ns == done[path], "a finished part is not made again"
    for name, table in expected.items():
        pd.testing.assert_frame_equal(pd.read_parquet(own_world.folder / "found/tokens" / name), table)
    assert {key: facts[key] for key in whole if key not in ("stdout", "stderr")} == {
        key: value for key, value in whole.items() if key not in ("stdout", "stderr")
    }


def test_interrupted_by_ctrl_c_it_says_how_to_go_on(own_world: World) -> None:
    command = ("analyze", "model", *DATA, *SHORT, *SMALL, "--out", "found")
    outcome = own_world.run(*command, faults=[{"point": "token", "count": 20, "signal": signal.SIGINT}])
    assert outcome.code == 130
    assert "kept in found; the same command resumes" in outcome.stderr


def test_ready_responses_are_measured_and_nothing_is_generated(own_world: World) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "1+1=", "response": "13", "correct": True},
        {"prompt": "2+2=", "response": "77 a", "score": 0},
        {"prompt": "1+1=", "response": "9", "correct": False},
        {"prompt": "3+", "token_ids": [5, 6, 1]},
    ]
    write_lines(own_world.folder / "ready.jsonl", rows)
    facts = analyzed(own_world, "model", "--responses", "ready.jsonl", "runtime.device=cpu", "--min-count", "1")
    tokens = pd.read_parquet(own_world.folder / "found/tokens")
    assert facts["prompts"] == 3
    assert facts["tokens"] == 2 + 4 + 1 + 3
    assert facts["accuracy"] == pytest.approx(1 / 3)
    assert tokens.groupby(["prompt", "sample"], sort=False)["length"].first().tolist() == [2, 1, 4, 3]
    assert tokens["text"].tolist()[:3] == ["1", "3", "9"]
    assert tokens["correct"].isna().sum() == 3


def test_prompts_without_answers_need_no_judge(own_world: World) -> None:
    write_prompts(own_world.folder / "plain.jsonl", [{"prompt": f"{n}+1"} for n in range(4)])
    facts = analyzed(own_world, "model", "--data", "plain.jsonl", "task.verifier=none", *SHORT)
    assert facts["accuracy"] is None
    assert facts["judged"] == 0


def test_a_model_without_a_chosen_limit_takes_the_positions_it_has(own_world: World) -> None:
    facts = analyzed(own_world, "model", *DATA, "runtime.device=cpu", "--problems", "2")
    settings = json.loads((own_world.folder / "found/settings.json").read_text())
    assert settings["max_response_tokens"] == 64 - 4
    assert facts["prompts"] == 2


def test_drift_of_a_run(world: World, run: Run) -> None:
    outcome = world.run("drift", "run", "--samples", "2", "--problems", "6", "--out", "drift")
    assert outcome.code == 0, outcome.stderr
    facts = json.loads((world.folder / "drift/results.json").read_text())["facts"]
    assert facts["checkpoints"] == ["step 0", "step 1", "step 2", "step 3"]
    overlap = pd.read_csv(world.folder / "drift/tables/overlap.csv")
    assert overlap["with_first"].iloc[0] == 1.0
    assert overlap["with_last"].iloc[-1] == 1.0
    tokens = pd.read_parquet(world.folder / "drift/tokens")
    base = pd.read_parquet(world.folder / "drift/entropies/0")["entropy"]
    assert len(base) == len(tokens) == facts["tokens"]
    k = math.ceil(0.2 * len(tokens))
    tops = [set(values.sort_values(ascending=False, kind="stable").index[:k]) for values in (base, tokens["entropy"])]
    assert facts["overlap"] == pytest.approx(len(tops[0] & tops[1]) / k)
    change = pd.read_csv(world.folder / "drift/tables/change.csv")
    weighted = (change["change"] * change["tokens"]).sum() / len(tokens)
    assert weighted == pytest.approx((tokens["entropy"].astype(float) - base.astype(float)).mean(), abs=1e-6)
    page = (world.folder / "drift/report.html").read_text()
    assert "step 2" in page
    assert write_report(world.folder / "drift").read_text() == page
    assert world.run("report", "drift", "--figures").code == 0
    drawn = {path.name for path in (world.folder / "drift/figures").iterdir()}
    assert drawn == {"overlap.svg", "change.svg", "percentiles.svg", "response.svg"}

    again = world.run("drift", "run", "--samples", "2", "--problems", "6", "--out", "drift", "--bins", "5")
    assert again.code == 0, again.stderr
    assert len(pd.read_csv(world.folder / "drift/tables/change.csv")) == 5


def test_the_entropies_of_the_first_checkpoint_are_those_of_the_starting_model(world: World, run: Run) -> None:
    outcome = world.run("drift", "run", "--problems", "3", "--out", "own")
    assert outcome.code == 0, outcome.stderr
    responses = pd.read_parquet(world.folder / "own/responses")
    rows = [
        {"prompt": prompt, "token_ids": [int(i) for i in ids]}
        for prompt, ids in zip(responses["prompt_text"], responses["token_ids"], strict=True)
    ]
    write_lines(world.folder / "written.jsonl", rows)
    argv = ("model", "--responses", "written.jsonl", "runtime.device=cpu", "--out", "base")
    assert world.run("analyze", *argv).code == 0
    mine = pd.read_parquet(world.folder / "base/tokens")["entropy"]
    assert mine.tolist() == pytest.approx(
        pd.read_parquet(world.folder / "own/entropies/0")["entropy"].tolist(), abs=1e-5
    )


READY: dict[str, list[dict[str, Any]]] = {
    "empty.jsonl": [{"prompt": "1+1=", "response": "2"}, {"prompt": "1+1=", "response": ""}],
    "foreign.jsonl": [{"prompt": "1+1=", "response": "1Z3"}],
    "promptless.jsonl": [{"response": "1"}],
    "nothing.jsonl": [{"prompt": "1+"}],
    "ids.jsonl": [{"prompt": "1+", "token_ids": [1, 20]}],
    "long.jsonl": [{"prompt": "1+", "response": "1" * 63}],
    "result.jsonl": [{"prompt": "1+", "response": "1", "correct": "yes"}],
    "score.jsonl": [{"prompt": "1+", "response": "1", "score": 2}],
    "noprompt.jsonl": [{"prompt": "", "response": "1"}],
}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ("--responses", "empty.jsonl"),
            "empty.jsonl line 2: response is empty; remove the row; or leave such rows out",
        ),
        (
            ("--responses", "foreign.jsonl"),
            "foreign.jsonl line 1: the tokenizer does not know 'Z' of the response; use the tokenizer of the model "
            "that wrote it, or give its token_ids",
        ),
        (("--responses", "promptless.jsonl"), "line 1: prompt is missing, not text"),
        (("--responses", "nothing.jsonl"), "line 1: has no response (text) and no token_ids; it has prompt"),
        (("--responses", "ids.jsonl"), "line 1: token_ids is not a list of ids from 0 to 19"),
        (("--responses", "long.jsonl"), "line 1: prompt and response have 65 tokens, the model has 64 positions"),
        (("--responses", "result.jsonl"), "line 1: correct = 'yes' is neither true nor false"),
        (("--responses", "score.jsonl"), "line 1: score = 2 is not a number from 0 to 1"),
        (("--responses", "noprompt.jsonl"), "line 1: no tokens; an empty prompt cannot be continued"),
        (("--responses", "absent.jsonl"), "absent.jsonl: cannot be read (No such file or directory)"),
        (("--responses", "empty.jsonl", "--samples", "2"), "--samples: has no effect along with --responses"),
        (("--responses", "empty.jsonl", "seed=3"), "seed=3: has no effect along with --responses"),
        ((*DATA, "--skip-unusable"), "--skip-unusable: has no effect without --responses"),
        ((*DATA, "--min-count", "0"), "--min-count 0: must be at least 1"),
        ((*DATA, "--threshold", "-1"), "--threshold -1: must be at least 0 (entropy in nats)"),
        ((*DATA, "training.steps=3"), "training.steps=3: has no effect on an analysis"),
        ((*DATA, "--out", "prompts.jsonl"), "prompts.jsonl: is a file; name another folder with --out"),
        ((*DATA, "--out", "model"), "model: is not empty (it holds config.json) and has no settings.json"),
    ],
)
def test_bad_input_is_refused_in_a_line(world: World, argv: tuple[str, ...], says: str) -> None:
    for name, rows in READY.items():
        write_lines(world.folder / name, rows)
    out = () if "--out" in argv else ("--out", "refused")
    outcome = world.run("analyze", "model", *argv, "runtime.device=cpu", *out)
    assert outcome.code == 2, outcome
    assert says in outcome.line


def test_a_file_of_another_format_is_refused_with_its_first_lines(world: World) -> None:
    outcome = world.run("analyze", "model", "--responses", "recipe.toml", "--out", "refused")
    assert outcome.code == 2, outcome
    first, *lines = outcome.stderr.splitlines()
    assert "rows cannot be used; fix them, or leave such rows out with --skip-unusable" in first
    assert "recipe.toml line 1 is not JSON" in lines[0]
    assert len(lines) == 11 and "more" in lines[-1]


def test_unusable_rows_are_left_out_and_counted_on_request(own_world: World) -> None:
    write_lines(own_world.folder / "empty.jsonl", READY["empty.jsonl"])
    facts = analyzed(own_world, "model", "--responses", "empty.jsonl", "--skip-unusable", "runtime.device=cpu")
    assert facts["responses"] == 1
    assert "1 rows of empty.jsonl could not be used and are left out; empty.jsonl line 2" in facts["stdout"]


def test_another_question_in_the_same_folder_is_refused(own_world: World) -> None:
    analyzed(own_world, "model", *DATA, *SHORT, "--problems", "2")
    outcome = own_world.run("analyze", "model", *DATA, *SHORT, "--problems", "2", "--samples", "3", "--out", "found")
    assert outcome.code == 2
    assert "found: was created with different settings (samples = 1, now 3)" in outcome.line


ASKED = (*DATA, *SHORT, "--problems", "2")
ASKED_READY = ("--responses", "ready.jsonl", "runtime.device=cpu")


@pytest.fixture(scope="module")
def answered(world: World) -> None:
    """``asked``: an analysis of generated responses, and ``asked-ready``: one of ready ones."""
    write_lines(world.folder / "ready.jsonl", [{"prompt": "1+1=", "response": "13"}])
    write_lines(world.folder / "other-ready.jsonl", [{"prompt": "1+1=", "response": "31"}])
    write_prompts(world.folder / "other.jsonl", [{"prompt": f"{n}*2=", "answer": "24680"} for n in range(8)])
    for argv in (("model", *ASKED, "--out", "asked"), ("model", *ASKED_READY, "--out", "asked-ready")):
        outcome = world.run("analyze", *argv)
        assert outcome.code == 0, outcome.stderr


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        (("model.precision=bf16",), "precision"),
        (('rollout.stop=["a"]',), "stop"),
        (("seed=1",), "seed"),
        (("rollout.max_response_tokens=9",), "max_response_tokens"),
        (("--temperature", "0.5"), "temperature"),
        (("--samples", "2"), "samples"),
        (("--problems", "3"), "prompts"),
        (("--data", "other.jsonl"), "data"),
    ],
)
def test_whatever_changes_the_tokens_is_another_question(
    world: World, answered: None, changed: tuple[str, ...], key: str
) -> None:
    outcome = world.run("analyze", "model", *ASKED, *changed, "--out", "asked")
    assert outcome.code == 2, outcome
    assert f"asked: was created with different settings ({key} = " in outcome.line


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        (("model.precision=bf16",), "precision"),
        (("--temperature", "0.5"), "temperature"),
        (("--responses", "other-ready.jsonl"), "data"),
    ],
)
def test_so_it_is_of_ready_responses(world: World, answered: None, changed: tuple[str, ...], key: str) -> None:
    outcome = world.run("analyze", "model", *ASKED_READY, *changed, "--out", "asked-ready")
    assert outcome.code == 2, outcome
    assert f"asked-ready: was created with different settings ({key} = " in outcome.line


@pytest.mark.parametrize(("argv", "out"), [(ASKED, "asked"), (ASKED_READY, "asked-ready")], ids=["asked", "ready"])
def test_so_it_is_where_the_weights_have_changed(own_world: World, argv: tuple[str, ...], out: str) -> None:
    write_lines(own_world.folder / "ready.jsonl", [{"prompt": "1+1=", "response": "13"}])
    assert own_world.run("analyze", "model", *argv, "--out", out).code == 0
    make_model(own_world.folder / "model", initializer_range=0.3)
    outcome = own_world.run("analyze", "model", *argv, "--out", out)
    assert outcome.code == 2, outcome
    assert f"{out}: was created with different settings (fingerprint = " in outcome.line


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("model",), "model: is not a run folder; name a run, or two models at least"),
        (("seed=3",), "name a run, or two models at least"),
        (("model", "model", *DATA, *SHORT), "model: is named twice"),
        (("./model", "model/", *DATA, *SHORT), "model/: is named twice"),
        (("run", "--ratio", "0"), "--ratio 0: must be above 0 and at most 1"),
        (("run", "--bins", "0"), "--bins 0: must be at least 1"),
        (
            ("run", "--problems", "1", "--bins", "99"),
            "tokens are fewer than the 99 percentile ranges; take more responses",
        ),
        (("foreign", "model", *DATA, *SHORT), "foreign: another vocabulary than that of model (21 tokens against 20"),
    ],
)
def test_bad_drifts_are_refused_in_a_line(world: World, run: Run, argv: tuple[str, ...], says: str) -> None:
    make_model(world.folder / "foreign")
    tokenizer = json.loads((world.folder / "foreign/tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["Z"] = 20
    (world.folder / "foreign/tokenizer.json").write_text(json.dumps(tokenizer))
    outcome = world.run("drift", *argv, "--out", f"refused-drift-{len(says)}")
    assert outcome.code == 2, outcome
    assert says in outcome.line


def test_another_model_at_the_same_path_is_another_question(own_world: World) -> None:
    from safetensors.torch import load_file, save_file

    analyzed(own_world, "model", *DATA, *SHORT, "--problems", "2")
    path = own_world.folder / "model/model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.self_attn.q_proj.weight"] += 0.01
    save_file(weights, path, {"format": "pt"})
    outcome = own_world.run("analyze", "model", *DATA, *SHORT, "--problems", "2", "--out", "found")
    assert outcome.code == 2
    assert "different settings (fingerprint = " in outcome.line


def test_other_prompt_ids_are_another_question(own_world: World) -> None:
    path = own_world.folder / "ready.jsonl"
    write_lines(path, [{"prompt": "1+", "response": "1", "prompt_id": name} for name in ("a", "a")])
    analyzed(own_world, "model", "--responses", "ready.jsonl", "runtime.device=cpu")
    write_lines(path, [{"prompt": "1+", "response": "1", "prompt_id": name} for name in ("a", "b")])
    outcome = own_world.run("analyze", "model", "--responses", "ready.jsonl", "runtime.device=cpu", "--out", "found")
    assert outcome.code == 2
    assert "different settings (data = " in outcome.line


@pytest.mark.parametrize("table", ["tokens", "responses"])
def test_a_damaged_part_is_named_and_a_missing_one_made_anew(own_world: World, table: str) -> None:
    command = ("model", *DATA, *SHORT, *SMALL, "--samples", "2")
    whole = analyzed(own_world, *command)
    part = own_world.folder / f"found/{table}/part-00003.parquet"
    kept = part.read_bytes()
    part.write_bytes(kept[:-20])
    outcome = own_world.run("analyze", *command, "--out", "found")
    assert outcome.code == 2
    assert f"found/{table}/part-00003.parquet: cannot be read" in outcome.stderr.splitlines()[-1]
    part.unlink()
    assert analyzed(own_world, *command)["percentile_80"] == whole["percentile_80"]
    assert part.read_bytes() == kept


def test_drift_of_a_model_and_a_run_and_of_folders_named_like_settings(world: World, run: Run) -> None:
    make_model(world.folder / "lr=1e-3", num_hidden_layers=1)
    argv = ("drift", "lr=1e-3", "run", "--problems", "2", "--out", "mixed", "--bins", "2")
    outcome = world.run(*argv)
    assert outcome.code == 0, outcome.stderr
    assert json.loads((world.folder / "mixed/results.json").read_text())["facts"]["checkpoints"] == ["lr=1e-3", "run"]


def test_drift_finds_a_checkpoint_under_the_name_a_kill_left_it(own_world: World) -> None:
    run = own_world.trained("run", "training.steps=2", "checkpoint.every=1", "checkpoint.keep=9")
    (run.folder / "checkpoints/step-2").rename(run.folder / "checkpoints/.replaced-step-2")
    outcome = own_world.run("drift", "run", "--problems", "2", "--out", "found", "--bins", "2")
    assert outcome.code == 0, outcome.stderr
    facts = json.loads((own_world.folder / "found/results.json").read_text())["facts"]
    assert facts["checkpoints"] == ["step 0", "step 1", "step 2"]


@pytest.mark.parametrize(("given", "measured"), [("0.5", 0.5), ("0", 1.0)])
def test_the_temperature_of_entropies_is_stated(own_world: World, given: str, measured: float) -> None:
    facts = analyzed(own_world, "model", *DATA, *SHORT, "--problems", "2", "--temperature", given)
    page = (own_world.folder / "found/report.html").read_text()
    assert facts["temperature"] == measured
    assert "the paper's Qwen3-8B at temperature 1: 50.64%" in facts["stdout"]
    for text in (facts["stdout"], page):
        assert f"At temperature {measured:g}, " in text
        assert ("compare figures with those of the paper only at --temperature 1" in " ".join(text.split())) == (
            measured != 1
        )
