"""The masks of the paper and the controls: by entropy, by probability, at random.

A mask takes the signals of some sequences and returns, in the shape ``[B, T]``, scores, of which ``selection.ratio`` of
the tokens with the highest are kept, or bools. Values outside the response are not read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forkrl.method.signals import Signals


def all_tokens(signals: Signals) -> Tensor:
    """Plain DAPO."""
    return signals.response_mask


def top_entropy(signals: Signals) -> Tensor:
    """The forking tokens (arXiv 2506.01939v2, eq. 6)."""
    return signals.entropy


def bottom_entropy(signals: Signals) -> Tensor:
    """The paper's control (fig. 7)."""
    return -signals.entropy


def random_tokens(signals: Signals) -> Tensor:
    """The same number, uniformly (cf. arXiv 2605.07660)."""
    mask_BT, generator = signals.response_mask, signals.generator
    num_tokens = int(mask_BT.sum())
    drawn_on = mask_BT.device if generator is None else generator.device
    order_N = torch.randperm(num_tokens, generator=generator, device=drawn_on).to(mask_BT.device)
    rank_N = torch.empty_like(order_N)
    rank_N[order_N] = torch.arange(num_tokens, device=mask_BT.device)
    # fp64 holds ranks up to 2^53.
    return torch.zeros(mask_BT.shape, dtype=torch.float64, device=mask_BT.device).masked_scatter_(
        mask_BT, -rank_N.double()
    )


def threshold(signals: Signals, *, threshold: float) -> Tensor:
    """A fixed bound for the whole run (the paper's 80th percentile is 0.672 nats)."""
    return signals.entropy >= threshold


def low_probability(signals: Signals) -> Tensor:
    """The least likely tokens (cf. arXiv 2505.12929)."""
    return -signals.logprobs


def high_probability(signals: Signals) -> Tensor:
    """The control of ``low_probability``."""
    return signals.logprobs
