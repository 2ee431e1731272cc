"""Supervised training of the embedded base model on search traces, each batch seeded by (seed, step)."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from forkrl.config import SftConfig
from forkrl.config.recipe import parse_recipe, recipe_differences, recipe_toml
from forkrl.errors import TrainingHalted, UserError
from forkrl.model.policy import Policy, pick_device
from forkrl.model.prompt_tokens import listed, prompt_token_ids, unknown_characters
from forkrl.parallel.workers import Worker, Workers, open_workers
from forkrl.report.progress import progress
from forkrl.store.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from forkrl.store.interruption import Interruption
from forkrl.tasks.countdown import countdown_task, random_problem, write_trace
from forkrl.training.model_card import measure_base_model, write_model_card
from forkrl.types import Task

IGNORED = -100
MICRO_BATCH_TOKENS = 1024
"""Keeps activations in a core's cache: a third faster than 8,192 where measured."""
CHECKPOINT_EVERY = 250


def make_base_model(config: SftConfig, out: Path, *, recipe: str) -> None:
    """Train and write the model, tokenizer and card to ``out``; resumes from ``out/.checkpoints``."""
    checkpoints = out / ".checkpoints"
    if out.exists() and not checkpoints.exists() and any(out.iterdir()):
        raise UserError(f"{out}: the folder is not empty; name a new one")
    policy = build_base_policy(config)
    optimizer = torch.optim.AdamW(
        policy.model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay
    )
    start, num_tokens = _resume(config, checkpoints, policy, optimizer)
    task = countdown_task()
    with open_workers(policy, None, config.runtime) as workers:
        with Interruption() as interruption:
            for step in progress(range(start, config.steps), "training the base model"):
                num_tokens += train_step(config, workers, optimizer, trace_batch(config, policy, task, step), step)
                stopped = interruption.signalled
                if stopped or (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == config.steps:
                    _save(config, checkpoints, policy, optimizer, step + 1, num_tokens)
                interruption.check()
        figures = measure_base_model(workers, task, config)
        threads = workers.count * torch.get_num_threads()
    policy.model.save_pretrained(out)
    policy.tokenizer.save_pretrained(out)
    write_model_card(out, config, figures, recipe=recipe, num_tokens=num_tokens, threads=threads)
    shutil.rmtree(checkpoints)


def train_step(
    config: SftConfig,
    workers: Workers,
    optimizer: torch.optim.Optimizer,
    batch: list[tuple[Tensor, Tensor]],
    step: int,
) -> int:
    """One gradient step on the mean loss of all labelled tokens; returns their number."""
    num_tokens = sum(int((labels_BT[:, 1:] != IGNORED).sum()) for _, labels_BT in batch)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    workers.zero_gradients()
    sizes = [input_ids_BT.numel() for input_ids_BT, _ in batch]
    losses = workers.map(accumulate_cross_entropy, batch, num_tokens, sizes=sizes)
    workers.sum_gradients()
    if not math.isfinite(sum(losses)):
        raise TrainingHalted(f"step {step + 1}: the loss is {sum(losses)}; lower lr")
    nn.utils.clip_grad_norm_(workers.policy.model.parameters(), 1.0)
    optimizer.step()
    return num_tokens


def accumulate_cross_entropy(worker: Worker, item: tuple[Tensor, Tensor], num_tokens: int) -> float:
    """Loss and backward of one micro-batch, as its share of the mean over ``num_tokens`` labelled tokens."""
    input_ids_BT, labels_BT = item
    targets_BT = labels_BT[:, 1:]
    kept_BT = targets_BT != IGNORED
    logits_NV = worker.policy.logits(worker.policy.hidden_states(input_ids_BT[:, :-1], use_cache=False)[kept_BT])
    loss = nn.functional.cross_entropy(logits_NV, targets_BT[kept_BT], reduction="sum") / num_tokens
    loss.backward()
    return loss.item()


def build_character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """One token per character, and <pad>, <eos>, <unk>."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def build_base_policy(config: SftConfig) -> Policy:
    """A Qwen3 model with seeded random weights and tied embeddings, and its tokenizer."""
    tokenizer = build_character_tokenizer(config.data.characters)
    torch.manual_seed(config.seed)
    architecture = Qwen3Config(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **config.architecture.model_dump(),
    )
    model = Qwen3ForCausalLM(architecture)
    nn.Module.eval(model)  # as a loaded model is; it has no dropout
    nn.Module.to(model, pick_device(config.runtime.device))
    return Policy(model, tokenizer, config.precision)


def trace_batch(config: SftConfig, policy: Policy, task: Task, step: int) -> list[tuple[Tensor, Tensor]]:
    """One gradient step's ``(input_ids [B, T], labels [B, T])`` by length; only trace characters have labels."""
    rng, tokenizer = random.Random(f"{config.seed}/{step}"), policy.tokenizer
    rows: list[tuple[list[int], list[int]]] = []
    size = 0
    while size < config.batch_tokens:
        prompt, numbers, target = random_problem(task, rng)
        prompt_ids = list(prompt_token_ids(tokenizer, prompt))
        trace = write_trace(numbers, target, rng, config.data.habits)
        trace_ids = [*tokenizer.encode(trace), tokenizer.eos_token_id]
        if tokenizer.unk_token_id in prompt_ids + trace_ids:
            unknown = unknown_characters(tokenizer, prompt.text + trace)
            raise UserError(f"data.characters lacks {listed(unknown)}, which the traces use; add them")
        rows.append((prompt_ids + trace_ids, [IGNORED] * len(prompt_ids) + trace_ids))
        size += len(rows[-1][0])
    rows.sort(key=lambda row: len(row[0]))
    micro_batches: list[list[tuple[list[int], list[int]]]] = [[]]
    for row in rows:
        if (len(micro_batches[-1]) + 1) * len(row[0]) > MICRO_BATCH_TOKENS:
            micro_batches.append([])
        micro_batches[-1].append(row)
    return [_pad(micro_batch, tokenizer.pad_token_id, policy.device) for micro_batch in micro_batches]


def _pad(rows: list[tuple[list[int], list[int]]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    return (
        torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids, _ in rows], device=device),
        torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows], device=device),
    )


def learning_rate(config: SftConfig, step: int) -> float:
    """Linear warm-up, then cosine decay to ``final_lr``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def _save(
    config: SftConfig, checkpoints: Path, policy: Policy, optimizer: torch.optim.Optimizer, step: int, num_tokens: int
) -> None:
    save_checkpoint(
        checkpoints,
        step,
        model=policy.model,
        tokenizer=policy.tokenizer,
        optimizer=optimizer,
        generators={},
        progress={"step": step, "num_tokens": num_tokens, "recipe": recipe_toml(config)},
        keep=1,
    )


def _resume(config: SftConfig, checkpoints: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Restore weights and optimizer; return steps and tokens done, zeros for a new model."""
    newest = latest_checkpoint(checkpoints)
    if newest is None:
        return 0, 0
    state = load_checkpoint(newest, model=policy.model, optimizer=optimizer, generators={})
    differences = recipe_differences(parse_recipe(SftConfig, state["recipe"], str(newest)), config)
    if differences:
        raise UserError(f"{checkpoints.parent}: begun with another recipe: {'; '.join(differences)}; name a new --out")
    return state["step"], state["num_tokens"]
