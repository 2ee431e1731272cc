"""The embedded engine samples from the softmax, and its statistics are those of a teacher-forced pass."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy import stats

from forkrl.errors import TrainingHalted, UserError
from forkrl.method.batches import collate
from forkrl.model.forward import compute_token_stats
from forkrl.model.policy import Policy
from forkrl.parallel.workers import Workers
from forkrl.rollout import EmbeddedEngine, embedded
from forkrl.rollout.embedded import Prefix
from forkrl.rollout.growing_cache import ROOM, GrowingLayer
from forkrl.rollout.sampling import BLOCK, BUCKETS, CACHED_LOGITS, _draw, _nucleus, sample_tokens
from forkrl.types import Prompt, Rollout, RolloutGroup, SamplingParams
from tests.models import random_policy

FAMILIES = ["qwen3", "llama", "mistral with a sliding window", "gpt2"]
PROMPTS = [Prompt(str(index), text, "") for index, text in enumerate(["1 2", "987654321 0", "5", "31 41 59 26"])]


def generate(
    family: str = "qwen3", *, group_size: int = 6, max_sequences: int = 256, seed: int = 0, **sampling: float
) -> list[RolloutGroup]:
    engine = EmbeddedEngine(
        Workers(random_policy(family, sharpness=6.0)), max_prompt_tokens=16, max_sequences=max_sequences
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


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
@pytest.mark.parametrize("restrictions", [{}, {"temperature": 1.7}, {"top_k": 300}, {"top_p": 0.9}])
def test_frequencies_match_the_softmax_of_a_vocabulary_of_several_blocks(size: int, restrictions: Any) -> None:
    logits_V = 2 * torch.randn(size, generator=torch.Generator().manual_seed(size))
    drawn = torch.cat(
        [
            sample_tokens(logits_V.expand(5000, -1), SamplingParams(1, **restrictions), generator)[0]
            for generator in (torch.Generator().manual_seed(seed) for seed in range(20))
        ]
    )
    probs = (logits_V.double() / restrictions.get("temperature", 1)).softmax(-1)
    if restrictions.keys() & {"top_k", "top_p"}:
        ordered, order = probs.sort(descending=True)
        kept = torch.arange(size) < restrictions.get("top_k", size)
        kept &= ordered.cumsum(0) - ordered < restrictions.get("top_p", 1)
        probs = torch.zeros_like(probs).scatter(0, order[kept], ordered[kept] / ordered[kept].sum())
    assert not drawn[probs[drawn] == 0].numel()
    observed, expected = drawn.bincount(minlength=size).double(), probs * len(drawn)
    rare = expected < 10  # together they make one cell
    cells = [(observed[~rare], expected[~rare]), (observed[rare].sum()[None], expected[rare].sum()[None])]
    observed, expected = (torch.cat(each) for each in zip(*cells, strict=True))
    used = expected > 0
    assert used.sum() < 2 or stats.chisquare(observed[used].numpy(), expected[used].numpy()).pvalue > 0.001


@pytest.mark.parametrize("size", [4, 5 * BLOCK + 3])
@pytest.mark.parametrize("likely", [0, -1])
def test_rare_tokens_get_their_share_down_to_the_resolution_of_fp32(size: int, likely: int) -> None:
    """A token of probability 1 - 1e-9 and many that share the rest: exact inverse of the distribution function."""
    logits_V = torch.full((size,), math.log(1e-9 / (size - 1)))
    logits_V[likely] = 0.0
    cumulative = logits_V.double().exp().cumsum(0)
    uniform = torch.linspace(1e-12, 1 - 1e-12, 50, dtype=torch.float64)
    tails = torch.cat([uniform * 1e-9, 1 - uniform * 1e-9, uniform])
    expected = torch.searchsorted(cumulative / cumulative[-1], tails, right=True)
    found = _draw(logits_V.exp().expand(len(tails), -1), tails)
    # At a border between two tokens, rounding decides.
    assert (found - expected).abs().max() <= 1


@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 2**-53])
def test_an_impossible_token_is_never_drawn(uniform: float) -> None:
    """Zero weights at both ends, at borders of blocks, and whole blocks of them."""
    for possible in ([1], [BLOCK - 1, BLOCK], [BLOCK + 3, 4 * BLOCK], [4 * BLOCK + 1]):
        weights_V = torch.zeros(4 * BLOCK + 3)
        weights_V[possible] = 1e-30
        assert int(_draw(weights_V[None], torch.tensor([uniform], dtype=torch.float64))) in possible


def test_rows_are_the_same_together_and_alone() -> None:
    """More logits than a part holds, and rows with -inf."""
    logits_SV = 3 * torch.randn(7, CACHED_LOGITS // 3 + 5, generator=torch.Generator().manual_seed(0))
    logits_SV[:, ::5] = -torch.inf
    tokens, logprobs, entropy = sample_tokens(logits_SV, SamplingParams(1), torch.Generator().manual_seed(1))
    uniform_S = torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert tokens.tolist() == [
        int(_draw(row[None], u[None])) for row, u in zip(logits_SV.softmax(-1), uniform_S, strict=True)
    ]
    exact_SV = logits_SV.double().log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), exact_SV.gather(1, tokens[:, None])[:, 0], atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), torch.special.entr(exact_SV.exp()).sum(-1), atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_show_in_the_statistics(value: float) -> None:
    logits_SV = torch.zeros(2, 2 * BLOCK + 1)
    logits_SV[1, 3] = value
    tokens, logprobs, entropy = sample_tokens(logits_SV, SamplingParams(1), torch.Generator())
    assert logprobs.isfinite().tolist() == entropy.isfinite().tolist() == [True, False]
    assert 0 <= int(tokens[1]) < 2 * BLOCK + 1


def test_frequencies_of_a_whole_decode_match_the_model() -> None:
    """Three thousand first and second tokens of one prompt, against the model's own joint probabilities."""
    policy = random_policy(sharpness=2.0)
    engine = EmbeddedEngine(Workers(policy), max_prompt_tokens=16, max_sequences=1000)
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


