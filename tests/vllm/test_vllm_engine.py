"""The vLLM engine against the model that it samples from, with the real vLLM."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from scipy import stats

from forkrl.config import LoraConfig, ModelConfig
from forkrl.config.train import RolloutConfig
from forkrl.errors import EngineLost, UserError
from forkrl.evaluation.samplers import EvalSampling, SampleRequest, VllmSampler
from forkrl.method.batches import collate
from forkrl.model.adapter import add_adapter
from forkrl.model.forward import compute_token_stats
from forkrl.model.policy import Policy, open_policy
from forkrl.parallel.workers import Workers
from forkrl.rollout import vllm_engine
from forkrl.rollout.embedded import Prefix
from forkrl.rollout.fork_temperature import ForkTemperature, entropy_of
from forkrl.rollout.held_out import evaluation_generator
from forkrl.rollout.logprob_gap import gap_of_rollouts
from forkrl.rollout.vllm_engine import VllmEngine
from forkrl.types import Prompt, Rollout, RolloutGroup, SamplingParams
from tests.families import TRAINABLE, family_policy
from tests.processes import is_running

MAX_TOKENS = 96
PROMPTS = [Prompt(str(left), f"{left} 7 {left + 3}:{10 + left}?", "") for left in range(1, 9)]


def opened(workers: Workers, **limits: Any) -> VllmEngine:
    settings = {"engine": "vllm", "max_prompt_tokens": 24, "max_response_tokens": MAX_TOKENS, "max_sequences": 64}
    return VllmEngine(workers, RolloutConfig.model_validate(settings | limits))


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmEngine]:
    with Workers(open_policy(ModelConfig(), "cpu")) as workers:
        yield opened(workers)


@pytest.fixture
def weights(engine: VllmEngine) -> Iterator[Callable[[float], None]]:
    """What adds noise of a given size to all weights; they are restored at the end."""
    model = engine.policy.model
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def add(size: float) -> None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))

    yield add
    model.load_state_dict(before)


def sample(engine: VllmEngine, seed: int = 0, group_size: int = 8, **sampling: Any) -> list[RolloutGroup]:
    params = SamplingParams(**{"max_response_tokens": MAX_TOKENS} | sampling)
    generator = torch.Generator().manual_seed(seed)
    return engine.generate(PROMPTS, group_size=group_size, sampling=params, generator=generator)


def flat(groups: list[RolloutGroup]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group.rollouts]


def ids(groups: list[RolloutGroup]) -> list[tuple[int, ...]]:
    return [rollout.response_ids for rollout in flat(groups)]


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.6, "top_p": 0.8, "top_k": 5},
        {"temperature": 1.7},
        {"temperature": 0.0},
        {"fork_temperature": ForkTemperature(1.5, 0.5, 0.3), "top_p": 0.9},
    ],
)
def test_logprobs_and_entropies_are_those_of_one_pass_over_the_sequence(
    engine: VllmEngine, sampling: dict[str, Any]
) -> None:
    groups = sample(engine, **sampling)
    batch = collate(groups, torch.zeros(len(groups), 8), pad_id=0)
    with torch.no_grad():
        exact = compute_token_stats(engine.policy, batch, temperature=sampling.get("temperature") or 1.0)
    mask_BT = batch.response_mask
    assert int(mask_BT.sum()) > 1000
    torch.testing.assert_close(batch.old_logprobs[mask_BT], exact.logprobs[mask_BT], atol=1e-4, rtol=0)
    torch.testing.assert_close(batch.rollout_entropy[mask_BT], exact.entropy[mask_BT], atol=1e-4, rtol=0)


def logits_after(engine: VllmEngine, ids: tuple[int, ...], first: int) -> torch.Tensor:
    """Logits ``[T, V]`` of what follows ids ``first``, ``first`` + 1, … to the last."""
    policy = engine.policy
    with torch.no_grad():
        return policy.logits(policy.hidden_states(torch.tensor([ids]))[0, first:])


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (2.0, 2.0), (2.0, 0.5), (0.4, 1.0)])
def test_first_tokens_follow_the_softmax(engine: VllmEngine, temperatures: tuple[float, float]) -> None:
    group_size, (high, low) = 1000, temperatures
    logits_PV = torch.cat([logits_after(engine, engine.prefix(prompt).ids, -1) for prompt in PROMPTS])
    entropy_P = entropy_of(logits_PV)
    threshold = float(entropy_P[:3].min() + entropy_P[:3].max()) / 2
    rule = ForkTemperature(high, low, threshold)
    how: dict[str, Any] = {"temperature": high} if high == low else {"fork_temperature": rule}
    groups = sample(engine, group_size=group_size, max_response_tokens=1, **how)
    probs_PV = rule(None, logits_PV.double()).softmax(-1)
    for group, probs_V in zip(groups[:3], probs_PV, strict=False):
        counts_V = torch.bincount(torch.tensor([rollout.response_ids[0] for rollout in group.rollouts]), minlength=26)
        often_V = probs_V * group_size >= 5
        expected = [*(probs_V[often_V] * group_size).tolist(), float(probs_V[~often_V].sum() * group_size) + 1e-9]
        observed = [*counts_V[often_V].tolist(), int(counts_V[~often_V].sum())]
        assert stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize(("high", "low"), [(1.0, 0.0), (0.0, 1.0)])
def test_greedy_at_forks_or_elsewhere(engine: VllmEngine, high: float, low: float) -> None:
    threshold = 0.3
    rollouts = flat(sample(engine, fork_temperature=ForkTemperature(high, low, threshold)))
    likeliest, greedy = [], []
    for rollout in rollouts:
        logits_TV = logits_after(engine, rollout.prompt_ids + rollout.response_ids[:-1], len(rollout.prompt_ids) - 1)
        likeliest.append(logits_TV.argmax(-1) == torch.tensor(rollout.response_ids))
        greedy.append((rollout.entropy > threshold) == (high == 0))
    likeliest_N, greedy_N = torch.cat(likeliest), torch.cat(greedy)
    assert greedy_N.any() and likeliest_N[greedy_N].all()
    assert not likeliest_N[~greedy_N].all()


def test_the_same_generator_gives_the_same_responses(engine: VllmEngine) -> None:
    generator, again = (torch.Generator().manual_seed(5) for _ in range(2))
    params = SamplingParams(MAX_TOKENS)
    both = [
        engine.generate(PROMPTS, group_size=4, sampling=params, generator=each) for each in (generator, again, again)
    ]
    assert ids(both[0]) == ids(both[1]) != ids(both[2])
    assert "vllm" not in sys.modules, "it changes functions of torch in the process that imports it"
    for one, other in zip(flat(both[0]), flat(both[1]), strict=True):
        assert torch.equal(one.logprobs, other.logprobs) and torch.equal(one.entropy, other.entropy)
    passed = torch.Generator().manual_seed(5)
    engine.pass_over(len(flat(both[0])), passed)
    assert torch.equal(passed.get_state(), generator.get_state())
    assert len(set(ids(both[0])[:4])) > 1, "a group whose responses share a seed"


def test_changed_weights_are_sampled_from(engine: VllmEngine, weights: Callable[[float], None]) -> None:
    before = sample(engine, temperature=0.0)
    for size in (0.02, 0.05):  # twice: the first sync must leave vLLM fit for the second
        weights(size)
        after = sample(engine, temperature=0.0)
        assert ids(after) != ids(before)
        gap = gap_of_rollouts(engine.policy, flat(after))
        assert gap.max < 1e-4
        before = after


def test_weights_are_taken_over_only_if_they_changed(
    engine: VllmEngine, weights: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample(engine)
    asked, ask = list[str](), engine._ask

    def noted(*message: Any) -> Iterator[Any]:
        asked.append(message[0])
        return ask(*message)

    monkeypatch.setattr(engine, "_ask", noted)
    sample(engine)
    weights(0.01)
    sample(engine)
    assert asked == ["generate", "sync", "generate"]


def test_a_step_of_the_optimizer_counts_as_a_change(engine: VllmEngine, weights: Callable[[float], None]) -> None:
    from forkrl.training.update import _take_step

    before = ids(sample(engine, temperature=0.0))
    optimizer = torch.optim.AdamW(engine.policy.model.parameters(), lr=0.05, fused=True)
    for parameter in engine.policy.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    _take_step(engine.policy, optimizer, max_norm=1.0)
    optimizer.zero_grad()
    after = sample(engine, temperature=0.0)
    assert ids(after) != before
    assert gap_of_rollouts(engine.policy, flat(after)).max < 1e-4


def test_responses_are_reported_as_they_finish(engine: VllmEngine) -> None:
    reported: list[tuple[Prompt, Rollout]] = []
    before = engine.workers.sequences_finished
    groups = engine.generate(
        PROMPTS,
        group_size=8,
        sampling=SamplingParams(MAX_TOKENS),
        generator=torch.Generator().manual_seed(0),
        on_finished=lambda prompt, rollout: reported.append((prompt, rollout)),
    )
    lengths = [len(rollout) for _, rollout in reported]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]
    assert {id(rollout) for _, rollout in reported} == {id(rollout) for rollout in flat(groups)}
    of_prompt = {group.prompt.id: {id(rollout) for rollout in group.rollouts} for group in groups}
    assert all(id(rollout) in of_prompt[prompt.id] for prompt, rollout in reported)
    assert engine.workers.sequences_finished - before == 64


def test_stop_tokens_and_limits(engine: VllmEngine) -> None:
    policy = engine.policy
    semicolon = policy.tokenizer.encode(";", add_special_tokens=False)
    for stop, ends in ((), policy.stop_token_ids()), (tuple(semicolon), (*policy.stop_token_ids(), *semicolon)):
        rollouts = flat(sample(engine, stop_token_ids=stop))
        for rollout in rollouts:
            assert rollout.finished == (rollout.response_ids[-1] in ends)
            assert not set(rollout.response_ids[:-1]) & set(ends)
            assert rollout.finished or len(rollout) == MAX_TOKENS
        assert {rollout.finished for rollout in rollouts} >= {True}
    short = flat(sample(engine, max_response_tokens=5))
    assert {len(rollout) for rollout in short} == {5} and not any(rollout.finished for rollout in short)
    assert len(short[0].text) <= 5


def test_a_response_is_continued(engine: VllmEngine) -> None:
    start = flat(sample(engine, temperature=0.0, group_size=1))[0]
    prefix = Prefix(start.prompt_ids, start.response_ids[:7])
    [[rest]] = engine.continue_from(
        [prefix], count=1, sampling=SamplingParams(MAX_TOKENS, temperature=0.0), generator=torch.Generator()
    )
    assert rest.response_ids == start.response_ids[7:]


def test_an_evaluation_samples_what_a_run_would_also_when_it_resumes(engine: VllmEngine) -> None:
    sampling = EvalSampling(MAX_TOKENS, temperature=1.0, seed=3, stop=())
    grid = [SampleRequest(prompt, number) for prompt in PROMPTS for number in range(8)]
    groups = engine.generate(
        PROMPTS,
        group_size=8,
        sampling=SamplingParams(MAX_TOKENS),
        generator=evaluation_generator(3, engine.policy.device),
    )
    expected = {request.key: rollout for request, rollout in zip(grid, flat(groups), strict=True)}
    for missing in (grid, grid[5:40:3]):
        found = list(VllmSampler(engine).sample(missing, sampling, grid))
        assert {each.request.key for each in found} == {request.key for request in missing}
        for each in found:
            rollout = expected[each.request.key]
            assert (each.text, each.tokens, each.finished) == (rollout.text, len(rollout), rollout.finished)
            assert each.entropy == pytest.approx(float(rollout.entropy.mean()), abs=1e-4)


def test_what_does_not_fit_is_an_error(engine: VllmEngine) -> None:
    with pytest.raises(UserError, match="max_prompt_tokens"):
        engine.check_prompts([Prompt("long", "1 " * 40, "")], MAX_TOKENS)
    with pytest.raises(UserError, match=r"more than the 512 positions"):
        engine.check_prompts(PROMPTS, 512)
    with pytest.raises(ValueError, match="the engine was opened for 120"):
        sample(engine, max_response_tokens=200)
    assert len(flat(sample(engine, group_size=1))) == 8, "an error before sampling must not close it"


def test_weights_of_several_workers_little_memory_and_a_process_that_hangs(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one test, because every engine takes its time to open."""
    with Workers(open_policy(ModelConfig(), "cpu"), count=2, threads=1) as workers:
        engine = opened(workers, kv_cache_gib=0.0015)  # 24 blocks of 32 tokens; a long response needs 4
        groups = sample(engine, group_size=2)
        assert gap_of_rollouts(engine.policy, flat(groups)).max < 1e-4
        assert all(len(rollout.entropy) == len(rollout) for rollout in flat(groups))
        pid = engine._child.process.pid
        os.kill(pid, signal.SIGSTOP)
        monkeypatch.setattr(vllm_engine, "SILENCE_S", 0.5)
        with pytest.raises(EngineLost, match="the process of vLLM has sent nothing for 0.5 seconds"):
            sample(engine)
        assert not is_running(pid)
        with pytest.raises(RuntimeError, match="this engine is closed"):
            sample(engine)
    assert capfd.readouterr() == ("", ""), "vLLM's own messages are for nobody"


