"""A small model on every core: further processes that share the policy's weights and take parts of its work.

Two threads of one operation wait for each other hundreds of times a step. If they spin while they wait, a busy machine
makes them ten times slower; if they sleep, the waking costs as much as a small model's whole operation
(docs/threads.md). Processes wait once a step. Each holds the same model over one shared block of memory, so the
optimizer's step here is seen there at once; gradients are summed in a fixed order, so a run is repeatable to the bit.
"""

from __future__ import annotations

import mmap
import os
import pickle  # noqa: TID251 - only over a socket between this process and those that it started, never from a file
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from forkrl.config import RuntimeConfig
from forkrl.errors import TrainingHalted, UserError
from forkrl.model import Policy
from forkrl.threads import configure_threads

Item = TypeVar("Item")
Result = TypeVar("Result")

_ALIGNMENT = 64
SMALL_MODEL_PARAMETERS = 50_000_000
"""Above it the matrix products are long enough that several threads on one of them do not wait in vain."""


class Replica(NamedTuple):
    """What a function that runs on a replica works with."""

    policy: Policy
    reference: Policy | None


class Replicas:
    """The policy here and in ``count - 1`` further processes; a context manager.

    Args:
        policy: its parameters move into shared memory where there is more than one replica.
        reference: the starting policy, if the loss needs it.
        count: replicas, this process included; only on the CPU can there be more than one.
        threads: of one operation, in each replica.
    """

    def __init__(self, policy: Policy, reference: Policy | None = None, *, count: int = 1, threads: int = 1) -> None:
        self.local = Replica(policy, reference)
        self.count = count
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._gradients: list[list[Tensor]] = []
        if count > 1:
            try:
                self._start(threads)
            except BaseException:
                self.close()
                raise

    @property
    def policy(self) -> Policy:
        return self.local.policy

    def __enter__(self) -> Replicas:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the further processes; may be called twice."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
        self._connections, self._processes = [], []

    def map(
        self,
        function: Callable[..., Result],
        items: Sequence[Item],
        *arguments: Any,
        sizes: Sequence[int] | None = None,
    ) -> list[Result]:
        """``function(replica, item, *arguments)`` of every item, in the order of the items.

        Args:
            function: of an importable module, so that the other processes find it.
            items: divided among the replicas, the same way each time.
            arguments: the same for every item.
            sizes: the work in each item, for a fair division; by default all alike.

        Raises:
            TrainingHalted: a process has died. What ``function`` raises, wherever it ran, is raised here. The replicas
                are closed by either.
        """
        if self.count > 1 and function.__module__ == "__main__":
            raise ValueError(f"{function.__name__} is of the program itself; other processes need it in a module")
        shares = divide([1] * len(items) if sizes is None else sizes, self.count)
        results: dict[int, Result] = {}
        try:
            for rank, share in enumerate(shares[1:]):
                self._send(rank, (function, [items[index] for index in share], arguments))
            for index in shares[0]:
                results[index] = function(self.local, items[index], *arguments)
            for rank, share in enumerate(shares[1:]):
                results.update(zip(share, self._receive(rank), strict=True))
        except BaseException:
            self.close()  # what the others still answer would be taken for the answer to the next question
            raise
        return [results[index] for index in range(len(items))]

    def zero_gradients(self) -> None:
        """Forget the gradients of every replica."""
        self.policy.model.zero_grad(set_to_none=True)
        for gradients in self._gradients:
            for gradient in gradients:
                gradient.zero_()

    def sum_gradients(self) -> None:
        """Add the gradients of the other replicas to those here."""
        for gradients in self._gradients:
            for parameter, gradient in zip(_trained(self.policy), gradients, strict=True):
                parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)

    def _start(self, threads: int) -> None:
        if self.policy.device.type != "cpu":
            raise ValueError("several replicas share their weights in main memory: the policy must be on the CPU")
        for parameter in _parameters(self.local):  # views of a larger block would travel with all of it
            parameter.data = parameter.data.clone()
        message = pickle.dumps(self.local)
        memory = _SharedMemory(self.local, self.count - 1)
        memory.adopt_weights(self.local, keep=True)
        for rank in range(self.count - 1):
            ours, theirs = Pipe()
            self._connections.append(ours)
            with theirs:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-P", "-c", "from forkrl.replicas import serve; serve()"]
                        + [str(number) for number in (theirs.fileno(), memory.fd, rank, self.count - 1, threads)],
                        pass_fds=(theirs.fileno(), memory.fd),
                        stdin=subprocess.DEVNULL,
                        env=_environment(threads),
                        start_new_session=True,  # a Ctrl-C is this process's to answer
                    )
                )
            self._gradients.append(memory.gradients(self.policy, rank))
        memory.close_file()
        for connection in self._connections:
            connection.send_bytes(message)

    def _send(self, rank: int, message: Any) -> None:
        try:
            self._connections[rank].send_bytes(pickle.dumps(message))
        except (OSError, IndexError):
            raise self._death(rank) from None

    def _receive(self, rank: int) -> list[Any]:
        try:
            data = self._connections[rank].recv_bytes()
        except (EOFError, OSError):
            raise self._death(rank) from None
        results, error = pickle.loads(data)  # noqa: S301 - see the import
        if error is not None:
            raise error
        return results  # type: ignore[no-any-return]

    def _death(self, rank: int) -> TrainingHalted:
        if not self._processes:
            return TrainingHalted("the replicas are closed")
        code = self._processes[rank].wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return TrainingHalted(
            f"a replica {how}; if memory ran out, lower runtime.replicas, rollout.max_sequences or "
            f"training.micro_batch_tokens"
        )


