"""A run that is killed or stopped anywhere and taken up again ends as if nothing had happened, to the bit."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.smoke.world import Run, World, write_prompts

# Six steps of two gradient steps; evaluations at 0, 3 and 6, checkpoints at 2, 4 and 6. There are 16 prompts and a step
# takes 4 to 12 of them, so that the run goes through more than one epoch.
STOPPED = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGKILL: -9}


@pytest.fixture(scope="module")
def uninterrupted(world: World) -> Run:
    return world.trained("uninterrupted")


def interrupt(world: World, out: str, *overrides: str, **fault: Any) -> None:
    """Train until the fault strikes, and check that the process ended by it."""
    outcome = world.train(out, *overrides, faults=[fault], without_report=True)
    assert outcome.code == STOPPED[fault["signal"]], (fault, outcome)
    if fault["signal"] != signal.SIGKILL:
        name = signal.Signals(fault["signal"]).name
        assert outcome.line == f"forkrl: stopped by {name} and saved; continue with: forkrl train --resume {out}"
        assert any((world.folder / out / "checkpoints").glob("step-*")), "nothing was saved"


def test_the_uninterrupted_run_meets_what_resuming_must_restore(uninterrupted: Run) -> None:
    assert uninterrupted.checkpoints == ["step-4", "step-6"]
    progress = json.loads((uninterrupted.last_checkpoint / "trainer/progress.json").read_text())
    assert (progress["step"], progress["gradient_steps"]) == (6, 12)
    assert progress["prompts"]["drawn"][""]["0"] > 16, "it never came to a second epoch"
    assert [record["step"] for record in uninterrupted.metrics] == [0, 1, 2, 3, 3, 4, 5, 6, 6]


KILLS = [
    ("token", 8), ("token", 20), ("token", 40), ("token", 60), ("reward", 1), ("reward", 6), ("gradient", 1),
    ("gradient", 30), ("optimizer", 1), ("optimizer", 6), ("optimizer", 11), ("eval", 1), ("eval", 2), ("eval", 3),
    ("log", 1), ("log", 4), ("log", 5), ("log", 9), ("sample", 1), ("sample", 2), ("sample", 4), ("save", 1),
    ("save", 2), ("save", 3), ("rename", 1), ("rename", 3), ("rename", 2), ("rename", 4), ("replace", 2),
    ("replace", 5), ("unlink", 1), ("rmtree", 1),
]  # fmt: skip


@pytest.mark.parametrize(("point", "count"), KILLS)
def test_killed_at_a_chosen_point(world: World, uninterrupted: Run, point: str, count: int) -> None:
    out = f"kill-{point}-{count}"
    interrupt(world, out, point=point, count=count, signal=signal.SIGKILL, after=count % 2 == 0)
    assert world.resumed(out).bits() == uninterrupted.bits()


def test_killed_at_random_points_also_while_resuming(world: World, uninterrupted: Run) -> None:
    """Three kills in a row, each at some call of some function, the later ones in resumed runs."""
    assert world.train("counted", faults=[{"point": "anywhere", "count": 0}], without_report=True).code == 0
    num_calls = int((world.folder / "calls").read_text())
    chance = random.Random(5)
    for attempt in range(3):
        out = f"random-{attempt}"
        for number in range(3):
            fault = {"point": "anywhere", "count": chance.randrange(num_calls // 2), "signal": signal.SIGKILL}
            argv = ("--resume", out) if number else ("recipe.toml", "--out", out)
            outcome = world.run("train", *argv, faults=[fault], without_report=True)
            assert outcome.code in (-9, 0), outcome
        assert world.resumed(out).bits() == uninterrupted.bits()


IN_TWO_PROCESSES = ("runtime.threads=2", "runtime.workers=2")


@pytest.fixture(scope="module")
def uninterrupted_pair(world: World) -> Run:
    return world.trained("pair", *IN_TWO_PROCESSES)


@pytest.mark.parametrize(
    ("point", "count", "signum"),
    [
        ("token", 9, signal.SIGKILL), ("gradient", 20, signal.SIGKILL), ("optimizer", 7, signal.SIGKILL),
        ("token", 21, signal.SIGTERM), ("gradient", 9, signal.SIGINT), ("token", 25, signal.SIGHUP),
    ],
)  # fmt: skip
def test_interrupted_in_two_processes(
    world: World, uninterrupted_pair: Run, point: str, count: int, signum: signal.Signals
) -> None:
    out = f"pair-{point}-{count}"
    interrupt(world, out, *IN_TWO_PROCESSES, point=point, count=count, signal=signum)
    assert world.resumed(out).bits() == uninterrupted_pair.bits()


DECAY = ("optimizer.schedule=cosine", "optimizer.warmup_steps=3", "optimizer.min_lr_ratio=0.1")


@pytest.fixture(scope="module")
def uninterrupted_decay(world: World) -> Run:
    return world.trained("decay", *DECAY)


@pytest.mark.parametrize(("point", "count", "signum"), [("optimizer", 8, signal.SIGKILL), ("token", 31, signal.SIGINT)])
def test_a_falling_learning_rate_continues_where_it_was(
    world: World, uninterrupted_decay: Run, point: str, count: int, signum: signal.Signals
) -> None:
    rates = uninterrupted_decay.column("optimizer/lr")
    assert rates[1:] == sorted(rates[1:], reverse=True), "the warm-up ends in the second step"
    out = f"decay-{point}-{count}"
    interrupt(world, out, *DECAY, point=point, count=count, signal=signum)
    assert world.resumed(out).bits() == uninterrupted_decay.bits()


BONUS = ("loss.entropy_target=2.62", "loss.entropy_delta=0.5")


@pytest.fixture(scope="module")
def uninterrupted_bonus(world: World) -> Run:
    return world.trained("bonus", *BONUS)


@pytest.mark.parametrize(("point", "count", "signum"), [("optimizer", 9, signal.SIGKILL), ("token", 31, signal.SIGINT)])
def test_an_adaptive_entropy_bonus_continues_where_it_was(
    world: World, uninterrupted_bonus: Run, point: str, count: int, signum: signal.Signals
) -> None:
    weights = uninterrupted_bonus.column("loss/entropy_coef")
    assert 0.0 in weights[weights.index(0.5) :], f"it rises and falls: {weights}"
    out = f"bonus-{point}-{count}"
    interrupt(world, out, *BONUS, point=point, count=count, signal=signum)
    assert world.resumed(out).bits() == uninterrupted_bonus.bits()


BEST = ("checkpoint.keep_best=true", "checkpoint.keep=1", "eval.every=1")


@pytest.fixture(scope="module")
def uninterrupted_best(world: World) -> Run:
    return world.trained("best", *BEST)


def best_of(run: Run) -> int:
    accuracies = run.column("eval/accuracy")
    return accuracies.index(max(accuracies))


def test_the_best_checkpoint_is_kept_next_to_the_newest(uninterrupted_best: Run) -> None:
    best = best_of(uninterrupted_best)
    assert best in (1, 3, 5), "a step that is saved for its accuracy only"
    assert uninterrupted_best.checkpoints == [f"step-{best}", "step-6"]


@pytest.mark.parametrize(
    ("point", "count", "signum"),
    [("eval", 5, signal.SIGKILL), ("rename", 5, signal.SIGKILL), ("token", 40, signal.SIGINT)],
)
def test_the_best_checkpoint_outlives_an_interruption(
    world: World, uninterrupted_best: Run, point: str, count: int, signum: signal.Signals
) -> None:
    out = f"best-{point}-{count}"
    interrupt(world, out, *BEST, point=point, count=count, signal=signum)
    resumed = world.resumed(out)
    assert resumed.bits() == uninterrupted_best.bits()
    assert resumed.checkpoints == uninterrupted_best.checkpoints


STALLED = ("optimizer.lr=1e-12", "eval.every=1", "eval.patience=2", "checkpoint.every=6")


def test_a_run_without_progress_stops_early_and_can_go_further(world: World) -> None:
    """The evaluations of an unchanged model are equal, so the second after the first one stops the run."""
    stopped = world.trained("stalled", *STALLED)
    assert [*stopped.column("eval/accuracy")] == [stopped.column("eval/accuracy")[0]] * 3
    assert stopped.checkpoints == ["step-2"]
    assert "finished" in world.run("runs", "stalled").stdout
    again = world.run("train", "--resume", "stalled")
    assert (
        "stalled has stopped early at step 2 of 6: no higher accuracy in 2 evaluations (eval.patience); to train it "
        "further, raise eval.patience, or turn it off: forkrl train --resume stalled eval.patience=0\n"
    ) in again.stdout
    assert world.run("train", "--resume", "stalled", "eval.patience=0").code == 0
    assert stopped.checkpoints[-1] == "step-6"
    assert world.run("report", "stalled").code == 0
    page = (world.folder / "stalled/report.html").read_text()
    assert "points [" in page and "sampled in different ways" not in page


def test_an_early_stop_survives_a_kill(world: World) -> None:
    interrupt(world, "killed-stalled", *STALLED, point="eval", count=3, signal=signal.SIGKILL)
    resumed = world.resumed("killed-stalled")
    assert resumed.checkpoints == ["step-2"] and len(resumed.column("eval/accuracy")) == 3


EVERY = "dynamic_sampling.enabled=false"


@pytest.mark.parametrize(
    ("sampling", "limit", "step"), [((EVERY,), 1.25, 5), ((EVERY,), 1.1, 5), ((EVERY,), 0.1, 1), ((EVERY,), 9, 6)]
)
def test_a_run_ends_after_the_step_that_completes_its_epochs(
    world: World, sampling: tuple[str, ...], limit: float, step: int
) -> None:
    """A step draws 4 of 16 prompts. The last step is evaluated and saved, although neither is due by its number."""
    run = world.trained(f"epochs-{limit}", *sampling, f"training.epochs={limit}")
    assert run.column("sampling/epochs") == [number / 4 for number in range(1, step + 1)]
    assert [record["step"] for record in run.metrics if "eval/accuracy" in record] == sorted({0, min(3, step), step})
    assert run.checkpoints == ["step-4", f"step-{step}"][-min(step, 2) :]


SOME_DROPPED = ("rollout.group_size=3", "dynamic_sampling.generation_prompts=3")


@pytest.fixture(scope="module")
def unlimited(world: World) -> Run:
    return world.trained("unlimited", *SOME_DROPPED)


@pytest.fixture(scope="module")
def limited(world: World, unlimited: Run) -> tuple[str, Run]:
    """The setting that ends the other run after its fifth step, and the run that it ends."""
    setting = f"training.epochs={unlimited.column('sampling/epochs')[4]}"
    return setting, world.trained("limited", *SOME_DROPPED, setting)


def test_epochs_count_all_prompts_that_dynamic_sampling_drew(unlimited: Run, limited: tuple[str, Run]) -> None:
    setting, run = limited
    batches = unlimited.column("sampling/generation_batches")
    epochs = [3 * sum(batches[: number + 1]) / 16 for number in range(6)]
    assert unlimited.column("sampling/epochs") == epochs and set(batches) == {2, 3}
    assert run.timeless[:-1] == unlimited.timeless[:7], "the first five steps are the same"
    assert [record["step"] for record in run.metrics] == [0, 1, 2, 3, 3, 4, 5, 5]
    assert "eval/accuracy" in run.metrics[-1]
    assert run.checkpoints == ["step-4", "step-5"]
    reason = f"sampling/epochs is {epochs[4]:.4g} ({setting.replace('=', ' = ')})"
    assert f"stopping at step 5: {reason}\n" in run.outcome.stdout


def test_a_run_that_its_epochs_ended_is_finished_and_can_go_further(
    world: World, unlimited: Run, limited: tuple[str, Run]
) -> None:
    _, run = limited
    shutil.copytree(run.folder, world.folder / "further")
    assert "finished" in world.run("runs", "further").stdout
    again = world.run("train", "--resume", "further", without_report=True)
    assert again.code == 0, again.stderr
    assert "further has stopped early at step 5 of 6: sampling/epochs is " in again.stdout
    assert "or turn it off: forkrl train --resume further training.epochs=0\n" in again.stdout
    further = Run(world.folder / "further", again)
    assert further.bits() == run.bits(), "nothing was trained"
    outcome = world.run("train", "--resume", "further", "training.epochs=0", without_report=True)
    assert outcome.code == 0, outcome.stderr
    assert further.last_checkpoint.name == "step-6" and further.weights == unlimited.weights
    last, evaluated = further.timeless[-2:], further.timeless[-3]
    assert last == unlimited.timeless[-2:] and evaluated["step"] == 5


@pytest.mark.parametrize(
    ("point", "count", "signum"),
    [
        ("optimizer", 7, signal.SIGKILL), ("log", 7, signal.SIGKILL), ("log", 8, signal.SIGKILL),
        ("save", 3, signal.SIGKILL), ("eval", 3, signal.SIGKILL), ("eval", 3, signal.SIGINT),
        ("token", 31, signal.SIGTERM),
    ],
)  # fmt: skip
@pytest.mark.parametrize("after", [False, True])
def test_an_end_by_epochs_survives_an_interruption(
    world: World, limited: tuple[str, Run], point: str, count: int, signum: signal.Signals, after: bool
) -> None:
    setting, run = limited
    out = f"limited-{point}-{signum}-{after}-{count}"
    interrupt(world, out, *SOME_DROPPED, setting, point=point, count=count, signal=signum, after=after)
    resumed = world.resumed(out)
    assert resumed.bits() == run.bits()
    assert resumed.checkpoints == run.checkpoints
    evaluated = (point, count, after) == ("log", 8, True)
    assert ("has stopped early" in resumed.outcome.stdout) == evaluated, "the evaluation belongs to the run"


def test_a_lost_worker_costs_only_unsaved_steps(world: World, uninterrupted_pair: Run) -> None:
    stop = {"point": "gradient", "count": 13, "signal": signal.SIGSTOP}
    started = world.start(
        "train", "recipe.toml", *IN_TWO_PROCESSES, "--out", "lost", faults=[stop], without_report=True
    )
    started.wait_until_stopped()
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    (worker,) = [pid for pid in children if b"forkrl.parallel.workers" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(worker), signal.SIGKILL)
    started.send(signal.SIGCONT)
    outcome = started.wait()
    assert outcome.code == 1
    assert re.fullmatch(
        "forkrl: training stopped at step [0-9]: a worker was killed by SIGKILL, as the system does when memory runs "
        "out; continue with: forkrl train --resume lost",
        outcome.line,
    )
    assert world.resumed("lost").bits() == uninterrupted_pair.bits()


STOPS = [
    ("token", 7, signal.SIGTERM), ("token", 30, signal.SIGTERM), ("token", 31, signal.SIGINT),
    ("reward", 4, signal.SIGTERM), ("gradient", 7, signal.SIGTERM), ("optimizer", 5, signal.SIGTERM),
    ("optimizer", 12, signal.SIGINT), ("eval", 1, signal.SIGTERM), ("eval", 2, signal.SIGTERM),
    ("eval", 3, signal.SIGINT), ("log", 1, signal.SIGTERM), ("log", 5, signal.SIGTERM), ("sample", 3, signal.SIGINT),
    ("save", 1, signal.SIGTERM), ("save", 3, signal.SIGTERM), ("rename", 4, signal.SIGTERM),
    ("sync", 20, signal.SIGINT), ("token", 29, signal.SIGHUP), ("optimizer", 6, signal.SIGHUP),
]  # fmt: skip


@pytest.mark.parametrize(("point", "count", "signum"), STOPS)
def test_stopped_by_a_signal_saves_and_goes_on(
    world: World, uninterrupted: Run, point: str, count: int, signum: signal.Signals
) -> None:
    out = f"stop-{point}-{count}"
    interrupt(world, out, point=point, count=count, signal=signum)
    assert world.resumed(out).bits() == uninterrupted.bits()


def test_stopped_between_checkpoints_loses_no_finished_step(world: World, uninterrupted: Run) -> None:
    """Logged evaluations stay single, too: the checkpoint of the stop lies behind them."""
    rare = "checkpoint.every=6"
    interrupt(world, "rare", rare, point="token", count=35, signal=signal.SIGTERM)
    stopped = Run(world.folder / "rare", uninterrupted.outcome)
    step = stopped.metrics[-1]["step"]
    assert step > 0
    assert stopped.checkpoints == [f"step-{step}"]
    resumed = world.resumed("rare")
    assert f"step {step}/6  accuracy" not in resumed.outcome.stdout
    assert resumed.bits() == uninterrupted.bits()


def test_weights_alone_can_be_used_and_not_resumed(world: World, uninterrupted: Run) -> None:
    run = world.trained("light", "checkpoint.kind=weights", "checkpoint.keep=9")
    assert run.bits() != uninterrupted.bits(), "nothing but the training state differs"
    assert run.metrics[-1]["eval/accuracy"] == uninterrupted.metrics[-1]["eval/accuracy"]
    assert run.checkpoints == ["step-2", "step-4", "step-6"]
    assert not (run.last_checkpoint / "trainer").exists()
    assert (run.last_checkpoint / "model.safetensors").read_bytes() == (
        uninterrupted.last_checkpoint / "model.safetensors"
    ).read_bytes()
    evaluated = world.run("eval", "light@step-4", "--problems", "2", "--out", "light-eval", without_report=True)
    assert evaluated.code == 0, evaluated.stderr
    outcome = world.run("train", "--resume", "light", "training.steps=8", "checkpoint.kind=full")
    assert outcome.code == 2
    assert outcome.line == (
        'forkrl: --resume light: with checkpoint.kind = "weights" the run saved no training state to resume from; '
        "start a new run with another --out, from these weights with model.path=light/checkpoints/step-6"
    )


def test_without_checkpoints_a_run_still_reports(world: World, uninterrupted: Run) -> None:
    outcome = world.train("bare", "checkpoint.kind=none")
    assert outcome.code == 0, outcome.stderr
    run = Run(world.folder / "bare", outcome)
    assert run.checkpoints == []
    assert [record["step"] for record in run.metrics] == [record["step"] for record in uninterrupted.metrics]
    assert (run.folder / "report.html").exists()
    assert world.run("eval", "bare").line == (
        'forkrl: bare: with checkpoint.kind = "none" this run saved no weights; bare@base is its starting model'
    )
    assert world.run("drift", "bare").line == (
        'forkrl: bare: with checkpoint.kind = "none" this run saved no weights; name another run, '
        "or two models at least"
    )
    resumed = world.run("train", "--resume", "bare", "training.steps=8")
    assert resumed.code == 2
    nothing = 'with checkpoint.kind = "none" the run saved no training state to resume from'
    assert resumed.line == f"forkrl: --resume bare: {nothing}; start a new run with another --out"


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("weights", "the checkpoint of step 3 is intact; to continue, start a new run from its weights"),
        ("none", "no checkpoint was saved; start a new run"),
    ],
)
def test_a_stop_says_whether_the_run_can_go_on(world: World, kind: str, says: str) -> None:
    fault = {"point": "optimizer", "count": 5, "signal": signal.SIGTERM}
    outcome = world.train(f"stopped-{kind}", f"checkpoint.kind={kind}", faults=[fault], without_report=True)
    assert outcome.code == 143
    assert outcome.line.startswith(f"forkrl: stopped by SIGTERM after step 3; {says}")


def test_a_second_signal_does_not_cut_the_save_short(world: World, uninterrupted: Run) -> None:
    stop = {"count": 30, "point": "token", "signal": signal.SIGTERM}
    again = {"count": 1, "point": "rename", "signal": signal.SIGINT}
    outcome = world.train("twice", "checkpoint.every=6", faults=[stop, again], without_report=True)
    assert outcome.code == 143
    assert world.resumed("twice").bits() == uninterrupted.bits()


def test_resuming_a_finished_run_changes_nothing(world: World, uninterrupted: Run) -> None:
    """Not even its last evaluation, which came after its last checkpoint, is done again."""
    shutil.copytree(uninterrupted.folder, world.folder / "finished")
    fatal = {"point": "eval", "count": 1, "signal": signal.SIGKILL}
    resumed = Run(world.folder / "finished", world.run("train", "--resume", "finished", faults=[fatal]))
    assert resumed.outcome.code == 0, resumed.outcome
    assert "instead of" not in resumed.outcome.stdout
    assert resumed.bits() == uninterrupted.bits()
    assert resumed.outcome.stdout.splitlines()[-2].startswith("Held-out accuracy ")


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(world: World, uninterrupted: Run) -> None:
    shutil.copytree(uninterrupted.folder, world.folder / "damaged")
    weights = world.folder / "damaged/checkpoints/step-6/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    resumed = world.resumed("damaged")
    assert "step-6/model.safetensors: damaged checkpoint: sha256" in resumed.outcome.stderr
    assert "trying the checkpoint before it" in resumed.outcome.stderr
    assert "step 5/6  accuracy" in resumed.outcome.stdout
    assert resumed.bits() == uninterrupted.bits()


def test_a_changed_recipe_is_refused_and_the_changes_listed(world: World, uninterrupted: Run) -> None:
    for argv in (["recipe.toml"], []):
        changes = ("optimizer.lr=0.5", "selection.rule=all")
        outcome = world.run("train", *argv, *changes, "--resume", "uninterrupted")
        assert outcome.code == 2
        listed = "selection.rule: 'top_entropy' -> 'all'; optimizer.lr: 0.01 -> 0.5;"
        assert f"the recipe has changed since the run began: {listed}" in outcome.line
        assert outcome.line.endswith("from these weights with model.path=uninterrupted/checkpoints/step-6")
    same = world.run("train", "recipe.toml", "--resume", "uninterrupted", without_report=True)
    assert same.code == 0, same.stderr


def test_other_versions_or_threads_are_said_to_change_the_bits(world: World, uninterrupted: Run) -> None:
    shutil.copytree(uninterrupted.folder, world.folder / "upgraded")
    config = world.folder / "upgraded/config.toml"
    config.write_text(re.sub('\ntorch = ".*"\n', '\ntorch = "1.0"\n', config.read_text()))
    lines = world.resumed("upgraded").outcome.stdout.splitlines()
    assert [line.split(" instead of ")[1] for line in lines if line.startswith("resuming with torch ")] == [
        "1.0: the run continues, but is no longer bit-identical"
    ]


def test_changed_data_are_refused(own_world: World) -> None:
    short = ("training.steps=1", "eval.problems=1")
    own_world.trained("run", *short)
    write_prompts(own_world.folder / "prompts.jsonl", [{"prompt": f"{n}*{n}=", "answer": "13579"} for n in range(20)])
    outcome = own_world.run("train", "--resume", "run")
    assert outcome.code == 2
    assert "--resume run: the prompts of task.dataset are not those the run began with (fingerprint" in outcome.line


def test_another_model_behind_the_same_path_is_refused(own_world: World) -> None:
    from tests.smoke.world import make_model

    own_world.trained("run", "training.steps=1", "eval.problems=1")
    make_model(own_world.folder / "model", head_dim=4)
    outcome = own_world.run("train", "--resume", "run")
    assert outcome.code == 2
    assert "checkpoint of another model" in outcome.line


def test_one_process_at_a_time_in_a_folder(world: World) -> None:
    first = world.start(
        "train", "recipe.toml", "--out", "held", faults=[{"point": "token", "count": 12, "signal": signal.SIGSTOP}]
    )
    first.wait_until_stopped()
    try:
        second = world.run("train", "--resume", "held")
        assert second.code == 2
        assert f"held: process {first.pid} is training here" in second.line
        assert world.train("held").code == 2
    finally:
        first.send(signal.SIGKILL)
    assert first.wait().code == -9
    assert world.run("train", "--resume", "held", without_report=True).code == 0


def test_the_command_itself_can_be_interrupted(world: World) -> None:
    """The whole way, interpreter and all: Ctrl-C in a terminal reaches the process group, verifiers included."""
    process = subprocess.Popen(
        [sys.executable, "-m", "forkrl", "train", "recipe.toml", "training.steps=100000", "--out", "real"],
        cwd=world.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert stderr.endswith("forkrl: stopped by SIGINT and saved; continue with: forkrl train --resume real\n")
    assert list(Path(world.folder, "real/checkpoints").glob("step-*"))


WANDB = """import json
import pathlib


