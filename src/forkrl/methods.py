"""The built-in masks, weights and objectives: where each is, and what it needs. Imports no torch.

A recipe may also name a function of the user as "module:function" (docs/methods.md); it is assumed to read everything.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

Signal = Literal["entropy", "logprobs", "ratio", "advantage"]
"""What a method reads of tokens; "ratio": the current policy's probability over the old one."""
Clip = Literal["clip_low", "clip_high", "dual_clip"]


class Mask(NamedTuple):
    """``keeps_ratio``: it scores tokens, and selection.ratio of them are kept; else it decides for each token."""

    path: str
    reads: frozenset[Signal] = frozenset()
    keeps_ratio: bool = True


class Weight(NamedTuple):
    """A factor of each token's advantage."""

    path: str
    reads: frozenset[Signal] = frozenset()


class Objective(NamedTuple):
    """How a token's loss follows from its ratio and advantage.

    ``all_tokens``: it reads the log-probs of whole responses. ``advantage``: how rewards of a group become advantages.
    ``per_response``: losses are means over tokens of a response, then over responses. ``reference``: it has a KL
    penalty of its own. ``clips``: the settings of the clip that it reads. ``fixed_denominator``: it is defined with a
    constant ``loss.denominator``. ``ranks``: it compares advantages of tokens, so a factor of an advantage is no
    longer a factor of the loss. ``entropy``: it reads entropies.
    """

    path: str
    all_tokens: bool = False
    advantage: Literal["standardised", "centred", "relative"] = "standardised"
    per_response: bool = False
    reference: bool = False
    clips: tuple[Clip, ...] = ("clip_low", "clip_high", "dual_clip")
    fixed_denominator: bool = False
    ranks: bool = False
    entropy: bool = False


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
_RANGE: tuple[Clip, ...] = ("clip_low", "clip_high")
_OBJECTIVES = "forkrl.method.objectives."
OBJECTIVES: dict[str, Objective] = {
    "dapo": Objective(_OBJECTIVES + "dapo:dapo"),
    "cispo": Objective(_OBJECTIVES + "cispo:cispo", clips=("clip_high",)),
    "dr_grpo": Objective(_OBJECTIVES + "dapo:dapo", advantage="centred", fixed_denominator=True),
    "maxrl": Objective(_OBJECTIVES + "dapo:dapo", advantage="relative"),
    "gspo": Objective(_OBJECTIVES + "gspo:gspo", all_tokens=True, per_response=True, clips=_RANGE),
    "gmpo": Objective(_OBJECTIVES + "gmpo:gmpo", all_tokens=True, per_response=True, clips=_RANGE),
    "sapo": Objective(_OBJECTIVES + "sapo:sapo", per_response=True, clips=()),
    "dppo_tv": Objective(_OBJECTIVES + "dppo_tv:dppo_tv", clips=_RANGE),
    "clip_cov": Objective(_OBJECTIVES + "covariance:clip_cov", ranks=True),
    "kl_cov": Objective(_OBJECTIVES + "covariance:kl_cov", clips=(), ranks=True),
    "hapo": Objective(_OBJECTIVES + "hapo:hapo", all_tokens=True, entropy=True),
    "archer": Objective(
        _OBJECTIVES + "archer:archer", all_tokens=True, reference=True, clips=("dual_clip",), entropy=True
    ),
}


def mask_of(rule: str) -> Mask:
    return MASKS.get(rule) or Mask(rule, _EVERYTHING, keeps_ratio=False)


def weight_of(rule: str) -> Weight:
    return WEIGHTS.get(rule) or Weight(rule, _EVERYTHING)


def objective_of(name: str) -> Objective:
    return OBJECTIVES.get(name) or Objective(name, entropy=True)


class _Weights(Protocol):
    """``WeightsConfig``; this module imports nothing else of the package."""

    @property
    def rule(self) -> str: ...


class _Selection(_Weights, Protocol):
    """``SelectionConfig``."""

    @property
    def scope(self) -> str: ...
    @property
    def entropy(self) -> str: ...


def reads_current_policy(selection: _Selection, weights: _Weights) -> bool:
    """Whether mask or weights read the current policy's entropies or log-probs instead of the rollout's."""
    read = mask_of(selection.rule).reads
    if weights.rule != "none":
        read |= weight_of(weights.rule).reads
    return bool(read - {"advantage"}) and selection.entropy == "current"


def needs_pass_first(selection: _Selection, weights: _Weights) -> bool:
    """Whether the current policy's signals of the whole mini-batch are needed before the first loss."""
    # Tokens of different micro-batches compete, their number depends on the signals, or random numbers are drawn.
    together = selection.scope == "mini_batch" or selection.rule == "random" or not has_count(selection.rule)
    return reads_current_policy(selection, weights) and together


def has_count(rule: str) -> bool:
    """Whether the number of selected tokens is known before their signals are."""
    return rule == "all" or mask_of(rule).keeps_ratio
