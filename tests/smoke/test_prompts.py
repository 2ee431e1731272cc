"""Every command reads a prompt as the same ids, and none reads characters that the tokenizer does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.models import with_bos
from tests.smoke.world import World, make_tokenizer, write_prompts

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
ADD_BOS = "<pad>"
NOTICE = "prompts already start with '<pad>', which the tokenizer adds as well; it is added once"
SHORT = ("training.steps=2", "eval.every=0", "rollout.max_prompt_tokens=9")
ANALYSIS = ("--samples", "1", "--problems", "4")


def give_bos(world: World, chat_template: str) -> None:
    tokenizer = with_bos(make_tokenizer())
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(world.folder / "model")


def prompt_ids(folder: Path) -> dict[str, list[int]]:
    """Of each prompt its ids, as an analysis wrote them."""
    table = pd.read_parquet(folder / "responses")
    return {row.prompt_text: list(row.prompt_token_ids) for row in table.itertuples()}


def write_responses(world: World, out: str) -> None:
    """The rollouts of a run, as rows of ready responses."""
    files = sorted((world.folder / out / "rollouts").glob("*.parquet"))
    rows = pd.concat([pd.read_parquet(file) for file in files])
    lines = [
        json.dumps({"prompt": row.prompt, "token_ids": [int(token) for token in row.token_ids]})
        for row in rows.itertuples()
    ]
    (world.folder / "responses.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("chat_template", "overrides", "prefix", "num_bos", "noticed"),
    [
        (ADD_BOS + TEMPLATE, ("task.chat_template=true",), "<pad>", 1, False),
        (TEMPLATE, ("task.chat_template=true",), "", 0, False),
        (TEMPLATE, (), "", 1, False),
        (TEMPLATE, ("task.template=<pad>{prompt}",), "<pad>", 1, True),
    ],
    ids=["chat template with BOS", "chat template without BOS", "plain", "already rendered"],
)
def test_all_commands_read_a_prompt_as_the_same_ids(
    own_world: World, chat_template: str, overrides: tuple[str, ...], prefix: str, num_bos: int, noticed: bool
) -> None:
    give_bos(own_world, chat_template)
    run = own_world.trained("run", *SHORT, *overrides)
    assert run.outcome.stderr.count(NOTICE) == noticed

    outcome = own_world.run("analyze", "run", *ANALYSIS, "--out", "own")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stderr.count(NOTICE) == noticed
    own = prompt_ids(own_world.folder / "own")
    assert len(own) == 4
    for prompt, ids in own.items():
        assert prompt.startswith(prefix) and ids[:num_bos] == [0] * num_bos and 0 not in ids[num_bos:]

    write_responses(own_world, "run")
    given = ("--responses", "responses.jsonl", "runtime.device=cpu", "--out", "ready")
    outcome = own_world.run("analyze", "run", *given)
    assert outcome.code == 0, outcome.stderr
    ready = prompt_ids(own_world.folder / "ready")
    assert own.keys() & ready.keys()
    for prompt in own.keys() & ready.keys():
        assert ready[prompt] == own[prompt]
    assert {tuple(ids[:num_bos]) for ids in ready.values()} == {(0,) * num_bos}
    assert not any(0 in ids[num_bos:] for ids in ready.values())

    outcome = own_world.run("eval", "run", "--problems", "2", "--samples", "1", "--out", "evaluated")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stderr.count(NOTICE) == noticed


def rows_with_unknown_characters() -> list[dict[str, Any]]:
    rows = [{"prompt": f"{left}+{right}=", "answer": "13579"} for left in range(6) for right in range(4)]
    return [*rows, {"prompt": "1é1=", "answer": "1"}, {"prompt": "1ß1=", "answer": "1"}]


def test_unknown_characters_are_rejected_by_every_command(own_world: World) -> None:
    write_prompts(own_world.folder / "prompts.jsonl", rows_with_unknown_characters())
    says = "prompts.jsonl line 26: the tokenizer does not know 'ß'"
    refused = own_world.train("run", *SHORT)
    assert refused.code == 2 and says in refused.stderr and "line 25" in refused.stderr
    assert not (own_world.folder / "run").exists()
    for command in (("eval", "model"), ("analyze", "model"), ("branch", "model"), ("decode-temps", "model")):
        data = ("task.name=dataset", "task.data=prompts.jsonl", "runtime.device=cpu")
        outcome = own_world.run(*command, *data)
        assert outcome.code == 2 and says in outcome.stderr, outcome.stderr
    skipped = own_world.train("skipped", *SHORT, "task.skip_bad_rows=true")
    assert skipped.code == 0 and "prompts.jsonl: left out 2 of 26 rows" in skipped.stderr
    allowed = own_world.train("allowed", *SHORT, "task.allow_unknown_tokens=true")
    assert allowed.code == 0, allowed.stderr


def test_unknown_characters_of_ready_responses_are_not_measured(own_world: World) -> None:
    rows = [
        {"prompt": "1é1=", "response": "2"},
        {"prompt": "1+1=", "response": "2é"},
        {"prompt": "1=", "response": "1"},
    ]
    (own_world.folder / "ready.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    given = ("analyze", "model", "--responses", "ready.jsonl", "runtime.device=cpu", "--min-count", "1")
    outcome = own_world.run(*given)
    assert outcome.code == 2 and "ready.jsonl: 2 of 3 rows cannot be used" in outcome.stderr
    assert "line 1: the tokenizer does not know 'é' and would" in outcome.stderr
    assert "line 2: the tokenizer does not know 'é' of the response" in outcome.stderr
    outcome = own_world.run(*given, "--skip-unusable", "task.allow_unknown_tokens=true", "--out", "found")
    assert outcome.code == 0, outcome.stderr
    assert len(pd.read_parquet(own_world.folder / "found/responses")) == 2


def test_duplicates_and_too_few_prompts_are_said_at_the_start(own_world: World) -> None:
    rows = [{"prompt": f"{number}+1=", "answer": "13579"} for number in range(10)]
    twice = [{"prompt": f"{number}+1= ", "answer": "13579"} for number in range(10)]
    write_prompts(own_world.folder / "prompts.jsonl", rows + twice)
    outcome = own_world.train("run", *SHORT, "task.held_out_rows=7")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stderr.count("prompts.jsonl: dropped 10 of 20 rows as duplicates") == 1
    assert (
        outcome.stderr.count("rollout.prompts_per_step = 4 takes 4 prompts at a time from the task, which has 3") == 1
    )
    outcome = own_world.run("eval", "model", "task.name=dataset", "task.data=prompts.jsonl", "--problems", "1",
                            "task.verifier=first_character:first_character", "runtime.device=cpu")  # fmt: skip
    assert outcome.code == 0 and "dropped 10 of 20 rows as duplicates" in outcome.stderr
