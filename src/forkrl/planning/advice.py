"""Settings that make a recipe fit or run faster, found by planning it with each, alone and combined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, product
from typing import Any, NamedTuple

from forkrl.config import TrainConfig
from forkrl.errors import UserError
from forkrl.planning.compute import Assumptions, plan_time
from forkrl.planning.gpus import Gpu
from forkrl.planning.memory import Plan, full_length, plan_memory
from forkrl.planning.shapes import ModelShape

MAX_CHANGES, MAX_SHOWN, MAX_GPUS = 3, 3, 512
FASTER = 0.95
"""A change is shown if it reduces the time to less than this share."""
_SHARES = [share / 100 for share in range(30, 90, 5)]


class Change(NamedTuple):
    """A setting and its new value."""

    key: str
    value: Any

    def __str__(self) -> str:
        shown = str(self.value).lower() if isinstance(self.value, bool) else f"{self.value!r}".replace("'", '"')
        return f"{self.key} = {shown}"


class Variant(NamedTuple):
    """Changes with which everything fits, and the run's seconds where computed."""

    changes: tuple[Change, ...]
    plan: Plan
    run_s: float = 0.0


def find_remedies(config: TrainConfig, shape: ModelShape, gpu: Gpu) -> list[Variant]:
    """The fewest changes with which every phase fits: on the same GPUs, then on more. Empty: none found.

    Tries each setting, pair and triple, mildest values first; settings that change the algorithm stay.
    """
    same = _search(config, shape, gpu, more_gpus=False)
    if config.runtime.trainer == "verl":
        more = _search(config, shape, gpu, more_gpus=True)
    else:
        more = _on_cluster(config, shape, gpu) if config.training.backward == "dense" else []
    enough = [set(variant.changes) for variant in same]
    return [*same, *(variant for variant in more if not any(changes <= set(variant.changes) for changes in enough))]


def _on_cluster(config: TrainConfig, shape: ModelShape, gpu: Gpu) -> list[Variant]:
    """A local recipe moved to verl, on one node if it fits there."""
    default = type(config.rollout)()
    local = [  # settings of engines that verl does not use
        Change(f"rollout.{name}", getattr(default, name))
        for name in ("engine", "kv_cache_gib")
        if name in config.rollout.changed()
    ]
    moves = [(*local, Change("runtime.trainer", "verl"), Change("cluster.gpus_per_node", count)) for count in (2, 4, 8)]
    if found := list(_fitting(config, shape, gpu, moves)):
        return found[:1]
    base = changed(config, moves[-1])
    found = _search(base, shape, gpu, more_gpus=False) or _search(base, shape, gpu, more_gpus=True)
    return [variant._replace(changes=(*moves[-1], *variant.changes)) for variant in found]


def _search(config: TrainConfig, shape: ModelShape, gpu: Gpu, *, more_gpus: bool) -> list[Variant]:
    choices = [values for values in _choices(config, more_gpus=more_gpus) if values]
    for number in range(1, MAX_CHANGES + 1):
        found = []
        for settings in combinations(choices, number):
            growing = any(values[0].key in ("cluster.nodes", "cluster.gpus_per_node") for values in settings)
            variants = _fitting(config, shape, gpu, product(*settings)) if growing == more_gpus else ()
            if variant := min(variants, key=_num_gpus, default=None):
                found.append(variant)
        if found:
            return sorted(found, key=_num_gpus)[:MAX_SHOWN]
    return []


def _num_gpus(variant: Variant) -> int:
    return variant.plan.layout.gpus


def find_faster(
    config: TrainConfig, shape: ModelShape, gpu: Gpu, run_s: float | None, assumed: Assumptions
) -> list[Variant]:
    """The best value of each setting that saves time on the same GPUs, and the best pairs, fastest first."""
    if run_s is None or assumed.rollout_tokens_per_s is not None:
        return []
    best: dict[tuple[str, ...], Variant] = {}
    choices = [values for values in _faster_choices(config) if values]
    for settings in (group for number in (1, 2) for group in combinations(choices, number)):
        keys = tuple(values[0].key for values in settings)
        limit = min([run_s, *(best[key,].run_s for key in keys if (key,) in best)])  # a pair beats both of its parts
        timed = [
            variant._replace(run_s=seconds)
            for variant in _fitting(config, shape, gpu, product(*settings))
            if (seconds := plan_time(changed(config, variant.changes), variant.plan, assumed).run_s) is not None
        ]
        found = min(timed, key=lambda each: float(f"{each.run_s:.3g}"), default=None)
        if found and found.run_s < FASTER * limit:
            best[keys] = found
    return sorted(best.values(), key=lambda each: each.run_s)[:MAX_SHOWN]


def _fitting(
    config: TrainConfig, shape: ModelShape, gpu: Gpu, variants: Iterable[tuple[Change, ...]]
) -> Iterator[Variant]:
    for changes in variants:
        try:
            plan = plan_memory(changed(config, changes), shape, gpu)
        except UserError:  # sizes do not divide: no such run
            continue
        if plan.fits:
            yield Variant(changes, plan)


def changed(config: TrainConfig, changes: Iterable[Change]) -> TrainConfig:
    """The recipe with other settings, assumed valid."""
    for change in changes:
        section, _, name = change.key.partition(".")
        table = getattr(config, section).model_copy(update={name: change.value})
        config = config.model_copy(update={section: table})
    return config


def _choices(config: TrainConfig, *, more_gpus: bool) -> Iterator[list[Change]]:
    """The values to try for each setting, the mildest first."""
    cluster, longest, sequences = config.cluster, full_length(config), config.rollout.max_sequences
    if not config.model.gradient_checkpointing and config.training.backward == "dense":
        yield [Change("model.gradient_checkpointing", True)]
    # Where tokens are selected within a micro-batch, its size is part of the method.
    if config.selection.scope != "micro_batch" and config.training.micro_batch_tokens > longest:
        yield [Change("training.micro_batch_tokens", longest)]
    if config.runtime.trainer == "local":
        yield _values("rollout.max_sequences", [sequences >> power for power in range(1, sequences.bit_length())])
        return
    if not cluster.offload:
        yield [Change("cluster.offload", True)]
    # Sequence parallelism between nodes would be slow.
    yield _values("cluster.sequence_parallel", _doubles(cluster.sequence_parallel, cluster.gpus_per_node))
    yield _values("cluster.tensor_parallel", _doubles(cluster.tensor_parallel, 8))
    shares = [share for share in _SHARES if share != cluster.gpu_memory]
    yield _values("cluster.gpu_memory", sorted(shares, key=lambda share: abs(share - cluster.gpu_memory)))
    if more_gpus:
        if cluster.nodes == 1:
            yield _values("cluster.gpus_per_node", _doubles(cluster.gpus_per_node, 8))
        yield _values("cluster.nodes", _doubles(cluster.nodes, MAX_GPUS // cluster.gpus_per_node))


def _faster_choices(config: TrainConfig) -> Iterator[list[Change]]:
    if config.model.gradient_checkpointing:
        yield [Change("model.gradient_checkpointing", False)]
    yield _values("rollout.max_sequences", _doubles(config.rollout.max_sequences, 1024))
    if config.runtime.trainer == "verl":
        if not config.cluster.offload:
            yield [Change("cluster.offload", True)]
        yield _values("cluster.gpu_memory", _SHARES)


def _values(key: str, values: Sequence[float]) -> list[Change]:
    return [Change(key, value) for value in values]


def _doubles(value: int, maximum: int) -> list[int]:
    return [value << power for power in range(1, maximum.bit_length() + 1) if value << power <= maximum]
