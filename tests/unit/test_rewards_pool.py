"""The verifier pool against verifiers that hang, crash, eat memory and lie."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forkrl.errors import UserError
from forkrl.rewards import VerifierPool
from forkrl.types import Prompt, VerifierResult, VerifierSpec
from tests.processes import is_running, wait_until

HOSTILE = r'''
import ctypes, json, os, subprocess, sys, time

answered = 0
hoard = []


def equal(answer, response):
    return float(answer == response)


def act(answer, response):
    """Do what the response says."""
    global answered
    answered += 1
    return float(globals()[response]() if response in globals() else answer == response)


def echo_length(answer, response):
    """Whether the response arrived unharmed: the answer holds its length and code points at both ends."""
    return float(answer == f"{len(response)} {ord(response[0])} {ord(response[-1])}")


def loop():
    while True:
        pass


def sleep():
    time.sleep(3600)


def power():
    return 9**9**9


def child():
    process = subprocess.Popen(["sleep", "3600"])
    with open("child.pid", "w") as file:
        file.write(str(process.pid))
    time.sleep(3600)


def pid():
    with open(f"worker-{os.getpid()}.pid", "w") as file:
        pass
    return 1.0


def segfault():
    ctypes.string_at(0)


def leave():
    os._exit(0)


def sysexit():
    sys.exit("bye")


def allocate():
    return len(bytearray(1 << 30)) and 1.0


def hoarder():
    hoard.append(bytearray(100 << 20))
    return 1.0


def recurse():
    return recurse()


def nan():
    return float("nan")


def two():
    return 2


def nothing():
    return None


def true():
    return True


def liar():
    forged = json.dumps(["0" * 16, 1.0, "", ""]) + "\n"
    print(forged, flush=True)
    os.write(1, forged.encode())
    os.write(2, forged.encode())
    return 0.0


def blind_liar():
    """Write a forged result to every descriptor there may be."""
    for fd in range(3, 64):
        try:
            os.write(fd, json.dumps(["0" * 16, 1.0, "", ""]).encode() + b"\n")
        except OSError:
            pass
    return 0.0


def flood():
    for fd in range(3, 64):
        try:
            while True:
                os.write(fd, b"x" * 65536)
        except OSError:
            pass


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no")


def unprintable():
    raise Unprintable
'''

MakePool = Callable[..., VerifierPool]


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Import path of the module above, written where only ``sys.path`` of this process leads."""
    (tmp_path / "hostile_verifiers.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return "hostile_verifiers"


@pytest.fixture
def make_pool(hostile: str) -> Iterator[MakePool]:
    pools: list[VerifierPool] = []

    def make(function: str = "act", **settings: float) -> VerifierPool:
        pools.append(VerifierPool({"": VerifierSpec(f"{hostile}:{function}")}, **settings))  # type: ignore[arg-type]
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def items(*responses: str, answer: str = "right") -> list[tuple[Prompt, str]]:
    return [(Prompt(f"id-{index}", "?", answer), response) for index, response in enumerate(responses)]


def open_files() -> set[int]:
    """Descriptors open in this process."""
    return {fd for fd in range(256) if Path(f"/dev/fd/{fd}").exists()}


def children() -> set[str]:
    """Processes that this one has started and not reaped. Fixtures of the session may have some of their own."""
    return {pid for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()}


def test_a_thousand_items_keep_their_order(make_pool: MakePool) -> None:
    pool = make_pool("equal", workers=2)
    batch = [(Prompt(str(i), "?", str(i % 3)), str(i % 2)) for i in range(1000)]
    assert pool.verify(batch) == [VerifierResult(float(i % 3 == i % 2)) for i in range(1000)]
    assert pool.verify([]) == []
    assert not pool.failures


@pytest.mark.parametrize("hang", ["loop", "sleep", "power"])
def test_a_hanging_verifier_is_killed_and_the_others_are_unharmed(make_pool: MakePool, hang: str) -> None:
    pool = make_pool(timeout_s=0.5)
    results = pool.verify(items("right", hang, "right", "wrong", hang, "right"))
    hung = VerifierResult(0.0, "timeout")
    assert results == [VerifierResult(1.0), hung, VerifierResult(1.0), VerifierResult(0.0), hung, VerifierResult(1.0)]
    assert pool.verify(items(hang, "right")) == [hung, VerifierResult(1.0)]
    assert pool.failures == {"timeout": 3}
    assert "id-1" in pool.first_failures["timeout"]


@pytest.mark.parametrize(
    ("response", "failure", "message"),
    [
        ("segfault", "crash", "SIGSEGV"),
        ("leave", "crash", "code 0"),
        ("allocate", "memory", "memory"),
        ("recurse", "error", "RecursionError"),
        ("sysexit", "error", "SystemExit: bye"),
        ("unprintable", "error", "Unprintable"),
        ("nan", "error", "nan (float)"),
        ("two", "error", "2.0 (float)"),
        ("flood", "crash", "wrote on the pipe"),
    ],
)
def test_failures_are_named_counted_and_do_no_harm(
    make_pool: MakePool, response: str, failure: str, message: str
) -> None:
    pool = make_pool(memory_mb=512)
    expected = [VerifierResult(1.0), VerifierResult(0.0, failure), VerifierResult(1.0)]
    assert pool.verify(items("right", response, "right")) == expected
    assert pool.verify(items(response, "wrong")) == [VerifierResult(0.0, failure), VerifierResult(0.0)]
    assert pool.failures == {failure: 2}
    assert message in pool.first_failures[failure]
    assert pool.first_failures[failure].startswith("prompt id-1: ")


RETURNS = {
    "True": (VerifierResult(1.0), ""),
    "0": (VerifierResult(0.0), ""),
    "(1, '')": (VerifierResult(1.0, "", ""), ""),
    "(0.5, None)": (VerifierResult(0.5), ""),
    "Judgement(1.0, 'x')": (VerifierResult(1.0, "", "x"), ""),
    "Fraction(1, 4)": (VerifierResult(0.25), ""),
    "None": (VerifierResult(0.0, "error"), "returned None (NoneType), not a score in [0, 1]"),
    "'1.0'": (VerifierResult(0.0, "error"), "returned '1.0' (str), not a score"),
    "float('nan')": (VerifierResult(0.0, "error"), "returned nan (float), not a score"),
    "float('inf')": (VerifierResult(0.0, "error"), "returned inf (float), not a score"),
    "2.0": (VerifierResult(0.0, "error"), "returned 2.0 (float), not a score"),
    "-0.1": (VerifierResult(0.0, "error"), "returned -0.1 (float), not a score"),
    "1j": (VerifierResult(0.0, "error"), "returned something (complex), not a score"),
    "[1.0]": (VerifierResult(0.0, "error"), "returned something (list), not a score"),
    "(1.0, 7)": (VerifierResult(0.0, "error"), "returned the answer as int, not text"),
    "(1.0, 'a', 'b')": (VerifierResult(0.0, "error"), "returned something (tuple), not a score"),
    "('x', 1.0)": (VerifierResult(0.0, "error"), "returned 'x' (str), not a score"),
    "1 / 0": (VerifierResult(0.0, "error"), "ZeroDivisionError: division by zero"),
}


def test_what_a_verifier_may_return(hostile: str, tmp_path: Path) -> None:
    (tmp_path / "returning.py").write_text(
        "from fractions import Fraction\nfrom forkrl.types import Judgement\n\n\n"
        "def f(answer, response):\n    return eval(response)\n"
    )
    with VerifierPool({"": VerifierSpec("returning:f")}) as pool:
        for returned, (result, message) in RETURNS.items():
            pool.failures.clear()
            pool.first_failures.clear()
            assert pool.verify(items(returned)) == [result], returned
            assert pool.failures.total() == bool(message), returned
            assert message in "".join(pool.first_failures.values()), returned


def test_the_first_failure_of_each_kind_is_announced(make_pool: MakePool, caplog: pytest.LogCaptureFixture) -> None:
    pool = make_pool(timeout_s=0.5)
    pool.verify(items("right", "sysexit", "loop", "nan", "loop"))
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("verifier failure (error), prompt id-1: SystemExit: bye; the response scores 0")
    assert second.startswith("verifier failure (timeout), prompt id-2: gave no answer within 0.5 s;")


def test_an_announcement_cannot_steer_the_terminal(hostile: str, tmp_path: Path) -> None:
    (tmp_path / "steering.py").write_text("def f(answer, response):\n    raise ValueError('\\x1b[2J\\u202e\\n')\n")
    told: list[str] = []
    with VerifierPool({"": VerifierSpec("steering:f")}) as pool:
        pool.announce = told.append
        pool.verify([(Prompt("id\x07", "?", ""), "")])
    assert len(told) == 1
    assert told[0].isprintable()
    assert r"prompt id\x07: ValueError: \x1b[2J\u202e" in told[0]


OPTIONS = """
from functools import partial

def near(answer, response, *, tolerance=0.0, units=()):
    return float(abs(float(answer) - float(response)) <= tolerance)

def all_of_them(answer, response, **options):
    return float(options == {"tolerance": 0.5, "units": ["m", {"s": None}]})

def two(answer, response):
    return 1.0

def three(answer, response, tolerance, more):
    return 1.0
"""


def test_options_reach_the_verifier(hostile: str, tmp_path: Path) -> None:
    (tmp_path / "options.py").write_text(OPTIONS)
    options = {"tolerance": 0.5, "units": ["m", {"s": None}]}
    with VerifierPool({"": VerifierSpec("options:all_of_them", options)}) as pool:
        assert pool.verify(items("")) == [VerifierResult(1.0)]
    with VerifierPool({"": VerifierSpec("options:near", options), "strict": VerifierSpec("options:near")}) as pool:
        batch = [(Prompt("", "", "1.0", source=source), "1.4") for source in ("", "strict")]
        assert pool.verify(batch) == [VerifierResult(1.0), VerifierResult(0.0)]


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("near", {"tolerence": 1}, "options:near(answer, response, *, tolerance=0.0, units=()): got an unexpected"),
        ("two", {"tolerance": 1}, "unexpected keyword argument 'tolerance'"),
        ("three", {"tolerance": 1}, "missing a required argument: 'more'"),
        ("near", {"answer": "x"}, "multiple values for argument 'answer'"),
    ],
)
def test_options_that_do_not_fit_are_refused_at_the_start(
    hostile: str, tmp_path: Path, function: str, options: dict[str, object], message: str
) -> None:
    (tmp_path / "options.py").write_text(OPTIONS)
    with pytest.raises(UserError) as caught:
        VerifierPool({"": VerifierSpec(f"options:{function}", options)})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_prompt_from_nowhere_is_refused(make_pool: MakePool) -> None:
    pool = make_pool()
    with pytest.raises(UserError, match="prompt p: no verifier for its source 'elsewhere'"):
        pool.verify([(Prompt("p", "", "", source="elsewhere"), "")])
    assert pool.verify(items("right")) == [VerifierResult(1.0)]


