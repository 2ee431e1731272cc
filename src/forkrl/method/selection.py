"""Selection rules and scopes. Axes: ``B`` sequences, ``T`` token positions, ``N`` response tokens in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from forkrl.errors import UserError
from forkrl.method.plugins import load_method
from forkrl.method.signals import Signals
from forkrl.method.top_k import CHUNK, keep_highest
from forkrl.methods import MASKS, has_count, mask_of, weight_of
from forkrl.types import require_tensors

if TYPE_CHECKING:  # avoids importing pydantic
    from forkrl.config import SelectionConfig, WeightsConfig


class Choice(NamedTuple):
    """Selected tokens, bool ``[B, T]``, and factors of their advantages, fp32 ``[B, T]`` (None: 1)."""

    selected_BT: Tensor
    weights_BT: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> Choice:
        """Both changed in the same way."""
        return Choice(change(self.selected_BT), None if self.weights_BT is None else change(self.weights_BT))


ENTROPY_RULES = [name for name, mask in MASKS.items() if mask.reads <= {"entropy"}]
"""Masks that read nothing but entropies."""


def select_tokens(
    entropy: Tensor,
    response_mask: Tensor,
    rule: str = "top_entropy",
    ratio: float = 0.2,
    *,
    threshold: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Select response tokens, ``1[H >= tau]`` of eq. 6 (arXiv 2506.01939v2), with tau taken over all given tokens.

    "top_entropy", "bottom_entropy" and "random" keep exactly ``max(1, ceil(ratio * N))`` of the N response tokens; ties
    go to the earliest. "all" keeps every token, "threshold" those with entropy >= ``threshold``. Tokens outside the
    response are neither read nor selected.

    Args:
        entropy: nats, floating point, any shape.
        response_mask: bool, same shape.
        rule: one of ``ENTROPY_RULES``.
        ratio: fraction to keep, in (0, 1].
        threshold: nats; required by rule "threshold", forbidden otherwise.
        generator: for "random".

    Returns:
        bool, shape of ``response_mask``.

    Raises:
        ValueError: shapes or dtypes disagree, the rule is unknown, ratio or threshold is out of range, or the rule
            reads an entropy that is NaN or infinite.
        TypeError: ``entropy`` or ``response_mask`` is not a tensor.
    """
    _check_request(entropy, response_mask, rule, threshold)
    signals = _of_entropies(entropy.detach(), response_mask, generator)
    options = {} if threshold is None else {"threshold": threshold}
    selected: Tensor = select(signals, rule, ratio, options).view(response_mask.shape)
    return selected


def select(signals: Signals, rule: str, ratio: float, options: Mapping[str, Any] | None = None) -> Tensor:
    """Apply a mask (``docs/methods.md``) to all tokens of some sequences; ``[B, T]`` bool.

    Raises:
        UserError: the rule cannot be loaded, or its result has another shape.
        ValueError: a score or a signal that the rule reads is NaN or infinite, or an option is out of range.
    """
    mask_BT, mask = signals.response_mask, mask_of(rule)
    if not mask_BT.any():
        return torch.zeros_like(mask_BT)
    for name in ("entropy", "logprobs"):
        if name in mask.reads:
            _require_finite(name, _of_response(getattr(signals, name), mask_BT))
    found_BT = load_method("selection.rule", rule, mask.path, options or {})(signals)
    if found_BT.shape != mask_BT.shape:
        raise UserError(f'selection.rule = "{rule}" returned {tuple(found_BT.shape)} for tokens {tuple(mask_BT.shape)}')
    if found_BT.dtype == torch.bool:
        return torch.where(mask_BT, found_BT, False)
    scores_N = _of_response(found_BT, mask_BT)
    _require_finite("score", scores_N)
    kept_N = keep_highest(scores_N, num_selected(len(scores_N), ratio))
    kept_BT: Tensor = torch.zeros_like(mask_BT).masked_scatter_(mask_BT, kept_N)
    return kept_BT


def _of_entropies(entropy: Tensor, response_mask: Tensor, generator: torch.Generator | None) -> Signals:
    """Signals of any shape, of which only the entropy is known."""
    entropy_BT, mask_BT = (each if each.ndim == 2 else each.reshape(1, -1) for each in (entropy, response_mask))
    no_B, none_BT = entropy_BT.new_zeros(len(entropy_BT)), entropy_BT.new_zeros(1).expand_as(entropy_BT)
    groups_B = torch.zeros(len(entropy_BT), dtype=torch.int64, device=entropy.device)
    return Signals(mask_BT, entropy_BT, none_BT, none_BT, no_B, no_B, groups_B, generator=generator)


def _require_finite(name: str, values_N: Tensor) -> None:
    if num_bad := sum(int((~part.isfinite()).sum()) for part in values_N.split(CHUNK)):
        raise ValueError(f"{name} is NaN or infinite at {num_bad} of {len(values_N)} response tokens")


