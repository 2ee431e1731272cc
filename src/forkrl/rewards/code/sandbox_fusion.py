"""Runs programs on a SandboxFusion server (https://github.com/bytedance/SandboxFusion); scores their output here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from forkrl.config import SandboxConfig
from forkrl.config.secret_values import SecretValues, is_loopback, shown_url
from forkrl.rewards.code.sandbox import Kind, Outcome, SandboxUnavailableError, driver

_ANSWER_LIMIT_S = 30.0
"""For the server's queue and the network, on top of the program's own time."""


class SandboxFusion:
    def __init__(self, config: SandboxConfig) -> None:
        self._limits = config
        self._secrets = SecretValues()
        address, question_mark, query = self._secrets.resolve("sandbox.server", config.server).partition("?")
        self._url = f"{address.rstrip('/')}/run_code{question_mark}{query}"
        self._use_proxies = not is_loopback(self._url)

    def run_program(self, source: str, stdin: str, *, max_output: int, deadline: float) -> Outcome:
        text, run = driver("program")
        return self._post(f"{text}\n\n{run}({source!r})\n", stdin, self._limits.seconds, max_output, deadline)

    @contextmanager
    def answers(
        self, kind: Kind, source: str, request: str, *, cpu_seconds: float, max_output: int, deadline: float
    ) -> Iterator[Iterator[bytes]]:
        """See ``Sandbox``; one request returns the answers to all calls."""
        text, run = driver(kind)
        code = f"{text}\n\nanswer_on_stdout({run}, {source!r})\n"
        outcome = self._post(code, request, cpu_seconds, max_output, deadline)
        yield iter(outcome.output.split(b"\n")[:-1])

    def _post(self, code: str, stdin: str, seconds: float, max_output: int, deadline: float) -> Outcome:
        seconds = min(seconds, deadline - time.monotonic())
        if seconds <= 0:
            return Outcome(b"", "time")
        request = {
            "code": code,
            "language": "python",
            "stdin": stdin,
            "run_timeout": seconds,
            "memory_limit_MB": self._limits.memory_mb,
        }
        try:
            response = httpx.post(
                self._url, json=request, timeout=seconds + _ANSWER_LIMIT_S, trust_env=self._use_proxies
            )
            response.raise_for_status()
            return _read(response.json(), max_output)
        except httpx.HTTPStatusError as error:  # its own message contains the whole URL
            raise self._unavailable(f"answered {error.response.status_code}") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unavailable(f"cannot be asked: {type(error).__name__} {error}") from None
        except (ValueError, TypeError, KeyError) as error:
            raise self._unavailable(f"did not answer as SandboxFusion does ({error!r})") from error

    def _unavailable(self, what: str) -> SandboxUnavailableError:
        return SandboxUnavailableError(self._secrets.hide(f"{shown_url(self._url)} {what}"))


def _read(answer: dict[str, Any], max_output: int) -> Outcome:
    if answer["status"] not in ("Success", "Failed"):
        raise SandboxUnavailableError(f"the server says {answer['status']}: {str(answer.get('message'))[:200]}")
    result = answer["run_result"]
    output = (result["stdout"] or "").encode("utf-8", "replace")
    if len(output) > max_output:
        return Outcome(output[:max_output], "output")
    if result["status"] == "TimeLimitExceeded":
        return Outcome(output, "time")
    if result["status"] != "Finished":
        raise SandboxUnavailableError(f"the server says that the run is {result['status']}")
    return Outcome(output, "" if result["return_code"] == 0 else "exit")