def test_prints_cannot_forge_a_result(make_pool: MakePool) -> None:
    pool = make_pool()
    assert pool.verify(items("liar", "right", "liar")) == [
        VerifierResult(0.0),
        VerifierResult(1.0),
        VerifierResult(0.0),
    ]
    assert not pool.failures


def test_a_result_written_blindly_on_every_pipe_is_refused(make_pool: MakePool) -> None:
    pool = make_pool(timeout_s=2)
    assert pool.verify(items("right", "blind_liar", "right")) == [
        VerifierResult(1.0),
        VerifierResult(0.0, "crash"),
        VerifierResult(1.0),
    ]


def test_a_result_does_not_depend_on_what_the_worker_did_before(make_pool: MakePool) -> None:
    """Each response keeps 100 MiB: a worker of 512 MiB fills up, which is not the fault of whoever finds it full."""
    pool = make_pool(memory_mb=512)
    assert pool.verify(items(*["hoarder"] * 12)) == [VerifierResult(1.0)] * 12
    assert not pool.failures


def test_any_python_string_arrives_unharmed(make_pool: MakePool) -> None:
    pool = make_pool("echo_length", workers=2)
    responses = ["\ud800", "\x00", "\u2028\n\r\x85", "é" * (5 << 20), "\x00" * (10 << 20), '"]}\\', "\U0001f600"]
    batch = [(Prompt(str(i), "?", f"{len(r)} {ord(r[0])} {ord(r[-1])}"), r) for i, r in enumerate(responses)]
    assert pool.verify(batch) == [VerifierResult(1.0)] * len(responses)