@pytest.mark.parametrize(
    ("family", "targets"),
    [("qwen3", ("all-linear",)), ("qwen3", ("q_proj", "down_proj")), ("llama", ("all-linear",))],
    ids=["all-linear", "two layers", "llama"],
)
def test_an_adapter_alone_is_taken_over(family: str, targets: tuple[str, ...]) -> None:
    """Again and again, and vLLM, which scales its copy of B in place, leaves the trained one as it is."""
    policy = open_policy(ModelConfig(), "cpu") if family == "qwen3" else family_policy(family, {"head_dim": 32})
    policy.adapter = add_adapter(policy.model, LoraConfig(rank=3, alpha=24, targets=targets), ModelConfig())
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    with Workers(policy) as workers:
        engine, before = opened(workers), None
        for seed in range(3):
            values = [parameter.clone() for parameter in trained]
            rollouts = flat(sample(engine, group_size=2))
            assert all(torch.equal(*pair) for pair in zip(trained, values, strict=True))
            assert gap_of_rollouts(policy, rollouts).max < 1e-4
            assert [rollout.response_ids for rollout in rollouts] != before
            before = [rollout.response_ids for rollout in rollouts]
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in trained:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def adapted_gpt2(monkeypatch: pytest.MonkeyPatch) -> Policy:
    policy = family_policy("gpt2", TRAINABLE["gpt2"])
    policy.adapter = add_adapter(policy.model, LoraConfig(rank=8), ModelConfig())
    return policy