def open_replicas(policy: Policy, reference: Policy | None, config: RuntimeConfig) -> Replicas:
    """As many replicas as the settings and the model ask for, with the threads divided among them.

    Raises:
        UserError: more replicas than threads, or several on an accelerator.
    """
    threads = configure_threads(config.threads)
    count = config.replicas or (threads if _is_small(policy) else 1)
    if count > 1 and policy.device.type != "cpu":
        raise UserError(f"runtime.replicas = {count}: on {policy.device} there is one; set it to 0 or 1")
    if count > threads:
        raise UserError(
            f"runtime.replicas = {count}: there are {threads} threads for them; lower it, or raise runtime.threads"
        )
    return Replicas(policy, reference, count=count, threads=configure_threads(threads // count))


def _is_small(policy: Policy) -> bool:
    num_parameters = sum(parameter.numel() for parameter in policy.model.parameters())
    return num_parameters <= SMALL_MODEL_PARAMETERS and policy.device.type == "cpu"


def divide(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Indices of the items for each of ``count`` replicas: the largest first, each to whoever has least so far."""
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += sizes[index]
    return shares


def serve() -> None:
    """Run what the first process asks for, until it is gone."""
    connection_fd, memory_fd, rank, others, threads = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    connection = Connection(connection_fd)
    with suppress(EOFError, ConnectionError):
        replica: Replica = pickle.loads(connection.recv_bytes())  # noqa: S301 - see the import
        memory = _SharedMemory(replica, others, memory_fd)
        memory.adopt_weights(replica, keep=False)
        for parameter, gradient in zip(_trained(replica.policy), memory.gradients(replica.policy, rank), strict=True):
            parameter.grad = gradient
        memory.close_file()
        while True:
            function, items, arguments = pickle.loads(connection.recv_bytes())  # noqa: S301
            connection.send_bytes(_answer(replica, function, items, arguments))


def _answer(replica: Replica, function: Callable[..., Any], items: list[Any], arguments: tuple[Any, ...]) -> bytes:
    """The results and no error, or no results and the error, which tells where it comes from."""
    try:
        return pickle.dumps(([function(replica, item, *arguments) for item in items], None))
    except Exception as error:
        error.add_note(f"in a replica: {traceback.format_exc()}")
        try:
            return pickle.dumps((None, error))
        except Exception:  # an error may hold anything
            return pickle.dumps((None, RuntimeError(f"in a replica: {traceback.format_exc()}")))


class _SharedMemory:
    """One block: the weights of policy and reference, then the gradients of each further replica.

    Every process computes the same layout from the same model. The file behind it has no name, so nothing is left over
    however the processes end.
    """

    def __init__(self, replica: Replica, others: int, fd: int | None = None) -> None:
        weights = sum(_size(parameter) for parameter in _parameters(replica))
        self._gradients_start = weights
        self._gradients_size = sum(_size(parameter) for parameter in _trained(replica.policy))
        total = weights + others * self._gradients_size
        if fd is None:
            fd = _open_unnamed()
            os.truncate(fd, total)
        self.fd = fd
        self._memory = mmap.mmap(fd, total)

    def adopt_weights(self, replica: Replica, *, keep: bool) -> None:
        """Make the parameters views of the block; ``keep``: with the values that they have."""
        start = 0
        with torch.no_grad():
            for parameter in _parameters(replica):
                view = self._view(parameter, start)
                if keep:
                    view.copy_(parameter)
                parameter.data = view
                start += _size(parameter)

    def gradients(self, policy: Policy, rank: int) -> list[Tensor]:
        """Where the gradients of a further replica are."""
        views, start = [], self._gradients_start + rank * self._gradients_size
        for parameter in _trained(policy):
            views.append(self._view(parameter, start))
            start += _size(parameter)
        return views

    def close_file(self) -> None:
        """The mapping stays as long as a tensor does."""
        os.close(self.fd)

    def _view(self, like: Tensor, start: int) -> Tensor:
        flat = torch.frombuffer(self._memory, dtype=like.dtype, count=like.numel(), offset=start)
        return flat.view(like.shape)


def _open_unnamed() -> int:
    """A file without a name: memory alone on Linux (not in /dev/shm, of which containers have little), else on disk."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("forkrl-weights")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _parameters(replica: Replica) -> list[torch.nn.Parameter]:
    models = [policy.model for policy in replica if policy is not None]
    return list(chain.from_iterable(model.parameters() for model in models))


def _trained(policy: Policy) -> list[torch.nn.Parameter]:
    return [parameter for parameter in policy.model.parameters() if parameter.requires_grad]


def _size(parameter: Tensor) -> int:
    return -(-parameter.numel() * parameter.element_size() // _ALIGNMENT) * _ALIGNMENT


def _environment(threads: int) -> dict[str, str]:
    """Import what this process can import."""
    folders = [folder or os.getcwd() for folder in sys.path]  # noqa: PTH109
    return os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": str(threads)}
