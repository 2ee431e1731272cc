"""Evaluation on held-out prompts: sampling, scoring and summary metrics.

Axes: ``P`` prompts, ``K`` samples each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from forkrl.config import TrainConfig
from forkrl.model.policy import Policy
from forkrl.rollout.scoring import Scoring
from forkrl.stats.intervals import mean_pass_at_k, mean_with_interval, mean_with_normal_interval
from forkrl.types import Prompt, RolloutEngine, RolloutGroup, SamplingParams, Verifier


def evaluation_sampling(config: TrainConfig, temperature: float, policy: Policy) -> SamplingParams:
    """Sampling of held-out responses in runs and ``forkrl eval``, without top-p and top-k, which bias the metric."""
    return SamplingParams(
        max_response_tokens=config.rollout.max_response_tokens,
        temperature=temperature,
        stop_token_ids=policy.stop_token_ids(config.rollout.stop),
    )


def evaluation_generator(seed: int, device: torch.device) -> torch.Generator:
    """The generator of every evaluation with this seed, in a run and in ``forkrl eval``."""
    # Hashed, so that it differs from training's generator, which uses the seed itself.
    digest = hashlib.sha256(f"evaluation/{seed}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def sample_and_score(
    engine: RolloutEngine,
    verifier: Verifier,
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    sampling: SamplingParams,
    generator: torch.Generator,
) -> list[RolloutGroup]:
    scoring = Scoring(verifier)
    return scoring.finish(
        engine.generate(prompts, group_size=group_size, sampling=sampling, generator=generator, on_finished=scoring.add)
    )


def by_source(groups: Sequence[RolloutGroup]) -> dict[str, list[RolloutGroup]]:
    """The groups of each part of a mixed task, sorted by name; empty for other tasks."""
    found: dict[str, list[RolloutGroup]] = {}
    for group in groups:
        found.setdefault(group.prompt.source, []).append(group)
    return {source: found[source] for source in sorted(found) if source}


def summarise(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """avg@K with its 95% interval clustered by prompt, unbiased pass@k, lengths, entropy; for mixes also per part."""
    num_samples = len(groups[0].rollouts)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    figures = _accuracy_and_length(groups, "") | {
        "entropy": float(torch.cat([rollout.entropy for rollout in rollouts]).mean()),
        "truncated_fraction": sum(not rollout.finished for rollout in rollouts) / len(rollouts),
        "samples": float(num_samples),
        "verifier_failures": float(sum(bool(result.failure) for group in groups for result in group.results)),
    }
    for source, part in by_source(groups).items():
        figures |= _accuracy_and_length(part, f"/{source}")
    solved = [sum(score == 1 for score in group.scores) for group in groups]
    for k in (2**power for power in range(1, num_samples.bit_length())):
        estimate = mean_pass_at_k(solved, num_samples, k)
        figures |= {f"pass@{k}": estimate.mean, f"pass@{k}_low": estimate.low, f"pass@{k}_high": estimate.high}
    return figures


def _accuracy_and_length(groups: Sequence[RolloutGroup], suffix: str) -> dict[str, float]:
    accuracy = mean_with_interval([list(group.scores) for group in groups])
    length = mean_with_normal_interval([[float(len(rollout)) for rollout in group.rollouts] for group in groups])
    return {
        f"accuracy{suffix}": accuracy.mean,
        f"accuracy_low{suffix}": accuracy.low,
        f"accuracy_high{suffix}": accuracy.high,
        f"length{suffix}": length.mean,
        f"problems{suffix}": float(len(groups)),
    }
