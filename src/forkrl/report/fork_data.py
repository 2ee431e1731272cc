"""The fork view as compact JSON, read by the page's script.

A page with a thousand responses must open at once: texts are deduplicated into one table, and entropies and log-probs
are integers in 0.1 millinats.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain, groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from forkrl.report.colors import COLOR_BINS, top_entropy
from forkrl.report.fork_view import Branch, ForkView, Frame, ShownPrompt, ShownResponse, View
from forkrl.report.formatting import evenly_spaced, visible, visible_token

MAX_BYTES = 15_000_000  # of token data per page
MIN_TOKENS_SHOWN = 2_000  # show fewer prompts before cutting responses below this
PER_NAT = 10_000
PER_PROBABILITY = 100_000
ABSENT = -1  # a missing alternative

_BYTES = re.compile(r"(?:<0x[0-9A-F]{2}>)+")
"""How ``forkrl.model.token_texts`` writes the bytes of an incomplete character."""

# JSON characters per token, entropy and alternative with a vocabulary of 150,000, rounded up.
TOKEN_BYTES, LAYER_BYTES, ALTERNATIVE_BYTES = 17, 6, 13


class TextTable:
    """Deduplicated texts, made visible; tokens refer to them by index."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self.texts: list[str] = []

    def place(self, token: str) -> int:
        place = self._places.get(token)
        if place is None:
            place = self._places[token] = len(self.texts)
            self.texts.append(shown_bytes(visible_token(token)))
        return place


def shown_bytes(text: str) -> str:
    return _BYTES.sub(lambda found: "⟨" + found[0].replace("<0x", "").replace(">", " ").strip() + "⟩", text)


def joined_characters(tokens: Sequence[str]) -> Sequence[str]:
    """Put a character that spans several tokens before its first bytes: ``数<0xE6><0x95>``."""
    joined = list(tokens)
    for has_bytes, run in groupby(range(len(tokens)), lambda place: "<0x" in tokens[place]):
        if not has_bytes:
            continue
        raw = [(place, byte) for place in run for byte in _bytes(tokens[place])]
        for at, (place, lead) in enumerate(raw):
            size = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
            parts = raw[at : at + size]
            with suppress(UnicodeDecodeError):
                character = bytes(byte for _, byte in parts).decode()
                if parts[-1][0] != place:
                    joined[place] = _BYTES.sub(f"{character}\\g<0>", tokens[place], count=1)
    return joined


def _bytes(token: str) -> bytes:
    pieces = re.split(r"<0x([0-9A-F]{2})>", token)  # text and bytes alternate
    return b"".join(
        bytes.fromhex(piece) if place % 2 else piece.encode("utf-8", "surrogatepass")
        for place, piece in enumerate(pieces)
    )


