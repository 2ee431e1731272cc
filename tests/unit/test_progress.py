"""What is shown while training, on a terminal and in a log file."""

from __future__ import annotations

import errno
import io
import itertools
import math
import operator
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from forkrl.config import LossConfig, SelectionConfig, TrainConfig
from forkrl.errors import printable
from forkrl.report import remaining
from forkrl.report.formatting import duration
from forkrl.report.progress import TrainingDisplay, describe_selection, elapsed, progress, sparkline
from forkrl.report.remaining import MEASURING, SAMPLING, STEP_TOKENS, PartWork, SamplingTime
from forkrl.types import Counts


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")


def ticking(seconds: float) -> Callable[[], float]:
    """A clock that advances so much at every reading."""
    now = 0.0

    def read() -> float:
        nonlocal now
        now += seconds
        return now

    return read


STEP = {
    "step": 3,
    "reward/accuracy": 0.25,
    "entropy/mean": 0.1234,
    "selection/kept_fraction": 0.2,
    "rollout/tokens_per_s": 12345.6,
    "loss/policy": -0.01,
}
EVAL = {"eval/accuracy": 0.4, "eval/accuracy_low": 0.36, "eval/accuracy_high": 0.44}


def test_a_log_file_gets_one_plain_line_per_step() -> None:
    stream = io.StringIO()
    with TrainingDisplay(10, stream=stream, header="what it does") as display:
        display.phase("rollout")
        display.update({"step": 0, **EVAL})
        display.update({**STEP, **EVAL, "verifier/failures": 2.0})
    header, before, line = stream.getvalue().splitlines()
    assert header == "what it does"
    assert before == "step 0/10  held-out 0.400 [0.360, 0.440]"
    assert line.startswith(
        "step 3/10  accuracy 0.250  entropy 0.123  kept 0.200  tokens/s 12,346  unverified 2  "
        "held-out 0.400 [0.360, 0.440]  left "
    )
    assert "\x1b" not in stream.getvalue()


def test_the_first_step_below_the_entropy_floor_has_a_warning_and_no_other() -> None:
    stream = io.StringIO()
    with TrainingDisplay(10, stream=stream, entropy_floor=0.12) as display:
        for step, entropy in ((1, 0.13), (2, math.nan), (3, 0.1199), (4, 0.13), (5, 0.01)):
            display.update({**STEP, "step": step, "entropy/mean": entropy})
        display.update({"step": 5, **EVAL})
    lines = stream.getvalue().splitlines()
    assert [line.split()[1].partition("/")[0] for line in lines if line.startswith("step ")] == [*"12345", "5"]
    assert lines[3].startswith("mean entropy fell below log.entropy_floor = 0.12 nats at step 3, to 0.12: ")
    assert len(lines) == 7


def test_long_lines_are_not_folded_in_a_log_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.StringIO()
    with TrainingDisplay(10, stream=stream) as display:
        display.message("x" * 300)
        display.update({**STEP, **EVAL})
    assert len(stream.getvalue().splitlines()) == 2


def test_a_terminal_gets_the_panel_with_figures_phase_and_time_left() -> None:
    stream = Terminal()
    with TrainingDisplay(10, stream=stream, header="what it does") as display:
        display.update({**STEP, **EVAL})
        display.phase("update")
        display.update({**STEP, "step": 4})
    shown = stream.getvalue()
    for words in ("what it does", "step 4/10", "accuracy 0.250", "kept 0.200", "held-out 0.400", "update", " left"):
        assert words in shown


def test_a_stream_without_unicode_gets_escapes_instead_of_ending_the_run() -> None:
    raw = io.BytesIO()
    with TrainingDisplay(1, stream=io.TextIOWrapper(raw, encoding="ascii")) as display:
        display.message("entropy ≥ 0.672")
        assert raw.getvalue() == b"entropy \\u2265 0.672\n"


def test_the_terminal_is_restored_when_a_step_raises() -> None:
    stream = Terminal()
    with pytest.raises(RuntimeError), TrainingDisplay(10, stream=stream):
        raise RuntimeError
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert stream.getvalue().rindex(shown) > stream.getvalue().rindex(hidden)


