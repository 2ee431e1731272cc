"""Samples the next tokens with their exact log-prob and entropy.

Shapes: ``S`` sequences being decoded, ``V`` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forkrl.types import SamplingParams


def sample_tokens(
    logits_SV: Tensor, sampling: SamplingParams, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the next token of every sequence from fp32 logits ``[S, V]``; the generator is on their device.

    Returns tokens (int64 ``[S]``), log-probs and entropies (nats, fp32 ``[S]``) of the full vocabulary at the sampling
    temperature: top-k, top-p and fork temperature affect only which token is drawn. At temperature 0 (greedy) and with
    a fork temperature, the statistics are at temperature 1.
    """
    scaled_SV = logits_SV if sampling.temperature in (0, 1) else logits_SV / sampling.temperature
    logprobs_SV = torch.log_softmax(scaled_SV, dim=-1)
    probs_SV = logprobs_SV.exp()
    entropy_S = torch.special.entr(probs_SV).sum(-1)
    if sampling.temperature == 0:
        tokens_S = logits_SV.argmax(-1)
    else:
        if sampling.fork_temperature is not None:  # unnormalised; only ratios matter below
            probs_SV = sampling.fork_temperature.rescale(logprobs_SV, entropy_S).exp()
        candidates_SV = _restrict(probs_SV, sampling)
        # argmax of p / Exp(1) samples exactly from p, without multinomial's host synchronisation.
        tokens_S = candidates_SV.div(torch.empty_like(probs_SV).exponential_(generator=generator)).argmax(-1)
    return tokens_S, logprobs_SV.gather(-1, tokens_S[:, None])[:, 0], entropy_S


def _restrict(probs_SV: Tensor, sampling: SamplingParams) -> Tensor:
    """Zero the tokens that top-k and top-p exclude; the most likely token always stays."""
    if 0 < sampling.top_k < probs_SV.shape[-1]:
        kept = torch.zeros_like(probs_SV, dtype=torch.bool)
        kept.scatter_(-1, probs_SV.topk(sampling.top_k, dim=-1).indices, True)
        probs_SV = probs_SV.where(kept, 0.0)
    if sampling.top_p < 1:
        sorted_SV, order_SV = probs_SV.sort(dim=-1, descending=True, stable=True)
        mass_before_SV = sorted_SV.cumsum(-1) - sorted_SV
        beyond = mass_before_SV >= sampling.top_p * sorted_SV.sum(-1, keepdim=True)
        probs_SV = probs_SV.masked_fill(beyond.scatter(-1, order_SV, beyond), 0.0)
    return probs_SV
