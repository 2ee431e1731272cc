"""A training state small enough to save hundreds of times: model, tokenizer, AdamW, two random generators."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from forkrl.store.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint

WORDS = ("<pad>", "<eos>", *"0123456789+-*/= ")


def tiny_config(**changes: Any) -> Qwen3Config:
    sizes = {
        "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "tie_word_embeddings": True,
    }  # fmt: skip
    return Qwen3Config(**{**sizes, **changes})


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@dataclass
class TinyState:
    """Everything that a checkpoint holds, and a training step that consumes every source of chance."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    optimizer: torch.optim.Optimizer
    generators: dict[str, torch.Generator]

    def train(self, steps: int) -> list[float]:
        """Losses of ``steps`` gradient steps on random tokens, under a falling learning rate."""
        losses = []
        for _ in range(steps):
            ids = torch.randint(len(WORDS), (2, 8), generator=self.generators["data"])
            noise = torch.rand(()) + torch.rand((), generator=self.generators["sampling"])
            loss = self.model(input_ids=ids, labels=ids).loss * noise
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.9
            losses.append(float(loss.detach()))
        return losses

    def save(self, checkpoints: Path, step: int, keep: int = 1, spared: int | None = None, **progress: Any) -> Path:
        return save_checkpoint(
            checkpoints, step, model=self.model, tokenizer=self.tokenizer, optimizer=self.optimizer,
            generators=self.generators, progress={"step": step, **progress}, keep=keep, spared=spared,
        )  # fmt: skip

    def load(self, path: Path) -> dict[str, Any]:
        verify_checkpoint(path)  # as a resume does, in latest_checkpoint
        return load_checkpoint(path, model=self.model, optimizer=self.optimizer, generators=self.generators)

    def bits(self) -> dict[str, Any]:
        """Every byte that decides how training goes on, by name."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for parameter, values in self.optimizer.state.items():
            tensors |= {f"optimizer/{names[id(parameter)]}/{key}": value for key, value in values.items()}
        tensors |= {f"generator/{name}": generator.get_state() for name, generator in self.generators.items()}
        tensors["random"] = torch.get_rng_state()
        groups = [
            {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
            for group in self.optimizer.param_groups
        ]
        return {"groups": groups} | {
            name: (
                str(tensor.dtype),
                tensor.shape,
                tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
            )
            for name, tensor in tensors.items()
        }


def tiny_state(seed: int = 0, model: PreTrainedModel | None = None, **flags: Any) -> TinyState:
    """A state with everything random set by ``seed``; ``flags`` go to AdamW."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(tiny_config()) if model is None else model
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    generators = {
        name: torch.Generator().manual_seed(seed + 1 + number) for number, name in enumerate(("data", "sampling"))
    }
    return TinyState(model, tiny_tokenizer(), torch.optim.AdamW(groups, lr=1e-2 / (1 + seed), **flags), generators)