def test_time_left_counts_only_the_steps_of_this_process() -> None:
    now = [100.0]
    display = TrainingDisplay(50, start_step=40, stream=io.StringIO(), clock=lambda: now[0])
    with display:
        assert display.seconds_left() is None
        now[0] += 20.0
        display.update({"step": 42})
        assert display.seconds_left() == pytest.approx(80.0)
        display.update({"step": 50})
        assert display.seconds_left() is None


def test_time_left_is_the_median_of_recent_steps() -> None:
    """Neither a slow start, nor an evaluation before the first step, nor a rare one later shifts it."""
    now = [0.0]
    display = TrainingDisplay(100, stream=io.StringIO(), clock=lambda: now[0])
    with display:
        now[0] += 1000.0
        display.update({"step": 0, **EVAL})
        for step, seconds in enumerate((60.0, 2.0, 2.0, 2.0, 2.0), start=1):
            now[0] += seconds
            display.update({"step": step})
        now[0] += 500.0
        display.update({"step": 5, **EVAL})
        assert display.seconds_left() == pytest.approx(2.0 * 95)
        for step in range(6, 16):
            now[0] += 4.0
            display.update({"step": step})
        assert display.seconds_left() == pytest.approx(4.0 * 85)


def test_a_terminal_shows_how_many_responses_of_a_phase_are_finished() -> None:
    stream, finished = Terminal(), [0]
    with TrainingDisplay(10, stream=stream) as display:
        display.phase("rollout", 512, lambda: finished[0])
        for finished[0] in (17, 490):
            display.update(STEP)
    assert "rollout 17/512" in stream.getvalue()
    assert "rollout 490/512" in stream.getvalue()


def test_a_log_tells_of_a_long_phase_only() -> None:
    stream = io.StringIO()
    with TrainingDisplay(10, start_step=4, stream=stream, phase_every_s=0.02) as display:
        display.phase("update")
        time.sleep(0.1)
        assert not stream.getvalue()
        display.phase("rollout", 512, lambda: 33)
        while not stream.getvalue():
            time.sleep(0.01)
    assert set(stream.getvalue().splitlines()) == {"step 5/10  rollout 33/512"}


def test_a_closed_terminal_does_not_end_a_step_before_it_is_saved() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    with TrainingDisplay(10, stream=Closed()) as display:
        display.message("nobody reads this")
        display.update(STEP)

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with TrainingDisplay(10, stream=Full()) as display, pytest.raises(OSError, match="No space left"):
        display.message("somebody wants to read this")


@pytest.mark.parametrize("stream_type", [io.StringIO, Terminal])
def test_hostile_text_reaches_no_terminal_as_a_command(stream_type: type[io.StringIO]) -> None:
    stream = stream_type()
    with TrainingDisplay(1, stream=stream) as display:
        display.message("\x1b]0;owned\x07 [red]x[/red] \u202egpj.exe\nstep 1/1  accuracy 1.000 \ud800")
    shown = stream.getvalue()
    assert "\x1b]0;" not in shown
    assert "\u202e" not in shown
    assert "\\x1b]0;owned\\x07 [red]x[/red] \\u202egpj.exe\\x0astep 1/1" in shown


def test_printable_keeps_ordinary_text_of_any_script() -> None:
    assert printable("π ≥ 0.672, 你好, 🙂 naïve") == "π ≥ 0.672, 你好, 🙂 naïve"
    assert printable("a\u2028b\u200bc\x9bd\U000e0041") == "a\\u2028b\\u200bc\\x9bd\\U000e0041"


