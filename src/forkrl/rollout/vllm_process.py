"""vLLM in a process of its own: what ``vllm_engine.py`` starts. Importing this module imports vLLM.

vLLM's worker sets a memory policy for its process and replaces functions of torch, so it cannot run in the trainer.
Written for the V1 model runner of vLLM 0.32 and tested on a CPU, on a GPU not yet.

Shapes: ``N`` rows of logits, ``V`` vocabulary, ``T`` tokens of a response.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
import vllm
from packaging.version import Version
from torch import Tensor
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

from forkrl.errors import first_line
from forkrl.model.adapter import AdapterLayout
from forkrl.parallel.workers import SharedWeights
from forkrl.rollout.sampling import LEAST_LOGIT
from forkrl.rollout.vllm_engine import Finished
from forkrl.types import TemperatureRule

OLDEST = "0.32"
_KEY = "forkrl"
_NO_FOLDER = "none"
"""A path that vLLM requires and nothing reads."""


class _Recorder(LogitsProcessor):  # type: ignore[misc]  # untyped
    """Records log-normaliser and entropy of every position, over the whole vocabulary at the request's temperature.

    ``fork_temperature`` of all requests, if any, is applied here, after recording: it needs the same entropies, and
    must not change what is recorded.
    """

    fork_temperature: TemperatureRule | None = None

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[int, float, Sequence[int]]] = {}
        self._found: dict[int, dict[int, tuple[float, float]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False  # those that are do not see a greedy batch

    def update_state(self, batch_update: Any) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for row, params, _, output_ids in batch_update.added:
            self._rows[row] = (params.extra_args[_KEY], params.temperature or 1.0, output_ids)
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if replaced is not None and direction is MoveDirectionality.SWAP:
                self._rows[source] = replaced

    def apply(self, logits: Tensor) -> Tensor:
        states = [self._rows[row] for row in range(len(logits))]
        temperature_N1 = torch.tensor([[temperature] for _, temperature, _ in states], device=logits.device)
        # As sample_tokens does; with weights w = exp(x) and their sum Z: H = log Z - sum(w x) / Z.
        scaled_NV = logits.float() / temperature_N1
        largest_N1 = scaled_NV.amax(-1, keepdim=True)
        shifted_NV = scaled_NV.sub_(largest_N1).clamp_(min=LEAST_LOGIT)
        weights_NV = shifted_NV.exp()
        total_N = weights_NV.sum(-1)
        entropy_N = total_N.log() - weights_NV.mul_(shifted_NV).sum(-1) / total_N
        pairs = torch.stack([total_N.log() + largest_N1[:, 0], entropy_N], -1).tolist()
        for (index, _, output_ids), (normaliser, entropy) in zip(states, pairs, strict=True):
            # By position: a sequence that had to wait for memory is computed again.
            self._found.setdefault(index, {})[len(output_ids)] = (normaliser, entropy)
        return logits if self.fork_temperature is None else self.fork_temperature.rescale(logits, entropy_N)

    def take(self, index: int, num_tokens: int) -> Tensor:
        """Log-normalisers and entropies of a finished request, fp64 ``[2, num_tokens]``."""
        found = self._found.pop(index)
        return torch.tensor([found[position] for position in range(num_tokens)], dtype=torch.float64).T


def _register_loader(weights: Mapping[str, Tensor]) -> None:
    """Let vLLM open a model with these weights, by name in the model's files, as its load format ``forkrl``."""

    @register_model_loader(_KEY)
    class SharedLoader(BaseModelLoader):  # type: ignore[misc]  # untyped
        def download_model(self, model_config: Any) -> None:
            pass

        def load_weights(self, model: Any, model_config: Any) -> None:
            model.load_weights(iter(weights.items()))


