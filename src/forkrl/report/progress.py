"""What a person sees while a command works: a live panel on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from statistics import median
from types import TracebackType
from typing import NamedTuple, TextIO, TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from forkrl.config import TrainConfig
from forkrl.errors import lost_terminal_ignored, printable, write_line
from forkrl.report.formatting import duration

Item = TypeVar("Item")

_BLOCKS = "▁▂▃▄▅▆▇█"
_PLAIN_EVERY_S = 5.0
_PHASE_EVERY_S = 15.0
_RECENT_STEPS = 5
_EVAL_NAMES = ("eval/accuracy", "eval/accuracy_low", "eval/accuracy_high")


def describe_selection(config: TrainConfig) -> str:
    """One sentence on what carries gradient in this run: rule, ratio, scope, whose entropy, denominator, backward."""
    if config.training.backward == "dense":
        return _selection(config)
    more, settings = [], config.forks_only
    if settings.projections:
        more.append("projections of keys and values everywhere")
    if settings.prompt:
        more.append("the prompt's tokens")
    if settings.sampled:
        more.append(f"a random {100 * settings.sampled:g}% of the others")
    return f"{_selection(config)}; forks-only backward" + (f" with {' and '.join(more)}" if more else "")


def _selection(config: TrainConfig) -> str:
    selection, denominator = config.selection, config.loss.denominator
    if isinstance(denominator, int):
        mean = f"loss divided by {denominator}"
    else:
        divisor = "selected tokens" if denominator == "selected" else "all response tokens"
        mean = f"loss over {divisor} of the mini-batch"
    if selection.rule == "all":
        return f"training on all response tokens (plain DAPO), {mean}"
    whose = {"current": "current policy", "rollout": "rollout policy"}[selection.entropy]
    if selection.rule == "threshold":
        return f"training on tokens with entropy ≥ {selection.threshold} nats of the {whose}, {mean}"
    scope = {
        "micro_batch": "each micro-batch",
        "mini_batch": "each mini-batch",
        "rollout_batch": "each rollout batch",
        "sequence": "each response",
    }
    share = f"{100 * selection.ratio:g}%"
    if selection.rule == "random":
        return f"training on a random {share} of the tokens of {scope[selection.scope]}, {mean}"
    end = "highest" if selection.rule == "top_entropy" else "lowest"
    return (
        f"training on the {share} of tokens with the {end} entropy in {scope[selection.scope]}, "
        f"entropy of the {whose}, {mean}"
    )


def sparkline(values: Iterable[float], width: int = 24) -> str:
    """The last ``width`` values as bars between their own minimum and maximum; NaN is a blank."""
    recent = list(values)[-width:]
    finite = [value for value in recent if abs(value) < float("inf")]
    if not finite:
        return " " * len(recent)
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    return "".join(
        _BLOCKS[round((value - low) / span * (len(_BLOCKS) - 1))] if abs(value) < float("inf") else " "
        for value in recent
    )


class _Repeat(threading.Thread):
    """Calls a function at a fixed interval until ``stop``."""

    def __init__(self, every_s: float, call: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._every_s, self._call, self._ended = every_s, call, threading.Event()

    def run(self) -> None:
        while not self._ended.wait(self._every_s):
            self._call()

    def stop(self) -> None:
        self._ended.set()
        self.join()


class _Phase(NamedTuple):
    """A part of a step; ``finished`` of ``total`` responses, where it has any."""

    name: str
    total: int
    finished: Callable[[], int]
    began: float

    def __str__(self) -> str:
        return f"{self.name} {min(self.finished(), self.total)}/{self.total}" if self.total else self.name


class TrainingDisplay:
    """Shows a training run: a live panel when ``stream`` is a terminal, else one flushed line per step.

    Args:
        total_steps: steps of the whole run.
        start_step: steps done before, for a resumed run.
        header: what the run really does, from ``describe_selection``; printed first.
        stream: standard output by default.
        clock: monotonic seconds; for tests.
        phase_every_s: seconds between lines on a phase that takes longer, where there is no terminal.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        header: str = "",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        phase_every_s: float = _PHASE_EVERY_S,
    ) -> None:
        self._total, self._start, self._step = total_steps, start_step, start_step
        self._header = printable(header)
        self._clock, self._phase_every_s = clock, phase_every_s
        self._step_ended = clock()
        self._durations: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._phase = _Phase("", 0, int, clock())
        self._repeat = _Repeat(phase_every_s, self._tell_phase)
        self._latest: dict[str, float] = {}
        self._accuracy: list[float] = []
        # Rich asks the terminal for its width; a file has none, and a log line must not be folded.
        self._stream = stream or sys.stdout
        self._console = Console(file=self._stream, highlight=False, markup=False, emoji=False)
        self._live: Live | None = None

    def __enter__(self) -> TrainingDisplay:
        self._step_ended = self._clock()
        if self._header:
            self.message(self._header)
        if not self._console.is_terminal:
            self._repeat.start()
        else:
            self._live = Live(
                get_renderable=self._panel, console=self._console, refresh_per_second=4, redirect_stderr=False
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is None:
            self._repeat.stop()
            return
        self.phase("")
        with lost_terminal_ignored():
            self._live.stop()
        self._live = None

    def phase(self, name: str, total: int = 0, finished: Callable[[], int] = int) -> None:
        """Show the current phase (rollout, reward, update, eval or save) and how many of its responses are finished.

        A terminal shows it at once, a log only if it has a ``total`` and takes long.
        """
        self._phase = _Phase(printable(name), total, finished, self._clock())

    def message(self, text: str) -> None:
        """Print one line above the panel. Control characters are made visible."""
        if self._live is None:
            write_line(self._stream, printable(text))
            return
        with lost_terminal_ignored():
            self._console.print(Text(printable(text)))

    def update(self, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a finished step, as they go to ``metrics.jsonl`` (``step`` among them)."""
        self._count_step(int(metrics.get("step", self._step + 1)))
        self._latest = {**{name: self._latest[name] for name in _EVAL_NAMES if name in self._latest}, **metrics}
        if "reward/accuracy" in metrics:
            self._accuracy.append(metrics["reward/accuracy"])
        if self._live is None:
            write_line(self._stream, self._plain_line(metrics))
        else:
            with lost_terminal_ignored():
                self._live.refresh()

    def seconds_left(self) -> float | None:
        """The median time of this process's last few steps, times the steps to come.

        The time between the ends of two steps counts, so an evaluation after every step is included, a rare one not.
        """
        if not self._durations or self._step >= self._total:
            return None
        return median(self._durations) * (self._total - self._step)

    def _count_step(self, step: int) -> None:
        now, done = self._clock(), step - self._step
        if done > 0:
            self._durations.append((now - self._step_ended) / done)
        if done > 0 or step == self._start:  # an evaluation before the first step is no part of it
            self._step_ended = now
        self._step = step

    def _tell_phase(self) -> None:
        """In a log: how far a phase is that has been going on for a while."""
        phase = self._phase
        if phase.total and self._clock() - phase.began >= self._phase_every_s:
            write_line(self._stream, f"step {self._step + 1}/{self._total}  {phase}")

    def _plain_line(self, metrics: Mapping[str, float]) -> str:
        parts = [f"step {self._step}/{self._total}", *_figures(metrics)]
        left = self.seconds_left()
        if left is not None:
            parts.append(f"left {duration(left)}")
        return "  ".join(parts)

    def _panel(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        table.add_row(
            ProgressBar(total=self._total, completed=self._step, width=40), f"step {self._step}/{self._total}"
        )
        if self._accuracy:
            table.add_row(sparkline(self._accuracy, width=40), "accuracy of training responses")
        left = self.seconds_left()
        status = str(self._phase) + (f"   about {duration(left)} left" if left is not None else "")
        return Panel(Group(table, Text("   ".join(_figures(self._latest))), Text(status)), title="forkrl", expand=False)


def _figures(metrics: Mapping[str, float]) -> list[str]:
    """The handful of metrics worth a line, in words; absent ones are left out."""
    formats = {
        "reward/accuracy": ("accuracy", "{:.3f}"),
        "entropy/mean": ("entropy", "{:.3f}"),
        "selection/kept_fraction": ("kept", "{:.3f}"),
        "response/length": ("length", "{:.1f}"),
        "rollout/tokens_per_s": ("tokens/s", "{:,.0f}"),
        "time/step_s": ("seconds", "{:.1f}"),
    }
    figures = [f"{word} {form.format(metrics[name])}" for name, (word, form) in formats.items() if name in metrics]
    if metrics.get("verifier/failures"):
        figures.append(f"unverified {metrics['verifier/failures']:.0f}")
    if all(name in metrics for name in _EVAL_NAMES):
        mean, low, high = (metrics[name] for name in _EVAL_NAMES)
        figures.append(f"held-out {mean:.3f} [{low:.3f}, {high:.3f}]")
    return figures


def progress(
    items: Iterable[Item],
    description: str,
    *,
    total: int | None = None,
    finished: Callable[[], int] = int,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Item]:
    """Pass ``items`` through and show how many are done, with the time left.

    A terminal gets a bar. Elsewhere a flushed line follows every five seconds, so short work prints nothing.

    Args:
        items: the work.
        description: a few words, such as "evaluating".
        total: number of items, where ``len(items)`` is unknown.
        finished: number of items done before they come out of ``items`` in batches.
        stream: standard error by default, so that results on standard output stay clean.
        clock: monotonic seconds; for tests.
    """
    stream = stream or sys.stderr
    count = total if total is not None else len(items) if isinstance(items, Sized) else None
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    done, description = 0, printable(description)

    def number() -> int:
        return max(done, finished()) if count is None else min(max(done, finished()), count)

    show = _Bar(description, count, console) if console.is_terminal else _Lines(description, count, stream, clock)
    repeat = _Repeat(show.every_s, lambda: show(number()))
    with show:
        repeat.start()
        try:
            for item in items:
                yield item
                done += 1
                show(number())
        finally:
            repeat.stop()


class _Bar:
    """Progress on a terminal."""

    every_s = 0.5

    def __init__(self, description: str, count: int | None, console: Console) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True)
        self._task = self._progress.add_task(description, total=count)

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, number: int) -> None:
        self._progress.update(self._task, completed=number)


class _Lines:
    """Progress in a log."""

    every_s = _PLAIN_EVERY_S

    def __init__(self, description: str, count: int | None, stream: TextIO, clock: Callable[[], float]) -> None:
        self._description, self._count, self._stream, self._clock = description, count, stream, clock
        self._began = self._spoke = clock()
        self._lock = threading.Lock()

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...

    def __call__(self, number: int) -> None:
        with self._lock:
            now = self._clock()
            if not number or now - self._spoke < _PLAIN_EVERY_S:
                return
            self._spoke = now
            text = f"{number}"
            if self._count:
                text += f"/{self._count}  left {duration((now - self._began) / number * (self._count - number))}"
            write_line(self._stream, f"{self._description}  {text}")