def old_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "_PROGRAM", f"import vllm\nvllm.__version__ = '0.31.2'\n{vllm_engine._PROGRAM}")


def huge_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "_kv_cache_bytes", lambda policy, limits: 2**50)


def unknown_model(monkeypatch: pytest.MonkeyPatch) -> Policy:
    return family_policy("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]})


@pytest.mark.parametrize(
    ("cause", "says", "remedy"),
    [
        (old_version, "vLLM 0.32 or newer is needed, this is 0.31.2", "change that"),
        (huge_cache, "Available memory on node 0", "lower rollout.kv_cache_gib"),
        (unknown_model, "GPTNeoForCausalLM", "change that"),
        (adapted_gpt2, "GPT2LMHeadModel does not support LoRA", "change that"),
    ],
    ids=["old version", "more memory than there is", "unknown model", "a model without adapters"],
)
def test_what_vllm_cannot_open_is_refused_in_one_line(
    cause: Callable[[pytest.MonkeyPatch], Policy | None], says: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = cause(monkeypatch) or open_policy(ModelConfig(), "cpu")
    with Workers(policy) as workers, pytest.raises(UserError) as refused:
        opened(workers)
    message = str(refused.value)
    assert message.startswith(f'rollout.engine = "vllm" cannot run {type(policy.model).__name__}: ')
    assert says in message and "\n" not in message
    assert message.endswith(f'; {remedy}, or set rollout.engine = "torch"')


def test_a_rank_that_vllm_does_not_have_is_refused() -> None:
    policy = open_policy(ModelConfig(), "cpu")
    policy.adapter = add_adapter(policy.model, LoraConfig(rank=513), ModelConfig())
    with Workers(policy) as workers, pytest.raises(UserError, match=r"lora.rank = 513: .* has at most 512"):
        opened(workers)
