"""Scores responses in worker processes that can be killed.

Model output is hostile text: a verifier fed with it may loop in C code, exhaust memory or crash, and no timeout inside
the process survives that. So every verifier runs in a process of its own session, which is killed at its deadline with
everything it started, while the response gets a result that says so. Workers are forked from small single-threaded
processes (``warden.py``): forking a process that holds torch threads or an accelerator is not safe.

``submit`` hands responses to the pool's thread, which waits on pipes and takes a few percent of one core.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType
from typing import Any

from forkrl.config import RewardConfig
from forkrl.config.secret_values import SecretValues
from forkrl.errors import UserError, printable
from forkrl.rewards.crew import Batch, Crew, Item
from forkrl.rewards.reply import strip_turn_end
from forkrl.rewards.worker_process import Settings
from forkrl.types import Prompt, VerifierResult, VerifierSpec

_log = logging.getLogger("forkrl")
_ENDPOINT = "forkrl.rewards.endpoint:verify_at_endpoint"
_CODE = "forkrl.rewards.code:verify_code"


class VerifierPool:
    """Processes that run verifiers; a context manager.

    Args:
        verifiers: one for every ``Prompt.source``; imported in the workers only, from this process's import path.
        workers: number of processes.
        timeout_s: wall-clock limit for one response, unless the verifier sets its own.
        memory_mb: address space of one process, in MiB; not enforced on macOS.
        hide: removes credentials from messages.

    Attributes:
        failures: number of failures by kind ("timeout", "crash", "memory", "error").
        first_failures: prompt and message of the first failure of each kind.
        announce: called from the pool's thread with one line at the first failure of each kind; logs a warning by
            default.
    """

    def __init__(
        self,
        verifiers: Mapping[str, VerifierSpec],
        *,
        workers: int = 1,
        timeout_s: float = 10.0,
        memory_mb: int = 2048,
        hide: Callable[[str], str] = str,
    ) -> None:
        for spec in verifiers.values():
            module, _, function = spec.path.partition(":")
            if not module or not function:
                raise UserError(f'task.verifier = {spec.path!r} is not an import path; write "module:function"')
        if sys.platform == "darwin":
            warnings.warn("macOS does not enforce reward.memory_mb; only the deadline bounds a verifier", stacklevel=2)
        self.failures: Counter[str] = Counter()
        self.first_failures: dict[str, str] = {}
        self.announce: Callable[[str], None] = _log.warning
        self._deadlines = {
            source: timeout_s if spec.timeout_s is None else spec.timeout_s for source, spec in verifiers.items()
        }
        named = {source: (spec.path, dict(spec.options), self._deadlines[source]) for source, spec in verifiers.items()}
        self._crew = Crew(Settings(named, memory_mb), workers, self._note_failure, hide)
        self._lock = threading.Lock()
        self._handed_in: deque[Batch] = deque()
        self._closed = False
        self._wake_fd, self._waker_fd = os.pipe()
        os.set_blocking(self._waker_fd, False)
        self._opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="verifier-pool", daemon=True)
        self._thread.start()
        try:
            self._opened.result()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what waits, kill the workers and wait for them; may be called twice."""
        with self._lock:
            self._closed = True
            self._wake()
        self._thread.join()
        with self._lock:
            if self._wake_fd >= 0:
                os.close(self._wake_fd)
                os.close(self._waker_fd)
                self._wake_fd = self._waker_fd = -1

    def submit(self, items: Sequence[tuple[Prompt, str]]) -> Future[list[VerifierResult]]:
        """Have pairs of prompt and response judged in the background; any thread may call it, several times at once.

        Returns:
            One result per item, in order. It fails only where a replacement worker cannot be started (UserError),
            never because of a response. Cancelling it abandons what is not judged yet.
        """
        batch = Batch([(prompt, strip_turn_end(response)) for prompt, response in items], self._timeout_of)
        with self._lock:
            if self._closed:
                raise RuntimeError("this VerifierPool is closed")
            self._handed_in.append(batch)
            self._wake()
        batch.future.add_done_callback(self._wake_if_cancelled)
        return batch.future

    def verify(self, items: Sequence[tuple[Prompt, str]]) -> list[VerifierResult]:
        """``submit`` and wait; Ctrl-C abandons the batch, and the pool stays usable."""
        future = self.submit(items)
        try:
            return future.result()
        finally:
            future.cancel()

    def _timeout_of(self, prompt: Prompt) -> float:
        if prompt.source not in self._deadlines:
            raise UserError(f"prompt {prompt.id}: no verifier for its source {prompt.source!r}")
        return self._deadlines[prompt.source]

    def _wake_if_cancelled(self, future: Future[Any]) -> None:
        if future.cancelled():
            with self._lock:
                if not self._closed:
                    self._wake()

    def _wake(self) -> None:
        """Wake the pool's thread; the lock is held."""
        try:
            if self._waker_fd >= 0:
                os.write(self._waker_fd, b"!")
        except BlockingIOError:
            pass  # the pipe already holds bytes that wake it

    def _run(self) -> None:
        """The pool's thread; nothing else touches the crew."""
        try:
            self._crew.staff()
            while not self._closed and not self._crew.is_ready:
                self._crew.step(self._wake_fd)
            self._opened.set_result(None)
            while not self._closed:
                try:
                    self._take_in()
                    self._crew.step(self._wake_fd)
                except BaseException as error:  # told to everyone who waits; the next batch gets new workers
                    self._crew.abandon(error)
        except BaseException as error:
            self._opened.set_exception(error)
        finally:
            self._take_in()
            self._crew.close()

    def _take_in(self) -> None:
        with self._lock:
            arrived = list(self._handed_in)
            self._handed_in.clear()
        for batch in arrived:
            batch.finish_if_settled()  # an empty one
            self._crew.add(batch)

    def _note_failure(self, item: Item, kind: str, message: str) -> None:
        self.failures[kind] += 1
        if kind not in self.first_failures:
            self.first_failures[kind] = printable(f"prompt {item.prompt.id}: {message}")
            self.announce(
                f"verifier failure ({kind}), {self.first_failures[kind]}; the response scores 0, and further failures "
                f"of this kind are only counted (docs/verifiers.md)"
            )


def open_verifier(verifiers: Mapping[str, VerifierSpec], config: RewardConfig) -> VerifierPool:
    """The pool that a recipe asks for, with ``${NAME}`` in the options replaced by the environment's values."""
    secrets = SecretValues()
    resolved = {source: _resolve_options(spec, secrets) for source, spec in verifiers.items()}
    try:
        prepared = {
            source: _prepare_endpoint(spec, config) if spec.path == _ENDPOINT else spec
            for source, spec in resolved.items()
        }
    except UserError as error:
        raise UserError(secrets.hide(str(error))) from None
    return VerifierPool(
        prepared,
        workers=config.workers,
        timeout_s=config.timeout_s,
        memory_mb=config.memory_mb,
        hide=secrets.hide,
    )


def _resolve_options(spec: VerifierSpec, secrets: SecretValues) -> VerifierSpec:
    def key(name: str) -> str:
        if spec.path == _ENDPOINT and name == "url":
            return "task.verifier"
        return f"sandbox.{name}" if spec.path == _CODE else f"task.verifier_options.{name}"

    return replace(spec, options={name: secrets.resolve(key(name), value) for name, value in spec.options.items()})


def _prepare_endpoint(spec: VerifierSpec, config: RewardConfig) -> VerifierSpec:
    from forkrl.rewards.endpoint import prepare_endpoint  # not above: it loads an HTTP client

    return prepare_endpoint(spec, config.timeout_s if spec.timeout_s is None else spec.timeout_s)
