"""A packed pass equals a padded one: statistics and gradients, for every family that packs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from forkrl.method.batches import collate, count_tokens, cut_micro_batches
from forkrl.model.forward import compute_token_stats
from forkrl.model.packing import pack, why_not_packed
from forkrl.model.policy import Policy, set_gradient_checkpointing
from forkrl.types import Prompt, Rollout, RolloutGroup, TokenBatch
from tests.families import ANALYSABLE, TRAINABLE, family_policy

PADDED = {"gpt_oss", "gpt_neo", "bloom", "mpt", "falcon", "xglm"}
"""Families whose attention ForkRL cannot replace, or depends on positions in another way than by position ids."""
IN_SOME_VERSIONS = {"gemma2", "nemotron", "gptj", "codegen"}
"""Families that pack with some versions of transformers: gemma2 with 5.10, the others with 5.24."""
GROUPS = [(20, [5, 1, 12, 3]), (3, [30, 9]), (9, [9, 9, 2]), (1, [1, 7]), (12, [4])]
"""Prompt length, and lengths of its responses: longer and shorter than the prompt, of a single token, alone."""


def batch_of(groups: list[tuple[int, list[int]]], vocabulary: int = 16) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, vocabulary, (length,), generator=generator).tolist())

    made = []
    for number, (num_prompt, lengths) in enumerate(groups):
        prompt = (number % vocabulary, *ids(num_prompt - 1))
        rollouts = tuple(
            Rollout(prompt, ids(length), torch.zeros(length), torch.zeros(length), "", True) for length in lengths
        )
        made.append(RolloutGroup(Prompt(str(number), "", ""), rollouts))
    rows = [collate([group], torch.randn(1, len(group.rollouts), generator=generator), 0) for group in made]
    width = max(part.input_ids.shape[1] for part in rows)

    def joined(field: str) -> Tensor:
        parts = [getattr(part, field) for part in rows]
        if parts[0].ndim == 1:
            return torch.cat(parts)
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])

    names = ("input_ids", "targets", "attention_mask", "response_mask", "old_logprobs", "rollout_entropy", "advantages")
    return TokenBatch(*map(joined, names))


def both(policy: Policy, batch: TokenBatch, at_BT: Tensor | None = None) -> list[tuple[Tensor, Tensor, list[Tensor]]]:
    """Log-probs, entropies and gradients of the packed and of the padded pass."""
    weight_BT = torch.randn(batch.input_ids.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for packs in (True, False):
        policy.packs = packs
        policy.model.zero_grad()
        stats = compute_token_stats(policy, batch, temperature=0.8, at_BT=at_BT)
        (stats.logprobs * weight_BT).sum().backward()
        grads = [each.grad for each in policy.model.parameters() if each.grad is not None]
        found.append((stats.logprobs.detach(), stats.entropy.detach(), [each.clone() for each in grads]))
    return found


def require_equal(packed: tuple[Tensor, Tensor, list[Tensor]], padded: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(packed[:2], padded[:2], rtol=0, atol=2e-5)
    assert len(packed[2]) == len(padded[2]) > 5
    for ours, theirs in zip(packed[2], padded[2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("family", sorted(TRAINABLE.keys() - PADDED))
def test_statistics_and_gradients_are_those_of_padded_sequences(family: str) -> None:
    policy = family_policy(family, TRAINABLE[family])
    if family in IN_SOME_VERSIONS and not policy.packs:
        pytest.skip("padded with this version of transformers")
    assert policy.packs, why_not_packed(policy)
    batch = batch_of(GROUPS, policy.head_weight.shape[0])
    require_equal(*both(policy, batch))
    require_equal(*both(policy, batch, batch.response_mask & (torch.arange(batch.input_ids.shape[1]) % 3 == 0)))


@pytest.mark.parametrize("family", sorted(PADDED | ANALYSABLE.keys()))
def test_other_families_are_padded(family: str) -> None:
    changes = TRAINABLE.get(family) or ANALYSABLE.get(family) or {}
    policy = family_policy(family, changes)
    assert not policy.packs
    assert not Policy(policy.model, policy.tokenizer, "bf16").packs


@pytest.mark.parametrize("family", ["qwen3", "mistral", "opt", "biogpt"])
def test_layers_are_recomputed_with_the_attention_of_their_first_pass(family: str) -> None:
    """opt and biogpt have dropout in their layers, which recomputation would switch on."""
    policy = family_policy(family, TRAINABLE[family])
    batch = batch_of(GROUPS, policy.head_weight.shape[0])
    plain = both(policy, batch)[0]
    set_gradient_checkpointing(policy.model, True)
    policy.model.disable_input_require_grads()
    policy.model.eval()
    again = Policy(policy.model, policy.tokenizer)
    packed, padded = both(again, batch)
    require_equal(packed, plain)
    require_equal(packed, padded)
    again.packs = True
    again.model.zero_grad()
    stats = compute_token_stats(again, batch, temperature=0.8)
    with torch.no_grad():  # as the entropy pass of another micro-batch, while this graph is kept
        compute_token_stats(again, batch, temperature=0.8)
    stats.logprobs.sum().backward()


def test_a_window_that_the_model_does_not_use_is_noticed() -> None:
    policy = family_policy("llama", {"sliding_window": 30})
    assert "differ" in why_not_packed(policy)
    assert policy.model.config.sliding_window == 30
    assert not policy.packs


def test_memory_for_the_backward_does_not_grow_with_copies_of_the_prompt() -> None:
    """Bytes saved by a packed pass over sequences that share a prompt, against a padded one of as many tokens."""
    policy = family_policy("llama", {"max_position_embeddings": 1024})
    vocabulary = policy.head_weight.shape[0]

    def saved(batch: TokenBatch, packs: bool) -> int:
        policy.packs = packs
        sizes: dict[int, int] = {}

        def pack_hook(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
            stats = compute_token_stats(policy, batch, temperature=1.0)
        stats.logprobs.sum().backward()
        return sum(sizes.values())

    for prompt, lengths in ((400, [20] * 16), (400, [380] * 4), (100, [200] * 4)):
        shared = batch_of([(prompt, lengths)], vocabulary)
        length = shared.input_ids.shape[1]
        alone = batch_of(
            [(prompt, [length - prompt + 1])] * (-(-count_tokens(shared, packed=True) // length)), vocabulary
        )
        assert saved(shared, True) < 1.3 * saved(alone, False)


groups_of_any_length = st.lists(
    st.tuples(st.integers(1, 12), st.lists(st.integers(1, 20), min_size=1, max_size=5)), min_size=1, max_size=6
)


@settings(deadline=None)
@given(groups=groups_of_any_length)
def test_every_token_has_one_place(groups: list[tuple[int, list[int]]]) -> None:
    batch = batch_of(groups)
    packing = pack(batch)
    num_tokens = packing.input_ids_1N.shape[1]
    assert num_tokens == count_tokens(batch, packed=True)
    inside_BT = batch.attention_mask
    assert packing.input_ids_1N[0][packing.slot_BT][inside_BT].equal(batch.input_ids[inside_BT])
    places_BT = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
    assert packing.position_1N[0][packing.slot_BT][inside_BT].equal(places_BT[inside_BT])
    assert packing.slot_BT[inside_BT].unique().numel() == num_tokens
    queries = torch.cat([segment.query_SR.flatten() for segment in packing.segments])
    assert queries[packing.place_N].equal(torch.arange(num_tokens))


@settings(deadline=None)
@given(groups=groups_of_any_length, max_tokens=st.integers(1, 120))
def test_a_packed_cut_holds_every_sequence_once_within_the_budget(
    groups: list[tuple[int, list[int]]], max_tokens: int
) -> None:
    batch = batch_of(groups)
    cuts = cut_micro_batches(batch, max_tokens, packed=True)
    assert sorted(row for cut in cuts for row in cut.tolist()) == list(range(len(batch)))
    assert all(len(cut) == 1 or count_tokens(batch.rows(cut), packed=True) <= max_tokens for cut in cuts)
