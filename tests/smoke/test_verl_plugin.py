"""The plug-in by verl's own command line alone: no recipe, no run folder; and with an asynchronous trainer."""

from __future__ import annotations

from typing import Any

import pytest

from tests.smoke.verl_run import VerlOutcome, run_once, stock_overrides
from tests.verl_here import needs_verl

pytestmark = needs_verl


@pytest.fixture(scope="module")
def literal(tmp_path_factory: pytest.TempPathFactory) -> VerlOutcome:
    """The paper's literal variant, on two ranks: the current policy's entropy, micro-batch by micro-batch."""
    chosen = ["trainer.v1.trainer_mode=forkrl", "+forkrl.scope=micro_batch", "+forkrl.entropy=current"]
    chosen += ["+forkrl.ratio=0.3", "+forkrl.poll_s=0.1"]
    return run_once(tmp_path_factory, "literal", lambda files: [*stock_overrides(files, ranks=2), *chosen])[1]


@pytest.fixture(scope="module")
def ahead(tmp_path_factory: pytest.TempPathFactory) -> VerlOutcome:
    """verl's trainer that samples the next step meanwhile, with groups filtered and the rollout batch as scope."""
    chosen = ["trainer.v1.trainer_mode=forkrl_colocate_async", "+forkrl.ratio=0.25", "+forkrl.poll_s=0.1"]
    filtered = ["algorithm.filter_groups.enable=True", "algorithm.filter_groups.metric=score"]
    more = [*chosen, *filtered, "trainer.total_training_steps=3"]
    return run_once(tmp_path_factory, "ahead", lambda files: [*stock_overrides(files), *more])[1]


def steps_of(outcome: VerlOutcome) -> list[dict[str, Any]]:
    assert outcome.code == 0, outcome.end
    return [line["data"] for line in outcome.metrics if line["step"] > 0]


def test_micro_batches_choose_by_their_own_entropies(literal: VerlOutcome) -> None:
    steps = steps_of(literal)
    assert len(steps) == 2
    for step in steps:
        # Four micro-batches a step (two ranks, two gradient steps), each rounding up its own share.
        assert 0.3 <= step["selection/kept_fraction"] < 0.31
        assert step["entropy/selected_mean"] > step["entropy/unselected_mean"]
        assert step["grad/norm"] == pytest.approx(step["actor/grad_norm"]) and step["grad/norm"] > 0


def test_figures_have_forkrls_names_in_verls_own_log(literal: VerlOutcome) -> None:
    assert literal.code == 0, literal.end
    assert "eval/accuracy" in literal.metrics[0]["data"]
    for step in steps_of(literal):
        assert {"reward/accuracy", "loss/clip_fraction", "entropy/threshold", "optimizer/lr"} <= step.keys()
        assert 0 <= step["rollout/logprob_gap_mean"] < 1e-3
        assert not any(name.startswith("actor/forkrl/") for name in step)


def test_an_asynchronous_trainer_selects_as_well(ahead: VerlOutcome) -> None:
    steps = steps_of(ahead)
    assert len(steps) == 3
    for step in steps:
        assert step["selection/kept_fraction"] == pytest.approx(0.25, abs=0.005)
        assert step["entropy/threshold"] > step["entropy/unselected_mean"]
    # How old the weights were that sampled depends on who was faster; the trainer tells.
    assert all("training/off_policy/trajectory_staleness/max" in step for step in steps)
