"""Worker processes that share a small model's weights and divide its work among CPU cores (docs/threads.md).

All map one block of shared memory and so see the optimizer's step at once. Gradients are summed in a fixed order, so
runs are bit-reproducible.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle  # noqa: TID251 - only over a socket between this process and the ones it started, never from a file
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import chain
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from forkrl.errors import UserError, WorkerLost
from forkrl.model.policy import Policy
from forkrl.parallel.processes import Child, child_environment
from forkrl.parallel.threads import configure_threads
from forkrl.types import Counts

if TYPE_CHECKING:  # avoids importing pydantic
    from forkrl.config import RuntimeConfig

Item = TypeVar("Item")
Result = TypeVar("Result")

_ALIGNMENT = 64
SMALL_MODEL_PARAMETERS = 50_000_000
"""In larger models, matrix products are long enough to gain from several threads."""


class Worker(NamedTuple):
    """First argument of a function that runs on a worker."""

    policy: Policy
    reference: Policy | None
    counters: Tensor
    """Its ``Counts``."""
    kept: dict[int, Any]
    """State that one function leaves in this process for a later one, by item index."""

    def add_counts(self, **more: int) -> None:
        """Add to the ``Counts`` of these names."""
        self.counters.add_(torch.tensor(Counts(**more)))


class SharedWeights(NamedTuple):
    """Weights in a block of memory: its file, and dtype, shape and first byte of each by name."""

    fd: int
    placed: Mapping[str, tuple[torch.dtype, tuple[int, ...], int]]

    def map(self) -> dict[str, Tensor]:
        """The weights in this process; valid after the file is closed."""
        memory = mmap.mmap(self.fd, 0)
        return {
            name: torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=start).view(shape)
            for name, (dtype, shape, start) in self.placed.items()
        }


class Workers:
    """The policy in this process and in ``count - 1`` others (CPU only), with its parameters in shared memory."""

    def __init__(self, policy: Policy, reference: Policy | None = None, *, count: int = 1, threads: int = 1) -> None:
        self._counters = torch.zeros(count, len(Counts._fields), dtype=torch.int64)
        self.local = Worker(policy, reference, self._counters[0], {})
        self.count = count
        self._children: list[Child] = []
        self._gradients: list[list[Tensor]] = []
        self._memory: _SharedMemory | None = None
        self._closed = False
        self.closing = ExitStack()
        """Closed with the workers; for what uses their weights."""
        if count > 1:
            try:
                self._start(threads)
            except BaseException:
                self.close()
                raise

    @property
    def policy(self) -> Policy:
        return self.local.policy

    @property
    def sequences_finished(self) -> int:
        """Sequences sampled or measured by all workers so far; grows while they work."""
        return int(self._counters[:, 0].sum())

    @property
    def counts(self) -> Counts:
        """The mean over workers so far."""
        return Counts(*self._counters.double().mean(0).tolist())

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._closed = True
        self.closing.close()
        for child in self._children:
            child.close()
        self._children = []

    def share_weights(self) -> SharedWeights:
        """The policy's weights where another process can map them (CPU only); moves them there if need be.

        Raises UserError if there is no memory for that.
        """
        if self._memory is None:
            self._memory = self._open_memory(others=0)
            self._memory.adopt_weights(self.local, fill=True)
        return self._memory.weights(self.policy)

    def map(
        self,
        function: Callable[..., Result],
        items: Sequence[Item],
        *arguments: Any,
        sizes: Sequence[int] | None = None,
    ) -> list[Result]:
        """``function(worker, item, *arguments)`` for every item, in order; ``sizes`` is the work per item."""
        if self.count > 1 and function.__module__ == "__main__":
            raise ValueError(f"{function.__name__} is defined in the program itself; move it to a module")
        if self._closed:
            raise RuntimeError("these workers are closed")
        shares = divide([1] * len(items) if sizes is None else sizes, self.count)
        results: dict[int, Result] = {}
        try:
            for rank, share in enumerate(shares[1:]):
                self._send(rank, pickle.dumps((function, [items[index] for index in share], arguments)))
            for index in shares[0]:
                results[index] = function(self.local, items[index], *arguments)
            for rank, share in enumerate(shares[1:]):
                results.update(zip(share, self._receive(rank), strict=True))
        except BaseException:
            self.close()  # a late answer would be read as the answer to the next request
            raise
        return [results[index] for index in range(len(items))]

    def zero_gradients(self) -> None:
        self.policy.model.zero_grad(set_to_none=True)
        for gradients in self._gradients:
            for gradient in gradients:
                gradient.zero_()

    def sum_gradients(self) -> None:
        for gradients in self._gradients:
            for parameter, gradient in zip(_trained(self.policy), gradients, strict=True):
                if parameter.grad is not None:
                    parameter.grad.add_(gradient)
                elif gradient.any():  # without a gradient the optimizer skips a parameter that no loss used
                    parameter.grad = gradient.clone()

    def _start(self, threads: int) -> None:
        if self.policy.device.type != "cpu":
            raise ValueError("several workers share their weights in main memory: the policy must be on the CPU")
        for parameter in _parameters(self.local):  # a view of a larger block would be pickled with all of it
            parameter.data = parameter.data.clone()
        try:
            message = pickle.dumps(self.local)  # before the parameters become views of the shared block
        except Exception as error:
            raise UserError(f"this model cannot be sent to other processes ({error}); set runtime.workers=1") from error
        self._memory = memory = self._open_memory(self.count - 1)
        memory.adopt_weights(self.local, fill=True)
        self._counters = memory.counters
        self.local = self.local._replace(counters=self._counters[0])
        for rank in range(self.count - 1):
            numbers = (rank, self.count - 1, threads)
            environment = child_environment(threads)
            self._children.append(Child(_PROGRAM, environment, fds=(memory.fd,), numbers=numbers))
            self._gradients.append(memory.gradients(self.policy, rank))
        for rank in range(self.count - 1):
            self._send(rank, message)

    def _open_memory(self, others: int) -> _SharedMemory:
        try:
            memory = _SharedMemory(self.local, others)
        except OSError as error:
            remedy = "set runtime.workers=1" if others else 'set rollout.engine="torch"'
            raise UserError(f"no memory for weights that processes share ({error}); {remedy}") from error
        self.closing.callback(memory.close_file)
        return memory

    def _send(self, rank: int, message: bytes) -> None:
        try:
            self._children[rank].connection.send_bytes(message)
        except OSError:
            raise self._death(rank) from None

    def _receive(self, rank: int) -> list[Any]:
        try:
            data = self._children[rank].connection.recv_bytes()
        except (EOFError, OSError):
            raise self._death(rank) from None
        results, error = pickle.loads(data)  # noqa: S301 - see the import
        if error is not None:
            raise error
        return results  # type: ignore[no-any-return]

    def _death(self, rank: int) -> WorkerLost:
        return WorkerLost(f"a worker {self._children[rank].death()}")


def open_workers(policy: Policy, reference: Policy | None, config: RuntimeConfig) -> Workers:
    """Workers for the settings and the model's size, with the threads divided among them."""
    threads = configure_threads(config.threads)
    num_parameters = sum(parameter.numel() for parameter in policy.model.parameters())
    small = num_parameters <= SMALL_MODEL_PARAMETERS and policy.device.type == "cpu"
    count = config.workers or (threads if small else 1)
    if count > 1 and policy.device.type != "cpu":
        raise UserError(f"runtime.workers = {count}: on {policy.device} there is one; set it to 0 or 1")
    if count > threads:
        raise UserError(
            f"runtime.workers = {count} is more than the number of threads, {threads}; "
            f"lower it, or raise runtime.threads"
        )
    return Workers(policy, reference, count=count, threads=configure_threads(threads // count))


def divide(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Each worker's item indices: largest item first, each to the least-loaded worker."""
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += sizes[index]
    return shares


def serve() -> None:
    """Serve requests from the first process until it ends."""
    connection_fd, memory_fd, rank, others, threads = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    connection = Connection(connection_fd)
    with suppress(EOFError, OSError):  # the first process has ended
        worker: Worker = pickle.loads(connection.recv_bytes())  # noqa: S301 - see the import
        memory = _SharedMemory(worker, others, memory_fd)
        memory.adopt_weights(worker, fill=False)
        worker = worker._replace(counters=memory.counters[rank + 1])
        for parameter, gradient in zip(_trained(worker.policy), memory.gradients(worker.policy, rank), strict=True):
            parameter.grad = gradient
        memory.close_file()
        while True:
            function, items, arguments = pickle.loads(connection.recv_bytes())  # noqa: S301
            connection.send_bytes(_answer(worker, function, items, arguments))


_PROGRAM = """
from forkrl.parallel.workers import serve
serve()
"""


def _answer(worker: Worker, function: Callable[..., Any], items: list[Any], arguments: tuple[Any, ...]) -> bytes:
    """The pickled results, or the error with its traceback."""
    try:
        return pickle.dumps(([function(worker, item, *arguments) for item in items], None))
    except Exception as error:
        error.add_note(f"in a worker: {traceback.format_exc()}")
        try:
            message = pickle.dumps((None, error))
            pickle.loads(message)  # noqa: S301 - an error may hold anything, and fail in either direction
        except Exception:
            message = pickle.dumps((None, RuntimeError(f"in a worker: {traceback.format_exc()}")))
        return message


class _SharedMemory:
    """One block: weights of policy and reference, gradients of each other worker, and every worker's counters."""

    def __init__(self, worker: Worker, others: int, fd: int | None = None) -> None:
        weights = sum(_size(parameter) for parameter in _parameters(worker))
        self._gradients_start = weights
        self._gradients_size = sum(_size(parameter) for parameter in _trained(worker.policy))
        counters_start = weights + others * self._gradients_size
        num_counters = len(Counts._fields) * (others + 1)
        total = counters_start + 8 * num_counters
        if fd is None:
            fd = _open_unnamed()
            os.truncate(fd, total)
        self.fd = fd
        self._memory = mmap.mmap(fd, total)
        counters = torch.frombuffer(self._memory, dtype=torch.int64, count=num_counters, offset=counters_start)
        self.counters = counters.view(others + 1, -1)

    def adopt_weights(self, worker: Worker, *, fill: bool) -> None:
        """Make the parameters views of the block; ``fill`` copies their values into it first."""
        start = 0
        with torch.no_grad():
            for parameter in _parameters(worker):
                view = self._view(parameter, start)
                if fill:
                    view.copy_(parameter)
                parameter.data = view
                start += _size(parameter)

    def gradients(self, policy: Policy, rank: int) -> list[Tensor]:
        views, start = [], self._gradients_start + rank * self._gradients_size
        for parameter in _trained(policy):
            views.append(self._view(parameter, start))
            start += _size(parameter)
        return views

    def weights(self, policy: Policy) -> SharedWeights:
        placed, start = {}, 0  # the policy's parameters come first
        for name, parameter in policy.model.named_parameters():
            placed[name] = (parameter.dtype, tuple(parameter.shape), start)
            start += _size(parameter)
        return SharedWeights(self.fd, placed)

    def close_file(self) -> None:
        """Close the file; the mapping lasts as long as its tensors."""
        os.close(self.fd)

    def _view(self, like: Tensor, start: int) -> Tensor:
        flat = torch.frombuffer(self._memory, dtype=like.dtype, count=like.numel(), offset=start)
        return flat.view(like.shape)


def _open_unnamed() -> int:
    """A file without a name, so nothing remains: memory on Linux (not /dev/shm, small in containers), else disk."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("forkrl-weights")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _parameters(worker: Worker) -> list[torch.nn.Parameter]:
    models = [policy.model for policy in (worker.policy, worker.reference) if policy is not None]
    # A reference that is the policy without its adapter has the same parameters.
    return list(dict.fromkeys(chain.from_iterable(model.parameters() for model in models)))


def _trained(policy: Policy) -> list[torch.nn.Parameter]:
    return [parameter for parameter in policy.model.parameters() if parameter.requires_grad]


def _size(parameter: Tensor) -> int:
    return -(-parameter.numel() * parameter.element_size() // _ALIGNMENT) * _ALIGNMENT