@pytest.mark.parametrize(
    ("selection", "denominator", "words"),
    [
        (SelectionConfig(), "selected", ["20% of tokens with the highest", "each micro-batch", "current", "selected"]),
        (SelectionConfig(rule="bottom_entropy", ratio=0.8), "selected", ["80% of tokens with the lowest"]),
        (SelectionConfig(scope="mini_batch"), "selected", ["in each mini-batch"]),
        (SelectionConfig(scope="sequence", entropy="rollout"), "response", ["in each response", "rollout policy"]),
        (SelectionConfig(rule="random", ratio=0.07), "response", ["random 7%", "loss over all response tokens"]),
        (SelectionConfig(rule="threshold", threshold=0.672), "selected", ["≥ 0.672 nats of the current policy"]),
        (SelectionConfig(rule="all"), "response", ["all response tokens (plain DAPO)", "loss over all response"]),
        (SelectionConfig(), 8192, ["each micro-batch", "current policy, loss divided by 8192"]),
    ],
)
def test_the_header_says_what_the_run_really_does(
    selection: SelectionConfig, denominator: str | int, words: list[str]
) -> None:
    loss = LossConfig.model_validate({"denominator": denominator})
    sentence = describe_selection(TrainConfig(selection=selection, loss=loss))
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("forks_only", "end"),
    [
        ({}, "of the mini-batch; forks-only backward"),
        ({"projections": True}, "; forks-only backward with projections of keys and values everywhere"),
        (
            {"prompt": True, "sampled": 0.1},
            "; forks-only backward with the prompt's tokens and a random 10% of the others",
        ),
    ],
)
def test_the_sentence_says_what_runs_with_gradients(forks_only: dict[str, Any], end: str) -> None:
    config = TrainConfig.model_validate({"training": {"backward": "forks_only"}, "forks_only": forks_only})
    assert describe_selection(config).endswith(end)


def test_the_sentence_names_vllm() -> None:
    assert "vLLM" not in describe_selection(TrainConfig())
    config = TrainConfig.model_validate({"rollout": {"engine": "vllm"}})
    assert describe_selection(config) == f"{describe_selection(TrainConfig())}; sampling with vLLM"


def test_progress_in_a_log_speaks_every_five_seconds_and_passes_everything_through() -> None:
    stream = io.StringIO()
    seen = list(progress(range(6), "evaluating", stream=stream, clock=ticking(3.0)))
    assert seen == list(range(6))
    assert stream.getvalue().splitlines() == [
        "evaluating  2/6  6 s  left 12 s",
        "evaluating  4/6  12 s  left 6 s",
        "evaluating  6/6  18 s  left 0 s",
    ]


def test_short_work_prints_nothing_and_unknown_totals_are_counted() -> None:
    stream = io.StringIO()
    list(progress(range(100), "evaluating", stream=stream, clock=ticking(0.01)))
    assert stream.getvalue() == ""
    list(progress(iter("ab"), "reading", stream=stream, clock=ticking(6.0)))
    assert stream.getvalue().splitlines() == ["reading  1  6 s", "reading  2  12 s"]


def test_a_time_left_that_is_known_goes_before_the_share_of_items() -> None:
    stream, left = io.StringIO(), iter([None, 100.0])
    list(progress(range(4), "evaluating", seconds_left=lambda: next(left), stream=stream, clock=ticking(3.0)))
    assert stream.getvalue().splitlines() == [
        "evaluating  2/4  6 s  left 6 s",
        "evaluating  4/4  12 s  left 1 min 40 s",
    ]


def test_progress_counts_what_is_finished_inside_a_batch() -> None:
    stream = Terminal()

    def batches() -> Iterator[int]:
        deadline = time.monotonic() + 30
        while "7/9" not in stream.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield from range(9)

    assert len(list(progress(batches(), "working", total=9, finished=lambda: 7, stream=stream))) == 9


@dataclass
class FakeWorkers:
    counts: Counts
    count: int = 1

    @property
    def sequences_finished(self) -> int:
        return round(self.counts.finished * self.count)

    def add(self, **more: float) -> None:
        self.counts = Counts(*map(operator.add, self.counts, Counts(**more)))


def sampling_left(done: Counts, total: int = 32, wave: int = 32, count: int = 1) -> float | None:
    """After earlier work, which must not matter."""
    workers: Any = FakeWorkers(Counts(finished=7, begun=7, steps=90, tokens=500, working_ns=5e9), count)
    left = SamplingTime(workers, total, wave)
    workers.add(**done._asdict())
    assert left.finished() == done.finished * count
    return left()


HALF = Counts(begun=32, steps=50, tokens=1600, room=1600, reading_ns=1e9, working_ns=1e6 * (50 * STEP_TOKENS + 1600))
"""Half of a wave of at most 100 tokens; a token takes a millisecond, and none has ended."""


