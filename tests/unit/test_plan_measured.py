"""The estimates of ``forkrl plan`` compared with the bytes and operations that PyTorch counts, on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from forkrl.config import LoraConfig, ModelConfig, TrainConfig
from forkrl.config.recipe import load_recipe
from forkrl.errors import UserError
from forkrl.method.batches import mini_batches
from forkrl.model.adapter import add_adapter
from forkrl.model.policy import Policy, open_policy, set_gradient_checkpointing
from forkrl.parallel.workers import Workers
from forkrl.planning.compute import assume, forward_flops, plan_time, update_flops
from forkrl.planning.gpus import GPUS
from forkrl.planning.memory import Arithmetic, outside_bytes, plan_memory, saved_bytes, stream_bytes
from forkrl.planning.shapes import ModelShape, find_shape, parse_shape
from forkrl.training.update import update_policy
from forkrl.types import TokenBatch

TOLERANCE = 0.05
"""Of activations; parameters, gradients, Adam's averages and logits are exact."""


class Sizes(NamedTuple):
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


SMALL, MEDIUM = Sizes(128, 256, 4, 4, 2, 32, 64), Sizes(512, 1536, 6, 8, 4, 64, 1000)
KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def build(sizes: Sizes, arithmetic: Arithmetic, kind: str = "qwen3", **more: Any) -> tuple[PreTrainedModel, ModelShape]:
    """A model of random weights, in the precision that its weights have while it trains."""
    config_class, model_class = KINDS[kind]
    config = config_class(
        vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim, max_position_embeddings=8192, **{"tie_word_embeddings": False, **more},
    )  # fmt: skip
    model: PreTrainedModel = model_class(config).to(torch.bfloat16 if arithmetic == "bf16" else torch.float32)
    nn.Module.eval(model)
    return model, parse_shape(config.to_dict(), "random")


def runner(model: PreTrainedModel, arithmetic: Arithmetic, tokens: int) -> Callable[[], Tensor]:
    """A forward pass as the engine runs it: verl's plain model, or the local engine's policy."""
    ids_1T = torch.randint(model.config.vocab_size, (1, tokens))
    if arithmetic == "bf16":
        decoder: Any = model.get_decoder()
        return lambda: cast(Tensor, decoder(input_ids=ids_1T, use_cache=False).last_hidden_state)
    tokenizer: Any = SimpleNamespace(eos_token_id=0)
    policy = Policy(model, tokenizer, "bf16" if arithmetic == "autocast" else "fp32")
    return lambda: policy.hidden_states(ids_1T, use_cache=False)


