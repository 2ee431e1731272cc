"""Bytes of one GPU in each phase of a step, and of a node's main memory.

fp32 weights and gradients and AdamW take 4 + 4 + 8 bytes per parameter; verl shards them over all GPUs (FSDP2, ZeRO 3)
and gathers a layer at a time in the compute precision. Activations follow Korthikanti et al. 2022 (arXiv 2205.05198,
section 4.1), adapted to SwiGLU, grouped queries, ``transformers``' RMSNorm (saves an fp32 copy of its input), no
dropout, and FlashAttention. tests/unit/test_plan_measured.py compares with what PyTorch saves.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from forkrl.config import TrainConfig
from forkrl.errors import UserError
from forkrl.methods import mask_of, reads_current_policy
from forkrl.parallel.even_shares import require_even_shares
from forkrl.planning.gpus import GIB, Gpu, in_gib
from forkrl.planning.shapes import ModelShape

HEADROOM = 0.1
"""Share of a GPU's memory left for what is not modelled."""
ENGINE_WORKSPACE = 2 * GIB
"""Assumed for activations, sampled logits and CUDA graphs of the sampling engine, within its share."""
ENTROPY_CHUNK = 2048
"""Tokens whose logits verl converts to fp32 at a time for entropy (entropy_from_logits_chunk_size)."""
TILE_BYTES = 64 * 2**20
"""A tile of logits in ForkRL's own head, which holds three at once (forkrl.head)."""
Arithmetic = Literal["bf16", "autocast", "fp32"]
"""The training pass: bf16 weights (FSDP2's mixed precision), fp32 weights under bf16 autocast, or all fp32."""
FITS, TIGHT, TOO_LARGE = "fits", "tight", "does not fit"


class Layout(NamedTuple):
    """The GPUs of a run and how they are shared. The local engine has one."""

    nodes: int
    gpus_per_node: int
    tensor_parallel: int
    sequence_parallel: int
    sharded: bool
    """Weights, gradients and optimizer state are sharded over all GPUs (FSDP2, by verl)."""

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def workers(self) -> int:
        """Copies of the model that sample."""
        return self.gpus // self.tensor_parallel


class Item(NamedTuple):
    name: str
    num_bytes: float
    note: str = ""


class Phase(NamedTuple):
    """What one GPU, or one node, holds at once."""

    name: str
    items: tuple[Item, ...]

    @property
    def num_bytes(self) -> float:
        return sum(item.num_bytes for item in self.items)


