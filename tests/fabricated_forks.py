"""A fork view made up for tests: every feature that a page can have, in texts that can be foretold."""

from __future__ import annotations

import math
from pathlib import Path

from forkrl.report import Branch, ForkView, Frame, Page, ShownPrompt, ShownResponse, View, write_page

WORDS = ["So", " we", " add", ":", " wait", " no", ".\n"]


def made_response(number: int, num_tokens: int, *, layers: int = 1, alternatives: int = 3) -> ShownResponse:
    """Token i is ``WORDS[i % 7]``; tokens 4, 11, 18, … ("` wait`") are forks, and selected.

    Its rank is 2: "` so`" was likelier. At the first fork two branches were tried.
    """
    forks = [i % 7 == 4 for i in range(num_tokens)]
    entropy = [[(1.0 + 0.1 * layer if fork else 0.01) for fork in forks] for layer in range(layers)]
    tokens = [WORDS[i % 7] for i in range(num_tokens)]
    tried = [(" so", 0.5), (" wait", 0.3), (" but", 0.1)]
    sure = [(".", 0.01), (" ", 0.005)]
    return ShownResponse(
        label=f"Response {number}",
        tokens=tokens,
        entropy=entropy,
        logprobs=[math.log(0.3 if fork else 0.98) for fork in forks],
        selected=forks,
        ranks=[2 if fork else 1 for fork in forks] if alternatives else (),
        alternatives=[tried if fork else [(token, 0.98), *sure] for token, fork in zip(tokens, forks, strict=True)]
        if alternatives
        else (),
        branches={4: [Branch(" so", 0.5, 0.25, 0.1, 0.47, 16), Branch(" wait", 0.3, 0.75, 0.5, 0.9, 16)]}
        if num_tokens > 4
        else {},
        score=float(number % 2),
        finished=True,
    )


def made_forks(groups: list[list[int]], *, layers: tuple[str, ...] = ("",)) -> ForkView:
    """One view; ``groups`` holds, for each prompt, the number of tokens of each response to it."""
    prompts = [
        ShownPrompt(f"Problem {i}", "", [made_response(k + 1, n, layers=len(layers)) for k, n in enumerate(group)])
        for i, group in enumerate(groups)
    ]
    return ForkView([View("All", "Made up.", [Frame("", prompts)], layers)], "Made up.", None)


def made_page(path: Path, forks: ForkView) -> Path:
    return write_page(path, Page("made-up", "test", "Nothing was found.", [], forks=forks))
