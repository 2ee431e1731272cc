"""``ForkTemperature`` in vLLM: logits processors for both of its model runners.

Name the class when the engine starts, and the temperatures in each request::

    llm = LLM(model, logits_processors=["forkrl.rollout.vllm_fork_temperature:ForkTemperatureV1"])
    temperatures = {"high": 1.0, "low": 0.3, "threshold": 0.672}
    llm.generate(prompts, SamplingParams(temperature=1, extra_args={"fork_temperature": temperatures}))

A server takes ``--logits-processors`` and, because ``vllm_xargs`` cannot hold dictionaries, the three numbers in this
order: ``"vllm_xargs": {"fork_temperature": "1.0,0.3,0.672"}``, or a list if that vLLM accepts lists.

``ForkTemperatureV1`` is for the V1 model runner (vLLM 0.24 and later; ``VLLM_USE_V2_MODEL_RUNNER=0`` if it is not the
default), ``ForkTemperatureV2`` for Model Runner V2 (vLLM 0.32 and later; required for speculative decoding). Both run
before vLLM's own temperature, so the threshold applies to the unscaled distribution. vLLM is imported only when a
class is accessed. V1 is tested in a server of vLLM 0.32, V2 against a stand-in only.

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
    """The ``ForkTemperature`` in a request's ``SamplingParams.extra_args``, if any."""
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
    """A list, or comma-separated numbers as a list; empty for anything else."""
    if not isinstance(value, str):
        return value if isinstance(value, Sequence) else ()
    try:
        return [float(word) for word in value.split(",")]
    except ValueError:
        return ()


def _build_v1() -> type:
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class ForkTemperatureV1(AdapterLogitsProcessor):  # type: ignore[misc]  # untyped
        """Applies each request's ``ForkTemperature``, for vLLM's V1 model runner."""

        @classmethod
        def validate_params(cls, sampling_params: Any) -> None:
            requested(sampling_params)

        def is_argmax_invariant(self) -> bool:
            """False, so that it runs before the temperature and sees the unscaled distribution."""
            return False

        def new_req_logits_processor(self, params: Any) -> ForkTemperature | None:
            """vLLM calls the result with the tokens so far and one row of logits."""
            return requested(params)

    return ForkTemperatureV1


def _build_v2() -> type:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

    class ForkTemperatureV2(LogitsProcessor):  # type: ignore[misc]  # untyped
        """Applies each request's ``ForkTemperature`` to its rows, for vLLM's Model Runner V2."""

        def __init__(self, vllm_config: Any, req_states: Any) -> None:
            super().__init__(vllm_config, req_states)
            self._by_slot: dict[int, ForkTemperature] = {}

        @classmethod
        def validate_params(cls, sampling_params: Any) -> None:
            requested(sampling_params)

        def add_request(self, req_idx: int, sampling_params: Any) -> bool:
            """Register a new request; its slot may have been used before."""
            wanted = requested(sampling_params)
            self._by_slot.pop(req_idx, None)
            if wanted is not None:
                self._by_slot[req_idx] = wanted
            return wanted is not None

        def apply(self, logits: Tensor, ctx: Any) -> Tensor:
            """Rescale in place the rows ``[N, V]`` of requests with a fork temperature."""
            for wanted in {self._by_slot[slot] for slot in ctx.idx_mapping_np.tolist() if slot in self._by_slot}:
                slots = torch.tensor([slot for slot, theirs in self._by_slot.items() if theirs == wanted])
                rows_N = torch.isin(ctx.expanded_idx_mapping, slots.to(logits.device))
                logits.copy_(wanted(None, logits).where(rows_N[:, None], logits))
            return logits

    return ForkTemperatureV2


_BUILDERS: dict[str, Callable[[], type]] = {"ForkTemperatureV1": _build_v1, "ForkTemperatureV2": _build_v2}


def __getattr__(name: str) -> Any:
    """Build the processor classes at first access, because their base classes are vLLM's."""
    if name not in _BUILDERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        made = _BUILDERS[name]()
    except ModuleNotFoundError as error:
        if error.name == "vllm":
            raise ImportError(f"{name} needs vLLM; install it with: pip install 'forkrl[vllm]'") from error
        raise ImportError(f"this vLLM has no interface for {name} ({error}); see {__name__}") from error
    made.__qualname__ = name  # vLLM's worker processes unpickle it by this name
    globals()[name] = made
    return made
