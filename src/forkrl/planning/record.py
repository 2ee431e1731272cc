"""A plan as ``plan.json`` holds it. Memory is in bytes, time in seconds unless the key says hours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from forkrl.config import TrainConfig
from forkrl.planning.advice import Faster, Remedy
from forkrl.planning.compute import Assumptions
from forkrl.planning.memory import HEADROOM, Phase
from forkrl.planning.plan import NOT_MODELLED, Plan, Timing, warnings

SCHEMA = "forkrl-plan/1"


def plan_record(
    config: TrainConfig,
    plan: Plan,
    timing: Timing,
    assumed: Assumptions,
    *,
    source: str,
    remedies: Sequence[Remedy],
    faster: Sequence[Faster],
) -> dict[str, Any]:
    """Everything that was planned, in plain values."""
    layout, card, model = plan.layout, plan.card, {"path": config.model.path, "source": source}
    return {
        "schema": SCHEMA,
        "model": model | {"parameters": plan.shape.parameters} | plan.shape._asdict(),
        "engine": config.runtime.engine,
        "layout": {**layout._asdict(), "gpus": layout.gpus, "replicas": layout.replicas},
        "card": {**card._asdict(), "usable": (1 - HEADROOM) * card.memory},
        "assumed": assumed._asdict(),
        "phases": [
            _phase_record(phase) | {"verdict": plan.verdict(phase), "why": plan.why(phase)} for phase in plan.phases
        ],
        "host": [_phase_record(phase) for phase in plan.host],
        "rollout": _rollout_record(config, plan, timing, assumed),
        "step": {
            "parts": [part._asdict() for part in timing.parts],
            "flops": sum(part.flops for part in timing.parts),
            "seconds": timing.step_s,
        },
        "run": {
            "steps": timing.steps,
            "evaluation_seconds": timing.evaluation_s,
            "hours": hours(timing.run_s),
            "gpu_hours": hours(timing.run_s, layout.gpus),
        },
        "fits": plan.fits,
        "remedies": [_remedy_record(remedy) for remedy in remedies],
        "faster": [
            {"changes": [str(change) for change in each.changes], "hours": hours(each.timing.run_s)} for each in faster
        ],
        "warnings": warnings(config, plan),
        "not_modelled": list(NOT_MODELLED),
    }


def _rollout_record(config: TrainConfig, plan: Plan, timing: Timing, assumed: Assumptions) -> dict[str, Any]:
    rollout, decoding = plan.rollout, timing.decoding
    sequences = math.ceil(config.rollout.prompts_per_step * assumed.oversampling) * config.rollout.group_size
    return {
        "cache_bytes_per_token": rollout.cache_per_token,
        "full_length": rollout.full_length,
        "room_full": rollout.room_full,
        "limit": rollout.limit,
        "at_once_full": rollout.at_once,
        "sequences": sequences,
        "waves_full": -(-sequences // rollout.at_once) if rollout.at_once else None,
        "sequences_at_mean": (decoding.sequences or None) if decoding is not None else None,
        "tokens_per_s_per_gpu": decoding.tokens_per_s if decoding is not None else None,
        "bound": decoding.bound if decoding is not None else None,
    }


def _phase_record(phase: Phase) -> dict[str, Any]:
    return {
        "name": phase.name,
        "bytes": phase.num_bytes,
        "items": [{"name": item.name, "bytes": item.num_bytes, "note": item.note} for item in phase.items],
    }


def _remedy_record(remedy: Remedy) -> dict[str, Any]:
    return {
        "changes": [str(change) for change in remedy.changes],
        "gpus": remedy.gpus,
        "bytes": {phase.name: phase.num_bytes for phase in remedy.plan.phases},
    }


def hours(seconds: float | None, times: int = 1) -> float | None:
    """Seconds in hours, if they are known."""
    return None if seconds is None else seconds * times / 3600
