"""Samples the next tokens with their exact log-prob and entropy.

Shapes: ``S`` sequences being decoded, ``V`` vocabulary, ``N`` blocks of the vocabulary, ``K`` tokens of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forkrl.types import SamplingParams

RANDOM_STREAM = 3
"""Increased whenever the same seed gives other tokens; runs of another stream cannot be resumed."""
BLOCK = 256
"""Tokens of a block. A token is drawn in two steps, block and token, which needs one sum per block instead of a
cumulative sum over the vocabulary."""
CACHED_LOGITS = 2**18
"""On a CPU, rows are processed in parts of about this many logits, which stay in a core's cache."""
BUCKET_BITS, BUCKETS = 18, 4096
"""Top-p groups probabilities by the bits of their fp32 numbers above these 18: 32 buckets per power of 2."""
LEAST_LOGIT = -200.0
"""Relative to the row's largest; below it the probability is 0 in fp32. Keeps 0 times -inf out of the entropy."""


def sample_tokens(
    logits_SV: Tensor, sampling: SamplingParams, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the next token of every sequence from logits ``[S, V]``; the generator is on their device.

    Returns tokens (int64 ``[S]``), log-probs and entropies (nats, fp32 ``[S]``) of the full vocabulary at the sampling
    temperature: top-k, top-p and fork temperature affect only which token is drawn. At temperature 0 (greedy) and with
    a fork temperature, the statistics are at temperature 1. One uniform number per sequence is drawn from the generator
    (none at temperature 0).
    """
    uniform_S = _uniform(logits_SV, generator) if sampling.temperature else None
    rows = max(CACHED_LOGITS // logits_SV.shape[-1], 1) if logits_SV.device.type == "cpu" else len(logits_SV)
    if len(logits_SV) <= rows:
        return _sample(logits_SV, sampling, uniform_S)
    uniforms = (None,) * -(-len(logits_SV) // rows) if uniform_S is None else uniform_S.split(rows)
    parts = [_sample(part, sampling, uniform) for part, uniform in zip(logits_SV.split(rows), uniforms, strict=True)]
    tokens_S, logprobs_S, entropy_S = (torch.cat(each) for each in zip(*parts, strict=True))
    return tokens_S, logprobs_S, entropy_S


def _uniform(logits_SV: Tensor, generator: torch.Generator) -> Tensor:
    """In [0, 1), with 53 random bits so that rare tokens get their share (MPS has no fp64)."""
    dtype = torch.float32 if logits_SV.device.type == "mps" else torch.float64
    return torch.rand(len(logits_SV), dtype=dtype, device=logits_SV.device, generator=generator)


def _sample(logits_SV: Tensor, sampling: SamplingParams, uniform_S: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    exact_SV = logits_SV.float()
    shifted_SV = exact_SV - exact_SV.amax(-1, keepdim=True)  # the maximum in bf16 takes three times as long
    if sampling.temperature not in (0, 1):
        shifted_SV /= sampling.temperature
    weights_SV = shifted_SV.clamp_(min=LEAST_LOGIT).exp()
    total_S = weights_SV.sum(-1)
    log_total_S = total_S.log()
    # With weights w = exp(x) and their sum Z: H = log Z - sum(w x) / Z.
    entropy_S = log_total_S - torch.linalg.vecdot(weights_SV, shifted_SV) / total_S
    if uniform_S is None:
        tokens_S = logits_SV.argmax(-1)
    else:
        if sampling.fork_temperature is not None:
            weights_SV = sampling.fork_temperature.rescale(exact_SV, entropy_S).softmax(-1)
        tokens_S = _draw(_restrict(weights_SV, sampling), uniform_S)
    return tokens_S, shifted_SV.gather(-1, tokens_S[:, None])[:, 0] - log_total_S, entropy_S


def _draw(weights_SV: Tensor, uniform_S: Tensor) -> Tensor:
    """Token ids whose probabilities are proportional to the weights: first a block, then a token in it."""
    block_S, rest_S = _search(_block_sums(weights_SV), uniform_S)
    last = weights_SV.shape[-1] - 1
    ids_SK = block_S[:, None] * BLOCK + torch.arange(BLOCK, device=weights_SV.device)
    weights_SK = weights_SV.gather(-1, ids_SK.clamp_max(last)).masked_fill(ids_SK > last, 0.0)
    token_S, _ = _search(weights_SK, rest_S)
    return ids_SK.gather(-1, token_S[:, None])[:, 0].clamp_max(last)  # beyond the last only for NaN weights


def _block_sums(weights_SV: Tensor) -> Tensor:
    """Sums ``[S, N]`` over blocks of the vocabulary; the last block may be shorter."""
    whole = weights_SV.shape[-1] // BLOCK * BLOCK
    sums_SN: Tensor = weights_SV[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1)
    if whole < weights_SV.shape[-1]:
        sums_SN = torch.cat([sums_SN, weights_SV[:, whole:].sum(-1, keepdim=True)], -1)
    return sums_SN


def _search(weights_SN: Tensor, uniform_S: Tensor) -> tuple[Tensor, Tensor]:
    """The index drawn by a uniform number, and a new uniform number: how far into the index's weight it fell."""
    sums_SN = weights_SN.to(uniform_S.dtype).cumsum(-1)
    total_S = sums_SN[:, -1]
    # Rounding must not reach the total, beyond which no index lies. right=True never finds a weight of 0.
    target_S = torch.minimum(uniform_S * total_S, total_S.nextafter(torch.zeros_like(total_S)))
    index_S = torch.searchsorted(sums_SN, target_S[:, None], right=True)[:, 0].clamp_max(weights_SN.shape[-1] - 1)
    weight_S = weights_SN.gather(-1, index_S[:, None])[:, 0].to(uniform_S.dtype)
    before_S = sums_SN.gather(-1, index_S[:, None])[:, 0] - weight_S
    return index_S, ((target_S - before_S) / weight_S).clamp(0, 1)


def _restrict(probs_SV: Tensor, sampling: SamplingParams) -> Tensor:
    """Zero the tokens that top-k and top-p exclude; the most likely token always stays."""
    if 0 < sampling.top_k < probs_SV.shape[-1]:
        kept = torch.zeros_like(probs_SV, dtype=torch.bool)
        kept.scatter_(-1, probs_SV.topk(sampling.top_k, dim=-1).indices, True)
        probs_SV = probs_SV.where(kept, 0.0)
    return _nucleus(probs_SV, sampling.top_p) if sampling.top_p < 1 else probs_SV


def _nucleus(probs_SV: Tensor, top_p: float) -> Tensor:
    """Zero tokens that start beyond a share ``top_p`` of the mass, most likely first; of equals, lower ids first."""
    if probs_SV.device.type == "cpu" and probs_SV.shape[-1] > BUCKETS:
        return _nucleus_by_buckets(probs_SV, top_p)
    wide = torch.float32 if probs_SV.device.type == "mps" else torch.float64
    mass_S1 = top_p * probs_SV.sum(-1, keepdim=True, dtype=wide)
    return probs_SV.masked_fill(_mass_before(probs_SV, wide) >= mass_S1, 0.0)


def _mass_before(probs_SN: Tensor, dtype: torch.dtype) -> Tensor:
    """The mass of more likely tokens; of equals, lower ids come first."""
    sorted_SN, order_SN = probs_SN.sort(dim=-1, descending=True, stable=True)
    before_SN = sorted_SN.cumsum(-1, dtype=dtype) - sorted_SN
    return torch.zeros_like(before_SN).scatter_(-1, order_SN, before_SN)


def _nucleus_by_buckets(probs_SV: Tensor, top_p: float) -> Tensor:
    """Find the bucket of probabilities in which the nucleus ends, and sort only its tokens."""
    # Floats from 0 to 1 have the order of their bits. The limits are for NaN, which is reported later.
    bucket_SV = (probs_SV.view(torch.int32) >> BUCKET_BITS).clamp_(0, BUCKETS - 1).long()
    mass_SN = probs_SV.new_zeros(len(probs_SV), BUCKETS, dtype=torch.float64)
    mass_SN.scatter_add_(-1, bucket_SV, probs_SV.double())
    from_SN = mass_SN.flip(-1).cumsum(-1).flip(-1)  # mass of a bucket and all above
    above_SN = torch.nn.functional.pad(from_SN[:, 1:], (0, 1))
    mass_S1 = top_p * from_SN[:, :1]
    last_S1 = (above_SN >= mass_S1).sum(-1, keepdim=True).clamp_max(BUCKETS - 1)
    row_N, id_N = (bucket_SV == last_S1).nonzero(as_tuple=True)  # by row, then by id
    count_S = torch.bincount(row_N, minlength=len(probs_SV))
    column_N = torch.arange(len(row_N)) - (count_S.cumsum(0) - count_S)[row_N]
    packed_SN = probs_SV.new_zeros(len(probs_SV), int(count_S.max()))
    packed_SN[row_N, column_N] = probs_SV[row_N, id_N]
    beyond_SN = above_SN.gather(-1, last_S1) + _mass_before(packed_SN, torch.float64) >= mass_S1
    kept_SV = probs_SV.where(bucket_SV >= last_S1, 0.0)
    kept_SV[row_N, id_N] = packed_SN.masked_fill(beyond_SN, 0.0)[row_N, column_N]
    return kept_SV
