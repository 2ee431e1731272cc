"""Operations of a step and how long they take, by two rates that the user may set.

A matrix of n weights costs 2 n operations a token forward and 4 n backward (Kaplan et al. 2020, arXiv 2001.08361,
section 2.1); causal attention to a sequence of n tokens 2 L H C n^2 forward, and twice as much backward. Decoding reads
all weights and the cache for every token, so that it is bounded by the bandwidth of memory unless very many sequences
run at once: the slower of the two counts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from forkrl.config import TrainConfig
from forkrl.errors import UserError
from forkrl.planning.cards import Card
from forkrl.planning.layout import Layout, selected_share, share_with_gradients
from forkrl.planning.memory import RolloutFit, product_bytes
from forkrl.planning.shapes import ModelShape

DEFAULT_PROMPT = 256


class Assumptions(NamedTuple):
    """What no recipe says."""

    mean_response: float
    mean_prompt: float
    oversampling: float
    """Responses sampled for one that is trained on."""
    mfu: float
    """Share of the card's bf16 operations that training reaches."""
    rollout_efficiency: float
    """Share of the bound by bandwidth or operations that decoding reaches."""
    rollout_tokens_per_s: float | None
    """Of one GPU, as measured; then nothing is estimated."""


class Part(NamedTuple):
    """A part of a step."""

    name: str
    flops: float
    seconds: float | None
    """None: not estimated."""
    note: str = ""


def assume(
    config: TrainConfig,
    *,
    mean_response: float | None = None,
    mean_prompt: float | None = None,
    oversampling: float | None = None,
    mfu: float = 0.4,
    rollout_efficiency: float = 0.5,
    rollout_tokens_per_s: float | None = None,
) -> Assumptions:
    """What the user gave, and defaults for the rest.

    Raises:
        UserError: a number is out of its range.
    """
    rollout = config.rollout
    _require_range("--mfu", mfu, 1)
    _require_range("--rollout-efficiency", rollout_efficiency, 1)
    if mean_response is None:
        mean_response = rollout.max_response_tokens / 2
    _require_range("--mean-response", mean_response, rollout.max_response_tokens, "rollout.max_response_tokens")
    if mean_prompt is None:
        mean_prompt = min(DEFAULT_PROMPT, rollout.max_prompt_tokens)
    _require_range("--mean-prompt", mean_prompt, rollout.max_prompt_tokens, "rollout.max_prompt_tokens")
    if rollout_tokens_per_s is not None:
        _require_range("--rollout-tokens-per-s", rollout_tokens_per_s, math.inf)
    if oversampling is None:
        oversampling = _least_oversampling(config)
    if not (oversampling >= 1 and math.isfinite(oversampling)):
        raise UserError(f"--oversampling {oversampling:g}: must be 1 or more; 1 means that no group is dropped")
    return Assumptions(mean_response, mean_prompt, oversampling, mfu, rollout_efficiency, rollout_tokens_per_s)


def _require_range(option: str, value: float, most: float, name: str = "") -> None:
    if not (0 < value <= most) or value == math.inf:
        bound = "" if most == math.inf else f" and at most {most:g}" + (f" ({name})" if name else "")
        raise UserError(f"{option} {value:g}: must be above 0{bound}")


def _least_oversampling(config: TrainConfig) -> float:
    """The local engine samples whole generation batches, and throws away what a step has no place for."""
    dynamic = config.dynamic_sampling
    if config.runtime.engine == "verl" or not dynamic.enabled:
        return 1.0
    return max(1.0, dynamic.generation_prompts / config.rollout.prompts_per_step)


class Decoding(NamedTuple):
    """A rate of sampling, and what bounds it."""

    sequences: int
    """Of one replica at once."""
    tokens_per_s: float
    """Of one GPU."""
    bound: str
    shortest_s: float
    """Seconds of the longest response alone: no rollout takes less."""


