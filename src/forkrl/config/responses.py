"""How many responses are sampled and in what way, and within what limits they are judged."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from forkrl.config.secret_values import reject_written_secrets
from forkrl.config.sections import FROM_LIST, Count, Fraction, PositiveInt, Section


class RolloutConfig(Section):
    prompts_per_step: PositiveInt = 512
    """Groups that enter the loss in one step."""
    group_size: Annotated[int, Field(ge=2)] = 16
    """Responses to each prompt; the group is the baseline of its own advantage."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature; log-probs and entropies of training are taken at the same temperature."""
    top_p: Fraction = 1.0
    """Nucleus sampling. Below 1 the sampling policy is not the trained one: a bias the paper does not have."""
    top_k: Count = 0
    """Sample among the k likeliest tokens; 0 means all."""
    max_prompt_tokens: PositiveInt = 2048
    """Longer prompts are an error that names the row."""
    max_response_tokens: PositiveInt = 20480
    """L_max: a response without a stop token is cut here."""
    stop: Annotated[tuple[str, ...], FROM_LIST] = ()
    """Further stop tokens, each one token of the tokenizer; its EOS and generation_config.json always stop."""
    max_sequences: PositiveInt = 256
    """Sequences decoded at once by one worker; bounds its KV cache."""
    cuda_graphs: bool = False
    """Decode by CUDA graphs (docs/engines.md): on a GPU, for Llama, Mistral, Qwen2 and Qwen3. Off because it has not
    run on a GPU yet."""


class RewardConfig(Section):
    overlong_cache: Count = 4096
    """L_cache: within the last L_cache tokens before L_max the reward falls linearly to -1; 0 turns it off."""
    workers: PositiveInt = 1
    """Verifier processes."""
    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Wall-clock limit for judging one response; a worker past it is killed and replaced."""
    memory_mb: Annotated[int, Field(ge=64)] = 2048
    """Address space of one verifier process."""


class SandboxConfig(Section):
    """Where and within what limits code rewards run programs (docs/code-rewards.md)."""

    server: str = ""
    """Address of a SandboxFusion server, such as "http://localhost:8080", with credentials as ${NAME}. Empty:
    bubblewrap, on this machine."""
    python: str = ""
    """Interpreter of the programs, with its standard library alone. Empty: the one that runs ForkRL."""
    seconds: Annotated[float, Field(ge=0.1)] = 6.0
    """CPU time for one test, and half of the wall-clock time that it may take."""
    total_seconds: Annotated[float, Field(ge=0.1)] = 60.0
    """Wall-clock time for all tests of one program; past it the program has failed."""
    memory_mb: Annotated[int, Field(ge=64)] = 1024
    """Memory of one program with all its processes, in MiB; below reward.memory_mb by 256 at least."""
    output_kb: PositiveInt = 16384
    """KiB that a program may print in one test; twice the expected output is allowed in any case."""
    files_mb: PositiveInt = 64
    """MiB of files that a program may have at a time; they are gone after the test."""
    processes: PositiveInt = 32
    """Processes and threads of one program at a time."""

    @model_validator(mode="after")
    def _holds_no_secrets(self) -> SandboxConfig:
        reject_written_secrets("sandbox.server", self.server)
        return self


class DynamicSamplingConfig(Section):
    enabled: bool = True
    """Drop groups whose responses are all right or all wrong, and sample on until the step is full."""
    generation_prompts: Count = 0
    """Prompts sampled at a time; 0 means prompts_per_step. The official scripts take 3 x 512."""
    max_generation_batches: PositiveInt = 10
    """After so many, train on the groups at hand; with none at hand the run ends and says why."""
