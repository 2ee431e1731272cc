"""A mix of Countdown, a file and a generator of reasoning-gym, through the real command line: trained, killed, taken up
again, evaluated."""

from __future__ import annotations

import re
import signal
import tomllib
from pathlib import Path

import pytest

from forkrl.store.results import read_results
from tests.smoke.world import ALPHABET, Launcher, Run, World, copy_world, make_model

PARTS = ("countdown", "gcd", "prompts")
TASK = """\
[task]
name = "mix"

[[task.parts]]
name = "countdown"
allow_unknown_tokens = true

[[task.parts]]
name = "reasoning-gym"
generator = "gcd"
weight = 2
instruction = ""
allow_unknown_tokens = true
held_out_rows = 8
train_prompts = 6

[task.parts.curriculum]
promote_above = 0.01
window = 2
max_level = 2

[[task.parts]]
name = "dataset"
data = "prompts.jsonl"
held_out_rows = 8
verifier = "first_character:first_character"
"""

CHANGES = {
    "max_prompt_tokens = 8": "max_prompt_tokens = 200",
    "micro_batch_tokens = 20": "micro_batch_tokens = 512",
    "problems = 8": "problems = 12",
    "steps = 6": "steps = 4",
    "group_size = 8": "group_size = 16",
}


def make_reader(folder: Path) -> None:
    """A model that reads any text, and writes an answer to reasoning-gym with one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    answers = [f"<answer>{digit}</answer>" for digit in range(1, 10)]
    words = ("<pad>", "<eos>", *ALPHABET, *answers)
    make_model(folder, vocab_size=len(words), max_position_embeddings=512)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def mixed(launcher: Launcher, template: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    world = copy_world(template, tmp_path_factory.mktemp("mixed"), launcher)
    make_reader(world.folder / "model")
    before, _, after = (world.folder / "recipe.toml").read_text().partition("[task]")
    recipe = before + TASK + "\n[rollout]" + after.partition("[rollout]")[2]
    for old, new in CHANGES.items():
        assert old in recipe
        recipe = recipe.replace(old, new)
    (world.folder / "recipe.toml").write_text(recipe)
    return world


@pytest.fixture(scope="module")
def whole(mixed: World) -> Run:
    return mixed.trained("whole")


def test_every_part_has_its_metrics(whole: Run) -> None:
    steps = [row for row in whole.metrics if "reward/accuracy" in row]
    assert len(steps) == 4
    drawn = {part: sum(row.get(f"sampling/groups/{part}", 0) for row in steps) for part in PARTS}
    total = sum(drawn.values())
    assert abs(drawn["gcd"] - total / 2) <= 1 and abs(drawn["prompts"] - total / 4) <= 1
    for row in steps:
        sampled = [part for part in PARTS if f"sampling/groups/{part}" in row]
        groups = {part: row[f"sampling/groups/{part}"] for part in sampled}
        mean = sum(row[f"reward/accuracy/{part}"] * groups[part] for part in sampled) / sum(groups.values())
        assert mean == pytest.approx(row["reward/accuracy"])
    assert any(row.get("reward/accuracy/gcd", 0) > 0 for row in steps), "no verifier of reasoning-gym ever paid"
    assert any(row.get("reward/accuracy/prompts", 0) > 0 for row in steps), "no verifier of the file ever paid"
    assert all(row["verifier/failures"] == 0 for row in steps)


def test_metrics_of_parts_have_every_documented_name_and_no_other(whole: Run) -> None:
    text = (Path(__file__).parents[2] / "docs/run-folder.md").read_text()
    documented = set(re.findall(r"`([a-z_/]+)/PART`", text))
    written = {name for row in whole.metrics for name in row if name.endswith(("/gcd", "/countdown", "/prompts"))}
    assert {name.rpartition("/")[0] for name in written} == documented


def test_the_level_rises(whole: Run) -> None:
    levels = whole.column("task/level/gcd")
    assert levels == sorted(levels)
    assert levels[-1] > 0


def test_held_out_prompts_are_a_mix_too(whole: Run) -> None:
    for row in (row for row in whole.metrics if "eval/accuracy" in row):
        assert {part: row[f"eval/problems/{part}"] for part in PARTS} == {"countdown": 3, "gcd": 6, "prompts": 3}
        for part in PARTS:
            assert row[f"eval/accuracy_low/{part}"] <= row[f"eval/accuracy/{part}"] <= row[f"eval/accuracy_high/{part}"]


@pytest.mark.parametrize(
    ("point", "count", "signum"),
    [("optimizer", 5, signal.SIGKILL), ("reward", 3, signal.SIGTERM)],
)
def test_killed_and_taken_up_again(mixed: World, whole: Run, point: str, count: int, signum: signal.Signals) -> None:
    out = f"killed-{point}"
    fault = {"point": point, "count": count, "signal": signum}
    outcome = mixed.train(out, faults=[fault], without_report=True)
    assert outcome.code == {signal.SIGKILL: -9, signal.SIGTERM: 143}[signum], outcome
    assert mixed.resumed(out).bits() == whole.bits()


def test_the_run_is_evaluated_by_part(mixed: World, whole: Run) -> None:
    assert whole.folder.name == "whole"
    outcome = mixed.run("eval", "whole", "--out", "evaluated", without_report=True)
    assert outcome.code == 0, outcome.stderr
    parts = read_results(mixed.folder / "evaluated").tables["benchmarks"]
    assert dict(zip(parts["benchmark"], parts["questions"], strict=True)) == {"countdown": 3, "gcd": 6, "prompts": 3}
    assert (parts["accuracy_low"] <= parts["accuracy"]).all() and (parts["accuracy"] <= parts["accuracy_high"]).all()
    assert not parts.filter(like="failed_").any(axis=None)


def test_the_recipe_of_the_run_is_its_own(whole: Run) -> None:
    stored = tomllib.loads((whole.folder / "config.toml").read_text())
    assert [part["name"] for part in stored["task"]["parts"]] == ["countdown", "reasoning-gym", "dataset"]


def test_a_mistake_in_a_part_is_one_line_and_leaves_nothing_behind(mixed: World) -> None:
    recipe = (mixed.folder / "recipe.toml").read_text()
    (mixed.folder / "wrong.toml").write_text(recipe.replace('generator = "gcd"', 'generator = "gdc"'))
    outcome = mixed.run("train", "wrong.toml", "--out", "wrong")
    assert outcome.code == 2
    assert 'part gdc of task.parts: task.generator = "gdc" is not a generator of reasoning-gym' in outcome.line
    assert not (mixed.folder / "wrong").exists()
