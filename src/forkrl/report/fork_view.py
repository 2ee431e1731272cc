"""The data of the fork view: sampled responses with a few numbers for every token, cut to what a page can carry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from forkrl.report.run_data import Response, RolloutSample, RunData
from forkrl.report.visible_text import visible, visible_token

MAX_PROMPTS = 24
MAX_RESPONSES_PER_STEP = 8
MAX_TRAIN_STEPS = 12
MAX_TOKENS_PER_VIEW = 40_000
COLOR_BINS = 24
FORK_PERCENTILE = 80.0
SELECTED, FORK = 1, 2  # bits of a token's flag


def fork_view(run: RunData) -> dict[str, Any]:
    """Everything the page's script needs, as plain JSON values; all text is already made visible.

    ``views`` holds at most two: held-out responses before and after, and training responses per step. A view has frames,
    a frame has cards (one prompt each), a card has responses. Per token: text ``t``, entropy ``e`` in nats, log-prob
    ``l``, flags ``f`` (1 selected, 2 fork).
    """
    held_out = [] if not run.evals else [{"label": "", "cards": _held_out_pairs(run.evals)}]
    training = [{"label": f"{sample.step}", "cards": _training_cards(sample)} for sample in run.train]
    shown = [
        response for frame in (*held_out, *training) for card in frame["cards"] for _, response in card["responses"]
    ]
    entropy = np.array([value for response in shown for value in response.entropy if np.isfinite(value)])
    mark = fork_mark(run, entropy)
    views = []
    for name, title, frames in (("held-out", "Held out", held_out), ("training", "Training", training)):
        if frames:
            views.append(
                {"id": name, "title": title, "note": _sampling_note(run, name, frames), "frames": _plain(frames, mark)}
            )
    top = float(np.percentile(entropy, 99.5)) if len(entropy) else 0.0
    return {"bins": COLOR_BINS, "scale": round(max(np.ceil(top * 10) / 10, 0.5), 1), "views": views}


def fork_mark(run: RunData, entropy: np.ndarray) -> float | None:
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


def _held_out_pairs(evals: Sequence[RolloutSample]) -> list[dict[str, Any]]:
    """The first prompts, in file order, that every given evaluation answered; the first response of each to each."""
    first_rows = []
    for sample in evals:
        rows: dict[str, int] = {}
        for row, prompt_id in enumerate(sample.prompt_ids):
            rows.setdefault(prompt_id, row)
        first_rows.append(rows)
    shared = [prompt_id for prompt_id in first_rows[0] if all(prompt_id in rows for rows in first_rows)][:MAX_PROMPTS]
    columns = [sample.responses([rows[i] for i in shared]) for sample, rows in zip(evals, first_rows, strict=True)]
    return [
        {
            "prompt": responses[0].prompt,
            "outcome": _outcome([response.score for response in responses]),
            "responses": [(f"Step {sample.step}", response) for sample, response in zip(evals, responses, strict=True)],
        }
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


def _training_cards(sample: RolloutSample) -> list[dict[str, Any]]:
    responses = sample.responses(range(min(MAX_RESPONSES_PER_STEP, sample.table.num_rows)))
    cards: dict[str, dict[str, Any]] = {}
    for response in responses:
        card = cards.setdefault(response.prompt_id, {"prompt": response.prompt, "outcome": "", "responses": []})
        card["responses"].append((f"Response {len(card['responses']) + 1}", response))
    return list(cards.values())


def _plain(frames: list[dict[str, Any]], mark: float | None) -> list[dict[str, Any]]:
    cards = [card for frame in frames for card in frame["cards"]]
    limit = token_limit([len(r.tokens) for card in cards for _, r in card["responses"]], MAX_TOKENS_PER_VIEW)
    return [
        {
            "label": frame["label"],
            "cards": [
                {
                    "prompt": visible(card["prompt"]),
                    "outcome": card["outcome"],
                    "responses": [
                        _plain_response(label, response, limit, mark) for label, response in card["responses"]
                    ],
                }
                for card in frame["cards"]
            ],
        }
        for frame in frames
    ]


def _plain_response(label: str, response: Response, limit: int, mark: float | None) -> dict[str, Any]:
    selected, entropy = response.selected[:limit], response.entropy[:limit]
    forks = selected if mark is None else [value is not None and value >= mark for value in entropy]
    return {
        "label": label,
        "score": _rounded(response.score),
        "reward": _rounded(response.reward),
        "advantage": _rounded(response.advantage),
        "finished": bool(response.finished),
        "length": len(response.tokens),
        "t": [visible_token(token or "") for token in response.tokens[:limit]],
        "e": [_rounded(value) for value in entropy],
        "l": [_rounded(value) for value in response.logprobs[:limit]],
        "f": [SELECTED * bool(s) + FORK * bool(f) for s, f in zip(selected, forks, strict=True)],
    }


def _rounded(value: float | None) -> float | None:
    return round(float(value), 4) if value is not None and np.isfinite(value) else None


def _sampling_note(run: RunData, view: str, frames: list[dict[str, Any]]) -> str:
    cards = [card for frame in frames for card in frame["cards"]]
    responses = [response for card in cards for _, response in card["responses"]]
    limit = token_limit([len(response.tokens) for response in responses], MAX_TOKENS_PER_VIEW)
    cut = sum(len(response.tokens) > limit for response in responses)
    if view == "held-out":
        total = len(set(run.evals[0].prompt_ids))
        note = f"The first {len(cards)} of {total:,} held-out problems, in file order, one response to each: none was picked for its looks."
    else:
        note = (
            f"{len(frames)} of {run.num_train_files} sampled steps; of each, the first "
            f"{MAX_RESPONSES_PER_STEP} responses (or fewer) in file order."
        )
    return note + (f" {cut} long responses are cut after {limit:,} tokens." if cut else "")
