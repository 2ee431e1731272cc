"""The vLLM engine: samples in a process of its own (``vllm_process.py``), which reads the weights being trained.

The weights are shared once: as memory on a CPU, as CUDA handles on a GPU. After an optimizer step the process only has
to be told to take them over. Not tested on a GPU yet.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from forkrl.errors import EngineLost, UserError, first_line
from forkrl.model.adapter import AdapterLayout, adapter_layout
from forkrl.model.policy import Policy, require_positions
from forkrl.parallel.processes import Child, child_environment
from forkrl.parallel.workers import Workers
from forkrl.rollout.embedded import EmbeddedEngine, Ended, Prefix, build_rollout, stop_tokens
from forkrl.rollout.logprob_gap import MAX_MEAN_GAP, gap_of_rollouts
from forkrl.types import Rollout, SamplingParams

if TYPE_CHECKING:  # loads pydantic
    from forkrl.config.train import RolloutConfig

SILENCE_S = 900.0
"""A process that sends nothing for so long has failed; while it samples, it sends something after every token."""
BLOCK = 32
"""Tokens of a block of keys and values on a CPU; vLLM's own 128 share shorter beginnings of prompts not at all."""
_PROBE_TOKENS = 16
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Widths that vLLM can reserve for adapters."""
_OTHERWISE = 'set rollout.engine = "torch"'


def require_vllm() -> None:
    """Raise UserError if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            f"rollout.engine = \"vllm\" needs vLLM; install it with: pip install 'forkrl[vllm]' (without a GPU: "
            f"docs/engines.md), or {_OTHERWISE}"
        )


class Finished(NamedTuple):
    """The response to request number ``request``. Defined here, as a process that reads it must not import vLLM.

    Log-probs and entropies are as in ``Rollout``.
    """

    request: int
    token_ids: list[int]
    logprobs: list[float]
    entropy: list[float]
    finished: bool


class Adapter(NamedTuple):
    """A LoRA for vLLM. ``base`` and ``lora``: parameter names by the names in a model's and in PEFT's files."""

    rank: int
    alpha: int
    targets: tuple[str, ...]
    base: dict[str, str]
    lora: dict[str, str]


