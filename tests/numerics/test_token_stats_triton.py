"""The Triton kernels against the definition in fp64: in Triton's interpreter, or compiled where there is a CUDA device.

What they share with the other backends is tested in test_token_stats.py; here is what depends on how they cut a
problem, and that they compile for cards that are not here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from forkrl.errors import UserError
from forkrl.head import token_stats
from forkrl.types import TokenStats
from tests.numerics.test_token_stats import DEVICE, TOLERANCE, assert_errs_no_more_than_naive, make_problem

backend = pytest.importorskip("forkrl.head.triton")
# Rows beyond the edge are computed with what lies at hand, and never stored.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton")
on_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three splits of several tiles each in the forward, and slices of one or two tiles in the backward."""
    monkeypatch.setattr(backend, "NUM_PROGRAMS", 1)
    monkeypatch.setattr(backend, "MIN_SPLITS", 3)
    monkeypatch.setattr(backend, "BUFFER_BYTES", 4000)
    monkeypatch.setattr(backend, "SLICE_COLUMNS", 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_rows", "vocabulary", "width"), [(1, 7, 3), (37, 5, 16), (20, 129, 33), (1, 1, 4)])
@pytest.mark.parametrize(("temperature", "entropy_grad"), [(1.0, False), (0.6, True)])
def test_errs_no_more_than_naive(
    num_rows: int, vocabulary: int, width: int, temperature: float, dtype: torch.dtype, entropy_grad: bool
) -> None:
    problem = make_problem(num_rows, vocabulary, width, dtype)
    assert_errs_no_more_than_naive(
        problem, dtype, "triton", temperature=temperature, entropy_grad=entropy_grad, tolerance=TOLERANCE[dtype]
    )


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [64, 193, 300])
def test_splits_and_slices_change_nothing(vocabulary: int, dtype: torch.dtype) -> None:
    problem = make_problem(23, vocabulary, 6, dtype)
    assert_errs_no_more_than_naive(
        problem, dtype, "triton", temperature=0.8, entropy_grad=True, tolerance=TOLERANCE[dtype]
    )


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_each_tile_may_exceed_those_before(offset: float) -> None:
    """Within a split as across splits: the bias makes each tile larger, or smaller, than the one before."""
    problem = make_problem(11, 300, 6, torch.float32)._replace(bias=torch.linspace(0, offset, 300, device=DEVICE))
    assert_errs_no_more_than_naive(problem, torch.float32, "triton", temperature=0.7, entropy_grad=True, tolerance=2e-5)


