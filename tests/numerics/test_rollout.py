"""The embedded engine samples from the softmax, and its statistics are those of a teacher-forced pass."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from forkrl.backward import compute_token_stats
from forkrl.batching import collate
from forkrl.errors import TrainingHalted, UserError
from forkrl.replicas import Replicas
from forkrl.rollout import EmbeddedEngine
from forkrl.rollout.sampling import sample_tokens
from forkrl.types import Prompt, RolloutGroup, SamplingParams
from tests.models import random_policy

FAMILIES = ["qwen3", "llama", "mistral with a sliding window", "gpt2"]
PROMPTS = [Prompt(str(index), text, "") for index, text in enumerate(["1 2", "987654321 0", "5", "31 41 59 26"])]


def generate(
    family: str = "qwen3", *, group_size: int = 6, max_sequences: int = 256, seed: int = 0, **sampling: float
) -> list[RolloutGroup]:
    engine = EmbeddedEngine(
        Replicas(random_policy(family, sharpness=6.0)), max_prompt_tokens=16, max_sequences=max_sequences
    )
    params = SamplingParams(**{"max_response_tokens": 40, **sampling})  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    return engine.generate(PROMPTS, group_size=group_size, sampling=params, generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_statistics_equal_a_pass_of_the_model_itself(family: str, temperature: float) -> None:
    policy = random_policy(family, sharpness=6.0)
    lengths = set()
    for group in generate(family, temperature=temperature, group_size=12):
        for rollout in group.rollouts:
            ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
            with torch.no_grad():
                logits_TV = policy.model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
            logprobs_TV = (logits_TV / temperature).log_softmax(-1)
            expected = logprobs_TV.gather(1, ids[0, len(rollout.prompt_ids) :, None])[:, 0]
            torch.testing.assert_close(rollout.logprobs, expected, atol=1e-4, rtol=0)
            entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
            torch.testing.assert_close(rollout.entropy, entropy_T, atol=1e-4, rtol=0)
            lengths.add(len(rollout))
    assert len(lengths) > 2, "sequences must end at different times, so that some leave the batch early"


@pytest.mark.parametrize("family", FAMILIES)
def test_training_sees_the_same_statistics_as_sampling(family: str) -> None:
    policy, groups = random_policy(family, sharpness=6.0), generate(family)
    batch = collate(groups, torch.zeros(len(groups), 6), pad_id=0)
    with torch.no_grad():
        measured = compute_token_stats(policy, batch, temperature=1.0)
    torch.testing.assert_close(measured.logprobs, batch.old_logprobs, atol=1e-4, rtol=0)
    torch.testing.assert_close(measured.entropy, batch.rollout_entropy, atol=1e-4, rtol=0)
    assert batch.num_response_tokens == sum(len(rollout) for group in groups for rollout in group.rollouts)


def test_frequencies_match_the_softmax() -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -3.0])
    drawn, _, _ = sample_tokens(
        logits_V.expand(60_000, -1), SamplingParams(1, temperature=0.7), torch.Generator().manual_seed(1)
    )
    expected = (logits_V.double() / 0.7).softmax(-1) * 60_000
    assert stats.chisquare(drawn.bincount(minlength=6).numpy(), expected.numpy()).pvalue > 0.001


def test_frequencies_of_a_whole_decode_match_the_model() -> None:
    """Three thousand first and second tokens of one prompt, against the model's own joint probabilities."""
    policy = random_policy(sharpness=2.0)
    engine = EmbeddedEngine(Replicas(policy), max_prompt_tokens=16, max_sequences=1000)
    groups = engine.generate(
        PROMPTS[:1], group_size=3000, sampling=SamplingParams(2), generator=torch.Generator().manual_seed(2)
    )
    size = len(policy.tokenizer)
    prompt = torch.tensor([groups[0].rollouts[0].prompt_ids])
    with torch.no_grad():
        first_V = policy.model(input_ids=prompt).logits[0, -1].softmax(-1)
        pairs = torch.cat([prompt.expand(size, -1), torch.arange(size)[:, None]], 1)
        joint = first_V[:, None] * policy.model(input_ids=pairs).logits[:, -1].softmax(-1)
    joint = joint.double()
    joint[1] = 0  # after EOS nothing follows
    counts = torch.zeros(size, size, dtype=torch.float64)
    for rollout in groups[0].rollouts:
        if len(rollout) == 2:
            counts[rollout.response_ids] += 1
    often = joint * 3000 > 5
    assert int(often.sum()) > 20
    observed = torch.cat([counts[often], (3000 - counts[often].sum())[None]])
    expected = torch.cat([joint[often] * 3000, (3000 * (1 - joint[often].sum()))[None]])
    assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 0.001


