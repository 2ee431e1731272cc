"""The fork view of a training run: held-out responses before and after, training responses step by step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forkrl.report.fork_view import ForkView, Frame, ShownPrompt, ShownResponse, View
from forkrl.report.run_data import Response, RolloutSample, RunData

MAX_PROMPTS = 48
MAX_RESPONSES_PER_STEP = 32
MAX_TRAIN_STEPS = 12
FORK_PERCENTILE = 80.0


def run_forks(run: RunData) -> ForkView:
    """What the page shows of a run's rollouts; no view at all where none can be read."""
    outlined = run.setting("selection.rule") != "all"  # where every token is trained on, an outline tells nothing
    views = []
    if run.evals:
        views.append(_held_out(run, outlined))
    if run.train:
        views.append(_training(run, outlined))
    if not views:
        why = (
            "This run folder has no sampled responses that can be read (rollouts/*.parquet), so nothing is shown here."
        )
        return ForkView([], why, None)
    return ForkView(views, _lead(run), _fork_mark(run, views))


def _lead(run: RunData) -> str:
    rule = run.setting("selection.rule") or "not recorded"
    if rule == "all":
        return (
            "This run trained on every token, so none is outlined; "
            "the keys visit the fifth of the tokens shown with the highest entropy."
        )
    if rule in ("top_entropy", "threshold"):
        return "Outlined tokens are those the run's rule selects to carry gradient; the keys visit them one by one."
    return (
        f"Outlined tokens are those the run's rule ({rule}) selects to carry gradient; "
        "the keys visit the fifth of the tokens shown with the highest entropy."
    )


def _fork_mark(run: RunData, views: Sequence[View]) -> float | None:
    """Entropy from which a token counts as a fork in the page, or None where the run's own selection says it."""
    if run.setting("selection.rule") in ("top_entropy", "threshold"):
        return None
    entropy_N = np.array(
        [
            value
            for view in views
            for frame in view.frames
            for prompt in frame.prompts
            for response in prompt.responses
            for value in response.entropy[0]
        ],
        dtype=float,
    )
    entropy_N = entropy_N[np.isfinite(entropy_N)]
    return float(np.percentile(entropy_N, FORK_PERCENTILE)) if len(entropy_N) else 0.0


def _held_out(run: RunData, outlined: bool) -> View:
    prompts = _held_out_pairs(run.evals, outlined)
    note = (
        f"The first {len(prompts)} of {len(set(run.evals[0].prompt_ids)):,} held-out problems, "
        "in file order, one response to each: none was picked for its looks."
    )
    return View("held-out", "Held out", note, [Frame("", prompts)])


def _held_out_pairs(evals: Sequence[RolloutSample], outlined: bool) -> list[ShownPrompt]:
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
        ShownPrompt(
            responses[0].prompt,
            _outcome([response.score for response in responses]),
            [_shown(label, response, outlined) for label, response in zip(labels, responses, strict=True)],
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


def _training(run: RunData, outlined: bool) -> View:
    note = (
        f"{len(run.train)} of {run.num_train_files} sampled steps; of each, "
        f"the first {MAX_RESPONSES_PER_STEP} responses (or fewer) in file order."
    )
    frames = [Frame(str(sample.step), _training_prompts(sample, outlined)) for sample in run.train]
    return View("training", "Training", note, frames, frame_name="Step")


def _training_prompts(sample: RolloutSample, outlined: bool) -> list[ShownPrompt]:
    prompts: dict[str, tuple[str, list[ShownResponse]]] = {}
    for response in sample.responses(range(min(MAX_RESPONSES_PER_STEP, sample.table.num_rows))):
        _, shown = prompts.setdefault(response.prompt_id, (response.prompt, []))
        shown.append(_shown(f"Response {len(shown) + 1}", response, outlined))
    return [ShownPrompt(prompt, "", responses) for prompt, responses in prompts.values()]


def _shown(label: str, response: Response, outlined: bool) -> ShownResponse:
    return ShownResponse(
        label=label,
        tokens=response.tokens,
        entropy=[response.entropy],
        logprobs=response.logprobs,
        selected=response.selected if outlined else (),
        score=response.score,
        reward=response.reward,
        advantage=response.advantage,
        finished=response.finished,
    )
