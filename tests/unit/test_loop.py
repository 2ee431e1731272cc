"""What a training step leaves behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forkrl.config import ModelConfig, TrainConfig
from forkrl.errors import NothingToLearn, TrainingHalted, UserError
from forkrl.model.policy import open_policy
from forkrl.rollout.sampling import RANDOM_STREAM
from forkrl.rollout.scoring import Scoring
from forkrl.training import loop
from forkrl.training.open_run import open_run, unused_gpus
from forkrl.training.run import Run
from forkrl.training.update import Update
from forkrl.types import RolloutGroup, TokenBatch, VerifierResult

RECIPE: dict[str, Any] = {
    "rollout": {"prompts_per_step": 2, "group_size": 2, "max_prompt_tokens": 64, "max_response_tokens": 8},
    "reward": {"overlong_cache": 0},
    "dynamic_sampling": {"enabled": False},
    "training": {"steps": 2, "mini_batch_prompts": 1, "micro_batch_tokens": 512},
    "eval": {"problems": 1},
}


@pytest.mark.parametrize("workers", [1, 2])
def test_no_gradient_is_kept_through_the_next_rollout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    kept: list[bool] = []
    collect_groups = loop.collect_groups

    def observed(run: Run) -> Any:
        kept.append(any(parameter.grad is not None for parameter in run.policy.model.parameters()))
        return collect_groups(run)

    monkeypatch.setattr(loop, "collect_groups", observed)
    config = TrainConfig.model_validate(RECIPE | {"runtime": {"device": "cpu", "threads": workers, "workers": workers}})
    with open_run(config, tmp_path / "run") as run:
        loop.train(run)
        assert len(run.optimizer.state) == len(list(run.policy.model.parameters())), "every parameter had a gradient"
        assert all(parameter.grad is None for parameter in run.policy.model.parameters())
    assert kept == [False, False]


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"prompts": "absent"}, "its progress lacks prompts"),
        ({"random_stream": 1}, "seeds gave other responses"),
        ({"random_stream": RANDOM_STREAM - 1}, "seeds gave other responses"),
    ],
)
def test_a_run_of_another_version_is_refused_and_its_weights_load(
    tmp_path: Path, changes: dict[str, Any], difference: str
) -> None:
    config = TrainConfig.model_validate(RECIPE | {"runtime": {"device": "cpu"}})
    with open_run(config, tmp_path / "run") as run:
        run.save()
    saved = tmp_path / "run/checkpoints/step-0"
    progress = json.loads((saved / "trainer/progress.json").read_text()) | changes
    text = json.dumps({name: value for name, value in progress.items() if value != "absent"})
    (saved / "trainer/progress.json").write_text(text)
    manifest = json.loads((saved / "manifest.json").read_text())
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    manifest["files"]["trainer/progress.json"] = {"size": len(text), "sha256": sha256}
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with (
        pytest.raises(UserError, match=rf"another version of ForkRL \({difference}\); .*model.path=.*step-0"),
        open_run(config, resume=tmp_path / "run"),
    ):
        pass
    assert open_policy(ModelConfig(path=str(saved)), "cpu").tokenizer.eos_token_id is not None


def first_is_right(run: Run, groups: Sequence[RolloutGroup]) -> Tensor:
    """Rewards with an advantage, whatever the responses are."""
    return torch.tensor([[1.0, 0.0]] * len(groups))


@pytest.mark.parametrize(("mini_batch_prompts", "on_policy"), [(2, [True]), (1, [True, False])])
def test_only_the_first_gradient_step_of_a_batch_takes_the_rollouts_entropies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mini_batch_prompts: int, on_policy: list[bool]
) -> None:
    """The weights of the second step have changed, so its selection needs current entropies."""
    by_rollout: list[bool] = []
    original = loop.take_gradient_step

    def observed(run: Run, mini_batch: TokenBatch, **arguments: Any) -> Update:
        update = original(run, mini_batch, **arguments)
        lowest = float(mini_batch.rollout_entropy[update.selected_BT].min())
        by_rollout.append(update.metrics["entropy/threshold"] == lowest)
        return update

    monkeypatch.setattr(loop, "take_gradient_step", observed)
    monkeypatch.setattr(loop, "shaped_rewards", first_is_right)
    training = {"steps": 1, "mini_batch_prompts": mini_batch_prompts, "micro_batch_tokens": 512}
    sections: dict[str, Any] = {"selection": {"scope": "mini_batch"}, "optimizer": {"lr": 1e-2}, "training": training}
    config = TrainConfig.model_validate(RECIPE | sections | {"runtime": {"device": "cpu"}})
    with open_run(config, tmp_path / "run") as run:
        loop.train(run)
    assert by_rollout == on_policy


def test_running_out_of_memory_in_an_update_names_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "update_policy", lambda *_, **__: torch.empty(2**60, dtype=torch.uint8))
    monkeypatch.setattr(loop, "shaped_rewards", first_is_right)
    config = TrainConfig.model_validate(RECIPE | {"runtime": {"device": "cpu"}})
    with (
        pytest.raises(
            TrainingHalted, match=r"^step 1: out of memory \(.*; lower training.micro_batch_tokens = \d+; no"
        ),
        open_run(config, tmp_path / "run") as run,
    ):
        loop.train(run)


def all_wrong(scoring: Scoring, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    return [
        RolloutGroup(group.prompt, group.rollouts, tuple(VerifierResult(0.0) for _ in group.rollouts))
        for group in groups
    ]


def test_dynamic_sampling_asks_what_was_right_not_how_long_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The overlong penalty gives the wrong responses of a group different rewards; the group teaches nothing still."""
    seen: list[RolloutGroup] = []

    def finish(scoring: Scoring, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        seen.extend(all_wrong(scoring, groups))
        return all_wrong(scoring, groups)

    monkeypatch.setattr(Scoring, "finish", finish)
    sections: dict[str, Any] = {
        "rollout": RECIPE["rollout"] | {"max_response_tokens": 64, "group_size": 8},
        "reward": {"overlong_cache": 63},
        "dynamic_sampling": {"max_generation_batches": 1},
        "runtime": {"device": "cpu"},
    }
    with open_run(TrainConfig.model_validate(RECIPE | sections), tmp_path / "run") as run:
        with pytest.raises(NothingToLearn, match=r"^nothing to learn: every group of 2 prompts .* \(accuracy 0.000\)"):
            loop.collect_groups(run)
        rewards_PG = loop.shaped_rewards(run, seen)
    assert (rewards_PG != rewards_PG[:, :1]).any(), "no two lengths differ"


def test_a_verifier_that_judges_nothing_is_named_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("def judge(answer, response):\n    raise KeyError('no such field')\n")
    prompts = [json.dumps({"prompt": f"{number}", "answer": "1"}) for number in range(4)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    monkeypatch.syspath_prepend(tmp_path)
    sections: dict[str, Any] = {
        "task": {
            "name": "dataset",
            "data": str(tmp_path / "prompts.jsonl"),
            "held_out_rows": 1,
            "verifier": "broken:judge",
        },
        "dynamic_sampling": {"max_generation_batches": 1},
        "runtime": {"device": "cpu"},
    }
    with open_run(TrainConfig.model_validate(RECIPE | sections), tmp_path / "run") as run:
        said: list[str] = []
        monkeypatch.setattr(run.display, "message", said.append)
        with pytest.raises(NothingToLearn) as caught:
            loop.train(run)
    error = r"could be judged; the verifier's first error (error): prompt "
    assert str(caught.value).startswith(f"none of the 4 responses {error}")
    assert "KeyError: 'no such field'; correct task.verifier or its settings" in str(caught.value)
    assert "harder prompts" not in str(caught.value)
    (told,) = [line for line in said if line.startswith("evaluation at step 0: ")]
    assert f"none of the 1 responses {error}" in told and told.endswith("; its accuracy of 0 measures nothing")


def test_a_run_on_one_of_several_gpus_says_how_to_use_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert "one of 4 GPUs" in unused_gpus(torch.device("cuda")) and "gpus_per_node=4" in unused_gpus(
        torch.device("cuda:1")
    )
    assert unused_gpus(torch.device("cpu")) == ""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert unused_gpus(torch.device("cuda")) == ""


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ({"objective": "dapo"}, [2**-0.5, -(2**-0.5)]),
        ({"objective": "dr_grpo", "denominator": 32}, [0.5, -0.5]),
        ({"objective": "maxrl"}, [1.0, -1.0]),
    ],
    ids=lambda value: value["objective"] if isinstance(value, dict) else "",
)
def test_the_objective_says_how_rewards_become_advantages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: dict[str, Any], expected: list[float]
) -> None:
    """Rewards 1 and 0."""
    monkeypatch.setattr(loop, "shaped_rewards", first_is_right)
    seen: list[float] = []
    original = loop.take_gradient_step

    def observed(run: Run, mini_batch: TokenBatch, *, done: float) -> Update:
        seen.extend(mini_batch.advantages.tolist())
        return original(run, mini_batch, done=done)

    monkeypatch.setattr(loop, "take_gradient_step", observed)
    config = TrainConfig.model_validate(RECIPE | {"loss": loss, "runtime": {"device": "cpu"}})
    with open_run(config, tmp_path / "run") as run:
        loop.train(run)
    assert seen == pytest.approx(expected * 4, rel=1e-5)
