"""The benchmark of growing costs, on its smallest case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.scaling import BASE, GROWN, draw, measure_apart, slope


def test_the_slope_is_the_power_of_the_larger_half() -> None:
    x = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert slope(x, [1.0, 1.0, *(3 * value**1.5 for value in x[2:])]) == pytest.approx(1.5)


def test_a_case_has_seconds_and_memory_of_both_halves() -> None:
    figures = measure_apart(BASE | {"batch": 8, "response": 8}, "cpu")
    assert figures["rollout_s"] > 0 and figures["update_s"] > 0
    assert figures["rollout_peak_bytes"] >= 0 and figures["update_peak_bytes"] >= 0


def test_the_figure_names_every_slope(tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [
        {
            "grown": name, **BASE, "parameters": 10 * (place + 1), **step,
            **{f"{part}_s": float(place + 1) for part in ("rollout", "update")},
            **{f"{part}_peak_bytes": 2**20 * (place + 1) for part in ("rollout", "update")},
        }
        for name, steps in GROWN.items()
        for place, step in enumerate(steps)
    ]  # fmt: skip
    draw(cases, tmp_path / "scaling.svg")
    assert (tmp_path / "scaling.svg").read_text().count("slope") == 4 * len(GROWN)
