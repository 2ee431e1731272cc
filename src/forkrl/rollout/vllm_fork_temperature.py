"""``ForkTemperature`` inside vLLM: its logits processors for both of its model runners.

Name the class to vLLM when the engine starts, and the temperatures with every request that wants them::

    llm = LLM(model, logits_processors=["forkrl.rollout.vllm_fork_temperature:ForkTemperatureV1"])
    temperatures = {"high": 1.0, "low": 0.3, "threshold": 0.672}
    llm.generate(prompts, SamplingParams(temperature=1, extra_args={"fork_temperature": temperatures}))

A server takes ``--logits-processors`` and, as ``vllm_xargs`` may hold no dictionaries, the three numbers in this order:
``"vllm_xargs": {"fork_temperature": "1.0,0.3,0.672"}``, or a list of them where that vLLM allows lists.

``ForkTemperatureV1`` is for the V1 model runner (vLLM 0.24 on; ``VLLM_USE_V2_MODEL_RUNNER=0`` where it is not the
default), ``ForkTemperatureV2`` for Model Runner V2 (vLLM 0.32 on). Both runners call them before their own temperature,
so what is compared with the threshold is the unscaled distribution. Speculative decoding works with V2 alone.

Importing this module does not import vLLM; taking one of the classes does. It was written against vLLM's documentation
and is tested against a stand-in with that interface: no real vLLM has run it yet.

Shapes: ``N`` rows of logits, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from forkrl.rollout.fork_temperature import ForkTemperature

KEY = "fork_temperature"
_NAMES = ("high", "low", "threshold")


def requested(params: Any) -> ForkTemperature | None:
    """What a request's ``SamplingParams.extra_args`` ask for; None if nothing."""
    value = (params.extra_args or {}).get(KEY)
    if value is None:
        return None
    if params.temperature != 1:
        raise ValueError(f"temperature = {params.temperature:g} along with {KEY}: set it to 1, or both would apply")
    named = dict(zip(_NAMES, three, strict=True)) if len(three := _listed(value)) == len(_NAMES) else value
    if not isinstance(named, Mapping) or set(named) != set(_NAMES):
        raise ValueError(f"{KEY} = {value!r}: give {{'high': …, 'low': …, 'threshold': …}} or the three in this order")
    return ForkTemperature(**named)


def _listed(value: Any) -> Sequence[Any]:
    """A list as it is, numbers separated by commas as a list; nothing for anything else."""
    if not isinstance(value, str):
        return value if isinstance(value, Sequence) else ()
    try:
        return [float(word) for word in value.split(",")]
    except ValueError:
        return ()


def _build_v1() -> type:
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class ForkTemperatureV1(AdapterLogitsProcessor):  # type: ignore[misc]  # untyped
        """Applies to each request its own ``ForkTemperature``: interface of vLLM's V1 model runner."""

        @classmethod
        def validate_params(cls, sampling_params: Any) -> None:
            """Refuse a request whose arguments cannot be used, when it arrives."""
            requested(sampling_params)

        def is_argmax_invariant(self) -> bool:
            """False: what is invariant runs after the temperature, and here the entropy from before it counts."""
            return False

        def new_req_logits_processor(self, params: Any) -> ForkTemperature | None:
            """vLLM calls the result with the tokens so far and one row of logits."""
            return requested(params)

    return ForkTemperatureV1


def _build_v2() -> type:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

    class ForkTemperatureV2(LogitsProcessor):  # type: ignore[misc]  # untyped
        """Applies to the rows of each request its own ``ForkTemperature``: interface of vLLM's Model Runner V2."""

        def __init__(self, vllm_config: Any, req_states: Any) -> None:
            super().__init__(vllm_config, req_states)
            self._by_slot: dict[int, ForkTemperature] = {}

        @classmethod
        def validate_params(cls, sampling_params: Any) -> None:
            """Refuse a request whose arguments cannot be used, when it arrives."""
            requested(sampling_params)

        def add_request(self, req_idx: int, sampling_params: Any) -> bool:
            """Take note of a new request; its slot may have been another's before."""
            wanted = requested(sampling_params)
            self._by_slot.pop(req_idx, None)
            if wanted is not None:
                self._by_slot[req_idx] = wanted
            return wanted is not None

        def apply(self, logits: Tensor, ctx: Any) -> Tensor:
            """Rescale in place the rows ``[N, V]`` of requests in this batch that asked for it."""
            for wanted in {self._by_slot[slot] for slot in ctx.idx_mapping_np.tolist() if slot in self._by_slot}:
                slots = torch.tensor([slot for slot, theirs in self._by_slot.items() if theirs == wanted])
                rows_N = torch.isin(ctx.expanded_idx_mapping, slots.to(logits.device))
                logits.copy_(wanted(None, logits).where(rows_N[:, None], logits))
            return logits

    return ForkTemperatureV2


_BUILDERS: dict[str, Callable[[], type]] = {"ForkTemperatureV1": _build_v1, "ForkTemperatureV2": _build_v2}


def __getattr__(name: str) -> Any:
    """The processor classes, made when first asked for: their base classes are vLLM's."""
    if name not in _BUILDERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        made = _BUILDERS[name]()
    except ModuleNotFoundError as error:
        if error.name == "vllm":
            raise ImportError(f"{name} needs vLLM; install it with: pip install 'forkrl[vllm]'") from error
        raise ImportError(f"this vLLM has no interface for {name} ({error}); see {__name__}") from error
    made.__qualname__ = name  # what is pickled to vLLM's other processes is found by this name
    globals()[name] = made
    return made