class VllmEngine(EmbeddedEngine):
    """Samples with vLLM. Every response has its own seed, drawn from the generator.

    Raises as ``EmbeddedEngine``; EngineLost if the process fails, after which the engine is closed; UserError if vLLM
    cannot run the model or computes other log-probs than the policy.
    """

    def __init__(self, workers: Workers, limits: RolloutConfig) -> None:
        super().__init__(workers, max_prompt_tokens=limits.max_prompt_tokens, max_sequences=limits.max_sequences)
        require_vllm()
        device = self.policy.device
        if device.type not in ("cpu", "cuda") or device.index:
            raise UserError(
                f'rollout.engine = "vllm": the model is on {device}, not on the CPU or the first CUDA device '
                f"(CUDA_VISIBLE_DEVICES chooses which that is); set runtime.device, or {_OTHERWISE}"
            )
        adapter = adapter_layout(self.policy.model)
        options = _options(self.policy, limits) | _lora_options(adapter)
        self.max_tokens = options["max_model_len"]
        self._synced: list[int] | None = None
        self._answering = False
        weights: Any = (
            workers.share_weights()
            if device.type == "cpu"
            else {name: parameter.data for name, parameter in self.policy.model.named_parameters()}
        )
        self._child = Child(
            _PROGRAM,
            _environment(device, threads=torch.get_num_threads() * workers.count),
            fds=(weights.fd,) if device.type == "cpu" else (),
            quiet=True,
        )
        workers.closing.callback(self.close)
        try:
            self.version = self._open(options, weights, adapter)
            self._require_same_model()
        except EngineLost as error:
            name = type(self.policy.model).__name__
            remedy = "lower rollout.kv_cache_gib" if "memory" in str(error) else "change that"
            raise UserError(f'rollout.engine = "vllm" cannot run {name}: {error}; {remedy}, or {_OTHERWISE}') from error

    @property
    def wave_sequences(self) -> int:
        return self.max_sequences

    def stream(
        self, prefixes: Sequence[Prefix], *, count: int, sampling: SamplingParams, generator: torch.Generator
    ) -> Iterator[Ended]:
        """As ``EmbeddedEngine.stream``, without waves."""
        owners = [(prefix, number) for prefix in range(len(prefixes)) for number in range(count)]
        repeated, seeds = [prefixes[prefix] for prefix, _ in owners], self.draw_seeds(len(owners), generator)
        for place, rollout in self.stream_seeded(repeated, seeds, sampling):
            yield Ended(*owners[place], rollout)

    def stream_seeded(
        self, prefixes: Sequence[Prefix], seeds: Sequence[int], sampling: SamplingParams
    ) -> Iterator[tuple[int, Rollout]]:
        """Sample one continuation of each prefix with its own seed; yield each, with its index, when it ends."""
        limit = sampling.max_response_tokens
        longest = max((len(prefix.prompt_ids) for prefix in prefixes), default=0)
        require_positions(self.policy.model.config, longest, limit)
        if longest + limit > self.max_tokens:  # vLLM would cut the response
            raise ValueError(
                f"prompts of {longest} tokens and {limit} more: the engine was opened for {self.max_tokens}"
            )
        if any(len(prefix.response_ids) >= limit for prefix in prefixes):
            raise ValueError(f"a prefix holds a response of {limit} tokens or more, the limit: nothing can follow it")
        requests = [
            (prefix.ids, limit - len(prefix.response_ids), seed) for prefix, seed in zip(prefixes, seeds, strict=True)
        ]
        settings = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "stop_token_ids": list(stop_tokens(self.policy, sampling)),
        }
        self._sync()
        for finished in self._ask("generate", settings, sampling.fork_temperature, requests):
            for each in finished:
                self.workers.local.add_counts(finished=1, tokens=len(each.token_ids))
                yield each.request, self._rollout(prefixes[each.request].ids, each)

    def pass_over(self, num_sequences: int, generator: torch.Generator) -> None:
        self.draw_seeds(num_sequences, generator)

    def close(self) -> None:
        """End the process."""
        self._child.close()

    def _rollout(self, prompt_ids: tuple[int, ...], written: Finished) -> Rollout:
        of_tokens = torch.tensor(written.token_ids), torch.tensor(written.logprobs), torch.tensor(written.entropy)
        return build_rollout(self.policy, prompt_ids, *of_tokens, finished=written.finished)

    def _open(self, options: dict[str, Any], weights: Any, adapter: AdapterLayout | None) -> str:
        """vLLM's version, once it has opened the model."""
        with tempfile.TemporaryDirectory(prefix="forkrl-") as folder:
            config = copy.deepcopy(self.policy.model.config)
            config.architectures = [type(self.policy.model).__name__]
            config.save_pretrained(folder)  # all that vLLM needs; the weights are here
            [(version, device)] = self._ask(options | {"model": folder}, weights, adapter)
        if device != self.policy.device.type:
            raise EngineLost(f"vLLM {version} as installed runs on {device}, and the model is on {self.policy.device}")
        return str(version)

    def _sync(self) -> None:
        """Let the process take over the weights if they have changed."""
        versions = [parameter._version for parameter in self.policy.model.parameters()]
        if versions != self._synced:
            list(self._ask("sync"))
            self._synced = versions

    def _ask(self, *message: Any) -> Iterator[Any]:
        """The parts of the answer. Ends the process if one is abandoned: the next would be misread."""
        if self._answering or self._child.connection.closed:
            raise RuntimeError("this engine is closed")
        self._answering = True
        try:
            self._child.connection.send(message)
            while (answer := self._receive())[0] == "part":
                yield answer[1]
            self._answering = False
        except (EOFError, OSError) as error:
            raise EngineLost(f"the process of vLLM {self._child.death()}") from error
        finally:
            if self._answering:
                self.close()

    def _receive(self) -> tuple[str, Any]:
        if not self._child.connection.poll(SILENCE_S):
            raise EngineLost(f"the process of vLLM has sent nothing for {SILENCE_S:g} seconds")
        kind, value = self._child.connection.recv()
        if kind == "error":
            raise EngineLost(f"vLLM failed ({value})")
        return kind, value

    def _require_same_model(self) -> None:
        """Compare log-probs of a few responses, so that a model that vLLM computes differently is rejected."""
        prefixes = [Prefix((token,)) for token in range(4)]
        sampling = SamplingParams(min(_PROBE_TOKENS, self.max_tokens - 1))
        generator = torch.Generator(self.policy.device).manual_seed(0)
        rollouts = [each.rollout for each in self.stream(prefixes, count=4, sampling=sampling, generator=generator)]
        self._synced = None  # a resumed run reads its weights next
        gap = gap_of_rollouts(self.policy, rollouts)
        # Short responses to nothing are flatter and lie further apart than a task's: 0.075 nats for SmolLM2 in bf16.
        if not gap.mean <= 2 * MAX_MEAN_GAP[self.policy.precision]:
            raise EngineLost(f"its log-probs differ from the trainer's by {gap.mean:.2g} nats per token on average")


