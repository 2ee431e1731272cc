"""Stop signals (Ctrl-C, SIGTERM, SIGHUP) that end a run where it can be resumed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """Raised on a stop signal; not an ``Exception``, so that callers do not swallow it."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum
        self.outcome = "and saved"
        self.remedy = ""


class Interruption:
    """While open, stop signals raise ``Interrupted`` inside ``allowed()``, or when it is next entered.

    Weights change only outside ``allowed()``, so a run never stops in the middle of an update.
    """

    def __init__(self) -> None:
        self._signum: int | None = None
        self._signals = 0
        self._allowed = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        # Python delivers signals to the main thread only; in another thread the caller has to stop the run.
        if threading.current_thread() is threading.main_thread():
            for signum in STOP_SIGNALS:
                if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                    continue  # under nohup the run outlives its terminal
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Code that may be interrupted at any point."""
        self._allowed = True
        try:
            self.check()
            yield
        finally:
            self._allowed = False

    @property
    def signalled(self) -> bool:
        return self._signum is not None

    @property
    def signalled_again(self) -> bool:
        return self._signals > 1

    def check(self) -> None:
        """Raise ``Interrupted`` if a signal has arrived."""
        if self._signum is not None:
            raise Interrupted(self._signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        first = self._signum is None
        self._signum = signum
        self._signals += 1
        if first and self._allowed:
            raise Interrupted(signum)
