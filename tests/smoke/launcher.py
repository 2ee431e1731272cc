"""Runs ``forkrl`` commands as processes of their own, without paying for ``import torch`` each time.

``python -m tests.smoke.launcher`` imports everything once and then forks a child for every request, so that each
command has its own signals, threads, random states, file descriptors and exit code, and can be killed.

Requests are JSON lines on standard input, one answer each on standard output: ``{"argv": […], …}`` starts a command and
answers with its process id, ``{"wait": PID}`` answers with its exit status once it has ended, with null before.
``{"test": [module, name], "arguments": {…}, …}`` starts the body of a test instead (``tests/elsewhere.py``).

With ``--accelerator`` every child has the pretend accelerator.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

# Where a fault can strike: the calls that make up a run, each counted over the whole command.
POINTS = {
    "token": "forkrl.rollout.embedded:sample_tokens",
    "reward": "forkrl.rollout.scoring:Scoring.finish",
    "gradient": "torch:Tensor.backward",
    "optimizer": "torch.optim:AdamW.step",
    "eval": "forkrl.training.run:sample_and_score",
    "setting": "forkrl.commands.decode_temps:sample_and_score",
    "response": "forkrl.evaluation.folder:BenchmarkFiles.add_response",
    "result": "forkrl.evaluation.folder:BenchmarkFiles.add_result",
    "log": "forkrl.store.run_folder:RunFolder.append_metrics",
    "sample": "forkrl.store.run_folder:RunFolder.write_rollouts",
    "save": "forkrl.training.run:save_checkpoint",
    "rename": "os:rename",
    "replace": "os:replace",
    "unlink": "os:unlink",
    "rmtree": "shutil:rmtree",
    "sync": "os:fsync",
}
_WARM = (
    "torch.optim", "matplotlib.figure", "transformers.models.qwen3.modeling_qwen3", "forkrl.training.loop",
    "forkrl.training.open_run", "forkrl.report", "forkrl.commands.evaluate", "forkrl.commands.branch",
    "forkrl.commands.decode_temps", "datasets", "forkrl.cli",
)  # fmt: skip
_opened: list[Any] = []
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 0x40000


def main() -> None:
    for name in _WARM:
        importlib.import_module(name)
    if "--accelerator" in sys.argv:
        importlib.import_module("tests.pretend_accelerator").install()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            answer: int | None = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                _run_child(request)
        print(json.dumps(answer), flush=True)
    os._exit(0)  # nothing here needs an orderly end, which takes torch a while


def _run_child(request: dict[str, Any]) -> NoReturn:
    """Become the command: its own standard streams, folder and environment; end with its exit code."""
    code = 70  # of a bug
    try:
        os.chdir(request["cwd"])
        os.environ.update(request.get("environment", {}))
        os.dup2(os.open(request.get("stdin", os.devnull), os.O_RDONLY), 0)
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(file, descriptor)
        sys.path.insert(0, request["cwd"])
        if disk := request.get("disk"):
            _mount_small_disk(disk)
        if request.get("without_report"):
            _leave_report_out()
        for fault in request.get("faults", ()):
            _arrange(**fault)
        code = _run_test(request) if "test" in request else _run_command(request["argv"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        if disk := request.get("disk"):
            shutil.copytree(disk["at"], disk["copy"], dirs_exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run_command(argv: list[str]) -> int:
    from forkrl.cli import main as command

    sys.argv = ["forkrl", *argv]
    return command(argv)


def _run_test(request: dict[str, Any]) -> int:
    module, name = request["test"]
    getattr(importlib.import_module(module), name).body(**request["arguments"])
    return 0


def _arrange(point: str, count: int, signal: int | None = None, action: str = "", after: bool = False) -> None:
    """Make the ``count``-th call at a point send this process a signal, before or after it does its work.

    ``point = "anywhere"`` counts Python calls of whatever kind. ``action = "poison"`` makes the weights NaN instead.
    """

    if action == "poison":
        _remember_opened_policies()

    def strike() -> None:
        if action == "poison":
            _poison_weights()
        else:
            assert signal is not None
            os.kill(os.getpid(), signal)

    if point == "anywhere":
        _strike_anywhere(count, strike)
        return
    module, _, path = POINTS[point].partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, name, _striking(getattr(owner, name), count, strike, after))


def _striking(function: Callable[..., Any], count: int, strike: Callable[[], None], after: bool) -> Callable[..., Any]:
    calls = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        due = calls == count
        if due and not after:
            strike()
        result = function(*args, **kwargs)
        if due and after:
            strike()
        return result

    return wrapper


def _strike_anywhere(count: int, strike: Callable[[], None]) -> None:
    """Strike at the ``count``-th call since training began; with 0, write at its end how many there were."""
    loop: Any = importlib.import_module("forkrl.training.loop")
    train = loop.train
    calls = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        if event in ("call", "c_call"):
            calls += 1
            if calls == count:
                strike()

    def counted(*args: Any) -> None:
        sys.setprofile(profile)
        try:
            train(*args)
        finally:
            sys.setprofile(None)
            Path("calls").write_text(str(calls))

    loop.train = counted


def _leave_report_out() -> None:
    """Drawing costs more than the tiny training that it draws."""
    report: Any = importlib.import_module("forkrl.report")
    report.write_run_report = lambda folder: folder / "report.html"
    page: Any = importlib.import_module("forkrl.report.page")
    page.write_page = lambda path, _: path


def _remember_opened_policies() -> None:
    run: Any = importlib.import_module("forkrl.training.open_run")
    evaluation: Any = importlib.import_module("forkrl.commands.session")
    open_policy = run.open_policy

    def remembering(*args: Any) -> Any:
        _opened.append(open_policy(*args))
        return _opened[-1]

    run.open_policy = evaluation.open_policy = remembering


def _poison_weights() -> None:
    """NaN in the model that is trained, as a diverged step would leave it."""
    for policy in _opened:
        next(policy.model.parameters()).data.fill_(float("nan"))  # behind the back of autograd


def _mount_small_disk(disk: dict[str, Any]) -> None:
    """A tmpfs of so many bytes that only this process sees."""
    library = ctypes.CDLL(None, use_errno=True)
    Path(disk["at"]).mkdir(parents=True, exist_ok=True)
    options = f"size={disk['size']}".encode()
    if (
        library.unshare(_CLONE_NEWNS)
        or library.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
        or library.mount(b"tmpfs", disk["at"].encode(), b"tmpfs", 0, options)
    ):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
