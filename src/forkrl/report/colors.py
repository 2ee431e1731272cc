"""The entropy ramp: one scale of colours for pages and for responses printed in a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from rich.style import Style
from rich.text import Text

from forkrl.errors import printable

COLOR_BINS = 24

# Magma: lightness falls evenly, and the order survives every kind of colour blindness. The page's own background is
# 0, so each theme takes the part of the map that starts near its ground.
_LIGHT_MAP, _DARK_MAP = ("magma_r", 0.03, 0.80), ("magma", 0.16, 0.95)


def ramp(fraction: float, *, dark: bool) -> tuple[str, str]:
    """Ground and readable ink, both ``#rrggbb``, for an entropy at ``fraction`` (0 to 1) of the scale."""
    name, start, stop = _DARK_MAP if dark else _LIGHT_MAP
    ground = to_hex(matplotlib.colormaps[name](start + fraction * (stop - start)))
    return ground, _readable_on(ground)


def top_entropy(entropy: Iterable[float]) -> float:
    """The entropy (nats) that gets the last colour: the 99.5th percentile, rounded up to a tenth, at least 0.5."""
    entropy_N = np.fromiter(entropy, dtype=np.float64)
    entropy_N = entropy_N[np.isfinite(entropy_N)]
    top = float(np.percentile(entropy_N, 99.5)) if len(entropy_N) else 0.0
    return round(max(float(np.ceil(top * 10)) / 10, 0.5), 1)


def color_bin(entropy: float, top: float) -> int:
    """Which of the ``COLOR_BINS`` an entropy falls in when ``top`` (nats) has the last; never out of range."""
    if entropy <= 0:
        return 0
    return min(COLOR_BINS - 1, round(min(entropy / top, 1.0) * (COLOR_BINS - 1))) if top > 0 else COLOR_BINS - 1


def token_colors(bins: int = COLOR_BINS) -> str:
    """CSS for the classes ``.e0`` … of the entropy bins: ground and readable text, in both themes."""
    rules = []
    for index in range(bins):
        light, light_ink = ramp(index / (bins - 1), dark=False)
        dark, dark_ink = ramp(index / (bins - 1), dark=True)
        rules.append(f".e{index}{{background:light-dark({light},{dark});color:light-dark({light_ink},{dark_ink})}}")
    return "\n".join(rules)


def _readable_on(color: str) -> str:
    """Black or white, whichever has the higher contrast (WCAG relative luminance) on ``color``."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"


def coloured_response(
    tokens: Sequence[str], entropy: Sequence[float], *, top: float | None = None, dark: bool = True
) -> Text:
    """The response as ``rich`` text: ``rich.print`` shows it in colour, and ``str`` gives it bare.

    A character that a terminal would obey is escaped (``\\x1b``); line breaks stay, with a mark, so that the response
    reads as it was laid out. Text that the model wrote is never taken for markup.

    Args:
        tokens: T texts.
        entropy: nats, T values; one that is not finite is shown struck through, for it has no colour.
        top: the entropy that gets the last colour; by default that of the page, the 99.5th percentile.
        dark: the part of the ramp that suits a dark terminal; False for a light one.
    """
    scale = top_entropy(entropy) if top is None else top
    text = Text(end="")
    for token, value in zip(tokens, entropy, strict=True):
        style = Style(strike=True) if not math.isfinite(value) else bin_style(color_bin(value, scale), dark=dark)
        shown = "⏎\n".join(map(printable, token.split("\n"))) or "⟨⟩"
        for line in shown.splitlines(keepends=True):
            text.append(line.rstrip("\n"), style)
            text.append(line[len(line.rstrip("\n")) :])  # a coloured line break would colour the rest of the line
    return text


def entropy_legend(top: float, *, dark: bool = True) -> Text:
    """One line that says what the colours stand for, from 0 to ``top`` nats."""
    text = Text("0 ", end="")
    for index in range(COLOR_BINS):
        text.append(" ", bin_style(index, dark=dark))
    text.append(f" ≥ {top:.1f} nats")
    return text


def bin_style(index: int, *, dark: bool) -> Style:
    """The first bin is the terminal's own ground, as it is the page's."""
    if index == 0:
        return Style()
    ground, ink = ramp(index / (COLOR_BINS - 1), dark=dark)
    return Style(color=ink, bgcolor=ground)
