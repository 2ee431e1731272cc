"""Runs the mask, weights and objective of a recipe on a few made-up tokens, so that mistakes are found at the start."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from forkrl.errors import TrainingHalted, UserError, first_line
from forkrl.method.loss import Counts, step_loss
from forkrl.method.selection import choose
from forkrl.method.signals import Signals
from forkrl.types import TokenStats

if TYPE_CHECKING:  # avoids importing pydantic
    from forkrl.config import LossConfig, SelectionConfig, WeightsConfig


def try_methods(selection: SelectionConfig, weights: WeightsConfig, loss: LossConfig) -> None:
    """Raise UserError for a method that cannot be loaded, fails, or returns something else than it should."""
    mask_BT = torch.tensor([[True, True, True, False], [True, True, True, True]])
    logprobs_BT = torch.where(mask_BT, torch.linspace(-3.0, -0.1, 8).view(2, 4), 0.0).requires_grad_()
    entropy_BT = torch.where(mask_BT, torch.linspace(0.1, 2.0, 8).view(2, 4), 0.0)
    signals = Signals(
        response_mask=mask_BT,
        entropy=entropy_BT,
        logprobs=logprobs_BT.detach(),
        old_logprobs=logprobs_BT.detach(),
        advantages=torch.tensor([1.0, -1.0]),
        rewards=torch.tensor([1.0, 0.0]),
        groups=torch.zeros(2, dtype=torch.int64),
        clip=(loss.clip_low, loss.clip_high),
        generator=torch.Generator(),
    )
    table = "selection and weights"
    try:
        choice = choose(signals, selection, weights, [torch.arange(2)])
        table = "loss"
        total, _ = step_loss(
            TokenStats(logprobs_BT, entropy_BT),
            logprobs_BT.detach(),
            signals.advantages,
            mask_BT,
            choice.selected_BT,
            Counts(7, max(1, int(choice.selected_BT.sum())), 2),
            loss,
            logprobs_BT.detach(),
        )
        torch.autograd.grad(total, logprobs_BT, allow_unused=True)
    except UserError:
        raise
    except TrainingHalted as error:
        raise UserError(f'loss.objective = "{loss.objective}" on a few made-up tokens: {error}') from error
    except Exception as error:  # a user's function may raise anything
        names = f'"{loss.objective}"' if table == "loss" else f'"{selection.rule}" and "{weights.rule}"'
        reason = first_line(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"the methods of {table} ({names}) fail on a few made-up tokens: {reason}") from error
