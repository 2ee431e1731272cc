"""The infinite prompt stream for training, with mixed parts and difficulty levels."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from forkrl.config import CurriculumConfig, TaskConfig, TrainConfig
from forkrl.types import Prompt, RolloutGroup


class PromptStream:
    """Repeats the prompts of every part forever, in a new seeded order each epoch.

    In a mix, the next prompt comes from the part furthest behind its weight, so counts follow the weights at any time.
    A part with a curriculum yields prompts of its current level, which ``observe`` changes. ``weights`` (above 0; None:
    equal) and ``curricula`` are by ``Prompt.source``.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        *,
        weights: Mapping[str, float] | None = None,
        curricula: Mapping[str, CurriculumConfig] | None = None,
    ) -> None:
        pools: dict[str, dict[int, list[Prompt]]] = {}
        for prompt in prompts:
            pools.setdefault(prompt.source, {}).setdefault(prompt.level, []).append(prompt)
        sources = sorted(pools)
        random.Random(f"{seed}/sources").shuffle(sources)  # their order breaks ties
        self._seed = seed
        self._curricula = dict(curricula or {})
        given = weights or dict.fromkeys(sources, 1.0)
        self._shares = {source: given[source] / sum(given[name] for name in sources) for source in sources}
        self._pools = {
            source: {level: _Pool(pools[source][level], self._pool_seed(source, level)) for level in pools[source]}
            for source in sources
        }
        # A part with fixed difficulty has one level.
        self._levels = {source: min(pools[source]) for source in sources}
        self._windows: dict[str, list[float]] = {source: [] for source in self._curricula}

    @property
    def levels(self) -> dict[str, int]:
        """The current level of each part with a curriculum."""
        return {source: self._levels[source] for source in self._curricula}

    @property
    def epochs(self) -> float:
        """Prompts drawn so far divided by the number of prompts, over all parts and levels."""
        pools = [pool for levels in self._pools.values() for pool in levels.values()]
        return sum(pool.position for pool in pools) / sum(len(pool) for pool in pools)

    def take(self, count: int) -> list[Prompt]:
        return [self._next() for _ in range(count)]

    def observe(self, groups: Sequence[RolloutGroup]) -> None:
        """Update curricula with the scores of sampled groups, in order."""
        for group in groups:
            source = group.prompt.source
            if source in self._curricula and group.prompt.level == self._levels[source]:
                self._windows[source].append(sum(group.scores) / len(group.scores))
                self._move(source, self._curricula[source])

    def state(self) -> dict[str, Any]:
        """The stream's position as JSON values."""
        pools = self._pools.items()
        drawn = {source: {str(level): pool.position for level, pool in levels.items()} for source, levels in pools}
        return {"drawn": drawn, "levels": self.levels, "windows": copy.deepcopy(self._windows)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the ``state`` of a stream of the same prompts."""
        for source, levels in state["drawn"].items():
            for level, position in levels.items():
                self._pools[source][int(level)].position = position
        self._levels |= state["levels"]
        self._windows = {source: list(window) for source, window in state["windows"].items()}

    def _next(self) -> Prompt:
        drawn = {source: sum(pool.position for pool in levels.values()) for source, levels in self._pools.items()}
        source = furthest_behind(self._shares, drawn)
        return self._pools[source][self._levels[source]].next()

    def _move(self, source: str, curriculum: CurriculumConfig) -> None:
        """Change the level if the full window requires it, else slide the window."""
        window = self._windows[source]
        del window[: -curriculum.window]
        if len(window) < curriculum.window:
            return
        accuracy = sum(window) / len(window)
        assert curriculum.promote_above is not None
        step = 1 if accuracy > curriculum.promote_above else -1 if accuracy < curriculum.demote_below else 0
        if step and self._levels[source] + step in self._pools[source]:
            self._levels[source] += step
            window.clear()

    def _pool_seed(self, source: str, level: int) -> str:
        return f"{self._seed}/{source}/{level}" if source or level else f"{self._seed}"


def furthest_behind(shares: Mapping[str, float], drawn: Mapping[str, int]) -> str:
    """The part furthest below its share; the first one in a tie."""
    total = sum(drawn.values()) + 1
    return max(drawn, key=lambda name: shares[name] * total - drawn[name])


class _Pool:
    """The prompts of one part and level, repeated; ``position`` is its only state."""

    def __init__(self, prompts: list[Prompt], seed: str) -> None:
        self.position = 0
        self._prompts = prompts
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def __len__(self) -> int:
        return len(self._prompts)

    def next(self) -> Prompt:
        epoch, index = divmod(self.position, len(self._prompts))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = random.Random(f"{self._seed}/{epoch}").sample(range(len(self._prompts)), len(self._prompts))
        self.position += 1
        return self._prompts[self._order[index]]


def open_stream(prompts: Sequence[Prompt], config: TaskConfig, seed: int) -> PromptStream:
    parts: dict[str, TaskConfig] = {part.label: part for part in config.parts} or {"": config}
    curricula = {name: part.curriculum for name, part in parts.items() if part.curriculum.promote_above is not None}
    weights = {part.label: part.weight for part in config.parts} or None
    return PromptStream(prompts, seed, weights=weights, curricula=curricula)


def repeated_prompts(prompts: Sequence[Prompt], config: TrainConfig) -> str:
    """A warning if a part or level has too few prompts for one step without repeats; "" otherwise."""
    rollout, dynamic = config.rollout, config.dynamic_sampling
    key, drawn = "rollout.prompts_per_step", rollout.prompts_per_step
    if dynamic.enabled and dynamic.generation_prompts > drawn:
        key, drawn = "dynamic_sampling.generation_prompts", dynamic.generation_prompts
    weights = {part.label: part.weight for part in config.task.parts} or {"": 1.0}
    for (source, level), count in sorted(Counter((prompt.source, prompt.level) for prompt in prompts).items()):
        wanted = math.floor(drawn * weights[source] / sum(weights.values()))
        if count < wanted:
            of = f"part {source}" if source else "the task"
            at = f" at level {level}" if config.task.curriculum.promote_above is not None else ""
            return (
                f"{key} = {drawn} takes {wanted} prompts at a time from {of}, which has {count} to train on{at}: each "
                f"step trains on some of them more than once; lower {key}, or add prompts"
            )
    return ""
