"""Operations of a step and their time, at two efficiencies that the user may set.

A matrix of n weights costs 2 n operations per token forward and 4 n backward (Kaplan et al. 2020, arXiv 2001.08361,
section 2.1); causal attention to n tokens 2 L H C n^2 forward, twice that backward. Decoding is bound by memory
bandwidth, to read weights and cache, unless very many sequences run at once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from forkrl.config import TrainConfig
from forkrl.errors import UserError
from forkrl.methods import needs_pass_first, objective_of, reads_current_policy
from forkrl.planning.memory import Layout, Plan, adapter_parameters, product_bytes, selected_share, share_with_gradients
from forkrl.planning.shapes import ModelShape

DEFAULT_PROMPT = 256


class Assumptions(NamedTuple):
    """What a recipe does not specify."""

    mean_response: float
    mean_prompt: float
    oversampling: float
    """Responses sampled per response trained on."""
    mfu: float
    """Share of the GPU's bf16 rate that training reaches."""
    rollout_efficiency: float
    """Share of the bandwidth or compute bound that decoding reaches."""
    rollout_tokens_per_s: float | None
    """Measured on one GPU; replaces the estimate."""


class Part(NamedTuple):
    """A part of a step; ``seconds`` is None where it is not estimated."""

    name: str
    flops: float
    seconds: float | None
    note: str = ""


class Decoding(NamedTuple):
    """A sampling rate, and what bounds it."""

    sequences: int
    """Decoded at once by one worker."""
    tokens_per_s: float
    """Per GPU."""
    bound: str
    shortest_s: float
    """Seconds to decode the longest response alone, the minimum of a rollout."""


class Timing(NamedTuple):
    """How long a run takes, if it fits."""

    decoding: Decoding | None
    parts: tuple[Part, ...]
    evaluation_s: float | None
    steps: int

    @property
    def step_s(self) -> float | None:
        seconds = [part.seconds for part in self.parts if part.seconds is not None]
        return sum(seconds) if len(seconds) == len(self.parts) else None

    @property
    def run_s(self) -> float | None:
        if self.step_s is None or self.evaluation_s is None:
            return None
        return self.step_s * self.steps + self.evaluation_s


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
    """The user's numbers, with defaults for the rest; raises UserError if one is out of range."""
    rollout, dynamic = config.rollout, config.dynamic_sampling
    if mean_response is None:
        mean_response = rollout.max_response_tokens / 2
    if mean_prompt is None:
        mean_prompt = min(DEFAULT_PROMPT, rollout.max_prompt_tokens)
    for option, value, maximum, source in (
        ("--mfu", mfu, 1, ""),
        ("--rollout-efficiency", rollout_efficiency, 1, ""),
        ("--mean-response", mean_response, rollout.max_response_tokens, " (rollout.max_response_tokens)"),
        ("--mean-prompt", mean_prompt, rollout.max_prompt_tokens, " (rollout.max_prompt_tokens)"),
        ("--rollout-tokens-per-s", rollout_tokens_per_s, math.inf, ""),
    ):
        if value is not None and (not 0 < value <= maximum or value == math.inf):
            bound = "" if maximum == math.inf else f" and at most {maximum:g}{source}"
            raise UserError(f"{option} {value:g}: must be above 0{bound}")
    if oversampling is None:
        # The local engine samples whole generation batches and drops the groups that a step does not need.
        batches = config.runtime.trainer == "local" and dynamic.enabled
        oversampling = max(1.0, dynamic.generation_prompts / rollout.prompts_per_step) if batches else 1.0
    if not 1 <= oversampling < math.inf:
        raise UserError(f"--oversampling {oversampling:g}: must be 1 or more; 1 means that no group is dropped")
    return Assumptions(mean_response, mean_prompt, oversampling, mfu, rollout_efficiency, rollout_tokens_per_s)


