"""What a verifier may use, what it may leave behind, and that a slow or hostile item harms no other."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from forkrl.rewards import VerifierPool, worker_process
from forkrl.types import Prompt, VerifierResult, VerifierSpec
from tests.processes import wait_until

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="adopted orphans and /proc are Linux's")
RAMPANT = r'''
import ctypes, os, resource, signal, subprocess, sys, time

hoard = []


def act(answer, response, **options):
    """Do what the response says; its first word is a function."""
    name, *rest = response.split()
    return globals()[name](*rest) if name in globals() else float(answer == response)


def hang():
    time.sleep(3600)


def slow(seconds):
    time.sleep(float(seconds))
    return 1.0


def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.01)
    return 1.0


def complain():
    raise ValueError("no")


def leave():
    os._exit(3)


def sysexit():
    sys.exit("bye")


def segfault():
    ctypes.string_at(0)


def allocate():
    return float(len(bytearray(1 << 30)))


def garbage():
    for fd in (1, 2):
        os.write(fd, b'["x", 1.0, "", "", null]\n' * 5000)
    return 0.0


def scribble():
    """Write to every descriptor there may be."""
    for fd in range(3, 64):
        try:
            os.write(fd, b'["x", 1.0, "", "", null, 0.0]\n')
        except OSError:
            pass
    return 1.0


def daemon(then="stay"):
    """Start a process that belongs to no session of ours and to no parent."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(3600)
        os._exit(0)
    os.wait()
    return globals()[then]() if then in globals() else 1.0


def generations():
    """A child of a child of a child, each in its own session."""
    code = "import subprocess, sys, time; n = int(sys.argv[1])\n"
    again = "[sys.executable, '-S', '-c', sys.argv[2], str(n - 1), sys.argv[2]]"
    code += f"if n: subprocess.Popen({again}, start_new_session=True)\n"
    code += "else: open('deepest', 'w').close()\n"
    code += "time.sleep(3600)"
    subprocess.Popen([sys.executable, "-S", "-c", code, "2", code], start_new_session=True)
    wait_for("deepest")
    os._exit(0)


def twin():
    """A fork that comes back out of the verifier."""
    os.fork()
    return 1.0


def murder():
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(3600)


def freeze():
    os.kill(os.getppid(), signal.SIGSTOP)
    os._exit(0)


def big_file():
    with open("big", "wb") as file:
        file.truncate((64 << 20) + 1)


def limits():
    finite = [resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in
              (resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_AS)]
    return float(all(finite) and resource.getrlimit(resource.RLIMIT_CPU)[0] < 1000)


def burn():
    resource.setrlimit(resource.RLIMIT_CPU, (1, resource.RLIM_INFINITY))
    while True:
        pass


def whose():
    return 1.0, str(os.getpid())


def swell():
    """Keep 4 MiB for good, and say whether this process is still of a moderate size."""
    hoard.append(b"\1" * (4 << 20))
    return float(int(open("/proc/self/statm").read().split()[1]) * 4096 < 400 << 20)


def echo(text, length):
    return 1.0, text * int(length)
