"""``VllmSampler`` against a stand-in for vLLM's engine, built from its documentation (0.24 to 0.26)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from forkrl.errors import UserError
from forkrl.evaluation.samplers import EvalSampling, Sampled, SampleRequest, request_seed
from forkrl.evaluation.vllm import VllmSampler
from forkrl.types import Prompt

SAMPLING = EvalSampling(max_response_tokens=8, temperature=0.7, seed=11, stop=("###",))


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE


@dataclass
class EngineArgs:
    model: str
    revision: str | None = None
    tokenizer_revision: str | None = None
    max_model_len: int | None = None
    seed: int = 0
    tensor_parallel_size: int = 1


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]
    finish_reason: str | None = None


@dataclass
class RequestOutput:
    request_id: str
    outputs: list[CompletionOutput]
    finished: bool


class Tokenizer:
    """A token a word; its own begin token unless told otherwise."""

    bos_token_id = 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [1 if word == "<s>" else 10 + len(word) for word in text.split()]


@dataclass
class LLMEngine:
    """Finishes the newest of its requests, one a step, with a text that tells the request."""

    args: EngineArgs
    reason: ClassVar[str] = "stop"
    fault: ClassVar[BaseException | None] = None
    opened: ClassVar[list[LLMEngine]] = []
    waiting: dict[str, tuple[list[int], SamplingParams]] = field(default_factory=dict)
    added: list[tuple[str, list[int], SamplingParams]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    most: int = 0

    @classmethod
    def from_engine_args(
        cls,
        engine_args: EngineArgs,
        usage_context: Any = None,
        stat_loggers: Any = None,
        enable_multiprocessing: bool = False,
    ) -> LLMEngine:
        if engine_args.model == "absent":
            raise OSError("absent is not a local folder\nand is not a valid model identifier")
        cls.opened.append(cls(engine_args))
        return cls.opened[-1]

    @property
    def model_config(self) -> SimpleNamespace:
        return SimpleNamespace(max_model_len=self.args.max_model_len or 100)

    def get_tokenizer(self) -> Tokenizer:
        return Tokenizer()

    def add_request(
        self, request_id: str, prompt: Any, params: SamplingParams, arrival_time: float | None = None, priority: int = 0
    ) -> str:
        assert isinstance(request_id, str)
        assert request_id not in {name for name, *_ in self.added}
        self.waiting[request_id] = (prompt["prompt_token_ids"], params)
        self.added.append((request_id, *self.waiting[request_id]))
        self.most = max(self.most, len(self.waiting))
        return f"{request_id}-1f3a"

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        self.aborted += request_ids
        for name in request_ids:
            self.waiting.pop(name, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[RequestOutput]:
        if self.fault is not None and len(self.added) > len(self.waiting):
            raise self.fault
        name, (prompt_ids, params) = self.waiting.popitem()
        completion = CompletionOutput(0, f"{prompt_ids}|{params.seed}", (5, 6, 2), self.reason)
        return [RequestOutput(name, [completion], finished=True)]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[LLMEngine]:
    module, sampling_params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vars(sampling_params).update(SamplingParams=SamplingParams, RequestOutputKind=RequestOutputKind)
    vars(module).update(
        SamplingParams=SamplingParams, EngineArgs=EngineArgs, LLMEngine=LLMEngine, sampling_params=sampling_params
    )
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", sampling_params)
    monkeypatch.setattr(LLMEngine, "opened", [])
    return LLMEngine


def requests(questions: int = 3, samples: int = 2) -> list[SampleRequest]:
    return [SampleRequest(Prompt(f"q{q}", f"what is {q} ?", ""), k) for q in range(questions) for k in range(samples)]


def test_every_request_is_answered_once_with_a_seed_of_its_own(vllm: type[LLMEngine]) -> None:
    engine = VllmSampler(
        "some/model", revision="abc", max_model_len=50, seed=3, tensor_parallel_size=2, stop_token_ids=(2, 7)
    )
    answers = list(engine.sample(requests(), SAMPLING))
    assert vllm.opened[0].args == EngineArgs("some/model", "abc", "abc", 50, 3, 2)
    expected = [
        Sampled(request, f"[1, 14, 12, 11, 11]|{request_seed(11, request.prompt.id, request.sample)}", 3, True, None)
        for request in requests()
    ]
    assert sorted(answers, key=str) == sorted(expected, key=str)
    assert vllm.opened[0].aborted == []
    params = vllm.opened[0].added[0][2]
    assert params == SamplingParams(
        n=1, temperature=0.7, seed=request_seed(11, "q0", 0), stop_token_ids=[2, 7], max_tokens=8,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip
    assert (params.top_p, params.top_k, params.min_p) == (1.0, 0, 0.0)


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(
    ("text", "templated", "ids"),
    [
        ("ab c", False, [1, 12, 11]),
        ("ab c", True, [12, 11]),
        ("<s> ab c", False, [1, 12, 11]),
        ("<s> ab c", True, [1, 12, 11]),
        ("<s> <s> c", False, [1, 1, 11]),
    ],
)
def test_greedy_no_stop_and_one_bos(text: str, templated: bool, ids: list[int]) -> None:
    wanted = [SampleRequest(Prompt("q", text, "", templated=templated), 0)]
    list(VllmSampler("m").sample(wanted, EvalSampling(8, 0.0, 0, ())))
    [(_, prompt_ids, params)] = LLMEngine.opened[0].added
    assert prompt_ids == ids
    assert (params.temperature, params.stop_token_ids) == (0.0, [])


@pytest.mark.usefixtures("vllm")
def test_a_cut_response_is_not_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LLMEngine, "reason", "length")
    assert [answer.finished for answer in VllmSampler("m").sample(requests(1, 2), SAMPLING)] == [False, False]


@pytest.mark.usefixtures("vllm")
def test_the_engine_never_holds_more_than_it_should_and_can_be_used_again() -> None:
    engine = VllmSampler("m", max_requests=4)
    for _ in range(2):
        assert len(list(engine.sample(requests(10, 3), SAMPLING))) == 30
    assert LLMEngine.opened[0].most == 4
    assert list(engine.sample([], SAMPLING)) == []


@pytest.mark.usefixtures("vllm")
def test_closing_takes_the_rest_out_of_the_engine() -> None:
    answers = VllmSampler("m").sample(requests(), SAMPLING)
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert len(LLMEngine.opened[0].aborted) == 5
    assert not LLMEngine.opened[0].has_unfinished_requests()


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(
    ("fault", "raised", "says"),
    [
        (
            RuntimeError("CUDA out of memory\nTried to"),
            UserError,
            r"vLLM's engine failed \(CUDA out of memory\); nothi",
        ),
        (MemoryError(), UserError, r"vLLM's engine failed \(MemoryError\); nothing is lost, the same command resumes"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
)
def test_a_failing_engine_keeps_what_was_yielded(
    monkeypatch: pytest.MonkeyPatch, fault: BaseException, raised: type[BaseException], says: str
) -> None:
    monkeypatch.setattr(LLMEngine, "fault", fault)
    answers = VllmSampler("m").sample(requests(), SAMPLING)
    assert next(answers).finished
    with pytest.raises(raised, match=says):
        next(answers)
    assert len(LLMEngine.opened[0].aborted) == 5


@pytest.mark.usefixtures("vllm")
def test_requests_that_vanish_do_not_hang_the_evaluation() -> None:
    answers = VllmSampler("m").sample(requests(), SAMPLING)
    next(answers)
    LLMEngine.opened[0].waiting.clear()
    with pytest.raises(UserError, match="vLLM has lost 5 requests; nothing is lost here, the same command resumes"):
        next(answers)


@pytest.mark.usefixtures("vllm")
def test_an_ending_that_is_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LLMEngine, "reason", "abort")
    with pytest.raises(UserError, match=r"question q2: vLLM ended a response with 'abort'; nothing is lost"):
        list(VllmSampler("m").sample(requests(), SAMPLING))


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(
    ("max_model_len", "says"),
    [
        (13, "question q: 7 tokens and --max-tokens 8 are more than the model's 13; set --max-tokens to 6 or less"),
        (5, "question q0: 5 tokens and --max-tokens 8 are more than the model's 5; set --max-tokens to 0 or less"),
    ],
)
def test_a_response_without_room_is_refused_before_anything_is_sampled(max_model_len: int, says: str) -> None:
    wanted = [*requests(), SampleRequest(Prompt("q", "a b c d e f", ""), 0)]
    with pytest.raises(UserError, match=says):
        list(VllmSampler("m", max_model_len=max_model_len).sample(wanted, SAMPLING))
    assert LLMEngine.opened[0].added == []


@pytest.mark.usefixtures("vllm")
def test_a_response_with_exactly_enough_room_is_sampled() -> None:
    assert len(list(VllmSampler("m", max_model_len=13).sample(requests(1, 1), SAMPLING))) == 1


@pytest.mark.usefixtures("vllm")
def test_an_empty_prompt_is_refused() -> None:
    wanted = [SampleRequest(Prompt("q", " ", "", templated=True), 0)]
    with pytest.raises(UserError, match="prompt q: no tokens; an empty prompt cannot be continued"):
        list(VllmSampler("m").sample(wanted, SAMPLING))


@pytest.mark.usefixtures("vllm")
def test_a_model_that_cannot_be_opened() -> None:
    with pytest.raises(UserError, match=r"^vLLM cannot open absent: absent is not a local folder$"):
        VllmSampler("absent")


def test_without_vllm_the_line_that_installs_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoVllm:
        def find_spec(self, name: str, *_: Any) -> None:
            if name.split(".")[0] == "vllm":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [NoVllm(), *sys.meta_path])
    with pytest.raises(UserError, match=r"--engine vllm needs vLLM; install it with: pip install 'forkrl\[vllm\]'"):
        VllmSampler("m")


@pytest.mark.usefixtures("vllm")
def test_a_broken_vllm_is_not_taken_for_an_absent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoPart:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "vllm.sampling_params":
                raise ModuleNotFoundError("No module named 'msgspec'", name="msgspec")

    monkeypatch.delitem(sys.modules, "vllm.sampling_params")
    monkeypatch.setattr(sys.modules["vllm"], "__path__", [], raising=False)
    monkeypatch.setattr(sys, "meta_path", [NoPart(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="msgspec"):
        VllmSampler("m")
