"""Trains and measures the runs of a study, several at a time, each as an ordinary command in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import NamedTuple

import tomli_w

from forkrl.commands.work_folder import weights_fingerprint
from forkrl.config.recipe import change_recipe, recipe_toml
from forkrl.config.study import MeasurementConfig, PlannedRun, StudyConfig, learning_settings
from forkrl.errors import UserError, notice
from forkrl.parallel.processes import child_environment
from forkrl.parallel.threads import available_cores
from forkrl.report.formatting import duration
from forkrl.report.progress import counting, elapsed
from forkrl.store.atomic import write_text
from forkrl.store.interruption import Interruption
from forkrl.store.results import read_results
from forkrl.store.resuming import stored_config
from forkrl.store.run_folder import CONFIG, clear_folder
from forkrl.store.run_record import Measured, RunRecord, digest, flat, make_record, read_record, write_record

_LOOK_EVERY_S = 0.2
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


def read_records(places: Places, planned: Sequence[PlannedRun]) -> dict[str, RunRecord]:
    """Records of finished runs by name, checked to be of this study.

    Raises:
        UserError: a record is of another study, of other settings, or of another base model.
    """
    of_name = {run.name: run for run in planned}
    weights = {path: _known_weights(path) for path in {run.config.model.path for run in planned}}
    found: dict[str, RunRecord] = {}
    for path in sorted(places.records.glob("*.json")):
        if path.stem not in of_name:
            raise UserError(
                f"{path}: is not a run of this study (it has {', '.join(dict.fromkeys(run.arm for run in planned))}); "
                f"move it away, or name another folder with --out"
            )
        found[path.stem] = record = read_record(path)
        run = of_name[path.stem]
        if different := _other_settings(record, run, weights[run.config.model.path]):
            raise UserError(
                f"{path}: was made with other settings ({different}); remove it to train this run again, or name "
                f"another folder with --out"
            )
    return found


def _known_weights(path: str) -> str | None:
    """Fingerprint of a base model; None if it is not here, where its finished runs can still be compared."""
    try:
        return weights_fingerprint(path)
    except UserError:
        return None


def _other_settings(record: RunRecord, run: PlannedRun, weights: str | None) -> str:
    """The first setting in which a record differs from the run planned now; empty if it is the same run."""
    stored, asked = flat(record.settings), flat(learning_settings(run.config))
    if weights and record.weights == weights:  # the same files, wherever they are
        stored.pop("model.path", None)
        asked.pop("model.path", None)
    elif weights is not None and record.weights != weights:
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
    known = read_records(places, planned)
    waiting = [run for run in planned if run.name not in known]
    places.runs.mkdir(parents=True, exist_ok=True)
    running: list[_Job] = []
    failures: list[str] = []
    total, done = len(waiting), 0

    def describe() -> str:
        return ", ".join(map(str, running)) or "starting"

    def share() -> float:
        return (done + sum(job.share() for job in running)) / total

    with Interruption() as interruption, counting(describe, total, lambda: done, share) as show:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(_Job(waiting.pop(0), study.measurements, places, max(1, available_cores() // jobs)))
                for job in [job for job in running if not job.works()]:
                    running.remove(job)
                    done += 1
                    failures += [job.failure] if job.failure else []
                    notice(job.failure or job.outcome())
                    show()
                with interruption.allowed():
                    time.sleep(_LOOK_EVERY_S)
        finally:
            for job in running:
                job.stop()
    return failures


def probe(run: PlannedRun, jobs: int) -> RunRecord:
    """The record of two steps of a run, with at most 64 held-out problems."""
    problems = min(64, run.config.eval.problems)
    changes = {"training.steps": 2, "eval.problems": problems, "checkpoint.kind": "none", "log.trackers": []}
    short = run._replace(config=change_recipe(run.config, changes))
    with TemporaryDirectory() as folder, elapsed(f"two steps of {run.name}"):
        job = _Job(short, {}, Places(Path(folder), Path(folder)), max(1, available_cores() // jobs))
        try:
            while job.works():
                time.sleep(_LOOK_EVERY_S)
        finally:
            job.stop()
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
        self._activity, self.failure = "", ""
        self._num_started = 0
        self._began = time.monotonic()
        self._commands = self._words()
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline = -1

    def __str__(self) -> str:
        return f"{self.run.arm} seed {self.run.seed} {self._activity}"

    def works(self) -> bool:
        """Start the next command if the last one has ended; False at the end, when the record is written."""
        if self._process is not None:
            if self._process.poll() is None:
                return True
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

    def stop(self) -> None:
        """Ask the child to save and wait for it."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait()
            os.close(self._lifeline)

    def share(self) -> float:
        """Of the work that is done; a measurement counts as much as the training."""
        finished = float(self._num_started - 1)
        if self._activity == "training":
            with suppress(OSError, ValueError, IndexError, KeyError):
                last = (self._folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
                finished += json.loads(last)["step"] / self.run.config.training.steps
        return finished / (1 + len(self._measurements))

    def outcome(self) -> str:
        record = read_record(self._places.record(self.run))
        values = record.curves["eval/accuracy"][1]
        taken = duration(time.monotonic() - self._began)
        return f"{self.run.arm}, seed {self.run.seed}: {values[0]:.1%} -> {values[-1]:.1%} held out, {taken}"

    def _words(self) -> Iterator[list[str]]:
        """The command lines still to be run."""
        self._num_started = 1
        if not self._is_trained():
            self._activity = "training"
            yield ["train", *self._how_to_train()]
        for name, measurement in self._measurements.items():
            self._activity = name
            self._num_started += 1
            yield [measurement.command, str(self._folder), "--out", str(self._measured(name)), *measurement.arguments]

    def _how_to_train(self) -> list[str]:
        """Resume what an interruption has left where that is possible, else start anew."""
        if (self._folder / CONFIG).is_file():
            if self.run.config.checkpoint.kind == "full":
                return ["--resume", str(self._folder)]
            clear_folder(self._folder)
        recipe = self._places.runs / f"{self.run.name}.toml"
        write_text(recipe, tomli_w.dumps(recipe_toml(self.run.config)))
        return [str(recipe), "--out", str(self._folder)]

    def _is_trained(self) -> bool:
        if not (self._folder / CONFIG).is_file():
            return False
        stored = stored_config(self._folder)
        if learning_settings(stored) != learning_settings(self.run.config) or stored.seed != self.run.seed:
            raise UserError(
                f"{self._folder}: holds a run with other settings; remove it, or name another folder with --runs-dir"
            )
        last = self.run.config.training.steps
        return (self._folder / "rollouts" / f"scores-{last:06d}.json").is_file()

    def _start(self, words: list[str]) -> None:
        theirs, self._lifeline = os.pipe()
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(theirs), *words],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=child_environment(self._threads),
                pass_fds=[theirs], start_new_session=True,
            )  # fmt: skip
        os.close(theirs)

    def _failure(self, code: int) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
        return f"{self} failed with exit code {code}: {lines[-1].removeprefix('forkrl: ')} (log: {self.log})"

    def _measured(self, name: str) -> Path:
        return self._places.runs / f"{self.run.name}.{name}"

    def _record(self) -> RunRecord:
        measured = {
            name: _read_measurement(self._measured(name), measurement.command)
            for name, measurement in self._measurements.items()
        }
        return make_record(self.run.arm, self._folder, weights_fingerprint(self.run.config.model.path), measured)


def _read_measurement(folder: Path, command: str) -> Measured:
    """Headline and figures of a finished command; of an evaluation also the mean score of every question."""
    if command != "eval":
        results = read_results(folder)
        figures = {name: value for name, value in results.facts.items() if isinstance(value, int | float)}
        return Measured(headline=results.headline, figures={name: float(value) for name, value in figures.items()})
    from forkrl.evaluation.folder import ScoredResponse, read_evaluation  # imports torch

    results, responses = read_evaluation(folder)
    scores: dict[str, list[ScoredResponse]] = {}
    for benchmark, scored in responses.items():
        for response in scored:
            scores.setdefault(f"{benchmark}/{response.question}", []).append(response)
    every = [response for scored in responses.values() for response in scored]
    return Measured(
        headline=results.headline,
        figures={
            "length": fmean(response.tokens for response in every),
            "truncated_fraction": fmean(not response.finished for response in every),
        },
        problems=digest(scores),
        scores=[fmean(response.score for response in of) for of in scores.values()],
    )
