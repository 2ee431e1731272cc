"""Gradients at the selected positions alone: the same log-probs, the same gradient where everything is selected."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

from forkrl.config import ForksOnlyConfig
from forkrl.errors import UserError
from forkrl.method.batches import MicroBatch, collate
from forkrl.model.forward import compute_token_stats
from forkrl.model.policy import Policy
from forkrl.parallel.workers import Workers
from forkrl.rollout import EmbeddedEngine
from forkrl.training import forks_only, selected_attention
from forkrl.training.forks_only import compute_selected_stats, prefill, require_forks_only
from forkrl.training.forward import running_weights
from forkrl.training.update import measure_first, update_policy
from forkrl.types import Prompt, SamplingParams, TokenBatch
from tests.models import random_policy
from tests.numerics.test_update import recipe

FAMILIES = ["qwen3", "qwen2", "llama", "mistral with a sliding window", "gemma3", "gpt2"]


@pytest.fixture(params=[(1, 5), (600, 7), (1 << 19, 4096)], ids="tiles of {0[0]} scores, {0[1]} keys".format)
def scores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One query a block, a few, all; a few keys a tile, and all."""
    monkeypatch.setattr(selected_attention, "SCORES_CPU", request.param[0])
    monkeypatch.setattr(selected_attention, "COLUMNS_CPU", request.param[1])


def make_batch(policy: Policy) -> TokenBatch:
    """Sequences of several lengths with random advantages."""
    generator = torch.Generator().manual_seed(2)
    engine = EmbeddedEngine(Workers(policy), max_prompt_tokens=16)
    prompts = [Prompt(str(index), str(index) * (index + 1), "") for index in range(4)]
    groups = engine.generate(prompts, group_size=3, sampling=SamplingParams(24), generator=generator)
    return collate(groups, torch.randn(4, 3, generator=generator), pad_id=0)


def some_of(batch: TokenBatch, share: float = 0.3) -> torch.Tensor:
    """A random selection that leaves one sequence without any."""
    selected = batch.response_mask & (torch.rand(batch.response_mask.shape) < share)
    selected[1] = False
    return selected


def gradient(policy: Policy, loss: torch.Tensor) -> torch.Tensor:
    policy.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


@pytest.mark.usefixtures("scores")
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_dense_pass(family: str) -> None:
    policy = random_policy(family)
    batch = make_batch(policy)
    selected = some_of(batch)
    dense = compute_token_stats(policy, batch, temperature=0.8)
    sparse = compute_selected_stats(policy, batch, selected, temperature=0.8)
    for exact, approximate in zip(dense, sparse, strict=True):
        torch.testing.assert_close(approximate[selected], exact[selected], atol=2e-5, rtol=0)
        assert not approximate[~selected].any()


@pytest.mark.usefixtures("scores")
@pytest.mark.parametrize("family", FAMILIES)
def test_with_everything_selected_the_gradient_is_exact(family: str) -> None:
    """Every position before a sequence's last prediction, the prompt's among them."""
    policy = random_policy(family)
    batch = make_batch(policy)
    weights = torch.randn(batch.response_mask.shape) * batch.response_mask
    expected = gradient(policy, (compute_token_stats(policy, batch, temperature=1.0).logprobs * weights).sum())
    everything = compute_selected_stats(policy, batch, batch.attention_mask, temperature=1.0)
    measured = gradient(policy, (everything.logprobs * weights).sum())
    assert (measured - expected).norm() <= 1e-5 * expected.norm()


def test_with_a_part_selected_the_gradient_points_the_same_way() -> None:
    policy = random_policy()
    batch = make_batch(policy)
    selected = some_of(batch)
    expected = gradient(policy, compute_token_stats(policy, batch, temperature=1.0).logprobs[selected].sum())
    measured = gradient(policy, compute_selected_stats(policy, batch, selected, temperature=1.0).logprobs.sum())
    assert 0.5 < cosine(measured, expected) < 0.9999


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


