"""The masks of docs/methods.md on tokens worked out by hand, with hostile values, and how functions are loaded."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forkrl.config import SelectionConfig, TrainConfig, WeightsConfig
from forkrl.config.recipe import load_recipe
from forkrl.errors import UserError
from forkrl.method.masks.gmts import gmts
from forkrl.method.masks.proximal_entropy import proximal_entropy
from forkrl.method.selection import choose, select
from forkrl.methods import MASKS
from tests.signals import signals_of

MASK = torch.tensor([[False, True, True, True, True], [False, True, True, False, False]])


def on_mask(*values: float) -> Tensor:
    """Values of the response tokens in order, NaN elsewhere: a mask must not read those."""
    return torch.full(MASK.shape, math.nan).masked_scatter(MASK, torch.tensor(values))


def chosen(rule: str, ratio: float = 0.5, options: dict[str, Any] | None = None, **given: Any) -> list[bool]:
    """The decision on each response token."""
    known = {name: torch.where(MASK, each, 0.0) if each.shape == MASK.shape else each for name, each in given.items()}
    selected = select(signals_of(MASK, **known), rule, ratio, options)
    assert not selected[~MASK].any()
    return selected[MASK].tolist()


def test_by_probability() -> None:
    logprobs = on_mask(-0.1, -3.0, -0.5, -2.0, -4.0, -0.2)
    assert chosen("low_probability", logprobs=logprobs) == [False, True, False, True, True, False]
    assert chosen("high_probability", logprobs=logprobs) == [True, False, True, False, False, True]


def test_gmts_is_entropy_times_ratio_times_advantage_where_not_clipped() -> None:
    # Ratios 1, 1.2, 1.5 (above 1.28: clipped, as A > 0), 0.5 for A = 2; 1.5 and 0.7 (below 0.8: clipped) for A = -1.
    ratios = on_mask(1.0, 1.2, 1.5, 0.5, 1.5, 0.7)
    signals = signals_of(
        MASK,
        entropy=torch.where(MASK, on_mask(1.0, 1.0, 9.0, 1.0, 2.0, 9.0), 0.0),
        logprobs=torch.where(MASK, ratios.log(), 0.0),
        old_logprobs=torch.zeros(MASK.shape),
        advantages=torch.tensor([2.0, -1.0]),
    )
    assert gmts(signals)[MASK].tolist() == pytest.approx([2.0, 2.4, 0.0, 1.0, 3.0, 0.0])
    # The clip range is the recipe's.
    wide = replace(signals, clip=(0.5, 0.6))
    assert gmts(wide)[MASK].tolist() == pytest.approx([2.0, 2.4, 27.0, 1.0, 3.0, 6.3])


def test_proximal_entropy_compares_with_the_window_of_the_same_response() -> None:
    # exp(H) = 1, 2, 4, 1 and 3, 3; a window of 3: sums 3, 7, 7, 5 and 6, 6.
    entropy = on_mask(*(math.log(each) for each in (1.0, 2.0, 4.0, 1.0, 3.0, 3.0)))
    signals = signals_of(MASK, entropy=torch.where(MASK, entropy, 0.0))
    expected = [1 / 3, 2 / 7, 4 / 7, 1 / 5, 1 / 2, 1 / 2]
    assert proximal_entropy(signals, window=3)[MASK].tolist() == pytest.approx(expected)
    whole = proximal_entropy(signals)[MASK].tolist()
    assert whole == pytest.approx([1 / 8, 2 / 8, 4 / 8, 1 / 8, 1 / 2, 1 / 2])
    assert chosen("proximal_entropy", 0.5, {"window": 3}, entropy=entropy) == [False, False, True, False, True, True]


def test_proximal_entropy_of_long_responses_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(1, 400, generator=generator) * 6
    found = proximal_entropy(signals_of(torch.ones(1, 400, dtype=torch.bool), entropy=entropy), window=101)
    weight = entropy[0].double().exp()
    for t in range(0, 400, 37):
        assert float(found[0, t]) == pytest.approx(float(weight[t] / weight[max(0, t - 50) : t + 51].sum()), rel=1e-6)


def test_the_surprisal_index_lies_in_its_band() -> None:
    # -log p / H = 0.5, 0.05, 4, 3, and certain tokens: 0 / 0 counts as 0, 1 / 0 as infinite.
    logprobs, entropy = on_mask(-0.5, -0.05, -4.0, -3.0, 0.0, -1.0), on_mask(1.0, 1.0, 1.0, 1.0, 0.0, 0.0)
    assert chosen("rsi", logprobs=logprobs, entropy=entropy) == [True, False, False, True, False, False]
    wide = {"low": 0.0, "high": 5.0}
    assert chosen("rsi", options=wide, logprobs=logprobs, entropy=entropy) == [True, True, True, True, True, False]


def test_stapo_drops_unlikely_tokens_of_good_responses_below_the_quantile() -> None:
    logprobs = on_mask(*(math.log(each) for each in (0.001, 0.001, 0.5, 0.001, 0.001, 0.5)))
    entropy = on_mask(0.1, 5.0, 0.1, 0.2, 0.1, 0.1)  # the 80% quantile is the value of rank 4 of 0 to 5: 0.2
    given: dict[str, Any] = {"logprobs": logprobs, "entropy": entropy, "advantages": torch.tensor([1.0, -1.0])}
    assert chosen("stapo", **given) == [False, True, True, True, True, True]
    assert chosen("stapo", options={"quantile": 1.0}, **given) == [False, True, True, False, True, True]
    assert chosen("stapo", options={"probability": 0.0}, **given) == [True] * 6


@pytest.mark.parametrize("rule", sorted(MASKS))
def test_extreme_tokens_are_no_trouble(rule: str) -> None:
    """Certain tokens, impossible ones, no advantage, and a batch without a response token."""
    options = {"threshold": {"threshold": 0.5}}.get(rule)
    entropy, logprobs = on_mask(0.0, 0.0, 11.0, 11.0, 0.0, 3.0), on_mask(0.0, -1e3, -100.0, 0.0, -80.0, -1e-9)
    for advantages in (torch.zeros(2), torch.tensor([1e6, -1e6])):
        given: dict[str, Any] = {"entropy": entropy, "logprobs": logprobs, "advantages": advantages}
        assert len(chosen(rule, options=options, **given)) == 6
    assert not select(signals_of(torch.zeros(2, 3, dtype=torch.bool)), rule, 0.2, options).any()


def test_what_has_diverged_is_named() -> None:
    logprobs = on_mask(0.0, math.nan, 0.0, 0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="^logprobs is NaN or infinite at 1 of 6 response tokens$"):
        chosen("low_probability", logprobs=logprobs)


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("proximal_entropy", {"window": 0}, "window = 0 must be at least 1"),
        ("rsi", {"low": 2.0, "high": 1.0}, "low = 2.0 and high = 1.0 must be a band above 0"),
        ("stapo", {"quantile": 1.5}, "quantile = 1.5"),
        ("gmts", {"windw": 3}, 'selection.options.windw: selection.rule = "gmts" has no such option; it has none'),
        ("rsi", {"hgh": 3}, "its options: low, high"),
        ("threshold", {}, 'selection.rule = "threshold" needs selection.options.threshold'),
        ("no_such_module:rule", {}, r'selection.rule = "no_such_module:rule" cannot be imported \(ModuleNotFound'),
        ("math:pi", {}, 'selection.rule = "math:pi" is a float, not a function of signals'),
    ],
)
def test_mistakes_are_named(rule: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, UserError), match=message):
        chosen(rule, options=options, entropy=on_mask(*[1.0] * 6), logprobs=on_mask(*[-1.0] * 6))


OWN = """
def longest(signals, *, least=3):
    return (signals.lengths >= least)[:, None].expand(signals.response_mask.shape)