def test_top_k_and_top_p_restrict_the_draw_but_not_the_statistics() -> None:
    logits_SV = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(2000, -1)
    generator = torch.Generator().manual_seed(0)
    free = sample_tokens(logits_SV, SamplingParams(1), generator)
    top_k = sample_tokens(logits_SV, SamplingParams(1, top_k=2), generator)
    top_p = sample_tokens(logits_SV, SamplingParams(1, top_p=0.7), generator)  # 0.64 and 0.88 with the second
    assert set(free[0].tolist()) == {0, 1, 2, 3}
    assert set(top_k[0].tolist()) == {0, 1}
    assert set(top_p[0].tolist()) == {0, 1}
    assert set(sample_tokens(logits_SV, SamplingParams(1, top_p=0.6), generator)[0].tolist()) == {0}
    expected = logits_SV[0].log_softmax(-1)
    for tokens, logprobs, entropy in (free, top_k, top_p):
        torch.testing.assert_close(logprobs, expected[tokens])
        torch.testing.assert_close(entropy, -(expected.exp() * expected).sum().expand(2000))


def test_greedy_takes_the_likeliest_and_reports_temperature_1() -> None:
    logits_SV = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    tokens, logprobs, _ = sample_tokens(logits_SV, SamplingParams(1, temperature=0), torch.Generator())
    assert tokens.equal(logits_SV.argmax(-1))
    torch.testing.assert_close(logprobs, logits_SV.log_softmax(-1).amax(-1))


def test_the_same_seed_gives_the_same_responses_and_another_does_not() -> None:
    first, again, other = (
        [rollout.response_ids for group in generate(seed=seed) for rollout in group.rollouts] for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


def test_waves_keep_the_order_of_prompts_and_groups() -> None:
    groups = generate(max_sequences=5)
    assert [group.prompt.id for group in groups] == ["0", "1", "2", "3"]
    tokenizer = random_policy().tokenizer
    for group in groups:
        assert len(group.rollouts) == 6
        assert all(tokenizer.decode(list(rollout.prompt_ids)) == group.prompt.text for rollout in group.rollouts)


def test_stop_tokens_end_a_response_and_stay_out_of_its_text() -> None:
    policy = random_policy()
    engine = EmbeddedEngine(Replicas(policy), max_prompt_tokens=16)
    sampling = SamplingParams(40, stop_token_ids=policy.stop_token_ids([" "]))
    groups = engine.generate(PROMPTS, group_size=8, sampling=sampling, generator=torch.Generator().manual_seed(0))
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    ends = set(sampling.stop_token_ids) | {policy.tokenizer.eos_token_id}
    assert any(rollout.response_ids[-1] == sampling.stop_token_ids[0] for rollout in rollouts)
    for rollout in rollouts:
        assert rollout.finished == (rollout.response_ids[-1] in ends)
        assert not ends & set(rollout.response_ids[:-1])
        assert " " not in rollout.text
        assert "<eos>" not in rollout.text


def test_a_response_without_a_stop_token_is_cut_and_says_so() -> None:
    rollouts = [rollout for group in generate(max_response_tokens=3) for rollout in group.rollouts]
    assert {len(rollout) for rollout in rollouts if not rollout.finished} == {3}


def test_a_stop_token_must_be_one_token() -> None:
    with pytest.raises(UserError, match=r"rollout.stop: '12' is 2 tokens"):
        random_policy().stop_token_ids(["12"])


def test_prompts_that_cannot_be_answered_are_refused() -> None:
    engine = EmbeddedEngine(Replicas(random_policy()), max_prompt_tokens=4)
    generator = torch.Generator()
    with pytest.raises(UserError, match=r"prompt long: 5 tokens, over rollout.max_prompt_tokens = 4"):
        engine.generate([Prompt("long", "12345", "")], group_size=2, sampling=SamplingParams(2), generator=generator)
    with pytest.raises(UserError, match=r"prompt empty: no tokens"):
        engine.generate([Prompt("empty", "", "")], group_size=2, sampling=SamplingParams(2), generator=generator)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_response_beyond_the_model_s_positions_is_refused(family: str) -> None:
    engine = EmbeddedEngine(Replicas(random_policy(family)), max_prompt_tokens=16)
    sampling = SamplingParams(max_response_tokens=120)
    with pytest.raises(UserError, match="more than the 128 positions of the model; set it to 117 or less"):
        engine.generate(PROMPTS, group_size=2, sampling=sampling, generator=torch.Generator())


def test_weights_that_are_nan_stop_the_sampling() -> None:
    policy = random_policy()
    with torch.no_grad():
        policy.head_weight[3, 3] = torch.nan
    engine = EmbeddedEngine(Replicas(policy), max_prompt_tokens=16)
    with pytest.raises(TrainingHalted, match="NaN or infinite"):
        engine.generate(PROMPTS, group_size=2, sampling=SamplingParams(4), generator=torch.Generator())
