"""Measurements of the embedded base model, and its model card."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import tomli_w
import torch

from forkrl.config import SftConfig
from forkrl.config.recipe import recipe_toml
from forkrl.parallel.workers import Workers
from forkrl.rewards.countdown import judge_tries, parse_problem, verify_countdown
from forkrl.rollout import EmbeddedEngine
from forkrl.stats.intervals import Estimate, mean_with_interval
from forkrl.store.atomic import write_text
from forkrl.types import SamplingParams, Task


class BaseModelFigures(NamedTuple):
    """Measured on held-out problems, one response each at temperature 1."""

    problems: int
    solve_rate: Estimate
    steps_right: float
    """Share of arithmetic steps that are correct, use available numbers and restate the remaining ones correctly."""
    length: float
    below_hundredth: float
    """Share of tokens with entropy below 0.01 nats."""
    percentile_80: float
    """80th percentile of token entropy, in nats."""


def measure_base_model(workers: Workers, task: Task, config: SftConfig) -> BaseModelFigures:
    """Sample one response to each held-out problem and check every step of it."""
    engine = EmbeddedEngine(workers, max_prompt_tokens=config.architecture.max_position_embeddings)
    room = config.architecture.max_position_embeddings - 16  # the longest prompt has 9 characters
    groups = engine.generate(
        task.held_out[: config.eval_problems],
        group_size=1,
        sampling=SamplingParams(max_response_tokens=room),
        generator=torch.Generator(workers.policy.device).manual_seed(config.seed),
    )
    pairs = [(group.prompt, group.rollouts[0]) for group in groups]
    steps = [
        step.right
        for prompt, rollout in pairs
        for steps in judge_tries(parse_problem(prompt.answer)[0], rollout.text)
        for step in steps
    ]
    entropy_N = torch.cat([rollout.entropy for _, rollout in pairs])
    return BaseModelFigures(
        problems=len(pairs),
        solve_rate=mean_with_interval([[verify_countdown(prompt.answer, rollout.text)] for prompt, rollout in pairs]),
        steps_right=sum(steps) / len(steps),
        length=len(entropy_N) / len(pairs),
        below_hundredth=float((entropy_N < 0.01).float().mean()),
        percentile_80=float(entropy_N.quantile(0.8)),
    )


def write_model_card(
    out: Path, config: SftConfig, figures: BaseModelFigures, *, recipe: str, num_tokens: int, threads: int
) -> None:
    write_text(
        out / "README.md",
        f"""\
# A base model for Countdown that searches at random

A Qwen3-architecture language model, one character a token, made by ForkRL to show reinforcement learning on forking
tokens without a download. It writes a chain of tries: it executes reliably, and chooses at random. It was trained on
traces of a random search that knows nothing of the answers, with the habits of a real base model, good and bad:
it gives up after a failed try with probability {config.data.habits.give_up}, repeats the failed try with probability
{config.data.habits.repeat}, and claims success unchecked with probability {config.data.habits.skip_check}.

Made by `forkrl sft {recipe}`: {num_tokens:,} trained tokens, seed {config.seed}, {threads} CPU thread(s), PyTorch
{torch.__version__}.

| measured on {figures.problems} held-out problems, one response each at temperature 1 | |
|---|---|
| solved | {figures.solve_rate.mean:.1%} (95% {figures.solve_rate.low:.1%} to {figures.solve_rate.high:.1%}) |
| arithmetic steps right, with available numbers, remainder restated right | {figures.steps_right:.2%} |
| tokens below 0.01 nats | {figures.below_hundredth:.1%} |
| 80th percentile of token entropy | {figures.percentile_80:.3f} nats |
| mean response length | {figures.length:.1f} tokens |

The recipe:

```toml
{tomli_w.dumps(recipe_toml(config)).rstrip()}
```
""",
    )