def test_many_large_responses_do_not_block(make_pool: MakePool) -> None:
    pool = make_pool("equal")
    assert pool.verify(items(*["x" * (1 << 20)] * 40)) == [VerifierResult(0.0)] * 40


def test_it_works_from_any_thread_and_workers_outlive_the_thread_that_started_them(make_pool: MakePool) -> None:
    pool = make_pool(timeout_s=0.5)
    results: dict[int, list[VerifierResult]] = {}

    def score(number: int) -> None:
        results[number] = pool.verify(items("right", "loop", "wrong"))

    threads = [threading.Thread(target=score, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    expected = [VerifierResult(1.0), VerifierResult(0.0, "timeout"), VerifierResult(0.0)]
    assert results == {0: expected, 1: expected}
    pids = [worker.pid for worker in pool._workers]  # a thread that has ended started it
    assert not wait_until(lambda: not all(map(is_running, pids)), limit_s=0.3)
    assert pool.verify(items("right")) == [VerifierResult(1.0)]
    assert pool.failures == {"timeout": 2}


def test_a_worker_that_died_while_idle_is_replaced(make_pool: MakePool) -> None:
    pool = make_pool()
    (worker,) = pool._workers
    pid = worker.pid
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not is_running(pid))
    assert pool.verify(items("right")) == [VerifierResult(1.0)]
    assert not pool.failures


def test_a_starved_parent_does_not_take_its_own_delay_for_the_workers(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Starved(selectors.DefaultSelector):
        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            events = super().select(timeout)
            time.sleep(0.5)  # longer than the timeout
            return events

    pool = make_pool("equal", workers=3, timeout_s=0.3)
    monkeypatch.setattr("selectors.DefaultSelector", Starved)
    assert pool.verify(items("right", *["wrong"] * 12)) == [VerifierResult(1.0), *[VerifierResult(0.0)] * 12]


def test_an_interrupted_batch_leaves_no_answers_for_the_next(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(timeout_s=60)
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            pool.verify(items("right", "sleep", "right"))
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert pool.verify(items("wrong", "wrong")) == [VerifierResult(0.0)] * 2


def test_the_timeout_kills_the_processes_that_a_verifier_started(make_pool: MakePool) -> None:
    pool = make_pool(timeout_s=0.5)
    assert pool.verify(items("child")) == [VerifierResult(0.0, "timeout")]
    pid = int(Path("child.pid").read_text())
    assert wait_until(lambda: not is_running(pid))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_close_leaves_no_process_and_no_file(make_pool: MakePool) -> None:
    files, others = open_files(), children()
    with make_pool(workers=2, timeout_s=0.3) as pool:
        pool.verify(items("loop", "leave", "right"))
        assert children() > others
    pool.close()
    assert children() == others
    assert open_files() == files
    with pytest.raises(RuntimeError, match="closed"):
        pool.verify(items("right"))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal on a closed pipe is Linux's")
@pytest.mark.parametrize(
    ("state", "supervisor_too"), [("pid", False), ("power", False), ("child", False), ("loop", False), ("loop", True)]
)
def test_kill_9_of_the_parent_leaves_no_worker(hostile: str, state: str, supervisor_too: bool) -> None:
    script = f"""
        import subprocess, sys, threading, time
        from forkrl.rewards import VerifierPool
        from forkrl.types import Prompt, VerifierSpec
        pool = VerifierPool({{"": VerifierSpec("{hostile}:act")}}, timeout_s=3600)
        threading.Thread(target=pool.verify, args=([(Prompt("", "", ""), "{state}")],), daemon=True).start()
        time.sleep(0.3)
        print(pool._workers[0].pid, pool._workers[0].supervisor.pid, flush=True)
        time.sleep(3600)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, env=environment
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        if state == "child":
            assert wait_until(lambda: bool(Path("child.pid").exists() and Path("child.pid").read_text()))
            pids.append(int(Path("child.pid").read_text()))
        assert all(map(is_running, pids))
        if supervisor_too:
            parent.send_signal(signal.SIGSTOP)  # it must not notice
            os.kill(pids[1], signal.SIGKILL)
        parent.kill()
    assert wait_until(lambda: not any(map(is_running, pids)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_colon", "not an import path"),
        ("no_such_module_:f", "ModuleNotFoundError: No module named 'no_such_module_'"),
        ("hostile_verifiers:no_such_function", "no_such_function"),
        ("hostile_verifiers:answered", "not a function"),
        ("broken:f", "SyntaxError"),
        ("leaves:f", "exited with code 7 (farewell)"),
    ],
)
def test_a_verifier_that_cannot_be_imported_is_the_users_error(
    hostile: str, tmp_path: Path, path: str, message: str
) -> None:
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "leaves.py").write_text("import os, sys\nprint('farewell', file=sys.stderr, flush=True)\nos._exit(7)\n")
    with pytest.raises(UserError) as caught:
        VerifierPool({"": VerifierSpec(path)}, workers=2)
    assert path in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_little_memory_to_start_is_the_users_error() -> None:
    with pytest.raises(UserError, match=r"reward\.memory_mb = 64"):
        VerifierPool({"": VerifierSpec("forkrl.rewards.math:verify_math")}, memory_mb=64)


def test_a_verifier_that_breaks_between_two_starts_ends_the_batch(hostile: str, tmp_path: Path) -> None:
    module = tmp_path / "fickle.py"
    module.write_text("import os\n\n\ndef f(answer, response):\n    os.unlink(__file__)\n    os._exit(1)\n")
    with VerifierPool({"": VerifierSpec("fickle:f")}) as pool, pytest.raises(UserError, match="fickle"):
        pool.verify(items("a", "b"))


def test_time_to_start_is_not_the_items(hostile: str, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\n\ntime.sleep(1)\n\n\ndef f(answer, response):\n    return 1\n")
    with VerifierPool({"": VerifierSpec("slow:f")}, timeout_s=0.4) as pool:
        assert pool.verify(items("a", "b")) == [VerifierResult(1.0)] * 2


def test_a_worker_is_light_and_single_threaded(hostile: str, tmp_path: Path) -> None:
    (tmp_path / "inside.py").write_text(
        "import os, sys\nimport forkrl.rewards.math\n\n\n"
        "def f(answer, response):\n"
        "    return float('torch' not in sys.modules and os.environ['OMP_NUM_THREADS'] == '1')\n"
    )
    with VerifierPool({"": VerifierSpec("inside:f")}) as pool:
        assert pool.verify(items("")) == [VerifierResult(1.0)]


def test_a_worker_that_ends_by_itself_is_not_restarted_while_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mortal.py").write_text(
        f"""
import os, threading
def act(answer, response):
    return 1.0
def end():
    with open({str(tmp_path / "ended")!r}, "a") as file:
        file.write("x")
    os._exit(3)
threading.Timer(0.05, end).start()
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with VerifierPool({"": VerifierSpec("mortal:act")}, workers=2):
        time.sleep(1.5)
    assert len((tmp_path / "ended").read_text()) <= 4


def test_a_default_timeout_of_sockets_does_not_matter(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    socket.setdefaulttimeout(30)
    try:
        assert make_pool().verify(items("right")) == [VerifierResult(1.0)]
    finally:
        socket.setdefaulttimeout(None)
