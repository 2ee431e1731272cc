"""What the fork view shows, as plain data that any command fills in.

All text is raw, as the model wrote it: it is made visible where it is rendered, and only there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


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
        id: short and unique in the page.
        title: on the tab.
        note: a sentence on which responses these are.
        frames: at least one.
        layers: names of the models whose entropies are shown one at a time over the same tokens; one unnamed at least.
        frame_name: what the labels of the frames count, such as "Step".
    """

    id: str
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
