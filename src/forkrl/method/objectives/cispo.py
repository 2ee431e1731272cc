"""CISPO (MiniMax-M1, arXiv 2506.13585): every token has a gradient, weighted by a clipped ratio."""

from __future__ import annotations

from torch import Tensor

from forkrl.method.objectives.options import require_range
from forkrl.method.signals import Terms


def cispo(terms: Terms, *, clip_below: float = 1.0) -> tuple[Tensor, Tensor]:
    """``-sg(clip(r, 1 - clip_below, 1 + clip_high)) A ln p``.

    The default has no lower bound, as in the paper's runs, TRL and verl's recipe.
    """
    require_range("clip_below", clip_below, 0, 1)
    ratio_BT = terms.log_ratio.detach().exp()
    weight_BT = ratio_BT.clamp(1 - clip_below, 1 + terms.clip_high)
    return -weight_BT * terms.advantages * terms.logprobs, weight_BT != ratio_BT