def decode_rate(
    config: TrainConfig, shape: ModelShape, layout: Layout, card: Card, fit: RolloutFit, assumed: Assumptions
) -> Decoding | None:
    """How fast one GPU writes tokens; None where the cache has no room for a sequence of full length.

    Raises:
        UserError: the card's bandwidth is not known, and no rate is given.
    """
    if assumed.rollout_tokens_per_s is not None:
        return Decoding(0, assumed.rollout_tokens_per_s, "as given", 0.0)
    if not card.bandwidth:
        raise UserError(
            "decoding is bounded by the bandwidth of memory, and that of your card is not known; add --gpu-bandwidth "
            "TB/s, or a measured --rollout-tokens-per-s"
        )
    if not fit.room_full:
        return None
    context = assumed.mean_prompt + assumed.mean_response / 2
    wanted = config.rollout.prompts_per_step * config.rollout.group_size * assumed.oversampling / layout.replicas
    room = int(fit.cache // (context * fit.cache_per_token))
    sequences = min(config.rollout.max_sequences, room, math.ceil(wanted))

    def seconds(count: int) -> tuple[float, str]:
        read = _decoding_weights(config, shape, layout) + count * context * fit.cache_per_token
        work = count * (2 * shape.matrices + 4 * shape.layers * shape.query_width * context) / layout.tensor_parallel
        by_memory, by_work = read / card.bandwidth, work / card.flops
        bound = "bound by bandwidth" if by_memory >= by_work else "bound by operations"
        return max(by_memory, by_work) / assumed.rollout_efficiency, bound

    step_s, bound = seconds(sequences)
    alone_s = seconds(1)[0] * config.rollout.max_response_tokens
    return Decoding(sequences, sequences / step_s / layout.tensor_parallel, bound, alone_s)


def _decoding_weights(config: TrainConfig, shape: ModelShape, layout: Layout) -> float:
    """Bytes of weights that one GPU reads for each token: the local engine keeps its head in fp32."""
    if layout.sharded:
        return product_bytes(config) * shape.matrices / layout.tensor_parallel
    return product_bytes(config) * shape.layers * shape.layer_matrices + 4 * shape.embedding_parameters


def find_parts(
    config: TrainConfig, shape: ModelShape, layout: Layout, card: Card, decoding: Decoding | None, assumed: Assumptions
) -> tuple[Part, ...]:
    """Rollout, log-probs and update of one step."""
    sequences = config.rollout.prompts_per_step * config.rollout.group_size
    layers, head = _forward_flops(shape, sequences, assumed.mean_prompt, assumed.mean_response)
    rate = layout.gpus * card.flops * assumed.mfu
    parts = [_rollout_part(config, shape, layout, card, decoding, assumed)]
    if layout.sharded:
        parts.append(Part("log-probs of the old policy", layers + head, (layers + head) / rate, "2N a token"))
    if config.loss.kl_coef:
        parts.append(Part("log-probs of the reference", layers + head, (layers + head) / rate, "2N a token"))
    update, note = _update_flops(config, layout, layers, head, assumed)
    parts.append(Part("update", update, update / rate, note))
    return tuple(parts)


def _forward_flops(shape: ModelShape, sequences: float, prompt: float, response: float) -> tuple[float, float]:
    """Operations of the layers, attention included, and of the head, over whole sequences."""
    tokens = prompt + response
    attention = 2 * shape.layers * shape.query_width * tokens**2
    layers = sequences * (tokens * 2 * shape.layers * shape.layer_matrices + attention)
    return layers, sequences * tokens * 2 * shape.embedding_parameters


def _rollout_part(
    config: TrainConfig, shape: ModelShape, layout: Layout, card: Card, decoding: Decoding | None, assumed: Assumptions
) -> Part:
    prompts = config.rollout.prompts_per_step * assumed.oversampling
    responses = prompts * config.rollout.group_size
    tokens = responses * assumed.mean_response
    context = assumed.mean_prompt + assumed.mean_response / 2
    flops = tokens * (2 * shape.matrices + 4 * shape.layers * shape.query_width * context)
    reading = sum(_forward_flops(shape, prompts, assumed.mean_prompt, 0))  # a group's prompt is read once
    if decoding is None:
        return Part("rollout", flops + reading, None, "not estimated: it does not fit")
    decoding_s = tokens / (decoding.tokens_per_s * layout.gpus)
    seconds = max(decoding_s, decoding.shortest_s) + reading / (layout.gpus * card.flops * assumed.mfu)
    note = f"{decoding.tokens_per_s:,.0f} tokens/s a GPU, {decoding.bound}"
    if decoding.sequences:
        note = f"{note}, {decoding.sequences} sequences a replica"
    if decoding_s < decoding.shortest_s:
        note += "; as long as the longest response alone"
    return Part("rollout", flops + reading, seconds, note)


def _update_flops(
    config: TrainConfig, layout: Layout, layers: float, head: float, assumed: Assumptions
) -> tuple[float, str]:
    """The backward takes twice its forward; checkpointing runs the layers forward once more.

    The local engine's head is asked about the selected tokens alone where entropies are known before the loss. It keeps
    no logits, so that its backward computes those of its rows again.
    """
    recompute = 1 if config.model.gradient_checkpointing else 0
    if layout.sharded:
        return (3 + recompute) * layers + 3 * head, f"{6 + 2 * recompute}N a token"
    responses = assumed.mean_response / (assumed.mean_prompt + assumed.mean_response)
    head, selected = head * responses, selected_share(config)
    first, measured, known = _share_of_steps(config)
    if config.training.backward == "forks_only":
        share = share_with_gradients(config)
        head_passes = 1 - first + 4 * selected
        return (1 + 3 * share) * layers + head_passes * head, f"{2 + 6 * share:.3g}N a token: forks_only"
    asked = known * selected + 1 - known
    learning = 1.0 if _other_terms(config) else selected
    rows = f", {asked:.0%} of the rows through the head and {learning:.0%} back" if asked < 1 or learning < 1 else ""
    passes = 3 + recompute + measured
    return passes * layers + (measured + asked + 3 * learning) * head, f"{2 * passes:.3g}N a token{rows}"


def _other_terms(config: TrainConfig) -> bool:
    """Terms of the loss that every response token adds to."""
    return bool(config.loss.kl_coef or config.loss.entropy_coef)


def _share_of_steps(config: TrainConfig) -> tuple[float, float, float]:
    """Of all gradient steps: the first of their batch, those with a pass for entropies, and those that know them."""
    selection = config.selection
    first = 1 / math.ceil(config.rollout.prompts_per_step / config.training.mini_batch_prompts)
    current = selection.rule not in ("all", "random") and selection.entropy == "current"
    compete = current and (selection.scope == "mini_batch" or selection.rule == "threshold")
    measured = 1 - first if compete else 0.0
    known = measured + (first if compete or not current else 0.0)
    return first, measured, 0.0 if _other_terms(config) else known


def evaluation_seconds(
    config: TrainConfig, layout: Layout, decoding: Decoding | None, assumed: Assumptions
) -> float | None:
    """Seconds of sampling for all evaluations of a run: before, after and in between."""
    if decoding is None:
        return None
    every, steps = config.eval.every, config.training.steps
    times = 2 + ((steps - 1) // every if every else 0)
    tokens = config.eval.problems * config.eval.samples * assumed.mean_response
    return times * max(tokens / (decoding.tokens_per_s * layout.gpus), decoding.shortest_s)
