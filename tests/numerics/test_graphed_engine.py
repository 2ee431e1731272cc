"""Decoding by steps of fixed shapes gives what decoding with a growing cache gives; a graph could hold the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from forkrl.config import TrainConfig
from forkrl.errors import TrainingHalted, UserError
from forkrl.model.policy import Policy
from forkrl.parallel.workers import Workers
from forkrl.rollout import EmbeddedEngine, graphed_engine, graphed_step, open_engine
from forkrl.rollout.embedded import Prefix, read_prompts
from forkrl.rollout.flat_step import FlatStep, reproducible
from forkrl.rollout.graphed_engine import GraphedEngine, require_graphs
from forkrl.rollout.graphed_step import GraphedStep
from forkrl.rollout.growing_cache import select_sequences
from forkrl.types import Rollout, SamplingParams
from tests.models import random_policy

FAMILIES = ["qwen3", "qwen2", "llama", "mistral"]
LONGEST = 64
"""Tokens of a response: the length crosses a bucket, and a sequence its padding."""


class Tape(TorchDispatchMode):
    """Stands in for a CUDA graph: repeats recorded operations on the recorded tensors, and nothing of Python's."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert "_local_scalar_dense" not in name and "nonzero" not in name, f"{name} makes the host wait"
        assert "scalar_tensor" not in name and "lift_fresh" not in name, f"{name} copies a number from the host"
        made = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        for func, args, kwargs, made in self.operations:
            if func.is_view:
                continue
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def recorded(run: Callable[[], None]) -> Callable[[], None]:
    run()
    tape = Tape()
    with tape:
        run()
    return tape.replay


@pytest.fixture(params=["as it is", "recorded"])
def steps_are(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How the steps run, once as they are and once from a tape; a list with an entry for each that was prepared."""
    prepared: list[int] = []

    def prepare(run: Callable[[], None]) -> Callable[[], None]:
        prepared.append(1)
        return run if request.param == "as it is" else recorded(run)

    monkeypatch.setattr(graphed_step, "_as_it_is", prepare)
    return prepared


def prefixes_of(policy: Policy) -> list[Prefix]:
    """Ten, of unequal lengths, not in order, with different room."""
    texts = [("1 2", ""), ("5", "3" * 29), ("987654321 0", "4 4"), ("5", "0123456789" * 2), ("5", "7" * 57)]
    texts += [(str(number) * number, "") for number in range(1, 6)]
    encode = policy.tokenizer.encode
    return [Prefix(tuple(encode(prompt)), tuple(encode(response))) for prompt, response in texts]


def rollouts_of(
    kind: type[EmbeddedEngine], policy: Policy, count: int = 4, max_sequences: int = 256, **sampling: Any
) -> list[Rollout]:
    engine = kind(Workers(policy), max_prompt_tokens=16, max_sequences=max_sequences)
    params = SamplingParams(**{"max_response_tokens": LONGEST, **sampling})
    continued = engine.continue_from(
        prefixes_of(policy), count=count, sampling=params, generator=torch.Generator(policy.device).manual_seed(4)
    )
    return [rollout for rollouts in continued for rollout in rollouts]


def assert_same(actual: list[Rollout], expected: list[Rollout], tolerance: float = 1e-5) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours.prompt_ids, ours.response_ids) == (theirs.prompt_ids, theirs.response_ids)
        assert (ours.text, ours.finished) == (theirs.text, theirs.finished)
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(ours.entropy, theirs.entropy, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def both_steps(policy: Policy, tokens_NS: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states of the static and of the growing step, row by row, while rows leave and close ranks."""
    ids_S = [(5,) * 3, tuple(range(2, 11)), (4,), (5,) * 3, tuple(range(2, 8)), (9, 2)] * 4
    _, cache, seen_PT, owner_S = read_prompts(policy, ids_S, len(tokens_NS))
    step, growing = GraphedStep(policy, len(ids_S), seen_PT.shape[1] + len(tokens_NS)), FlatStep(policy)
    step.begin(cache, seen_PT, owner_S)
    select_sequences(cache, owner_S)
    seen_ST, place = seen_PT[owner_S], list(range(len(ids_S)))
    position_S = seen_ST.sum(1)
    for number, tokens_S in enumerate(tokens_NS):
        if number in (3, 60):
            kept = [23, 1, 2, 22, 4, 5, 6, 21, *range(8, 16)] if number == 3 else [0, 9, 2, 3, 4, 15, 6, 7]
            step.keep(kept)
            index_S = torch.tensor(kept)
            select_sequences(cache, index_S)
            seen_ST, position_S, place = seen_ST[index_S], position_S[index_S], [place[each] for each in kept]
        seen_ST = torch.nn.functional.pad(seen_ST, (0, 1), value=True)
        expected = growing.hidden_states(tokens_S[place], position_S, seen_ST, cache)
        yield step.advance(tokens_S[place]), expected
        position_S = position_S + 1


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 4e-2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_equal_those_with_a_growing_cache(
    family: str, precision: str, tolerance: float, steps_are: list[int]
) -> None:
    policy = random_policy(family)
    policy.precision = precision
    tokens_NS = torch.randint(2, len(policy.tokenizer), (64, 24))
    for actual, expected in both_steps(policy, tokens_NS):
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual.float(), expected.float(), atol=tolerance, rtol=tolerance)
    assert len(steps_are) == 4, "24 rows, 16 rows, these beyond 64 places, 8 rows"


