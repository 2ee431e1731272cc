"""The rollout server for tests without a GPU, called without Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
import torch

from forkrl.model.policy import Policy
from forkrl.rollout.embedded import Prefix, decode
from forkrl.types import SamplingParams
from tests.models import random_policy
from tests.verl_here import needs_verl

pytestmark = needs_verl

PROMPTS: list[tuple[int, ...]] = [(2 + n, 3, 4 + n) for n in range(6)]
LIMIT = 12


@pytest.fixture(scope="module")
def policy() -> Policy:
    return random_policy(sharpness=4.0)


@pytest.fixture(scope="module")
def server_class() -> Any:
    from tests.verl_cpu.server import CpuServer

    return CpuServer


@pytest.fixture
def serve(policy: Policy, server_class: Any) -> Callable[..., Any]:
    """A new server on the shared model."""

    def open_server(**changes: Any) -> Any:
        return server_class(policy, **{"seed": 7, "replica_rank": 0, "response_length": LIMIT} | changes)

    return open_server


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, ...]]]:
    """The prompts of every batch that is decoded."""
    noted: list[list[tuple[int, ...]]] = []

    def noting(policy: Any, prefixes: Any, *rest: Any) -> Any:
        noted.append([prefix.prompt_ids for prefix in prefixes])
        return decode(policy, prefixes, *rest)

    monkeypatch.setattr("tests.verl_cpu.server.decode", noting)
    return noted


def ask(server: Any, prompt: tuple[int, ...], **sampling: Any) -> Awaitable[Any]:
    given = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True} | sampling
    answer: Awaitable[Any] = server.generate(
        "id", prompt_ids=list(prompt), sampling_params=given, image_data=None, video_data=None
    )
    return answer


def run(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main, 60))


def answers(server: Any, prompts: list[tuple[int, ...]], **sampling: Any) -> list[Any]:
    async def main() -> list[Any]:
        return list(await asyncio.gather(*(ask(server, prompt, **sampling) for prompt in prompts)))

    found: list[Any] = run(main())
    return found


def test_a_burst_is_one_batch_and_repeats_in_any_order_of_arrival(
    serve: Any, batches: list[list[tuple[int, ...]]]
) -> None:
    one = answers(serve(), PROMPTS)
    other = answers(serve(), PROMPTS[::-1])[::-1]
    assert batches == [sorted(PROMPTS)] * 2
    assert [answer.token_ids for answer in one] == [answer.token_ids for answer in other]
    assert len({tuple(answer.token_ids) for answer in one}) > 1


@pytest.mark.parametrize("changes", [{"seed": 8}, {"replica_rank": 1}])
def test_seed_and_worker_change_what_is_drawn(serve: Any, changes: dict[str, int]) -> None:
    one, other = answers(serve(), PROMPTS), answers(serve(**changes), PROMPTS)
    assert [answer.token_ids for answer in one] != [answer.token_ids for answer in other]


def test_every_step_and_batch_draws_other_numbers_and_a_step_repeats(serve: Any) -> None:
    def step(server: Any, number: int) -> list[list[int]]:
        run(server.set_global_steps(number))
        return [answer.token_ids for answer in answers(server, PROMPTS)]

    server = serve()
    first, second, third = step(server, 1), step(server, 2), [answer.token_ids for answer in answers(server, PROMPTS)]
    assert first != second and second != third
    assert step(serve(), 2) == second


def test_log_probs_are_those_of_the_tokens(serve: Any, policy: Policy) -> None:
    for answer, prompt in zip(answers(serve(), PROMPTS, temperature=0.7), PROMPTS, strict=True):
        ids = torch.tensor([[*prompt, *answer.token_ids]])
        with torch.no_grad():
            logprobs_TV = torch.log_softmax(policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.7, -1)
        expected = logprobs_TV.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(answer.log_probs), expected, atol=1e-5)
        assert answer.stop_reason == "completed"
        assert answer.extra_fields == {"global_steps": 0}


def test_greedy_is_the_likeliest_token(serve: Any, policy: Policy) -> None:
    [answer] = answers(serve(), PROMPTS[:1], temperature=0)
    sampling = SamplingParams(max_response_tokens=LIMIT, temperature=0)
    [(_, rollout)] = decode(policy, [Prefix(PROMPTS[0])], sampling, torch.Generator())
    assert answer.token_ids == list(rollout.response_ids)


def test_unlike_requests_are_batches_of_their_own(serve: Any, batches: list[list[tuple[int, ...]]]) -> None:
    async def main() -> None:
        server = serve()
        await asyncio.gather(
            *(ask(server, prompt) for prompt in PROMPTS[:2]), *(ask(server, prompt, top_k=2) for prompt in PROMPTS[2:])
        )

    run(main())
    assert batches == [PROMPTS[:2], PROMPTS[2:]]


def test_a_stop_token_ends_a_response_and_is_its_last(serve: Any, policy: Policy) -> None:
    drawn = [answer.token_ids for answer in answers(serve(), PROMPTS)]
    stop = drawn[0][0]
    stopped = answers(serve(), PROMPTS, stop_token_ids=[policy.tokenizer.eos_token_id, stop])
    assert stopped[0].token_ids == [stop]
    for answer in stopped:
        assert stop not in answer.token_ids[:-1]


def test_limits_and_log_probs_are_as_asked(serve: Any) -> None:
    short = answers(serve(), PROMPTS, max_tokens=2, logprobs=False)
    assert max(len(answer.token_ids) for answer in short) == 2
    assert all(answer.log_probs is None for answer in short)


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        ({"min_p": 0.1}, "min_p"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"max_tokens": 1000}, "128 positions"),
        ({"max_tokens": 0}, "0 tokens"),
    ],
)
def test_what_would_not_be_honoured_is_refused(serve: Any, sampling: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        answers(serve(), PROMPTS[:1], **sampling)


class Held:
    """Holds every batch up after its first tokens, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
        from forkrl.rollout.sampling import sample_tokens

        self.reached, self.go_on, self._left = threading.Event(), threading.Event(), tokens

        def held(*arguments: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                self.reached.set()
                assert self.go_on.wait(30)
            return sample_tokens(*arguments)

        monkeypatch.setattr("forkrl.rollout.embedded.sample_tokens", held)


def test_an_abort_gives_what_there_is_and_the_rest_can_follow(
    serve: Any, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch, tokens=3)

    async def main() -> None:
        server = serve()
        asked = [ask(server, prompt, max_tokens=LIMIT) for prompt in PROMPTS]
        under_way = asyncio.gather(*asked)
        await asyncio.to_thread(held.reached.wait, 30)
        late = asyncio.ensure_future(ask(server, PROMPTS[0]))  # waits for the batch under way, with no token yet
        await asyncio.sleep(0.1)
        abort = asyncio.ensure_future(server.abort_all_requests())
        await asyncio.sleep(0.1)
        held.go_on.set()
        await abort
        broken_off = [answer for answer in await under_way if answer.stop_reason == "aborted"]
        assert broken_off
        assert {len(answer.token_ids) for answer in broken_off} == {3}
        assert all(len(answer.log_probs) == 3 for answer in broken_off)
        assert (await late).token_ids == [] and (await late).stop_reason == "aborted"

        parked = asyncio.ensure_future(ask(server, (*PROMPTS[0], *broken_off[0].token_ids), max_tokens=LIMIT - 3))
        await asyncio.sleep(0.2)
        assert not parked.done()
        await server.resume_generation()
        assert (await parked).stop_reason == "completed"
        assert 0 < len((await parked).token_ids) <= LIMIT - 3

    run(main())


def test_a_server_that_leaves_turns_requests_away(serve: Any) -> None:
    async def main() -> None:
        server = serve()
        await server.abort_all_requests(reject_request=True)
        assert (await ask(server, PROMPTS[0])).stop_reason == "aborted"
        await server.resume_generation()
        assert (await ask(server, PROMPTS[0])).stop_reason == "completed"

    run(main())


def test_weights_wait_for_the_batch_under_way(serve: Any, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, tokens=2)

    async def main() -> None:
        server = serve()
        under_way = asyncio.ensure_future(ask(server, PROMPTS[0]))
        await asyncio.to_thread(held.reached.wait, 30)
        load = asyncio.ensure_future(server.load_weights(policy.model.state_dict()))
        await asyncio.sleep(0.1)
        assert not load.done()
        held.go_on.set()
        await load
        assert under_way.done()

    run(main())


def test_a_sleeping_server_does_not_sample(serve: Any) -> None:
    async def main() -> None:
        server = serve()
        await server.sleep()
        with pytest.raises(RuntimeError, match="asleep"):
            await ask(server, PROMPTS[0])
        await server.wake_up(tags=["weights"])
        assert (await ask(server, PROMPTS[0])).stop_reason == "completed"

    run(main())


def test_a_model_that_has_diverged_fails_its_requests_and_no_later_ones(server_class: Any) -> None:
    broken = random_policy()
    server = server_class(broken, seed=0, replica_rank=0, response_length=LIMIT)
    good = {name: tensor.clone() for name, tensor in broken.model.state_dict().items()}

    async def main() -> None:
        await server.load_weights({name: tensor * float("nan") for name, tensor in good.items()})
        with pytest.raises(Exception, match="NaN or infinite"):
            await ask(server, PROMPTS[0])
        await server.load_weights(good)
        assert (await ask(server, PROMPTS[0])).stop_reason == "completed"

    run(main())


def test_new_weights_are_copied(server_class: Any) -> None:
    from tests.verl_cpu.server import load_state

    old, new = random_policy(seed=0), random_policy(seed=1)
    given = new.model.state_dict()
    load_state(old, given)
    for name, tensor in old.model.state_dict().items():
        assert torch.equal(tensor, given[name])
        assert tensor.data_ptr() != given[name].data_ptr()


def test_weights_that_are_missing_or_too_many_are_named() -> None:
    from tests.verl_cpu.server import load_state

    policy = random_policy()
    state = policy.model.state_dict()
    name = next(iter(state))
    with pytest.raises(ValueError, match=f"lack {name}"):
        load_state(policy, {key: value for key, value in state.items() if key != name})
    with pytest.raises(ValueError, match="have lora_A, which the model lacks"):
        load_state(policy, state | {"lora_A": torch.zeros(1)})
    with pytest.raises(ValueError, match="do not fit"):
        load_state(policy, state | {name: torch.zeros(1)})


@pytest.mark.parametrize(("tied", "accepted"), [(True, True), (False, False)])
def test_the_head_may_be_missing_only_where_it_is_the_embedding(tied: bool, accepted: bool) -> None:
    from tests.verl_cpu.server import load_state

    policy = random_policy(tie_word_embeddings=tied)
    state = {name: value for name, value in policy.model.state_dict().items() if name != "lm_head.weight"}
    if accepted:
        load_state(policy, state)
    else:
        with pytest.raises(ValueError, match="lack lm_head.weight"):
            load_state(policy, state)
