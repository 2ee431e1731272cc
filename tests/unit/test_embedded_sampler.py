"""Which waves the embedded engine decodes for an evaluation that goes on, and with which random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from forkrl.evaluation.samplers import EmbeddedSampler, EvalSampling, SampleRequest
from forkrl.model.policy import Policy
from forkrl.parallel.workers import Workers
from forkrl.rollout import EmbeddedEngine
from forkrl.rollout.embedded import Ended, Prefix
from forkrl.rollout.held_out import evaluation_generator
from forkrl.types import Prompt, SamplingParams
from tests.models import random_policy

SAMPLING = EvalSampling(max_response_tokens=6, temperature=1.0, seed=5, stop=())
PROMPTS = [Prompt(f"q{n}", f"{n} {n} ", "") for n in range(5)]
GRID = [SampleRequest(prompt, sample) for prompt in PROMPTS for sample in range(3)]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return random_policy()


class Counting(EmbeddedEngine):
    """Notes how many sequences each wave had."""

    def __init__(self, policy: Policy, waves: list[int]) -> None:
        super().__init__(Workers(policy), max_prompt_tokens=64, max_sequences=4)
        self.waves = waves

    def stream(self, prefixes: Sequence[Prefix], **settings: Any) -> Iterator[Ended]:
        self.waves.append(len(prefixes))
        return super().stream(prefixes, **settings)


def texts(policy: Policy, requests: Sequence[SampleRequest], waves: list[int] | None = None) -> dict[object, str]:
    sampler = EmbeddedSampler(Counting(policy, [] if waves is None else waves))
    return {
        (sampled.request.prompt.id, sampled.request.sample): sampled.text
        for sampled in sampler.sample(requests, SAMPLING, GRID)
    }


def test_all_at_once_is_what_a_run_samples(policy: Policy) -> None:
    engine = Counting(policy, [])
    generator = evaluation_generator(SAMPLING.seed, policy.device)
    groups = engine.generate(PROMPTS, group_size=3, sampling=SamplingParams(max_response_tokens=6), generator=generator)
    expected = {
        (group.prompt.id, sample): rollout.text for group in groups for sample, rollout in enumerate(group.rollouts)
    }
    assert texts(policy, GRID) == expected
    assert len(set(expected.values())) > 5


RESUMED = pytest.mark.parametrize(
    ("missing", "decoded"),
    [([], []), ([0], [4]), ([3, 4], [4, 4]), ([14], [3]), ([5, 6, 13], [4, 3]), (list(range(15)), [4, 4, 4, 3])],
)


@RESUMED
def test_what_is_shown_counts_the_responses_decoded_again_too(
    policy: Policy, missing: list[int], decoded: list[int]
) -> None:
    sampler = EmbeddedSampler(Counting(policy, []))
    list(sampler.sample(GRID[:4], SAMPLING, GRID))  # of an earlier benchmark
    shown = sampler.shown([GRID[index] for index in missing], GRID)
    assert shown["total"] == sum(decoded)
    assert shown["finished"]() == 0
    counts = [shown["finished"]() for _ in sampler.sample([GRID[index] for index in missing], SAMPLING, GRID)]
    assert max(counts, default=0) <= shown["total"] == shown["finished"]()
    assert shown["seconds_left"]() == 0


@RESUMED
def test_only_waves_with_something_missing_are_decoded_and_give_the_same(
    policy: Policy, missing: list[int], decoded: list[int]
) -> None:
    waves: list[int] = []
    whole = texts(policy, GRID)
    some = texts(policy, [GRID[index] for index in missing], waves)
    assert waves == decoded
    asked = {(GRID[index].prompt.id, GRID[index].sample) for index in missing}
    assert some == {key: text for key, text in whole.items() if key in asked}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_wave_that_is_passed_over_draws_what_its_decoding_would(policy: Policy, workers: int) -> None:
    seeds: list[list[int]] = []

    def note(_: object, parts: Sequence[tuple[Sequence[object], int]], *__: object) -> list[Any]:
        seeds.append([seed for _, seed in parts])
        return [[SimpleNamespace() for _ in part] for part, _ in parts]

    stub: Any = SimpleNamespace(count=workers, policy=policy, map=note)
    engine = EmbeddedEngine(Workers(policy) if workers == 1 else stub, max_prompt_tokens=64, max_sequences=4)
    for count in range(1, 4 * workers + 1):
        after = []
        for decoded in (True, False):
            generator = torch.Generator().manual_seed(1)
            if decoded:
                how = SamplingParams(max_response_tokens=6)
                engine.generate(PROMPTS[:1] * count, group_size=1, sampling=how, generator=generator)
            else:
                engine.pass_over(count, generator)
            after.append(generator.get_state().tolist())
        assert after[0] == after[1], count
    assert len(seeds) == (0 if workers == 1 else 4 * workers)
