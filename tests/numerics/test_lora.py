"""LoRA: its gradient is that of full training, projected; merged, saved and read back it is the same model."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forkrl.config import LoraConfig, ModelConfig
from forkrl.errors import UserError
from forkrl.model.adapter import (
    add_adapter,
    linear_weight,
    merged_state,
    write_adapter,
)
from forkrl.model.policy import Policy, PolicyWithoutAdapter, open_policy, set_gradient_checkpointing
from forkrl.parallel.workers import Workers, _parameters
from forkrl.rollout import EmbeddedEngine, embedded
from forkrl.rollout.flat_step import FlatStep, reproducible
from forkrl.rollout.logprob_gap import logprob_gap
from forkrl.training.update import update_policy
from forkrl.types import Prompt, SamplingParams, TokenBatch
from tests.models import random_policy
from tests.numerics.test_flat_step import LENGTHS, decode_by
from tests.numerics.test_update import make_batch, recipe

FAMILIES = ["qwen3", "llama", "qwen2", "gpt2", "gemma3", "mistral with a sliding window"]


def adapted(
    folder: Path, family: str = "qwen3", *, rank: int = 4, targets: tuple[str, ...] = ("all-linear",)
) -> Policy:
    """A saved random model with an adapter that changes it."""
    policy = random_policy(family)
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    settings = LoraConfig(rank=rank, alpha=8, targets=targets)
    policy.adapter = add_adapter(policy.model, settings, ModelConfig(path=str(folder)))
    randomize(policy)
    return policy


def randomize(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def merged(policy: Policy) -> Policy:
    """The same policy as a plain model."""
    plain = type(policy.model)(copy.deepcopy(policy.model.config)).eval()
    plain.load_state_dict(merged_state(policy.model))
    plain.set_attn_implementation(policy.model.config._attn_implementation)
    return Policy(plain, policy.tokenizer)


def gradients(policy: Policy, batch: TokenBatch, reference: Policy | None = None, **sections: Any) -> dict[str, Tensor]:
    working = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(working, lr=0.0)
    config = recipe(**{"selection": {"scope": "mini_batch"}} | sections)
    update_policy(Workers(policy, reference), optimizer, batch, config, torch.Generator().manual_seed(5))
    return {name: each.grad for name, each in policy.model.named_parameters() if each.grad is not None}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return adapted(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def batch(policy: Policy) -> TokenBatch:
    return make_batch(policy)


def training(**settings: Any) -> dict[str, Any]:
    return {"training": {"mini_batch_prompts": 6, "micro_batch_tokens": 400, **settings}}


SETTINGS: dict[str, dict[str, Any]] = {
    "dense": training(),
    "a selection in the forward pass": training() | {"selection": {"scope": "sequence"}},
    "forks_only": training(backward="forks_only"),
    "forks_only with projections": training(backward="forks_only") | {"forks_only": {"projections": True}},
    "an entropy bonus": training() | {"loss": {"entropy_coef": 0.1}},
}


def require_projected(low: dict[str, Tensor], full: dict[str, Tensor], policy: Policy, scaling: float) -> None:
    """dL/dB = s G A^T and dL/dA = s B^T G, with G the gradient of full training."""
    weights = dict(policy.model.named_parameters())
    pairs = [name.removesuffix(".lora_A.default.weight") for name in low if ".lora_A." in name]
    assert len(pairs) == 14 and len(low) == 28
    for name in pairs:
        a, b = weights[f"{name}.lora_A.default.weight"], weights[f"{name}.lora_B.default.weight"]
        full_gradient = full[f"{name}.weight"]
        assert full_gradient.abs().max() > 1e-6, name
        for measured, expected in (
            (low[f"{name}.lora_B.default.weight"], scaling * full_gradient @ a.T),
            (low[f"{name}.lora_A.default.weight"], scaling * b.T @ full_gradient),
        ):
            torch.testing.assert_close(measured, expected, rtol=1e-4, atol=2e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("case", SETTINGS)
def test_the_gradient_is_that_of_full_training_projected(policy: Policy, batch: TokenBatch, case: str) -> None:
    full = gradients(merged(policy), batch, **SETTINGS[case])
    require_projected(gradients(policy, batch, **SETTINGS[case]), full, policy, scaling=2.0)


@pytest.mark.parametrize("how", ["padded", "recomputed", "chunked", "in two processes"])
def test_the_same_with_other_ways_to_run(policy: Policy, batch: TokenBatch, how: str) -> None:
    full = gradients(merged(policy), batch, **training())
    other = Policy(copy.deepcopy(policy.model), policy.tokenizer, head="chunked" if how == "chunked" else "auto")
    if how == "padded":
        other.__dict__["why_padded"] = "for this test"
    if how == "recomputed":
        set_gradient_checkpointing(other.model, True)
        other = Policy(other.model, other.tokenizer)
    if how == "in two processes":
        optimizer = torch.optim.SGD([each for each in other.model.parameters() if each.requires_grad], lr=0.0)
        config = recipe(**{"selection": {"scope": "mini_batch"}} | training())
        with Workers(other, count=2) as workers:
            update_policy(workers, optimizer, batch, config, torch.Generator().manual_seed(5))
            low = {name: each.grad for name, each in other.model.named_parameters() if each.grad is not None}
    else:
        low = gradients(other, batch, **training())
    require_projected(low, full, other, scaling=2.0)


def test_at_full_rank_the_gradient_of_full_training_can_be_recovered(tmp_path: Path) -> None:
    """With A orthogonal and of full rank nothing is projected away: G = dL/dB A / s."""
    policy = adapted(tmp_path, rank=32, targets=("q_proj", "up_proj"))
    weights = dict(policy.model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            if ".lora_A." in name:
                weight.copy_(torch.linalg.qr(weight)[0])
    batch = make_batch(policy)
    full, low = gradients(merged(policy), batch), gradients(policy, batch)
    for layer in (0, 1):
        for target in ("self_attn.q_proj", "mlp.up_proj"):
            name = f"model.layers.{layer}.{target}"
            recovered = low[f"{name}.lora_B.default.weight"] @ weights[f"{name}.lora_A.default.weight"] / (8 / 32)
            expected = full[f"{name}.weight"]
            torch.testing.assert_close(recovered, expected, rtol=1e-4, atol=2e-5 * float(expected.detach().abs().max()))


def hidden_states(policy: Policy) -> Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        return policy.hidden_states(torch.randint(2, len(policy.tokenizer), (3, 20)))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_saved_and_read_by_peft_it_is_the_same_model(family: str, tmp_path: Path) -> None:
    import peft

    policy = adapted(tmp_path / "base", family)
    expected = hidden_states(policy)
    with torch.no_grad():
        base = hidden_states(PolicyWithoutAdapter(policy.model, policy.tokenizer))
    assert (expected - base).abs().max() > 1e-2, "the adapter changes nothing"
    torch.testing.assert_close(hidden_states(merged(policy)), expected, rtol=1e-5, atol=1e-5)

    (tmp_path / "adapter").mkdir()
    assert policy.adapter is not None
    write_adapter(tmp_path / "adapter", policy.model, policy.adapter)
    opened = open_policy(ModelConfig(path=str(tmp_path / "adapter")), "cpu")
    assert opened.adapter is None and all(parameter.requires_grad for parameter in opened.model.parameters())
    assert {name for name, _ in opened.model.named_parameters()} == {
        name for name, _ in open_policy(ModelConfig(path=str(tmp_path / "base")), "cpu").model.named_parameters()
    }
    torch.testing.assert_close(hidden_states(opened), expected, rtol=1e-5, atol=1e-5)

    plain = open_policy(ModelConfig(path=str(tmp_path / "base")), "cpu")
    by_peft: Any = peft.PeftModel.from_pretrained(plain.model, str(tmp_path / "adapter"))
    torch.testing.assert_close(
        hidden_states(Policy(by_peft.base_model.model, plain.tokenizer)), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sampler_and_trainer_agree(family: str, precision: str, tmp_path: Path) -> None:
    policy = adapted(tmp_path, family)
    policy.precision = precision
    engine = EmbeddedEngine(Workers(policy), max_prompt_tokens=16)
    prompts = [Prompt(str(index), str(index) * (index + 1), "") for index in range(4)]
    generator = torch.Generator().manual_seed(0)
    groups = engine.generate(prompts, group_size=4, sampling=SamplingParams(16), generator=generator)
    batch = embedded_batch(groups)
    exact, coarse = (1e-5, 1e-4), (2e-2, 0.5)
    gap, (mean, largest) = logprob_gap(policy, batch, 1.0), exact if precision == "fp32" else coarse
    assert gap.mean < mean and gap.max < largest


def embedded_batch(groups: Any) -> TokenBatch:
    from forkrl.method.batches import collate

    return collate(groups, torch.ones(len(groups), 4), pad_id=0)


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj",), ("k_proj", "down_proj")])
def test_the_flat_step_decodes_with_merged_weights(targets: tuple[str, ...], tmp_path: Path) -> None:
    policy = adapted(tmp_path, targets=targets)
    step = embedded.choose_step(policy)
    assert isinstance(getattr(step, "__self__", None), FlatStep)
    tokens_NS = torch.randint(2, len(policy.tokenizer), (5, len(LENGTHS)))
    with torch.no_grad():
        actual = decode_by(step, policy, tokens_NS)
        expected = decode_by(lambda *state: embedded._model_step(policy, *state), policy, tokens_NS)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_the_reference_is_the_model_without_its_adapter(policy: Policy, batch: TokenBatch, tmp_path: Path) -> None:
    loss = {"loss": {"kl_coef": 0.5}}
    base = open_policy(ModelConfig(path=policy.adapter.path if policy.adapter else ""), "cpu")
    off = PolicyWithoutAdapter(policy.model, policy.tokenizer)
    expected, actual = (gradients(policy, batch, reference, **loss) for reference in (base, off))
    assert expected.keys() == actual.keys() and len(actual) == 28
    for name, each in expected.items():
        torch.testing.assert_close(actual[name], each, rtol=1e-5, atol=1e-7)
    without = gradients(policy, batch)
    assert not torch.allclose(without[name], actual[name], rtol=1e-2)


def test_workers_share_the_weights_of_a_reference_without_its_adapter(policy: Policy, batch: TokenBatch) -> None:
    config = recipe(**{"loss": {"kl_coef": 0.5}} | training())
    found = []
    for count in (1, 2):
        model = copy.deepcopy(policy.model)
        own = Policy(model, policy.tokenizer)
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.0)
        with Workers(own, PolicyWithoutAdapter(model, policy.tokenizer), count=count) as workers:
            assert len(_parameters(workers.local)) == len(list(model.parameters())), "they take memory twice"
            update_policy(workers, optimizer, batch, config, torch.Generator().manual_seed(5))
            found.append(torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.fixture
def saved(policy: Policy, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    assert policy.adapter is not None
    write_adapter(folder, policy.model, policy.adapter)
    return folder


def change(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def other_base(folder: Path, **changes: Any) -> None:
    other = random_policy(seed=1, **changes)
    other.model.save_pretrained(folder / "other")
    other.tokenizer.save_pretrained(folder / "other")
    change(folder, base_model_name_or_path=str(folder / "other"))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_policy(ModelConfig(path=str(folder)), "cpu")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_adapter_of_another_base_model_is_rejected(saved: Path) -> None:
    other_base(saved)
    assert "an adapter of another base model: it was trained on" in refusal(saved)
    (saved / "base_model.json").unlink()  # as PEFT writes an adapter: only names and shapes tell
    open_policy(ModelConfig(path=str(saved)), "cpu")
    other_base(saved, intermediate_size=40)
    assert "an adapter of another base model: base_model.model.model.layers.0.mlp.gate_proj" in refusal(saved)
    other_base(saved, num_hidden_layers=1)
    assert "which Qwen3ForCausalLM does not have" in refusal(saved)
    other_base(saved, num_hidden_layers=3)
    assert "it has no base_model.model.model.layers.2" in refusal(saved)


def test_other_adapters_are_rejected(saved: Path) -> None:
    change(saved, base_model_name_or_path=None)
    assert "does not name its base model; set base_model_name_or_path" in refusal(saved)
    change(saved, base_model_name_or_path=str(saved / "gone"))
    assert "its base model is not here" in refusal(saved)
    (saved / "adapter_config.json").write_text("[]")
    assert "cannot be read as the settings of an adapter" in refusal(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora = True; ForkRL reads plain LoRA only"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication = [[0, 1], [0, 1]]; ForkRL reads"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "an adapter on model.embed_tokens, an embedding"),
    ],
)
def test_what_merging_would_not_reproduce_is_rejected(saved: Path, changes: dict[str, Any], message: str) -> None:
    change(saved, **changes)
    assert message in refusal(saved)


def test_an_adapter_of_itself_is_rejected(saved: Path, tmp_path: Path) -> None:
    change(saved, base_model_name_or_path=str(saved))
    assert "its base model is an adapter of itself" in refusal(saved)
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(saved)}))
    change(saved, base_model_name_or_path=str(other))
    assert "its base model is an adapter of itself" in refusal(saved)


def test_an_adapter_of_another_type_is_rejected(saved: Path, policy: Policy) -> None:
    import peft

    assert policy.adapter is not None
    config = peft.IA3Config(base_model_name_or_path=policy.adapter.path, task_type="CAUSAL_LM")
    config.save_pretrained(str(saved))
    assert "an adapter of type IA3; ForkRL reads LoRA only" in refusal(saved)


def test_targets_without_a_layer_are_rejected() -> None:
    model = random_policy().model
    for name in ("lm_head", "embed_tokens", "c_attn"):
        settings = LoraConfig(rank=2, targets=("q_proj", name))
        with pytest.raises(UserError, match=f"no layer '{name}' that can be adapted; take .*down_proj, gate_proj"):
            add_adapter(model, settings, ModelConfig(path="unread"))


def test_only_the_targets_are_trained(tmp_path: Path) -> None:
    policy = adapted(tmp_path, targets=("q_proj", "v_proj"))
    trained = [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 8 and all(".q_proj.lora_" in name or ".v_proj.lora_" in name for name in trained)


def test_a_new_adapter_changes_nothing(tmp_path: Path) -> None:
    policy = random_policy()
    before = hidden_states(policy)
    add_adapter(policy.model, LoraConfig(rank=2), ModelConfig(path="embedded:countdown-base"))
    assert hidden_states(policy).equal(before)


@pytest.fixture
def without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)


@pytest.mark.usefixtures("without_peft")
def test_without_peft_the_error_names_the_command(saved: Path) -> None:
    with pytest.raises(UserError, match=r"lora.rank = 2 needs PEFT .*: pip install 'forkrl\[lora\]'"):
        add_adapter(random_policy().model, LoraConfig(rank=2), ModelConfig())
    assert "is an adapter, which needs PEFT" in refusal(saved)


def test_in_bf16_the_adapters_are_not_merged_into_rounded_weights(policy: Policy) -> None:
    """Where a change is smaller than the last digit of the weight, all of it would be lost."""
    assert reproducible(policy)
    assert not reproducible(Policy(policy.model, policy.tokenizer, "bf16"))
    assert reproducible(Policy(random_policy("qwen3").model, policy.tokenizer, "bf16"))


def test_merging_computes_in_fp32(policy: Policy) -> None:
    layer: Any = policy.decoder.layers[0].self_attn.q_proj  # type: ignore[index,union-attr]
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    exact = layer.base_layer.weight.double() + 2 * b @ a
    assert linear_weight(layer).dtype == torch.float32
    torch.testing.assert_close(linear_weight(layer).double(), exact, rtol=0, atol=1e-6)