def plan_time(config: TrainConfig, plan: Plan, assumed: Assumptions) -> Timing:
    """The time of a recipe; raises UserError if neither bandwidth nor a rate is known."""
    decoding = _decode_rate(config, plan, assumed)
    evaluation_s, every, steps = None, config.eval.every, config.training.steps
    if decoding is not None:  # evaluations before, after and in between
        times = 2 + ((steps - 1) // every if every else 0)
        tokens = config.eval.problems * config.eval.samples * assumed.mean_response
        evaluation_s = times * max(tokens / (decoding.tokens_per_s * plan.layout.gpus), decoding.shortest_s)
    return Timing(decoding, _find_parts(config, plan, decoding, assumed), evaluation_s, steps)


def _decode_rate(config: TrainConfig, plan: Plan, assumed: Assumptions) -> Decoding | None:
    """Tokens per second of one GPU; None if the cache cannot hold a sequence of full length."""
    shape, layout, gpu, fit = plan.shape, plan.layout, plan.gpu, plan.rollout
    if assumed.rollout_tokens_per_s is not None:
        return Decoding(0, assumed.rollout_tokens_per_s, "as given", 0.0)
    if not gpu.bandwidth:
        raise UserError(
            "memory bandwidth bounds decoding, and that of your GPU is unknown; add --gpu-bandwidth TB/s, or a "
            "measured --rollout-tokens-per-s"
        )
    if not fit.room_full:
        return None
    context = assumed.mean_prompt + assumed.mean_response / 2
    wanted = config.rollout.prompts_per_step * config.rollout.group_size * assumed.oversampling / layout.workers
    room = int(fit.cache // (context * fit.cache_per_token))
    sequences = min(config.rollout.max_sequences, room, math.ceil(wanted))
    if layout.sharded:
        weights = product_bytes(config) * shape.matrices / layout.tensor_parallel
    else:  # the local engine keeps its head in fp32, and in bf16 with adapters all weights
        size = 4 if config.lora.rank else product_bytes(config)
        weights = size * shape.layers * shape.layer_matrices + 4 * shape.embedding_parameters

    def seconds(count: int) -> tuple[float, str]:
        by_memory = (weights + count * context * fit.cache_per_token) / gpu.bandwidth
        by_work = count * _decoding_flops(shape, context) / layout.tensor_parallel / gpu.flops
        bound = "bound by bandwidth" if by_memory >= by_work else "bound by operations"
        return max(by_memory, by_work) / assumed.rollout_efficiency, bound

    step_s, bound = seconds(sequences)
    alone_s = seconds(1)[0] * config.rollout.max_response_tokens
    return Decoding(sequences, sequences / step_s / layout.tensor_parallel, bound, alone_s)


def _find_parts(config: TrainConfig, plan: Plan, decoding: Decoding | None, assumed: Assumptions) -> tuple[Part, ...]:
    shape, layout = plan.shape, plan.layout
    sequences = config.rollout.prompts_per_step * config.rollout.group_size
    # The local trainer runs a prompt once for all its responses.
    shared_by = 1 if layout.sharded else config.rollout.group_size
    layers, head = forward_flops(shape, sequences, assumed.mean_prompt, assumed.mean_response, shared_by=shared_by)
    rate = layout.gpus * plan.gpu.flops * assumed.mfu
    update, note = update_flops(config, layout, layers, head, assumed)
    if adapters := adapter_parameters(config, shape):
        # Frozen weights have no gradient, and the adapters pass forward and back.
        tokens = sequences * (assumed.mean_prompt / shared_by + assumed.mean_response) * share_with_gradients(config)
        update += tokens * (3 * 2 * adapters - 2 * shape.layers * shape.layer_matrices)
        update -= selected_share(config) * sequences * assumed.mean_response * 2 * shape.embedding_parameters
        note += ", less the gradients of frozen weights"
    recomputed = layout.sharded or config.loss.old_logprobs == "trainer"
    passes = ["old policy"] * recomputed + ["reference"] * config.loss.needs_reference
    return (
        _rollout_part(config, plan, rate, decoding, assumed),
        *(Part(f"log-probs of the {policy}", layers + head, (layers + head) / rate, "2N a token") for policy in passes),
        Part("update", update, update / rate, note),
    )


def forward_flops(
    shape: ModelShape, sequences: float, prompt: float, response: float, *, shared_by: int = 1
) -> tuple[float, float]:
    """Operations of the layers, attention included, and of the head; ``shared_by`` sequences run a prompt once."""
    tokens = prompt + response
    attention = 2 * shape.layers * shape.query_width * tokens**2
    layers = sequences * ((prompt / shared_by + response) * 2 * shape.layers * shape.layer_matrices + attention)
    return layers, sequences * tokens * 2 * shape.embedding_parameters


def _decoding_flops(shape: ModelShape, context: float) -> float:
    return 2 * shape.matrices + 4 * shape.layers * shape.query_width * context


def _rollout_part(
    config: TrainConfig, plan: Plan, rate: float, decoding: Decoding | None, assumed: Assumptions
) -> Part:
    prompts = config.rollout.prompts_per_step * assumed.oversampling
    tokens = prompts * config.rollout.group_size * assumed.mean_response
    prefill = sum(forward_flops(plan.shape, prompts, assumed.mean_prompt, 0))  # once per group
    flops = tokens * _decoding_flops(plan.shape, assumed.mean_prompt + assumed.mean_response / 2) + prefill
    if decoding is None:
        return Part("rollout", flops, None, "not estimated: it does not fit")
    decoding_s = tokens / (decoding.tokens_per_s * plan.layout.gpus)
    note = f"{decoding.tokens_per_s:,.0f} tokens/s a GPU, {decoding.bound}"
    if decoding.sequences:
        note += f", {decoding.sequences} sequences a worker"
    if decoding_s < decoding.shortest_s:
        note += "; as long as the longest response alone"
    return Part("rollout", flops, max(decoding_s, decoding.shortest_s) + prefill / rate, note)


def update_flops(
    config: TrainConfig, layout: Layout, layers: float, head: float, assumed: Assumptions
) -> tuple[float, str]:
    """Operations of a step's gradients: backward is twice forward, checkpointing repeats the layers' forward."""
    recompute = 1 if config.model.gradient_checkpointing else 0
    if layout.sharded:
        return (3 + recompute) * layers + 3 * head, f"{6 + 2 * recompute}N a token"
    head *= assumed.mean_response / (assumed.mean_prompt + assumed.mean_response)
    selected = selected_share(config)
    # Shares of all gradient steps: the first of their batch, those with a pass for entropies.
    first = 1 / math.ceil(config.rollout.prompts_per_step / config.training.mini_batch_prompts)
    current = reads_current_policy(config.selection, config.weights)
    whole = needs_pass_first(config.selection, config.weights)
    measured = 1 - first if whole else 0.0
    # The entropy pass of one micro-batch keeps its graph.
    sequences = config.training.mini_batch_prompts * config.rollout.group_size
    mini_batch = sequences * (assumed.mean_prompt / config.rollout.group_size + assumed.mean_response)
    kept = measured * min(1.0, config.training.micro_batch_tokens / mini_batch)
    whole_responses = objective_of(config.loss.objective).all_tokens
    every_token = bool(config.loss.kl_coef or config.loss.entropy_bonus or whole_responses)  # in the loss
    selects_first = not every_token and (whole or not current)
    if config.training.backward == "forks_only":
        share = share_with_gradients(config)
        head_passes = (1 - first if current else 0.0) + 4 * selected
        return (1 + 3 * share) * layers + head_passes * head, f"{2 + 6 * share:.3g}N a token: forks_only"
    # The head keeps no logits: its backward recomputes those of its rows.
    forward, backward = selected if selects_first else 1.0, 1.0 if every_token else selected
    rows = f", {forward:.0%} of the rows through the head and {backward:.0%} back" if min(forward, backward) < 1 else ""
    passes = 3 + recompute + measured - kept
    head_passes = measured + (1 - kept) * forward + 3 * backward
    return passes * layers + head_passes * head, f"{2 * passes:.3g}N a token{rows}"
