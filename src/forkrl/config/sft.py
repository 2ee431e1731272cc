"""A recipe for ``forkrl sft``, which makes the embedded base model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from forkrl.config.runtime import RuntimeConfig
from forkrl.config.sections import Count, NonNegative, PositiveInt, Section, Seed


class ArchitectureConfig(Section):
    """Shape of a Qwen3 model trained from scratch."""

    hidden_size: PositiveInt = 128
    """Width of the residual stream."""
    intermediate_size: PositiveInt = 256
    """Width inside a feed-forward block."""
    num_hidden_layers: PositiveInt = 4
    """Layers, each of attention and a feed-forward block."""
    num_attention_heads: PositiveInt = 4
    """Query heads of a layer."""
    num_key_value_heads: PositiveInt = 2
    """Key and value heads of a layer, each shared by equally many query heads; divides num_attention_heads."""
    head_dim: PositiveInt = 32
    """Width of a head; even, for the rotary embedding."""
    max_position_embeddings: PositiveInt = 512
    """The longest sequence, prompt and response, that the model is declared to handle."""


class SearchHabits(Section):
    """Branches of the random searcher whose traces the base model imitates, as probabilities."""

    give_up: Annotated[float, Field(ge=0, le=1)] = 0.3
    """After a failed try: stop with "?" rather than try again."""
    repeat: Annotated[float, Field(ge=0, le=1)] = 0.25
    """On trying again: do the very same try once more, where an alert searcher takes one it has not tried."""
    skip_check: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Claim success without comparing the result with the target."""
    most_tries: PositiveInt = 12
    """The searcher's patience ends here."""


class SftDataConfig(Section):
    task: Literal["countdown"] = "countdown"
    """Whose search traces to imitate."""
    characters: Annotated[str, Field(min_length=1)] = "0123456789+-*/=,:;!?[] "
    """The alphabet: every character is one token."""
    habits: SearchHabits = SearchHabits()


class SftConfig(Section):
    """A recipe for ``forkrl sft``: next-token training on generated traces, from random weights."""

    seed: Seed = 0
    """Of the first weights and of the traces."""
    data: SftDataConfig = SftDataConfig()
    architecture: ArchitectureConfig = ArchitectureConfig()
    steps: PositiveInt = 3000
    """Gradient steps."""
    batch_tokens: PositiveInt = 16384
    """Tokens of one gradient step."""
    lr: Annotated[float, Field(gt=0)] = 3e-3
    """The highest learning rate, at the end of the warm-up."""
    final_lr: NonNegative = 1e-4
    """The rate falls to this along a cosine."""
    warmup_steps: Count = 100
    """Gradient steps over which lr rises linearly from 0."""
    weight_decay: NonNegative = 0.1
    """Decoupled, on all parameters."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of the matrix products; weights and optimizer state are fp32."""
    eval_problems: PositiveInt = 1000
    """Held-out problems measured for the model card."""
    runtime: RuntimeConfig = RuntimeConfig()
