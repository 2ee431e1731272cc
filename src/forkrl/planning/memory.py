"""Bytes of one GPU in each phase of a step, and of a node's main memory.

Both engines train fp32 weights with fp32 gradients and AdamW: 4 + 4 + 8 bytes a parameter. verl shards them over all
GPUs (FSDP2 with reshard after forward, ZeRO stage 3) and gathers a layer at a time in the precision of the products.
"""

from __future__ import annotations

from typing import NamedTuple

from forkrl.config import TrainConfig
from forkrl.planning.activations import kept_in_all
from forkrl.planning.cards import GIB, Card
from forkrl.planning.layout import Layout, share_with_gradients, training_arithmetic
from forkrl.planning.shapes import ModelShape

HEADROOM = 0.1
"""Share of a card that a plan leaves to what is not modelled."""
ENGINE_WORKSPACE = 2 * GIB
"""Assumed for activations, sampled logits and CUDA graphs of the sampling engine, within its share."""
ENTROPY_CHUNK = 2048
"""Tokens whose logits verl converts to fp32 at a time for their entropy (entropy_from_logits_chunk_size)."""
TILE_BYTES = 64 * 2**20
"""Logits of ForkRL's own head, of which three tiles exist at once (forkrl.token_stats)."""
CACHE_GROWTH = 1.5
"""The local engine's cache grows by half when it is full."""


class Item(NamedTuple):
    """Something that takes memory."""

    name: str
    num_bytes: float
    note: str = ""


class Phase(NamedTuple):
    """What one GPU, or one node, holds at the same time."""

    name: str
    items: tuple[Item, ...]

    @property
    def num_bytes(self) -> float:
        return sum(item.num_bytes for item in self.items)


class RolloutFit(NamedTuple):
    """How many sequences are sampled at once."""

    cache_per_token: float
    """Bytes of the KV cache of one token, on each GPU of a replica."""
    cache: float
    """Bytes that the cache has, on each GPU of a replica; may be below 0."""
    full_length: int
    """Tokens of the longest prompt with the longest response."""
    room_full: int
    """Sequences of full length that the cache of a replica holds."""
    limit: int
    """rollout.max_sequences."""
    replicas: int
    share: float
    """Bytes of each GPU that sampling may take in all."""

    @property
    def at_once(self) -> int:
        """Sequences of full length that all replicas decode at once."""
        return min(self.room_full, self.limit) * self.replicas


def product_bytes(config: TrainConfig) -> int:
    return 4 if config.model.precision == "fp32" else 2


def find_phases(config: TrainConfig, shape: ModelShape, layout: Layout, card: Card) -> tuple[Phase, ...]:
    """Every phase of a step on one GPU."""
    state = _training_state(shape, layout)
    if layout.sharded:
        update = (
            *state,
            *_gathered(config, shape),
            _activations(config, shape, layout),
            _logits(config, shape, layout),
        )
        rollout = _sharing_rollout(config, shape, layout, card)
    else:
        update = (
            *state,
            *_local_extras(config, shape),
            _activations(config, shape, layout),
            _tiled_head(config, shape),
        )
        rollout = _local_rollout(config, shape)
    temporary = Item("temporaries of AdamW", 4 * shape.parameters / layout.gpus, "PyTorch's foreach: once the weights")
    return Phase("rollout", rollout), Phase("update", update), Phase("optimizer step", (*state, temporary))


def _training_state(shape: ModelShape, layout: Layout) -> tuple[Item, ...]:
    number, note = shape.parameters / layout.gpus, f"sharded over {layout.gpus}" if layout.gpus > 1 else ""
    return (
        Item("weights, fp32", 4 * number, note),
        Item("gradients, fp32", 4 * number, note),
        Item("Adam's averages, fp32", 8 * number, note),
    )


def _gathered(config: TrainConfig, shape: ModelShape) -> tuple[Item, ...]:
    """FSDP2's units are the layers, the embedding and the head; a tied embedding stays gathered with the root."""
    size, layer, embedding = product_bytes(config), shape.layer_parameters, shape.embedding_parameters
    largest = max(layer, embedding)
    gathered = 2 * layer + embedding if shape.tied else layer + largest
    return (
        Item("gathered weights", size * gathered, "one unit at work and the next, in the products' precision"),
        Item("gradients before reduction", (size + 4) * largest, "of one unit, and its fp32 copy for the sum"),
    )


