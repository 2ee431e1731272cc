"""The files that a recipe hands to verl."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from forkrl.cluster.data import read_prompt, read_verifiers, write_prompts, write_verifiers
from forkrl.config import RewardConfig
from forkrl.errors import UserError
from forkrl.types import Prompt, VerifierSpec

PROMPTS = [
    Prompt("q1", "  What is\n1+1? ", "2", place="train.jsonl line 1"),
    Prompt("q2", "你好 \U0001f600\x00", "", source="code", level=3),
]
VERIFIERS = {
    "": VerifierSpec("judges:equal"),
    "code": VerifierSpec("judges:runs", {"seconds": 0.5, "languages": ["python", None]}, timeout_s=90.0),
}


def test_a_prompt_is_one_user_message_with_its_text_and_no_other(tmp_path: Path) -> None:
    write_prompts(tmp_path / "train.parquet", PROMPTS, "mixed")
    rows = pq.read_table(tmp_path / "train.parquet").to_pylist()
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": prompt.text}] for prompt in PROMPTS]


def test_a_row_tells_all_of_its_prompt(tmp_path: Path) -> None:
    write_prompts(tmp_path / "train.parquet", PROMPTS, "mixed")
    first, second = pq.read_table(tmp_path / "train.parquet").to_pylist()
    assert first["data_source"] == "mixed"
    assert second["data_source"] == "code"
    assert first["reward_model"] == {"style": "rule", "ground_truth": "2"}
    assert first["extra_info"] == {
        "index": 0, "id": "q1", "place": "train.jsonl line 1", "source": "", "level": 0, "templated": False,
    }  # fmt: skip
    assert second["extra_info"] == {
        "index": 1, "id": "q2", "place": "", "source": "code", "level": 3, "templated": False,
    }  # fmt: skip
    for row, prompt in zip((first, second), PROMPTS, strict=True):
        assert read_prompt(row | {"raw_prompt": row["prompt"]}) == prompt


def test_no_prompts_are_a_file_too(tmp_path: Path) -> None:
    write_prompts(tmp_path / "held_out.parquet", [], "math")
    assert pq.read_table(tmp_path / "held_out.parquet").num_rows == 0


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    write_prompts(tmp_path / "train.parquet", PROMPTS[:1], "math")
    (tmp_path / ".train.parquet.writing").mkdir()  # where the new one would be begun
    with pytest.raises(UserError, match="train.parquet: cannot be written"):
        write_prompts(tmp_path / "train.parquet", PROMPTS, "math")
    assert pq.read_table(tmp_path / "train.parquet").num_rows == 1


def test_verifiers_are_read_as_they_were_written(tmp_path: Path) -> None:
    reward = RewardConfig(overlong_cache=32, workers=3, timeout_s=1.5, memory_mb=512)
    write_verifiers(tmp_path / "verifiers.json", VERIFIERS, reward, max_response_tokens=128)
    judging = read_verifiers(tmp_path / "verifiers.json")
    assert judging.verifiers == VERIFIERS
    assert judging.reward == reward
    assert judging.max_response_tokens == 128


def test_a_missing_file_of_verifiers_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"forkrl.verifiers = '.*verifiers.json' cannot be read") as caught:
        read_verifiers(tmp_path / "verifiers.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    ["", "[]", "{}", '{"verifiers": {"": 1}, "reward": {}, "max_response_tokens": 1}', '{"verifiers": {}}'],
)
def test_another_file_is_no_file_of_verifiers(tmp_path: Path, damage: str) -> None:
    (tmp_path / "verifiers.json").write_text(damage)
    with pytest.raises(UserError, match="cannot be read"):
        read_verifiers(tmp_path / "verifiers.json")


def test_a_setting_that_a_reward_does_not_have_is_refused(tmp_path: Path) -> None:
    write_verifiers(tmp_path / "verifiers.json", VERIFIERS, RewardConfig(), max_response_tokens=128)
    written = json.loads((tmp_path / "verifiers.json").read_text())
    written["reward"]["patience"] = 3
    (tmp_path / "verifiers.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match="patience"):
        read_verifiers(tmp_path / "verifiers.json")
