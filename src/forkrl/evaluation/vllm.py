"""Evaluation responses from vLLM in this process. Importing this module does not import vLLM.

Tested against a stand-in for ``EngineArgs``, ``LLMEngine`` and ``SamplingParams`` of vLLM 0.24 on, not with a real one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from forkrl.errors import UserError, first_line
from forkrl.evaluation.samplers import EvalSampling, Sampled, Sampler, SampleRequest, request_seed
from forkrl.model.prompt_tokens import prompt_token_ids


class VllmSampler(Sampler):
    """Samples with vLLM's engine, one request per response, so that an evaluation can resume at any response.

    ``model``: folder or hub id. ``max_model_len``: prompt plus response tokens; None: the model's limit.
    ``tensor_parallel_size``: GPUs that share the model. ``max_requests``: queued in the engine at once.
    """

    name = "vllm"

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        max_model_len: int | None = None,
        seed: int = 0,
        tensor_parallel_size: int = 1,
        stop_token_ids: Sequence[int] = (),
        max_requests: int = 1024,
    ) -> None:
        self._vllm = _import_vllm()
        self.stop_token_ids = list(stop_token_ids)
        self.max_requests = max_requests
        self._numbers = itertools.count()
        try:
            arguments = self._vllm.EngineArgs(
                model=model,
                revision=revision,
                tokenizer_revision=revision,
                max_model_len=max_model_len,
                seed=seed,
                tensor_parallel_size=tensor_parallel_size,
            )
            self.engine = self._vllm.LLMEngine.from_engine_args(arguments)
        except (ValueError, OSError, RuntimeError) as error:
            raise UserError(f"vLLM cannot open {model}: {first_line(error)}") from error

    def sample(
        self, requests: Sequence[SampleRequest], sampling: EvalSampling, grid: Sequence[SampleRequest] = ()
    ) -> Iterator[Sampled]:
        """Closing the iterator, or an exception, removes the other requests from the engine."""
        ids_by_question = self._encode(requests, sampling)
        backlog = iter(requests)
        inside: dict[str, SampleRequest] = {}
        try:
            while True:
                for request in itertools.islice(backlog, self.max_requests - len(inside)):
                    inside[self._add(request, ids_by_question[request.prompt.id], sampling)] = request
                if not inside:
                    return
                for output in self._step(len(inside)):
                    if output.finished:
                        yield _sampled(inside.pop(output.request_id), output.outputs[0])
        finally:
            if inside:
                self.engine.abort_request(list(inside))

    def _encode(self, requests: Sequence[SampleRequest], sampling: EvalSampling) -> Mapping[str, list[int]]:
        """Token ids per question. Checks lengths: vLLM would silently cut a response that does not fit."""
        tokenizer, room = self.engine.get_tokenizer(), self.engine.model_config.max_model_len
        encoded: dict[str, list[int]] = {}
        for prompt, _ in requests:
            if prompt.id in encoded:
                continue
            ids = list(prompt_token_ids(tokenizer, prompt))
            if len(ids) + sampling.max_response_tokens > room:
                raise UserError(
                    f"question {prompt.id}: {len(ids)} tokens and --max-tokens {sampling.max_response_tokens} are more "
                    f"than the model's {room}; set --max-tokens to {max(room - len(ids), 0)} or less"
                )
            encoded[prompt.id] = ids
        return encoded

    def _add(self, request: SampleRequest, prompt_ids: list[int], sampling: EvalSampling) -> str:
        """Add a request to the engine and return its id there."""
        name = str(next(self._numbers))
        params = self._vllm.SamplingParams(
            n=1,
            temperature=sampling.temperature,
            max_tokens=sampling.max_response_tokens,
            seed=request_seed(sampling.seed, *request.key),
            stop_token_ids=self.stop_token_ids,
            output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )
        self.engine.add_request(name, {"prompt_token_ids": prompt_ids}, params)
        return name

    def _step(self, num_inside: int) -> list[Any]:
        if not self.engine.has_unfinished_requests():  # a step would block forever
            raise UserError(f"vLLM has lost {num_inside} requests; nothing is lost here, the same command resumes")
        try:
            return list(self.engine.step())
        except Exception as error:  # the engine runs in its own process and can fail with any error
            raise UserError(
                f"vLLM's engine failed ({first_line(error)}); nothing is lost, the same command resumes"
            ) from error


def _sampled(request: SampleRequest, completion: Any) -> Sampled:
    """A finished ``CompletionOutput`` as a response; token ids include the closing token, as everywhere in ForkRL."""
    if completion.finish_reason not in ("stop", "length"):
        raise UserError(
            f"question {request.prompt.id}: vLLM ended a response with {completion.finish_reason!r}; "
            f"nothing is lost, the same command resumes"
        )
    finished = completion.finish_reason == "stop"
    return Sampled(request, completion.text, len(completion.token_ids), finished=finished, entropy=None)


def _import_vllm() -> Any:
    try:
        import vllm
        import vllm.sampling_params
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise UserError("--engine vllm needs vLLM; install it with: pip install 'forkrl[vllm]'") from error
    return vllm