@pytest.mark.usefixtures("scores")
@pytest.mark.parametrize("family", FAMILIES)
def test_projections_make_the_last_layer_exact(family: str) -> None:
    """Keys and values of the last layer are all that its other positions give; they get their gradients back."""
    policy = random_policy(family)
    batch = make_batch(policy)
    selected = some_of(batch)
    weights = torch.randn(selected.shape)

    def of_last_layer(logprobs: torch.Tensor) -> torch.Tensor:
        policy.model.zero_grad()
        (logprobs * weights)[selected].sum().backward()
        decoder: Any = policy.decoder
        layers = decoder.h if family == "gpt2" else decoder.layers
        return torch.cat([p.grad.flatten() for p in layers[-1].parameters() if p.grad is not None])

    expected = of_last_layer(compute_token_stats(policy, batch, temperature=1.0).logprobs)
    constant = of_last_layer(compute_selected_stats(policy, batch, selected, temperature=1.0).logprobs)
    projected = compute_selected_stats(policy, batch, selected, temperature=1.0, projections=True)
    measured = of_last_layer(projected.logprobs)
    assert (measured - expected).norm() <= 1e-5 * expected.norm()
    assert (constant - expected).norm() > 1e-3 * expected.norm()


def test_projections_bring_the_gradient_nearer() -> None:
    policy = random_policy()
    batch = make_batch(policy)
    selected = some_of(batch)
    expected = gradient(policy, compute_token_stats(policy, batch, temperature=1.0).logprobs[selected].sum())
    near, nearer = (
        gradient(
            policy,
            compute_selected_stats(policy, batch, selected, temperature=1.0, projections=projections).logprobs.sum(),
        )
        for projections in (False, True)
    )
    assert cosine(near, expected) < cosine(nearer, expected) < 0.99999


def test_projections_change_nothing_but_projections() -> None:
    """Gradients go no further than the layer whose keys and values these are, and its input's norm."""
    policy = random_policy()
    batch = make_batch(policy)
    selected = some_of(batch)
    grads = []
    for projections in (False, True):
        gradient(
            policy,
            compute_selected_stats(policy, batch, selected, temperature=1.0, projections=projections).logprobs.sum(),
        )
        grads.append({name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None})
    one, other = grads
    changed = {
        name.rpartition(".weight")[0] for name in one if (one[name] - other[name]).norm() > 1e-4 * one[name].norm()
    }
    parts = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm", "input_layernorm")
    assert changed == {f"model.layers.{layer}.{part}" for layer in range(2) for part in parts}


def test_weights_of_what_runs() -> None:
    """Prompt of two, response of four; the second and the last token of the response are chosen, two are drawn."""
    response = torch.tensor([[False, False, True, True, True, True, False]])
    inside = torch.tensor([[True, True, True, True, True, True, False]])
    nothing = torch.zeros(1, 7)
    ids = torch.zeros(1, 7, dtype=torch.int64)
    batch = TokenBatch(ids, ids, inside, response, nothing, nothing, nothing[:, 0])
    chosen = torch.tensor([[False, False, False, True, False, True, False]])
    drawn = torch.tensor([[True, False, True, True, False, False, False]])

    def weights(drawn: torch.Tensor | None, **settings: Any) -> list[float] | None:
        weight = running_weights(MicroBatch(0, batch, drawn), chosen, ForksOnlyConfig(**settings))
        return None if weight is None else weight[0].tolist()

    assert weights(None) is None
    assert weights(None, prompt=True) == [1, 1, 0, 1, 0, 1, 0]
    assert weights(drawn, sampled=0.25) == [4, 0, 4, 1, 0, 1, 0]
    assert weights(drawn, sampled=0.25, prompt=True) == [1, 1, 4, 1, 0, 1, 0]


