"""``forkrl preview``: what is wrong with the data is said, and the questions it keeps can be trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.benchmark_mirror import make_mirror
from tests.models import with_bos
from tests.smoke.world import Outcome, World, make_tokenizer, write_prompts

ODD = "13579"
QUESTIONS: list[dict[str, Any]] = [
    {"prompt": f"{left}+{right}=", "answer": ODD, "more": left} for left in range(6) for right in range(4)
]
KEEP = ("preview", "recipe.toml", "--prompts", "0", "--samples", "4", "rollout.max_sequences=8")


def described(outcome: Outcome) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(outcome.stdout)
    return found


def kept_rows(world: World, folder: str = "previews/recipe") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (world.folder / folder / "kept.jsonl").read_text().splitlines()]


def test_prompts_responses_and_scores_are_shown(own_world: World) -> None:
    outcome = own_world.run("preview", "recipe.toml", "--token-ids", "--samples", "4")
    assert outcome.code == 0, outcome.stderr
    text = outcome.stdout
    assert "16 training and 8 held-out questions" in text
    assert "24 of 24 get full reward from their verifier" in text
    assert "Responses are sampled as in training: temperature 1, at most 6 tokens." in text
    assert text.count("of 4 responses") == 3 and text.count("response 1:") + text.count("response 2:") >= 3
    assert "⟨response⟩" in text and f"gold answer: '{ODD}'" in text and "highest entropies: " in text
    found = described(own_world.run("preview", "recipe.toml", "--json", "--prompts", "1", "--samples", "4"))
    (prompt,) = found["prompts"]
    assert f"({prompt['place']}): {len(prompt['token_ids'])} tokens" in text
    assert "  ".join(f"{id} {token!r}" for id, token in zip(prompt["token_ids"], prompt["tokens"], strict=True)) in text
    assert len(prompt["responses"]) == 4
    for response in prompt["responses"]:
        assert len(response["tokens"]) == len(response["entropy"]) == len(response["token_ids"])
        assert response["score"] == (response["text"][:1] in tuple(ODD))
    # The first step trains on the prompts that were shown.
    own_world.trained(
        "run", "training.steps=1", "eval.every=0", "dynamic_sampling.enabled=false", "log.rollouts_every=1",
        "log.rollouts_sampled=32",
    )  # fmt: skip
    rollouts = pd.read_parquet(own_world.folder / "run/rollouts/train-000001.parquet")
    assert prompt["text"] in set(rollouts["prompt"])


def test_tokens_that_the_tokenizer_adds_are_shown(own_world: World) -> None:
    with_bos(make_tokenizer()).save_pretrained(own_world.folder / "model")
    for template in ("{prompt}", "<pad>{prompt}"):  # BOS is added once
        found = described(
            own_world.run("preview", "recipe.toml", f"task.template={template}", "--json", "--no-samples")
        )
        assert all(
            prompt["text"].startswith("<pad>") and prompt["text"].count("<pad>") == prompt["token_ids"].count(0) == 1
            for prompt in found["prompts"]
        )


def test_what_is_wrong_with_the_data_is_listed(own_world: World) -> None:
    wrong = [
        {"prompt": "0+0=", "answer": ODD},  # dropped
        {"prompt": "0+0= ", "answer": "7"},  # the same question with another answer
        {"prompt": "1 + 1 =", "answer": ODD},  # of a benchmark
        {"prompt": "2+9=", "answer": "ab"},  # not a number
        {"prompt": "12345+1=", "answer": "7"},
    ]
    write_prompts(own_world.folder / "prompts.jsonl", QUESTIONS + wrong)
    write_prompts(
        own_world.folder / "test.jsonl", [{"prompt": "5+3=", "answer": ODD}, {"prompt": " 5+2=", "answer": "1"}]
    )
    make_mirror(own_world.folder / "mirror")
    command = (
        "preview", "recipe.toml", "--mirror", "mirror", "task.held_out_data=test.jsonl",
        "task.answer_format=last_number", "rollout.max_prompt_tokens=7",
    )  # fmt: skip
    outcome = own_world.run(*command, "--no-samples")
    assert outcome.code == 2
    assert "forkrl: 1 of 29 gold answers get no full reward from their own verifier, the first at " in outcome.stderr
    assert "prompts.jsonl line 28 ('ab'); correct or remove them" in outcome.stderr
    assert (
        "1 prompts have more than rollout.max_prompt_tokens = 7 tokens, the first at prompts.jsonl line 29"
        in outcome.stderr
    )
    text = outcome.stdout
    assert "28 of 29 get full reward" in text and "prompts.jsonl line 28: 'ab' scores 0" in text
    assert "1 dropped; 1 not dropped" in text and "prompts.jsonl line 1 and prompts.jsonl line 26" in text
    assert "1 of training dropped, because held out; 1 not dropped" in text
    assert "prompts.jsonl line 23 and test.jsonl line 2" in text
    assert "questions of aime25 are in the data; no questions of aime24, amc23" in text
    assert "aime25: 1 in training, 0 held out, the first: prompts.jsonl line 27" in text
    assert "response 1" not in text
    found = described(own_world.run(*command, "--json"))  # a run would reject the long prompt: nothing is sampled
    assert [each["place"] for each in found["golds"]["failed"]] == ["prompts.jsonl line 28"]
    assert found["prompt_tokens"] == {
        "lengths": {"min": 4, "median": 4, "95%": 7, "max": 8},
        "limit": 7, "over": 1, "first_over": ["prompts.jsonl line 29"],
    }  # fmt: skip
    assert not any(prompt["responses"] for prompt in found["prompts"])


def test_the_kept_questions_are_a_data_file_of_the_same_recipe(own_world: World) -> None:
    write_prompts(own_world.folder / "prompts.jsonl", QUESTIONS)
    outcome = own_world.run(*KEEP, "--keep-pass-rate", "0.25..0.75", "--json")
    assert outcome.code == 0, outcome.stderr
    rates = described(outcome)["pass_rates"]
    assert len(rates["prompts"]) == 16 and sum(rates["bins"].values()) == 16
    passing = {rate["place"] for rate in rates["prompts"] if 1 <= rate["passed"] <= 3}
    assert 0 < len(passing) < 16 and rates["kept"]["questions"] == len(passing)
    rows = kept_rows(own_world)
    assert len(rows) == rates["kept"]["rows"] == len(passing) + 8 and all(row in QUESTIONS for row in rows)
    places = {f"prompts.jsonl line {QUESTIONS.index(row) + 1}" for row in rows}
    assert passing <= places
    # The file gives the recipe the kept questions to train on, and the same held-out ones.
    before = described(own_world.run("preview", "recipe.toml", "--json", "--no-samples", "--prompts", "100"))
    after = described(
        own_world.run(
            "preview", "recipe.toml", *rates["kept"]["overrides"], "--json", "--no-samples", "--prompts", "100"
        )
    )
    assert after["held_out"] == 8
    ids = {prompt["place"]: prompt["id"] for prompt in before["prompts"]}
    assert {prompt["id"] for prompt in after["prompts"]} == {ids[place] for place in passing}
    own_world.trained("run", *rates["kept"]["overrides"], "training.steps=1", "eval.every=0")
    # Another interval needs no new responses; one that keeps nothing leaves no file.
    again = own_world.run(*KEEP, "--keep-pass-rate", "0..1", faults=[{"point": "reward", "count": 1, "signal": 9}])
    assert again.code == 0, again.stderr
    assert len(kept_rows(own_world)) == 24
    assert (
        "train on them: forkrl train recipe.toml rollout.max_sequences=8 task.data=previews/recipe/kept.jsonl"
        in again.stdout
    )
    other = own_world.run(*KEEP, "--keep-pass-rate", "0..1", "rollout.temperature=2")
    assert other.code == 2 and "previews/recipe: was created with different settings (rollout = " in other.stderr


def test_an_interruption_changes_no_pass_rate(own_world: World) -> None:
    command = (*KEEP, "--keep-pass-rate", "0.25..1", "--out")
    whole = own_world.run(*command, "whole")
    assert whole.code == 0, whole.stderr
    killed = own_world.run(*command, "killed", faults=[{"point": "reward", "count": 4, "signal": 9}])
    assert killed.code == -9
    finished = own_world.run(*command, "killed")
    assert finished.code == 0 and "forkrl: 3 of 8 parts are in killed already" in finished.stderr
    assert finished.stdout.replace("killed", "whole") == whole.stdout
    assert kept_rows(own_world, "killed") == kept_rows(own_world, "whole")


def test_few_shot_examples_stay_the_same(own_world: World) -> None:
    shown = (
        "task.few_shot=2", "task.question_seed=3", "rollout.max_prompt_tokens=40", "task.answer_format=last_number",
        "task.allow_unknown_tokens=true", "training.micro_batch_tokens=64",
    )  # fmt: skip
    outcome = own_world.run(*KEEP, *shown, "--keep-pass-rate", "0.25..1", "--json")
    assert outcome.code == 0, outcome.stderr
    found = described(outcome)
    assert found["examples"] == 2
    kept = found["pass_rates"]["kept"]
    assert kept["rows"] == kept["questions"] + 8 + 2
    command = ("preview", "recipe.toml", *shown, "--json", "--no-samples", "--prompts", "1")
    before, after = (described(own_world.run(*command, *more)) for more in ((), kept["overrides"]))
    start = before["prompts"][0]["text"].rpartition("\n")[0]
    assert start and after["prompts"][0]["text"].startswith(start)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("recipe.toml", "task.name=countdown", "task.data=", "task.held_out_rows=256",
          "task.verifier=", "--keep-pass-rate", "0..1"), "filters a data set"),
        (("recipe.toml", "--keep-pass-rate", "0.9"), "--keep-pass-rate 0.9: is not LOW..HIGH"),
        (("recipe.toml", "--keep-pass-rate", "0.9..0.1"), "--keep-pass-rate 0.9..0.1: is not LOW..HIGH"),
        (("recipe.toml", "--no-samples", "--pass-rate-prompts", "4"), "--no-samples: a pass rate needs responses"),
        (("recipe.toml", "--out", "x"), "--out x: is for --pass-rate-prompts and --keep-pass-rate"),
        (("recipe.toml", "--pass-rate-prompts", "4", "--out", "model"), "model: is not empty"),
        (("recipe.toml", "--mirror", "mirrors"), "--mirror mirrors: there is no such folder"),
        (("missing.toml",), "missing.toml"),
        (("recipe.toml", "model.path=missing"), "missing"),
        ((), "missing argument 'RECIPE'"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_one_line(world: World, argv: tuple[str, ...], says: str) -> None:
    outcome = world.run("preview", *argv)
    assert outcome.code == 2 and says in outcome.line


def test_no_prompt_with_such_a_pass_rate(own_world: World) -> None:
    nobody = ("task.verifier=first_character:nobody", "task.answer_format=last_number")
    outcome = own_world.run(*KEEP, *nobody, "--keep-pass-rate", "0.5..1")
    assert outcome.code == 2 and "none of the 16 prompts has such a pass rate" in outcome.stderr
    assert "16 prompts have responses of equal scores" in outcome.stdout
    kept = own_world.folder / "previews/recipe/kept.jsonl"
    kept.write_text("of another interval")
    again = own_world.run(*KEEP, *nobody, "--keep-pass-rate", "0.5..1", "--json")
    found = described(again)
    assert again.code == 2 and found["pass_rates"]["kept"] is None and not kept.exists()
    assert len(found["pass_rates"]["prompts"]) == 16
    assert any("0.5..1: none of the 16 prompts" in problem for problem in found["problems"])


def test_the_embedded_model(own_world: World) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "countdown.toml"
    few = ("--prompts", "1", "--samples", "2", "rollout.max_response_tokens=40", "runtime.device=cpu")
    outcome = own_world.run("preview", recipe, *few, "--pass-rate-prompts", "4")
    assert outcome.code == 0, outcome.stderr
    assert "888 training and 1,000 held-out questions" in outcome.stdout
    assert "1,888 of 1,888 get full reward from their verifier" in outcome.stdout
    assert "Pass rates of 4 training prompts, 2 responses each" in outcome.stdout
    assert "benchmarks" not in outcome.stdout  # its questions are generated
