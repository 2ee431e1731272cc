"""What the fork view shows, as plain data that any command fills in, also from the tables of tokens and responses.

All text is raw, as the model wrote it: it is made visible where it is rendered, and only there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from forkrl.report.formatting import outcome

SHOWN_RESPONSES = 1000
SHOWN_TOKENS = 150_000
"""What one page carries; beyond it prompts are drawn at random."""


@dataclass(frozen=True, slots=True)
class Branch:
    """One token tried at a fork: its probability, and the success rate of ``count`` continuations after it.

    ``low`` and ``high`` are the ends of the rate's 95% interval; all but ``count`` are in [0, 1].
    """

    text: str
    probability: float
    rate: float
    low: float
    high: float
    count: int


@dataclass(slots=True)
class ShownResponse:
    """One response of T tokens. Sequences that may be empty then say nothing about any token.

    Args:
        label: such as "Response 3" or "Step 20".
        tokens: T texts.
        entropy: one list of T values (nats) for each layer of the view.
        logprobs: natural log of the probability of each token, T values, or none.
        selected: whether each token carried gradient, T values, or none: nothing is outlined.
        ranks: 1 for the likeliest token of its position, T values, or none.
        alternatives: for each position (text, probability), likeliest first; T lists, or none. The token that was
            written may be among them.
        branches: what was tried at a position, counted from 0.
        score: 1 right, 0 wrong, or a fraction.
        reward: what the trainer was given.
        advantage: reward within the group of the prompt.
        finished: False where the response ran into the length limit.
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


@dataclass(slots=True)
class ShownPrompt:
    """A prompt, one word or two on what became of it (a filter of the page; may be empty), and responses to it."""

    prompt: str
    outcome: str
    responses: Sequence[ShownResponse]


@dataclass(slots=True)
class Frame:
    """What is seen at once: a training step, or everything. ``label`` names it among the frames of its view."""

    label: str
    prompts: Sequence[ShownPrompt]


@dataclass(slots=True)
class View:
    """A tab of the fork view.

    Args:
        title: on the tab.
        note: a sentence on which responses these are.
        frames: at least one.
        layers: names of the models whose entropies are shown one at a time over the same tokens; one unnamed at least.
        frame_name: what the labels of the frames count, such as "Step".
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
        views: none where there is nothing to show; ``lead`` then says why.
        lead: the sentence under the heading.
        mark: entropy (nats) above which a token is a fork, for the keys. None: the selected tokens are the forks.
    """

    views: Sequence[View]
    lead: str
    mark: float | None


def choose_prompts(responses: pd.DataFrame, layers: int = 1, seed: int = 0) -> list[int]:
    """Numbers of the prompts to show, in order: all, or as many drawn at random as a page can carry, at least one.

    Args:
        responses: one row a response, with ``prompt`` (its number) and ``length`` (tokens).
        layers: entropies shown of each token; more of them leave room for fewer tokens.
        seed: of the draw.
    """
    sizes = responses.groupby("prompt")["length"].agg(["size", "sum"])
    order = np.random.default_rng(seed).permutation(len(sizes))
    fitting = (sizes["size"].to_numpy()[order].cumsum() <= SHOWN_RESPONSES) & (
        sizes["sum"].to_numpy()[order].cumsum() <= SHOWN_TOKENS * 4 // (3 + layers)
    )
    chosen = order if fitting.all() else order[: max(int(fitting.argmin()), 1)]
    return sorted(int(number) for number in sizes.index.to_numpy()[chosen])


def describe_choice(num_shown: int, num_prompts: int) -> str:
    """The sentence that says which responses the page shows."""
    if num_shown == num_prompts:
        return f"All {num_prompts:,} prompts, with every response to each."
    return (
        f"{num_shown:,} of {num_prompts:,} prompts, drawn at random, with every response to each; "
        f"the figures below count all."
    )


def shown_prompts(
    tokens: pd.DataFrame, responses: pd.DataFrame, layers: Sequence[str] = ("entropy",)
) -> list[ShownPrompt]:
    """The prompts of a table of tokens, with the responses to each.

    Args:
        tokens: rows of ``forkrl.analysis.TOKEN_SCHEMA``, and a column for each layer.
        responses: rows with ``prompt`` (its number), ``sample``, ``prompt_text``, ``finished``, ``correct``.
        layers: columns of ``tokens`` with entropies, one for each layer of the view.
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
