"""Which tokens carry gradient. A new rule is one file and one line in ``RULES``.

Axes: ``B`` sequences, ``T`` token positions, ``N`` response tokens in reading order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from forkrl.selectors.bottom_entropy import select_bottom_entropy
from forkrl.selectors.candidates import CHUNK, Candidates, num_selected
from forkrl.selectors.everything import select_everything
from forkrl.selectors.threshold import select_threshold
from forkrl.selectors.top_entropy import select_top_entropy
from forkrl.selectors.uniform_random import select_uniform_random
from forkrl.types import require_tensors

__all__ = ["RULES", "entropy_threshold", "num_selected", "select_tokens", "select_tokens_per_sequence"]


class Rule(NamedTuple):
    """A function from candidates to a bool per token; if it reads their entropy, that must be finite."""

    select: Callable[[Candidates], Tensor]
    reads_entropy: bool


RULES: dict[str, Rule] = {
    "all": Rule(select_everything, reads_entropy=False),
    "top_entropy": Rule(select_top_entropy, reads_entropy=True),
    "bottom_entropy": Rule(select_bottom_entropy, reads_entropy=True),
    "random": Rule(select_uniform_random, reads_entropy=False),
    "threshold": Rule(select_threshold, reads_entropy=True),
}


def select_tokens(
    entropy: Tensor,
    response_mask: Tensor,
    rule: str = "top_entropy",
    ratio: float = 0.2,
    *,
    threshold: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose response tokens, ``1[H >= tau]`` of eq. 6 (arXiv 2506.01939v2), with tau taken over all tokens given.

    "top_entropy", "bottom_entropy" and "random" keep exactly ``max(1, ceil(ratio * N))`` of the N response tokens; of
    equal entropies the earliest. "all" keeps every one, "threshold" those with entropy of at least ``threshold``. With
    no response token the selection is empty. What lies outside the response is neither read nor selected.

    Args:
        entropy: nats, floating point, any shape.
        response_mask: bool, same shape; True where the model itself wrote the token.
        rule: a key of ``RULES``.
        ratio: fraction to keep, in (0, 1].
        threshold: nats; goes with rule "threshold" and only with it.
        generator: what "random" draws from.

    Returns:
        bool, shape of ``response_mask``.

    Raises:
        ValueError: shapes or dtypes disagree, the rule is unknown, ratio or threshold is out of range, or the rule
            reads an entropy that is NaN or infinite.
        TypeError: ``entropy`` or ``response_mask`` is not a tensor.
    """
    _check_request(entropy, response_mask, rule, threshold)
    entropy_N = _of_response(entropy.detach(), response_mask)
    num_kept = num_selected(len(entropy_N), ratio)
    if len(entropy_N) == 0:
        return torch.zeros_like(response_mask)
    num_bad = sum(int((~part.isfinite()).sum()) for part in entropy_N.split(CHUNK)) if RULES[rule].reads_entropy else 0
    if num_bad:
        raise ValueError(f"entropy is NaN or infinite at {num_bad} of {len(entropy_N)} response tokens")
    selected_N = RULES[rule].select(Candidates(entropy_N, num_kept, threshold, generator))
    return torch.zeros_like(response_mask).masked_scatter_(response_mask, selected_N)


def select_tokens_per_sequence(
    entropy: Tensor,
    response_mask: Tensor,
    rule: str = "top_entropy",
    ratio: float = 0.2,
    *,
    threshold: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """:func:`select_tokens` within each sequence, so that every response keeps its own fraction.

    Args:
        entropy: ``[B, T]``, nats.
        response_mask: ``[B, T]`` bool.
        rule: as in :func:`select_tokens`, and so are the others.
        ratio: fraction of each sequence to keep, in (0, 1].
        threshold: nats, for rule "threshold".
        generator: what "random" draws from, sequence after sequence.

    Returns:
        ``[B, T]`` bool.

    Raises:
        ValueError, TypeError: as in :func:`select_tokens`.
    """
    _check_request(entropy, response_mask, rule, threshold)
    selected_BT = torch.zeros_like(response_mask)
    for row, (entropy_T, mask_T) in enumerate(zip(entropy, response_mask, strict=True)):
        selected_BT[row] = select_tokens(entropy_T, mask_T, rule, ratio, threshold=threshold, generator=generator)
    return selected_BT


def entropy_threshold(entropy: Tensor, selected_mask: Tensor) -> Tensor:
    """The lowest entropy among the selected tokens, tau of eq. 6, as a scalar to log; NaN if none is selected."""
    require_tensors(entropy=entropy, selected_mask=selected_mask)
    entropy_N = entropy.detach()[selected_mask]
    return entropy_N.min() if len(entropy_N) else entropy.new_full((), math.nan)


def _of_response(entropy: Tensor, response_mask: Tensor) -> Tensor:
    """The response's entropies ``[N]`` in reading order, gathered chunk by chunk: an index takes more than they do."""
    entropy_N, start = entropy.new_empty(int(response_mask.sum())), 0
    for part, mask in zip(entropy.flatten().split(CHUNK), response_mask.flatten().split(CHUNK), strict=True):
        chosen = part[mask]
        entropy_N[start : start + len(chosen)] = chosen
        start += len(chosen)
    return entropy_N


def _check_request(entropy: Tensor, response_mask: Tensor, rule: str, threshold: float | None) -> None:
    require_tensors(entropy=entropy, response_mask=response_mask)
    if entropy.shape != response_mask.shape:
        raise ValueError(f"entropy {tuple(entropy.shape)} and response_mask {tuple(response_mask.shape)} do not match")
    if response_mask.dtype != torch.bool or not entropy.is_floating_point():
        raise ValueError(f"entropy must be floating and response_mask bool; got {entropy.dtype}, {response_mask.dtype}")
    if rule not in RULES:
        raise ValueError(f"rule = {rule!r} is unknown; choose one of {list(RULES)}")
    if (threshold is None) == (rule == "threshold"):
        raise ValueError('threshold goes with rule "threshold", and only with it')
    if threshold is not None and not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold = {threshold} must be a finite entropy of at least 0 nats")
