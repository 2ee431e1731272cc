"""Fast token statistics against the definition in fp64, forward and backward, and what they may cost.

A fast path may err at most a tolerance beyond what the naive version errs in the same dtype. What only the Triton
kernels have is in test_token_stats_triton.py.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from forkrl import head
from forkrl.head import chunked, token_stats
from forkrl.types import TokenStats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_TRITON = importlib.util.find_spec("triton") is None
TRITON = pytest.param("triton", marks=pytest.mark.skipif(NO_TRITON, reason="Triton is not installed"))
FAST_BACKENDS = ["chunked", TRITON]
ALL_BACKENDS = ["reference", *FAST_BACKENDS]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 5e-4}


class Problem(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers as leaves of another dtype."""
        floats = [t.detach().to(dtype).requires_grad_() for t in (self.hidden, self.weight, self.bias)]
        return Problem(floats[0], floats[1], self.targets, floats[2])


class Results(NamedTuple):
    logprobs: Tensor
    entropy: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


def make_problem(num_rows: int, vocabulary: int, width: int, dtype: torch.dtype, scale: float = 3.0) -> Problem:
    """Rows between almost decided and wide open; numbers exactly representable in ``dtype``."""
    generator = torch.Generator().manual_seed(num_rows + vocabulary)
    hidden = torch.randn(num_rows, width, generator=generator) * torch.linspace(0.1, 1, num_rows)[:, None]
    weight = scale * torch.randn(vocabulary, width, generator=generator) / width**0.5
    targets = torch.randint(vocabulary, (num_rows,), generator=generator)
    bias = torch.randn(vocabulary, generator=generator)
    return Problem(hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), targets.to(DEVICE), bias.to(DEVICE, dtype))


def run(problem: Problem, backend: str, temperature: float, entropy_grad: bool) -> Results:
    stats = token_stats(
        problem.hidden,
        problem.weight,
        problem.targets,
        temperature=temperature,
        bias=problem.bias,
        backend=backend,
        entropy_grad=entropy_grad,
    )
    factors = torch.linspace(-1, 2, len(problem.targets), dtype=stats.logprobs.dtype, device=DEVICE)
    loss = (stats.logprobs * factors).sum()
    if entropy_grad:
        loss = loss + (stats.entropy * factors.flip(0)).sum()
    loss.backward()
    grads = [leaf.grad for leaf in (problem.hidden, problem.weight, problem.bias)]
    assert grads[0] is not None and grads[1] is not None and grads[2] is not None
    assert [grad.dtype for grad in grads if grad is not None] == [problem.hidden.dtype] * 3
    return Results(stats.logprobs.detach(), stats.entropy.detach(), grads[0], grads[1], grads[2])


def relative_error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm().clamp(min=1e-12))