def drawn(probs: list[float], **restrictions: Any) -> set[int]:
    """Every token that 500 draws give."""
    logits_SV = torch.tensor(probs).log().expand(500, -1)
    tokens_S, _, _ = sample_tokens(logits_SV, SamplingParams(1, **restrictions), torch.Generator().manual_seed(0))
    return set(tokens_S.tolist())


def test_the_nucleus_is_taken_of_what_top_k_leaves() -> None:
    """Of 0.4 and 0.3, top-k leaves 0.57 and 0.43: half of the mass is reached with the first. Of all four it is not."""
    probs = [0.4, 0.3, 0.2, 0.1]
    assert drawn(probs, top_k=2, top_p=0.5) == {0}
    assert drawn(probs, top_k=2) == drawn(probs, top_p=0.5) == {0, 1}


def test_a_nucleus_that_is_reached_exactly_takes_no_further_token() -> None:
    assert drawn([0.25] * 4, top_p=0.5) == {0, 1}
    assert drawn([0.25] * 4, top_p=0.51) == {0, 1, 2}


@pytest.mark.parametrize("size", [7, BUCKETS, BUCKETS + 1, 2 * BUCKETS + 5])
@pytest.mark.parametrize("spread", [0.0, 0.1, 2.0, 15.0])
def test_the_nucleus_is_that_of_a_stable_sort(size: int, spread: float) -> None:
    """Ties (lower ids come first), impossible tokens, and shares down to one token and up to all."""
    logits_SV = spread * torch.randn(4, size, generator=torch.Generator().manual_seed(size))
    logits_SV[1:3] = logits_SV[1:3].round()
    logits_SV[2, ::3] = -torch.inf
    weights_SV = (logits_SV - logits_SV.amax(-1, keepdim=True)).exp()
    for top_p in (1e-9, 0.1, 0.5, 0.9, 0.999, 1 - 1e-7):
        kept_SV = _nucleus(weights_SV, top_p)
        for kept_V, weights_V in zip(kept_SV.tolist(), weights_SV.tolist(), strict=True):
            expected, before, mass = [0.0] * size, 0.0, top_p * math.fsum(weights_V)
            for place in sorted(range(size), key=lambda place: (-weights_V[place], place)):
                if before >= mass:
                    break
                expected[place] = weights_V[place]
                before += weights_V[place]
            assert kept_V == expected


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
    engine = EmbeddedEngine(Workers(policy), max_prompt_tokens=16)
    sampling = SamplingParams(40, stop_token_ids=policy.stop_token_ids([" "]))
    groups = engine.generate(PROMPTS, group_size=8, sampling=sampling, generator=torch.Generator().manual_seed(0))
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    ends, [space] = set(sampling.stop_token_ids), policy.tokenizer.encode(" ")
    assert ends == {policy.tokenizer.eos_token_id, space}
    assert any(rollout.response_ids[-1] == space for rollout in rollouts)
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
    engine = EmbeddedEngine(Workers(random_policy()), max_prompt_tokens=4)
    generator = torch.Generator()
    with pytest.raises(UserError, match=r"prompt long: 5 tokens, over rollout.max_prompt_tokens = 4"):
        engine.generate([Prompt("long", "12345", "")], group_size=2, sampling=SamplingParams(2), generator=generator)
    with pytest.raises(UserError, match=r"prompt empty: no tokens"):
        engine.generate([Prompt("empty", "", "")], group_size=2, sampling=SamplingParams(2), generator=generator)


