"""Signals of a few tokens, for tests of masks, weights and objectives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from forkrl.method.signals import Signals
from forkrl.types import TokenBatch


def signals_of(response_mask: Tensor, **given: Any) -> Signals:
    """Zeros where nothing is ``given``; every sequence is of another prompt. Old log-probs equal the current ones."""
    none_BT, none_B = torch.zeros(response_mask.shape), torch.zeros(len(response_mask))
    logprobs = given.get("logprobs", none_BT)
    values: dict[str, Any] = {
        "entropy": none_BT, "logprobs": logprobs, "old_logprobs": logprobs, "advantages": none_B, "rewards": none_B,
        "groups": torch.arange(len(response_mask)),
    }  # fmt: skip
    return Signals(response_mask, **(values | given))


def in_pairs(batch: TokenBatch) -> TokenBatch:
    """The batch as two responses to each prompt, one of them right."""
    return replace(batch, groups=torch.arange(len(batch)) // 2, rewards=(torch.arange(len(batch)) % 2).float())
