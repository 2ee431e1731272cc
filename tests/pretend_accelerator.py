"""A pretend accelerator: a device of its own, "pretend:0", on which the whole program runs without an accelerator.

    python -m tests.pretend_accelerator train recipes/countdown.toml runtime.device=pretend:0

runs the command line of ForkRL with that device beside the CPU. Its tensors hold CPU tensors inside, and every
operation on them is checked as CUDA checks it: tensors of both devices in one operation are an error, but for the few
mixtures that CUDA takes (copies, CPU numbers of no dimension, CPU indices into device tensors); a generator serves the
operations of its own device only; ``.numpy()`` is refused. Autocast casts what it casts on CUDA. To PyTorch it is the
first accelerator, so ``runtime.device = "auto"`` finds it.

What a run on it proves: no tensor is made on the wrong device, and nothing takes the device for the CPU, its memory for
the host's or CUDA for the only accelerator. What it cannot prove: that a CUDA kernel exists or is right, speed, memory,
when host and device wait for each other, streams, Triton.

It takes PyTorch's one free device name (PrivateUse1, with its experimental Python backend), for the whole process and
for good: it must have a process of its own. Falls short of CUDA in this: dropout draws from the CPU's random numbers;
operations that change a tensor's shape in place (``resize_``, ``t_``) are an error; a gradient on the wrong device is
found when it is used, not when it is returned; outside the thread that installed it, nothing checks generators.
"""

from __future__ import annotations

import functools
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.pretend_autocast import NAME, install_autocast, operation

DEVICE_COUNT = 1
aten = torch.ops.aten

COPIES = {aten.copy_.default}
"""May have either device on either side."""
INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor}
INDEX_WRITING = {
    aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default, aten._unsafe_index_put.default
}  # fmt: skip
READS_A_NUMBER = {
    aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.index_fill.int_Tensor,
    aten.index_fill_.int_Tensor,
}  # fmt: skip
"""Not element by element, and yet their value may be a CPU number."""
CREATION = ("arange", "arange.start", "arange.start_step", "linspace", "logspace", "eye", "eye.m", "tril_indices")
"""PyTorch makes these by writing into an empty tensor, whose shape here cannot change afterwards."""


class PretendTensor(Tensor):
    """A tensor on the pretend accelerator; what it holds is in ``held``, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        assert type(inner) is Tensor, f"a tensor of the CPU goes inside, not {type(inner).__name__}"
        made: PretendTensor = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, 0),
        )
        made.held = inner
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    # With these two, a module that moves exchanges its parameters whole, instead of what lies below the Python object.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(held: dict[str, Tensor], context: None, size: Any, stride: Any) -> PretendTensor:
        return PretendTensor(held["held"])

    def __deepcopy__(self, memo: dict[int, Any]) -> PretendTensor:
        if id(self) not in memo:
            copied: Any = PretendTensor(self.held.clone())
            if isinstance(self, nn.Parameter):
                copied = nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        made: PretendTensor = memo[id(self)]
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{self.held!r} on {self.device}"

    def numpy(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. "
            f"Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        self.numpy()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    # Where it lies, for those who ask which tensors share memory; nobody can read there from Python.
    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation, once its tensors are found to be where CUDA would have them."""
    there: list[PretendTensor] = []
    here: list[Tensor] = []
    inner_args = [_inside(each, there, here) for each in args]
    inner_kwargs = {name: _inside(each, there, here) for name, each in kwargs.items()}
    if there and here and not _taken_mixed(func, args, kwargs, here):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and cpu! "
            f"({func}, on the cpu {', '.join(str(list(each.shape)) for each in here)})"
        )
    facts = _facts(func)
    for each in there:
        _require_same_shape(func, each)
    if facts.draws and kwargs.get("generator") is None:
        inner_kwargs["generator"] = BACKEND.generator
    made = func(*inner_args, **inner_kwargs)

    device = kwargs.get("device")
    if device is not None and torch.device(device).type != NAME:
        return made
    # What an operation in place gives is the tensor that it was given.
    known: dict[int, Tensor] = {}
    if facts.written:
        known = {id(each.held): each for each in there} | {id(each): each for each in here}
        for each in there:
            _require_same_shape(func, each)
    return _wrapped(made, known)


def _inside(value: Any, there: list[PretendTensor], here: list[Tensor]) -> Any:
    """What stands for an argument on the CPU; tensors in it are noted by where they are."""
    kind = type(value)
    if kind is PretendTensor:
        there.append(value)
        return value.held
    if kind is list or kind is tuple:
        return kind(_inside(each, there, here) for each in value)
    if kind is torch.device:
        if value.type == NAME and (value.index or 0) >= DEVICE_COUNT:
            raise RuntimeError(f"invalid device ordinal: there is no {value}")
        return torch.device("cpu")
    if isinstance(value, Tensor):
        here.append(value)
    return value


