"""A stretch in which signals are put off."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest

from forkrl.store.interruption import STOP_SIGNALS, Interrupted, Interruption, signals_put_off

SIGNALS = list(STOP_SIGNALS)


def test_an_interruption_says_how_the_run_ended() -> None:
    stop = Interrupted(signal.SIGTERM)
    assert (str(stop), stop.exit_code, stop.outcome) == ("stopped by SIGTERM", 143, "and saved")


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_is_obeyed_at_the_end_of_the_stretch(signum: signal.Signals) -> None:
    reached = False
    with Interruption() as interruption, pytest.raises(Interrupted, match=signum.name):  # noqa: PT012
        with interruption.allowed(), signals_put_off():
            signal.raise_signal(signum)
            reached = not interruption.signalled
        pytest.fail("it went on")
    assert reached


def test_ctrl_c_of_a_command_without_an_interruption_is_put_off_too() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), signals_put_off():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached


def test_an_error_in_the_stretch_loses_no_signal() -> None:
    with Interruption() as interruption:
        with pytest.raises(ZeroDivisionError), signals_put_off():  # noqa: PT012
            signal.raise_signal(signal.SIGINT)
            raise ZeroDivisionError
        assert interruption.signalled


def test_handlers_are_as_before() -> None:
    with Interruption():
        before = [signal.getsignal(signum) for signum in SIGNALS]
        with signals_put_off():
            assert not set(before) & {signal.getsignal(signum) for signum in SIGNALS}
        assert [signal.getsignal(signum) for signum in SIGNALS] == before


def test_where_python_handles_no_signals_nothing_is_done() -> None:
    found: list[Any] = []

    def look() -> None:
        with signals_put_off():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]


def test_a_lost_terminal_stops_a_run_as_sigterm_does() -> None:
    with Interruption() as interruption, pytest.raises(Interrupted, match="stopped by SIGHUP") as stop:  # noqa: PT012
        signal.raise_signal(signal.SIGHUP)
        assert interruption.signalled
        interruption.check()
    assert stop.value.exit_code == 129


def test_under_nohup_a_run_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGHUP)
            assert not interruption.signalled
    finally:
        signal.signal(signal.SIGHUP, before)