def test_logits_are_the_policy_s() -> None:
    hidden_SD = torch.randn(5, 32)
    for precision in ("fp32", "bf16"):
        policy = random_policy()
        policy.precision = precision
        with torch.no_grad():
            assert GraphedStep(policy, 5, 9).logits(hidden_SD).equal(policy.logits(hidden_SD))


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_same_seed_gives_the_same_rollouts_where_no_row_leaves(
    family: str, steps_are: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random numbers are drawn for all rows: with as many rows at every token they are the same."""
    monkeypatch.setattr("forkrl.rollout.embedded.COMPACT_FRACTION", 2.0)
    monkeypatch.setattr(graphed_engine, "bucket", lambda number, least: 40)
    policy = random_policy(family, sharpness=6.0)
    actual, expected = (rollouts_of(kind, policy) for kind in (GraphedEngine, EmbeddedEngine))
    assert_same(actual, expected)
    assert len({len(rollout) for rollout in actual}) > 10
    assert {rollout.finished for rollout in actual} == {True, False}
    assert len(steps_are) >= 2, "the length must outgrow a bucket"


def apart_from_rows() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """A sampler whose random numbers depend on the step and a row's own logits, whatever rows there are."""
    steps = 0

    def sample(logits_SV: Tensor, sampling: Any, generator: Any) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal steps
        steps += 1
        logprobs_SV = logits_SV.log_softmax(-1)
        order_S = 7 * logits_SV.argmax(-1) + 3 * logits_SV.argmin(-1)
        random_S1 = (0.618034 * (steps + order_S))[:, None] % 1
        drawn_S = (logprobs_SV.exp().cumsum(-1) < random_S1).sum(-1).clamp_max(logits_SV.shape[1] - 1)
        entropy_S = torch.special.entr(logprobs_SV.exp()).sum(-1)
        return drawn_S, logprobs_SV.gather(-1, drawn_S[:, None])[:, 0], entropy_S

    return sample


@pytest.mark.parametrize("sharpness", [2.0, 6.0])
@pytest.mark.parametrize("stop", ["", " "])
def test_rollouts_are_the_same_while_rows_leave(
    stop: str, sharpness: float, steps_are: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = random_policy(sharpness=sharpness, seed=1)
    rollouts = []
    for kind in (GraphedEngine, EmbeddedEngine):
        sample = apart_from_rows()
        monkeypatch.setattr("forkrl.rollout.embedded.sample_tokens", sample)
        monkeypatch.setattr(graphed_engine, "sample_tokens", sample)
        rollouts.append(rollouts_of(kind, policy, stop_token_ids=policy.stop_token_ids(list(stop))))
    assert_same(rollouts[0], rollouts[1])
    assert len({len(rollout) for rollout in rollouts[0]}) > 3
    assert len(steps_are) > 2, "the batch must shrink"


def test_greedy_rollouts_are_the_same(steps_are: list[int]) -> None:
    policy = random_policy(sharpness=6.0)
    actual, expected = (rollouts_of(kind, policy, 3, temperature=0.0) for kind in (GraphedEngine, EmbeddedEngine))
    assert_same(actual, expected)
    assert max(len(rollout) for rollout in actual) == LONGEST


def test_statistics_equal_a_pass_of_the_model_itself(steps_are: list[int]) -> None:
    policy = random_policy(sharpness=6.0)
    rollouts = rollouts_of(GraphedEngine, policy, temperature=0.8, max_sequences=17)
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        with torch.no_grad():
            logits_TV = policy.model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
        logprobs_TV = (logits_TV / 0.8).log_softmax(-1)
        expected = logprobs_TV.gather(1, ids[0, len(rollout.prompt_ids) :, None])[:, 0]
        torch.testing.assert_close(rollout.logprobs, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(rollout.entropy, -(logprobs_TV.exp() * logprobs_TV).sum(-1), atol=1e-4, rtol=0)
    assert len({len(rollout) for rollout in rollouts}) > 10


def test_a_stop_token_beyond_the_limit_does_not_count() -> None:
    policy = random_policy(sharpness=2.0)
    engine = GraphedEngine(Workers(policy), max_prompt_tokens=16)
    prefixes = [Prefix((2,), (3,) * 61), Prefix((2,))]  # the other one needs whole strides
    params, generator = SamplingParams(LONGEST), torch.Generator().manual_seed(4)
    rollouts, _ = engine.continue_from(prefixes, count=100, sampling=params, generator=generator)
    eos = policy.tokenizer.eos_token_id
    assert all(rollout.finished == (rollout.response_ids[-1] == eos) for rollout in rollouts)
    assert {(len(rollout), rollout.finished) for rollout in rollouts} == {(1, True), (2, True), (3, True), (3, False)}


def test_a_seed_gives_the_same_responses_again_and_a_wave_alone_those_that_it_had() -> None:
    policy, params = random_policy(sharpness=6.0), SamplingParams(LONGEST)
    engine = GraphedEngine(Workers(policy), max_prompt_tokens=16, max_sequences=24)
    first, again = (rollouts_of(GraphedEngine, policy, max_sequences=24) for _ in range(2))
    assert_same(first, again, tolerance=0)
    order = sorted(range(10), key=lambda index: len(prefixes_of(policy)[index].response_ids))
    wave = [prefixes_of(policy)[index] for index in order for _ in range(4)][24:]
    generator = torch.Generator().manual_seed(4)
    engine.pass_over(24, generator)
    (alone,) = zip(*engine.continue_from(wave, count=1, sampling=params, generator=generator), strict=True)
    of_all = [first[4 * index + number] for index in order for number in range(4)][24:]
    assert_same(list(alone), of_all, tolerance=1e-5)


def test_within_a_stride_the_shorter_come_first_and_none_comes_late() -> None:
    policy = random_policy(sharpness=6.0)
    engine = GraphedEngine(Workers(policy), max_prompt_tokens=16)
    params, generator = SamplingParams(LONGEST), torch.Generator().manual_seed(4)
    told = engine.stream(prefixes_of(policy), count=4, sampling=params, generator=generator)
    lengths = [len(ended.rollout) for ended in told]
    assert lengths == sorted(lengths) and len(lengths) == 40


def test_nothing_to_decode_is_nothing() -> None:
    engine = GraphedEngine(Workers(random_policy()), max_prompt_tokens=16)
    assert engine.continue_from([], count=4, sampling=SamplingParams(4), generator=torch.Generator()) == []


def test_weights_that_are_nan_stop_the_sampling() -> None:
    policy = random_policy()
    with torch.no_grad():
        policy.head_weight[3, 3] = torch.nan
    with pytest.raises(TrainingHalted, match="NaN or infinite"):
        rollouts_of(GraphedEngine, policy)


def test_rows_that_would_be_cut_off_take_the_places_of_those_that_have_ended() -> None:
    going = [True, False, True, False, True, True]
    assert graphed_engine._kept_places(going, 4) == [0, 5, 2, 4]
    assert graphed_engine._kept_places([True, False, False, False], 2) == [0, 1]
    assert graphed_engine._kept_places([False, False, False, True], 1) == [3]


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "another architecture": ("gpt2", {}),
    "a sliding window": ("mistral with a sliding window", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_models_without_static_steps_are_refused(case: str) -> None:
    family, changes = CASES[case]
    policy = random_policy(family, **changes)
    assert not reproducible(policy)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), model=policy.model, decoder=policy.decoder)
    with pytest.raises(UserError, match=r"has no decoding step of fixed shapes.*set rollout.cuda_graphs = false"):
        require_graphs(on_gpu)


def test_another_attention_is_refused() -> None:
    policy = random_policy()
    assert reproducible(policy)
    policy.model.set_attn_implementation("eager")
    assert not reproducible(policy)


def test_another_device_is_refused_when_the_engine_is_opened() -> None:
    workers = Workers(random_policy())
    with pytest.raises(UserError, match=r"^rollout.cuda_graphs = true: the model is on cpu, which has no CUDA graphs"):
        open_engine(workers, TrainConfig.model_validate({"rollout": {"cuda_graphs": True}}))


@pytest.mark.parametrize(("graphs", "kind"), [(True, GraphedEngine), (False, EmbeddedEngine)])
def test_the_setting_decides_which_engine_is_opened(
    graphs: bool, kind: type[EmbeddedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Policy] = []
    monkeypatch.setattr("forkrl.rollout.opening.require_graphs", asked.append)
    workers = Workers(random_policy())
    engine = open_engine(workers, TrainConfig.model_validate({"rollout": {"cuda_graphs": graphs}}))
    assert type(engine) is kind
    assert asked == [workers.policy] * graphs


def test_several_workers_are_refused() -> None:
    workers = Workers(random_policy())
    workers.count = 2
    engine = GraphedEngine(workers, max_prompt_tokens=16)
    with pytest.raises(ValueError, match="graphs are of one worker"):
        engine.continue_from([Prefix((2,))], count=2, sampling=SamplingParams(4), generator=torch.Generator())


def test_one_step_just_large_enough_serves_all_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []

    class Counted(GraphedStep):
        def __init__(self, policy: Policy, num_sequences: int, capacity: int) -> None:
            made.append((num_sequences, capacity))
            super().__init__(policy, num_sequences, capacity)

    monkeypatch.setattr(graphed_engine, "GraphedStep", Counted)
    assert len(rollouts_of(GraphedEngine, random_policy(), max_sequences=17)) == 40
    assert made == [(17, 94)], "of the second wave: 30 tokens, and room for 64 after a shorter one"


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 5e-2)])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_on_a_gpu_give_what_the_same_steps_give_without(
    precision: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = random_policy(sharpness=6.0)
    torch.nn.Module.to(policy.model, "cuda")
    policy.precision = precision
    require_graphs(policy)
    captured: list[int] = []

    class Counted(graphed_step.Capture):
        def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
            captured.append(1)
            return super().__call__(run)

    monkeypatch.setattr(graphed_step, "Capture", Counted)
    graphed = rollouts_of(GraphedEngine, policy, max_sequences=24)
    assert len(captured) > 3
    monkeypatch.setattr(graphed_step, "Capture", lambda device: lambda run: run)
    assert_same(graphed, rollouts_of(GraphedEngine, policy, max_sequences=24), tolerance=tolerance)
    if precision == "fp32":  # in bf16 a token may fall otherwise where two are as likely
        greedy = [rollouts_of(kind, policy, temperature=0.0) for kind in (EmbeddedEngine, GraphedEngine)]
        assert_same(greedy[1], greedy[0], tolerance=tolerance)


def test_the_host_looks_for_ends_every_eight_tokens_and_no_oftener(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []
    plain = graphed_engine._count_to_stop

    def watched(tokens_SN: Tensor, stop_ids: Tensor) -> Tensor:
        looked_at.append(tokens_SN.shape[1])
        return plain(tokens_SN, stop_ids)

    monkeypatch.setattr(graphed_engine, "_count_to_stop", watched)
    longest = max(len(rollout) for rollout in rollouts_of(GraphedEngine, random_policy(), max_response_tokens=61))
    assert longest > 40
    assert looked_at == [8] * (longest // 8) + ([longest % 8 if longest == 61 else 8] if longest % 8 else [])
