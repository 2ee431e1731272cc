"""Responses as rows of ``rollouts/*.parquet``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from forkrl.method.selection import select_tokens
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
    """Rows of an evaluation; ``selected`` is what the rule would select from these responses."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    entropy_N = torch.cat([rollout.entropy for rollout in rollouts])
    selected_N = select_tokens(
        entropy_N,
        torch.ones_like(entropy_N, dtype=torch.bool),
        selection.rule,
        selection.ratio,
        threshold=selection.threshold,
        generator=torch.Generator().manual_seed(seed),
    )
    selected = [part.tolist() for part in selected_N.split([len(rollout) for rollout in rollouts])]
    return rollout_rows(step, groups, tokenizer, selected)