def select_tokens_per_sequence(
    entropy: Tensor,
    response_mask: Tensor,
    rule: str = "top_entropy",
    ratio: float = 0.2,
    *,
    threshold: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """:func:`select_tokens` within each sequence of ``[B, T]``."""
    _check_request(entropy, response_mask, rule, threshold)
    selected_BT = torch.zeros_like(response_mask)
    for row, (entropy_T, mask_T) in enumerate(zip(entropy, response_mask, strict=True)):
        selected_BT[row] = select_tokens(entropy_T, mask_T, rule, ratio, threshold=threshold, generator=generator)
    return selected_BT


def entropy_threshold(entropy: Tensor, selected_mask: Tensor) -> Tensor:
    """The lowest selected entropy (tau of eq. 6), a scalar; NaN if none is selected."""
    require_tensors(entropy=entropy, selected_mask=selected_mask)
    entropy_N = entropy.detach()[selected_mask]
    return entropy_N.min() if len(entropy_N) else entropy.new_full((), math.nan)


def _of_response(entropy: Tensor, response_mask: Tensor) -> Tensor:
    """Response entropies ``[N]`` in reading order, gathered in chunks because a full index needs more memory."""
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
    if rule not in ENTROPY_RULES:
        raise ValueError(f"rule = {rule!r} is unknown, or reads more than entropies; choose one of {ENTROPY_RULES}")
    if (threshold is None) == (rule == "threshold"):
        raise ValueError('threshold goes with rule "threshold", and only with it')
    if threshold is not None and not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold = {threshold} must be a finite entropy of at least 0 nats")


def num_selected(num_tokens: int, ratio: float) -> int:
    """``max(1, ceil(ratio * num_tokens))`` in exact decimals (0.1 x 30 is 3); 0 of no tokens."""
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio = {ratio} must lie in (0, 1]")
    if num_tokens == 0:
        return 0
    # Doubles give 0.1 * 30 > 3; twelve digits make 0.1 + 0.2 equal 0.3.
    return max(1, math.ceil(Fraction(f"{ratio:.12g}") * num_tokens))


def choose(
    signals: Signals, selection: SelectionConfig, weights: WeightsConfig, micro_batches: Sequence[Tensor]
) -> Choice:
    """Selected tokens and weights of a mini-batch (or rollout batch); ``micro_batches`` are row indices.

    Raises UserError and ValueError as :func:`select`.
    """
    mask_BT, weight = signals.response_mask, None
    if weights.rule != "none":
        path = weight_of(weights.rule).path
        weight = load_method("weights.rule", weights.rule, path, weights.options)
    selected_BT = torch.zeros_like(mask_BT)
    weights_BT = None if weight is None else torch.ones(mask_BT.shape, device=mask_BT.device)
    for rows_B in _parts(len(mask_BT), selection.scope, micro_batches):
        part = signals if selection.scope in ("mini_batch", "rollout_batch") else signals.rows(rows_B)
        selected_BT[rows_B] = select(part, selection.rule, selection.ratio, rule_options(selection))
        if weight is not None and weights_BT is not None:
            weights_BT[rows_B] = _checked_weights(weights.rule, weight(part), part.response_mask)
    return Choice(selected_BT, weights_BT)


def _parts(num_rows: int, scope: str, micro_batches: Sequence[Tensor]) -> Sequence[Tensor]:
    """The rows over which a method is applied at a time, in order; those of a whole batch keep their order."""
    if scope == "micro_batch":
        return micro_batches
    rows_B = torch.arange(num_rows)
    return list(rows_B[:, None]) if scope == "sequence" else [rows_B]


def _checked_weights(rule: str, weights_BT: Tensor, mask_BT: Tensor) -> Tensor:
    if weights_BT.shape != mask_BT.shape:
        raise UserError(f'weights.rule = "{rule}" returned {tuple(weights_BT.shape)} for tokens {tuple(mask_BT.shape)}')
    weights_BT = torch.where(mask_BT, weights_BT.detach().float(), 1.0)
    _require_finite("weight", weights_BT[mask_BT])
    return weights_BT


def rule_options(config: SelectionConfig) -> Mapping[str, Any]:
    """Keyword arguments of the rule."""
    return config.options if config.threshold is None else {"threshold": config.threshold}


def count_selected(response_mask_BT: Tensor, config: SelectionConfig, micro_batches: Sequence[Tensor]) -> int:
    """The number of tokens that the rule will select, for "all" and rules that keep ``ratio``."""
    if not has_count(config.rule):
        raise ValueError(f'rule "{config.rule}" has no count before it has seen the signals')
    lengths_B = response_mask_BT.sum(1)
    if config.rule == "all":
        return int(lengths_B.sum())
    if config.scope == "sequence":
        return sum(num_selected(length, config.ratio) for length in lengths_B.tolist())
    if config.scope in ("mini_batch", "rollout_batch"):
        return num_selected(int(lengths_B.sum()), config.ratio)
    return sum(num_selected(int(lengths_B[rows_B].sum()), config.ratio) for rows_B in micro_batches)
