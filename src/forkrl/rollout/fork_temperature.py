"""Two temperatures: one at forks, one elsewhere (arXiv 2506.01939, eq. 5).

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
    """Softmax temperature ``high`` where the *unscaled* distribution's entropy exceeds ``threshold``, else ``low``.

    In ``transformers``, with its own warpers off (``top_k`` is 50 by default)::

        model.generate(..., do_sample=True, top_k=0, logits_processor=[ForkTemperature(1.0, 0.3, threshold=0.672)])

    In ForkRL: ``SamplingParams.fork_temperature``; in vLLM: see ``vllm_fork_temperature.py``.

    Args:
        high: temperature at forks; 0 is greedy (ties: lowest token id).
        low: temperature elsewhere; 0 is greedy.
        threshold: nats. The paper's 0.672 is the 80th percentile of its model's entropies; use your model's.

    Raises:
        ValueError: a value is negative, infinite, NaN or not a number.
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
            input_ids: ignored.
            scores: logits ``[B, V]`` or ``[V]`` of any floating dtype; -inf excludes a token.

        Returns:
            New scores of the same shape and dtype. Rows with NaN or +inf, or only -inf, are unchanged: the sampler must
            see them, and checking would add a host synchronisation.
        """
        require_tensors(scores=scores)
        return self.rescale(scores, entropy_of(scores))

    def rescale(self, scores: Tensor, entropy: Tensor) -> Tensor:
        """The same for known entropies (fp32 ``[B]``, scalar for one row); at temperature 1 rows are unchanged."""
        fp_scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        forks_B1 = entropy[..., None] > self.threshold
        rescaled = torch.where(forks_B1, _at(fp_scores, self.high), _at(fp_scores, self.low))
        # A row without a finite maximum has no softmax; rescaling would hide that.
        usable_B1 = fp_scores.amax(-1, keepdim=True).isfinite()
        return torch.where(usable_B1, rescaled, fp_scores).to(scores.dtype)


def entropy_of(scores: Tensor) -> Tensor:
    """Softmax entropy (nats, fp32 ``[B]``) of every row; NaN for rows without a softmax."""
    entropy: Tensor = torch.special.entr(torch.log_softmax(scores.float(), dim=-1).exp()).sum(-1)
    return entropy


def _at(scores: Tensor, temperature: float) -> Tensor:
    if temperature == 1:
        return scores
    if temperature == 0:
        likeliest = scores.argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, likeliest, scores.gather(-1, likeliest))
    # Differences are at most 0, so overflow gives only -inf.
    return (scores - scores.amax(-1, keepdim=True)) / temperature
