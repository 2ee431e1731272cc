"""Progress of a command: a live panel on a terminal, plain lines in a log."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, nullcontext
from statistics import median
from types import TracebackType
from typing import NamedTuple, TextIO, TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from forkrl.config import LossConfig, SelectionConfig, TrainConfig
from forkrl.errors import lost_terminal_ignored, printable, write_line
from forkrl.methods import mask_of, objective_of
from forkrl.report.formatting import duration, low_entropy

Item = TypeVar("Item")

_BLOCKS = "▁▂▃▄▅▆▇█"
_PLAIN_EVERY_S = 5.0
_PHASE_EVERY_S = 15.0
_RECENT_STEPS = 5
_EVAL_NAMES = ("eval/accuracy", "eval/accuracy_low", "eval/accuracy_high")


def describe_selection(config: TrainConfig) -> str:
    """One sentence on what carries gradient: rule, ratio, scope, entropy source, denominator, backward, engine."""
    settings, more = config.forks_only, list[str]()
    if settings.projections:
        more.append("projections of keys and values everywhere")
    if settings.prompt:
        more.append("the prompt's tokens")
    if settings.sampled:
        more.append(f"a random {100 * settings.sampled:g}% of the others")
    backward = "; forks-only backward" + (f" with {' and '.join(more)}" if more else "")
    method = "" if config.loss.objective == "dapo" else f", objective {config.loss.objective}"
    method += "" if config.weights.rule == "none" else f", weights {config.weights.rule}"
    plain = " (plain DAPO)" if config.selection.rule == "all" and not method else ""
    sentence = f"training on {_selected_tokens(config.selection)}{plain}{method}, {_divisor(config.loss)}"
    engine = "; sampling with vLLM" if config.rollout.engine == "vllm" else ""
    return sentence + (backward if config.training.backward == "forks_only" else "") + engine


def _selected_tokens(selection: SelectionConfig) -> str:
    scope = {
        "micro_batch": "each micro-batch",
        "mini_batch": "each mini-batch",
        "rollout_batch": "each rollout batch",
        "sequence": "each response",
    }[selection.scope]
    whose = {"current": "current policy", "rollout": "rollout policy"}[selection.entropy]
    share = f"{100 * selection.ratio:g}%"
    match selection.rule:
        case "all":
            return "all response tokens"
        case "threshold":
            return f"tokens with entropy ≥ {selection.threshold} nats of the {whose}"
        case "random":
            return f"a random {share} of the tokens of {scope}"
        case "top_entropy" | "bottom_entropy":
            end = "highest" if selection.rule == "top_entropy" else "lowest"
            return f"the {share} of tokens with the {end} entropy in {scope}, entropy of the {whose}"
    tokens = f"the tokens that {selection.rule} selects"
    if mask_of(selection.rule).keeps_ratio:
        tokens = f"the {share} of tokens that {selection.rule} scores highest"
    return f"{tokens} in {scope}, signals of the {whose}"


def _divisor(loss: LossConfig) -> str:
    denominator = loss.denominator
    if objective_of(loss.objective).per_response:
        return "loss averaged by response"
    if isinstance(denominator, int):
        return f"loss divided by {denominator}"
    return f"loss over {'selected' if denominator == 'selected' else 'all response'} tokens of the mini-batch"


def sparkline(values: Iterable[float], width: int = 24) -> str:
    """The last ``width`` values as bars from minimum to maximum; NaN is a blank."""
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
    """A phase of a step; ``total``: its number of responses, or 0."""

    name: str
    total: int
    finished: Callable[[], int]
    began: float

    def __str__(self) -> str:
        return f"{self.name} {min(self.finished(), self.total)}/{self.total}" if self.total else self.name


class TrainingDisplay:
    """Shows a training run: a live panel if ``stream`` is a terminal, else one flushed line per step.

    ``header`` is printed first; ``start_step``: steps done before a resume; ``eval_every``: steps between evaluations
    in phases named "eval", 0 for one at the end, None for none; ``entropy_floor``: the first step with a lower mean
    entropy has a warning. In a log, ``phase_every_s`` seconds pass between lines on a long phase.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        eval_every: int | None = None,
        entropy_floor: float = 0.0,
        header: str = "",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        phase_every_s: float = _PHASE_EVERY_S,
    ) -> None:
        self._total, self._start, self._step = total_steps, start_step, start_step
        self._header, self._entropy_floor = printable(header), entropy_floor
        self._clock, self._phase_every_s = clock, phase_every_s
        self._step_ended = clock()
        self._durations: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._eval_every, self._eval_s, self._evaluated = eval_every, 0.0, False  # of the last; and at this step
        self._phase = _Phase("", 0, int, clock())
        self._repeat = _Repeat(phase_every_s, self._tell_phase)
        self._latest: dict[str, float] = {}
        self._accuracy: list[float] = []
        # Only for a terminal: Rich would fold log lines.
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
        """Show the phase and its finished responses; a log shows it only if it has a ``total`` and takes long."""
        self._phase = _Phase(printable(name), total, finished, self._clock())

    def message(self, text: str) -> None:
        """Print one line above the panel, with control characters made visible."""
        if self._live is None:
            write_line(self._stream, printable(text))
            return
        with lost_terminal_ignored():
            self._console.print(Text(printable(text)))

    def update(self, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a finished step, as in ``metrics.jsonl`` (including ``step``)."""
        self._count_step(int(metrics.get("step", self._step + 1)))
        self._latest = {**{name: self._latest[name] for name in _EVAL_NAMES if name in self._latest}, **metrics}
        if "reward/accuracy" in metrics:
            self._accuracy.append(metrics["reward/accuracy"])
        if self._live is None:
            write_line(self._stream, self._plain_line(metrics))
        else:
            with lost_terminal_ignored():
                self._live.refresh()
        if (entropy := metrics.get("entropy/mean", math.inf)) < self._entropy_floor:
            self.message(low_entropy(self._step, entropy, self._entropy_floor))
            self._entropy_floor = 0.0  # once

    def seconds_left(self) -> float | None:
        """Median time of the last steps times the remaining ones, and evaluations as long as the last one."""
        steps, evaluations = self._total - self._step, self._evaluations_left()
        if not self._durations or not (steps or evaluations):
            return None
        return median(self._durations) * steps + self._eval_s * evaluations

    def _evaluations_left(self) -> int:
        every = self._eval_every
        if every is None:
            return 0
        steps = range(self._step, self._total + 1)
        due = [step for step in steps if step == self._total or (every and step % every == 0)]
        return len(due) - (self._step in due and self._evaluated)

    def _count_step(self, step: int) -> None:
        now, done = self._clock(), step - self._step
        if done > 0:
            self._durations.append((now - self._step_ended) / done)
            self._evaluated = False
        if done > 0 or step == self._start:  # skip an evaluation before the first step
            self._step_ended = now
        if done <= 0 and self._phase.name == "eval":
            self._eval_s, self._evaluated = now - self._phase.began, True
            if step != self._start:
                self._step_ended += self._eval_s  # the next step does not include it
        self._step = step

    def _tell_phase(self) -> None:
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
    seconds_left: Callable[[], float | None] | None = None,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Item]:
    """Yield ``items`` and show how many are done, the time taken and the time left.

    A terminal gets a bar, a log one line every five seconds, on standard error by default. ``total``: number of items
    if ``len(items)`` is unknown. ``finished``: number of items done so far, if ``items`` come in batches.
    ``seconds_left``: if items differ in work; None if unknown.
    """
    count = total if total is not None else len(items) if isinstance(items, Sized) else None
    done = 0
    with counting(description, count, lambda: max(done, finished()), seconds_left, stream=stream, clock=clock) as show:
        for item in items:
            yield item
            done += 1
            show()


@contextmanager
def counting(
    description: str | Callable[[], str],
    total: int | None,
    finished: Callable[[], int],
    seconds_left: Callable[[], float | None] | None = None,
    *,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[], None]]:
    """Show, while the block runs, how many of ``total`` are ``finished``; yields a function that shows it at once."""
    stream = stream or sys.stderr
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    began = clock()

    def name() -> str:
        return printable(description if isinstance(description, str) else description())

    def times(number: int, now: float) -> str:
        """Time taken and left."""
        taken, left = now - began, seconds_left() if seconds_left is not None else None
        if left is None and total and number:
            left = taken * (total - number) / number
        return duration(taken) if left is None else f"{duration(taken)}  left {duration(left)}"

    texts = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[times]"))
    columns = (next(texts), BarColumn(), MofNCompleteColumn(), next(texts))
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(name(), total=total, times="")
    lines = _lines(name, total, times, stream, clock, began)

    def show() -> None:
        number = finished() if total is None else min(finished(), total)
        if console.is_terminal:
            bar.update(task, description=name(), completed=number, times=times(number, clock()))
        else:
            lines(number)

    repeat = _Repeat(0.5 if console.is_terminal else _PLAIN_EVERY_S, show)
    with bar if console.is_terminal else nullcontext():
        repeat.start()
        try:
            yield show
        finally:
            repeat.stop()


@contextmanager
def elapsed(
    description: str, *, stream: TextIO | None = None, every_s: float = _PLAIN_EVERY_S,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[None]:  # fmt: skip
    """Show the seconds that the block has taken: on a terminal a spinner, in a log one line every ``every_s``."""
    stream, description, began = stream or sys.stderr, printable(description), clock()
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    if console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            bar.add_task(description, total=None)
            yield
        return
    repeat = _Repeat(every_s, lambda: write_line(stream, f"{description}  {duration(clock() - began)}"))
    repeat.start()
    try:
        yield
    finally:
        repeat.stop()


def _lines(
    name: Callable[[], str],
    total: int | None,
    times: Callable[[int, float], str],
    stream: TextIO,
    clock: Callable[[], float],
    began: float,
) -> Callable[[int], None]:
    spoke = began
    lock = threading.Lock()

    def show(number: int) -> None:
        nonlocal spoke
        with lock:
            now = clock()
            if now - spoke < _PLAIN_EVERY_S:
                return
            spoke = now
            write_line(stream, f"{name()}  {number}{f'/{total}' if total else ''}  {times(number, now)}")

    return show
