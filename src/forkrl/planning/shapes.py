"""Model sizes that determine memory and time, read without the weights.

Axes: ``D`` hidden, ``I`` intermediate, ``L`` layers, ``H`` query heads, ``K`` key-value heads, ``C`` channels,
``V`` vocabulary, ``T`` tokens, ``N`` parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from forkrl.errors import UserError, first_line
from forkrl.model.locations import EMBEDDED_PREFIX, adapter_base, require_hub_id

_ARCHITECTURES = ("qwen3", "qwen2", "llama")
_OWNER = "Qwen/"


class ModelShape(NamedTuple):
    """A dense Llama-family decoder: RMSNorm, rotary positions, grouped queries, SwiGLU."""

    architecture: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """The output head is the embedding."""
    max_positions: int | None
    """The longest sequence that the model supports, by its config."""
    qk_norm: bool
    """RMSNorm on queries and keys, as in Qwen3."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of one token's keys in one layer; values are equally wide."""
        return self.kv_heads * self.head_dim

    @property
    def layer_matrices(self) -> int:
        """Weights of a layer's matrix products."""
        attention = 2 * self.hidden * (self.query_width + self.kv_width)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def layer_parameters(self) -> int:
        norms = 2 * self.hidden + self.qk_norm * 2 * self.head_dim
        attention_biases = self.qkv_bias * (self.query_width + 2 * self.kv_width) + self.out_bias * self.hidden
        return self.layer_matrices + norms + attention_biases + self.mlp_bias * (2 * self.intermediate + self.hidden)

    def adapter_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Weights of LoRA adapters; raises UserError if a target is not one of the layers."""
        hidden, inner, query, kv = self.hidden, self.intermediate, self.query_width, self.kv_width
        widths = {"q_proj": hidden + query, "k_proj": hidden + kv, "v_proj": hidden + kv, "o_proj": query + hidden}
        widths |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden + inner)
        names = list(widths) if tuple(targets) == ("all-linear",) else targets
        for name in names:
            if name not in widths:
                raise UserError(
                    f'lora.targets = {list(targets)}: no layer {name!r}; take "all-linear" alone, or some of '
                    f"{', '.join(widths)}"
                )
        return rank * self.layers * sum(widths[name] for name in names)

    @property
    def embedding_parameters(self) -> int:
        """Size of the embedding, and of the head."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        outside = self.embedding_parameters * (1 if self.tied else 2) + self.hidden
        return self.layers * self.layer_parameters + outside

    @property
    def matrices(self) -> int:
        """Weights that multiply each token: all matrix products, including the head, not the look-up."""
        return self.layers * self.layer_matrices + self.embedding_parameters

    @property
    def kv_numbers(self) -> int:
        """Numbers per token in the KV cache."""
        return 2 * self.layers * self.kv_width


class FoundShape(NamedTuple):
    shape: ModelShape
    source: str


def find_shape(path: str, revision: str | None = None) -> FoundShape:
    """The shape of ``model.path``: a local folder first, then known names, then the hub."""
    folder, source = Path(path).expanduser(), None
    if path.startswith(EMBEDDED_PREFIX):
        folder = Path(str(resources.files("forkrl"))) / "assets" / path.removeprefix(EMBEDDED_PREFIX)
        if not folder.is_dir():
            raise UserError(f"model.path = {path!r}: no such embedded model")
        source = "config.json in the package"
    if (base := adapter_base(str(folder))) is not None:
        return find_shape(*base)
    if folder.is_dir():
        return FoundShape(_read_config(folder / "config.json", path), source or str(folder / "config.json"))
    if (known := known_shape(path)) is not None:
        return known
    try:
        require_hub_id(path, "model.path", "folder")
    except UserError as error:
        raise UserError(
            f"{error}, and no shape of that name is known; for a plan name a model of the same shape, as in "
            f"model.path=Qwen/Qwen3-8B-Base"
        ) from None
    return FoundShape(_read_config(_download_config(path, revision), path), f"config.json of {path} on the hub")


def known_shape(path: str) -> FoundShape | None:
    """A shape by name, as in "Qwen/Qwen3-8B-Base" or "./Qwen3-32B-Base" (a folder that does not exist yet)."""
    known = json.loads(resources.files("forkrl.planning").joinpath("known_shapes.json").read_text(encoding="utf-8"))
    name = path.rstrip("/").rpartition("/")[2]
    local = path.startswith((".", "/", "~")) or "/" not in path
    model = known["same_shape_as"].get(name, name)
    if (not local and path != _OWNER + name) or model not in known["shapes"]:
        return None
    shape = parse_shape(known["shared"] | known["shapes"][model], path)
    return FoundShape(shape, f"shapes in the package (config.json of {_OWNER}{model})")


def parse_shape(values: Mapping[str, Any], path: str) -> ModelShape:
    architecture = str(values.get("model_type", "unknown"))
    activation, bias = values.get("hidden_act", "silu"), bool(values.get("attention_bias"))
    experts = any(values.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    for refused, what in (
        (experts or "moe" in architecture, f"a mixture of experts ({architecture})"),
        (architecture not in _ARCHITECTURES, f"architecture {architecture!r}"),
        (values.get("use_sliding_window"), "sliding-window attention"),
        (activation != "silu", f"hidden_act = {activation!r}"),
    ):
        if refused:
            raise UserError(
                f"model.path = {path!r}: {what}, which forkrl plan does not model; it models dense "
                f"{', '.join(_ARCHITECTURES)} with full attention and silu"
            )

    def size(key: str, default: int | None = None) -> int:
        value = default if values.get(key) is None else values[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"model.path = {path!r}: {key} = {value!r} in its config.json is not a positive integer")
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    kv_heads = size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise UserError(
            f"model.path = {path!r}: num_key_value_heads = {kv_heads} does not divide num_attention_heads = {heads}"
        )
    return ModelShape(
        architecture=architecture,
        hidden=hidden,
        intermediate=size("intermediate_size"),
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size("head_dim", 128 if architecture == "qwen3" else hidden // heads),
        vocabulary=size("vocab_size"),
        tied=bool(values.get("tie_word_embeddings", False)),
        max_positions=values.get("max_position_embeddings"),
        qk_norm=architecture == "qwen3",
        qkv_bias=architecture == "qwen2" or bias,
        out_bias=architecture != "qwen2" and bias,
        mlp_bias=architecture == "llama" and bool(values.get("mlp_bias")),
    )


def _read_config(file: Path, path: str) -> ModelShape:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.path = {path!r}: {file} cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"model.path = {path!r}: {file} is not a JSON object")
    return parse_shape(values, path)


def _download_config(path: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(path, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model.path = {path!r}: its config.json cannot be downloaded ({first_line(error)}); name a local folder "
            f"that contains one"
        ) from None