def fork_data(forks: ForkView, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON data for the page's script; all text is already made visible.

    Views contain frames, frames prompts, prompts responses. A response has per token: ``t`` text index in ``texts``,
    ``e`` entropy (one list per layer) and ``l`` log-prob (both in 1/10,000 nat), ``f`` a string of 0 and 1 (selected),
    ``o`` likewise (not written by the model), ``r`` rank, ``a`` and ``q`` with ``w`` alternatives per token (text
    index, probability in 1/100,000); ``b`` holds branches by position. Null: not finite. Beyond ``max_bytes`` of token
    data, views show fewer prompts, cut long responses and say so.
    """
    table = TextTable()
    layers = [layer for view in forks.views for response in responses_of(view.frames) for layer in response.entropy]
    views = [_view(view, max_bytes // len(forks.views), table, forks.mark) for view in forks.views]
    return {
        "bins": COLOR_BINS,
        "scale": top_entropy(chain.from_iterable(layers)),
        "mark": None if forks.mark is None else math.floor(forks.mark * PER_NAT),
        "texts": table.texts,
        "views": views,
    }


def responses_of(frames: Sequence[Frame]) -> Iterator[ShownResponse]:
    return (response for frame in frames for prompt in frame.prompts for response in prompt.responses)


def _view(view: View, max_bytes: int, table: TextTable, mark: float | None) -> dict[str, Any]:
    for response in responses_of(view.frames):
        _check(response, len(view.layers))
    frames, limit = fitting(view.frames, max_bytes)
    return {
        "title": visible(view.title),
        "note": visible(view.note + _said(view.frames, frames, limit)),
        "layers": [visible(name) for name in view.layers],
        "frameName": visible(view.frame_name),
        "frames": [
            {
                "label": visible(frame.label),
                "prompts": [_prompt(prompt, limit, table, mark) for prompt in frame.prompts],
            }
            for frame in frames
        ],
    }


def fitting(frames: Sequence[Frame], max_bytes: int) -> tuple[list[Frame], int]:
    """Evenly spaced prompts that fit, at least one per frame, and the token limit per response.

    Drops prompts before cutting responses below ``MIN_TOKENS_SHOWN``.
    """
    share = 1.0
    while True:
        kept = [
            Frame(frame.label, [frame.prompts[i] for i in evenly_spaced(count, max(1, int(share * count)))])
            for frame in frames
            for count in [len(frame.prompts)]
        ]
        lengths = [len(response.tokens) for response in responses_of(kept)]
        cost = sum(map(_bytes_of, responses_of(kept)))
        limit = token_limit(lengths, int(max_bytes / max(cost, 1) * sum(lengths)))
        whole = limit >= min(MIN_TOKENS_SHOWN, max(lengths, default=0))
        if whole or all(len(frame.prompts) <= 1 for frame in kept):
            return kept, limit
        share *= 0.9


def _bytes_of(response: ShownResponse) -> int:
    alternatives = len(response.alternatives[0]) if response.alternatives else 0
    per_token = TOKEN_BYTES + LAYER_BYTES * len(response.entropy) + ALTERNATIVE_BYTES * alternatives
    return per_token * len(response.tokens)


def _said(before: Sequence[Frame], after: Sequence[Frame], limit: int) -> str:
    asked, shown = (sum(len(frame.prompts) for frame in frames) for frames in (before, after))
    cut = sum(len(response.tokens) > limit for response in responses_of(after))
    sentences = ""
    if shown < asked:
        sentences += f" To keep this page small, {shown:,} of {asked:,} prompts are shown, evenly spaced."
    if cut:
        sentences += f" {cut} long responses are cut after {limit:,} tokens."
    return sentences


def _check(response: ShownResponse, num_layers: int) -> None:
    count = len(response.tokens)
    optional = (response.logprobs, response.selected, response.others, response.ranks, response.alternatives)
    if len(response.entropy) != num_layers or any(len(layer) != count for layer in response.entropy):
        raise ValueError(f"{response.label}: needs {num_layers} lists of {count} entropies, one for each layer")
    if any(len(values) not in (0, count) for values in optional):
        raise ValueError(f"{response.label}: each list must have a value for each of the {count} tokens, or none")


def _prompt(prompt: ShownPrompt, limit: int, table: TextTable, mark: float | None) -> dict[str, Any]:
    return {
        "prompt": visible(prompt.prompt),
        "outcome": visible(prompt.outcome),
        "responses": [_response(response, limit, table, mark) for response in prompt.responses],
    }


def _response(response: ShownResponse, limit: int, table: TextTable, mark: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "label": visible(response.label),
        "score": _rounded(response.score),
        "reward": _rounded(response.reward),
        "advantage": _rounded(response.advantage),
        "finished": None if response.finished is None else bool(response.finished),
        "length": len(response.tokens),
        "selected": int(sum(response.selected)) if len(response.selected) else None,  # of all tokens
        "t": [table.place(token) for token in joined_characters(response.tokens)[:limit]],
        "e": [_whole(_on_its_side(layer[:limit], mark), PER_NAT) for layer in response.entropy],
        "l": _whole(response.logprobs[:limit], PER_NAT),
        "f": "".join("1" if chosen else "0" for chosen in response.selected[:limit]),
    }
    if any(response.others):
        found["o"] = "".join("1" if other else "0" for other in response.others[:limit])
        found["others"] = int(sum(response.others))
    if len(response.ranks):
        found["r"] = [int(rank) for rank in response.ranks[:limit]]
    if len(response.alternatives):
        found |= _alternatives(response.alternatives[:limit], table)
    if response.branches:
        found["b"] = {
            str(position): [_branch(branch, table) for branch in branches]
            for position, branches in sorted(response.branches.items())
            if position < limit
        }
    return found


def _alternatives(alternatives: Sequence[Sequence[tuple[str, float]]], table: TextTable) -> dict[str, Any]:
    """``w`` alternatives per token in flat lists, padded with ``ABSENT``."""
    width = max(map(len, alternatives))
    texts: list[int] = []
    probabilities: list[float] = []
    for found in alternatives:
        gap = width - len(found)
        texts += [table.place(text) for text, _ in found] + [ABSENT] * gap
        probabilities += [probability for _, probability in found] + [0.0] * gap
    return {"w": width, "a": texts, "q": _whole(probabilities, PER_PROBABILITY)}


def _branch(branch: Branch, table: TextTable) -> list[float | None]:
    numbers = (branch.probability, branch.rate, branch.low, branch.high)
    return [table.place(branch.text), *map(_rounded, numbers), branch.count]


def _on_its_side(entropy: Sequence[float], mark: float | None) -> npt.NDArray[np.float64]:
    """Adjust entropies so that rounding moves none across the fork threshold."""
    entropy_T = np.asarray(entropy, dtype=np.float64)
    if mark is None:
        return entropy_T
    floor = math.floor(mark * PER_NAT)
    below_T, whole_T = ~(entropy_T > mark), np.rint(entropy_T * PER_NAT)  # NaN is unchanged
    whole_T = np.where(below_T, np.minimum(whole_T, floor), np.maximum(whole_T, floor + 1))
    return np.asarray(whole_T / PER_NAT)


def _whole(values: Sequence[float] | npt.NDArray[np.float64], per_unit: int) -> list[int | None]:
    scaled_T = np.asarray(values, dtype=np.float64) * per_unit
    if np.isfinite(scaled_T).all():
        whole: list[int | None] = np.rint(scaled_T).astype(np.int64).tolist()
        return whole
    return [round(value) if np.isfinite(value) else None for value in scaled_T.tolist()]


def _rounded(value: float | None) -> float | None:
    return round(float(value), 4) if value is not None and np.isfinite(value) else None


def token_limit(lengths: Sequence[int], budget: int) -> int:
    """Largest length limit (at least 1) such that the cut responses have at most ``budget`` tokens in total."""
    remaining, limit = budget, max(lengths, default=1)
    for index, length in enumerate(sorted(lengths)):
        share = remaining // (len(lengths) - index)
        if length > share:
            return max(share, 1)
        remaining -= length
    return max(limit, 1)