def test_the_time_left_is_unknown_while_the_first_prompts_are_read() -> None:
    assert sampling_left(Counts()) is None
    assert sampling_left(Counts(begun=32, steps=1, tokens=32, room=3000, reading_ns=1e9)) is None
    assert sampling_left(Counts(begun=32, finished=32, steps=50, tokens=900, working_ns=1e9)) == 0
    assert sampling_left(Counts(finished=16)) is None  # an engine that does not count the rest


def test_the_last_sequences_of_a_wave_take_almost_as_long_a_step_as_many() -> None:
    last = HALF._replace(finished=31, room=10)
    assert 10 * STEP_TOKENS <= 1e3 * (sampling_left(last) or 0) <= 10 * STEP_TOKENS + 10


def test_responses_that_go_on_are_not_taken_for_as_short_as_the_first_to_finish() -> None:
    left, some_ended = sampling_left(HALF), sampling_left(HALF._replace(finished=16, room=800))
    assert left is not None and some_ended is not None
    assert 50 * STEP_TOKENS + 1200 < 1e3 * left < 50 * STEP_TOKENS + 1600
    assert 50 * STEP_TOKENS < 1e3 * some_ended < 1e3 * left - 600


def test_a_wave_to_come_is_read_and_takes_as_long_as_the_first() -> None:
    left = sampling_left(HALF)
    assert left is not None
    first = 1e-9 * (HALF.reading_ns + HALF.working_ns) + left
    assert sampling_left(HALF, total=64) == pytest.approx(left + first)
    assert sampling_left(HALF, total=64, wave=64, count=2) == pytest.approx(left)


@pytest.mark.parametrize("step_tokens", [30, 50])
@pytest.mark.parametrize(("mean", "limit"), [(80, 448), (200, 256)])
def test_the_time_left_of_simulated_waves_is_right_within_half(step_tokens: int, mean: float, limit: int) -> None:
    """Response lengths are quantiles of an exponential distribution, cut at the limit."""
    lengths = [min(int(1 - mean * math.log(1 - (n + 0.5) / 64)), limit) for n in range(64)]
    going = [[length - step for length in lengths if length > step] for step in range(max(lengths))]
    seconds = list(itertools.accumulate(step_tokens + len(each) for each in going))
    for share in (0.2, 0.5, 0.8, 0.9):
        steps = next(number for number, then in enumerate(seconds, start=1) if then >= share * seconds[-1])
        tokens, after = sum(map(len, going[:steps])), going[steps] if steps < len(going) else []
        room = len(after) * (limit - steps)
        counts = Counts(64 - len(after), 64, steps, tokens, room, working_ns=1e9 * seconds[steps - 1])
        left = sampling_left(counts, total=64, wave=64)
        assert left is not None
        assert 1 / 1.5 < left / (seconds[-1] - seconds[steps - 1]) < 1.5, share


def test_a_part_is_timed_by_its_stages_and_those_to_come_by_the_finished_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(remaining, "time", SimpleNamespace(monotonic=lambda: now[0]))
    workers: Any = FakeWorkers(Counts(finished=3))
    work = PartWork(workers, 16, {SAMPLING: 1.0, MEASURING: 0.5})

    def shown(at: float) -> tuple[str, int, float | None]:
        now[0] = at
        return work.stage, work.finished(), work.seconds_left()

    assert shown(0) == (SAMPLING, 0, None)
    with work.part(8):
        with work.sampling(SAMPLING, 16, wave=16):  # two sequences to a response
            workers.add(begun=16, finished=7)
            assert shown(4) == (SAMPLING, 3, None)
            workers.add(finished=9)
            assert shown(10) == (SAMPLING, 8, 5 + 15)
        with work.measuring(tokens=100):
            assert shown(11) == (MEASURING, 0, 4 + 15)
            workers.add(finished=4, tokens=50, working_ns=3e9)
            assert shown(13) == (MEASURING, 4, 3 + 16)
            workers.add(finished=4, tokens=50, working_ns=3e9)
            now[0] = 18
    assert shown(18) == (MEASURING, 8, 18)
    with work.part(8):
        with work.sampling(SAMPLING, 8, wave=16):
            assert shown(19) == (SAMPLING, 8, 17)
            workers.add(begun=8, finished=8)
            assert shown(28)[2] == pytest.approx(8)  # as measuring took 8 of 18 s before
        with work.measuring(tokens=100):
            workers.add(finished=8, tokens=100, working_ns=6e9)
            assert shown(34) == (MEASURING, 16, 0)
    assert shown(34) == (MEASURING, 16, 0)


