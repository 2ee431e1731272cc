"""Ray's worker processes as forks of one process that has already imported verl's largest dependencies.

A run of verl starts about ten processes, and each needs 9 s of CPU time to import torch, transformers and the rest.
``preloaded()`` imports them once; ``executable`` is the value for Ray's ``runtime_env.py_executable``. Ray, verl and
the plug-in under test are still imported by every process.

The executable is a small client: it passes its arguments, environment and standard streams to the server, which forks,
and it lives exactly as long as the fork. ``python -m tests.verl_cpu.preloaded SOCKET`` is the server.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

_MODULES = (
    "torch", "torch._dynamo", "torch.distributed.tensor", "tensordict", "transformers", "transformers.modeling_utils",
    "datasets", "hydra",
)  # fmt: skip
"""Not Ray, which reads its environment when it is imported."""
_CLIENT = """
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect(sys.argv[1])
request = {"argv": sys.argv[2:], "environment": dict(os.environ), "cwd": os.getcwd()}
socket.send_fds(server, [json.dumps(request).encode() + b"\\n"], [0, 1, 2])
os._exit(int(server.recv(16) or b"1"))
"""
_START_TIMEOUT_S = 300.0


class Preloaded(NamedTuple):
    executable: str
    """For ``runtime_env.py_executable``: Ray passes it to a shell."""
    pid: int
    """Of the server, whose children are Ray's worker processes."""


@contextmanager
def preloaded(environment: Mapping[str, str]) -> Iterator[Preloaded]:
    """Start the server with this environment; ends it and its forks afterwards."""
    with tempfile.TemporaryDirectory(prefix="fk-", dir="/tmp") as folder:  # a socket's path must be short
        client, address = Path(folder) / "client.py", Path(folder) / "socket"
        client.write_text(_CLIENT)
        command = [sys.executable, "-m", "tests.verl_cpu.preloaded", str(address)]
        server = subprocess.Popen(command, env=dict(environment), stdin=subprocess.PIPE, start_new_session=True)
        try:
            deadline = time.monotonic() + _START_TIMEOUT_S
            while not address.exists():
                assert server.poll() is None and time.monotonic() < deadline, "the preloaded process did not start"
                time.sleep(0.1)
            yield Preloaded(f"{sys.executable} -S -E {client} {address}", server.pid)
        finally:
            assert server.stdin is not None
            server.stdin.close()  # the server then kills its forks and ends
            server.wait()


def serve(address: str) -> None:
    """Fork for every request, until standard input is closed."""
    for name in _MODULES:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".starting")
    listener.listen(64)
    Path(address + ".starting").rename(address)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(sys.stdin, selectors.EVENT_READ)
    forks: dict[int, socket.socket] = {}
    while True:
        for key, _ in waiting.select(0.05):
            if key.fileobj is sys.stdin:
                for pid in forks:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            elif key.fileobj is listener:
                client, _ = listener.accept()
                pid = _fork(client)
                forks[pid] = client
                waiting.register(client, selectors.EVENT_READ, pid)
            elif key.data in forks:  # its client was killed
                os.kill(key.data, signal.SIGKILL)
                waiting.unregister(key.fileobj)
        for pid in list(forks):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                client = forks.pop(pid)
                with suppress(KeyError):
                    waiting.unregister(client)
                with suppress(OSError):
                    client.sendall(str(os.waitstatus_to_exitcode(status) & 255).encode())
                client.close()


def _fork(client: socket.socket) -> int:
    message, streams, _, _ = socket.recv_fds(client, 2**16, 3)
    while not message.endswith(b"\n"):
        message += client.recv(2**16)
    pid = os.fork()
    if not pid:
        _become(json.loads(message), streams)
    for stream in streams:
        os.close(stream)
    return pid


def _become(request: dict[str, Any], streams: list[int]) -> NoReturn:
    """Run the client's program in this fork, as ``python FILE ARGUMENTS`` would."""
    os.setpgid(0, 0)  # Ray ends a worker by killing its process group
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, 256)
    sys.stdin = open(0)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.argv = request["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
