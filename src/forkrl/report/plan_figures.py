"""The figure of ``forkrl plan``, as a matplotlib Figure, from ``plan.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from forkrl.report.style import BLUE, GREEN, GRID, INK, MUTED, PURPLE, VERMILION, finish, panels

GIB = 2**30
KINDS = (
    ("training state", BLUE, ""),
    ("gathered and temporary", PURPLE, "//"),
    ("activations", GREEN, ""),
    ("logits", VERMILION, ""),
    ("sampling weights", MUTED, ".."),
    ("KV cache", GRID, ""),
)
_KIND_OF = {
    "gathered weights": 1,
    "gradients before reduction": 1,
    "temporaries of AdamW": 1,
    "weights, bf16": 1,
    "activations": 2,
    "logits": 3,
    "head, in tiles": 3,
    "sampling": 3,
    "sampling weights, bf16": 4,
    "sampling weights, fp32": 4,
    "sampling workspace": 4,
    "stacked layers": 4,
    "KV cache": 5,
}
"""Of items; all others are state of the training."""


def kind_of(item: str) -> str:
    """Under which of ``KINDS`` an item is drawn."""
    return KINDS[_KIND_OF.get(item, 0)][0]


def memory_bars(rows: Sequence[Mapping[str, Any]], card: Mapping[str, Any]) -> Figure:
    """Memory of one GPU by kind, a bar for every number of nodes and phase, against the card's.

    Args:
        rows: {"nodes", "gpus", "phase", "items": {name: bytes}}, top to bottom.
        card: with "memory" and "usable", in bytes, and "name".
    """
    figure, (axes,) = panels(1, (5.6, 1.2 + 0.27 * len(rows)))
    places = -np.arange(len(rows), dtype=float)
    left = np.zeros(len(rows))
    for name, color, hatch in KINDS:
        sizes = np.array([sum(size for item, size in row["items"].items() if kind_of(item) == name) for row in rows])
        if not sizes.any():
            continue
        axes.barh(
            places, sizes / GIB, left=left / GIB, height=0.72, color=color, hatch=hatch, label=name, edgecolor=INK,
            linewidth=0.3,
        )  # fmt: skip
        left += sizes
    axes.axvline(card["memory"] / GIB, color=INK, linewidth=1.2)
    axes.axvline(card["usable"] / GIB, color=MUTED, linewidth=1, linestyle="--")
    finish(axes, "", xlabel="GiB of one GPU", legend=False)
    axes.grid(visible=False, axis="y")
    axes.set_yticks(places, [f"{row['phase']}, {row['gpus']} GPU{'s' * (row['gpus'] > 1)}" for row in rows])
    axes.set_ylim(places[-1] - 0.6, 0.6)
    axes.set_xlim(left=0)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.35, 1.0), ncols=3, frameon=False, fontsize=9, labelcolor=INK,
        handlelength=1.4, columnspacing=1.2,
    )  # fmt: skip
    return figure
