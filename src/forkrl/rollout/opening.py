"""Opens a recipe's engine, for models whose cached decoding equals one forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from forkrl.errors import UserError, first_line, is_out_of_memory
from forkrl.model.policy import Policy
from forkrl.model.support import PROBE_ERRORS
from forkrl.parallel.workers import Workers
from forkrl.rollout.embedded import EmbeddedEngine, Prefix, decode
from forkrl.rollout.logprob_gap import MAX_MEAN_GAP, gap_of_rollouts
from forkrl.rollout.vllm_engine import VllmEngine
from forkrl.types import SamplingParams

if TYPE_CHECKING:  # loads pydantic, which only recipes need
    from forkrl.config import TrainConfig

_SUPPORTED_CACHES = {"DynamicLayer", "DynamicSlidingWindowLayer"}
_REMEDY = (
    "choose another model (docs/models.md); ready responses of this one can be analysed with forkrl analyze --responses"
)


def open_engine(workers: Workers, config: TrainConfig) -> EmbeddedEngine:
    """The engine of ``rollout.engine``; raises UserError if it cannot sample from the model."""
    if config.rollout.engine == "vllm":
        return VllmEngine(workers, config.rollout)
    require_cached_decoding(workers.policy)
    limits = config.rollout
    return EmbeddedEngine(workers, max_prompt_tokens=limits.max_prompt_tokens, max_sequences=limits.max_sequences)


def training_sampling(config: TrainConfig, policy: Policy) -> SamplingParams:
    """How the responses that a run trains on are sampled."""
    rollout = config.rollout
    return SamplingParams(
        max_response_tokens=rollout.max_response_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop_token_ids=policy.stop_token_ids(rollout.stop),
    )


def require_cached_decoding(policy: Policy) -> None:
    """Reject a model that caches state other than keys and values, or whose cached decoding deviates."""
    failure = f"{type(policy.model).__name__} cannot be sampled or trained"
    try:
        layers = DynamicCache(config=policy.model.config).layers
        if other := sorted({type(layer).__name__ for layer in layers} - _SUPPORTED_CACHES):
            raise UserError(f"{failure}: it keeps other state than keys and values ({', '.join(other)}); {_REMEDY}")
        gap = _decoding_gap(Policy(policy.model, policy.tokenizer))
    except PROBE_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{failure}: decoding from a cache fails ({type(error).__name__}: {first_line(error)}); {_REMEDY}"
        ) from error
    if not gap <= MAX_MEAN_GAP["fp32"]:
        raise UserError(
            f"{failure}: log-probs of tokens decoded from a cache differ by {gap:.2g} nats from those of one pass over "
            f"the sequence; {_REMEDY}"
        )


def _decoding_gap(policy: Policy) -> float:
    """The mean gap over a few tokens after prompts of different lengths, in fp32 to exclude rounding."""
    prefixes = [Prefix((0, 1, 2, 3, 4)), Prefix((3, 1)), Prefix((0, 1, 2, 3, 4))]
    generator = torch.Generator(policy.device).manual_seed(0)
    rollouts = dict(decode(policy, prefixes, SamplingParams(6), generator))
    return gap_of_rollouts(policy, rollouts.values()).mean
