"""Which models the embedded engine can sample from: those whose decoding from a cache gives what one pass gives."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from forkrl.errors import UserError, first_line
from forkrl.method.batches import collate
from forkrl.model.policy import Policy
from forkrl.model.support import PROBE_ERRORS
from forkrl.rollout.embedded import Prefix, decode
from forkrl.rollout.logprob_gap import MAX_MEAN_GAP, logprob_gap
from forkrl.types import Prompt, RolloutGroup, SamplingParams

_KINDS = {"DynamicLayer", "DynamicSlidingWindowLayer"}
_REMEDY = (
    "choose another model (docs/models.md); ready responses of this one can be analysed with forkrl analyze --responses"
)


def require_cached_decoding(policy: Policy) -> None:
    """Reject a model that keeps state other than keys and values, or whose cached decoding deviates.

    Decodes a few tokens after two prompts of different lengths, in fp32.
    """
    failure = f"{type(policy.model).__name__} cannot be sampled or trained"
    try:
        layers = DynamicCache(config=policy.model.config).layers
        if other := sorted({type(layer).__name__ for layer in layers} - _KINDS):
            raise UserError(f"{failure}: it keeps other state than keys and values ({', '.join(other)}); {_REMEDY}")
        gap = _decoding_gap(Policy(policy.model, policy.tokenizer))
    except PROBE_ERRORS as error:
        raise UserError(
            f"{failure}: decoding from a cache fails ({type(error).__name__}: {first_line(error)}); {_REMEDY}"
        ) from error
    if not gap <= MAX_MEAN_GAP["fp32"]:
        raise UserError(
            f"{failure}: log-probs of tokens decoded from a cache differ by {gap:.2g} nats from those of one pass over "
            f"the sequence; {_REMEDY}"
        )


def _decoding_gap(policy: Policy) -> float:
    """The mean gap over a few tokens; in fp32, where it is nothing but rounding."""
    prefixes = [Prefix((0, 1, 2, 3, 4)), Prefix((3, 1)), Prefix((0, 1, 2, 3, 4))]
    generator = torch.Generator(policy.device).manual_seed(0)
    rollouts = dict(decode(policy, prefixes, SamplingParams(6), generator))
    groups = [RolloutGroup(Prompt("", "", ""), (rollouts[place],)) for place in sorted(rollouts)]
    batch = collate(groups, torch.zeros(len(groups), 1), pad_id=0)
    return logprob_gap(policy, batch.to(policy.device), 1.0).mean
