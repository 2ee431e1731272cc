"""A page of the report, taken apart for tests."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


class Page(HTMLParser):
    """Text, elements and the data block of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += " ".join(data.split()) + " "

    @property
    def data(self) -> dict[str, Any]:
        match = re.search(r'<script type="application/json" id="fork-data">(.*?)</script>', self.source, re.DOTALL)
        assert match is not None
        return dict(json.loads(match[1]))

    @property
    def views(self) -> list[dict[str, Any]]:
        return decoded(self.data)


def decoded(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The views of a page with texts in place of their numbers, and entropies and log-probs in nats."""
    texts = data["texts"]

    def nats(values: list[int | None]) -> list[float | None]:
        return [None if value is None else value / 10_000 for value in values]

    def response(packed: dict[str, Any]) -> dict[str, Any]:
        made = packed | {"t": [texts[place] for place in packed["t"]]}
        made |= {"e": [nats(layer) for layer in packed["e"]], "l": nats(packed["l"])}
        if "a" in packed:
            pairs = [(texts[a], q / 100_000) for a, q in zip(packed["a"], packed["q"], strict=True) if a >= 0]
            made["a"] = pairs
        return made

    return [
        view
        | {
            "frames": [
                frame | {"prompts": [p | {"responses": list(map(response, p["responses"]))} for p in frame["prompts"]]}
                for frame in view["frames"]
            ]
        }
        for view in data["views"]
    ]
