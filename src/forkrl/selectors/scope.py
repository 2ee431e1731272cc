"""Over which tokens a fraction is taken: one micro-batch (the paper), the mini-batch, the rollout batch, a sequence.

Axes: ``B`` sequences of a mini-batch, ``T`` token positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from forkrl.selectors import RULES, num_selected, select_tokens, select_tokens_per_sequence

if TYPE_CHECKING:  # pydantic, which only reading a recipe needs
    from forkrl.config import SelectionConfig


def select_in_scope(
    entropy_BT: Tensor,
    response_mask_BT: Tensor,
    config: SelectionConfig,
    micro_batches: Sequence[Tensor],
    generator: torch.Generator,
) -> Tensor:
    """The trained tokens of a mini-batch, ``[B, T]`` bool, by the configured rule in the configured scope.

    Of a rollout batch, where that is the scope.

    Args:
        entropy_BT: nats; read only by rules that look at entropy.
        response_mask_BT: bool.
        config: rule, ratio, threshold, scope.
        micro_batches: row indices, as the mini-batch is cut.
        generator: what "random" draws from.

    Raises:
        ValueError: the rule reads an entropy that is NaN or infinite.
    """

    def select(function: Callable[..., Tensor], rows: Tensor | slice) -> Tensor:
        return function(
            entropy_BT[rows],
            response_mask_BT[rows],
            config.rule,
            config.ratio,
            threshold=config.threshold,
            generator=generator,
        )

    if config.scope == "sequence":
        return select(select_tokens_per_sequence, slice(None))
    if config.scope in ("mini_batch", "rollout_batch"):
        return select(select_tokens, slice(None))
    selected_BT = torch.zeros_like(response_mask_BT)
    for rows_B in micro_batches:
        selected_BT[rows_B] = select(select_tokens, rows_B)
    return selected_BT


def reads_current_entropy(config: SelectionConfig) -> bool:
    """Whether the rule looks at the entropies of the weights as they are, not at those of the rollout."""
    return RULES[config.rule].reads_entropy and config.entropy == "current"


def needs_entropy_ahead(config: SelectionConfig) -> bool:
    """Whether the selection needs the current policy's entropies of the whole mini-batch before the first loss.

    It does where tokens of different micro-batches compete, and where the number of selected tokens, which the loss
    divides by, cannot be told from counts alone.
    """
    return reads_current_entropy(config) and (config.scope == "mini_batch" or config.rule == "threshold")


def count_selected(response_mask_BT: Tensor, config: SelectionConfig, micro_batches: Sequence[Tensor]) -> int:
    """How many tokens a rule with a fixed count will select, known before any entropy is.

    Raises:
        ValueError: the rule "threshold" has no count before it has seen the entropies.
    """
    if config.rule == "threshold":
        raise ValueError('rule "threshold" has no count before it has seen the entropies')
    lengths_B = response_mask_BT.sum(1)
    if config.rule == "all":
        return int(lengths_B.sum())
    if config.scope == "sequence":
        return sum(num_selected(length, config.ratio) for length in lengths_B.tolist())
    if config.scope in ("mini_batch", "rollout_batch"):
        return num_selected(int(lengths_B.sum()), config.ratio)
    return sum(num_selected(int(lengths_B[rows_B].sum()), config.ratio) for rows_B in micro_batches)