def kept_bytes(model: PreTrainedModel, run: Callable[[], Tensor]) -> int:
    """Bytes of all tensors saved for the backward, the weights themselves left out, and of the result."""
    sizes: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pack(run())
    return sum(sizes.values())


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made inside that are still there, and the most there were at once."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        there = [*model.parameters(), *(each.grad for each in model.parameters() if each.grad is not None)]
        self.before = {tensor.untyped_storage()._cdata for tensor in there}
        self.seen: dict[int, weakref.ref[Any]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._count(result.untyped_storage())
        return results

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen or key in self.before or not size:
            return

        def gone(_: Any) -> None:
            del self.seen[key]
            self.now -= size

        self.seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def cast_weights(shape: ModelShape, arithmetic: Arithmetic) -> int:
    """Autocast's bf16 copies, which the plan has as an item of its own."""
    return 2 * shape.layers * shape.layer_matrices if arithmetic == "autocast" else 0


@pytest.mark.parametrize("arithmetic", ["bf16", "autocast", "fp32"])
@pytest.mark.parametrize(("sizes", "tokens"), [(SMALL, 1024), (SMALL, 4096), (MEDIUM, 1024)])
def test_activations_are_what_pytorch_keeps(sizes: Sizes, tokens: int, arithmetic: Arithmetic) -> None:
    model, shape = build(sizes, arithmetic)
    measured = kept_bytes(model, runner(model, arithmetic, tokens))
    attention = None if arithmetic == "bf16" else 4  # the local engine attends in fp32 on a CPU
    a_token = saved_bytes(shape, arithmetic, checkpointing=False, attention_bytes=attention)
    assert tokens * a_token + cast_weights(shape, arithmetic) == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("arithmetic", ["autocast", "fp32"])
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(("sizes", "tokens"), [(SMALL, 1024), (MEDIUM, 1024)])
def test_activations_with_adapters(sizes: Sizes, tokens: int, kind: str, arithmetic: Arithmetic) -> None:
    model, shape = build(sizes, arithmetic, kind)
    add_adapter(model, LoraConfig(rank=8), ModelConfig())
    measured = kept_bytes(model, runner(model, arithmetic, tokens))
    a_token = saved_bytes(shape, arithmetic, checkpointing=False, attention_bytes=4, rank=8)
    copies = 2 * shape.adapter_parameters(8, ("all-linear",)) if arithmetic == "autocast" else 0
    assert tokens * a_token + cast_weights(shape, arithmetic) + copies == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("arithmetic", ["bf16", "autocast"])
def test_activations_of_the_other_architectures(kind: str, arithmetic: Arithmetic) -> None:
    model, shape = build(MEDIUM, arithmetic, kind)
    assert shape.parameters == model.num_parameters()
    measured = kept_bytes(model, runner(model, arithmetic, 1024))
    attention = None if arithmetic == "bf16" else 4
    a_token = saved_bytes(shape, arithmetic, checkpointing=False, attention_bytes=attention)
    assert 1024 * a_token + cast_weights(shape, arithmetic) == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize(("sizes", "tokens"), [(SMALL, 4096), (MEDIUM, 1024)])
def test_with_checkpointing_the_inputs_of_the_layers_are_kept(sizes: Sizes, tokens: int) -> None:
    model, shape = build(sizes, "bf16")
    set_gradient_checkpointing(model, True)
    nn.Module.train(model)  # transformers recomputes in training mode only
    run = runner(model, "bf16", tokens)
    with LiveBytes(model) as live:
        hidden_1TD = run()
    expected = tokens * (shape.layers * stream_bytes(shape, "bf16") + outside_bytes(shape, "bf16"))
    assert live.now == pytest.approx(expected, rel=TOLERANCE)
    assert hidden_1TD.requires_grad


@pytest.mark.parametrize(("sizes", "tokens"), [(SMALL, 2048), (MEDIUM, 1024)])
def test_with_checkpointing_the_peak_is_one_whole_layer_and_what_flows_through_it(sizes: Sizes, tokens: int) -> None:
    """The plan leaves the gradients inside a layer to its headroom: here they are what is above it, within a bound."""
    model, shape = build(sizes, "bf16")
    set_gradient_checkpointing(model, True)
    nn.Module.train(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run = runner(model, "bf16", tokens)
    with LiveBytes(model) as live:
        run().float().sum().backward()
    planned = tokens * saved_bytes(shape, "bf16", checkpointing=True)
    flowing = tokens * (3 * 2 * shape.intermediate + 4 * 4 * shape.hidden) + 4 * shape.layer_parameters
    assert 0.95 * planned < live.peak < planned + flowing


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_parameters_are_those_of_the_model(kind: str, tied: bool) -> None:
    model, shape = build(SMALL, "fp32", kind, tie_word_embeddings=tied)
    assert shape.parameters == model.num_parameters()


def test_parameters_with_biases_are_those_of_the_model() -> None:
    model, shape = build(SMALL, "fp32", "llama", attention_bias=True, mlp_bias=True)
    assert shape.parameters == model.num_parameters()
    model, shape = build(SMALL, "fp32", "qwen3", attention_bias=True)
    assert shape.parameters == model.num_parameters()


def test_weights_gradients_and_adam_of_the_embedded_model_are_exact() -> None:
    policy = open_policy(ModelConfig(), "cpu")
    optimizer = torch.optim.AdamW(policy.model.parameters())
    policy.logits(policy.hidden_states(torch.arange(8)[None])[0]).sum().backward()
    optimizer.step()
    parameters = list(policy.model.parameters())
    averages = [average.nbytes for state in optimizer.state.values() for average in state.values() if average.ndim > 0]
    found = find_shape("embedded:countdown-base").shape
    planned = plan_memory(TrainConfig(), found, GPUS["h100"])
    update = {item.name: item.num_bytes for item in planned.phases[1].items}
    assert update["weights, fp32"] == sum(parameter.nbytes for parameter in parameters)
    gradients = [parameter.grad.nbytes for parameter in parameters if parameter.grad is not None]
    assert update["gradients, fp32"] == sum(gradients)
    assert update["Adam's averages, fp32"] == sum(averages)


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "down_proj"]])
def test_weights_gradients_and_adam_of_adapters_are_exact(targets: list[str]) -> None:
    policy = open_policy(ModelConfig(), "cpu")
    lora = {"rank": 4, "targets": targets}
    config = TrainConfig.model_validate({"lora": lora})
    whole = policy.model.num_parameters()
    add_adapter(policy.model, config.lora, config.model)
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    planned = plan_memory(config, find_shape("embedded:countdown-base").shape, GPUS["h100"])
    update = {item.name: item.num_bytes for item in planned.phases[1].items}
    numbers = sum(parameter.numel() for parameter in trained)
    assert update["weights, fp32"] == 4 * whole
    assert update["adapters, fp32"] == update["gradients, fp32"] == 4 * numbers
    assert update["Adam's averages, fp32"] == 8 * numbers


