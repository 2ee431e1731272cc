"""Accuracy on prompts kept aside, and what else a set of scored responses tells.

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
    """How held-out responses are sampled, in a run and by ``forkrl eval`` alike.

    From the whole distribution: ``rollout.top_p`` and ``rollout.top_k`` shape what training sees, and must not flatter
    the figure that compares runs.

    Args:
        config: limit and stop tokens are the rollout's.
        temperature: 0 is greedy.
        policy: knows the ids of the stop tokens.
    """
    return SamplingParams(
        max_response_tokens=config.rollout.max_response_tokens,
        temperature=temperature,
        stop_token_ids=policy.stop_token_ids(config.rollout.stop),
    )


def evaluation_generator(seed: int, device: torch.device) -> torch.Generator:
    """The random numbers of every evaluation with this seed: the same each time, in a run and by ``forkrl eval``."""
    # Hashed: training draws from a generator of the bare seed, and the two must not run in step.
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
    """Sample responses and have each judged: groups with their results, in the order of the prompts."""
    scoring = Scoring(verifier)
    return scoring.finish(
        engine.generate(prompts, group_size=group_size, sampling=sampling, generator=generator, on_finished=scoring.add)
    )


def by_source(groups: Sequence[RolloutGroup]) -> dict[str, list[RolloutGroup]]:
    """The groups of each part of a mixed task, in the order of its name; empty for a task of one part."""
    found: dict[str, list[RolloutGroup]] = {}
    for group in groups:
        found.setdefault(group.prompt.source, []).append(group)
    return {source: found[source] for source in sorted(found) if source}


def summarise(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Figures of an evaluation: avg@K with its 95% interval clustered by prompt, unbiased pass@k, lengths, entropy.

    Of a mixed task, accuracy and length of each part as well: ``accuracy/PART``.
    """
    num_samples = len(groups[0].rollouts)
    accuracy = mean_with_interval([list(group.scores) for group in groups])
    length = mean_with_normal_interval([[float(len(rollout)) for rollout in group.rollouts] for group in groups])
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    figures = {
        "accuracy": accuracy.mean,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "length": length.mean,
        "entropy": float(torch.cat([rollout.entropy for rollout in rollouts]).mean()),
        "truncated_fraction": sum(not rollout.finished for rollout in rollouts) / len(rollouts),
        "problems": float(len(groups)),
        "samples": float(num_samples),
        "verifier_failures": float(sum(bool(result.failure) for group in groups for result in group.results)),
    }
    for source, part in by_source(groups).items():
        of_part = mean_with_interval([list(group.scores) for group in part])
        lengths = mean_with_normal_interval([[float(len(rollout)) for rollout in group.rollouts] for group in part])
        figures |= {
            f"accuracy/{source}": of_part.mean,
            f"accuracy_low/{source}": of_part.low,
            f"accuracy_high/{source}": of_part.high,
            f"length/{source}": lengths.mean,
            f"problems/{source}": float(len(part)),
        }
    solved = [sum(score == 1 for score in group.scores) for group in groups]
    for k in (2**power for power in range(1, num_samples.bit_length())):
        estimate = mean_pass_at_k(solved, num_samples, k)
        figures |= {f"pass@{k}": estimate.mean, f"pass@{k}_low": estimate.low, f"pass@{k}_high": estimate.high}
    return figures
