"""Text a model wrote, shown in page and terminal: every character that acts is seen, and colours stay readable."""

from __future__ import annotations

import io
import json
import re
from xml.etree import ElementTree

import pytest
from rich.console import Console

from forkrl.report import coloured_response, entropy_legend
from forkrl.report.colors import COLOR_BINS, color_bin, ramp, response_svg, token_colors, top_entropy
from forkrl.report.formatting import script_json, visible, visible_token

HOSTILE = "</script><img src=x onerror=alert(1)>&\u2028\x1b[31m\x00\u202e"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ascii", "plain ascii"),
        ("naïve 数学 🙂 é", "naïve 数学 🙂 é"),
        ("\x1b[31mred\x1b[0m", "␛[31mred␛[0m"),
        ("\x00\x07\x7f", "␀␇␡"),
        ("a\nb", "a\nb"),
        ("\r\t", "␍␉"),
        ("\u202egnp.exe", "⟨U+202E⟩gnp.exe"),
        ("\u2066\u2069\u200f", "⟨U+2066⟩⟨U+2069⟩⟨U+200F⟩"),
        ("\u200b\ufeff", "⟨U+200B⟩⟨U+FEFF⟩"),
        ("\u2028\u2029", "⟨U+2028⟩⟨U+2029⟩"),
        ("\ud800x\udfff", "⟨U+D800⟩x⟨U+DFFF⟩"),
        ("\x85\x9b", "⟨U+0085⟩⟨U+009B⟩"),
        ("\ue000\U000e0041\U0010ffff", "⟨U+E000⟩⟨U+E0041⟩⟨U+10FFFF⟩"),
    ],
)
def test_characters_that_act_are_shown(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize(("token", "shown"), [("\n", "⏎\n"), ("\t", "⇥"), ("", "⟨⟩"), (" ", " "), ("<b>", "<b>")])
def test_tokens_leave_a_mark(token: str, shown: str) -> None:
    assert visible_token(token) == shown


def test_script_json_cannot_leave_its_element() -> None:
    hostile = {"a": HOSTILE + "\ud800<!--", "b": [1.5, None, True]}
    text = script_json(hostile)
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(text) == hostile
    with pytest.raises(ValueError, match="not JSON compliant"):
        script_json(float("nan"))


def test_token_text_is_readable_on_every_ground() -> None:
    def luminance(color: str) -> float:
        channels = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    rules = re.findall(r"background:light-dark\((.*?),(.*?)\);color:light-dark\((.*?),(.*?)\)", token_colors(24))
    assert len(rules) == 24
    for ground, ink in [(rule[0], rule[2]) for rule in rules] + [(rule[1], rule[3]) for rule in rules]:
        light, dark = sorted((luminance(ground), luminance(ink)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (ground, ink)
    for theme, order in ((0, -1), (1, 1)):
        lightness = [order * luminance(rule[theme]) for rule in rules]
        assert lightness == sorted(lightness), "more entropy must always stand out more"


def test_scale_ends_at_the_995th_percentile_and_skips_what_is_not_finite() -> None:
    assert top_entropy([0.01 * i for i in range(201)] + [float("nan"), float("inf")]) == 2.0
    assert top_entropy([]) == top_entropy([0.1]) == 0.5


@pytest.mark.parametrize(("entropy", "place"), [(-1e-6, 0), (0.0, 0), (1.0, 12), (2.0, COLOR_BINS - 1), (9.0, 23)])
def test_color_bin(entropy: float, place: int) -> None:
    assert color_bin(entropy, 2.0) == place


def printed(tokens: list[str], entropy: list[float]) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="truecolor", width=200)
    console.print(coloured_response(tokens, entropy, top=2.0))
    return stream.getvalue()


def test_terminal_colours_are_those_of_the_page() -> None:
    text = coloured_response(["calm", "half", "hot"], [0.0, 1.0, 5.0], top=2.0)
    assert str(text) == "calmhalfhot"
    grounds = [span.style.bgcolor.triplet.hex for span in text.spans if span.style.bgcolor]  # type: ignore[union-attr]
    assert grounds == [ramp(12 / 23, dark=True)[0], ramp(1.0, dark=True)[0]]
    light = coloured_response(["hot"], [5.0], top=2.0, dark=False)
    assert light.spans[0].style.bgcolor.triplet.hex == ramp(1.0, dark=False)[0]  # type: ignore[union-attr]


def test_terminal_obeys_nothing_in_a_response() -> None:
    tokens = ["\x1b[2J", "\x07\x9b", "\u202e", "\ud800", "[bold red]no markup[/]", "\r", ""]
    shown = str(coloured_response(tokens, [1.0] * 7))
    assert shown == r"\x1b[2J\x07\x9b\u202e\ud800[bold red]no markup[/]\x0d⟨⟩"
    sent = re.sub(r"\x1b\[[\d;]*m", "", printed(tokens, [2.0] * 7))  # colours are the only sequences sent
    assert "\x1b" not in sent
    assert "[bold red]no markup[/]" in sent


def test_terminal_keeps_line_breaks_and_colours_none() -> None:
    text = coloured_response(["a\n\n", "b"], [2.0, 0.0])
    assert str(text) == "a⏎\n⏎\nb"
    coloured = {str(text)[i] for span in text.spans if span.style for i in range(span.start, span.end)}
    assert "\n" not in coloured


def test_terminal_marks_entropy_that_is_no_number() -> None:
    assert coloured_response(["x"], [float("nan")]).spans[0].style.strike  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="zip"):
        coloured_response(["x"], [])


def test_picture_of_a_response_is_xml_with_the_colours_of_the_page() -> None:
    tokens = ["calm", "hot", "\n", "</g><script>", "\x1b[2J", "\ud800", "[red]"]
    drawn = response_svg(tokens, [0.0, 2.0, 0.5, 1.0, 2.0, 2.0, float("nan")], 2.0)
    root = ElementTree.fromstring(drawn)
    assert "</g><script>" in "".join(root.itertext()).replace("\xa0", " ")
    assert ramp(1.0, dark=False)[0] in drawn and "http://www.w3.org/2000/svg" in drawn
    assert drawn.count("http") == 1  # no web font


def test_terminal_legend_has_every_colour() -> None:
    legend = entropy_legend(1.9)
    assert str(legend) == "0 " + " " * COLOR_BINS + " ≥ 1.9 nats"
    assert len(legend.spans) == COLOR_BINS - 1