def test_the_plan_names_a_target_that_no_layer_has() -> None:
    config = TrainConfig.model_validate({"lora": {"rank": 4, "targets": ["c_attn"]}})
    with pytest.raises(UserError, match=r"lora.targets = .*: no layer 'c_attn'"):
        plan_memory(config, find_shape("embedded:countdown-base").shape, GPUS["h100"])


def test_logits_are_exact() -> None:
    tokens = 4096
    model, shape = build(SMALL._replace(vocabulary=1000), "bf16")
    config = load_recipe(
        TrainConfig,
        None,
        [
            "runtime.trainer=verl", "model.precision=bf16", "rollout.max_prompt_tokens=96",
            "rollout.max_response_tokens=4000", "reward.overlong_cache=0", f"training.micro_batch_tokens={tokens}",
            "selection.entropy=rollout",
        ],
    )  # fmt: skip
    planned = plan_memory(config, shape, GPUS["h100"])
    (logits,) = [item.num_bytes for item in planned.phases[1].items if item.name == "logits"]
    with torch.no_grad():
        logits_TV: Tensor = cast(Any, model)(input_ids=torch.zeros(1, tokens, dtype=torch.int64)).logits[0]
    chunk_CV = logits_TV[:2048].float()  # as verl's entropy_from_logits_with_chunking: that, its softmax, a product
    assert logits == logits_TV.nbytes + 3 * chunk_CV.nbytes


def test_the_local_cache_of_a_token_is_what_decoding_stores() -> None:
    from forkrl.rollout.growing_cache import build_cache

    model, shape = build(SMALL, "fp32")
    cache = build_cache(model.config, max_tokens=110)
    policy = Policy(model, cast(Any, SimpleNamespace(eos_token_id=0)))
    with torch.no_grad():
        policy.hidden_states(torch.zeros(1, 100, dtype=torch.int64), cache=cache, use_cache=True)
    layers = cast(Any, cache).layers
    stored = sum(layer.keys.numel() + layer.values.numel() for layer in layers)
    assert stored == 100 * shape.kv_numbers
    phases = plan_memory(TrainConfig(), shape, GPUS["h100"]).phases
    (planned,) = [item.num_bytes for item in phases[0].items if item.name == "KV cache"]
    held = sum(buffer.nbytes for layer in layers for buffer in layer.buffers)
    assert planned / (256 * (2048 + 20480)) == 4 * shape.kv_numbers
    assert held == 4 * shape.kv_numbers * 110, "the buffers of the longest sequence"


WIDE = Sizes(256, 512, 2, 4, 2, 16, 12_000)
"""A head of most of the operations, too large to be kept, and little attention: the counter leaves out a CPU's."""