def assert_errs_no_more_than_naive(
    problem: Problem,
    dtype: torch.dtype,
    backend: str,
    *,
    temperature: float,
    entropy_grad: bool,
    tolerance: float,
) -> None:
    truth = run(problem.to(torch.float64), "reference", temperature, entropy_grad)
    naive = run(problem.to(dtype), "reference", temperature, entropy_grad)
    found = run(problem.to(dtype), backend, temperature, entropy_grad)
    assert found.logprobs.dtype == found.entropy.dtype == torch.promote_types(dtype, torch.float32)
    assert (found.logprobs <= 0).all() and (found.entropy >= 0).all()
    for name in Results._fields:
        error, allowed = (relative_error(getattr(r, name), getattr(truth, name)) for r in (found, naive))
        assert error <= allowed + tolerance, f"{name}: {error:.2e} against {allowed:.2e} of the naive version"


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that cut small problems several times both ways, with ragged ends."""
    monkeypatch.setattr(chunked, "TILE_ELEMENTS_CPU", 150)
    monkeypatch.setattr(chunked, "TILE_COLUMNS", 60)


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("num_rows", "vocabulary", "width"),
    [(1, 7, 3), (37, 7, 5), (301, 29, 33), (65, 1000, 17), (1, 1, 4), (13, 50257, 19), (7, 151936, 17)],
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_errs_no_more_than_naive(
    num_rows: int, vocabulary: int, width: int, temperature: float, dtype: torch.dtype, entropy_grad: bool
) -> None:
    problem = make_problem(num_rows, vocabulary, width, dtype)
    assert_errs_no_more_than_naive(
        problem, dtype, "chunked", temperature=temperature, entropy_grad=entropy_grad, tolerance=TOLERANCE[dtype]
    )


def test_large_vocabulary_keeps_digits() -> None:
    """Summed term by term, 150,000 small terms after a large one cost the naive gradient ten times the digits."""
    problem = make_problem(7, 151936, 5, torch.float32)
    truth = run(problem.to(torch.float64), "reference", 0.6, False)
    found = run(problem.to(torch.float32), "chunked", 0.6, False)
    assert relative_error(found.grad_hidden, truth.grad_hidden) < 5e-6


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [7, 60, 61, 259])
def test_ragged_tiles_change_nothing(vocabulary: int, dtype: torch.dtype) -> None:
    problem = make_problem(23, vocabulary, 6, dtype)
    tolerance = TOLERANCE.get(dtype, 1e-13)
    assert_errs_no_more_than_naive(problem, dtype, "chunked", temperature=0.8, entropy_grad=True, tolerance=tolerance)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_online_maximum_survives_large_logits(offset: float, backend: str, small_tiles: None) -> None:
    """Without a running maximum exp overflows; the bias makes each later tile larger, or smaller, than those before."""
    problem = make_problem(11, 200, 6, torch.float32)._replace(bias=torch.linspace(0, offset, 200, device=DEVICE))
    assert_errs_no_more_than_naive(problem, torch.float32, backend, temperature=1.0, entropy_grad=True, tolerance=2e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_large_logits_keep_their_digits(backend: str, entropy_grad: bool) -> None:
    """Logits near 640, exact in fp32; a largest logit and the logarithm of a sum, added, would round it to 2^-14."""
    problem = make_problem(11, 200, 1, torch.float32)
    hidden, weight = torch.full((11, 1), 64.0), (640 + 2 * problem.weight.detach()) // 2**-10 * 2**-16
    problem = problem._replace(hidden=hidden, weight=weight, bias=torch.zeros(200))
    assert_errs_no_more_than_naive(
        problem, torch.float32, backend, temperature=1.0, entropy_grad=entropy_grad, tolerance=1e-5
    )


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_gradcheck(backend: str, entropy_grad: bool, small_tiles: None) -> None:
    hidden, weight, targets, bias = make_problem(5, 130, 3, torch.float64).to(torch.float64)

    def outputs(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        stats = token_stats(
            hidden, weight, targets, bias=bias, temperature=0.7, backend=backend, entropy_grad=entropy_grad
        )
        return (stats.logprobs, stats.entropy) if entropy_grad else stats.logprobs

    assert torch.autograd.gradcheck(outputs, (hidden, weight, bias))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_hand_worked_distribution(backend: str) -> None:
    """p = (1/2, 1/4, 1/4): log-prob ln 1/4 and entropy 1.5 ln 2; squared and normalised at temperature 1/2."""
    hidden, weight = torch.ones(1, 1, device=DEVICE), torch.tensor([[0.5], [0.25], [0.25]], device=DEVICE).log()
    stats = token_stats(hidden, weight, torch.tensor([1], device=DEVICE), backend=backend)
    torch.testing.assert_close(stats.logprobs.cpu(), torch.tensor([0.25]).log())
    torch.testing.assert_close(stats.entropy.cpu(), 1.5 * torch.tensor([2.0]).log())
    sharper = torch.tensor([4 / 6, 1 / 6, 1 / 6])
    stats = token_stats(hidden, weight, torch.tensor([0], device=DEVICE), temperature=0.5, backend=backend)
    torch.testing.assert_close(stats.logprobs.cpu(), sharper[:1].log())
    torch.testing.assert_close(stats.entropy.cpu(), -(sharper * sharper.log()).sum()[None])


@pytest.mark.parametrize("backend", ["auto", *ALL_BACKENDS])
def test_entropy_bounds_and_gradient_flags(backend: str) -> None:
    """A decided row has entropy 0, not -1e-9; a uniform one ln V; neither carries gradient unless asked."""
    hidden = torch.tensor([[200.0], [0.0]], device=DEVICE)
    weight = torch.arange(50.0, device=DEVICE)[:, None].requires_grad_()
    targets = torch.tensor([49, 3], device=DEVICE)
    stats = token_stats(hidden, weight, targets, backend=backend)
    assert stats.entropy[0] == 0 and stats.entropy.tolist()[1] == pytest.approx(torch.tensor(50.0).log().item())
    assert stats.logprobs.requires_grad and not stats.entropy.requires_grad
    assert token_stats(hidden, weight, targets, backend=backend, entropy_grad=True).entropy.requires_grad
    with torch.no_grad():
        assert not token_stats(hidden, weight, targets, backend=backend).logprobs.requires_grad


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_nan_among_dead_rows_reaches_nothing(backend: str) -> None:
    """Rows without gradient are not computed: zero times NaN would be NaN in the gradient of the weight."""
    problem = make_problem(40, 29, 8, torch.float32)
    live = torch.arange(40, device=DEVICE) % 5 == 0
    clean = problem.to(torch.float32)
    stats = token_stats(clean.hidden[live], clean.weight, clean.targets[live], bias=clean.bias, backend=backend)
    stats.logprobs.sum().backward()

    poisoned = problem._replace(hidden=torch.where(live[:, None], problem.hidden, torch.nan)).to(torch.float32)
    stats = token_stats(poisoned.hidden, poisoned.weight, poisoned.targets, bias=poisoned.bias, backend=backend)
    assert stats.logprobs.isnan().tolist() == stats.entropy.isnan().tolist() == (~live).tolist()
    torch.where(live, stats.logprobs, 0.0).sum().backward()
    assert poisoned.hidden.grad is not None and (poisoned.hidden.grad[~live] == 0).all()
    for found, expected in zip((poisoned.hidden, poisoned.weight, poisoned.bias), clean[:2] + clean[3:], strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize(("vocabulary", "computed"), [(29, 0), (8200, 2 * 8)], ids=["one tile is kept", "two slices"])
def test_backward_computes_only_live_rows(vocabulary: int, computed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(40, vocabulary, 8, torch.float32).to(torch.float32)
    stats = token_stats(problem.hidden, problem.weight, problem.targets, backend="chunked")
    rows_computed = []
    tile = chunked._logits_tile

    def counting_tile(hidden: Tensor, *rest: object) -> Tensor:
        rows_computed.append(len(hidden))
        return tile(hidden, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(chunked, "_logits_tile", counting_tile)
    stats.logprobs[::5].sum().backward()
    assert sum(rows_computed) == computed


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_no_live_row_gives_zero_gradients(backend: str) -> None:
    problem = make_problem(6, 29, 4, torch.float32).to(torch.float32)
    (token_stats(problem.hidden, problem.weight, problem.targets, backend=backend).logprobs * 0).sum().backward()
    assert problem.hidden.grad is not None and not problem.hidden.grad.any()
    assert problem.weight.grad is not None and not problem.weight.grad.any()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_nan_gradient_is_not_hidden(backend: str) -> None:
    problem = make_problem(6, 29, 4, torch.float32).to(torch.float32)
    one_bad = torch.tensor([0, 0, torch.nan, 0, 0, 0], device=DEVICE)
    token_stats(problem.hidden, problem.weight, problem.targets, backend=backend).logprobs.backward(one_bad)
    assert problem.hidden.grad is not None
    assert torch.equal(problem.hidden.grad.isnan().any(1), one_bad.isnan())


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs_get_no_gradient(frozen: str, backend: str) -> None:
    problem = make_problem(6, 29, 4, torch.float32).to(torch.float32)
    getattr(problem, frozen).requires_grad_(False)
    token_stats(problem.hidden, problem.weight, problem.targets, backend=backend).logprobs.sum().backward()
    grads = {"hidden": problem.hidden.grad, "weight": problem.weight.grad}
    assert [name for name, grad in grads.items() if grad is None] == [frozen]


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_no_rows(backend: str) -> None:
    weight = torch.randn(29, 4, device=DEVICE, requires_grad=True)
    hidden = torch.empty(0, 4, device=DEVICE, requires_grad=True)
    targets = torch.empty(0, dtype=torch.int64, device=DEVICE)
    stats = token_stats(hidden, weight, targets, backend=backend)
    assert stats.logprobs.shape == stats.entropy.shape == (0,)
    stats.logprobs.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_graph_may_be_walked_twice(backend: str) -> None:
    problem = make_problem(6, 29, 4, torch.float32).to(torch.float32)
    total = token_stats(problem.hidden, problem.weight, problem.targets, backend=backend).logprobs.sum()
    first, second = (torch.autograd.grad(total, problem.hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_inputs_need_not_be_contiguous(backend: str) -> None:
    plain = make_problem(9, 29, 4, torch.float32).to(torch.float32)
    # Every other row and column of something larger, and a weight that is stored the other way round.
    hidden = plain.hidden.detach().repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2].requires_grad_()
    weight = plain.weight.detach().T.contiguous().T.requires_grad_()
    targets = plain.targets.repeat_interleave(2)[::2]
    for problem in (plain, Problem(hidden, weight, targets, plain.bias)):
        stats = token_stats(problem.hidden, problem.weight, problem.targets, bias=problem.bias, backend=backend)
        stats.logprobs.sum().backward()
    torch.testing.assert_close(hidden.grad, plain.hidden.grad)
    torch.testing.assert_close(weight.grad, plain.weight.grad)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_autocast_is_that_of_the_models_own_head(backend: str) -> None:
    problem = make_problem(20, 29, 16, torch.float32).to(torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        own_logits = torch.nn.functional.linear(problem.hidden, problem.weight)
        stats = token_stats(problem.hidden, problem.weight, problem.targets, backend=backend)
        stats.logprobs.sum().backward()
    own = own_logits.float().log_softmax(-1).gather(1, problem.targets[:, None]).squeeze(1)
    tolerance = 3e-2 if backend == "triton" else 1e-5  # it does not round the logits
    torch.testing.assert_close(stats.logprobs, own, atol=tolerance, rtol=tolerance)
    assert own_logits.dtype == torch.bfloat16 and stats.entropy.dtype == torch.float32
    assert problem.weight.grad is not None and problem.weight.grad.dtype == torch.float32


PEAK_MEMORY = """
import resource, sys, torch
from forkrl.head import token_stats
num_rows, vocabulary = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
hidden = torch.randn(num_rows, 16, requires_grad=True)
weight = torch.randn(vocabulary, 16, requires_grad=True)
targets = torch.randint(vocabulary, (num_rows,))
token_stats(hidden[:8], weight[:99], targets[:8] % 99).logprobs.sum().backward()  # libraries loaded, threads started
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
stats = token_stats(hidden, weight, targets, entropy_grad=True)
(stats.logprobs * torch.linspace(1, 2, num_rows) + stats.entropy).sum().backward()
assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024))
"""


def test_peak_memory_is_independent_of_rows_times_vocabulary() -> None:
    """2.5 GB of logits (and as much again for each softmax) pass through a few tiles of 4 MB."""
    command = [sys.executable, "-c", PEAK_MEMORY, "4096", "151936"]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout)
    assert grown < 100e6, f"peak memory grew by {grown / 1e6:.0f} MB"


def _call(**changes: object) -> TokenStats:
    arguments: dict[str, object] = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(7, 4),
        "targets": torch.zeros(3, dtype=torch.int64),
    }
    return token_stats(**(arguments | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(3, 5)}, r"hidden \(3, 5\) and weight \(7, 4\)"),
        ({"hidden": torch.zeros(1, 3, 4)}, r"must be \[N, D\] and \[V, D\]"),
        ({"weight": torch.zeros(0, 4)}, "no rows"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, r"targets \(2,\) must be \[N\]"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, r"torch.int32; they must be torch.int64"),
        ({"targets": torch.tensor([0, 7, 1])}, "targets span 0 to 7; the vocabulary is 0 to 6"),
        ({"targets": torch.tensor([0, -100, 1])}, "targets span -100 to 1"),
        ({"bias": torch.zeros(4)}, r"bias \(4,\) must be \[V\] with V = 7 rows"),
        ({"weight": torch.zeros(7, 4, dtype=torch.bfloat16)}, "share one floating dtype"),
        ({"hidden": torch.zeros(3, 4).long(), "weight": torch.zeros(7, 4).long()}, "share one floating dtype"),
        ({"temperature": 0.0}, "temperature = 0.0 must be positive"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"backend": "chunky"}, r"'chunky' is unknown; choose one of \['auto', 'reference', "),
    ],
)
def test_bad_input_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _call(**changes)


@pytest.mark.parametrize("name", ["hidden", "weight", "targets", "bias"])
def test_what_is_no_tensor_is_named(name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name}: torch tensor expected, got list"):
        _call(**{name: [0.0]})


def test_triton_is_chosen_for_16_bit_tensors_on_cards_that_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(dtype: torch.dtype, capability: tuple[int, int], has_triton: bool = True, is_cuda: bool = True) -> str:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(head, "_has_triton", lambda: has_triton)
        return head._choose_backend(SimpleNamespace(is_cuda=is_cuda, dtype=dtype, device="cuda:0"))  # type: ignore[arg-type]

    assert chosen(torch.bfloat16, (8, 0)) == chosen(torch.float16, (9, 0)) == "triton"
    others = (
        (torch.float32, (9, 0)),
        (torch.bfloat16, (7, 5)),
        (torch.bfloat16, (9, 0), False),
        (torch.bfloat16, (9, 0), True, False),
    )
    assert {chosen(*each) for each in others} == {"chunked"}


@pytest.mark.parametrize("num_rows", [0, 1, 700, 20_000, 10**6])
def test_tiles_stay_within_the_budget(num_rows: int) -> None:
    rows, columns = chunked._tile_shape(num_rows, 151_936, torch.device("cpu"), 512)
    assert type(rows) is type(columns) is int
    assert 512 <= columns <= chunked.TILE_COLUMNS and 1 <= rows <= max(1, num_rows)
    assert rows * columns <= chunked.TILE_ELEMENTS_CPU < chunked.TILE_ELEMENTS
