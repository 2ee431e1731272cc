"""Programs that try to get out of the sandbox, to harm the machine or to stay behind. Each is contained.

The programs lie in tests/data/escape_probes.txt. A probe that reports about itself prints "contained"; for the others
their end says it: which limit stopped them. After every one no process is left in its namespace.
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from forkrl.config import SandboxConfig
from forkrl.rewards.code import bubblewrap, sandboxed_process
from forkrl.rewards.code.bubblewrap import Bubblewrap
from forkrl.rewards.code.sandbox import Outcome, require_sandbox
from forkrl.rewards.code.sandboxed_process import SandboxedProcess
from forkrl.rewards.code.seccomp import refused_calls
from tests.sandbox_here import needs_bubblewrap

pytestmark = needs_bubblewrap

PROBES = dict(
    re.findall(
        r"^### (.+)\n((?:(?!### ).*\n)*)", (Path(__file__).parents[1] / "data/escape_probes.txt").read_text(), re.M
    )
)
HELPERS = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
escaped = []
def report(contained):
    escaped.append(not contained)
def attempt(action):
    try:
        escaped.append(action() is not NotImplemented)
    except (OSError, ValueError):
        escaped.append(False)
def call(action):
    ctypes.set_errno(0)
    escaped.append(action() != -1 or ctypes.get_errno() not in (1, 38))
def syscall(name, *arguments):
    return libc.syscall(CALLS[name], *arguments)
"""
LAST_LINE = """
if escaped:
    print("escaped" if any(escaped) else "contained")
"""
QUICK = {"seconds": 0.3, "total_seconds": 20.0, "memory_mb": 128, "files_mb": 8, "output_kb": 256}
PATIENT = QUICK | {"seconds": 10.0}