def random_batch(shape: ModelShape, sequences: int, prompt: int, response: int) -> TokenBatch:
    ids_BT = torch.randint(shape.vocabulary, (sequences, prompt + response + 1))
    attention_BT = torch.ones_like(ids_BT[:, 1:], dtype=torch.bool)
    response_BT = attention_BT.clone()
    response_BT[:, :prompt] = False
    nothing_BT, signs_B = torch.zeros(attention_BT.shape), torch.tensor([1.0, -1.0]).repeat(sequences // 2)
    entropy_BT = torch.rand(attention_BT.shape) * response_BT
    return TokenBatch(
        ids_BT[:, :-1], ids_BT[:, 1:], attention_BT, response_BT, nothing_BT - 8 * response_BT, entropy_BT, signs_B
    )


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("selection.scope=mini_batch",),
        ("selection.scope=sequence",),
        ("selection.entropy=rollout", "selection.scope=mini_batch"),
        ("selection.rule=random",),
        ("selection.rule=all",),
        ("selection.scope=mini_batch", "training.mini_batch_prompts=4"),
        ("selection.scope=mini_batch", "loss.entropy_coef=0.001"),
        ("training.backward=forks_only",),
        ("training.backward=forks_only", "selection.scope=mini_batch"),
    ],
    ids=" ".join,
)
def test_operations_of_an_update_are_those_that_pytorch_counts(settings: tuple[str, ...]) -> None:
    model, shape = build(WIDE, "fp32")
    fixed = ["rollout.prompts_per_step=4", "rollout.group_size=4", "training.mini_batch_prompts=2"]
    fixed += ["loss.clip_low=0.999", "loss.clip_high=1e6"]  # a clipped token is none that learns
    config = load_recipe(TrainConfig, None, [*fixed, "model.path=unread", *settings])
    prompt, response = 8, 32
    batch = random_batch(shape, 16, prompt, response)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    tokenizer: Any = SimpleNamespace(eos_token_id=0)
    workers = Workers(Policy(model, tokenizer))
    assert workers.policy.packs  # by two small passes, which do not count
    with FlopCounterMode(display=False) as counter:
        for number, part in enumerate(mini_batches(batch, 4 * config.training.mini_batch_prompts)):
            update_policy(workers, optimizer, part, config, torch.Generator(), on_policy=number == 0)
    layers, head = forward_flops(shape, 16, prompt, response)
    assumed: Any = SimpleNamespace(mean_prompt=prompt, mean_response=response)
    planned, _ = update_flops(config, cast(Any, SimpleNamespace(sharded=False)), layers, head, assumed)
    attention = 3 * 16 * 2 * shape.layers * shape.query_width * (prompt + response) ** 2
    # Forks-only leaves out the end of the last layer where entropies are known: in a model of two, a twentieth.
    tolerance = 0.08 if config.training.backward == "forks_only" else TOLERANCE
    assert counter.get_total_flops() == pytest.approx(planned - attention, rel=tolerance)


@pytest.mark.parametrize("settings", [("selection.rule=all",), ("selection.scope=sequence",)], ids=" ".join)
def test_operations_of_an_update_with_adapters(settings: tuple[str, ...]) -> None:
    model, shape = build(WIDE, "fp32")
    fixed = ["rollout.prompts_per_step=4", "rollout.group_size=4", "training.mini_batch_prompts=4", "lora.rank=8"]
    fixed += ["loss.clip_low=0.999", "loss.clip_high=1e6", "rollout.max_prompt_tokens=8"]
    config = load_recipe(TrainConfig, None, [*fixed, "model.path=unread", *settings])
    add_adapter(model, config.lora, ModelConfig())
    workers = Workers(Policy(model, cast(Any, SimpleNamespace(eos_token_id=0))))
    assert workers.policy.packs
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.0)
    with FlopCounterMode(display=False) as counter:
        update_policy(workers, optimizer, random_batch(shape, 16, 8, 32), config, torch.Generator())
    assumed = assume(config, mean_prompt=8, mean_response=32)
    plan = plan_memory(config, shape, GPUS["h100"])
    (planned,) = [part.flops for part in plan_time(config, plan, assumed).parts if part.name == "update"]
    attention = 3 * 16 * 2 * shape.layers * shape.query_width * 40**2
    assert counter.get_total_flops() == pytest.approx(planned - attention, rel=0.1)