_PROGRAM = """
from forkrl.rollout.vllm_process import serve
serve()
"""


def _max_tokens(policy: Policy, limits: RolloutConfig) -> int:
    longest = limits.max_prompt_tokens + limits.max_response_tokens
    return min(longest, getattr(policy.text_config, "max_position_embeddings", None) or longest)


def _options(policy: Policy, limits: RolloutConfig) -> dict[str, Any]:
    """``EngineArgs`` that depend on model, device and recipe."""
    longest = _max_tokens(policy, limits)
    options: dict[str, Any] = {
        "max_model_len": longest,
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[policy.precision],
        "max_num_seqs": limits.max_sequences,
        "max_num_batched_tokens": max(4096, longest),  # prompts are read whole
        "kv_cache_memory_bytes": _kv_cache_bytes(policy, limits),
    }
    if policy.device.type == "cpu":
        return options | {"enforce_eager": True, "block_size": BLOCK}
    # Of the share that vLLM may take, it checks that it is free, which it is not next to the trainer.
    return options | {"gpu_memory_utilization": 0.01}


def _lora_options(adapter: AdapterLayout | None) -> dict[str, Any]:
    """``EngineArgs`` for an adapter; raises UserError if vLLM cannot hold it."""
    if adapter is None:
        return {}
    rank = next((rank for rank in _LORA_RANKS if rank >= adapter.rank), None)
    if rank is None:
        raise UserError(
            f'lora.rank = {adapter.rank}: rollout.engine = "vllm" has at most {_LORA_RANKS[-1]}; lower it, or '
            f"{_OTHERWISE}"
        )
    return {"enable_lora": True, "max_lora_rank": rank, "lora_target_modules": list(adapter.targets)}


def _kv_cache_bytes(policy: Policy, limits: RolloutConfig) -> int:
    """What ``max_sequences`` of full length need, at most ``kv_cache_gib``; raises UserError if that holds not one."""
    config = policy.text_config
    try:
        heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    except AttributeError as error:
        name = type(policy.model).__name__
        raise UserError(f'rollout.engine = "vllm" cannot run {name}: {first_line(error)}; {_OTHERWISE}') from error
    per_token: int = 2 * config.num_hidden_layers * heads * width * {"fp32": 4, "bf16": 2}[policy.precision]
    length, most = _max_tokens(policy, limits), limits.kv_cache_gib * 2**30
    blocks = -(-length // BLOCK) + 1
    if most < (least := (blocks + 1) * BLOCK * per_token):
        raise UserError(
            f"rollout.kv_cache_gib = {limits.kv_cache_gib:g} does not hold one sequence of {length:,} tokens; raise it "
            f"to {math.ceil(1000 * least / 2**30) / 1000:g}, or lower rollout.max_response_tokens"
        )
    return min((limits.max_sequences * blocks + 1) * BLOCK * per_token, int(most))


def _environment(device: torch.device, threads: int) -> dict[str, str]:
    environment = child_environment(threads) | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # scheduler and worker in that one process
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # the other has another interface for logits processors
        "VLLM_LOGGING_LEVEL": "CRITICAL",  # a failing step logs pages
        "VLLM_NO_USAGE_STATS": "1",
    }
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would count instead of kv_cache_memory_bytes
    if device.type == "cpu":
        environment["TORCH_COMPILE_DISABLE"] = "1"  # compiling one function takes up to 40 s and saves nothing
    return environment
