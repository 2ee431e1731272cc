"""Advantages, the group filter and the overlong penalty, against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from forkrl.method.advantages import group_advantages, informative_groups, overlong_penalty


def test_hand_worked_group() -> None:
    """Rewards 1 0 0 0: mean 1/4, sample variance (9/16 + 3/16) / 3 = 1/4, so A = 3/4 / 1/2 and -1/4 / 1/2."""
    advantages = group_advantages(torch.tensor([[1, 0, 0, 0], [1, 1, -1, -1]]))
    assert advantages.dtype == torch.float32
    root = math.sqrt(4 / 3)
    expected = torch.tensor([[1.5, -0.5, -0.5, -0.5], [1 / root, 1 / root, -1 / root, -1 / root]])
    torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-5)


def test_epsilon_is_that_of_verl() -> None:
    """Rewards 0 and 2e-6: std is sqrt(2) 1e-6, so A = 1 / (sqrt(2) + 1), far from the 1 / sqrt(2) without epsilon."""
    advantages = group_advantages(torch.tensor([[0.0, 2e-6]], dtype=torch.float64))
    torch.testing.assert_close(advantages, torch.tensor([[-1.0, 1.0]], dtype=torch.float64) / (math.sqrt(2) + 1))


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -0.7, 1e6 + 0.1])
def test_equal_rewards_give_exactly_zero(reward: float) -> None:
    advantages = group_advantages(torch.full((2, 7), reward))
    assert advantages.tolist() == [[0.0] * 7] * 2


def test_groups_do_not_mix() -> None:
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([group_advantages(group[None]) for group in rewards])
    torch.testing.assert_close(group_advantages(rewards), alone, rtol=0, atol=0)


def test_informative_groups() -> None:
    scores = torch.tensor([[1, 1, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0]])
    assert informative_groups(scores).tolist() == [False, False, True, True]
    assert informative_groups(torch.empty(0, 4)).shape == (0,)


@pytest.mark.parametrize("function", [group_advantages, informative_groups])
def test_bad_rewards_are_named(function: object) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match="at least 2 responses"):
        function(torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"\(6,\) must be \[P, G\]"):
        function(torch.zeros(6))
    with pytest.raises(ValueError, match="2 of 4 rewards are NaN or infinite"):
        function(torch.tensor([[0.0, math.nan], [math.inf, 1.0]]))


def test_overlong_penalty_of_the_paper() -> None:
    """L_max 20,480 and L_cache 4,096: free up to 16,384, half-way at 18,432, -1 from 20,480 on."""
    lengths = torch.tensor([0, 16384, 16385, 18432, 20480, 30000])
    assert overlong_penalty(lengths, 20480, 4096).tolist() == [0.0, 0.0, -1 / 4096, -0.5, -1.0, -1.0]
    for cache_length in (0, 4096):
        for dtype in (torch.int32, torch.int64, torch.float64):
            assert overlong_penalty(lengths.to(dtype), 20480, cache_length).dtype == torch.float32


def test_overlong_penalty_can_be_off_or_cover_everything() -> None:
    lengths = torch.tensor([[1, 50], [100, 900]])
    assert overlong_penalty(lengths, 100, 0).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    torch.testing.assert_close(overlong_penalty(lengths, 100, 100), torch.tensor([[-0.01, -0.5], [-1.0, -1.0]]))
    for cache in (-1, 101):
        with pytest.raises(ValueError, match=f"cache_length = {cache} must lie in"):
            overlong_penalty(lengths, 100, cache)
