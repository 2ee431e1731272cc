"""What a training step leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forkrl import loop
from forkrl.config import TrainConfig
from forkrl.run import Run, open_run

RECIPE: dict[str, Any] = {
    "rollout": {"prompts_per_step": 2, "group_size": 2, "max_prompt_tokens": 64, "max_response_tokens": 8},
    "reward": {"overlong_cache": 0},
    "dynamic_sampling": {"enabled": False},
    "training": {"steps": 2, "mini_batch_prompts": 1, "micro_batch_tokens": 512},
    "eval": {"problems": 1},
}


@pytest.mark.parametrize("replicas", [1, 2])
def test_no_gradient_is_kept_through_the_next_rollout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replicas: int
) -> None:
    kept: list[bool] = []
    collect_groups = loop.collect_groups

    def observed(run: Run) -> Any:
        kept.append(any(parameter.grad is not None for parameter in run.policy.model.parameters()))
        return collect_groups(run)

    monkeypatch.setattr(loop, "collect_groups", observed)
    config = TrainConfig.model_validate(
        RECIPE | {"runtime": {"device": "cpu", "threads": replicas, "replicas": replicas}}
    )
    with open_run(config, tmp_path / "run") as run:
        loop.train(run)
        assert len(run.optimizer.state) == len(list(run.policy.model.parameters())), "every parameter had a gradient"
        assert all(parameter.grad is None for parameter in run.policy.model.parameters())
    assert kept == [False, False]
