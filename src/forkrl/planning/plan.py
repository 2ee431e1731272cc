"""Everything that is planned of one recipe on one kind of GPU, and its JSON form."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from forkrl.config import TrainConfig
from forkrl.planning.compute import Assumptions, Decoding, Part, decode_rate, evaluation_seconds, find_parts
from forkrl.planning.gpus import GIB, Gpu
from forkrl.planning.memory import HEADROOM, Layout, Phase, RolloutFit, find_host, find_layout, find_phases, full_length
from forkrl.planning.shapes import ModelShape

FITS, TIGHT, TOO_LARGE = "fits", "tight", "does not fit"
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


class Plan(NamedTuple):
    """What a run needs."""

    shape: ModelShape
    layout: Layout
    gpu: Gpu
    phases: tuple[Phase, ...]
    host: tuple[Phase, ...]
    rollout: RolloutFit

    def verdict(self, phase: Phase) -> str:
        """Of one phase, against the GPU's memory."""
        if phase.num_bytes > self.gpu.memory or (phase.name == "rollout" and not self.rollout.room_full):
            return TOO_LARGE
        return TIGHT if phase.num_bytes > (1 - HEADROOM) * self.gpu.memory else FITS

    def why(self, phase: Phase) -> str:
        """What the sum of a phase does not show."""
        if phase.name != "rollout" or self.rollout.room_full:
            return ""
        one = in_gib(self.rollout.cache_per_token * self.rollout.full_length)
        if not self.layout.sharded:
            return f": after the rest there is no room for one sequence ({one})"
        share = in_gib(self.rollout.share)
        return f": the sampling engine's share, {share}, does not hold its weights and one sequence ({one})"

    @property
    def fits(self) -> bool:
        """Every phase, with the headroom."""
        return all(self.verdict(phase) == FITS for phase in self.phases)


class Timing(NamedTuple):
    """How long a run takes, if it fits."""

    decoding: Decoding | None
    parts: tuple[Part, ...]
    evaluation_s: float | None
    steps: int

    @property
    def step_s(self) -> float | None:
        """Of one step; None where a part of it is not estimated."""
        seconds = [part.seconds for part in self.parts if part.seconds is not None]
        return sum(seconds) if len(seconds) == len(self.parts) else None

    @property
    def run_s(self) -> float | None:
        if self.step_s is None or self.evaluation_s is None:
            return None
        return self.step_s * self.steps + self.evaluation_s


def plan_memory(config: TrainConfig, shape: ModelShape, gpu: Gpu) -> Plan:
    """The memory of a recipe.

    Raises:
        UserError: sizes of the recipe that do not divide one another.
    """
    layout = find_layout(config, shape)
    phases, fit = find_phases(config, shape, layout, gpu)
    return Plan(shape, layout, gpu, phases, find_host(config, shape, layout), fit)


def plan_time(config: TrainConfig, plan: Plan, assumed: Assumptions) -> Timing:
    """The time of a recipe; raises as ``decode_rate``."""
    shape, layout, gpu = plan.shape, plan.layout, plan.gpu
    decoding = decode_rate(config, shape, layout, gpu, plan.rollout, assumed)
    parts = find_parts(config, shape, layout, gpu, decoding, assumed)
    return Timing(decoding, parts, evaluation_seconds(config, layout, decoding, assumed), config.training.steps)


def plan_record(config: TrainConfig, plan: Plan, timing: Timing, assumed: Assumptions) -> dict[str, Any]:
    """A plan in plain values: bytes, and seconds unless the key says hours."""
    layout, fit, decoding, run_s = plan.layout, plan.rollout, timing.decoding, timing.run_s
    sequences = math.ceil(config.rollout.prompts_per_step * assumed.oversampling) * config.rollout.group_size
    return {
        "model": {"path": config.model.path, "parameters": plan.shape.parameters} | plan.shape._asdict(),
        "engine": config.runtime.engine,
        "layout": {**layout._asdict(), "gpus": layout.gpus, "replicas": layout.replicas},
        "gpu": {**plan.gpu._asdict(), "usable": (1 - HEADROOM) * plan.gpu.memory},
        "assumed": assumed._asdict(),
        "phases": [
            _phase_record(phase) | {"verdict": plan.verdict(phase), "why": plan.why(phase)} for phase in plan.phases
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


def in_gib(num_bytes: float) -> str:
    """Bytes for a person."""
    gib = num_bytes / GIB
    return f"{gib:,.0f} GiB" if gib >= 100 else f"{gib:,.1f} GiB" if gib >= 0.1 else f"{num_bytes / 2**20:,.1f} MiB"
