"""What the pages of an analysis and of a drift show: which prompts, which words, and from which entropy on a fork."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch

from forkrl.analysis.drift import change_table, overlap_table, percentile_table
from forkrl.report import plots
from forkrl.report.drift_page import drift_headline, drift_page, overlap_curves
from forkrl.report.fork_view import SHOWN_RESPONSES, SHOWN_TOKENS, choose_prompts
from tests.fabricated_results import made_up_results


def lengths(num_prompts: int, length: int, samples: int = 1) -> pd.DataFrame:
    prompts = np.repeat(np.arange(num_prompts), samples)
    return pd.DataFrame({"prompt": prompts, "length": length})


@pytest.mark.parametrize(("layers", "share"), [(1, 1.0), (5, 0.5), (9, 1 / 3)])
def test_more_layers_leave_room_for_fewer_tokens(layers: int, share: float) -> None:
    length = SHOWN_TOKENS // 60
    chosen = choose_prompts(lengths(100, length), layers)
    assert len(chosen) == 60 * share
    assert len(choose_prompts(lengths(10, length), layers)) == 10, "what fits is shown whole"


def test_a_page_shows_one_prompt_at_least_and_so_many_responses_at_most() -> None:
    assert len(choose_prompts(lengths(5, 2 * SHOWN_TOKENS), layers=3)) == 1
    assert len(choose_prompts(lengths(30, 1, samples=SHOWN_RESPONSES // 10))) == 10


def drift_mark(first: list[float], last: list[float]) -> float | None:
    """The mark of the page of a drift between two checkpoints, of responses to three prompts."""
    entropies = {"step 0": torch.tensor(first), "step 9": torch.tensor(last)}
    prompts = torch.arange(len(first)) % 3
    tables = {
        "overlap": overlap_table(entropies, prompts),
        "change": change_table(entropies["step 0"].double(), entropies["step 9"].double(), prompts, bins=2),
        "percentiles": percentile_table(entropies),
    }
    facts: dict[str, Any] = {
        "checkpoints": ["step 0", "step 9"], "ratio": 0.2, "prompts": 3, "tokens": len(first), "temperature": 0.7,
        "overlap": 0.5, "overlap_low": 0.4, "overlap_high": 0.6,
    }  # fmt: skip
    page = drift_page(made_up_results("drift", facts, tables), [], ["step 0", "step 9"])
    assert drift_headline(facts, tables["change"]).startswith("At temperature 0.7, from step 0 to step 9, 50.0% [40")
    assert page.forks is not None
    assert page.forks.mark is not None and f"above {page.forks.mark:.3g} nats" in page.forks.lead
    return page.forks.mark


def test_forks_of_a_drift_are_those_of_its_first_checkpoint() -> None:
    grows, shrinks = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert drift_mark(grows, shrinks) == pytest.approx(4.0)
    assert drift_mark(shrinks, grows) == pytest.approx(0.4)


def drawn(figure: Figure) -> list[np.ndarray]:
    """The outlines of the words, largest first."""
    return [np.asarray(patch.get_path().vertices) for patch in figure.axes[0].patches if isinstance(patch, PathPatch)]


def test_each_word_cloud_draws_its_own_end_with_the_most_extreme_type_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "CLOUD_WORDS", 3)
    types = pd.DataFrame({"text": [" wait", " so", "but", " the", "then", " of", "tion", "ing"]})
    lowest, highest = (drawn(plots.word_cloud(types, highest=end)) for end in (False, True))
    turned = drawn(plots.word_cloud(types.iloc[[7, 6, 5]], highest=True))  # drawn alike but for the colour
    alone = drawn(plots.word_cloud(types.iloc[:3], highest=True))
    assert len(lowest) == len(highest) == 3
    for found, expected in ((lowest, turned), (highest, alone)):
        for outline, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(outline, other)
    assert lowest[0].shape != highest[0].shape


def overlap_of(checkpoints: list[str], shares: list[float]) -> pd.DataFrame:
    columns = {f"with_{side}{end}": shares for side in ("first", "last") for end in ("", "_low", "_high")}
    return pd.DataFrame({"checkpoint": checkpoints, **columns})


def test_checkpoints_of_a_run_are_drawn_at_their_steps() -> None:
    (axes,) = overlap_curves(overlap_of(["step 0", "step 5", "step 50", "step 200"], [1, 0.9, 0.8, 0.7]), 0.2).axes
    assert np.asarray(axes.lines[0].get_xdata()).tolist() == [0, 5, 50, 200]
    assert axes.get_xticks().tolist() == [0, 50, 200] and axes.get_xlabel() == "step"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "50", "200"]
    (axes,) = overlap_curves(overlap_of(["base", "step 9"], [1, 0.9]), 0.2).axes
    assert axes.get_xticks().tolist() == [0, 1] and axes.get_xlabel() == "checkpoint"


@pytest.mark.parametrize("lowest", [0.998, 0.96, 0.86, 0.31, 0.0])
def test_overlap_has_ticks_at_whole_percent_up_to_100(lowest: float) -> None:
    (axes,) = overlap_curves(overlap_of(["step 0", "step 5"], [1, lowest]), 0.2).axes
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert 4 <= len(ticks) <= 7 and max(ticks) == pytest.approx(1)
    assert low <= lowest and [100 * tick for tick in ticks] == pytest.approx([round(100 * tick) for tick in ticks])


def test_every_word_of_a_cloud_lies_within_it() -> None:
    rng = random.Random(10)
    letters = "abcdefgjpqy,;_|()Ågß"
    words = [" ", *("".join(rng.choice(letters) for _ in range(rng.randint(1, 9))) for _ in range(99))]
    rng.shuffle(words)
    figure = plots.word_cloud(pd.DataFrame({"text": words}), highest=True)
    (axes,), outlines = figure.axes, np.vstack(drawn(figure))
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert outlines[:, 0].min() < -1, "one is wider than its place in the layout"
    assert left < outlines[:, 0].min() and outlines[:, 0].max() < right
    assert top < outlines[:, 1].min() and outlines[:, 1].max() < bottom
