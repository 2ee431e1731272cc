"""SAPO (arXiv 2511.20347): a sigmoid of the ratio in place of the clip."""

from __future__ import annotations

import torch
from torch import Tensor

from forkrl.method.objectives.options import require_positive
from forkrl.method.signals import Terms


def sapo(terms: Terms, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Tensor:
    """``-(4 / tau) sigmoid(tau (r - 1)) A``, whose gradient at r = 1 is that of ``-r A``.

    ``tau`` is ``tau_positive`` where A > 0, else ``tau_negative``; the larger it is, the faster the gradient falls
    off as r departs from 1.
    """
    require_positive("tau_positive", tau_positive)
    require_positive("tau_negative", tau_negative)
    advantages_BT = terms.advantages
    tau_BT = torch.full_like(advantages_BT, tau_negative).masked_fill_(advantages_BT > 0, tau_positive)
    return -(4 / tau_BT) * torch.sigmoid(tau_BT * (terms.log_ratio.exp() - 1)) * advantages_BT
