"""What a temperature sweep keeps of a response."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from forkrl.analysis.temperatures import UNSCALED
from forkrl.commands.sweep_responses import read_figures, write_setting
from forkrl.types import Prompt, Rollout, RolloutGroup, VerifierResult
from tests.smoke.world import make_tokenizer

STOP = 1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    made: PreTrainedTokenizerBase = make_tokenizer()
    return made


@pytest.mark.parametrize(
    ("ids", "finished", "loop"),
    [
        ((5,) * 32 + (STOP,), True, True),  # the closing stop token is no part of what repeats
        ((5,) * 32, False, True),  # a response that was cut has none: all of its tokens count
        ((5,) * 31 + (STOP,), True, False),
        ((5,) * 31, False, False),
        ((5,) * 32 + (6,), False, False),
    ],
)
def test_a_closing_stop_token_is_left_out_of_a_loop(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, ids: tuple[int, ...], finished: bool, loop: bool
) -> None:
    rollout = Rollout((2,), ids, torch.zeros(len(ids)), torch.zeros(len(ids)), "3" * len(ids), finished)
    group = RolloutGroup(Prompt("p", "0", ""), (rollout,), (VerifierResult(1.0),))
    write_setting(tmp_path / "responses", UNSCALED, [group], 0.5, tokenizer)
    row = read_figures(tmp_path / "responses", [UNSCALED]).iloc[0]
    assert (row["loop"], row["cut"], row["length"]) == (loop, not finished, len(ids))