def test_drawn_positions_give_the_exact_gradient_on_average() -> None:
    """Over every outcome of the draw, each with its probability. Weights other than 1 / p would be far off."""
    policy = random_policy(num_hidden_layers=3)
    chance, length = 0.3, 5
    ids = torch.tensor([[3, 5, 4, 7, 2, 9], [8, 2, 2, 6, 3, 4]])
    mask, nothing = torch.ones(2, length, dtype=torch.bool), torch.zeros(2, length)
    batch = TokenBatch(ids[:, :-1], ids[:, 1:], mask, mask, nothing, nothing, nothing[:, 0])
    selected = torch.tensor([[False, False, True, False, True], [False, True, False, False, True]])
    others = (~selected).nonzero().tolist()
    factors = torch.randn(2, length)
    exact = compute_token_stats(policy, batch, temperature=1.0).logprobs
    expected = gradient(policy, (exact * factors)[selected].sum())
    mean = torch.zeros_like(expected)
    for drawn in itertools.product([0.0, 1.0], repeat=len(others)):
        weight = selected.float()
        for place, hit in zip(others, drawn, strict=True):
            weight[tuple(place)] = hit / chance
        stats = compute_selected_stats(policy, batch, selected, temperature=1.0, weight_BT=weight)
        probability = chance ** sum(drawn) * (1 - chance) ** (len(others) - sum(drawn))
        mean += probability * gradient(policy, (stats.logprobs * factors).sum())
    assert (mean - expected).norm() <= 2e-5 * expected.norm()


@pytest.mark.parametrize("scope", ["micro_batch", "mini_batch"])
def test_every_setting_changes_the_gradient_and_nothing_else(scope: str) -> None:
    policy = random_policy()
    batch = make_batch(policy)
    seen: list[torch.Tensor] = []
    losses = set()
    for settings in ({}, {"projections": True}, {"prompt": True}, {"sampled": 0.5}):
        working = Policy(copy.deepcopy(policy.model), policy.tokenizer)
        config = recipe(
            training={"mini_batch_prompts": 6, "backward": "forks_only"},
            forks_only=settings,
            selection={"scope": scope},
        )
        optimizer = torch.optim.SGD(working.model.parameters(), lr=0.0)
        update = update_policy(Workers(working), optimizer, batch, config, torch.Generator().manual_seed(1))
        grads = [p.grad.flatten() for p in working.model.parameters() if p.grad is not None]
        seen.append(torch.cat(grads) / update.metrics["grad/norm"])
        losses.add(round(update.metrics["loss/policy"], 5))
    assert len(losses) == 1
    for one, other in itertools.combinations(seen, 2):
        assert cosine(one, other) < 0.9999


