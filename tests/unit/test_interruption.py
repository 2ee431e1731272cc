"""Which signals stop a run, and how it says so."""

from __future__ import annotations

import signal

import pytest

from forkrl.store.interruption import Interrupted, Interruption


def test_an_interruption_says_how_the_run_ended() -> None:
    stop = Interrupted(signal.SIGTERM)
    assert (str(stop), stop.exit_code, stop.outcome) == ("stopped by SIGTERM", 143, "and saved")


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
