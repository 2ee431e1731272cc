"""Two temperatures: eq. 5 in a processor of transformers, in the embedded engine, and in vLLM's interfaces.

Shapes: ``B`` rows, ``V`` vocabulary.
"""

from __future__ import annotations

import math
import pickle  # noqa: TID251 - what workers and vLLM do with it
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from forkrl import ForkTemperature, SamplingParams
from forkrl.parallel.workers import Workers
from forkrl.rollout import EmbeddedEngine
from forkrl.rollout.fork_temperature import entropy_of
from forkrl.rollout.sampling import sample_tokens
from forkrl.types import Prompt
from tests.models import random_policy

# Two rows of known entropy: ln 4 = 1.386 (a fork), and p = (0.9, 0.1/3 ...): 0.9 ln(1/0.9) + 0.1 ln 30 = 0.435 nats.
FORK = torch.tensor([0.25, 0.25, 0.25, 0.25]).log()
EVEN_FORK = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()  # 1.280 nats
CALM = torch.tensor([0.9, 0.1 / 3, 0.1 / 3, 0.1 / 3]).log()
ROWS = torch.stack([EVEN_FORK, CALM])
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def test_each_row_takes_the_temperature_of_its_own_unscaled_entropy() -> None:
    probs = ForkTemperature(2.0, 0.5, threshold=1.0)(None, ROWS).softmax(-1)
    # p^(1/T), normalised: square roots at T = 2, squares at T = 0.5.
    roots = torch.tensor([0.4, 0.3, 0.2, 0.1]).sqrt()
    squares = torch.tensor([0.81, 0.01 / 9, 0.01 / 9, 0.01 / 9])
    torch.testing.assert_close(probs, torch.stack([roots / roots.sum(), squares / squares.sum()]))


@pytest.mark.parametrize(("row", "threshold", "is_fork"), [(FORK, 1.38, True), (FORK, 1.39, False), (CALM, 0.43, True)])
def test_a_fork_is_what_lies_above_the_threshold(row: Tensor, threshold: float, is_fork: bool) -> None:
    assert ForkTemperature(0, 1, threshold)(None, row).isinf().any() == is_fork


def test_the_threshold_itself_is_no_fork() -> None:
    entropy = float(entropy_of(EVEN_FORK))
    assert ForkTemperature(0, 1, entropy)(None, EVEN_FORK).equal(EVEN_FORK)
    assert not ForkTemperature(0, 1, entropy - 1e-6)(None, EVEN_FORK).equal(EVEN_FORK)


def test_it_is_the_unscaled_entropy_that_is_compared() -> None:
    """At T = 0.2 the even fork has 0.60 nats, at T = 5 the calm row has 1.34: either on the other side of 1 nat."""
    for row, temperatures, scaled_entropy in ((EVEN_FORK, (0.2, 1.0), 0.60), (CALM, (1.0, 5.0), 1.34)):
        probs = ForkTemperature(*temperatures, threshold=1.0)(None, row).softmax(-1)
        assert float(torch.special.entr(probs).sum()) == pytest.approx(scaled_entropy, abs=0.01)


@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0, 5.0])
def test_alike_temperatures_are_an_ordinary_temperature(temperature: float) -> None:
    scores = 5 * torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    probs = ForkTemperature(temperature, temperature, 0.7)(None, scores).softmax(-1)
    torch.testing.assert_close(probs, (scores / temperature).softmax(-1))