@pytest.mark.parametrize("count", [1, 2])
def test_running_out_of_memory_names_the_setting(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forkrl.rollout.embedded.sample_tokens", lambda *_: torch.empty(2**60, dtype=torch.uint8))
    with Workers(random_policy(), count=count) as workers:
        engine = EmbeddedEngine(workers, max_prompt_tokens=16, max_sequences=64)
        with pytest.raises(TrainingHalted, match=r"out of memory \(.*; lower rollout.max_sequences = 64"):
            engine.generate(PROMPTS, group_size=2, sampling=SamplingParams(2), generator=torch.Generator())


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_response_beyond_the_model_s_positions_is_refused(family: str) -> None:
    engine = EmbeddedEngine(Workers(random_policy(family)), max_prompt_tokens=16)
    sampling = SamplingParams(max_response_tokens=120)
    with pytest.raises(UserError, match="more than the 128 positions of the model; set it to 117 or less"):
        engine.generate(PROMPTS, group_size=2, sampling=sampling, generator=torch.Generator())


def test_weights_that_are_nan_stop_the_sampling() -> None:
    policy = random_policy()
    with torch.no_grad():
        policy.head_weight[3, 3] = torch.nan
    engine = EmbeddedEngine(Workers(policy), max_prompt_tokens=16)
    with pytest.raises(TrainingHalted, match="NaN or infinite"):
        engine.generate(PROMPTS, group_size=2, sampling=SamplingParams(4), generator=torch.Generator())


def _prefixes(policy: Policy) -> list[Prefix]:
    """Beginnings of very different lengths, not in order, one of them a bare prompt."""
    encode = policy.tokenizer.encode
    texts = [("1 2", ""), ("5", "3" * 29), ("987654321 0", "4 4"), ("5", "0123456789" * 2), ("5", "7" * 37)]
    return [Prefix(tuple(encode(prompt)), tuple(encode(response))) for prompt, response in texts]


def continued(family: str = "qwen3", *, count: int = 60, max_sequences: int = 120) -> list[tuple[Rollout, ...]]:
    policy = random_policy(family, sharpness=6.0)
    engine = EmbeddedEngine(Workers(policy), max_prompt_tokens=16, max_sequences=max_sequences)
    generator = torch.Generator().manual_seed(4)
    return engine.continue_from(_prefixes(policy), count=count, sampling=SamplingParams(40), generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("leaving", ["as soon as it pays", "never"])
def test_continuations_keep_their_order_their_statistics_and_each_its_own_limit(
    family: str, leaving: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if leaving == "never":  # those that are done linger, and what they still draw must not count
        monkeypatch.setattr("forkrl.rollout.embedded.COMPACT_FRACTION", 2.0)
    policy = random_policy(family, sharpness=6.0)
    for prefix, rollouts in zip(_prefixes(policy), continued(family), strict=True):
        room = 40 - len(prefix.response_ids)
        assert len(rollouts) == 60
        cut = {len(rollout) for rollout in rollouts if not rollout.finished}
        assert cut == {room} if room < 12 else cut <= {room}  # with more room hardly one comes so far
        for rollout in rollouts:
            assert rollout.prompt_ids == prefix.ids
            assert 1 <= len(rollout) <= room
            assert rollout.finished == (rollout.response_ids[-1] == policy.tokenizer.eos_token_id)
            assert policy.tokenizer.eos_token_id not in rollout.response_ids[:-1]
        for rollout in rollouts[:8]:
            ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
            with torch.no_grad():
                logprobs_TV = policy.model(input_ids=ids).logits[0, len(prefix.ids) - 1 : -1].log_softmax(-1)
            expected = logprobs_TV.gather(1, ids[0, len(prefix.ids) :, None])[:, 0]
            torch.testing.assert_close(rollout.logprobs, expected, atol=1e-4, rtol=0)


def test_a_continuation_may_use_the_model_s_last_position_and_no_more() -> None:
    """GPT-2 looks positions up in a table: one past its end is an error, also for a sequence that has been cut."""
    policy = random_policy("gpt2")
    engine = EmbeddedEngine(Workers(policy), max_prompt_tokens=16)
    # One alone is cut early: it lingers in the batch, too few to be worth leaving.
    prefixes = [*[Prefix((2,) * 8)] * 99, Prefix((3,) * 8, (4,) * 100)]
    greedy = SamplingParams(120, temperature=0)  # and this model never ends then
    rollouts = engine.continue_from(prefixes, count=1, sampling=greedy, generator=torch.Generator())
    assert [len(each[0]) for each in rollouts] == [120] * 99 + [20]
    with pytest.raises(UserError, match="more than the 128 positions of the model; set it to 120 or less"):
        engine.continue_from(prefixes, count=1, sampling=SamplingParams(121), generator=torch.Generator())


def test_continuations_are_drawn_from_the_model_given_their_prefix() -> None:
    """Next tokens after two prefixes that differ in their last token alone, against the model's own probabilities."""
    policy = random_policy(sharpness=2.0)
    engine = EmbeddedEngine(Workers(policy), max_prompt_tokens=16, max_sequences=1000)
    prefixes = [Prefix((2, 3, 4), (5, 6, last)) for last in (7, 8)]
    params, generator = SamplingParams(4), torch.Generator().manual_seed(5)
    for prefix, rollouts in zip(
        prefixes, engine.continue_from(prefixes, count=3000, sampling=params, generator=generator), strict=True
    ):
        drawn = torch.tensor([rollout.response_ids[0] for rollout in rollouts])
        with torch.no_grad():
            probs = policy.model(input_ids=torch.tensor([prefix.ids])).logits[0, -1].double().softmax(-1)
        counts = drawn.bincount(minlength=len(probs))
        assert stats.chisquare(counts.numpy(), (probs * 3000).numpy()).pvalue > 0.001


def test_generating_is_continuing_from_bare_prompts() -> None:
    policy = random_policy(sharpness=6.0)
    engine = EmbeddedEngine(Workers(policy), max_prompt_tokens=16, max_sequences=7)
    prefixes = [Prefix(tuple(policy.tokenizer.encode(prompt.text))) for prompt in PROMPTS]
    rollouts = engine.continue_from(
        prefixes, count=6, sampling=SamplingParams(40), generator=torch.Generator().manual_seed(0)
    )
    for group, continuations in zip(generate(max_sequences=7), rollouts, strict=True):
        assert [rollout.response_ids for rollout in group.rollouts] == [each.response_ids for each in continuations]


def test_a_prefix_without_room_is_refused() -> None:
    engine = EmbeddedEngine(Workers(random_policy()), max_prompt_tokens=16)
    with pytest.raises(ValueError, match="a response of 4 tokens or more, the limit"):
        engine.continue_from([Prefix((2,), (3,) * 4)], count=1, sampling=SamplingParams(4), generator=torch.Generator())


@pytest.mark.parametrize("max_sequences", [256, 7])
def test_rollouts_are_given_as_they_end(max_sequences: int) -> None:
    """Within a wave the shorter come first; nothing else differs from what is returned in the end."""
    engine = EmbeddedEngine(Workers(random_policy(sharpness=6.0)), max_prompt_tokens=16, max_sequences=max_sequences)
    told: list[tuple[Prompt, Rollout]] = []
    groups = engine.generate(
        PROMPTS,
        group_size=6,
        sampling=SamplingParams(40),
        generator=torch.Generator().manual_seed(0),
        on_finished=lambda prompt, rollout: told.append((prompt, rollout)),
    )
    expected = generate(max_sequences=max_sequences)
    assert [[r.response_ids for r in g.rollouts] for g in groups] == [
        [r.response_ids for r in g.rollouts] for g in expected
    ]
    assert {(prompt.id, id(rollout)) for prompt, rollout in told} == {
        (group.prompt.id, id(rollout)) for group in groups for rollout in group.rollouts
    }
    lengths = [len(rollout) for _, rollout in told]
    waves = [lengths[start : start + max_sequences] for start in range(0, len(lengths), max_sequences)]
    assert all(wave == sorted(wave) for wave in waves)
    assert len(set(lengths)) > 2


def test_an_ended_rollout_is_told_before_the_next_token_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    def counted(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        return sample_tokens(*arguments)

    monkeypatch.setattr("forkrl.rollout.embedded.sample_tokens", counted)
    engine = EmbeddedEngine(Workers(random_policy(sharpness=6.0)), max_prompt_tokens=16)
    late: list[int] = []
    engine.generate(
        PROMPTS,
        group_size=6,
        sampling=SamplingParams(40),
        generator=torch.Generator().manual_seed(0),
        on_finished=lambda _, rollout: late.append(steps - len(rollout)),
    )
    assert set(late) == {0}


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_sequences_that_have_ended_leave_the_batch_and_prompts_are_read_once(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine computes, not what it gives: rows of every step, and rows of the pass over the prompts."""
    stepped: list[int] = []
    read: list[int] = []
    choose = embedded.choose_step

    def watched(policy: Policy) -> Any:
        advance = choose(policy)

        def step(tokens_S: torch.Tensor, *rest: Any) -> torch.Tensor:
            stepped.append(len(tokens_S))
            return advance(tokens_S, *rest)

        return step

    monkeypatch.setattr(embedded, "choose_step", watched)
    policy = random_policy(family, sharpness=6.0)
    policy.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(len(kwargs["input_ids"])) if not stepped else None, with_kwargs=True
    )
    engine = EmbeddedEngine(Workers(policy), max_prompt_tokens=16)
    groups = engine.generate(
        PROMPTS, group_size=6, sampling=SamplingParams(40), generator=torch.Generator().manual_seed(0)
    )
    assert read == [len(PROMPTS)], "each prompt once, for all of its group"
    lengths = [len(rollout) for group in groups for rollout in group.rollouts]
    going = [sum(length > step + 1 for length in lengths) for step in range(max(lengths) - 1)]
    assert stepped == going, "of so few, each leaves at once"


def test_on_a_cpu_time_is_the_last_axis_in_memory_whatever_happens_to_the_cache() -> None:
    """Attention of one token is faster then. Values are stored in fp32, in which they are used."""
    layer, expected = GrowingLayer(), torch.randn(2, 2, 2, 5, 4)
    layer.update(expected[0], expected[1].bfloat16())
    for index_S in (torch.tensor([1, 0, 1]), torch.tensor([2, 1]), torch.tensor([0])):  # repeat, shrink, shrink
        for count in (1, ROOM + 90):
            new = torch.randn(2, expected.shape[1], 2, count, 4)
            layer.update(*new)
            expected = torch.cat([expected, new], 3)
        layer.batch_select_indices(index_S)
        expected = expected[:, index_S]
        for stored, other, exact in zip((layer.keys, layer.values), expected, (True, False), strict=True):
            assert stored is not None and stored.stride(2) == 1 and stored.dtype == torch.float32
            torch.testing.assert_close(stored, other, rtol=0, atol=0 if exact else 0.02)


def test_a_new_token_copies_nothing_of_what_is_cached() -> None:
    """Until a buffer is full, and then it grows by more than one token."""
    layer = GrowingLayer()
    first, token = torch.randn(2, 3, 2, 5, 4), torch.randn(2, 3, 2, 1, 4)
    layer.update(*first)
    keys, _ = layer.update(*token)
    places = [keys.data_ptr()]
    for _ in range(3 * ROOM):
        keys, values = layer.update(*token)
        places.append(keys.data_ptr())
    assert keys.shape[2] == values.shape[2] == 6 + 3 * ROOM
    assert torch.equal(keys[:, :, :5], first[0]), "what was there is there"
    assert torch.equal(values[:, :, -1:], token[1])
    assert sum(here != there for here, there in pairwise(places)) <= 3


def test_buffers_end_at_the_longest_sequence() -> None:
    layer = GrowingLayer(max_tokens=8)
    first, token = torch.randn(2, 3, 2, 5, 4), torch.randn(2, 3, 2, 1, 4)
    layer.update(*first)
    for _ in range(4):  # the last is beyond what was promised
        layer.update(*token)
        assert layer.buffers is not None
        assert layer.buffers[0].shape[2] == max(8, layer.get_seq_length())
    assert layer.keys is not None
    assert torch.equal(layer.keys[:, :, :5], first[0])
