"""What a person sees while a command works: a live panel on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from types import TracebackType
from typing import TextIO, TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from forkrl.config import TrainConfig

Item = TypeVar("Item")

_BLOCKS = "▁▂▃▄▅▆▇█"
_PLAIN_EVERY_S = 5.0
# Control, format (zero-width and bidirectional marks among them), surrogate, and line or paragraph separator.
_UNSAFE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_EVAL_NAMES = ("eval/accuracy", "eval/accuracy_low", "eval/accuracy_high")


def printable(text: str) -> str:
    """Text that a terminal shows and never obeys: an escape character appears as ``\\x1b``.

    Model output may hold sequences that recolour, retitle or overwrite a terminal, and marks that reorder a line.
    Newline and tab are escaped too, so that a response can forge no line of the log.
    """
    return "".join(_escaped(char) if unicodedata.category(char) in _UNSAFE_CATEGORIES else char for char in text)


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


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


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class TrainingDisplay:
    """Shows a training run: a live panel when ``stream`` is a terminal, else one flushed line per step.

    Args:
        total_steps: steps of the whole run.
        start_step: steps done before, for a resumed run; time left is reckoned from this process's own steps.
        header: what the run really does, from ``describe_selection``; printed first.
        stream: standard output by default.
        clock: monotonic seconds; for tests.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        header: str = "",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._start, self._step = total_steps, start_step, start_step
        self._header, self._phase = printable(header), ""
        self._clock, self._began = clock, clock()
        self._latest: dict[str, float] = {}
        self._accuracy: list[float] = []
        # Rich asks the terminal for its width; a file has none, and a log line must not be folded.
        self._stream = stream or sys.stdout
        self._console = Console(file=self._stream, highlight=False, markup=False, emoji=False)
        self._live: Live | None = None

    def __enter__(self) -> TrainingDisplay:
        self._began = self._clock()
        if self._header:
            self.message(self._header)
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._panel, console=self._console, refresh_per_second=4, redirect_stderr=False
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._phase = ""
            self._live.stop()
            self._live = None

    def phase(self, name: str) -> None:
        """Say what the run is doing: rollout, reward, update, eval or save. Shown on terminals only."""
        self._phase = printable(name)

    def message(self, text: str) -> None:
        """Print one line above the panel. Control characters are made visible."""
        if self._live is not None:
            self._console.print(Text(printable(text)))
        else:
            _write_line(self._stream, printable(text))

    def update(self, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a finished step, as they go to ``metrics.jsonl`` (``step`` among them)."""
        self._step = int(metrics.get("step", self._step + 1))
        self._latest = {**{name: self._latest[name] for name in _EVAL_NAMES if name in self._latest}, **metrics}
        if "reward/accuracy" in metrics:
            self._accuracy.append(metrics["reward/accuracy"])
        if self._live is None:
            _write_line(self._stream, self._plain_line(metrics))
        else:
            self._live.refresh()

    def seconds_left(self) -> float | None:
        """Mean seconds of this process's steps, evaluations and saves included, times the steps to come."""
        done = self._step - self._start
        if done <= 0 or self._step >= self._total:
            return None
        return (self._clock() - self._began) / done * (self._total - self._step)

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
        status = self._phase + (f"   about {duration(left)} left" if left is not None else "")
        return Panel(Group(table, Text("   ".join(_figures(self._latest))), Text(status)), title="forkrl", expand=False)


def _write_line(stream: TextIO, text: str) -> None:
    """Print a line at once; what the stream's encoding lacks is escaped, so that a C locale cannot end a run."""
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


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


def notice(text: str) -> None:
    """Print something the user should know, on standard error. Control characters are made visible."""
    first, *others = (printable(line) for line in text.splitlines())
    _write_line(sys.stderr, "\n".join([f"forkrl: {first}", *others]))


def progress(
    items: Iterable[Item],
    description: str,
    *,
    total: int | None = None,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Item]:
    """Pass ``items`` through and show how far along they are, with the time left.

    A terminal gets a bar. Elsewhere a flushed line follows every five seconds, so short work prints nothing.

    Args:
        items: what is worked through.
        description: a few words, such as "evaluating".
        total: their number, where ``len(items)`` cannot tell.
        stream: standard error by default, so that results on standard output stay clean.
        clock: monotonic seconds; for tests.
    """
    stream = stream or sys.stderr
    count = total if total is not None else len(items) if isinstance(items, Sized) else None
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    description = printable(description)
    if console.is_terminal:
        yield from _bar(items, description, count, console)
    else:
        yield from _plain_progress(items, description, count, stream, clock)


def _bar(items: Iterable[Item], description: str, count: int | None, console: Console) -> Iterator[Item]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield from bar.track(items, total=count, description=description)


def _plain_progress(
    items: Iterable[Item], description: str, count: int | None, stream: TextIO, clock: Callable[[], float]
) -> Iterator[Item]:
    began = spoke = clock()
    for done, item in enumerate(items, start=1):
        yield item
        now = clock()
        if now - spoke < _PLAIN_EVERY_S:
            continue
        spoke = now
        of_all = f"{done}/{count}  left {duration((now - began) / done * (count - done))}" if count else f"{done}"
        _write_line(stream, f"{description}  {of_all}")
