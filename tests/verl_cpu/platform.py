"""verl's notion of an accelerator, answered for a machine that has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import verl.utils.distributed
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

_CPU = torch.device("cpu")


def register_platform() -> None:
    """Make ``VERL_PLATFORM=cpu`` known. It is never detected: only that variable chooses it."""
    PlatformRegistry.register(platform="cpu")(CpuPlatform)


def patch_process_group() -> None:
    """Have verl open its process group on gloo alone.

    It asks for "cpu:gloo,{device}:{backend}", here "cpu:gloo,cpu:gloo", which torch refuses.
    """
    original = verl.utils.distributed.initialize_global_process_group_ray

    def initialize(timeout_second: int | None = None, backend: str | None = None) -> None:
        original(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    verl.utils.distributed.initialize_global_process_group_ray = initialize


class CpuPlatform(PlatformBase):  # type: ignore[misc]  # verl ships no types
    """What verl asks of a device: everything succeeds, nothing is measured."""

    device_name = "cpu"
    vendor_name = "cpu"

    @property
    def device_module(self) -> ModuleType:
        return _DEVICE_MODULE

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False

    def current_device(self) -> Any:
        return _CPU  # verl hands it to Tensor.to, where an index would mean an accelerator

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"  # verl's resource pools count no other

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


def _build_device_module() -> ModuleType:
    """``torch.cpu`` with the functions of ``torch.cuda`` that verl calls besides."""
    module = ModuleType("forkrl_cpu_device")
    vars(module).update({name: value for name, value in vars(torch.cpu).items() if not name.startswith("__")})
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(module, name, _zero)
    for name in (
        "empty_cache", "reset_peak_memory_stats", "manual_seed", "manual_seed_all", "set_device", "synchronize",
        "set_rng_state",
    ):  # fmt: skip
        setattr(module, name, _nothing)
    vars(module).update(
        get_rng_state=torch.get_rng_state,
        mem_get_info=lambda *arguments: (0, 0),
        get_device_name=lambda *arguments: "CPU",
        is_available=lambda: False,  # verl's memory helpers then do nothing
        device_count=lambda: 1,
        current_device=lambda: _CPU,
    )
    return module


def _zero(*arguments: Any, **named: Any) -> int:
    return 0


def _nothing(*arguments: Any, **named: Any) -> None:
    return None


_DEVICE_MODULE = _build_device_module()