def init(**settings):
    (pathlib.Path(settings["dir"]) / "wandb").mkdir(exist_ok=True)
    if pathlib.Path("logged-out").exists():
        raise RuntimeError("api_key not configured.\\nand more")
    with open("wandb.jsonl", "a") as file:
        file.write(json.dumps([settings["id"], settings["resume"]]) + "\\n")
    return Run()


class Run:
    def log(self, metrics, step):
        pass

    finish = log
"""


def test_a_tracker_refuses_and_later_goes_on_with_the_same_run(own_world: World) -> None:
    """A refusal leaves no new run behind and an old one as it was; curves end as if nothing had happened."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, trackers = own_world.folder, 'log.trackers=["tensorboard", "wandb"]'
    (folder / "wandb.py").write_text(WANDB)
    logged_out = folder / "logged-out"
    refusal = "forkrl: log.trackers: wandb does not start: api_key not configured; fix it, or remove it"

    logged_out.touch()
    outcome = own_world.train("run", trackers)
    assert (outcome.code, outcome.line) == (2, refusal)
    assert not (folder / "run").exists()

    logged_out.unlink()
    interrupt(own_world, "run", trackers, point="log", count=8, signal=signal.SIGKILL)  # step 5 is logged, step 4 saved
    before = Run(folder / "run", outcome).bits()
    logged_out.touch()
    outcome = own_world.run("train", "--resume", "run")
    assert (outcome.code, outcome.line) == (2, refusal)
    assert Run(folder / "run", outcome).bits() == before

    logged_out.unlink()
    run = own_world.resumed("run")
    (first, how), (second, how_again) = [json.loads(line) for line in (folder / "wandb.jsonl").read_text().splitlines()]
    assert (first, how) == (second, how_again)
    assert len(first) == 12
    assert how == "allow"
    events = EventAccumulator(str(folder / "run/tensorboard"))
    events.Reload()
    for name in ("grad/norm", "eval/accuracy"):
        steps = [record["step"] for record in run.metrics if name in record]
        assert [event.step for event in events.Scalars(name)] == steps