def _local_extras(config: TrainConfig, shape: ModelShape) -> tuple[Item, ...]:
    extras = []
    if config.model.precision == "bf16":
        copy = 2 * shape.layers * shape.layer_matrices
        extras.append(Item("weights, bf16", copy, "autocast's copies, kept from forward to backward"))
    if config.loss.kl_coef:
        extras.append(Item("reference policy, fp32", 4 * shape.parameters, "loss.kl_coef is above 0"))
    return tuple(extras)


def tokens_at_once(config: TrainConfig, layout: Layout) -> float:
    """Tokens of a micro-batch that one GPU runs."""
    return config.training.micro_batch_tokens / layout.sequence_parallel


def _activations(config: TrainConfig, shape: ModelShape, layout: Layout) -> Item:
    checkpointing, share = config.model.gradient_checkpointing, share_with_gradients(config)
    attention = 4 if config.runtime.device == "cpu" else None
    a_token = kept_in_all(shape, training_arithmetic(config), checkpointing=checkpointing, attention_bytes=attention)
    tokens = tokens_at_once(config, layout)
    num_bytes, note = tokens * share * a_token, f"{tokens:,.0f} tokens"
    if share < 1:
        num_bytes += tokens * shape.kv_numbers * product_bytes(config)
        note = f"{share:.0%} of {tokens:,.0f} tokens with gradients, keys and values of all"
    return Item("activations", num_bytes, note + (", layers recomputed" if checkpointing else ""))


def _logits(config: TrainConfig, shape: ModelShape, layout: Layout) -> Item:
    """verl holds the logits of all tokens, and their gradient apart where entropy was measured in the same pass.

    Log-probs are taken by FlashAttention's cross entropy, in place; entropy in fp32, a chunk of tokens at a time.
    """
    tokens, size = tokens_at_once(config, layout), product_bytes(config)
    copies = 1 + int(reads_current_entropy(config)) + int(config.rollout.temperature != 1)
    chunk = 3 * 4 * min(tokens, ENTROPY_CHUNK) * shape.vocabulary
    what = "with their gradient, " if reads_current_entropy(config) else ""
    note = f"{tokens:,.0f} tokens x {shape.vocabulary:,}, {what}and fp32 of {ENTROPY_CHUNK:,} tokens at a time"
    return Item("logits", copies * tokens * shape.vocabulary * size + chunk, note)


def reads_current_entropy(config: TrainConfig) -> bool:
    """Whether a gradient step measures entropies, for the selection or for a bonus."""
    selection = config.selection
    by_entropy = selection.rule in ("top_entropy", "bottom_entropy", "threshold")
    return (by_entropy and selection.entropy == "current") or config.loss.entropy_coef != 0


def _tiled_head(config: TrainConfig, shape: ModelShape) -> Item:
    """ForkRL's head holds tiles of logits; its weight is converted, and its gradient made, beside them."""
    whole = 4 * config.training.micro_batch_tokens * shape.vocabulary
    beside = 4 * shape.embedding_parameters  # bf16: a copy and its gradient; fp32: the gradient
    return Item("head, in tiles", 3 * min(TILE_BYTES, whole) + beside, "logits are never whole; the head's gradient")


def _sharing_rollout(config: TrainConfig, shape: ModelShape, layout: Layout, card: Card) -> tuple[Item, ...]:
    """The sampling engine has its share of the card; what training keeps there stands beside it."""
    weights, budget = _engine_weights(config, shape, layout), config.cluster.gpu_memory * card.memory
    parallel = layout.tensor_parallel
    cache = max(0.0, budget - weights - ENGINE_WORKSPACE)
    items = [
        Item(
            f"sampling weights, {config.model.precision}", weights, f"shared by {parallel} GPUs" if parallel > 1 else ""
        ),
        Item("sampling workspace", float(ENGINE_WORKSPACE), "assumed"),
        Item("KV cache", cache, f"the rest of cluster.gpu_memory = {config.cluster.gpu_memory:g} of the card"),
    ]
    if not config.cluster.offload:
        items.append(
            Item("training state", 12 * shape.parameters / layout.gpus, "weights and Adam; gradients are freed")
        )
    return tuple(items)


