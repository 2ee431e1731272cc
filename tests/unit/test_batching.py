"""From rollouts to tensors: every position speaks of the prediction it makes, and cutting loses nothing."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forkrl.config import TrainConfig
from forkrl.method.batches import (
    assemble,
    collate,
    cut_micro_batches,
    make_micro_batches,
    mini_batches,
    sample_positions,
)
from forkrl.types import Prompt, Rollout, RolloutGroup, TokenBatch

PAD = 99


def rollout(prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]) -> Rollout:
    values = torch.arange(1, len(response_ids) + 1, dtype=torch.float32)
    return Rollout(prompt_ids, response_ids, -values, values / 10, "", True)


def batch_of(lengths: list[int]) -> TokenBatch:
    groups = [
        RolloutGroup(Prompt(str(index), "", ""), (rollout((1, 2), tuple(range(10, 10 + length))),))
        for index, length in enumerate(lengths)
    ]
    return collate(groups, torch.arange(len(lengths), dtype=torch.float32)[:, None], PAD)


def test_positions_predict_the_token_after_them() -> None:
    groups = [
        RolloutGroup(Prompt("a", "", ""), (rollout((1, 2, 3), (4, 5)), rollout((1, 2, 3), (6,)))),
        RolloutGroup(Prompt("b", "", ""), (rollout((7,), (8, 9)), rollout((7,), (8, 9)))),
    ]
    batch = collate(groups, torch.tensor([[1.0, -1.0], [0.5, -0.5]]), PAD)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [1, 2, 3, PAD], [7, 8, PAD, PAD], [7, 8, PAD, PAD]]
    assert batch.targets.tolist() == [[2, 3, 4, 5], [2, 3, 6, PAD], [8, 9, PAD, PAD], [8, 9, PAD, PAD]]
    assert batch.response_mask.dtype == batch.attention_mask.dtype == torch.bool
    assert batch.response_mask.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert batch.old_logprobs.tolist() == [[0, 0, -1, -2], [0, 0, -1, 0], [-1, -2, 0, 0], [-1, -2, 0, 0]]
    torch.testing.assert_close(batch.rollout_entropy[0], torch.tensor([0, 0, 0.1, 0.2]))
    assert batch.advantages.tolist() == [1.0, -1.0, 0.5, -0.5]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), max_tokens=st.integers(1, 200))
def test_a_cut_holds_every_sequence_once_within_the_budget(lengths: list[int], max_tokens: int) -> None:
    batch = batch_of(lengths)
    cuts = cut_micro_batches(batch, max_tokens, packed=False)
    assert sorted(row for cut in cuts for row in cut.tolist()) == list(range(len(lengths)))
    for cut in cuts:
        micro = batch.rows(cut)
        assert len(cut) == 1 or micro.input_ids.numel() <= max_tokens
        assert micro.num_response_tokens == sum(lengths[row] for row in cut.tolist())


def test_sorting_by_length_keeps_padding_small() -> None:
    lengths = [40, 1] * 32
    padded = sum(
        batch_of(lengths).rows(cut).input_ids.numel() for cut in cut_micro_batches(batch_of(lengths), 400, packed=False)
    )
    assert padded < 1.2 * (sum(lengths) + len(lengths))


def test_mini_batches_keep_the_order_and_the_rest() -> None:
    parts = mini_batches(batch_of([3, 9, 2, 4, 5]), 2)
    assert [part.advantages.tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert [part.input_ids.shape[1] for part in parts] == [10, 5, 6]


def test_drawn_positions_follow_their_rows() -> None:
    batch = batch_of([3, 9, 2, 4])
    sections = {"training": {"backward": "forks_only"}, "forks_only": {"sampled": 0.5}}
    config = TrainConfig.model_validate(sections)
    drawn, again = (sample_positions(batch, config, torch.Generator().manual_seed(0)) for _ in range(2))
    assert drawn is not None and again is not None and drawn.equal(again)
    assert 0 < drawn.sum() < batch.attention_mask.sum() and not (drawn & ~batch.attention_mask).any()
    cuts = cut_micro_batches(batch, 12, packed=False)
    parts = make_micro_batches(batch, cuts, drawn)
    assert [part.number for part in parts] == list(range(len(cuts))) and len(cuts) > 1
    sampled = [part.sampled_BT for part in parts if part.sampled_BT is not None]
    assert [each.shape for each in sampled] == [part.batch.input_ids.shape for part in parts]
    assert assemble(drawn, cuts, sampled).equal(drawn)
    assert sample_positions(batch, TrainConfig(), torch.Generator()) is None
    assert make_micro_batches(batch, cuts, None)[0].sampled_BT is None
