"""``forkrl doctor``: what this machine can do, what is missing, and how to fix it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from forkrl.commands.other_options import DoctorOptions
from forkrl.config import SandboxConfig
from forkrl.errors import UserError, first_line
from forkrl.parallel.threads import available_cores

if TYPE_CHECKING:
    import torch

Status = Literal["ok", "warn", "missing"]

_GIB = 2**30
_BYTES_PER_PARAMETER = 16  # fp32 weight, gradient and two Adam moments
_SHARE_FOR_STATE = 0.7  # the rest is for activations and the KV cache
_EXTRAS = {
    "vllm": ("vllm", "fast rollouts on an accelerator"),
    "verl": ("verl", "training on a cluster"),
    "reasoning-gym": ("gym", "more tasks with verifiers"),
    "verifiers": ("environments", "tasks of several turns"),
    "gguf": ("models", "forkrl model: a pretrained model"),
    "tensorboard": ("tracking", "log.trackers"),
    "wandb": ("tracking", "log.trackers"),
    "trackio": ("tracking", "log.trackers"),
}


@dataclass(frozen=True, slots=True)
class Check:
    """``required``: ForkRL does not work without it."""

    name: str
    status: Status
    detail: str
    remedy: str = ""
    required: bool = False


def run_doctor(options: DoctorOptions | None = None) -> int:
    """Print every check and what it means; return 1 if something required is missing, else 0."""
    checks = report_machine()
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140  # the default of 80 folds most lines
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "what", "found", "remedy"):
        table.add_column(title, overflow="fold")
    marks = {"ok": "[green]ok[/green]", "warn": "[yellow]warn[/yellow]", "missing": "[red]missing[/red]"}
    optional = "[dim]not installed[/dim]"
    for check in checks:
        mark = marks[check.status] if check.required or check.status != "missing" else optional
        table.add_row(mark, check.name, escape(check.detail), escape(check.remedy))
    console.print(table)
    for sentence in abilities(checks):
        console.print(escape(sentence))
    return int(any(check.required and check.status == "missing" for check in checks))


def report_machine() -> list[Check]:
    """Check the interpreter, numeric libraries, hardware and optional packages. Takes a few seconds."""
    checks = [_check_python(), _check_torch(), _check_package("transformers")]
    if all(check.status != "missing" for check in checks[1:]):
        checks += [*_check_devices(), _check_speed(), _check_threads(), *_check_embedded_models(_assets())]
    return [*checks, _check_memory(), _check_disk(Path.cwd()), *map(_check_extra, _EXTRAS), _check_bubblewrap()]


def abilities(checks: Sequence[Check]) -> list[str]:
    broken = [check.name for check in checks if check.required and check.status == "missing"]
    if broken:
        return [f"ForkRL does not work here yet: fix {', '.join(broken)}."]
    sentences = ["This machine can run the embedded demo (make demo), which is made for two cores and five minutes."]
    where, memory = _training_memory()
    if memory:
        billions = memory * _SHARE_FOR_STATE / _BYTES_PER_PARAMETER / 1e9
        sentences.append(
            f"By arithmetic it can train models of up to {billions:.2g} billion parameters: fp32 weights, gradients "
            f"and Adam state take {_BYTES_PER_PARAMETER} bytes a parameter, which fills {_SHARE_FOR_STATE:.0%} of the "
            f"{memory / _GIB:.1f} GiB of {where} and leaves the rest to activations and the KV cache."
        )
    if where == "main memory":
        sentences.append("It has no accelerator that torch can use, so speed rather than memory will be the limit.")
    return sentences


def _check_python() -> Check:
    version = platform.python_version()
    fits = (3, 11) <= sys.version_info < (3, 14)
    remedy = "" if fits else "use Python 3.11, 3.12 or 3.13"
    return Check("python", "ok" if fits else "warn", f"{version} on {platform.platform(terse=True)}", remedy, True)


def _check_torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library does not load
        return Check("torch", "missing", first_line(error), f"pip install '{_tested('torch')}'", required=True)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU"
    return _check_version("torch", torch.__version__, f"{torch.__version__}, built for {build}")


def _check_package(name: str) -> Check:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "missing", "not installed", f"pip install '{_tested(name)}'", required=True)
    return _check_version(name, version, version)


def _check_version(name: str, version: str, detail: str) -> Check:
    tested = _tested(name)
    if tested.specifier.contains(version, prereleases=True):
        return Check(name, "ok", detail, required=True)
    return Check(name, "warn", f"{detail}; tested with {tested.specifier}", f"pip install '{tested}'", required=True)


def _tested(package: str) -> Requirement:
    declared = map(Requirement, importlib.metadata.requires("forkrl") or ())
    return next(each for each in declared if each.name == package and each.marker is None)


def _accelerator() -> torch.device | None:
    import torch

    return torch.accelerator.current_accelerator(check_available=True)


def _check_devices() -> list[Check]:
    import torch

    accelerator = _accelerator()
    if accelerator is not None and accelerator.type == "cuda":
        return [_check_cuda(index) for index in range(torch.cuda.device_count())]
    if accelerator is None and shutil.which("nvidia-smi") and not torch.version.cuda:
        detail = "CPU only, although there is an NVIDIA driver"
        return [Check("device", "warn", detail, "install a CUDA build of torch")]
    return [Check("device", "ok", "CPU only" if accelerator is None else accelerator.type)]


def _check_cuda(index: int) -> Check:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    # Emulated bf16 is slow: only hardware support counts.
    bf16 = properties.major >= 8 or torch.version.hip is not None
    detail = f"{properties.name}, {total / _GIB:.0f} GiB, {free / _GIB:.0f} free, bf16 {'yes' if bf16 else 'no'}"
    if not bf16:
        return Check(f"cuda:{index}", "warn", detail, "keep model.precision = fp32")
    if free < total / 2:
        return Check(f"cuda:{index}", "warn", detail, "another process holds much of its memory")
    return Check(f"cuda:{index}", "ok", detail)


def _check_speed() -> Check:
    """Time one matrix product in both precisions: bf16 is slower on many CPUs, much faster on most accelerators."""
    import torch

    device = _accelerator() or torch.device("cpu")
    fp32, bf16 = (_matmul_gflops(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    detail = f"{device.type} matrix product of 1024: fp32 {fp32:,.0f} GFLOP/s, bf16 {bf16:,.0f}"
    advice = "model.precision = bf16 pays here" if bf16 > 1.2 * fp32 else "keep model.precision = fp32"
    return Check("speed", "ok", f"{detail}; {advice}")


def _matmul_gflops(device: torch.device, dtype: torch.dtype, size: int = 1024, budget_s: float = 0.5) -> float:
    """The fastest product within the budget, the one least disturbed by other processes."""
    import torch

    left = torch.ones(size, size, device=device, dtype=dtype)
    float((left @ left)[0, 0])  # warm-up
    best, deadline = float("inf"), time.perf_counter() + budget_s
    while best == float("inf") or time.perf_counter() < deadline:
        began = time.perf_counter()
        float((left @ left)[0, 0])  # synchronises with the device
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e9


def _check_threads() -> Check:
    cores, policy = available_cores(), os.environ.get("OMP_WAIT_POLICY", "unset")
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    detail = f"{cores} cores, OMP_NUM_THREADS {threads}, OMP_WAIT_POLICY {policy}"
    if policy.upper() == "ACTIVE":
        return Check("threads", "warn", detail, "unset OMP_WAIT_POLICY: spinning threads crawl on a busy machine")
    return Check("threads", "ok", detail)


def _assets() -> Traversable:
    return resources.files("forkrl") / "assets"


def _check_embedded_models(assets: Traversable) -> list[Check]:
    remedy = "reinstall forkrl, or make the model: forkrl sft recipes/countdown-base.toml"
    folders = sorted((entry for entry in assets.iterdir() if entry.is_dir()), key=str) if assets.is_dir() else []
    folders = [folder for folder in folders if (folder / "config.json").is_file()]
    if not folders:
        return [Check("embedded model", "missing", "no model in the package", remedy, required=True)]
    return [_check_model(folder, remedy) for folder in folders]


def _check_model(folder: Traversable, remedy: str) -> Check:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = f"embedded:{folder.name}"
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # a damaged file can raise anything
        return Check(name, "missing", f"does not load: {first_line(error)}", remedy, required=True)
    detail = f"{model.num_parameters() / 1e6:.2f} million parameters, {len(tokenizer)} tokens, loads"
    return Check(name, "ok", detail, required=True)


def _available_memory() -> int:
    """Bytes of RAM available to a new process; 0 if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") if pages in os.sysconf_names else 0