def test_keys_and_values_that_are_kept_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off-policy, over the mini-batch: one pass a micro-batch where there is room for its keys and values, else two."""
    policy = random_policy()
    batch = make_batch(policy)
    batch.advantages[[0, 3, 4, 8]] = 0.0  # sequences that move nothing, among others of the same micro-batches
    passes: list[int] = []

    def counting(policy: Policy, micro: TokenBatch, **kwargs: Any) -> Any:
        passes.append(len(micro))
        return prefill(policy, micro, **kwargs)

    for module in ("forward", "forks_only"):
        monkeypatch.setattr(f"forkrl.training.{module}.prefill", counting)
    found = []
    for kept_mib in (0, 1024):
        working = Policy(copy.deepcopy(policy.model), policy.tokenizer)
        config = recipe(
            training={"mini_batch_prompts": 6, "backward": "forks_only", "micro_batch_tokens": 90},
            forks_only={"kept_mib": kept_mib},
            selection={"scope": "mini_batch", "ratio": 0.1},
        )
        optimizer = torch.optim.SGD(working.model.parameters(), lr=0.0)
        workers = Workers(working)
        passes.clear()
        update = update_policy(workers, optimizer, batch, config, torch.Generator())
        assert not workers.local.kept
        found.append((list(passes), update, [p.grad for p in working.model.parameters() if p.grad is not None]))
    (twice, one, grads), (once, other, same_grads) = found
    assert len(once) > 2 and sum(once) == len(batch) < sum(twice)
    assert one.selected_BT.equal(other.selected_BT)
    assert one.metrics["loss/clip_fraction"] == pytest.approx(other.metrics["loss/clip_fraction"])
    for grad, same in zip(grads, same_grads, strict=True):
        torch.testing.assert_close(same, grad, atol=1e-6, rtol=1e-4)


def test_what_is_kept_stays_within_its_limit() -> None:
    """Seven micro-batches, room for the keys and values of two."""
    policy = random_policy()
    batch = make_batch(policy).rows([0, 0])
    training = {"mini_batch_prompts": 6, "backward": "forks_only"}
    config = recipe(training=training, selection={"scope": "mini_batch"})
    size = prefill(policy, batch, to_the_end=True).num_bytes
    room = config.forks_only.model_copy(update={"kept_mib": 2.5 * size / 2**20})
    config = config.model_copy(update={"forks_only": room})
    worker = Workers(policy).local
    for number in range(7):
        measure_first(worker, MicroBatch(number, batch, None), config, True)
    assert list(worker.kept) == [0, 1]
    assert size == 2 * 2 * 2 * batch.input_ids.numel() * 8 * 4, "two layers, keys and values, two heads of 8, fp32"


def test_sequences_with_unlike_numbers_of_tokens_are_not_padded_to_the_longest() -> None:
    policy = random_policy()
    batch = make_batch(policy)
    selected = torch.zeros_like(batch.response_mask)
    selected[0] = batch.response_mask[0]
    for row in range(2, len(batch)):
        selected[row, batch.response_mask[row].nonzero()[0]] = True
    groups = selected_attention.lay_out(selected, None)
    assert [len(group.rows_B) for group in groups] == [1, len(batch) - 2]
    weights = torch.randn(selected.shape)
    for projections in (False, True):
        together = gradient(
            policy,
            (
                compute_selected_stats(policy, batch, selected, temperature=1.0, projections=projections).logprobs
                * weights
            ).sum(),
        )
        alone = sum(
            gradient(
                policy,
                (
                    compute_selected_stats(
                        policy, batch.rows([row]), selected[[row], :width], temperature=1.0, projections=projections
                    ).logprobs
                    * weights[[row], :width]
                ).sum(),
            )
            for row, width in enumerate(batch.attention_mask.sum(1).tolist())
            if selected[row].any()
        )
        assert (together - alone).norm() <= 1e-5 * together.norm()


@pytest.mark.parametrize("backward", ["dense", "forks_only"])
def test_the_optimizer_steps_where_no_sequence_has_an_advantage(backward: str) -> None:
    """On a gradient of zeros AdamW still decays the weights, whatever runs."""
    policy = random_policy()
    batch = make_batch(policy)
    batch.advantages.zero_()
    batch.rollout_entropy[0] = 0  # the row that stands in for the others has no selected token
    config = recipe(training={"mini_batch_prompts": 6, "backward": backward}, selection={"scope": "mini_batch"})
    before = policy.head_weight.detach().clone()
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.1, weight_decay=0.1)
    update_policy(Workers(policy), optimizer, batch, config, torch.Generator(), on_policy=True)
    torch.testing.assert_close(policy.head_weight.detach(), before * 0.99)


def test_a_micro_batch_without_selected_tokens_adds_nothing() -> None:
    policy = random_policy()
    batch = make_batch(policy)
    stats = compute_selected_stats(policy, batch, torch.zeros_like(batch.response_mask), temperature=1.0)
    assert not stats.logprobs.any() and not stats.logprobs.requires_grad


def test_half_precision_stays_near() -> None:
    policy = random_policy(sharpness=1.0)
    batch = make_batch(policy)
    selected = some_of(batch)
    half = Policy(policy.model, policy.tokenizer, "bf16")
    for projections in (False, True):
        measured, expected = (
            compute_selected_stats(each, batch, selected, temperature=1.0, projections=projections).logprobs
            for each in (half, policy)
        )
        torch.testing.assert_close(measured, expected, atol=0.03, rtol=0)
        assert cosine(gradient(policy, measured.sum()), gradient(policy, expected.sum())) > 0.99


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("scope", ["micro_batch", "mini_batch", "sequence"])
def test_an_update_selects_the_same_tokens_as_the_dense_one(scope: str, on_policy: bool) -> None:
    policy = random_policy()
    batch = make_batch(policy)
    updates = []
    for backward in ("dense", "forks_only"):
        working = Policy(copy.deepcopy(policy.model), policy.tokenizer)
        working.packs = scope != "micro_batch"  # where the cut decides, and forks-only counts padded tokens
        config = recipe(selection={"scope": scope}).model_dump()
        config["training"] |= {"backward": backward, "micro_batch_tokens": 90}
        optimizer = torch.optim.SGD(working.model.parameters(), lr=0.0)
        updates.append(
            update_policy(
                Workers(working),
                optimizer,
                batch,
                type(recipe()).model_validate(config),
                torch.Generator(),
                on_policy=on_policy,
            )
        )
    dense, sparse = updates
    assert dense.selected_BT.equal(sparse.selected_BT)
    assert sparse.metrics["entropy/threshold"] == pytest.approx(dense.metrics["entropy/threshold"], abs=1e-5)
    assert sparse.metrics["loss/policy"] == pytest.approx(dense.metrics["loss/policy"], abs=1e-5)
    assert sparse.metrics["grad/norm"] > 0


def test_its_settings_are_refused_where_nothing_reads_them() -> None:
    with pytest.raises(ValueError, match=r'forks_only.\* is read by training.backward = "forks_only" alone'):
        recipe(forks_only={"prompt": True})


@pytest.mark.parametrize("projections", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_fitting_models_are_let_through(family: str, projections: bool) -> None:
    require_forks_only(random_policy(family), projections=projections)


def test_layers_of_an_unknown_kind_are_refused_by_name() -> None:
    policy = random_policy()
    policy.model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UserError, match=r"does not fit Qwen3ForCausalLM.*ValueError: layers of kind linear_attention"):
        require_forks_only(policy)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_of_another_kind_is_refused_by_name(precision: str) -> None:
    """Near the tolerance of bf16 a small random model would pass a comparison of log-probs."""
    policy = random_policy(sharpness=1.0)
    policy.model.set_attn_implementation("eager")
    with pytest.raises(UserError, match="2 of its 2 layers do not attend through the interface .* is 'eager'"):
        require_forks_only(Policy(policy.model, policy.tokenizer, precision))


def test_layers_that_are_not_marked_are_refused_where_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks_only, "GradientCheckpointingLayer", torch.nn.Dropout)
    require_forks_only(random_policy())
    with pytest.raises(UserError, match="transformers does not tell which of its modules are its layers"):
        require_forks_only(random_policy(), projections=True)


def test_projections_and_weights_are_refused_together() -> None:
    policy = random_policy()
    batch = make_batch(policy)
    weight = batch.response_mask.float() * 2
    with pytest.raises(ValueError, match="would count the same gradients twice"):
        compute_selected_stats(policy, batch, batch.response_mask, temperature=1.0, weight_BT=weight, projections=True)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"loss": {"kl_coef": 0.1}}, "loss.kl_coef and loss.entropy_coef are means over all"),
        ({"loss": {"entropy_coef": 0.1}}, "loss.kl_coef and loss.entropy_coef are means over all"),
        ({"loss": {"entropy_target": 0.1}}, "so is the bonus of loss.entropy_target"),
        ({"model": {"gradient_checkpointing": True}}, "set model.gradient_checkpointing to false"),
        ({"forks_only": {"kept_mib": 7}}, "forks_only.kept_mib = 7 is read only for a selection by current entropies"),
        ({"forks_only": {"projections": True, "sampled": 0.1}}, "count the same gradients twice; set one of them"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(training={"mini_batch_prompts": 6, "backward": "forks_only"}, **sections)
