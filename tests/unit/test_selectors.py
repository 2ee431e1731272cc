"""Selection: exact counts whatever the ties, padding never selected, order of tokens irrelevant."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from forkrl.config import SelectionConfig, WeightsConfig
from forkrl.method import top_k
from forkrl.method.selection import (
    ENTROPY_RULES,
    choose,
    count_selected,
    entropy_threshold,
    num_selected,
    select_tokens,
    select_tokens_per_sequence,
)
from tests.signals import signals_of

EXACT_RULES = ["top_entropy", "bottom_entropy", "random"]
ratios = st.integers(1, 100).map(lambda percent: percent / 100)


@st.composite
def token_grids(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Entropies with many ties, and NaN or infinity wherever the response mask is False."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    cells = rows * columns
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=cells, max_size=cells)))
    levels = draw(st.lists(st.sampled_from([0.0, 0.3, 0.672, 2.0]), min_size=cells, max_size=cells))
    rubbish = draw(st.lists(st.sampled_from([math.nan, math.inf, 99.0, 0.0]), min_size=cells, max_size=cells))
    entropy = torch.where(mask, torch.tensor(levels), torch.tensor(rubbish))
    return entropy.view(rows, columns), mask.view(rows, columns)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None)
@given(token_grids(), st.sampled_from(EXACT_RULES), ratios)
def test_exact_count_under_ties_and_padding_never_selected(
    grid: tuple[Tensor, Tensor], rule: str, ratio: float
) -> None:
    entropy, mask = grid
    selected = select_tokens(entropy, mask, rule, ratio, generator=seeded())
    num_tokens = int(mask.sum())
    exact = math.ceil(Fraction(str(ratio)) * num_tokens)
    assert selected.dtype == torch.bool and selected.shape == mask.shape
    assert int(selected.sum()) == (max(1, exact) if num_tokens else 0)
    assert not (selected & ~mask).any()


@settings(deadline=None)
@given(token_grids(), ratios)
def test_every_kept_token_outranks_every_other(grid: tuple[Tensor, Tensor], ratio: float) -> None:
    entropy, mask = grid
    top = select_tokens(entropy, mask, "top_entropy", ratio)
    bottom = select_tokens(entropy, mask, "bottom_entropy", ratio)
    for selected, sign in ((top, 1), (bottom, -1)):
        kept, left = (sign * entropy)[selected], (sign * entropy)[mask & ~selected]
        if len(kept) and len(left):
            assert kept.min() >= left.max()


@settings(deadline=None)
@given(st.permutations(range(23)), st.sampled_from(["top_entropy", "bottom_entropy", "all"]), ratios)
def test_permutation_equivariant(order: list[int], rule: str, ratio: float) -> None:
    """Shuffling tokens shuffles the selection with them, as long as no two entropies are equal."""
    entropy, mask = torch.linspace(0, 3, 23), torch.arange(23) % 4 != 1
    index = torch.tensor(order)
    assert torch.equal(
        select_tokens(entropy[index], mask[index], rule, ratio), select_tokens(entropy, mask, rule, ratio)[index]
    )


@given(st.integers(1, 10**11), st.integers(1, 10**4))
@example(99_999_999_999, 9091)
def test_num_selected_is_the_decimal_ceiling(num_tokens: int, parts: int) -> None:
    assert num_selected(num_tokens, parts / 10**4) == -(-num_tokens * parts // 10**4)


@pytest.mark.parametrize(
    ("num_tokens", "ratio", "expected"),
    [(5, 0.2, 1), (30, 0.1, 3), (6, 0.2, 2), (1, 0.2, 1), (0, 0.2, 0), (10, 1.0, 10), (10, 0.1 + 0.2, 3), (3, 1e-9, 1)],
)
def test_num_selected_by_hand(num_tokens: int, ratio: float, expected: int) -> None:
    assert num_selected(num_tokens, ratio) == expected


def test_ties_go_to_the_earliest() -> None:
    entropy = torch.tensor([[0.5, 1.0, 1.0], [1.0, 0.0, 0.0]])
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert select_tokens(entropy, mask, "top_entropy", 0.33).tolist() == [[False, True, True], [False, False, False]]
    assert select_tokens(entropy, mask, "bottom_entropy", 0.1).tolist() == [[False, False, False], [False, True, False]]
    flat = select_tokens(torch.zeros(2, 3), mask, "top_entropy", 0.5)
    assert flat.tolist() == [[True, True, True], [False, False, False]]


def test_threshold_keeps_what_reaches_it() -> None:
    entropy, mask = torch.tensor([0.1, 0.5, 0.7, 9.0]), torch.tensor([True, True, True, False])
    assert select_tokens(entropy, mask, "threshold", threshold=0.5).tolist() == [False, True, True, False]
    assert select_tokens(entropy, mask, "threshold", threshold=0.51).tolist() == [False, False, True, False]
    assert select_tokens(entropy, mask, "threshold", threshold=0.0).equal(mask)
    assert not select_tokens(entropy, mask, "threshold", threshold=5.0).any()


def test_all_is_the_response() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    assert torch.equal(select_tokens(torch.full((2, 2), torch.nan), mask, "all"), mask)


def test_random_follows_its_generator_and_is_uniform() -> None:
    entropy, mask = torch.full((50,), torch.nan), torch.arange(50) % 2 == 0
    first, again = (select_tokens(entropy, mask, "random", 0.2, generator=seeded(1)) for _ in range(2))
    assert torch.equal(first, again)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert torch.equal(select_tokens(entropy, mask, "random", 0.2), first), "torch's generator is the default"
    generator = seeded(2)
    counts = sum(select_tokens(entropy, mask, "random", 0.2, generator=generator).int() for _ in range(2000))
    assert isinstance(counts, Tensor)
    # Each of 25 tokens is kept with probability 1/5: 400 of 2000, standard deviation 18.
    assert counts[mask].min() > 310 and counts[mask].max() < 490 and not counts[~mask].any()


@pytest.mark.parametrize("rule", ["top_entropy", "bottom_entropy"])
def test_more_than_2_to_24_tokens(rule: str) -> None:
    num_tokens = 2**24 + 3
    entropy = torch.zeros(num_tokens)
    entropy[-1] = 1.0 if rule == "top_entropy" else -1.0
    selected = select_tokens(entropy, torch.ones(num_tokens, dtype=torch.bool), rule, 0.2)
    kept = num_selected(num_tokens, 0.2)
    assert selected.sum() == kept and selected[-1] and selected[: kept - 1].all()


@pytest.mark.parametrize("rule", ENTROPY_RULES)
def test_no_response_tokens(rule: str) -> None:
    threshold = 0.5 if rule == "threshold" else None
    selected = select_tokens(torch.rand(2, 3), torch.zeros(2, 3, dtype=torch.bool), rule, threshold=threshold)
    assert selected.shape == (2, 3) and not selected.any()


@pytest.mark.parametrize("rule", ["top_entropy", "bottom_entropy", "threshold"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_entropy_must_be_finite_where_it_is_read(rule: str, bad: float) -> None:
    entropy = torch.tensor([0.1, bad, bad, 0.2, bad])
    mask = torch.tensor([True, True, True, True, False])
    with pytest.raises(ValueError, match="NaN or infinite at 2 of 4 response tokens"):
        select_tokens(entropy, mask, rule, threshold=0.1 if rule == "threshold" else None)


def test_per_sequence_keeps_a_fraction_of_each() -> None:
    entropy = torch.tensor([[9.0, 8.0, 7.0, 6.0], [0.1, 0.4, 0.3, 0.2], [1.0, 2.0, 3.0, 4.0]])
    mask = torch.tensor([[True] * 4, [True] * 4, [False] * 4])
    expected = [[True, True, False, False], [False, True, True, False], [False] * 4]
    assert select_tokens_per_sequence(entropy, mask, "top_entropy", 0.5).tolist() == expected
    assert select_tokens(entropy, mask, "top_entropy", 0.5).tolist() == [[True] * 4, [False] * 4, [False] * 4]
    reached = select_tokens_per_sequence(entropy, mask, "threshold", threshold=0.3)
    assert torch.equal(reached, select_tokens(entropy, mask, "threshold", threshold=0.3)) and reached.sum() == 6
    everywhere = torch.ones(40, 10, dtype=torch.bool)
    rows = select_tokens_per_sequence(torch.zeros(40, 10), everywhere, "random", generator=seeded())
    assert (rows.sum(1) == 2).all() and len({tuple(row) for row in rows.tolist()}) > 10, "rows must not share a draw"


@pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("scope", ["micro_batch", "mini_batch", "rollout_batch", "sequence"])
@pytest.mark.parametrize("rule", ["all", *EXACT_RULES])
def test_the_count_known_ahead_is_that_of_the_selection(rule: str, scope: str, ratio: float) -> None:
    mask = torch.arange(8) < torch.tensor([1, 3, 0, 7, 2])[:, None]
    config = SelectionConfig.model_validate({"rule": rule, "scope": scope, "ratio": ratio, "entropy": "rollout"})
    cuts = list(torch.arange(5).split(2))
    signals = signals_of(mask, entropy=torch.rand(5, 8, generator=seeded()), generator=seeded())
    selected = choose(signals, config, WeightsConfig(), cuts).selected_BT
    assert count_selected(mask, config, cuts) == int(selected.sum())
    with pytest.raises(ValueError, match='^rule "threshold" has no count before it has seen the signals'):
        count_selected(mask, SelectionConfig(rule="threshold", threshold=0.5), cuts)


def test_entropy_threshold() -> None:
    entropy, mask = torch.tensor([0.1, 0.9, 0.5, 7.0]), torch.tensor([True, True, True, False])
    assert entropy_threshold(entropy, select_tokens(entropy, mask, "top_entropy", 0.5)).item() == pytest.approx(0.5)
    assert entropy_threshold(entropy, torch.zeros(4, dtype=torch.bool)).isnan()


@pytest.mark.parametrize("select", [select_tokens, select_tokens_per_sequence])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "top"}, "rule = 'top' is unknown, or reads more than entropies; choose one of"),
        ({"ratio": 0.0}, r"ratio = 0.0 must lie in \(0, 1\]"),
        ({"ratio": 1.5}, "ratio = 1.5"),
        ({"ratio": math.nan}, "ratio = nan"),
        ({"rule": "threshold"}, 'goes with rule "threshold"'),
        ({"threshold": 0.5}, "only with it"),
        ({"rule": "threshold", "threshold": -0.1}, "threshold = -0.1"),
        ({"response_mask": torch.ones(2, 2, dtype=torch.bool)}, "do not match"),
        ({"response_mask": torch.ones(2, 3)}, "response_mask bool"),
        ({"entropy": torch.ones(2, 3).int()}, "entropy must be floating"),
    ],
)
def test_bad_requests_are_named(select: object, changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"entropy": torch.zeros(2, 3), "response_mask": torch.ones(2, 3, dtype=torch.bool)}
    assert callable(select)
    with pytest.raises(ValueError, match=message):
        select(**(arguments | changes))


@pytest.mark.parametrize("select", [select_tokens, select_tokens_per_sequence, entropy_threshold])
def test_what_is_no_tensor_is_named(select: object) -> None:
    assert callable(select)
    tensors = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for place, name in enumerate(["entropy", "selected_mask" if select is entropy_threshold else "response_mask"]):
        with pytest.raises(TypeError, match=f"^{name}: torch tensor expected, got list"):
            select(*(tensor.tolist() if number == place else tensor for number, tensor in enumerate(tensors)))


@settings(deadline=None)
@given(
    st.lists(st.floats(-4, 4, width=16) | st.sampled_from([0.0, -0.0, 0.5]), min_size=1, max_size=40),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.integers(1, 40),
    st.integers(1, 9),
)
def test_keep_highest_equals_a_stable_sort_in_chunks_of_any_size(
    scores: list[float], dtype: torch.dtype, num_kept: int, chunk: int
) -> None:
    scores_N, num_kept = torch.tensor(scores, dtype=dtype), min(num_kept, len(scores))
    expected = torch.zeros(len(scores), dtype=torch.bool)
    expected[scores_N.sort(descending=True, stable=True).indices[:num_kept]] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_k, "CHUNK", chunk)
        assert torch.equal(top_k.keep_highest(scores_N, num_kept), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 1999, 19_999, 20_000])
def test_kth_highest_is_exact_to_the_last_bit(dtype: torch.dtype, rank: int) -> None:
    scores_N = torch.randn(20_000, dtype=torch.float64, generator=seeded()).to(dtype)
    assert top_k.kth_highest(scores_N, rank) == scores_N.sort(descending=True).values[rank - 1]


def test_kth_highest_counts_exactly_beyond_2_to_24() -> None:
    scores_N = torch.ones(2**24 + 2, dtype=torch.bfloat16)
    scores_N[7] = 0.5
    assert [top_k.kth_highest(scores_N, 2**24 + place).item() for place in (1, 2)] == [1.0, 0.5]


def test_kth_highest_where_the_middle_bits_are_all_set() -> None:
    scores_N = (0x3FF0_FFFF_0000_0000 + torch.arange(5)).view(torch.float64)
    assert [top_k.kth_highest(scores_N, rank) for rank in range(1, 6)] == scores_N.flip(0).tolist()
