"""The flat decoding step computes what the model's own code computes, or leaves the model to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from forkrl.model import products
from forkrl.model.policy import Policy
from forkrl.rollout import embedded
from forkrl.rollout.embedded import choose_step
from forkrl.rollout.flat_step import FlatStep, reproducible
from forkrl.rollout.growing_cache import build_cache, select_sequences
from tests.models import random_policy

LENGTHS = [3, 9, 1, 6]
PREFIX = max(LENGTHS)


def read(policy: Policy) -> tuple[Any, Tensor, Tensor]:
    """A cache of sequences of unequal lengths, their mask, and the next tokens' positions."""
    torch.manual_seed(5)
    ids_ST = torch.randint(2, len(policy.tokenizer), (len(LENGTHS), PREFIX))
    seen_ST = torch.arange(PREFIX) >= PREFIX - torch.tensor(LENGTHS)[:, None]
    cache = build_cache(policy.model.config)
    position_ST = (seen_ST.long().cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        policy.hidden_states(ids_ST, seen_ST, position_ids=position_ST, cache=cache, use_cache=True)
    return cache, seen_ST, seen_ST.sum(1)


@torch.no_grad()
def decode_by(step: Any, policy: Policy, tokens_NS: Tensor) -> Tensor:
    """Hidden states of steps in which rows leave, change places and come back to back, ``[N, S, D]``."""
    cache, seen_ST, position_S = read(policy)
    row_S, hidden = torch.arange(len(LENGTHS)), []
    for number, tokens_S in enumerate(tokens_NS):
        if number == 2:
            row_S = torch.tensor([0, 3, 2])  # row 1 left, the last took its place
            select_sequences(cache, row_S)
            seen_ST, position_S = seen_ST[row_S], position_S[row_S]
        seen_ST = torch.nn.functional.pad(seen_ST, (0, 1), value=True)
        hidden.append(torch.zeros(len(LENGTHS), policy.head_weight.shape[1]))
        hidden[-1][row_S] = step(tokens_S[row_S], position_S, seen_ST, cache).float()
        position_S = position_S + 1
    return torch.stack(hidden)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 4e-2)])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "mistral"])
def test_hidden_states_equal_those_of_the_model(family: str, precision: str, tolerance: float) -> None:
    policy = random_policy(family)
    policy.precision = precision
    assert reproducible(policy)
    tokens_NS = torch.randint(2, len(policy.tokenizer), (70, len(LENGTHS)))  # beyond one growth of the cache
    expected = decode_by(lambda *step: embedded._model_step(policy, *step), policy, tokens_NS)
    actual = decode_by(FlatStep(policy).hidden_states, policy, tokens_NS)
    assert expected.abs().max() > 1
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("num_sequences", [1, 2])
@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 48).bfloat16()])
def test_a_product_with_one_sequence_bypasses_onednn(
    num_sequences: int, bias: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    input_SD, weight = torch.randn(num_sequences, 200).bfloat16(), torch.randn(48, 200).bfloat16()
    used: list[bool] = []
    onednn: Any = torch.backends.mkldnn

    def watched(*operands: Any) -> Tensor:
        used.append(onednn.enabled)
        return torch.nn.functional.linear(*operands)

    monkeypatch.setattr(products, "linear", watched)
    before = onednn.enabled
    actual = products.decoding_product(input_SD, weight, bias)
    assert used == [before and num_sequences > 1] and onednn.enabled == before
    exact = input_SD.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(actual.double(), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_head_of_many_calls_is_the_head_of_one(precision: str) -> None:
    policy, hidden_SD = random_policy(), torch.randn(5, 32)
    policy.precision = precision
    with torch.no_grad():
        assert policy.head_in_precision()(hidden_SD).float().equal(policy.logits(hidden_SD))


def adapter_in(policy: Policy) -> None:
    class Adapted(torch.nn.Linear):
        pass

    layer: Any = policy.decoder.layers[1]  # type: ignore[index]
    layer.mlp.up_proj = Adapted(32, 48, bias=False)


def own_attention(policy: Policy) -> None:
    policy.model.set_attn_implementation("eager")


CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "another architecture": ("gpt2", {}, None),
    "a sliding window": ("mistral with a sliding window", {}, None),
    "a bias behind attention": ("llama", {"attention_bias": True}, None),
    "a bias in the feed-forward part": ("llama", {"mlp_bias": True}, None),
    "some layers slide": ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, None),
    "a map that is more than linear": ("qwen3", {}, adapter_in),
    "an attention that was asked for": ("qwen3", {}, own_attention),
}


@pytest.mark.parametrize("case", CASES)
def test_other_models_decode_by_their_own_code(case: str) -> None:
    family, changes, alter = CASES[case]
    policy = random_policy(family, **changes)
    if alter is not None:
        alter(policy)
    assert not reproducible(policy)
    assert not isinstance(getattr(choose_step(policy), "__self__", None), FlatStep)


def test_weights_are_read_anew_for_every_batch() -> None:
    policy = random_policy()
    tokens_NS = torch.randint(2, len(policy.tokenizer), (3, len(LENGTHS)))
    before = decode_by(choose_step(policy), policy, tokens_NS)
    with torch.no_grad():
        policy.decoder.layers[0].mlp.down_proj.weight.mul_(1.5)  # type: ignore[index,union-attr]
    after = decode_by(choose_step(policy), policy, tokens_NS)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(
        after, decode_by(lambda *step: embedded._model_step(policy, *step), policy, tokens_NS), atol=1e-5, rtol=1e-5
    )


def test_rows_close_ranks_without_moving_more_than_they_must() -> None:
    going_S = torch.tensor([True, False, True, False, True, True])
    assert embedded._close_gaps(going_S, 4).tolist() == [0, 4, 2, 5]
    assert embedded._close_gaps(torch.tensor([True, True, False]), 2).tolist() == [0, 1]
    assert embedded._close_gaps(torch.tensor([False, False, True]), 1).tolist() == [2]


def test_on_a_cpu_attention_is_fp32_whatever_the_precision() -> None:
    """bf16 there is several times slower in the backward pass, and less exact."""
    policy = random_policy()
    policy.precision = "bf16"
    seen: list[torch.dtype] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(query.dtype)
        return plain(query, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        policy.hidden_states(torch.randint(2, 9, (2, 5)))
    assert set(seen) == {torch.float32}


def test_the_models_own_step_copies_no_keys_for_the_query_heads_that_share_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sliding window keeps the model to its own code; PyTorch's attention would get a copy of the cache a token."""
    policy = random_policy("mistral with a sliding window")
    cache, seen_ST, position_S = read(policy)
    seen_ST = torch.nn.functional.pad(seen_ST, (0, 1), value=True)
    tokens_S = torch.full((len(LENGTHS),), 3)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("this attention repeats keys and values")

    monkeypatch.setattr("forkrl.model.attention.sdpa_attention", refuse)
    with torch.no_grad():
        hidden_SD = choose_step(policy)(tokens_S, position_S, seen_ST, cache)
    assert hidden_SD.shape == (len(LENGTHS), policy.head_weight.shape[1])