def _training_memory() -> tuple[str, int]:
    """The training device and its memory in bytes."""
    import torch

    accelerator = _accelerator()
    if accelerator is not None and accelerator.type == "cuda":
        return torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
    return "main memory" if accelerator is None else "shared memory", _available_memory()


def _check_memory() -> Check:
    available = _available_memory()
    if not available:
        return Check("memory", "warn", "the system does not say how much is free")
    detail = f"{available / _GIB:.1f} GiB available"
    if available < 2 * _GIB:
        return Check("memory", "warn", detail, "the demo may not fit; close something")
    return Check("memory", "ok", detail)


def _check_disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    detail = f"{free / _GIB:.1f} GiB free in {folder}"
    if free < _GIB:
        return Check("disk", "warn", detail, "run folders contain checkpoints; free some space or use --out")
    return Check("disk", "ok", detail)


def _check_extra(package: str) -> Check:
    extra, purpose = _EXTRAS[package]
    try:
        return Check(package, "ok", f"{importlib.metadata.version(package)}: {purpose}")
    except importlib.metadata.PackageNotFoundError:
        return Check(package, "missing", f"optional: {purpose}", f"pip install 'forkrl[{extra}]'")


def _check_bubblewrap() -> Check:
    """Run it: bubblewrap may be installed but forbidden, as in most containers."""
    from forkrl.rewards.code.sandbox import require_sandbox

    found = shutil.which("bwrap")
    try:
        require_sandbox(SandboxConfig())
    except UserError as error:
        detail, _, remedy = str(error).partition(": ") if found is None else str(error).rpartition("; ")
        return Check("bubblewrap", "missing", f'optional: task.verifier = "code"; {detail}', remedy)
    return Check("bubblewrap", "ok", f'{found} runs programs: task.verifier = "code"')
