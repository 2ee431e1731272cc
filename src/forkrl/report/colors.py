"""The entropy colour ramp of pages and terminals."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import DEFAULT_TERMINAL_THEME
from rich.text import Text

from forkrl.errors import printable

COLOR_BINS = 24

# Magma has even lightness steps and is safe for colour blindness. The page background is 0, so each theme uses
# the part of the map that starts near its background.
_LIGHT_MAP, _DARK_MAP = ("magma_r", 0.03, 0.80), ("magma", 0.16, 0.95)

_SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {terminal_width} {terminal_height}">
<style>
.{unique_id}-matrix {{ font: {char_height}px monospace; }}
{styles}
</style>
<defs>{lines}</defs>
<rect width="100%" height="100%" fill="#ffffff"/>
<g class="{unique_id}-matrix">
{backgrounds}
{matrix}
</g>
</svg>
"""
"""For rich: without its window and its web font."""


def ramp(fraction: float, *, dark: bool) -> tuple[str, str]:
    """Background and text colour as ``#rrggbb`` for ``fraction`` (0 to 1) of the scale."""
    name, start, stop = _DARK_MAP if dark else _LIGHT_MAP
    ground = to_hex(matplotlib.colormaps[name](start + fraction * (stop - start)))
    return ground, _readable_on(ground)


def top_entropy(entropy: Iterable[float]) -> float:
    """Entropy (nats) of the last colour: the 99.5th percentile rounded up to a tenth, at least 0.5."""
    entropy_N = np.fromiter(entropy, dtype=np.float64)
    entropy_N = entropy_N[np.isfinite(entropy_N)]
    top = float(np.percentile(entropy_N, 99.5)) if len(entropy_N) else 0.0
    return round(max(float(np.ceil(top * 10)) / 10, 0.5), 1)


def color_bin(entropy: float, top: float) -> int:
    """Index in ``range(COLOR_BINS)``, clamped; the last bin is at ``top`` (nats)."""
    if entropy <= 0:
        return 0
    return min(COLOR_BINS - 1, round(min(entropy / top, 1.0) * (COLOR_BINS - 1))) if top > 0 else COLOR_BINS - 1


def token_colors(bins: int = COLOR_BINS) -> str:
    """CSS classes ``.e0`` … for the entropy bins: background and text colour, both themes."""
    rules = []
    for index in range(bins):
        light, light_ink = ramp(index / (bins - 1), dark=False)
        dark, dark_ink = ramp(index / (bins - 1), dark=True)
        rules.append(f".e{index}{{background:light-dark({light},{dark});color:light-dark({light_ink},{dark_ink})}}")
    return "\n".join(rules)


def _readable_on(color: str) -> str:
    """Black or white, whichever has the higher WCAG contrast with ``color``."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"


def coloured_response(
    tokens: Sequence[str], entropy: Sequence[float], *, top: float | None = None, dark: bool = True
) -> Text:
    """The response as ``rich`` text: ``rich.print`` shows it in colour, ``str`` gives plain text.

    Control characters are escaped (``\\x1b``); model text is never parsed as markup. Line breaks are kept and marked.

    Args:
        tokens: T texts.
        entropy: T values in nats; values that are not finite are struck through.
        top: entropy of the last colour in nats; None: the 99.5th percentile, as on the page.
        dark: use the ramp for a dark terminal.
    """
    scale = top_entropy(entropy) if top is None else top
    text = Text(end="")
    for token, value in zip(tokens, entropy, strict=True):
        style = Style(strike=True) if not math.isfinite(value) else bin_style(color_bin(value, scale), dark=dark)
        shown = "⏎\n".join(map(printable, token.split("\n"))) or "⟨⟩"
        for line in shown.splitlines(keepends=True):
            text.append(line.rstrip("\n"), style)
            text.append(line[len(line.rstrip("\n")) :])  # a styled line break would colour the rest of the line
    return text


def response_svg(tokens: Sequence[str], entropy: Sequence[float], top: float, columns: int = 110) -> str:
    """The response as an SVG picture on white, with its legend (paper: figures 12 to 17). Arguments: see above."""
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(entropy_legend(top, dark=False), end="\n\n")
    console.print(coloured_response(tokens, entropy, top=top, dark=False))
    return console.export_svg(title="", theme=DEFAULT_TERMINAL_THEME, code_format=_SVG, unique_id="response")


def entropy_legend(top: float, *, dark: bool = True) -> Text:
    """One-line colour legend from 0 to ``top`` nats."""
    text = Text("0 ", end="")
    for index in range(COLOR_BINS):
        text.append(" ", bin_style(index, dark=dark))
    text.append(f" ≥ {top:.1f} nats")
    return text


def bin_style(index: int, *, dark: bool) -> Style:
    if index == 0:
        return Style()
    ground, ink = ramp(index / (COLOR_BINS - 1), dark=dark)
    return Style(color=ink, bgcolor=ground)
