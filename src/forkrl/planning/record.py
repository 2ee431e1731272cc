"""A plan in plain values, as ``forkrl plan --json`` prints it."""

from __future__ import annotations

import math
from typing import Any

from forkrl.config import TrainConfig
from forkrl.planning.compute import Assumptions, Timing
from forkrl.planning.memory import HEADROOM, Phase, Plan, full_length
from forkrl.planning.shapes import ModelShape

NOT_MODELLED = (
    "fragmentation of the allocator, the CUDA context, buffers of NCCL, kernels' workspaces and the gradients that "
    f"flow through a layer during its backward: {HEADROOM:.0%} of the GPU is left to all of them",
    "micro-batches that verl balances by their work, and which may then hold more tokens than the limit",
    "the spread of lengths: attention costs more, and the end of a rollout runs emptier, than with all responses of "
    "the mean length",
    "the time of verifiers, of moving weights to the sampling engine, of offloading, of checkpoints and of start-up",
    "communication between GPUs and the launching of kernels, except as part of --mfu and --rollout-efficiency",
)
SMALL_MODEL = 100e6
"""Below this many parameters launching kernels takes longer than running them."""


def plan_record(config: TrainConfig, plan: Plan, timing: Timing, assumed: Assumptions) -> dict[str, Any]:
    """A plan in plain values: bytes, and seconds unless the key says hours."""
    layout, fit, decoding, run_s = plan.layout, plan.rollout, timing.decoding, timing.run_s
    sequences = math.ceil(config.rollout.prompts_per_step * assumed.oversampling) * config.rollout.group_size
    return {
        "model": {"path": config.model.path, "parameters": plan.shape.parameters} | plan.shape._asdict(),
        "engine": config.runtime.trainer,
        "layout": {**layout._asdict(), "gpus": layout.gpus, "workers": layout.workers},
        "gpu": {**plan.gpu._asdict(), "usable": (1 - HEADROOM) * plan.gpu.memory},
        "assumed": assumed._asdict(),
        "phases": [
            _phase_record(phase) | {"status": plan.status(phase), "why": plan.why(phase)} for phase in plan.phases
        ],
        "host": [_phase_record(phase) for phase in plan.host],
        "rollout": {
            "cache_bytes_per_token": fit.cache_per_token,
            "full_length": fit.full_length,
            "room_full": fit.room_full,
            "limit": fit.limit,
            "at_once_full": fit.at_once,
            "sequences": sequences,
            "waves_full": -(-sequences // fit.at_once) if fit.at_once else None,
            "decoding": None if decoding is None else decoding._asdict(),
        },
        "step": {
            "parts": [part._asdict() for part in timing.parts],
            "flops": sum(part.flops for part in timing.parts),
            "seconds": timing.step_s,
        },
        "run": {
            "steps": timing.steps,
            "evaluation_seconds": timing.evaluation_s,
            "hours": None if run_s is None else run_s / 3600,
            "gpu_hours": None if run_s is None else run_s * layout.gpus / 3600,
        },
        "fits": plan.fits,
        "warnings": _warnings(config, plan.shape),
        "not_modelled": list(NOT_MODELLED),
    }


def _phase_record(phase: Phase) -> dict[str, Any]:
    items = [{"name": item.name, "bytes": item.num_bytes, "note": item.note} for item in phase.items]
    return {"name": phase.name, "bytes": phase.num_bytes, "items": items}


def _warnings(config: TrainConfig, shape: ModelShape) -> list[str]:
    length, overrides = full_length(config), config.cluster.overrides
    fused = any("use_fused_kernels" in text for text in overrides)
    checks = (
        (
            shape.max_positions is not None and length > shape.max_positions,
            f"prompts and responses of {length:,} tokens are longer than the {shape.max_positions or 0:,} positions "
            f"that the model is declared to handle",
        ),
        (config.runtime.device == "cpu", 'runtime.device = "cpu": the figures are still those of the GPU'),
        (
            shape.parameters < SMALL_MODEL,
            "the model is so small that launching kernels takes most of its time: the times are far too short",
        ),
        (
            config.model.precision == "fp32",
            "model.precision = fp32: the GPU's rate is that of bf16; give a much lower --mfu",
        ),
        (
            bool(overrides),
            "cluster.overrides are not read"
            + (": the logits are counted as verl holds them without fused kernels" if fused else ""),
        ),
    )
    return [text for found, text in checks if found]
