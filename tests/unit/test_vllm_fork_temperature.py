"""vLLM's two interfaces for logits processors, played by stand-ins built from its documentation (0.24 and 0.32)."""

from __future__ import annotations

import importlib
import inspect
import pickle  # noqa: TID251 - how vLLM sends a class to its workers
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch

from forkrl import ForkTemperature
from forkrl.rollout import vllm_fork_temperature

LOGITS = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.3, 0.2]]).log()
FORK = {"high": 0.5, "low": 2.0, "threshold": 1.0}


@dataclass
class Params:
    """As much of vLLM's SamplingParams as a processor reads."""

    extra_args: dict[str, Any] | None = None
    temperature: float = 1.0


class RequestAdapter:
    """V1: wraps a processor of one request; how it is called hangs on the number of its arguments."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.req_info: dict[int, partial[torch.Tensor]] = {}

    def add(self, index: int, params: Params, output_ids: list[int]) -> None:
        processor = self.new_req_logits_processor(params)  # type: ignore[attr-defined]
        if processor:
            number = len(inspect.signature(processor).parameters)
            self.req_info[index] = partial(processor, *([[], output_ids] if number == 3 else [output_ids]))

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for index, processor in self.req_info.items():
            logits[index] = processor(logits[index])
        return logits


class BatchProcessor:
    """V2: one call a step for all rows."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self.req_states = req_states


@dataclass
class Context:
    """V2: which rows belong to which request slot in this step."""

    slots_of_rows: list[int]
    expanded_idx_mapping: torch.Tensor = field(init=False)
    idx_mapping_np: Any = field(init=False)

    def __post_init__(self) -> None:
        self.expanded_idx_mapping = torch.tensor(self.slots_of_rows, dtype=torch.int32)
        self.idx_mapping_np = self.expanded_idx_mapping.unique().numpy()


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    homes = {
        "vllm.v1.sample.logits_processor": ("AdapterLogitsProcessor", RequestAdapter),
        "vllm.v1.worker.gpu.sample.logits_processor": ("LogitsProcessor", BatchProcessor),
    }
    for path, (name, value) in homes.items():
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            part = ".".join(parts[:depth])
            monkeypatch.setitem(sys.modules, part, sys.modules.get(part) or ModuleType(part))
        setattr(sys.modules[path], name, value)
    yield
    for name in ("ForkTemperatureV1", "ForkTemperatureV2"):
        vars(vllm_fork_temperature).pop(name, None)


def make(name: str) -> Any:
    """The class as vLLM finds it, by module and name."""
    return getattr(importlib.import_module("forkrl.rollout.vllm_fork_temperature"), name)


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize("asked", [FORK, [0.5, 2.0, 1.0], "0.5, 2,1"], ids=["dictionary", "list", "text"])
def test_v1_rescales_the_rows_of_requests_that_ask_and_no_other(asked: Any) -> None:
    processor = make("ForkTemperatureV1")(None, torch.device("cpu"), False)
    assert isinstance(processor, RequestAdapter)
    assert processor.is_argmax_invariant() is False  # type: ignore[attr-defined]
    for index, params in enumerate([Params({"fork_temperature": asked}), Params(), Params({"another": 1})]):
        processor.add(index, params, [5, 6])
    after = processor.apply(LOGITS.clone())
    torch.testing.assert_close(after[0].softmax(-1), (LOGITS[0] / 0.5).softmax(-1))
    assert after[1:].equal(LOGITS[1:])


@pytest.mark.usefixtures("fake_vllm")
def test_v2_follows_slots_through_reordered_and_repeated_rows() -> None:
    processor = make("ForkTemperatureV2")(None, "states")
    assert processor.req_states == "states"
    other = {"high": 0, "low": 0, "threshold": 0.1}
    assert processor.add_request(3, Params({"fork_temperature": FORK})) is True
    assert processor.add_request(1, Params()) is False
    assert processor.add_request(7, Params({"fork_temperature": other})) is True
    rows = LOGITS[[1, 0, 2, 0]]
    after = rows.clone()
    assert processor.apply(after, Context([3, 1, 7, 3])) is after
    expected = torch.stack([rows[0] / 2.0, rows[1], torch.full((4,), -torch.inf), rows[3] / 0.5]).softmax(-1)
    expected[2] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(after.softmax(-1), expected)


@pytest.mark.usefixtures("fake_vllm")
def test_v2_forgets_who_had_the_slot_before() -> None:
    processor = make("ForkTemperatureV2")(None, None)
    processor.add_request(3, Params({"fork_temperature": FORK}))
    processor.add_request(3, Params())
    after = processor.apply(LOGITS.clone(), Context([3, 3, 3]))
    assert after.equal(LOGITS)


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize("name", ["ForkTemperatureV1", "ForkTemperatureV2"])
@pytest.mark.parametrize(
    ("params", "says"),
    [
        (Params({"fork_temperature": {**FORK, "high": -1}}), "high = -1"),
        (Params({"fork_temperature": {"high": 1, "low": 1}}), "give {'high'"),
        (Params({"fork_temperature": [1, 2]}), "or the three in this order"),
        (Params({"fork_temperature": "1,2,hot"}), "or the three in this order"),
        (Params({"fork_temperature": 7}), "or the three in this order"),
        (Params({"fork_temperature": FORK}, temperature=0.6), "temperature = 0.6 along with fork_temperature: set it"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_when_it_arrives(name: str, params: Params, says: str) -> None:
    with pytest.raises(ValueError, match=says.replace("{", r"\{")):
        make(name).validate_params(params)


@pytest.mark.usefixtures("fake_vllm")
def test_requests_without_it_are_none_of_its_business() -> None:
    make("ForkTemperatureV1").validate_params(Params(None, temperature=0.0))
    assert vllm_fork_temperature.requested(Params({"fork_temperature": FORK})) == ForkTemperature(0.5, 2.0, 1.0)


@pytest.mark.usefixtures("fake_vllm")
def test_the_classes_are_found_by_name_in_another_process() -> None:
    for name in ("ForkTemperatureV1", "ForkTemperatureV2"):
        assert pickle.loads(pickle.dumps(make(name))) is make(name)  # noqa: S301


def test_without_vllm_the_line_that_installs_it_is_given() -> None:
    with pytest.raises(
        ImportError, match=r"ForkTemperatureV1 needs vLLM; install it with: pip install 'forkrl\[vllm\]'"
    ):
        make("ForkTemperatureV1")


@pytest.mark.usefixtures("fake_vllm")
def test_a_vllm_without_the_second_interface_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm.v1.worker.gpu.sample.logits_processor")
    with pytest.raises(ImportError, match="this vLLM has no interface for ForkTemperatureV2"):
        make("ForkTemperatureV2")


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="ForkTemperatureV3"):
        make("ForkTemperatureV3")
