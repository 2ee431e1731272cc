"""A stretch in which signals are put off."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest

from forkrl.interruption import Interrupted, Interruption, signals_put_off

SIGNALS = [signal.SIGINT, signal.SIGTERM]


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
