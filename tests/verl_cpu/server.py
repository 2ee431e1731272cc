"""The rollout server itself, an asyncio object that decodes what waits in one batch after the other."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from verl.workers.rollout.replica import TokenOutput

from forkrl.config import ModelConfig
from forkrl.model.policy import Policy, open_policy
from forkrl.rollout.embedded import Prefix, decode
from forkrl.types import Rollout, SamplingParams

_QUIET_S = 0.02
"""A batch starts once no request has arrived for so long: those of one step arrive one by one, through Ray."""
_IGNORED = {"repetition_penalty": 1.0, "ignore_eos": False}
"""Sampling parameters that verl always gives, with the only value that is honoured."""


class _Request(NamedTuple):
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    logprobs: bool
    answer: asyncio.Future[TokenOutput]


class CpuServer:
    """Answers verl's requests with ``forkrl.rollout.embedded.decode``.

    The requests that wait and are sampled alike are one batch. Its random numbers follow from the seed, the replica,
    the global step and the batch's number within that step, and its order from the prompts: the same run repeats as far
    as the same requests meet in the same batches.

    Args:
        model: a folder in Hugging Face format, or the model itself.
        seed: of all sampling.
        replica_rank: which of several servers this is.
        response_length: tokens of a response where a request names no number.
    """

    def __init__(self, model: str | Policy, *, seed: int, replica_rank: int, response_length: int) -> None:
        self._policy = model if isinstance(model, Policy) else _open(model)
        self._seed, self._replica_rank, self._response_length = seed, replica_rank, response_length
        self._global_steps = self._batches = 0
        self._waiting: list[_Request] = []
        self._decoding = asyncio.Lock()  # held by whoever decodes, and by whoever needs the model for himself
        self._drain: asyncio.Task[None] | None = None
        self._asleep = self._rejecting = self._interrupted = False
        self._admitting = asyncio.Event()
        self._admitting.set()

    async def generate(
        self, request_id: str, *, prompt_ids: Sequence[int], sampling_params: Mapping[str, Any], **media: Any
    ) -> TokenOutput:
        """The response to one prompt.

        Raises:
            ValueError: images or the like, a parameter that is not honoured, or no position left for a token.
            RuntimeError: the server has been put to sleep.
        """
        if given := sorted(name for name, value in media.items() if value is not None):
            raise ValueError(f"this server reads token ids only, no {', '.join(given)}")
        while not self._admitting.is_set():
            if self._rejecting:
                return self._broken_off()
            await self._admitting.wait()
        answer: asyncio.Future[TokenOutput] = asyncio.get_running_loop().create_future()
        ids = tuple(map(int, prompt_ids))
        sampling, logprobs = self._read_sampling(dict(sampling_params), len(ids))
        self._waiting.append(_Request(ids, sampling, logprobs, answer))
        if self._drain is None or self._drain.done():
            self._drain = asyncio.create_task(self._decode_what_waits())
        return await answer

    async def load_weights(self, named: Mapping[str, Tensor]) -> None:
        """Copy a state dict into the model, once nothing is being decoded.

        Raises:
            ValueError: it lacks weights, or has some that the model lacks.
        """
        async with self._decoding:
            load_state(self._policy, named)

    async def set_global_steps(self, global_steps: int) -> None:
        """Note the trainer's step whose weights these are."""
        self._global_steps, self._batches = global_steps, 0

    async def sleep(self) -> None:
        """From the end of the batch under way, refuse to decode: a GPU's server has no weights then."""
        async with self._decoding:
            self._asleep = True

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        self._asleep = False

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        """Break off all requests, with the tokens they have; later ones wait for ``resume_generation``.

        Args:
            reject_request: later ones are broken off at once instead.
        """
        self._admitting.clear()
        self._rejecting = reject_request
        self._interrupted = True
        async with self._decoding:
            for request in self._waiting:
                request.answer.set_result(self._broken_off())
            self._waiting.clear()
            self._interrupted = False

    async def resume_generation(self) -> None:
        self._rejecting = False
        self._admitting.set()

    async def clear_kv_cache(self) -> None:
        """Nothing to do, as in the rest below: a cache lives no longer than its batch, and nothing is profiled."""

    async def release_kv_cache(self) -> None: ...

    async def resume_kv_cache(self) -> None: ...

    async def start_profile(self, **how: Any) -> None: ...

    async def stop_profile(self) -> None: ...

    def _read_sampling(self, given: dict[str, Any], prompt_tokens: int) -> tuple[SamplingParams, bool]:
        logprobs = bool(given.pop("logprobs", False))
        limit = given.pop("max_tokens", given.pop("max_new_tokens", self._response_length))
        top_k = int(given.pop("top_k", -1))
        sampling = SamplingParams(
            max_response_tokens=int(limit),
            temperature=float(given.pop("temperature", 1.0)),
            top_p=float(given.pop("top_p", 1.0)),
            top_k=max(top_k, 0),  # verl writes -1 for all
            stop_token_ids=tuple(sorted(map(int, given.pop("stop_token_ids", None) or ()))),
        )
        if unknown := {name: value for name, value in given.items() if _IGNORED.get(name, ()) != value}:
            raise ValueError(f"sampling parameters that this server does not honour: {unknown}")
        positions = self._policy.model.config.max_position_embeddings
        if not 1 <= limit <= positions - prompt_tokens:
            raise ValueError(f"{limit} tokens after a prompt of {prompt_tokens}: the model has {positions} positions")
        return sampling, logprobs

    async def _decode_what_waits(self) -> None:
        while self._waiting:
            arrived = 0
            while len(self._waiting) > arrived:
                arrived = len(self._waiting)
                await asyncio.sleep(_QUIET_S)
            async with self._decoding:
                batch = self._take_batch()  # none where all was broken off meanwhile
                try:
                    await asyncio.to_thread(self._decode, batch, asyncio.get_running_loop())
                except Exception as error:  # whoever waits for an answer is told
                    for request in batch:
                        if not request.answer.done():
                            request.answer.set_exception(error)

    def _take_batch(self) -> list[_Request]:
        """The requests sampled like the first one, in an order that does not depend on their arrival."""
        alike = [request for request in self._waiting if request.sampling == self._waiting[0].sampling]
        self._waiting = [request for request in self._waiting if request.sampling != self._waiting[0].sampling]
        return sorted(alike, key=lambda request: request.prompt_ids)

    def _decode(self, batch: Sequence[_Request], loop: asyncio.AbstractEventLoop) -> None:
        """In a thread of its own, so that requests are taken in meanwhile."""
        if not batch:
            return
        if self._asleep:
            raise RuntimeError("asked to sample while asleep: verl has not woken this server")
        named = f"{self._seed}/{self._replica_rank}/{self._global_steps}/{self._batches}"
        self._batches += 1
        digest = hashlib.sha256(named.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        prefixes = [Prefix(request.prompt_ids) for request in batch]
        sampled = decode(self._policy, prefixes, batch[0].sampling, generator, lambda: self._interrupted)
        for place, rollout in sampled:
            request = batch[place]
            loop.call_soon_threadsafe(request.answer.set_result, self._output(rollout, request))

    def _output(self, rollout: Rollout, request: _Request) -> TokenOutput:
        ended = rollout.finished or len(rollout) == request.sampling.max_response_tokens
        return TokenOutput(
            token_ids=list(rollout.response_ids),
            log_probs=rollout.logprobs.tolist() if request.logprobs else None,
            stop_reason="completed" if ended else "aborted",
            num_preempted=0,
            extra_fields={"global_steps": self._global_steps},
        )

    def _broken_off(self) -> TokenOutput:
        """For a request that has no token yet."""
        return TokenOutput(
            token_ids=[], log_probs=[], stop_reason="aborted", extra_fields={"global_steps": self._global_steps}
        )


def load_state(policy: Policy, named: Mapping[str, Tensor]) -> None:
    """Copy a state dict into the model. The head may be missing where it is the input embedding.

    Raises:
        ValueError: it lacks weights, or has some that the model lacks, or one of another shape.
    """
    own, tied = policy.model.state_dict().keys(), policy.model.all_tied_weights_keys
    if absent := sorted(name for name in own - named.keys() if tied.get(name) not in named):
        raise ValueError(f"the new weights lack {', '.join(absent)}")
    if unexpected := sorted(named.keys() - own):
        raise ValueError(f"the new weights have {', '.join(unexpected)}, which the model lacks")
    try:
        # It copies into the model's own tensors; those that came through Ray may be read-only.
        policy.model.load_state_dict(dict(named), strict=False)
    except RuntimeError as error:
        raise ValueError(f"the new weights do not fit: {error}") from error


def _open(path: str) -> Policy:
    return open_policy(ModelConfig(path=path), device="cpu")