class _Engine:
    """vLLM with weights that other processes change: those of ``adapter`` if there is one, else all."""

    def __init__(
        self, options: Mapping[str, Any], weights: Mapping[str, Tensor], adapter: AdapterLayout | None
    ) -> None:
        if Version(vllm.__version__).release < Version(OLDEST).release:
            raise ValueError(f"vLLM {OLDEST} or newer is needed, this is {vllm.__version__}")
        self._weights, self._adapter = weights, adapter
        load_format = "dummy"  # the first sync brings the weights; one that it forgot would be noticed
        if adapter is not None:
            # After this, vLLM wraps the adapted layers, whose own weights cannot be replaced any more.
            _register_loader({file_name: weights[name] for file_name, name in adapter.base.items()})
            load_format = _KEY
        # Seeded requests fail on a CPU when a prompt is read in parts: torch has no offset of a CPU generator.
        arguments = vllm.EngineArgs(
            logits_processors=[_Recorder],
            logprobs_mode="raw_logits",
            load_format=load_format,
            skip_tokenizer_init=True,
            generation_config="vllm",
            async_scheduling=False,
            enable_chunked_prefill=False,
            disable_log_stats=True,
            **options,
        )
        self._vllm = vllm.LLMEngine.from_engine_args(arguments)
        self._runner = self._vllm.model_executor.driver_worker.worker.model_runner
        processors = self._runner.input_batch.logitsprocs.all
        self._recorder: _Recorder = next(each for each in processors if isinstance(each, _Recorder))

    def describe(self) -> tuple[str, str]:
        """vLLM's version and the kind of device that it runs on."""
        return vllm.__version__, self._runner.device.type

    def sync(self) -> None:
        """Take over the weights as they are now."""
        if self._adapter is None:
            self._reload()
        else:
            self._reload_adapter(self._adapter)
        if not self._vllm.reset_prefix_cache():
            raise RuntimeError("the prefix cache was not reset")

    def _reload(self) -> None:
        self._vllm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(self._weights.items())})
        if self._runner.device.type == "cpu":
            # There a tied head keeps packed weights of its own, which vLLM 0.32 forgets to pack again.
            for module in self._runner.model.modules():
                if type(module).__name__ == "ParallelLMHead":
                    module.quant_method.process_weights_after_loading(module)

    def _reload_adapter(self, adapter: AdapterLayout) -> None:
        manager = self._runner.lora_manager

        def load(request: LoRARequest) -> LoRAModel:
            """Instead of from a folder."""
            return LoRAModel.from_lora_tensors(
                request.lora_int_id,
                # Copies: vLLM multiplies B by alpha / rank in place.
                {file_name: self._weights[name].clone() for file_name, name in adapter.lora.items()},
                PEFTHelper(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.targets)),
                device="cpu",
                dtype=manager.lora_config.lora_dtype,
            )

        manager._load_adapter = load
        if not self._vllm.add_lora(LoRARequest(_KEY, 1, _NO_FOLDER, load_inplace=True)):
            raise RuntimeError("the adapter was not loaded")

    def generate(
        self,
        sampling: Mapping[str, Any],
        fork_temperature: TemperatureRule | None,
        requests: Sequence[tuple[tuple[int, ...], int, int]],
    ) -> Iterator[list[Finished]]:
        """Yield the responses that each step finished, mostly none.

        A request: the token ids before the response, the most tokens it may have, and its seed.
        """
        self._recorder.fork_temperature = fork_temperature
        request = LoRARequest(_KEY, 1, _NO_FOLDER) if self._adapter is not None else None
        for index, (prompt_ids, max_tokens, seed) in enumerate(requests):
            params = vllm.SamplingParams(
                max_tokens=max_tokens,
                seed=seed,
                extra_args={_KEY: index},
                logprobs=0,  # of the sampled token
                ignore_eos=True,  # stop_token_ids has all that count
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                **sampling,
            )
            self._vllm.add_request(str(index), {"prompt_token_ids": list(prompt_ids)}, params, lora_request=request)
        while self._vllm.has_unfinished_requests():
            yield [self._finished(output, sampling["temperature"]) for output in self._vllm.step() if output.finished]

    def _finished(self, output: Any, temperature: float) -> Finished:
        index, [response] = int(output.request_id), output.outputs
        if response.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"a response ended with {response.finish_reason!r}")
        ids = list(response.token_ids)
        logits = [step[token].logprob for step, token in zip(response.logprobs, ids, strict=True)]
        normaliser_T, entropy_T = self._recorder.take(index, len(ids))
        logprobs_T = torch.tensor(logits, dtype=torch.float64) / (temperature or 1.0) - normaliser_T
        return Finished(index, ids, logprobs_T.tolist(), entropy_T.tolist(), response.finish_reason == "stop")


def serve() -> None:
    """Open vLLM and serve requests until the first process ends.

    The first message is (options, weights, adapter), the others ("sync",) or ("generate", *arguments). Answers are any
    number of ("part", value), then ("done", None); or at any time ("error", one line), after which vLLM is not usable.
    """
    connection = Connection(int(sys.argv[1]))
    with suppress(EOFError, ConnectionError):  # the first process has ended
        try:
            options, weights, adapter = connection.recv()
            engine = _Engine(options, weights.map() if isinstance(weights, SharedWeights) else weights, adapter)
            connection.send(("part", engine.describe()))
            while True:
                connection.send(("done", None))
                what, *arguments = connection.recv()
                if what == "sync":
                    engine.sync()
                else:
                    for part in engine.generate(*arguments):
                        connection.send(("part", part))
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            connection.send(("error", _in_one_line(error)))


def _in_one_line(error: Exception) -> str:
    if hasattr(error, "errors"):  # pydantic's; its first line has no reason
        return "; ".join(first_line(ValueError(each["msg"])) for each in error.errors())
    return f"{type(error).__name__}: {first_line(error)}"
