"""The built-in masks, weights and objectives: where each is, and what it needs. Imports no torch.

A recipe may also name a function of the user as "module:function" (docs/methods.md); it is assumed to read everything.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Signal = Literal["entropy", "logprobs", "ratio", "advantage"]
"""What a method reads of tokens; "ratio": the current policy's probability over the old one."""


class Mask(NamedTuple):
    """``keeps_ratio``: it scores tokens, and selection.ratio of them are kept; else it decides for each token."""

    path: str
    reads: frozenset[Signal] = frozenset()
    keeps_ratio: bool = True


class Weight(NamedTuple):
    """``by_group``: it compares responses to the same prompt."""

    path: str
    reads: frozenset[Signal] = frozenset()
    by_group: bool = False


class Objective(NamedTuple):
    """How a token's loss follows from its ratio and advantage.

    ``all_tokens``: it reads the log-probs of whole responses. ``advantage``: how rewards of a group become advantages.
    ``per_response``: losses are means over tokens of a response, then over responses. ``reference``: it has a KL
    penalty of its own.
    """

    path: str
    all_tokens: bool = False
    advantage: Literal["standardised", "centred", "relative"] = "standardised"
    per_response: bool = False
    reference: bool = False


def _reads(*signals: Signal) -> frozenset[Signal]:
    return frozenset(signals)


_EVERYTHING = _reads("entropy", "logprobs", "ratio", "advantage")
_MASKS = "forkrl.method.masks."
MASKS: dict[str, Mask] = {
    "all": Mask(_MASKS + "plain:all_tokens", keeps_ratio=False),
    "top_entropy": Mask(_MASKS + "plain:top_entropy", _reads("entropy")),
    "bottom_entropy": Mask(_MASKS + "plain:bottom_entropy", _reads("entropy")),
    "random": Mask(_MASKS + "plain:random_tokens"),
    "threshold": Mask(_MASKS + "plain:threshold", _reads("entropy"), keeps_ratio=False),
    "low_probability": Mask(_MASKS + "plain:low_probability", _reads("logprobs")),
    "high_probability": Mask(_MASKS + "plain:high_probability", _reads("logprobs")),
    "gmts": Mask(_MASKS + "gmts:gmts", _reads("entropy", "ratio", "advantage")),
    "proximal_entropy": Mask(_MASKS + "proximal_entropy:proximal_entropy", _reads("entropy")),
    "rsi": Mask(_MASKS + "rsi:rsi", _reads("entropy", "logprobs"), keeps_ratio=False),
    "stapo": Mask(_MASKS + "stapo:stapo", _reads("entropy", "logprobs", "advantage"), keeps_ratio=False),
}

_WEIGHTS = "forkrl.method.weights."
WEIGHTS: dict[str, Weight] = {
    "w_reinforce": Weight(_WEIGHTS + "w_reinforce:w_reinforce", _reads("advantage")),
    "entropy_advantage": Weight(_WEIGHTS + "entropy_advantage:entropy_advantage", _reads("entropy", "advantage")),
    "proximal_entropy": Weight(_WEIGHTS + "proximal_entropy:proximal_entropy", _reads("entropy", "advantage")),
    "steer": Weight(_WEIGHTS + "steer:steer", _EVERYTHING),
    "stare": Weight(_WEIGHTS + "stare:stare", _reads("entropy", "logprobs", "advantage")),
    "prob_reweight": Weight(_WEIGHTS + "prob_reweight:prob_reweight"),  # of the old policy, known before the step
}
_OBJECTIVES = "forkrl.method.objectives."
OBJECTIVES: dict[str, Objective] = {
    "dapo": Objective(_OBJECTIVES + "dapo:dapo"),
    "cispo": Objective(_OBJECTIVES + "cispo:cispo"),
}


def mask_of(rule: str) -> Mask:
    return MASKS.get(rule) or Mask(rule, _EVERYTHING, keeps_ratio=False)


def weight_of(rule: str) -> Weight:
    return WEIGHTS.get(rule) or Weight(rule, _EVERYTHING)


def objective_of(name: str) -> Objective:
    return OBJECTIVES.get(name) or Objective(name)
