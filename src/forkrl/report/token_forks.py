"""From the tables of tokens and responses to what the fork view shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from forkrl.report.fork_view import ShownPrompt, ShownResponse

SHOWN_RESPONSES = 1000
SHOWN_TOKENS = 150_000
"""What one page carries; beyond it prompts are drawn at random."""


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
        responses: rows with ``number``, ``sample``, ``prompt`` (text), ``finished``, ``correct``.
        layers: columns of ``tokens`` with entropies, one for each layer of the view.
    """
    about = responses.set_index(["number", "sample"])
    prompts: dict[int, ShownPrompt] = {}
    for (number, sample), rows in tokens.groupby(["prompt", "sample"], sort=False, observed=True):
        facts = about.loc[(number, sample)]
        prompt = prompts.setdefault(number, ShownPrompt(str(facts["prompt"]), "", []))
        label = f"Response {sample + 1}"
        prompt.responses = [*prompt.responses, _shown_response(label, rows, facts, layers)]
    for prompt in prompts.values():
        prompt.outcome = _outcome([response.score for response in prompt.responses])
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


def _outcome(scores: Sequence[float | None]) -> str:
    """Right, wrong, or mixed; empty where nothing was judged."""
    known = {score for score in scores if score is not None}
    if not known:
        return ""
    return "mixed" if len(known) > 1 else "right" if known == {1.0} else "wrong"
