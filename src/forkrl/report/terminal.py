"""A response in the terminal, each token on the colour of its entropy: the page's ramp, where there is no browser."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.style import Style
from rich.text import Text

from forkrl.report.colors import COLOR_BINS, color_bin, ramp, top_entropy
from forkrl.report.visible_text import is_hidden


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

    Raises:
        ValueError: ``tokens`` and ``entropy`` differ in length.
    """
    scale = top_entropy(entropy) if top is None else top
    text = Text(end="")
    for token, value in zip(tokens, entropy, strict=True):
        style = Style(strike=True) if not math.isfinite(value) else bin_style(color_bin(value, scale), dark=dark)
        for line in _readable(token).splitlines(keepends=True):
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


def _readable(token: str) -> str:
    shown = "".join(_escaped(c) if is_hidden(c) else c for c in token)
    return shown.replace("\n", "⏎\n") or "⟨⟩"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