def _engine_weights(config: TrainConfig, shape: ModelShape, layout: Layout) -> float:
    return product_bytes(config) * shape.parameters / layout.tensor_parallel


def _local_rollout(config: TrainConfig, shape: ModelShape) -> tuple[Item, ...]:
    size, sequences = product_bytes(config), local_sequences(config)
    cache = sequences * full_length(config) * shape.kv_numbers * size * _room(config)
    room = "in buffers of full length" if config.rollout.cuda_graphs else "with room to grow"
    items = [
        Item("weights, fp32", 4 * shape.parameters),
        Item("Adam's averages, fp32", 8 * shape.parameters, "gradients are freed"),
        Item("stacked layers", size * shape.layers * shape.layer_matrices, "the sampler's copy, while a batch decodes"),
        Item("KV cache", cache, f"{sequences} sequences of {full_length(config):,} tokens, {room}"),
        Item("sampling", 4 * 4 * sequences * shape.vocabulary, "logits, log-probs, probabilities and noise"),
    ]
    if config.rollout.cuda_graphs and size < 4:
        items.append(Item("head, copy", size * shape.embedding_parameters, "the graphs' copy, while a step decodes"))
    if config.loss.kl_coef:
        items.append(Item("reference policy, fp32", 4 * shape.parameters))
    return tuple(items)


def _room(config: TrainConfig) -> float:
    """What the local engine's cache takes, of what it holds at most."""
    return 1.0 if config.rollout.cuda_graphs else CACHE_GROWTH


def local_sequences(config: TrainConfig) -> int:
    """Sequences that the local engine decodes at once: as many as it is told, if a step has as many."""
    prompts = config.rollout.prompts_per_step
    if config.dynamic_sampling.enabled and config.dynamic_sampling.generation_prompts:
        prompts = config.dynamic_sampling.generation_prompts
    return min(config.rollout.max_sequences, prompts * config.rollout.group_size)


def full_length(config: TrainConfig) -> int:
    return config.rollout.max_prompt_tokens + config.rollout.max_response_tokens


def fit_rollout(config: TrainConfig, shape: ModelShape, layout: Layout, card: Card) -> RolloutFit:
    """Room for sequences in what the cache may have."""
    # Heads of keys and values beyond those that there are, are repeated.
    a_token = shape.kv_numbers * product_bytes(config) / min(layout.tensor_parallel, shape.kv_heads)
    if layout.sharded:
        share = config.cluster.gpu_memory * card.memory
        cache = share - _engine_weights(config, shape, layout) - ENGINE_WORKSPACE
    else:
        others = sum(item.num_bytes for item in _local_rollout(config, shape) if item.name != "KV cache")
        share = (1 - HEADROOM) * card.memory
        cache = (share - others) / _room(config)
    length = full_length(config)
    room = max(0, int(cache // (length * a_token)))
    return RolloutFit(a_token, cache, length, room, config.rollout.max_sequences, layout.replicas, share)


def find_host(config: TrainConfig, shape: ModelShape, layout: Layout) -> tuple[Phase, ...]:
    """Main memory of one node while the model is loaded, and while the GPUs sample."""
    copies, note = 1, ""
    if layout.sharded and shape.tied:
        copies, note = layout.gpus_per_node, "with tied embeddings verl reads it once for each GPU"
    elif layout.nodes > 1:
        note = "on the first node"
    phases = [Phase("main memory, loading", (Item("model, fp32", 4.0 * shape.parameters * copies, note),))]
    kept = []
    if layout.sharded and config.cluster.offload:
        moved = 12 * shape.parameters / layout.nodes
        kept.append(Item("offloaded weights, Adam, fp32", moved, "of each node, pinned"))
    if layout.sharded and config.loss.kl_coef:
        kept.append(Item("reference policy, fp32", 4 * shape.parameters / layout.nodes, "verl keeps it on the host"))
    if kept:
        phases.append(Phase("main memory, sampling", tuple(kept)))
    return tuple(phases)