def test_zero_is_greedy_and_ties_go_to_the_lowest_id() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [0.0, 9.0, -9.0]])
    greedy = ForkTemperature(0, 0, 0.5)(None, scores)
    inf = -torch.inf
    assert greedy.equal(torch.tensor([[inf, 3.0, inf], [2.0, inf, inf], [inf, 9.0, inf]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_and_shape_stay(dtype: torch.dtype) -> None:
    scores = ROWS.to(dtype)
    processor = ForkTemperature(0.3, 0, 1.0)
    both = processor(None, scores)
    assert both.dtype == dtype and both.shape == scores.shape
    for row, alone in zip(both, scores, strict=True):
        assert processor(None, alone).equal(row)
    assert scores.equal(ROWS.to(dtype)), "the input is left alone"


def test_half_precision_does_not_overflow_at_a_low_temperature() -> None:
    scores = torch.tensor([6e4, 5.9e4, -6e4], dtype=torch.float16)
    probs = ForkTemperature(1, 1e-3, 1.0)(None, scores).softmax(-1)
    assert probs.tolist() == [1.0, 0.0, 0.0]


def test_masked_tokens_stay_masked_and_count_for_nothing() -> None:
    masked = torch.cat([EVEN_FORK, torch.full((3,), -torch.inf)])
    for high in (0.0, 0.3, 5.0):
        processor = ForkTemperature(high, 1, threshold=1.27)
        assert processor(None, masked)[:4].equal(processor(None, EVEN_FORK)), "1.280 nats with and without"
        assert processor(None, masked)[4:].equal(masked[4:])


@pytest.mark.parametrize(
    "row", [[1.0, torch.nan, 0.0], [1.0, torch.inf, 0.0], [-torch.inf] * 3, [torch.nan] * 3], ids=str
)
def test_a_row_without_a_softmax_goes_through_as_it_is(row: list[float]) -> None:
    scores = torch.tensor([row, [1.0, 0.0, 0.0]])
    for high, low in ((0.0, 0.0), (0.3, 0.3)):
        rescaled = ForkTemperature(high, low, 0.5)(None, scores)
        torch.testing.assert_close(rescaled[0], scores[0], rtol=0, atol=0, equal_nan=True)
        assert not rescaled[1].equal(scores[1])


@pytest.mark.parametrize("name", ["high", "low", "threshold"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "1", None, True], ids=repr)
def test_what_is_no_temperature_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} = "):
        ForkTemperature(**{"high": 1.0, "low": 1.0, "threshold": 0.5, name: value})


def test_it_travels_between_processes() -> None:
    params = SamplingParams(5, fork_temperature=ForkTemperature(1, 0.3, 0.672))
    assert pickle.loads(pickle.dumps(params)) == params  # noqa: S301


# -- the embedded engine -----------------------------------------------------------------------------------------------


def test_frequencies_of_draws_are_those_worked_by_hand() -> None:
    number = 60_000
    sampling = SamplingParams(1, fork_temperature=ForkTemperature(2.0, 0.5, threshold=1.0))
    roots = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).sqrt()
    squares = torch.tensor([0.81, 0.01 / 9, 0.01 / 9, 0.01 / 9], dtype=torch.float64)
    for seed, (row, weights) in enumerate(((EVEN_FORK, roots), (CALM, squares))):
        drawn, _, _ = sample_tokens(row.expand(number, -1), sampling, torch.Generator().manual_seed(seed))
        expected = weights / weights.sum() * number
        assert stats.chisquare(drawn.bincount(minlength=4).numpy(), expected.numpy()).pvalue > 0.001


def test_at_1_and_1_draws_are_those_of_plain_sampling_bit_for_bit() -> None:
    logits_SV = 4 * torch.randn(500, 40, generator=torch.Generator().manual_seed(5))
    for top_p in (1.0, 0.8):
        plain, forked = (
            sample_tokens(
                logits_SV, SamplingParams(1, top_p=top_p, fork_temperature=fork), torch.Generator().manual_seed(6)
            )
            for fork in (None, ForkTemperature(1, 1, 0.672))
        )
        assert all(left.equal(right) for left, right in zip(plain, forked, strict=True))


def test_log_probs_and_entropies_stay_those_of_the_unscaled_distribution() -> None:
    sampling = SamplingParams(1, fork_temperature=ForkTemperature(5.0, 0.0, threshold=1.0))
    tokens, logprobs, entropy = sample_tokens(ROWS, sampling, torch.Generator().manual_seed(0))
    torch.testing.assert_close(logprobs, ROWS.gather(1, tokens[:, None])[:, 0])
    torch.testing.assert_close(entropy, torch.special.entr(ROWS.exp()).sum(-1))
    assert tokens[1] == 0, "greedy where the model is sure"


def test_a_temperature_beside_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"temperature = 0.7 along with ForkTemperature\(high=1, low=0.5"):
        SamplingParams(5, temperature=0.7, fork_temperature=ForkTemperature(1, 0.5, 0.6))


@pytest.mark.parametrize("temperatures", [(0.0, 0.0), (0.0, 1e-4), (1e-4, 0.0)])
def test_greedy_responses_are_those_of_generate(temperatures: tuple[float, float]) -> None:
    policy, fork = random_policy(sharpness=20.0), ForkTemperature(*temperatures, threshold=1.0)
    engine = EmbeddedEngine(Workers(policy), max_prompt_tokens=16)
    sampling = SamplingParams(20, fork_temperature=fork)
    (group,) = engine.generate(
        [Prompt("0", "1 2", "")], group_size=1, sampling=sampling, generator=torch.Generator().manual_seed(0)
    )
    (rollout,) = group.rollouts
    assert float(rollout.entropy.min()) < 1.0 < float(rollout.entropy.max()), "both temperatures must be met"
    model: Any = policy.model
    written = model.generate(
        torch.tensor([rollout.prompt_ids]), logits_processor=[fork], do_sample=True, top_k=0, max_new_tokens=20
    )
    assert tuple(written[0, len(rollout.prompt_ids) :].tolist()) == rollout.response_ids


def test_generate_draws_from_the_same_distribution_as_the_engine() -> None:
    """Five thousand first tokens by ``generate``, against the probabilities that eq. 5 gives."""
    policy = random_policy(sharpness=2.0)
    prompt = torch.tensor([policy.tokenizer.encode("31 41", add_special_tokens=False)])
    with torch.no_grad():
        logits_V = policy.model(input_ids=prompt).logits[0, -1].double()
    torch.manual_seed(0)
    fork = ForkTemperature(0.5, 3.0, threshold=1.0)
    model: Any = policy.model
    written = model.generate(
        prompt.expand(5000, -1), logits_processor=[fork], do_sample=True, top_k=0, max_new_tokens=1
    )
    assert float(torch.special.entr(logits_V.softmax(-1)).sum()) > 1.0
    expected_V = (logits_V / 0.5).softmax(-1) * 5000
    counts_V = written[:, -1].bincount(minlength=len(expected_V)).double()
    assert stats.chisquare(counts_V.numpy(), expected_V.numpy()).pvalue > 0.001