def test_more_row_blocks_than_one_group() -> None:
    """Blocks of rows are numbered in groups of sixteen; the last group is smaller."""
    problem = make_problem(35 * backend.INTERPRETER_TILE.rows - 1, 70, 4, torch.float32)
    assert_errs_no_more_than_naive(
        problem, torch.float32, "triton", temperature=1.0, entropy_grad=False, tolerance=TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize(("num_rows", "vocabulary"), [(1, 151936), (1638, 151936), (8192, 151936), (1000000, 151936)])
def test_what_a_backward_holds_is_bounded(num_rows: int, vocabulary: int) -> None:
    width = backend._slice_width(num_rows, vocabulary, 2)
    assert width == vocabulary or width % backend.SLICE_COLUMNS == 0
    held = 2 * num_rows * width
    assert held <= max(backend.BUFFER_FLOOR, 0.07 * 2 * num_rows * vocabulary)
    assert held <= backend.BUFFER_BYTES or held <= 0.007 * 2 * num_rows * vocabulary


def test_fp64_is_refused() -> None:
    problem = make_problem(3, 7, 4, torch.float64)
    with pytest.raises(ValueError, match='"triton" has no fp64; "chunked" and "reference" do'):
        token_stats(problem.hidden, problem.weight, problem.targets, backend="triton")


def broken(function: Callable[..., Any], fault: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *args: fault(function(*args))


def failing(*_: object) -> None:
    raise RuntimeError("PassManager::run failed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("part", "fault", "message"),
    [
        ("_combine_splits", lambda found: found._replace(logprobs=found.logprobs - 0.05), "log-probs and entropies"),
        ("_combine_splits", lambda found: found._replace(entropy=found.entropy * float("nan")), "nan in log-probs"),
        ("_grad_logits", lambda grad: grad * 1.5, "in gradients"),
        ("_grad_logits", failing, "RuntimeError: PassManager::run failed"),
    ],
    ids=["log-prob", "entropy", "gradient", "does not compile"],
)
def test_kernels_that_fail_or_deviate_are_an_error_that_names_the_remedy(
    part: str, fault: Callable[[Any], Any], message: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem(5, 50, 8, dtype)

    def run() -> TokenStats:
        return token_stats(problem.hidden, problem.weight, problem.targets, bias=problem.bias, backend="triton")

    monkeypatch.setattr(backend, "_checked", set())
    with monkeypatch.context() as patch:
        patch.setattr(backend, part, broken(getattr(backend, part), fault))
        for _ in range(2):  # a failed check is repeated
            with pytest.raises(UserError, match=message) as raised:
                run()
            assert "model.head=chunked" in str(raised.value) and "\n" not in str(raised.value)
    run()
    assert len(backend._checked) == 1
    monkeypatch.setattr(backend, "_probe", failing)
    run()  # checked once per process


def test_the_check_of_the_kernels_skips_rows_without_finite_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_checked", set())
    problem = make_problem(5, 50, 8, torch.float32)
    hidden = problem.hidden.clone()
    hidden[0] = torch.nan
    for rows, checked in ((hidden[:0], 0), (hidden[:1], 0), (hidden, 1)):
        stats = token_stats(rows, problem.weight, problem.targets[: len(rows)], backend="triton")
        assert stats.entropy.isnan().sum() == min(1, len(rows)) and len(backend._checked) == checked


MACHINE = """
import sys, torch
{before}
from forkrl.head import token_stats
inputs = torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(3, dtype=torch.int64)
token_stats(*inputs)
print(sys.modules.get("triton"))
token_stats(*inputs, backend="triton")
"""


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (
            "sys.modules['triton'] = None",
            'ModuleNotFoundError: backend = "triton" needs the triton package: pip install',
        ),
        (
            "",
            'ValueError: backend = "triton" runs on a CUDA device; the tensors are on cpu. Use "chunked"',
        ),
    ],
    ids=["not installed", "no device"],
)
def test_triton_is_imported_only_when_asked_for_and_says_what_it_lacks(before: str, message: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", MACHINE.format(before=before)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.stdout == "None\n" and message in ended.stderr.splitlines()[-1]


def test_kernels_compile_for_cards_that_are_not_here(tmp_path: Path) -> None:
    """A card of compute capability 8.6 has 99 KiB of shared memory; Hopper's matrix units are used where they are."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.compile_kernels"]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    cases = [json.loads(line) for line in output.splitlines()]
    assert len(cases) == 10
    for case in cases:
        assert case["shared"] <= (113 if case["capability"] == 90 else 99) * 1024, case
        assert case["wgmma"] == (case["capability"] == 90), case


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("num_rows", "vocabulary", "width"), [(1000, 151936, 1024), (129, 50257, 1000), (4096, 32000, 64)]
)
def test_real_sizes_on_a_device(num_rows: int, vocabulary: int, width: int, dtype: torch.dtype) -> None:
    problem = make_problem(num_rows, vocabulary, width, dtype)
    for entropy_grad in (False, True):
        assert_errs_no_more_than_naive(
            problem, dtype, "triton", temperature=0.7, entropy_grad=entropy_grad, tolerance=TOLERANCE[dtype]
        )


@pytest.mark.gpu
@on_cuda
def test_memory_on_a_device_is_a_small_share_of_the_logits() -> None:
    num_rows, vocabulary, width = 8192, 151936, 512
    problem = make_problem(num_rows, vocabulary, width, torch.bfloat16)
    hidden, weight = problem.hidden.requires_grad_(), problem.weight.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logprobs = token_stats(hidden, weight, problem.targets, temperature=0.7).logprobs  # "auto" is "triton" here
    logprobs[::5].sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    gradients = 2 * (hidden.grad.numel() + weight.grad.numel())
    assert torch.cuda.max_memory_allocated() - before - gradients < 0.05 * 2 * num_rows * vocabulary
