"""The data of the fork view: sampled responses with a few numbers for every token, cut to what a page can carry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from forkrl.report.run_data import Floats, Response, RolloutSample, RunData
from forkrl.report.visible_text import visible, visible_token

MAX_PROMPTS = 24
MAX_RESPONSES_PER_STEP = 8
MAX_TRAIN_STEPS = 12
MAX_TOKENS_PER_VIEW = 30_000
COLOR_BINS = 24
FORK_PERCENTILE = 80.0
SELECTED, FORK = 1, 2  # bits of a token's flag


class _Card(NamedTuple):
    """One prompt, what became of it, and the labelled responses to it."""

    prompt: str
    outcome: str
    responses: list[tuple[str, Response]]


class _Frame(NamedTuple):
    """The cards seen at once: all held-out pairs, or one training step."""

    label: str
    cards: list[_Card]

    @property
    def responses(self) -> list[Response]:
        return [response for card in self.cards for _, response in card.responses]


def fork_view(run: RunData) -> dict[str, Any]:
    """Everything the page's script needs, as plain JSON values; all text is already made visible.

    ``views`` holds at most two: held-out responses before and after, and training responses per step. A view has
    frames, a frame has cards (one prompt each), a card has responses. Per token: text ``t``, entropy ``e`` in nats,
    log-prob ``l``, flags ``f`` (1 selected, 2 fork).
    """
    held_out = [_Frame("", _held_out_pairs(run.evals))] if run.evals else []
    training = [_Frame(str(sample.step), _training_cards(sample)) for sample in run.train]
    shown = [value for frame in (*held_out, *training) for response in frame.responses for value in response.entropy]
    entropy = np.array(shown, dtype=float)
    entropy = entropy[np.isfinite(entropy)]
    mark = fork_mark(run, entropy)
    views = []
    if held_out:
        note = (
            f"The first {len(held_out[0].cards)} of {len(set(run.evals[0].prompt_ids)):,} held-out problems, "
            "in file order, one response to each: none was picked for its looks."
        )
        views.append(_view("held-out", "Held out", note, held_out, mark))
    if training:
        note = (
            f"{len(training)} of {run.num_train_files} sampled steps; of each, "
            f"the first {MAX_RESPONSES_PER_STEP} responses (or fewer) in file order."
        )
        views.append(_view("training", "Training", note, training, mark))
    top = float(np.percentile(entropy, 99.5)) if len(entropy) else 0.0
    return {"bins": COLOR_BINS, "scale": round(max(float(np.ceil(top * 10)) / 10, 0.5), 1), "views": views}


def fork_mark(run: RunData, entropy: Floats) -> float | None:
    """Entropy from which a token counts as a fork in the page, or None where the run's own selection says it."""
    if run.setting("selection.rule") in ("top_entropy", "threshold"):
        return None
    return float(np.percentile(entropy, FORK_PERCENTILE)) if len(entropy) else 0.0


def token_limit(lengths: Sequence[int], budget: int) -> int:
    """The largest cap such that responses cut at it hold at most ``budget`` tokens together (at least 1 each)."""
    remaining, limit = budget, max(lengths, default=1)
    for index, length in enumerate(sorted(lengths)):
        share = remaining // (len(lengths) - index)
        if length > share:
            return max(share, 1)
        remaining -= length
    return max(limit, 1)


def _held_out_pairs(evals: Sequence[RolloutSample]) -> list[_Card]:
    """The first prompts, in file order, that every given evaluation answered; the first response of each to each."""
    first_rows = []
    for sample in evals:
        rows: dict[str, int] = {}
        for row, prompt_id in enumerate(sample.prompt_ids):
            rows.setdefault(prompt_id, row)
        first_rows.append(rows)
    shared = [prompt_id for prompt_id in first_rows[0] if all(prompt_id in rows for rows in first_rows)][:MAX_PROMPTS]
    columns = [sample.responses([rows[i] for i in shared]) for sample, rows in zip(evals, first_rows, strict=True)]
    labels = [f"Step {sample.step}" for sample in evals]
    return [
        _Card(
            responses[0].prompt,
            _outcome([response.score for response in responses]),
            list(zip(labels, responses, strict=True)),
        )
        for responses in zip(*columns, strict=True)
    ]


def _outcome(scores: Sequence[float]) -> str:
    if len(scores) == 1:
        return "right" if scores[0] > 0.5 else "wrong"
    before, after = scores[0] > 0.5, scores[-1] > 0.5
    return {
        (False, True): "gained",
        (True, False): "lost",
        (True, True): "right both times",
        (False, False): "wrong both times",
    }[before, after]


def _training_cards(sample: RolloutSample) -> list[_Card]:
    cards: dict[str, _Card] = {}
    for response in sample.responses(range(min(MAX_RESPONSES_PER_STEP, sample.table.num_rows))):
        card = cards.setdefault(response.prompt_id, _Card(response.prompt, "", []))
        card.responses.append((f"Response {len(card.responses) + 1}", response))
    return list(cards.values())


def _view(name: str, title: str, note: str, frames: Sequence[_Frame], mark: float | None) -> dict[str, Any]:
    lengths = [len(response.tokens) for frame in frames for response in frame.responses]
    limit = token_limit(lengths, MAX_TOKENS_PER_VIEW)
    cut = sum(length > limit for length in lengths)
    return {
        "id": name,
        "title": title,
        "note": note + (f" {cut} long responses are cut after {limit:,} tokens." if cut else ""),
        "frames": [
            {"label": frame.label, "cards": [_plain_card(card, limit, mark) for card in frame.cards]}
            for frame in frames
        ],
    }


def _plain_card(card: _Card, limit: int, mark: float | None) -> dict[str, Any]:
    responses = [_plain_response(label, response, limit, mark) for label, response in card.responses]
    return {"prompt": visible(card.prompt), "outcome": card.outcome, "responses": responses}


def _plain_response(label: str, response: Response, limit: int, mark: float | None) -> dict[str, Any]:
    selected, entropy = response.selected[:limit], response.entropy[:limit]
    forks = selected if mark is None else [value >= mark for value in entropy]
    return {
        "label": label,
        "score": _rounded(response.score),
        "reward": _rounded(response.reward),
        "advantage": _rounded(response.advantage),
        "finished": bool(response.finished),
        "length": len(response.tokens),
        "selected": sum(response.selected),  # of the whole response, like its length
        "t": [visible_token(token) for token in response.tokens[:limit]],
        "e": [_rounded(value) for value in entropy],
        "l": [_rounded(value) for value in response.logprobs[:limit]],
        "f": [SELECTED * bool(s) + FORK * bool(f) for s, f in zip(selected, forks, strict=True)],
    }


def _rounded(value: float | None) -> float | None:
    return round(float(value), 4) if value is not None and np.isfinite(value) else None