class Host(NamedTuple):
    """What there is outside to be reached, for the probes to try."""

    facts: dict[str, Any]
    folder: Path
    listener: socket.socket


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("host")
    token = secrets.token_hex(8)
    (folder / "secret.txt").write_text("a secret")
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        unix.bind(str(folder / "s"))
        unix.listen()
        abstract.bind(f"\0{token}")
        abstract.listen()
        tcp.setblocking(False)
        facts = {
            "tcp": tcp.getsockname()[1],
            "unix": str(folder / "s"),
            "abstract": token,
            "token": token,
            "secret": token[::-1],
            "home": str(Path.home()),
            "project": str(Path(__file__).parents[2]),
            "file": str(folder / "secret.txt"),
            "folder": str(folder),
            "pid": os.getpid(),
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FORKRL_SECRET", facts["secret"])
            yield Host(facts, folder, tcp)


@pytest.fixture
def namespaces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The process namespaces of the sandboxes that the test starts."""
    seen: list[str] = []

    class Recorded(SandboxedProcess):
        def _look_inside(self) -> None:
            super()._look_inside()
            seen.append(str(Path(f"/proc/{self.first_pid}/ns/pid").readlink()))

    monkeypatch.setattr(bubblewrap, "SandboxedProcess", Recorded)
    return seen


def calls() -> dict[str, int]:
    return refused_calls(platform.machine())


def survivors(namespace: str) -> list[str]:
    """The processes that still are in a namespace."""
    found = []
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            if process.name.isdigit() and str((process / "ns/pid").readlink()) == namespace:
                found.append(process.name)
    return found


def run(program: str, stdin: str, **limits: float) -> Outcome:
    sandbox = Bubblewrap(SandboxConfig.model_validate(limits))
    return sandbox.run_program(program, stdin, max_output=256 << 10, deadline=time.monotonic() + 30)


@pytest.mark.parametrize("title", PROBES)
def test_contained(title: str, host: Host, namespaces: list[str]) -> None:
    name, _, expected = title.rpartition(": ")
    endings = set(expected.split())
    program = f"HOST = {host.facts!r}\nCALLS = {calls()!r}\n{HELPERS}{PROBES[title]}{LAST_LINE}"
    stdin = "x" * (4 << 20) if name == "input never read" else ""
    files = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    outcome = run(program, stdin, **(QUICK if endings & {"time", "memory"} else PATIENT))
    ending = outcome.failure or outcome.output.decode().strip()
    assert ending in endings, outcome.output[:500]
    assert len(namespaces) == 1
    assert survivors(namespaces[0]) == []
    assert set(os.listdir("/proc/self/fd")) == files  # noqa: PTH208
    places = (host.folder, Path.home(), Path(host.facts["project"]), Path("/tmp"), Path("/"), Path("/var/tmp"))
    assert not any((place / host.facts["token"]).exists() for place in places)
    with pytest.raises(BlockingIOError):
        host.listener.accept()


def test_at_least_fifty_probes() -> None:
    assert len(PROBES) >= 50


def test_the_probes_can_fail() -> None:
    """Unprotected, a probe says that it got out; else none of the results above would mean anything."""
    program = f"CALLS = {{}}\n{HELPERS}attempt(lambda: open(__import__('os').__file__).read()){LAST_LINE}"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"escaped\n"


@pytest.mark.parametrize("leader", [True, False])
def test_nothing_outlives_a_verifier_that_is_killed(leader: bool) -> None:
    """As the pool kills it, with its session, or on its own, as the kernel's OOM killer would."""
    program = (
        "import time\nfrom forkrl.config import SandboxConfig\nfrom forkrl.rewards.code import bubblewrap\n"
        "from forkrl.rewards.code.sandboxed_process import SandboxedProcess\n"
        "look = SandboxedProcess._look_inside\n"
        "def tell(self):\n    look(self)\n    print(self.first_pid, flush=True)\n"
        "SandboxedProcess._look_inside = tell\n"
        "sandbox = bubblewrap.Bubblewrap(SandboxConfig())\n"
        "sandbox.run_program('import os, time\\nos.fork()\\ntime.sleep(100)', '', max_output=9,"
        " deadline=time.monotonic() + 99)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    judge = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment, start_new_session=True
    )
    assert judge.stdout is not None
    namespace = str(Path(f"/proc/{int(judge.stdout.readline())}/ns/pid").readlink())
    assert survivors(namespace)
    if leader:
        os.killpg(judge.pid, signal.SIGKILL)
    else:
        judge.kill()
    judge.wait()
    judge.stdout.close()
    limit = time.monotonic() + 10
    while survivors(namespace) and time.monotonic() < limit:
        time.sleep(0.01)
    assert survivors(namespace) == []


def test_many_at_once_do_not_count_each_other() -> None:
    """The limit of processes is each sandbox's own."""
    program = "import os, time\nfor _ in range(20):\n  if os.fork() == 0:\n    time.sleep(0.2); os._exit(0)\nprint(1)"
    script = (
        "import time\nfrom forkrl.config import SandboxConfig\nfrom forkrl.rewards.code.bubblewrap import Bubblewrap\n"
        f"print(Bubblewrap(SandboxConfig(processes=24)).run_program({program!r}, '', max_output=99,"
        " deadline=time.monotonic() + 60).output)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    judges = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) for _ in range(3)
    ]
    assert [judge.communicate()[0] for judge in judges] == [b"b'1\\n'\n"] * 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_works_for_ordinary_users(tmp_path: Path) -> None:
    """For them bubblewrap's user namespace is enough; the same probes are contained."""
    script = (
        "import json, os, sys, time\n"
        "from forkrl.config import SandboxConfig\nfrom forkrl.rewards.code.sandbox import require_sandbox\n"
        "os.setgroups([]); os.setgid(54321); os.setuid(54321)\n"
        "sandbox = require_sandbox(SandboxConfig(python='/usr/bin/python3', seconds=5.0, memory_mb=128))\n"
        "for program in json.load(sys.stdin):\n"
        "    print(sandbox.run_program(program, '', max_output=1 << 16, deadline=time.monotonic() + 30))\n"
    )
    wanted = ("capabilities: contained", "many files: files", "memory of many children: memory exit")
    programs = [f"HOST = {{}}\nCALLS = {calls()!r}\n{HELPERS}{PROBES[title]}{LAST_LINE}" for title in wanted]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(programs), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert "contained" in first
    assert "files" in second
    assert "memory" in third or "exit" in third


def test_processes_share_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clock says, as on a machine that lets a program wait."""
    monkeypatch.setattr(sandboxed_process, "_WALL_PER_CPU_S", 1000)
    program = (
        "import os, time\n"
        "for _ in range(4):\n"
        "    if os.fork() == 0:\n"
        "        while time.process_time() < 0.2: pass\n"
        "        os._exit(0)\n"
        "for _ in range(4): os.wait()\n"
        "print('contained')\n"
        "time.sleep(0.2)\n"
    )
    assert run(program, "", **QUICK).failure == "time"
    assert run(program, "", **PATIENT).failure == ""


def test_the_probe_of_the_sandbox_itself() -> None:
    require_sandbox(SandboxConfig())