'''

MakePool = Callable[..., VerifierPool]


@pytest.fixture
def make_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakePool]:
    (tmp_path / "rampant.py").write_text(RAMPANT)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    pools: list[VerifierPool] = []

    def make(**settings: float) -> VerifierPool:
        pools.append(VerifierPool({"": VerifierSpec("rampant:act")}, **settings))  # type: ignore[arg-type]
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def items(*responses: str, source: str = "") -> list[tuple[Prompt, str]]:
    return [(Prompt(f"id-{i}", "?", "right", source=source), response) for i, response in enumerate(responses)]


def survivors(folder: Path) -> list[int]:
    """Processes whose environment names the folder: all that a pool started there, and all that those started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (process / "environ").read_bytes() and int(process.name) != os.getpid():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def test_one_hung_item_delays_nothing_else(make_pool: MakePool) -> None:
    """Not even those queued behind it in its own worker: all others get a result while it still hangs."""
    pool = make_pool(workers=2, timeout_s=600)
    pool.verify(items(*["right"] * 200))  # both workers have shown that they are quick, and get many at a time
    hung = pool.submit(items("hang"))
    others = [pool.submit(items("right", "wrong")) for _ in range(500)]
    for future in others:
        assert future.result(timeout=60) == [VerifierResult(1.0), VerifierResult(0.0)]
    assert not hung.done()
    assert not pool.failures


def test_what_went_to_another_worker_is_not_scored_twice(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(workers=2, timeout_s=600)
    pool.verify(items(*["right"] * 200))
    served = sum(worker.served for worker in pool._workers)
    slow = pool.submit(items("wait_for go"))
    behind = [pool.submit(items("right")) for _ in range(31)]
    assert all(future.result(timeout=60) == [VerifierResult(1.0)] for future in behind)
    (tmp_path / "go").touch()
    assert slow.result(timeout=60) == [VerifierResult(1.0)]
    assert pool.verify(items(*["slow 0.2"] * 4)) == [VerifierResult(1.0)] * 4  # both have been through what they held
    assert sum(worker.served for worker in pool._workers) == served + 1 + 31 + 4


def test_batches_overlap_each_other_and_the_caller(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(workers=2)
    first = pool.submit(items("right", "wait_for go", "wrong"))
    second = pool.submit(items("wrong", "right"))
    assert second.result(timeout=30) == [VerifierResult(0.0), VerifierResult(1.0)]
    assert not first.done()
    (tmp_path / "go").touch()
    assert first.result(timeout=30) == [VerifierResult(1.0), VerifierResult(1.0), VerifierResult(0.0)]
    assert pool.submit([]).result(timeout=30) == []


def test_close_cancels_what_waits(make_pool: MakePool) -> None:
    pool = make_pool(timeout_s=600)
    futures = [pool.submit(items("hang")), pool.submit(items("right"))]
    seen: list[BaseException | None] = []

    def wait() -> None:
        try:
            futures[0].result()
        except CancelledError as error:
            seen.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    pool.close()
    waiting.join(30)
    assert len(seen) == 1
    assert all(future.cancelled() for future in futures)


def test_a_cancelled_batch_frees_its_worker(make_pool: MakePool) -> None:
    pool = make_pool(timeout_s=600)
    future = pool.submit(items("hang", "right"))
    (worker,) = pool._workers
    assert wait_until(lambda: bool(worker.in_flight))
    hung = worker.pid
    assert future.cancel()
    assert wait_until(lambda: worker.state == "ready" and worker.pid != hung, 5)  # at once, not with the next batch
    assert pool.submit(items("right")).result(timeout=30) == [VerifierResult(1.0)]
    assert not pool.failures


def test_every_source_has_its_own_timeout(make_pool: MakePool) -> None:
    make_pool().close()
    specs = {"quick": VerifierSpec("rampant:act", timeout_s=0.3), "patient": VerifierSpec("rampant:act")}
    with VerifierPool(specs, timeout_s=600) as pool:
        assert pool.verify(items("slow 0.6", source="patient")) == [VerifierResult(1.0)]
        assert pool.verify(items("slow 60", source="quick")) == [VerifierResult(0.0, "timeout")]
        assert "within 0.3 s" in pool.first_failures["timeout"]


@LINUX
@pytest.mark.parametrize("response", ["daemon hang", "daemon leave", "daemon stay", "generations"])
def test_nothing_that_a_verifier_started_outlives_it(make_pool: MakePool, tmp_path: Path, response: str) -> None:
    pool = make_pool(timeout_s=1)
    pool.verify(items(response))
    if response != "daemon stay":  # that verifier lives on, and is replaced only below
        fresh = {pool._workers[0].pid, pool._workers[0].supervisor.pid}
        assert wait_until(lambda: pool._workers[0].state == "ready")
        fresh |= {pool._workers[0].pid}
        assert wait_until(lambda: set(survivors(tmp_path)) <= fresh)
    pool.close()
    assert survivors(tmp_path) == []


@LINUX
def test_a_fork_that_comes_back_out_of_the_verifier_is_ended(make_pool: MakePool) -> None:
    pool = make_pool()
    before = pool._workers[0].pid
    assert pool.verify(items("twin", *["right"] * 50)) == [VerifierResult(1.0)] * 51
    assert not pool.failures
    assert pool._workers[0].pid == before


@LINUX
def test_a_verifier_that_kills_its_supervisor_ends_itself(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(workers=2, timeout_s=600)
    assert pool.verify(items("right", "murder", "right")) == [
        VerifierResult(1.0),
        VerifierResult(0.0, "crash"),
        VerifierResult(1.0),
    ]
    assert "SIGKILL" in pool.first_failures["crash"]
    pool.close()
    assert survivors(tmp_path) == []


@LINUX
def test_a_stopped_supervisor_is_killed_without_further_waiting(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "_END_TIMEOUT_S", 0.5)
    timeouts: list[float | None] = []
    close = worker_process.WorkerProcess.close

    def note(worker: worker_process.WorkerProcess, timeout_s: float | None = None) -> str:
        timeouts.append(timeout_s)
        return close(worker, timeout_s)

    monkeypatch.setattr(worker_process.WorkerProcess, "close", note)
    pool = make_pool()
    assert pool.verify(items("freeze", "right")) == [VerifierResult(0.0, "crash"), VerifierResult(1.0)]
    assert timeouts == [0.0]


def test_a_fork_of_the_pools_process_does_not_hold_up_its_end(make_pool: MakePool) -> None:
    pool = make_pool()
    pipe, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(end)
        os.read(pipe, 1)  # until the test has ended
        os._exit(0)
    os.close(pipe)
    try:
        supervisors = [worker.supervisor for worker in pool._workers]
        pool.close()
        assert [supervisor.returncode for supervisor in supervisors] == [0]  # not killed after ten seconds
    finally:
        os.close(end)
        os.waitpid(pid, 0)


@pytest.mark.parametrize(
    ("response", "result", "message"),
    [
        ("limits", VerifierResult(1.0), ""),
        ("big_file", VerifierResult(0.0, "error"), "File too large"),
        ("burn", VerifierResult(0.0, "crash"), "SIGXCPU"),
        ("garbage", VerifierResult(0.0), ""),
    ],
)
def test_files_and_cpu_are_bounded(make_pool: MakePool, response: str, result: VerifierResult, message: str) -> None:
    pool = make_pool(timeout_s=20)
    assert pool.verify(items(response)) == [result]
    assert message in "".join(pool.first_failures.values())


def test_a_worker_is_replaced_after_many_answers(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "_MAX_SERVED", 10)
    pool = make_pool()
    results = pool.verify(items(*["whose"] * 35))
    assert sorted(Counter(result.answer for result in results).values()) == [5, 10, 10, 10]
    assert not pool.failures


@LINUX
def test_a_worker_that_leaks_is_replaced(make_pool: MakePool) -> None:
    pool = make_pool(memory_mb=512)
    assert pool.verify(items(*["swell"] * 150)) == [VerifierResult(1.0)] * 150
    assert not pool.failures


def test_long_answers_are_shortened_and_stay_different(make_pool: MakePool) -> None:
    long, longer, same = make_pool().verify(items("echo é 5000", "echo é 5001", "echo é 5000"))
    assert long.answer is not None and len(long.answer) < 1100
    assert long == same != longer


@LINUX
def test_two_thousand_hostile_items(make_pool: MakePool, tmp_path: Path) -> None:
    expected = {
        "right": VerifierResult(1.0),
        "wrong": VerifierResult(0.0),
        "garbage": VerifierResult(0.0),
        "daemon": VerifierResult(1.0),
        "complain": VerifierResult(0.0, "error"),
        "sysexit": VerifierResult(0.0, "error"),
        "leave": VerifierResult(0.0, "crash"),
        "segfault": VerifierResult(0.0, "crash"),
        "scribble": VerifierResult(0.0, "crash"),
        "allocate": VerifierResult(0.0, "memory"),
        "hang": VerifierResult(0.0, "timeout"),
    }
    shares = {"right": 400, "wrong": 400, "garbage": 300, "complain": 500, "sysexit": 296}
    few = {"leave": 25, "segfault": 25, "scribble": 25, "allocate": 12, "daemon": 12, "hang": 5}
    responses = [name for name, number in (shares | few).items() for _ in range(number)]
    random.Random(0).shuffle(responses)
    assert len(responses) == 2000
    pool = make_pool(workers=2, timeout_s=1.5, memory_mb=512)
    assert pool.verify(items(*responses)) == [expected[response] for response in responses]
    wanted = Counter(expected[response].failure for response in responses if expected[response].failure)
    assert pool.failures == wanted
    assert pool.first_failures.keys() == wanted.keys()
    pool.close()
    assert survivors(tmp_path) == []
