"""Everything that is planned of one recipe on one card."""

from __future__ import annotations

from typing import NamedTuple

from forkrl.config import TrainConfig
from forkrl.planning.cards import GIB, Card
from forkrl.planning.compute import (
    Assumptions,
    Decoding,
    Part,
    decode_rate,
    evaluation_seconds,
    find_parts,
)
from forkrl.planning.layout import Layout, find_layout
from forkrl.planning.memory import HEADROOM, Phase, RolloutFit, find_host, find_phases, fit_rollout, full_length
from forkrl.planning.shapes import ModelShape

FITS, TIGHT, TOO_LARGE = "fits", "tight", "does not fit"
NOT_MODELLED = (
    "fragmentation of the allocator, the CUDA context, buffers of NCCL, kernels' workspaces and the gradients that "
    f"flow through a layer during its backward: {HEADROOM:.0%} of the card is left to all of them",
    "micro-batches that verl balances by their work, and which may then hold more tokens than the limit",
    "the spread of lengths: attention costs more, and the end of a rollout runs emptier, than with all responses of "
    "the mean length",
    "the time of verifiers, of moving weights to the sampling engine, of offloading, of checkpoints and of start-up",
    "communication between GPUs and the launching of kernels, unless as part of --mfu and --rollout-efficiency",
)
SMALL_MODEL = 100e6
"""Below so many parameters launching kernels takes longer than what they do."""


class Plan(NamedTuple):
    """What a run needs."""

    shape: ModelShape
    layout: Layout
    card: Card
    phases: tuple[Phase, ...]
    host: tuple[Phase, ...]
    rollout: RolloutFit

    @property
    def rollout_has_room(self) -> bool:
        """Every replica can decode at least one sequence of full length."""
        return self.rollout.room_full >= 1

    def verdict(self, phase: Phase) -> str:
        """Of one phase, against the card."""
        if phase.name == "rollout" and not self.rollout_has_room:
            return TOO_LARGE
        if phase.num_bytes > self.card.memory:
            return TOO_LARGE
        return TIGHT if phase.num_bytes > (1 - HEADROOM) * self.card.memory else FITS

    def why(self, phase: Phase) -> str:
        """What a verdict on the sum alone would not show."""
        if phase.name != "rollout" or self.rollout_has_room:
            return ""
        one = in_gib(self.rollout.cache_per_token * self.rollout.full_length)
        if not self.layout.sharded:
            return f": beside the rest there is no room for one sequence ({one})"
        share = in_gib(self.rollout.share)
        return f": the sampling engine's share, {share}, does not hold its weights and one sequence ({one})"

    @property
    def verdicts(self) -> dict[str, str]:
        return {phase.name: self.verdict(phase) for phase in self.phases}

    @property
    def fits(self) -> bool:
        """Every phase, with the headroom."""
        return all(verdict == FITS for verdict in self.verdicts.values())

    @property
    def peak(self) -> float:
        return max(phase.num_bytes for phase in self.phases)


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


def plan_memory(config: TrainConfig, shape: ModelShape, card: Card) -> Plan:
    """The memory of a recipe.

    Raises:
        UserError: sizes of the recipe that do not divide one another.
    """
    layout = find_layout(config, shape)
    return Plan(
        shape,
        layout,
        card,
        find_phases(config, shape, layout, card),
        find_host(config, shape, layout),
        fit_rollout(config, shape, layout, card),
    )


def plan_time(config: TrainConfig, plan: Plan, assumed: Assumptions) -> Timing:
    """The time of a recipe; raises as ``decode_rate``."""
    shape, layout, card = plan.shape, plan.layout, plan.card
    decoding = decode_rate(config, shape, layout, card, plan.rollout, assumed)
    parts = find_parts(config, shape, layout, card, decoding, assumed)
    return Timing(decoding, parts, evaluation_seconds(config, layout, decoding, assumed), config.training.steps)


def warnings(config: TrainConfig, plan: Plan) -> list[str]:
    """What a reader of the plan should know, a sentence each."""
    found, shape = [], plan.shape
    if shape.max_positions is not None and full_length(config) > shape.max_positions:
        found.append(
            f"prompts and responses of {full_length(config):,} tokens are longer than the {shape.max_positions:,} "
            f"positions that the model is declared to handle"
        )
    if config.runtime.device == "cpu":
        found.append('runtime.device = "cpu": the figures are those of the card all the same')
    if shape.parameters < SMALL_MODEL:
        found.append("the model is so small that launching kernels takes most of its time: the times are far too short")
    if config.model.precision == "fp32":
        found.append("model.precision = fp32: the card's rate is that of bf16; give a much lower --mfu")
    if any("use_fused_kernels" in text for text in config.cluster.overrides):
        found.append("cluster.overrides are not read: the logits are counted as verl holds them without fused kernels")
    elif config.cluster.overrides:
        found.append("cluster.overrides are not read")
    return found


def in_gib(num_bytes: float) -> str:
    """Bytes for a person."""
    gib = num_bytes / GIB
    return f"{gib:,.0f} GiB" if gib >= 100 else f"{gib:,.1f} GiB" if gib >= 0.1 else f"{num_bytes / 2**20:,.1f} MiB"