def _wrapped(value: Any, known: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return known[id(value)] if id(value) in known else PretendTensor(value)
    if isinstance(value, list | tuple):
        return type(value)(_wrapped(each, known) for each in value)
    return value


class Facts(NamedTuple):
    """What the declaration of an operation says."""

    draws: bool
    written: frozenset[str]
    """The arguments that it writes to."""
    reshapes: bool
    """It changes the shape of what it is given."""


@functools.cache
def _facts(func: Any) -> Facts:
    arguments = func._schema.arguments
    return Facts(
        draws=any(each.name == "generator" for each in arguments),
        written=frozenset(each.name for each in arguments if each.alias_info is not None and each.alias_info.is_write),
        reshapes=torch.Tag.inplace_view in func.tags,
    )


def _require_same_shape(func: Any, tensor: PretendTensor) -> None:
    held = tensor.held
    if _facts(func).reshapes or tensor.shape != held.shape or tensor.dtype != held.dtype:
        raise NotImplementedError(f"{func}: a tensor of {tensor.device} cannot change its shape or type in place")


def _taken_mixed(func: Any, args: Any, kwargs: Any, here: list[Tensor]) -> bool:
    """Whether CUDA takes the operation, though some of its tensors, ``here``, are of the CPU and some are not."""
    first_there, numbers = isinstance(args[0], PretendTensor), all(each.dim() == 0 for each in here)
    if func in COPIES:
        return True
    if func in INDEXING:
        return first_there
    if func in INDEX_WRITING:
        values_fit = args[2].dim() == 0 or isinstance(args[2], PretendTensor) == first_there
        return values_fit and (first_there or not any(isinstance(index, PretendTensor) for index in args[1]))
    if func in READS_A_NUMBER:
        return first_there and numbers
    written = [value for name, value in _arguments(func, args, kwargs) if name in _facts(func).written]
    return (
        torch.Tag.pointwise in func.tags
        and numbers
        and len(here) <= (2 if func is aten.where.self else 1)
        and all(isinstance(each, PretendTensor) for each in written)
    )


def _arguments(func: Any, args: Any, kwargs: Any) -> list[tuple[str, Any]]:
    names = [each.name for each in func._schema.arguments]
    return [*zip(names, args, strict=False), *kwargs.items()]


class Generator(torch.Generator):
    """A generator that knows its device; within, all are of the CPU."""

    _device: torch.device

    def __new__(cls, device: Any = "cpu") -> Generator:
        made: Generator = super().__new__(cls, "cpu")  # type: ignore[call-arg]
        made._device = torch.device(device)
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(NAME, 0) if self._device.type == NAME else self._device


class Checks(TorchFunctionMode):
    """What has to be seen before PyTorch's own code takes the arguments apart."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(generator := kwargs.get("generator"), Generator):
            _require_own_generator(args, kwargs, generator)
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            return _made_from_data(func, args, kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], PretendTensor):
            args = (args[0], _indices(args[1]), *args[2:])
        return func(*args, **kwargs)


def _require_own_generator(args: Any, kwargs: Any, generator: Generator) -> None:
    like = next((each for each in (*args, kwargs.get("out")) if isinstance(each, Tensor)), None)
    default = torch.get_default_device() if like is None else like.device
    device = torch.device(kwargs.get("device") or default)
    if device.type != generator.device.type:
        raise RuntimeError(f"Expected a '{device.type}' device type for generator but found '{generator.device.type}'")


def _made_from_data(func: Any, args: Any, kwargs: Any) -> Tensor:
    """``torch.tensor`` and its like: made on the CPU, and copied. PyTorch would copy below what Python sees."""
    like, data = args if func is Tensor.new_tensor else (None, args[0] if args else kwargs["data"])
    device = kwargs.get("device")
    if device is None:
        device = next((each.device for each in (like, data) if isinstance(each, Tensor)), torch.get_default_device())
    if torch.device(device).type != NAME and not isinstance(data, PretendTensor):
        if isinstance(like, PretendTensor):  # asked for the CPU by name
            return torch.tensor(data, dtype=kwargs.get("dtype", like.dtype), device=device)
        made: Tensor = func(*args, **kwargs)
        return made
    dtype = kwargs.get("dtype") or (like.dtype if like is not None else None)
    if isinstance(data, Tensor):
        return data.to(device, dtype) if func is torch.as_tensor else data.detach().to(device, dtype, copy=True)
    made = torch.tensor(data, dtype=dtype, device="cpu").to(device)
    return made.requires_grad_(kwargs.get("requires_grad", False))


def _indices(index: Any) -> Any:
    """Lists become tensors of the device, as they would within."""
    if isinstance(index, tuple):
        return tuple(_indices(each) for each in index)
    return torch.tensor(index).to(NAME) if isinstance(index, list) else index


class Backend:
    """What PyTorch asks of ``torch.pretend``."""

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return DEVICE_COUNT

    def current_device(self) -> int:
        return 0

    def device(self, index: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def synchronize(self, index: Any = None) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def get_rng_state(self, device: Any = NAME) -> Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state: Tensor, device: Any = NAME) -> None:
        self.generator.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


BACKEND = Backend()
_registered: list[Any] = []


def missing() -> str | None:
    """Why there can be no pretend accelerator with this PyTorch, or None."""
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # noqa: F401
    except ImportError:
        return f"torch {torch.__version__} has no backends in Python"
    return None


def install() -> None:
    """Give this process, and what is forked from it, the device; once.

    Raises:
        RuntimeError: this PyTorch cannot have one.
    """
    if reason := missing():
        raise RuntimeError(f"no pretend accelerator: {reason}")
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(rename=NAME, backend_module=BACKEND)
    fallbacks, kernels = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _registered.extend([fallbacks, kernels])  # they end with the object
    fallbacks.fallback(lambda func, *args, **kwargs: run(func, args, kwargs), "PrivateUse1")
    for name in CREATION:
        kernels.impl(name, functools.partial(_create, operation(name)), "PrivateUse1")
    install_autocast(fallbacks, kernels)
    torch.Generator = Generator  # type: ignore[misc]
    Checks().__enter__()  # type: ignore[no-untyped-call]


def _create(func: Any, *args: Any, **kwargs: Any) -> Any:
    return run(func, args, kwargs)


def main() -> int:
    """The command line of ForkRL, with the device."""
    install()
    from forkrl.cli import main as command

    return command(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
