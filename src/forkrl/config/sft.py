"""A recipe for ``forkrl sft``, which trains the embedded base model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from forkrl.config.sections import Count, NonNegative, Positive, PositiveInt, Section, Seed
from forkrl.config.train import RuntimeConfig


class ArchitectureConfig(Section):
    """Shape of a Qwen3 model trained from scratch."""

    hidden_size: PositiveInt = 128
    """Width of the residual stream."""
    intermediate_size: PositiveInt = 256
    """Inner width of a feed-forward block."""
    num_hidden_layers: PositiveInt = 4
    """Number of layers."""
    num_attention_heads: PositiveInt = 4
    """Query heads per layer."""
    num_key_value_heads: PositiveInt = 2
    """Key and value heads per layer; must divide num_attention_heads."""
    head_dim: PositiveInt = 32
    """Width of a head; even because of the rotary embedding."""
    max_position_embeddings: PositiveInt = 512
    """Longest sequence (prompt and response) that the model declares to support."""


class SearchHabits(Section):
    """Habits of the random searcher whose traces the base model imitates; fractions are probabilities."""

    give_up: Annotated[float, Field(ge=0, le=1)] = 0.3
    """After a failed attempt: stop with "?" instead of trying again."""
    repeat: Annotated[float, Field(ge=0, le=1)] = 0.25
    """When trying again: repeat the previous attempt instead of a new one."""
    skip_check: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Claim success without comparing the result with the target."""
    most_tries: PositiveInt = 12
    """The searcher gives up after this many attempts."""


class SftDataConfig(Section):
    task: Literal["countdown"] = "countdown"
    """The task whose search traces are imitated."""
    characters: Annotated[str, Field(min_length=1)] = "0123456789+-*/=,:;!?[] "
    """The alphabet: each character is one token."""
    habits: SearchHabits = SearchHabits()


class SftConfig(Section):
    """A recipe for ``forkrl sft``: next-token training on generated traces, from random weights."""

    seed: Seed = 0
    """Random seed of the initial weights and the traces."""
    data: SftDataConfig = SftDataConfig()
    architecture: ArchitectureConfig = ArchitectureConfig()
    steps: PositiveInt = 3000
    """Gradient steps."""
    batch_tokens: PositiveInt = 16384
    """Tokens per gradient step."""
    lr: Positive = 3e-3
    """Peak learning rate, reached at the end of the warm-up."""
    final_lr: NonNegative = 1e-4
    """Learning rate at the end of the cosine decay."""
    warmup_steps: Count = 100
    """Gradient steps over which lr rises linearly from 0."""
    weight_decay: NonNegative = 0.1
    """Decoupled, on all parameters."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of the matrix products; weights and optimizer state are fp32."""
    eval_problems: PositiveInt = 1000
    """Held-out problems evaluated for the model card."""
    runtime: RuntimeConfig = RuntimeConfig()
