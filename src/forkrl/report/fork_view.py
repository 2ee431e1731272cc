"""Data of the fork view, filled by any command, also from the tables of tokens and responses.

All text is raw model output; rendering makes it visible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from forkrl.report.formatting import outcome

SHOWN_RESPONSES = 1000
SHOWN_TOKENS = 150_000
"""Tokens per page; beyond it prompts are drawn at random."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A token tried at a fork: its probability, and the success rate of ``count`` continuations.

    ``low`` and ``high``: 95% interval of the rate. All but ``count`` are in [0, 1].
    """

    text: str
    probability: float
    rate: float
    low: float
    high: float
    count: int


@dataclass(slots=True)
class ShownResponse:
    """One response of T tokens. Optional per-token sequences are empty or have T values.

    Args:
        label: such as "Response 3" or "Step 20".
        tokens: T texts.
        entropy: per layer of the view, T values in nats.
        logprobs: T values in nats, or empty.
        selected: whether each token carried gradient, or empty.
        ranks: T values, 1 for the most likely token, or empty.
        alternatives: per position (text, probability), most likely first, or empty; may include the token written.
        branches: branches by position, from 0.
        score: 1 right, 0 wrong, or a fraction.
        reward: reward used by the trainer.
        advantage: reward relative to the prompt's group.
        finished: False if cut at the length limit.
        others: whether an environment or the chat template wrote each token, not the model; or empty.
    """

    label: str
    tokens: Sequence[str]
    entropy: Sequence[Sequence[float]]
    logprobs: Sequence[float]
    selected: Sequence[bool] = ()
    ranks: Sequence[int] = ()
    alternatives: Sequence[Sequence[tuple[str, float]]] = ()
    branches: Mapping[int, Sequence[Branch]] = field(default_factory=dict)
    score: float | None = None
    reward: float | None = None
    advantage: float | None = None
    finished: bool | None = None
    others: Sequence[bool] = ()


@dataclass(slots=True)
class ShownPrompt:
    """A prompt with its responses and its outcome in one or two words, a filter of the page; may be empty."""

    prompt: str
    outcome: str
    responses: Sequence[ShownResponse]


@dataclass(slots=True)
class Frame:
    """A training step, or everything; ``label`` identifies it in its view."""

    label: str
    prompts: Sequence[ShownPrompt]


@dataclass(slots=True)
class View:
    """A tab of the fork view.

    Args:
        title: on the tab.
        note: a sentence that describes the responses.
        frames: at least one.
        layers: names of the models whose entropies can be switched between; at least one, may be unnamed.
        frame_name: unit of the frame labels, such as "Step".
    """

    title: str
    note: str
    frames: Sequence[Frame]
    layers: Sequence[str] = ("",)
    frame_name: str = ""


@dataclass(slots=True)
class ForkView:
    """The fork view of a page.

    Args:
        views: empty if there is nothing to show; ``lead`` then says why.
        lead: the sentence under the heading.
        mark: fork threshold in nats; None: the selected tokens are the forks.
    """

    views: Sequence[View]
    lead: str
    mark: float | None


def choose_prompts(responses: pd.DataFrame, layers: int = 1, seed: int = 0) -> list[int]:
    """Prompt numbers to show, sorted: all, or a random draw that fits the page, at least one.

    ``responses``: one row per response, with ``prompt`` (number) and ``length`` (tokens). More ``layers`` of entropies
    leave room for fewer tokens.
    """
    sizes = responses.groupby("prompt")["length"].agg(["size", "sum"])
    order = np.random.default_rng(seed).permutation(len(sizes))
    fitting = (sizes["size"].to_numpy()[order].cumsum() <= SHOWN_RESPONSES) & (
        sizes["sum"].to_numpy()[order].cumsum() <= SHOWN_TOKENS * 4 // (3 + layers)
    )
    chosen = order if fitting.all() else order[: max(int(fitting.argmin()), 1)]
    return sorted(int(number) for number in sizes.index.to_numpy()[chosen])


def describe_choice(num_shown: int, num_prompts: int) -> str:
    if num_shown == num_prompts:
        return f"All {num_prompts:,} prompts, with every response to each."
    return (
        f"{num_shown:,} of {num_prompts:,} prompts, drawn at random, with every response to each; "
        f"the figures below count all."
    )


def shown_prompts(
    tokens: pd.DataFrame, responses: pd.DataFrame, layers: Sequence[str] = ("entropy",)
) -> list[ShownPrompt]:
    """Prompts with their responses, from a token table.

    ``tokens``: rows of ``forkrl.analysis.TOKEN_SCHEMA`` with entropy columns ``layers``. ``responses``: rows with
    ``prompt`` (number), ``sample``, ``prompt_text``, ``finished``, ``correct``.
    """
    about = responses.set_index(["prompt", "sample"])
    prompts: dict[int, ShownPrompt] = {}
    for (number, sample), rows in tokens.groupby(["prompt", "sample"], sort=False, observed=True):
        facts = about.loc[(number, sample)]
        prompt = prompts.setdefault(number, ShownPrompt(str(facts["prompt_text"]), "", []))
        label = f"Response {sample + 1}"
        prompt.responses = [*prompt.responses, _shown_response(label, rows, facts, layers)]
    for prompt in prompts.values():
        prompt.outcome = outcome([response.score for response in prompt.responses])
    return list(prompts.values())


def _shown_response(label: str, rows: pd.DataFrame, facts: pd.Series, layers: Sequence[str]) -> ShownResponse:
    finished = facts["finished"]
    return ShownResponse(
        label=label,
        tokens=rows["text"].astype(str).tolist(),
        entropy=[rows[layer].tolist() for layer in layers],
        logprobs=rows["logprob"].tolist(),
        ranks=rows["rank"].tolist(),
        alternatives=[
            list(zip(texts, probs, strict=True))
            for texts, probs in zip(rows["top_texts"], rows["top_probs"], strict=True)
        ],
        score=None if pd.isna(facts["correct"]) else float(facts["correct"]),
        finished=None if pd.isna(finished) else bool(finished),
    )
