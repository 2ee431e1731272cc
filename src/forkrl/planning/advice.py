"""Which settings make a recipe fit: found by planning it with each of them, alone and together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, product
from typing import Any, NamedTuple

from forkrl.config import TrainConfig
from forkrl.errors import UserError
from forkrl.planning.cards import Card
from forkrl.planning.compute import Assumptions
from forkrl.planning.memory import full_length
from forkrl.planning.plan import Plan, Timing, plan_memory, plan_time
from forkrl.planning.shapes import ModelShape

MOST_CHANGES = 3
MOST_SHOWN = 3
MOST_GPUS = 512
WORTH_SAYING = 0.95
"""A change is named where it leaves less than this of the time."""


class Change(NamedTuple):
    """A setting and what it would be."""

    key: str
    value: Any

    def __str__(self) -> str:
        shown = str(self.value).lower() if isinstance(self.value, bool) else f"{self.value!r}".replace("'", '"')
        return f"{self.key} = {shown}"


class Remedy(NamedTuple):
    """Changes that together make everything fit."""

    changes: tuple[Change, ...]
    plan: Plan

    @property
    def gpus(self) -> int:
        return self.plan.layout.gpus


def find_remedies(config: TrainConfig, shape: ModelShape, card: Card) -> list[Remedy]:
    """The fewest changes after which every phase fits: on as many GPUs, and on more of them.

    Every value of every setting is tried, then every pair, then every three; of those that differ in their values
    alone the mildest is kept. Settings that change what is computed (lengths, batch sizes, the selection) are left
    alone. Empty: nothing that was tried helps.
    """
    same = _search(config, shape, card, more_gpus=False)
    more = _on_cluster(config, shape, card)
    if config.runtime.engine == "verl":
        more = _search(config, shape, card, more_gpus=True)
    enough = [set(remedy.changes) for remedy in same]
    return [*same, *(remedy for remedy in more if not any(those <= set(remedy.changes) for those in enough))]


def _on_cluster(config: TrainConfig, shape: ModelShape, card: Card) -> list[Remedy]:
    """Ways for a recipe of the local engine: the same on verl, on a node at first."""
    if config.runtime.engine == "verl" or config.training.backward != "dense":
        return []
    first: tuple[Change, ...] = (Change("runtime.engine", "verl"),)
    if config.rollout.cuda_graphs:  # the local engine's alone; verl's samplers have their own
        first = (Change("rollout.cuda_graphs", False), *first)
    moves: tuple[Change, ...] = ()
    for count in (2, 4, 8):
        moves = (*first, Change("cluster.gpus_per_node", count))
        if (moved := _first_fit(config, shape, card, [[move] for move in moves])) is not None:
            return [moved]
    base = changed(config, moves)
    found = _search(base, shape, card, more_gpus=False) or _search(base, shape, card, more_gpus=True)
    return [Remedy((*moves, *remedy.changes), remedy.plan) for remedy in found]


class Faster(NamedTuple):
    """Changes after which the run still fits and takes less time."""

    changes: tuple[Change, ...]
    timing: Timing


def find_faster(
    config: TrainConfig, shape: ModelShape, plan: Plan, timing: Timing, assumed: Assumptions
) -> list[Faster]:
    """The best value of each setting that saves time on the same GPUs, and the best pair of two, best first.

    Only what this package models is weighed: more sequences decoded together, layers that are not recomputed. How many
    GPUs share a model or a sequence is left alone, since what they say to one another is not modelled.
    """
    if timing.run_s is None or assumed.rollout_tokens_per_s is not None:
        return []
    choices = [values for values in _faster_choices(config) if values]
    found = []
    for number in (1, 2):
        for settings in combinations(choices, number):
            best = _quickest(config, shape, plan.card, assumed, settings)
            if best is not None and (best.timing.run_s or 0) < WORTH_SAYING * timing.run_s:
                found.append(best)
    found.sort(key=lambda each: each.timing.run_s or 0)
    kept: list[Faster] = []
    for each in found:  # a pair has to be better than either of its two alone
        if all(
            (each.timing.run_s or 0) < WORTH_SAYING * (other.timing.run_s or 0)
            for other in found
            if len(other.changes) < len(each.changes) and {c.key for c in other.changes} < {c.key for c in each.changes}
        ):
            kept.append(each)
    return kept[:MOST_SHOWN]


def _quickest(
    config: TrainConfig, shape: ModelShape, card: Card, assumed: Assumptions, settings: Iterable[Sequence[Change]]
) -> Faster | None:
    best: Faster | None = None
    for changes in product(*settings):
        other = changed(config, changes)
        try:
            plan = plan_memory(other, shape, card)
        except UserError:  # sizes that do not divide
            continue
        if not plan.fits:
            continue
        timing = plan_time(other, plan, assumed)
        if timing.run_s is not None and (best is None or timing.run_s < 0.999 * (best.timing.run_s or 0)):
            best = Faster(changes, timing)
    return best


def _faster_choices(config: TrainConfig) -> Iterator[list[Change]]:
    if config.model.gradient_checkpointing:
        yield [Change("model.gradient_checkpointing", False)]
    yield [Change("rollout.max_sequences", size) for size in _doubles(config.rollout.max_sequences, 1024)]
    if config.runtime.engine == "verl":
        cluster = config.cluster
        if not cluster.offload:
            yield [Change("cluster.offload", True)]
        yield [Change("cluster.gpu_memory", share / 100) for share in range(30, 90, 5)]


def _search(config: TrainConfig, shape: ModelShape, card: Card, *, more_gpus: bool) -> list[Remedy]:
    choices = [values for values in _choices(config, more_gpus=more_gpus) if values]
    for number in range(1, MOST_CHANGES + 1):
        found = []
        for settings in combinations(choices, number):
            growing = any(setting[0].key in ("cluster.nodes", "cluster.gpus_per_node") for setting in settings)
            if growing == more_gpus and (remedy := _first_fit(config, shape, card, settings)) is not None:
                found.append(remedy)
        if found:
            return sorted(found, key=lambda remedy: remedy.gpus)[:MOST_SHOWN]
    return []


def _first_fit(
    config: TrainConfig, shape: ModelShape, card: Card, settings: Iterable[Sequence[Change]]
) -> Remedy | None:
    """The mildest values of these settings that make everything fit; of several, those on the fewest GPUs."""
    best: Remedy | None = None
    for changes in product(*settings):
        try:
            plan = plan_memory(changed(config, changes), shape, card)
        except UserError:  # sizes that do not divide: not a way to run it
            continue
        if plan.fits and (best is None or plan.layout.gpus < best.gpus):
            best = Remedy(changes, plan)
    return best


def changed(config: TrainConfig, changes: Iterable[Change]) -> TrainConfig:
    """The recipe with other settings; they are of the kind that the recipe has, so they are not validated again."""
    for change in changes:
        section, _, name = change.key.partition(".")
        table = getattr(config, section).model_copy(update={name: change.value})
        config = config.model_copy(update={section: table})
    return config


def _choices(config: TrainConfig, *, more_gpus: bool) -> Iterator[list[Change]]:
    """The values to try of each setting, from the mildest on."""
    if not config.model.gradient_checkpointing and config.training.backward == "dense":
        yield [Change("model.gradient_checkpointing", True)]
    # Where tokens are selected within a micro-batch, its size is part of the method.
    if config.selection.scope != "micro_batch" and config.training.micro_batch_tokens > (
        longest := full_length(config)
    ):
        yield [Change("training.micro_batch_tokens", longest)]
    if config.runtime.engine == "local":
        yield [Change("rollout.max_sequences", size) for size in _halves(config.rollout.max_sequences)]
        return
    cluster = config.cluster
    if not cluster.offload:
        yield [Change("cluster.offload", True)]
    within = _doubles(cluster.sequence_parallel, cluster.gpus_per_node)  # between nodes it would crawl
    yield [Change("cluster.sequence_parallel", size) for size in within]
    yield [Change("cluster.tensor_parallel", size) for size in _doubles(cluster.tensor_parallel, 8)]
    shares = [share / 100 for share in range(30, 90, 5)]
    nearest = sorted(shares, key=lambda share: abs(share - cluster.gpu_memory))
    yield [Change("cluster.gpu_memory", share) for share in nearest if share != cluster.gpu_memory]
    if more_gpus:
        if cluster.nodes == 1:
            yield [Change("cluster.gpus_per_node", count) for count in _doubles(cluster.gpus_per_node, 8)]
        most = MOST_GPUS // cluster.gpus_per_node
        yield [Change("cluster.nodes", count) for count in _doubles(cluster.nodes, most)]


def _doubles(value: int, most: int) -> list[int]:
    found = []
    while (value := 2 * value) <= most:
        found.append(value)
    return found


def _halves(value: int) -> list[int]:
    found = []
    while value > 1:
        found.append(value := value // 2)
    return found