def test_progress_on_a_terminal_draws_a_bar() -> None:
    stream = Terminal()
    assert list(progress([1, 2, 3], "evaluating", stream=stream)) == [1, 2, 3]
    assert "evaluating" in stream.getvalue()


def test_sparkline_and_duration() -> None:
    assert sparkline([0.0, 0.5, 1.0, float("nan")]) == "▁▅█ "
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([float("nan")]) == " "
    assert len(sparkline(range(100), width=10)) == 10
    assert [duration(s) for s in (-1, 59.4, 185, 7620)] == ["0 s", "59 s", "3 min 05 s", "2 h 07 min"]


def test_the_seconds_of_a_long_phase_are_shown_in_a_log_and_on_a_terminal() -> None:
    log, shown = io.StringIO(), threading.Event()

    def clock() -> float:
        if now[0]:
            shown.set()
        return now[0]

    now = [0.0]
    with elapsed("reading \x1b", stream=log, every_s=0.001, clock=clock):
        now[0] = 7.0
        assert shown.wait(60)
    assert log.getvalue().splitlines()[-1] == "reading \\x1b  7 s"
    terminal = Terminal()
    with elapsed("reading", stream=terminal):
        pass
    assert "reading" in terminal.getvalue() and "0:00:00" in terminal.getvalue()
    quick = io.StringIO()
    with elapsed("reading", stream=quick):
        pass
    assert quick.getvalue() == ""


def test_time_left_includes_the_evaluations_to_come() -> None:
    """Each as long as the last; they are no part of a step, and the last one follows the last step."""
    now = [0.0]
    display = TrainingDisplay(6, eval_every=2, stream=io.StringIO(), clock=lambda: now[0])

    def evaluate(step: int, seconds: float) -> None:
        display.phase("eval", 100)
        now[0] += seconds
        display.update({"step": step, **EVAL})

    def train(step: int) -> None:
        display.phase("rollout", 100)
        now[0] += 10.0
        display.update({"step": step})

    with display:
        evaluate(0, 30.0)
        train(1)
        assert display.seconds_left() == pytest.approx(5 * 10 + 3 * 30)
        train(2)
        assert display.seconds_left() == pytest.approx(4 * 10 + 3 * 30)
        evaluate(2, 40.0)
        assert display.seconds_left() == pytest.approx(4 * 10 + 2 * 40)
        for step in (3, 4):
            train(step)
        evaluate(4, 40.0)
        for step in (5, 6):
            train(step)
        assert display.seconds_left() == pytest.approx(40.0)
        evaluate(6, 40.0)
        assert display.seconds_left() is None


def test_a_step_does_not_include_the_evaluation_before_it() -> None:
    now = [0.0]
    display = TrainingDisplay(5, eval_every=1, stream=io.StringIO(), clock=lambda: now[0])
    with display:
        for step in range(4):
            display.phase("rollout", 100)
            now[0] += 10.0 if step else 0.0
            display.update({"step": step})
            display.phase("eval", 100)
            now[0] += 30.0
            display.update({"step": step, **EVAL})
        assert display.seconds_left() == pytest.approx(2 * (10 + 30))


def test_without_regular_evaluations_the_one_at_the_end_is_left() -> None:
    now = [0.0]
    display = TrainingDisplay(100, eval_every=0, stream=io.StringIO(), clock=lambda: now[0])
    with display:
        display.phase("eval", 100)
        now[0] += 300.0
        display.update({"step": 0, **EVAL})
        display.phase("update")
        now[0] += 1.0
        display.update({"step": 1})
        assert display.seconds_left() == pytest.approx(99 + 300)
