"""Trains and measures the runs of a study, several at a time, each as an ordinary command in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import NamedTuple

import tomli_w

from forkrl.commands.runs import describe_run
from forkrl.commands.study_measured import read_measurement
from forkrl.commands.work_folder import weights_fingerprint
from forkrl.config import TrainConfig
from forkrl.config.recipe import change_recipe, flatten, parse_recipe, recipe_toml, without_removed
from forkrl.config.study import START, MeasurementConfig, PlannedRun, StudyConfig, learning_settings
from forkrl.errors import UserError, notice
from forkrl.parallel.processes import child_environment
from forkrl.parallel.threads import available_cores
from forkrl.report.formatting import duration
from forkrl.report.progress import counting, elapsed
from forkrl.store.atomic import write_text
from forkrl.store.interruption import Interruption
from forkrl.store.resuming import stored_config
from forkrl.store.run_folder import CONFIG, clear_folder, lock_folder
from forkrl.store.run_record import (
    RunRecord,
    describe_machine,
    digest,
    make_record,
    read_record,
    write_record,
)

_LOOK_EVERY_S = 0.2
_MEASUREMENT_WORK = 0.2
"""Of the work of training, roughly, for the time left: five measurements of SmolLM2 took as long as 25 steps."""
# The child dies with this process, whatever kills it; its output goes to a log.
_CHILD = (
    "import sys; from forkrl.parallel.processes import die_with_parent; die_with_parent(int(sys.argv.pop(1))); "
    "from forkrl.cli import main; sys.exit(main())"
)


class Places(NamedTuple):
    """``records``: one JSON file per finished run. ``runs``: run folders and logs."""

    records: Path
    runs: Path

    def record(self, run: PlannedRun) -> Path:
        return self.records / f"{run.name}.json"


def read_records(study: StudyConfig, places: Places, planned: Sequence[PlannedRun]) -> dict[str, RunRecord]:
    """Records of finished runs by name, checked to be of this study.

    Raises:
        UserError: a record is of another study, or made with other settings, measurements or base weights.
    """
    of_name = {run.name: run for run in planned}
    weights = {path: known_weights(path) for path in {run.config.model.path for run in planned}}
    found: dict[str, RunRecord] = {}
    for path in sorted(places.records.glob("*.json")):
        if path.stem not in of_name:
            raise UserError(
                f"{path}: is not a run of this study (it has {', '.join(dict.fromkeys(run.arm for run in planned))}); "
                f"move it away, or name another folder with --out"
            )
        record, run = read_record(path), of_name[path.stem]
        if (record.arm, record.seed) != (run.arm, run.seed):
            raise UserError(f"{path}: holds arm {record.arm} with seed {record.seed}; remove it to train this run")
        if different := _other_settings(record, run, weights[run.config.model.path]):
            raise UserError(
                f"{path}: was made with other settings ({different}); remove it to train this run again, or name "
                f"another folder with --out"
            )
        for name, measurement in study.measurements_of(run.arm).items():
            stored = record.measured[name].words if name in record.measured else ["none"]
            if stored != measurement.words:
                raise UserError(
                    f"{path}: was made with other measurements ({name}: {' '.join(stored)}, now "
                    f"{' '.join(measurement.words)}); remove it to measure this run again"
                )
        found[path.stem] = record
    return found


def known_weights(path: str) -> str:
    """Fingerprint of a base model; empty if it is not here, where its finished runs can still be compared."""
    try:
        return weights_fingerprint(path)
    except UserError:
        return ""


def _other_settings(record: RunRecord, run: PlannedRun, weights: str) -> str:
    """The first setting in which a record differs from the run planned now; empty if it is the same run."""
    settings = without_removed(record.settings)
    made_with = learning_settings(parse_recipe(TrainConfig, settings, f"record of {run.name}"))
    stored, asked = flatten(made_with), flatten(learning_settings(run.config))
    if weights and record.weights == weights:  # the same files, wherever they are
        stored.pop("model.path", None)
        asked.pop("model.path", None)
    elif weights and record.weights:
        return f"the files of model.path = {run.config.model.path} have changed"
    for key in sorted(stored.keys() | asked.keys()):
        if stored.get(key) != asked.get(key):
            return f"{key} = {stored.get(key)!r}, now {asked.get(key)!r}"
    return ""


def train_missing(study: StudyConfig, planned: Sequence[PlannedRun], places: Places, jobs: int) -> list[str]:
    """Train and measure every run without a record, ``jobs`` at a time; returns what failed, a sentence per run.

    Raises:
        Interrupted: after a stop signal, once every child has saved its run.
    """
    known = read_records(study, places, planned)
    waiting = [run for run in planned if run.name not in known]
    places.runs.mkdir(parents=True, exist_ok=True)
    running: list[_Job] = []
    failures: list[str] = []
    total, done = len(waiting), 0

    def describe() -> str:
        return ", ".join(map(str, running)) or "starting"

    began, finished = time.monotonic(), 0.0

    def seconds_left() -> float | None:
        worked = finished + sum(job.share() - job.share_before for job in running)
        left = total - done - sum(job.share() for job in running)
        return (time.monotonic() - began) * left / worked if worked > 0 else None

    threads = max(1, available_cores() // jobs)
    with Interruption() as interruption, counting(describe, total, lambda: done, seconds_left) as show:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(_Job(run := waiting.pop(0), study.measurements_of(run.arm), places, threads))
                for job in [job for job in running if not job.works()]:
                    running.remove(job)
                    done += 1
                    finished += 1 - job.share_before
                    failures += [job.failure] if job.failure else []
                    notice(job.failure or job.outcome())
                    show()
                with interruption.allowed():
                    time.sleep(_LOOK_EVERY_S)
        finally:
            for job in running:
                job.send(signal.SIGTERM)
            while any(job.is_busy for job in running):
                if interruption.signalled_again:
                    for job in running:
                        job.send(signal.SIGKILL)
                time.sleep(_LOOK_EVERY_S)
    return failures


def probe(run: PlannedRun, jobs: int) -> RunRecord:
    """The record of two steps of a run, with at most 64 held-out problems."""
    problems = min(64, run.config.eval.problems)
    changes = {"training.steps": 2, "eval.problems": problems, "log.trackers": []}
    changes |= {"checkpoint.kind": "none", "checkpoint.merged": False, "checkpoint.keep_best": False}
    changes |= {"optimizer.schedule": "constant", "optimizer.min_lr_ratio": 0.0, "optimizer.warmup_steps": 0}
    short = run._replace(config=change_recipe(run.config, changes))
    with TemporaryDirectory() as folder, elapsed(f"two steps of {run.name}"):
        job = _Job(short, {}, Places(Path(folder), Path(folder)), max(1, available_cores() // jobs))
        try:
            while job.works():
                time.sleep(_LOOK_EVERY_S)
        finally:
            job.send(signal.SIGKILL)
        if job.failure:
            raise UserError(job.failure.replace(f" (log: {job.log})", ""))
        return read_record(Path(folder) / f"{short.name}.json")


def expected_seconds(record: RunRecord, run: PlannedRun) -> float:
    """Seconds of training and evaluation of a run, judged by a record of the same arm or of a similar one."""
    config = run.config
    lengths = [value for value in record.curves["eval/length"][1] if value is not None]
    evaluations = 2 + (config.training.steps - 1) // config.eval.every if config.eval.every else 2
    evaluated = evaluations * config.eval.problems * config.eval.samples * fmean(lengths)
    return record.seconds / record.steps * config.training.steps + evaluated * record.seconds / record.tokens


class _Job:
    """A run of the study that is being trained or measured, one child process after the other."""

    def __init__(
        self, run: PlannedRun, measurements: Mapping[str, MeasurementConfig], places: Places, threads: int
    ) -> None:
        self.run, self._measurements, self._places, self._threads = run, measurements, places, threads
        self._folder = places.runs / run.name
        self.log = places.runs / f"{run.name}.log"
        self._recipe = places.runs / f"{run.name}.toml"
        self._weights = places.runs / f"{run.name}.weights"
        self._activity, self.failure = "", ""
        self._num_started, self._log_start = 1, 0
        self._began = time.monotonic()
        self._commands = self._words()
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline = -1
        self.share_before = self.share()
        """What was done before this process began."""

    def __str__(self) -> str:
        return f"{self.run.arm} seed {self.run.seed} {self._activity}".rstrip()

    @property
    def is_busy(self) -> bool:
        """Whether its child runs."""
        return self._process is not None and self._process.poll() is None

    def works(self) -> bool:
        """Start the next command if the last one has ended; False at the end, with a record or a ``failure``."""
        if self.is_busy:
            return True
        try:
            return self._go_on()
        except UserError as error:
            self.failure = f"{self}: {error}"
            return False

    def _go_on(self) -> bool:
        if self._process is not None:
            os.close(self._lifeline)
            if self._process.returncode:
                self.failure = self._failure(self._process.returncode)
                return False
            self._process = None
        words = next(self._commands, None)
        if words is not None:
            self._start(words)
            return True
        write_record(self._places.record(self.run), self._record())
        return False

    def send(self, signum: signal.Signals) -> None:
        if self._process is not None and self.is_busy:
            self._process.send_signal(signum)

    def share(self) -> float:
        """Of the work that is done."""
        if self._activity in ("", "training"):
            finished = describe_run(self._folder).step / self.run.config.training.steps
        else:
            finished = 1 + _MEASUREMENT_WORK * (self._num_started - 2)
        return finished / (1 + _MEASUREMENT_WORK * len(self._measurements))

    def outcome(self) -> str:
        record = read_record(self._places.record(self.run))
        values = record.curves["eval/accuracy"][1]
        taken = duration(time.monotonic() - self._began)
        return f"{self.run.arm}, seed {self.run.seed}: {values[0]:.1%} -> {values[-1]:.1%} held out, {taken}"

    def _words(self) -> Iterator[list[str]]:
        """The command lines still to be run."""
        if not self._is_trained():
            self._activity = "training"
            yield ["train", *self._how_to_train()]
        for name, measurement in self._measurements.items():
            self._activity = name
            self._num_started += 1
            subject = f"{self._folder}@base" if name.endswith(f"@{START}") else str(self._folder)
            yield [measurement.command, subject, "--out", str(self._measured(name)), *measurement.arguments]

    def _how_to_train(self) -> list[str]:
        """Resume what an interruption has left where that is possible, otherwise start again."""
        if (self._folder / CONFIG).is_file():
            if stored_config(self._folder).checkpoint.kind == "full":
                return ["--resume", str(self._folder)]
            os.close(lock_folder(self._folder, "training"))  # an error if a process is
            clear_folder(self._folder)
        write_text(self._recipe, tomli_w.dumps(recipe_toml(self.run.config)))
        write_text(self._weights, known_weights(self.run.config.model.path))
        return [str(self._recipe), "--out", str(self._folder)]

    def _is_trained(self) -> bool:
        if not (self._folder / CONFIG).is_file():
            return False
        stored = stored_config(self._folder)
        same = learning_settings(stored) == learning_settings(self.run.config) and stored.seed == self.run.seed
        now = known_weights(self.run.config.model.path)
        if not same or (now and self._first_weights() not in ("", now)):
            what = "from other base weights" if same else "with other settings"
            raise UserError(f"{self._folder}: holds a run {what}; remove it, or name another folder with --runs-dir")
        return describe_run(self._folder).status == "finished"

    def _first_weights(self) -> str:
        """Fingerprint of the base model when training began."""
        try:
            return self._weights.read_text(encoding="utf-8")
        except OSError:
            raise UserError(
                f"{self._folder}: was not started by this study; remove it, or name another folder with --runs-dir"
            ) from None

    def _start(self, words: list[str]) -> None:
        theirs, self._lifeline = os.pipe()
        with self.log.open("ab") as output:
            self._log_start = output.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(theirs), *words],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=child_environment(self._threads),
                pass_fds=[theirs], start_new_session=True,
            )  # fmt: skip
        os.close(theirs)

    def _failure(self, code: int) -> str:
        said = self.log.read_bytes()[self._log_start :].decode(errors="replace").strip().splitlines()
        how = f"failed with exit code {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name} (often out of memory: lower --jobs)"
        return f"{self} {how}: {said[-1].removeprefix('forkrl: ') if said else 'no output'} (log: {self.log})"

    def _measured(self, name: str) -> Path:
        """The folder of a measurement; another one for other arguments or base weights."""
        what = digest([self._first_weights(), *self._measurements[name].words])
        return self._places.runs / f"{self.run.name}.{name}-{what}"

    def _record(self) -> RunRecord:
        measured = {
            name: read_measurement(self._measured(name), measurement)
            for name, measurement in self._measurements.items()
        }
        return make_record(self.run.arm, self._folder, self._first_weights(), measured, machine=describe_machine())
