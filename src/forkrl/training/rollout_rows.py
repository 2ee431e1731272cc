"""Responses as rows of ``rollouts/*.parquet``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from forkrl.method.selection import rule_options, select
from forkrl.method.signals import Signals
from forkrl.methods import mask_of
from forkrl.model.token_texts import TokenTexts
from forkrl.types import Rollout, RolloutGroup

if TYPE_CHECKING:  # avoids importing pydantic
    from forkrl.config import SelectionConfig

Value = TypeVar("Value", float, bool)


def rollout_rows(
    step: int,
    groups: Sequence[RolloutGroup],
    tokenizer: PreTrainedTokenizerBase,
    selected: Sequence[Sequence[bool]],
    rewards: Sequence[float] | None = None,
    advantages: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """One row per response, with ``run_folder.rollout_schema``.

    ``selected`` has a bool for each token of a response that the model wrote. At the other tokens, log-prob and entropy
    are NaN.
    """
    texts = TokenTexts(tokenizer)
    judged = [
        (group.prompt, rollout, score)
        for group in groups
        for rollout, score in zip(group.rollouts, group.scores, strict=True)
    ]
    return [
        {
            "step": step,
            "prompt_id": prompt.id,
            "prompt": prompt.text,
            "response": rollout.text,
            "token_ids": list(rollout.response_ids),
            "tokens": [texts[token_id] for token_id in rollout.response_ids],
            "logprobs": _spread(rollout, rollout.logprobs.tolist(), math.nan),
            "entropy": _spread(rollout, rollout.entropy.tolist(), math.nan),
            "selected": _spread(rollout, selected[row], False),
            "score": score,
            "reward": score if rewards is None else rewards[row],
            "advantage": None if advantages is None else advantages[row],
            "finished": rollout.finished,
        }
        for row, (prompt, rollout, score) in enumerate(judged)
    ]


def _spread(rollout: Rollout, values: Sequence[Value], otherwise: Value) -> list[Value]:
    """A value for each token of the response, from those of the tokens that the model wrote."""
    if not rollout.written:
        return list(values)
    own = iter(values)
    return [next(own) if written else otherwise for written in rollout.written]


def evaluation_rows(
    step: int,
    groups: Sequence[RolloutGroup],
    tokenizer: PreTrainedTokenizerBase,
    selection: SelectionConfig,
    *,
    seed: int,
) -> list[dict[str, Any]]:
    """Rows of an evaluation; ``selected`` is what the rule would select from these responses.

    A rule that reads more than entropies and log-probs selects nothing here: the responses have no advantage.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    selected_BT = torch.zeros(len(rollouts), max(len(rollout) for rollout in rollouts), dtype=torch.bool)
    if mask_of(selection.rule).reads <= {"entropy", "logprobs"}:
        signals = signals_of_rollouts(rollouts, torch.Generator().manual_seed(seed))
        selected_BT = select(signals, selection.rule, selection.ratio, rule_options(selection))
    selected = [row_T[: len(rollout)].tolist() for row_T, rollout in zip(selected_BT, rollouts, strict=True)]
    return rollout_rows(step, groups, tokenizer, selected)


def signals_of_rollouts(rollouts: Sequence[Rollout], generator: torch.Generator) -> Signals:
    """Entropies and log-probs of responses without advantages or rewards."""
    mask_BT, logprobs_BT, entropy_BT = (
        pad_sequence([change(rollout) for rollout in rollouts], batch_first=True)
        for change in (lambda each: torch.ones(len(each), dtype=torch.bool), lambda each: each.logprobs,
                       lambda each: each.entropy)
    )  # fmt: skip
    no_B = torch.zeros(len(rollouts))
    return Signals(mask_BT, entropy_BT, logprobs_BT, logprobs_BT, no_B, no_B, no_B.long(), generator=generator)
