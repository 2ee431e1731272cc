"""Learning rates are those of ``transformers`` where every batch is full; the entropy bonus follows its rule."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers

from forkrl.config import TrainConfig
from forkrl.config.recipe import load_recipe
from forkrl.errors import UserError
from forkrl.method.schedule import adaptive_bonus, early_end, share_of_lr


def recipe(*overrides: str) -> TrainConfig:
    """Five steps of four gradient steps."""
    sizes = ("training.steps=5", "rollout.prompts_per_step=8", "training.mini_batch_prompts=2", "optimizer.lr=1.0")
    return load_recipe(TrainConfig, None, [*sizes, *overrides])


def rates(config: TrainConfig, batches: list[int]) -> list[float]:
    """The rate of every gradient step, with these numbers of them per training step."""
    found: list[float] = []
    for step, size in enumerate(batches):
        for index in range(size):
            progress = (step + index / size) / len(batches)
            found.append(share_of_lr(config.optimizer, len(found) + 1, progress, config.gradient_steps))
    return found


def theirs(schedule: str, warmup: int, steps: int) -> list[float]:
    """Rates by ``transformers``; its warm-up begins with a gradient step of rate 0, ours with one of 1 / warmup."""
    optimizer = torch.optim.SGD([torch.zeros(1, dtype=torch.float64)], lr=1.0)
    scheduler = transformers.get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    found = []
    for number in range(steps):
        rate = optimizer.param_groups[0]["lr"]
        found.append((number + 1) / warmup if number < warmup else rate)
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 3, 6])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_full_batches_have_the_rates_of_transformers(schedule: str, warmup: int) -> None:
    config = recipe(f"optimizer.schedule={schedule}", f"optimizer.warmup_steps={warmup}")
    known = "constant_with_warmup" if schedule == "constant" else schedule
    assert rates(config, [4] * 5) == pytest.approx(theirs(known, warmup, 20), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_minimum_is_a_share_of_what_remains(schedule: str) -> None:
    base, lifted = (
        rates(recipe(f"optimizer.schedule={schedule}", f"optimizer.min_lr_ratio={ratio}"), [4] * 5)
        for ratio in (0.0, 0.25)
    )
    assert lifted == pytest.approx([0.25 + 0.75 * rate for rate in base], rel=1e-12)


def test_steps_with_fewer_gradient_steps_change_no_rate_of_the_others() -> None:
    """The rate at the beginning of a training step depends on the training steps done, and falls within each."""
    config = recipe("optimizer.schedule=linear")
    full, fewer = rates(config, [4] * 5), rates(config, [4, 1, 3, 2, 4])
    assert fewer[:4] == full[:4]
    assert [fewer[index] for index in (4, 5, 8, 10)] == [full[index] for index in (4, 8, 12, 16)]
    assert fewer[10:] == full[16:]
    assert all(later < earlier for earlier, later in itertools.pairwise(fewer))


def test_a_constant_rate_is_exactly_what_it_was() -> None:
    config = recipe("optimizer.lr=3e-4", "optimizer.warmup_steps=7")
    old = [3e-4 * min(1.0, number / 7) for number in range(1, 21)]
    assert [config.optimizer.lr * share for share in rates(config, [4] * 5)] == old


@pytest.mark.parametrize(
    ("accuracies", "patience", "stalled"),
    [
        ([], 1, False),
        ([0.5], 1, False),
        ([0.5, 0.5], 1, True),
        ([0.5, 0.6], 1, False),
        ([0.5, 0.4, 0.5], 2, True),
        ([0.5, 0.4, 0.51], 2, False),
        ([0.5, 0.6, 0.1, 0.6], 2, True),
        ([0.5, 0.4, 0.3], 0, False),
    ],
)
def test_a_run_stalls_when_no_evaluation_is_better(accuracies: list[float], patience: int, stalled: bool) -> None:
    rows = [{"step": 0, "reward/mean": 0.1}, *({"eval/accuracy": accuracy} for accuracy in accuracies)]
    found = early_end(rows, patience=patience, epochs=0)
    assert (found is not None) == stalled
    if found:
        assert found == ("eval.patience", f"no higher accuracy in {patience} evaluations (eval.patience)")
    assert not early_end([*rows, {"reward/mean": 0.1}], patience=patience, epochs=0), "only an evaluation ends a run"


@pytest.mark.parametrize(
    ("done", "epochs", "ends"),
    [
        ([], 1.0, False),
        ([0.5, 0.99], 1.0, False),
        ([0.5, 1.0], 1.0, True),
        ([0.5, 1.3], 1.0, True),
        ([0.5, 1.3], 0.0, False),
        ([1.0, 2.0], 2.5, False),
    ],
)
def test_a_run_ends_when_its_epochs_are_done(done: list[float], epochs: float, ends: bool) -> None:
    """Whether the last step is evaluated or not; older versions logged no epochs."""
    rows = [{"eval/accuracy": 0.5}, {"reward/mean": 0.1}, *({"sampling/epochs": each} for each in done)]
    for every in (rows, [*rows, {"eval/accuracy": 0.6}]):
        found = early_end(every, patience=5, epochs=epochs)
        assert (found is not None) == ends
        if found:
            assert found == ("training.epochs", f"sampling/epochs is {done[-1]:g} (training.epochs = 1)")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["optimizer.min_lr_ratio=0.1"],
            'optimizer.min_lr_ratio = 0.1 is where a falling rate ends; set optimizer.schedule to "linear" or "cosine"',
        ),
        (
            ["optimizer.schedule=cosine", "optimizer.warmup_steps=20"],
            'optimizer.warmup_steps = 20 leaves no gradient step for optimizer.schedule = "cosine": the run has 20;',
        ),
    ],
)
def test_settings_without_effect_are_rejected(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe(*overrides)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_adaptive_bonus_follows_the_entropy() -> None:
    """By hand, from the rule of Skywork-OR1: up below the target, down above it, never negative, applied below only."""
    applied, coef = [], 0.0
    for entropy in (0.5, 0.1, 0.1, 0.1, 0.2, 0.3, 0.1, 0.3, 0.3, 0.3, 0.1):
        weight, coef = adaptive_bonus(coef, entropy, target=0.2, delta=0.25)
        applied.append(weight)
        assert coef >= 0
    assert applied == [0.0, 0.0, 0.25, 0.5, 0.0, 0.0, 0.25, 0.0, 0.0, 0.0, 0.0]
    assert coef == 0.25


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["loss.entropy_target=0.2", "loss.entropy_coef=0.001"],
            "loss.entropy_target = 0.2 lets the weight of the entropy bonus follow the entropy, and "
            "loss.entropy_coef = 0.001 is a constant weight; set one of them to 0",
        ),
        (
            ["loss.entropy_delta=0.001"],
            "loss.entropy_delta is read with loss.entropy_target alone; set that, or remove it",
        ),
    ],
)
def test_one_entropy_bonus_at_a_time(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe(*overrides)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
