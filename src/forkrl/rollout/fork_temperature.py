"""Two temperatures: one where the model forks, one elsewhere (arXiv 2506.01939, eq. 5).

Shapes: ``B`` sequences, ``V`` vocabulary; a single row ``[V]`` works like a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from forkrl.types import require_tensors


@dataclass(frozen=True)
class ForkTemperature(LogitsProcessor):
    """Softmax temperature ``high`` where the *unscaled* distribution has an entropy above ``threshold``, else ``low``.

    In ``transformers``, with generate's own shaping switched off, of which its ``top_k`` of 50 is on unless told::

        model.generate(..., do_sample=True, top_k=0, logits_processor=[ForkTemperature(1.0, 0.3, threshold=0.672)])

    The engine of ForkRL takes it as ``SamplingParams.fork_temperature``; for vLLM see ``vllm_fork_temperature.py``.

    Args:
        high: temperature at forks. 0 is greedy: the likeliest token, of equals the one with the lowest id.
        low: temperature elsewhere; 0 likewise.
        threshold: nats. The paper's 0.672 is the 80th percentile of its model's entropies; take that of yours.

    Raises:
        ValueError: one of them is negative, infinite, NaN or no number.
    """

    high: float
    low: float
    threshold: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
                raise ValueError(f"{field.name} = {value!r}: must be a number from 0 up, and finite")

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        """Scores whose softmax is the two-temperature distribution.

        Args:
            input_ids: the tokens so far; they play no part.
            scores: logits ``[B, V]`` or ``[V]`` of any floating dtype; -inf excludes a token.

        Returns:
            New scores of the same shape and dtype. A row with NaN or +inf in it, or with nothing but -inf, is returned
            as it is: whoever samples meets it as without this processor, and no step waits for a check.
        """
        require_tensors(scores=scores)
        return self.rescale(scores, entropy_of(scores))

    def rescale(self, scores: Tensor, entropy: Tensor) -> Tensor:
        """The same, for entropies (fp32 ``[B]``, or a scalar for one row) that are known already.

        Where the temperature is 1, a row stays as it is to the last bit.
        """
        fp_scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        forks_B1 = entropy[..., None] > self.threshold
        rescaled = torch.where(forks_B1, _at(fp_scores, self.high), _at(fp_scores, self.low))
        # A row without a finite maximum has no softmax; dividing or masking it would only hide that.
        usable_B1 = fp_scores.amax(-1, keepdim=True).isfinite()
        return torch.where(usable_B1, rescaled, fp_scores).to(scores.dtype)


def entropy_of(scores: Tensor) -> Tensor:
    """Entropy (nats, fp32) of the softmax of every row; NaN where a row has none. Shape: that of ``scores`` but V."""
    entropy: Tensor = torch.special.entr(torch.log_softmax(scores.float(), dim=-1).exp()).sum(-1)
    return entropy


def _at(scores: Tensor, temperature: float) -> Tensor:
    """Scores at one temperature, in every row."""
    if temperature == 1:
        return scores
    if temperature == 0:
        likeliest = scores.argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, likeliest, scores.gather(-1, likeliest))
    # Below 0, a quotient can overflow only to -inf, which is what so small a probability rounds to.
    return (scores - scores.amax(-1, keepdim=True)) / temperature