class RolloutFit(NamedTuple):
    """How many sequences are sampled at once. Bytes are per GPU of a worker."""

    cache_per_token: float
    cache: float
    """Bytes available to the KV cache; may be negative."""
    full_length: int
    """Tokens of the longest prompt with the longest response."""
    limit: int
    """rollout.max_sequences."""
    workers: int
    share: float
    """Bytes that sampling may use in total."""

    @property
    def room_full(self) -> int:
        """Sequences of full length that a worker's cache holds."""
        return max(0, int(self.cache // (self.full_length * self.cache_per_token)))

    @property
    def at_once(self) -> int:
        """Sequences of full length that all workers decode at once."""
        return min(self.room_full, self.limit) * self.workers


class Plan(NamedTuple):
    shape: ModelShape
    layout: Layout
    gpu: Gpu
    phases: tuple[Phase, ...]
    host: tuple[Phase, ...]
    rollout: RolloutFit

    def status(self, phase: Phase) -> str:
        if phase.num_bytes > self.gpu.memory or (phase.name == "rollout" and not self.rollout.room_full):
            return TOO_LARGE
        return TIGHT if phase.num_bytes > (1 - HEADROOM) * self.gpu.memory else FITS

    def why(self, phase: Phase) -> str:
        """Why a phase does not fit although its sum may be small enough."""
        if phase.name != "rollout" or self.rollout.room_full:
            return ""
        one = in_gib(self.rollout.cache_per_token * self.rollout.full_length)
        if not self.layout.sharded:
            return f": after the rest there is no room for one sequence ({one})"
        share = in_gib(self.rollout.share)
        return f": the sampling engine's share, {share}, does not hold its weights and one sequence ({one})"

    @property
    def fits(self) -> bool:
        return all(self.status(phase) == FITS for phase in self.phases)


def plan_memory(config: TrainConfig, shape: ModelShape, gpu: Gpu) -> Plan:
    """The memory of a recipe; raises UserError for sizes or model heads that do not divide evenly."""
    layout = _find_layout(config, shape)
    number, note = shape.parameters / layout.gpus, f"sharded over {layout.gpus}" if layout.gpus > 1 else ""
    adapters = adapter_parameters(config, shape)
    trained = adapters / layout.gpus if adapters else number
    state = (
        Item("weights, fp32", 4 * number, note),
        *([Item("adapters, fp32", 4 * trained, f"{adapters:,} parameters")] if adapters else []),
        Item("gradients, fp32", 4 * trained, note),
        Item("Adam's averages, fp32", 8 * trained, note),
    )
    adamw: tuple[Item, ...] = ()  # none for the fused one
    if layout.sharded:
        update, (rollout, fit) = _verl_update(config, shape, layout), _verl_rollout(config, shape, layout, gpu)
        adamw = (Item("temporaries of AdamW", 4 * trained, "PyTorch's foreach: once the trained weights"),)
    else:
        update, (rollout, fit) = _local_update(config, shape, layout), _local_rollout(config, shape, gpu)
    phases = Phase("rollout", rollout), Phase("update", (*state, *update)), Phase("optimizer step", (*state, *adamw))
    return Plan(shape, layout, gpu, phases, _find_host(config, shape, layout), fit)


def _find_layout(config: TrainConfig, shape: ModelShape) -> Layout:
    if config.runtime.trainer == "local":
        return Layout(1, 1, 1, 1, sharded=False)
    require_even_shares(config)
    cluster, heads, kv_heads = config.cluster, shape.heads, shape.kv_heads
    for key in ("tensor_parallel", "sequence_parallel"):
        value = getattr(cluster, key)
        if heads % value:
            raise UserError(
                f"cluster.{key} = {value} does not divide the {heads} query heads; choose a divisor of {heads}"
            )
        if kv_heads % value and value % kv_heads:
            raise UserError(
                f"cluster.{key} = {value} is neither a divisor nor a multiple of the {kv_heads} key-value heads; "
                f"choose a divisor of {kv_heads}"
            )
    return Layout(
        cluster.nodes, cluster.gpus_per_node, cluster.tensor_parallel, cluster.sequence_parallel, sharded=True
    )


def adapter_parameters(config: TrainConfig, shape: ModelShape) -> int:
    """Weights of LoRA adapters; 0: the whole model is trained."""
    return shape.adapter_parameters(config.lora.rank, config.lora.targets) if config.lora.rank else 0


def product_bytes(config: TrainConfig) -> int:
    return 4 if config.model.precision == "fp32" else 2


def full_length(config: TrainConfig) -> int:
    return config.rollout.max_prompt_tokens + config.rollout.max_response_tokens


def selected_share(config: TrainConfig) -> float:
    """rho, or 1 for a rule whose share is unknown in advance."""
    return config.selection.ratio if mask_of(config.selection.rule).keeps_ratio else 1.0


def share_with_gradients(config: TrainConfig) -> float:
    """Fraction of a micro-batch's tokens that ``training.backward = "forks_only"`` runs with gradients."""
    if config.training.backward == "dense":
        return 1.0
    prompt = config.rollout.max_prompt_tokens / full_length(config) if config.forks_only.prompt else 0.0
    chosen = selected_share(config)
    return min(1.0, chosen + (1 - chosen) * config.forks_only.sampled + prompt)


def _verl_update(config: TrainConfig, shape: ModelShape, layout: Layout) -> tuple[Item, ...]:
    """FSDP2 gathers a layer at a time, and keeps a tied embedding; all logits exist, fp32 ones chunk by chunk."""
    size, layer, embedding = product_bytes(config), shape.layer_parameters, shape.embedding_parameters
    largest = max(layer, embedding)
    gathered = 2 * layer + embedding if shape.tied else layer + largest
    tokens = config.training.micro_batch_tokens / layout.sequence_parallel
    entropy_too = reads_current_policy(config.selection, config.weights) or config.loss.entropy_bonus
    # FlashAttention's cross entropy computes log-probs in place; an entropy in the same pass needs its own gradient.
    copies = 1 + int(entropy_too) + int(config.rollout.temperature != 1)
    chunk = 3 * 4 * min(tokens, ENTROPY_CHUNK) * shape.vocabulary
    what = "with their gradient, " if entropy_too else ""
    note = f"{tokens:,.0f} tokens x {shape.vocabulary:,}, {what}and fp32 of {ENTROPY_CHUNK:,} tokens at a time"
    return (
        Item("gathered weights", size * gathered, "the current unit and the next, in the compute precision"),
        Item("gradients before reduction", (size + 4) * largest, "of one unit, and its fp32 copy for the sum"),
        _activations(config, shape, layout, "bf16"),
        Item("logits", copies * tokens * shape.vocabulary * size + chunk, note),
    )


def _local_update(config: TrainConfig, shape: ModelShape, layout: Layout) -> tuple[Item, ...]:
    tile = min(TILE_BYTES, 4 * config.training.micro_batch_tokens * shape.vocabulary)
    half, adapters = config.model.precision == "bf16", adapter_parameters(config, shape)
    gradient = 4 * shape.embedding_parameters  # bf16: a copy and its gradient; fp32: the gradient
    what = "the head's gradient"
    if adapters:
        gradient, what = 2 * shape.embedding_parameters if half else 0, "the head is frozen"
    items = [
        _activations(config, shape, layout, "autocast"),
        Item("head, in tiles", 3 * tile + gradient, f"logits are never complete; {what}"),
    ]
    if config.loss.needs_reference and not adapters:
        items.insert(0, Item("reference policy, fp32", 4 * shape.parameters, "loss.kl_coef is above 0"))
    if half:
        copy = 2 * (shape.layers * shape.layer_matrices + adapters)
        items.insert(0, Item("weights, bf16", copy, "autocast's copies, kept from forward to backward"))
    return tuple(items)


def _activations(config: TrainConfig, shape: ModelShape, layout: Layout, in_bf16: Arithmetic) -> Item:
    checkpointing, share = config.model.gradient_checkpointing, share_with_gradients(config)
    arithmetic: Arithmetic = "fp32" if config.model.precision == "fp32" else in_bf16
    attention = 4 if config.runtime.device == "cpu" else None
    per_token = saved_bytes(
        shape, arithmetic, checkpointing=checkpointing, attention_bytes=attention, rank=config.lora.rank
    )
    tokens = config.training.micro_batch_tokens / layout.sequence_parallel
    num_bytes, note = tokens * share * per_token, f"{tokens:,.0f} tokens"
    if share < 1:
        num_bytes += tokens * shape.kv_numbers * product_bytes(config)
        note = f"{share:.0%} of {tokens:,.0f} tokens with gradients, keys and values of all"
    return Item("activations", num_bytes, note + (", layers recomputed" if checkpointing else ""))


def saved_bytes(
    shape: ModelShape,
    arithmetic: Arithmetic,
    *,
    checkpointing: bool,
    attention_bytes: int | None = None,
    rank: int = 0,
) -> int:
    """Peak bytes per token; with checkpointing one complete layer, and only the inputs of the others.

    ``rank`` of LoRA adapters, counted on every layer: with fewer targets a fifth less may be saved.
    """
    layer, outside = layer_bytes(shape, arithmetic, attention_bytes), outside_bytes(shape, arithmetic)
    if rank:  # a frozen norm does not save its normalised input; each adapter saves its inner product
        queries_and_keys = shape.qk_norm * (shape.query_width + shape.kv_width)
        layer += 7 * rank * (4 if arithmetic == "fp32" else 2) - 4 * (2 * shape.hidden + queries_and_keys)
        outside -= 4 * shape.hidden
    inputs = shape.layers * stream_bytes(shape, arithmetic) + layer
    return (inputs if checkpointing else shape.layers * layer) + outside


def layer_bytes(shape: ModelShape, arithmetic: Arithmetic, attention_bytes: int | None = None) -> int:
    """Bytes that a layer saves per token; ``attention_bytes`` per number if attention is fp32 on a CPU."""
    product = 4 if arithmetic == "fp32" else 2
    attention = attention_bytes or product
    norms = {
        # An fp32 copy of the input, the normalised input before its scale, the result that the products save.
        "bf16": 2 * (4 + 2 + 2),
        # The input is itself fp32; each product saves its own bf16 copy: three for attention, two for the MLP.
        "autocast": 2 * (4 + 4) + (3 + 2) * 2,
        "fp32": 2 * (4 + 4 + 4),
    }[arithmetic] * shape.hidden
    normalised = 4 + product if shape.qk_norm else 0
    queries_and_keys = (normalised + attention) * (shape.query_width + shape.kv_width)
    # Attention and the product after it both save the output: one tensor if their precision is equal.
    output = attention if attention == product else attention + product
    values_and_output = attention * shape.kv_width + output * shape.query_width
    per_row = 4 * shape.heads + 2 * 4 + (4 * (shape.heads + shape.kv_heads) if shape.qk_norm else 0)
    return norms + queries_and_keys + values_and_output + per_row + 4 * product * shape.intermediate


def outside_bytes(shape: ModelShape, arithmetic: Arithmetic) -> int:
    """Bytes per token of the last norm, the head's input, the rotary tables and the token id."""
    norm = {"bf16": 4 + 2 + 2, "autocast": 4 + 4 + 2, "fp32": 4 + 4 + 4}[arithmetic] * shape.hidden
    return norm + 2 * (2 if arithmetic == "bf16" else 4) * shape.head_dim + 8


def stream_bytes(shape: ModelShape, arithmetic: Arithmetic) -> int:
    """Bytes per token between two layers, which gradient checkpointing saves for each layer."""
    return shape.hidden * (2 if arithmetic == "bf16" else 4)


def _verl_rollout(
    config: TrainConfig, shape: ModelShape, layout: Layout, gpu: Gpu
) -> tuple[tuple[Item, ...], RolloutFit]:
    """The sampling engine has its share of the GPU, in addition to what training keeps there."""
    parallel, size = layout.tensor_parallel, product_bytes(config)
    weights, share = size * shape.parameters / parallel, config.cluster.gpu_memory * gpu.memory
    cache = share - weights - ENGINE_WORKSPACE
    shared = f"shared by {parallel} GPUs" if parallel > 1 else ""
    items = [
        Item(f"sampling weights, {config.model.precision}", weights, shared),
        Item("sampling workspace", float(ENGINE_WORKSPACE), "assumed"),
        Item("KV cache", max(0.0, cache), f"the rest of cluster.gpu_memory = {config.cluster.gpu_memory:g} of the GPU"),
    ]
    if not config.cluster.offload:
        state = 12 * shape.parameters / layout.gpus
        items.append(Item("training state", state, "weights and Adam; gradients are freed"))
    # With more GPUs than key-value heads, each head is repeated.
    per_token = shape.kv_numbers * size / min(parallel, shape.kv_heads)
    limit = config.rollout.max_sequences
    return tuple(items), RolloutFit(per_token, cache, full_length(config), limit, layout.workers, share)


def _local_rollout(config: TrainConfig, shape: ModelShape, gpu: Gpu) -> tuple[tuple[Item, ...], RolloutFit]:
    size, dynamic = product_bytes(config), config.dynamic_sampling
    prompts = (dynamic.enabled and dynamic.generation_prompts) or config.rollout.prompts_per_step
    sequences = min(config.rollout.max_sequences, prompts * config.rollout.group_size)
    adapters = adapter_parameters(config, shape)
    items = [
        Item("weights, fp32", 4 * (shape.parameters + adapters)),
        Item("Adam's averages, fp32", 8 * (adapters or shape.parameters), "gradients are freed"),
        *_sampling_weights(config, shape),
        Item("sampling", 4 * 4 * sequences * shape.vocabulary, "logits, log-probs, probabilities and noise"),
    ]
    if config.loss.needs_reference and not adapters:
        items.append(Item("reference policy, fp32", 4 * shape.parameters))
    length = full_length(config)
    share, per_token = (1 - HEADROOM) * gpu.memory, shape.kv_numbers * size
    cache, whole = share - sum(item.num_bytes for item in items), float(sequences * length * per_token)
    if config.rollout.engine == "vllm" and (most := config.rollout.kv_cache_gib * 2**30) < whole:
        cache = min(cache, most)
        items.append(
            Item("KV cache", most, f"rollout.kv_cache_gib; {sequences} sequences of {length:,} tokens need more")
        )
    else:
        items.append(Item("KV cache", whole, f"{sequences} sequences of {length:,} tokens"))
    return tuple(items), RolloutFit(per_token, cache, length, config.rollout.max_sequences, 1, share)


def _sampling_weights(config: TrainConfig, shape: ModelShape) -> list[Item]:
    """The local sampler's memory in addition to the trained weights."""
    size = product_bytes(config)
    if config.rollout.engine == "vllm":
        weights = Item(f"weights of vLLM, {config.model.precision}", float(size * shape.parameters))
        return [weights, Item("sampling workspace", float(ENGINE_WORKSPACE), "assumed")]
    if config.lora.rank and size < 4:  # rounded to bf16, most of an adapter would be lost, so no copy is made
        return []
    stacked = size * shape.layers * shape.layer_matrices
    return [Item("stacked layers", stacked, "the sampler's copy while a batch decodes")]


def _find_host(config: TrainConfig, shape: ModelShape, layout: Layout) -> tuple[Phase, ...]:
    """Main memory of one node while the model is loaded, and while the GPUs sample."""
    copies, note = 1, "on the first node" if layout.nodes > 1 else ""
    if layout.sharded and shape.tied:
        copies, note = layout.gpus_per_node, "with tied embeddings verl reads it once per GPU"
    phases = [Phase("main memory, loading", (Item("model, fp32", 4.0 * shape.parameters * copies, note),))]
    per_node, kept = shape.parameters / layout.nodes, []
    if layout.sharded and config.cluster.offload:
        kept.append(Item("offloaded weights, Adam, fp32", 12 * per_node, "per node, pinned"))
    if layout.sharded and config.loss.needs_reference:
        kept.append(Item("reference policy, fp32", 4 * per_node, "verl keeps it on the host"))
    return (*phases, Phase("main memory, sampling", tuple(kept))) if kept else tuple(phases)