def late(signals):
    return signals.position.float()

def double(signals):
    return 2 * (signals.advantages > 0).float()[:, None].expand(signals.response_mask.shape)

def wrong(signals):
    return signals.advantages
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_methods.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_methods", raising=False)
    return "own_methods"


def test_functions_of_users_return_bools_or_scores(own: str) -> None:
    assert chosen(f"{own}:longest") == [True] * 4 + [False] * 2
    assert chosen(f"{own}:longest", options={"least": 1}) == [True] * 6
    assert chosen(f"{own}:late") == [False, True, True, True, False, False]  # positions 0 to 3, and 0, 1
    with pytest.raises(UserError, match=r'selection.rule = "own_methods:wrong" returned \(2,\) for tokens \(2, 5\)'):
        chosen(f"{own}:wrong")


def test_weights_are_applied_in_the_scope_of_the_selection(own: str) -> None:
    signals = signals_of(MASK, advantages=torch.tensor([1.0, -1.0]))
    for scope in ("micro_batch", "mini_batch", "sequence"):
        selection, weights = SelectionConfig(rule="all", scope=scope), WeightsConfig(rule=f"{own}:double")
        choice = choose(signals, selection, weights, [torch.tensor([1]), torch.tensor([0])])
        assert choice.selected_BT.equal(MASK)
        assert choice.weights_BT is not None
        assert choice.weights_BT[MASK].tolist() == [2.0] * 4 + [0.0] * 2
        assert (choice.weights_BT[~MASK] == 1).all()
    with pytest.raises(UserError, match=r'weights.rule = "own_methods:wrong" returned \(2,\)'):
        choose(signals, SelectionConfig(rule="all"), WeightsConfig(rule=f"{own}:wrong"), [torch.arange(2)])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["selection.rule=gmst"], "did you mean gmts?"),
        (["selection.rule=gmts", "selection.entropy=rollout"], 'which is 1 for every token with selection.entropy = "'),
        (["weights.rule=reinforce"], "did you mean w_reinforce?"),
        (["loss.objective=cipso"], "did you mean cispo"),
    ],
)
def test_recipes_that_make_no_sense_are_rejected(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_recipe(TrainConfig, None, overrides)
    assert message in str(refused.value) and "\n" not in str(refused.value)
