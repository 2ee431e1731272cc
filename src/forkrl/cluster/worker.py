"""A gradient step inside one of verl's ranks: selection, ForkRL's loss and learning rate, metrics.

The driver selects for the scope "rollout_batch"; for others the ranks exchange the entropies of their tokens.
Axes: ``B`` sequences, ``T`` token positions of responses, ``N`` response tokens in reading order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.engine.utils import prepare_micro_batches
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.utils.padding import no_padding_2_padding, response_from_nested

from forkrl.cluster.options import ForkOptions, read_options
from forkrl.config import LossConfig
from forkrl.errors import TrainingHalted
from forkrl.method.loss import Counts, step_loss
from forkrl.method.schedule import share_of_lr
from forkrl.method.selection import Choice, choose, count_selected
from forkrl.method.signals import Signals
from forkrl.methods import has_count, reads_current_policy
from forkrl.types import TokenStats

SELECTED, WEIGHTS = "forkrl_selected", "forkrl_weights"
"""Batch fields: a choice made before the micro-batches, if any; and its weights, if any."""
ROW, GROUP, REWARD = "forkrl_row", "forkrl_group", "forkrl_reward"
"""Batch fields: row index of a sequence to report details of, else -1; number of its prompt; and its reward."""
PROGRESS = "forkrl_progress"
"""Field of a whole batch with its ``Progress``."""
PREFIX = "forkrl/"


class Progress(NamedTuple):
    """Where a batch of the actor's update is in the run."""

    start: float
    """Share of the run's batches that were trained on before it."""
    share: float
    """What it adds to that."""
    gradient_steps: int
    """Of the whole run if every batch is full."""


def choose_tokens(signals: Signals, options: ForkOptions, seed: str, cuts: Sequence[Tensor] = ()) -> Choice:
    """Mask and weights of some sequences; random draws depend only on ``seed``. ``cuts`` are the micro-batches."""
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    try:
        return choose(replace(signals, generator=generator), options, options.weights, cuts)
    except ValueError as error:
        raise TrainingHalted(f"{error}; the model's weights have diverged") from error


def choose_over_ranks(signals: Signals, options: ForkOptions, seed: str, group: dist.ProcessGroup | None) -> Choice:
    """The same over the sequences of all ranks, repeated on each in rank order; this rank's part."""
    if group is None:
        return choose_tokens(signals, options, seed)
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, signals.to("cpu"), group)
    before = sum(len(part.advantages) for part in gathered[: dist.get_rank(group)])
    choice = choose_tokens(concatenate(gathered), options, seed)
    own, width = slice(before, before + len(signals.advantages)), signals.response_mask.shape[1]
    return choice.each(lambda values_BT: values_BT[own, :width])


def concatenate(parts: Sequence[Signals]) -> Signals:
    """All sequences of some batches, padded to the longest."""
    width = max(part.response_mask.shape[1] for part in parts)

    def joined(name: str) -> Tensor:
        values: list[Tensor] = [getattr(part, name) for part in parts]
        if values[0].ndim == 2:
            values = [torch.nn.functional.pad(each, (0, width - each.shape[1])) for each in values]
        return torch.cat(values)

    names = ("response_mask", "entropy", "logprobs", "old_logprobs", "advantages", "rewards", "groups")
    fields: dict[str, Any] = {name: joined(name) for name in names}
    return Signals(**fields, clip=parts[0].clip)


def read_signals(data: TensorDict, clip: tuple[float, float], measured: tuple[Tensor, Tensor] | None = None) -> Signals:
    """Signals from padded fields of verl, on the CPU; ``measured``: log-probs and entropies of the current policy."""
    mask_BT = data["response_mask"].bool()

    def of_response(values_BT: Tensor) -> Tensor:
        return torch.where(mask_BT, values_BT.detach().float(), 0.0)

    logprobs_BT, entropy_BT = measured or (data["old_log_probs"], data["entropy"])
    signals = Signals(
        response_mask=mask_BT,
        entropy=of_response(entropy_BT),
        logprobs=of_response(logprobs_BT),
        old_logprobs=of_response(data["old_log_probs"]),
        advantages=of_response(data["advantages"]).gather(1, mask_BT.int().argmax(1, keepdim=True))[:, 0],
        rewards=data[REWARD].flatten().float(),
        groups=data[GROUP].flatten(),
        clip=clip,
    )
    return signals.to("cpu")


@dataclass
class ForkLoss:
    """The loss of one micro-batch, called by verl's engine, with the state of its mini-batch."""

    options: ForkOptions
    loss: LossConfig
    num_selected: int = 0
    """In the whole mini-batch, over all ranks."""
    num_sequences: int = 0
    """In the same, but for padding."""
    seed: str = ""
    """For a random selection inside a micro-batch."""
    threshold: float = math.inf
    """Lowest entropy selected before the first micro-batch, on this rank; infinite if none."""
    details: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, model_output: Any, data: TensorDict, dp_group: Any = None) -> tuple[Tensor, dict[str, Metric]]:
        """Loss and token sums of a micro-batch, times the number of ranks, since verl averages over them."""
        logprobs_BT = no_padding_2_padding(model_output["log_probs"], data)
        entropy = model_output.get("entropy")
        current_BT = None if entropy is None else no_padding_2_padding(entropy, data)
        num_response, num_ranks = data["batch_num_tokens"], data["dp_size"]
        names = (
            "response_mask",
            "old_log_probs",
            "advantages",
            "entropy",
            SELECTED,
            WEIGHTS,
            GROUP,
            REWARD,
            "ref_log_prob",
            "rollout_is_weights",
        )
        part = data.select(*[name for name in names if name in data]).to_padded_tensor()
        mask_BT, advantages_BT = part["response_mask"].bool(), part["advantages"].float()
        weight_BT = part.get("rollout_is_weights", 1.0)  # the loss is homogeneous in the advantage
        sampled_BT, threshold = part["entropy"].float(), self.threshold
        if SELECTED in part:
            selected_BT, own_BT = part[SELECTED].bool() & mask_BT, part.get(WEIGHTS)
        else:
            measured = None if current_BT is None else (logprobs_BT, current_BT)
            signals = read_signals(part, (self.loss.clip_low, self.loss.clip_high), measured)
            choice = choose_tokens(signals, self.options, self.seed, [torch.arange(len(mask_BT))])
            selected_BT, own_BT = choice.each(lambda values_BT: values_BT.to(mask_BT.device))
            self.seed += "/"  # the next micro-batch draws other tokens
            threshold = _lowest(signals.entropy[choice.selected_BT])
        if own_BT is not None:
            weight_BT = weight_BT * own_BT

        loss, sums = step_loss(
            TokenStats(logprobs_BT.float(), sampled_BT if current_BT is None else current_BT),
            part["old_log_probs"].float(),
            advantages_BT * weight_BT,
            mask_BT,
            selected_BT,
            Counts(int(num_response), self.num_selected, self.num_sequences),
            self.loss,
            part["ref_log_prob"].float() if self.loss.needs_reference else None,
        )
        self._keep_details(data, sampled_BT, selected_BT)
        added = {"loss/policy": sums.policy, "loss/kl": sums.kl, "loss/entropy": sums.entropy}
        added |= {"clip_fraction": sums.clipped, "approx_kl": sums.approx_kl, "contributing": sums.contributing}
        added |= _token_sums(sampled_BT, selected_BT, mask_BT, advantages_BT)
        metrics = {
            PREFIX + name: Metric(AggregationType.SUM, float(value) * num_ranks) for name, value in added.items()
        }
        metrics[PREFIX + "ratio_max"] = Metric(AggregationType.MAX, sums.ratio_max)
        metrics[PREFIX + "threshold_min"] = Metric(AggregationType.MIN, threshold)
        return loss * num_ranks, metrics

    def _keep_details(self, data: TensorDict, entropy_BT: Tensor, selected_BT: Tensor) -> None:
        """Keep selection and entropies of the sequences that the driver marked."""
        if ROW not in data:
            return
        lengths_B = data["response_mask"].offsets().diff().tolist()
        rows_B = data[ROW].values() if data[ROW].is_nested else data[ROW].flatten()
        for row, length, selected_T, entropy_T in zip(rows_B.tolist(), lengths_B, selected_BT, entropy_BT, strict=True):
            if row >= 0:
                selected, entropy = selected_T[:length].tolist(), entropy_T[:length].tolist()
                self.details.append({"row": row, "selected": selected, "entropy": entropy})


def nested(values_BT: Tensor, data: TensorDict) -> Tensor:
    """Values of padded responses, nested like those of the batch."""
    lengths_B = data["response_mask"].offsets().diff().tolist()
    rows = [row_T[:length] for row_T, length in zip(values_BT, lengths_B, strict=True)]
    nested: Tensor = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    return nested


def _lowest(entropy_N: Tensor) -> float:
    return float(entropy_N.min()) if len(entropy_N) else math.inf


def _token_sums(entropy_BT: Tensor, selected_BT: Tensor, mask_BT: Tensor, advantages_BT: Tensor) -> dict[str, float]:
    """Counts and sums over tokens, from which the driver computes step means."""
    tokens = {"response": mask_BT, "positive": mask_BT & (advantages_BT > 0), "negative": mask_BT & (advantages_BT < 0)}
    sums = {name: token_BT.sum() for name, token_BT in tokens.items()}
    sums["selected"] = selected_BT.sum()
    for name in ("positive", "negative"):
        sums[f"{name}_selected"] = (tokens[name] & selected_BT).sum()
    sums["entropy"] = torch.where(mask_BT, entropy_BT, 0.0).sum()
    sums["entropy_selected"] = torch.where(selected_BT, entropy_BT, 0.0).sum()
    return {name: float(value) for name, value in sums.items()}


class ForkTrainingWorker(TrainingWorker):  # type: ignore[misc]  # verl ships no types
    """verl's training worker, with ForkRL's gradient step."""

    loss_fn: ForkLoss
    _first: int
    """Gradient steps before those of this batch."""
    _num_mini_batches: int

    def train_mini_batch(self, data: TensorDict) -> TensorDict:
        rows = tu.get(data, "mini_batch_size") // self.engine.get_data_parallel_size()
        self._first = self.engine.lr_scheduler.last_epoch
        self._num_mini_batches = tu.get(data, "epochs") * (len(data) // rows)
        return super().train_mini_batch(data)

    def train_batch(self, data: TensorDict) -> TensorDict:
        tu.assign_non_tensor(data, update_lr_scheduler=True)  # verl's scheduler then counts gradient steps
        done, options = self.engine.lr_scheduler.last_epoch, self.loss_fn.options
        progress: Progress = tu.get(data, PROGRESS)
        now = progress.start + progress.share * (done - self._first) / self._num_mini_batches
        rate = float(self.optimizer_config.lr) * share_of_lr(options, done + 1, now, progress.gradient_steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self._select_first(data, f"{options.seed}/{done}")
        output = super().train_batch(data)
        if output is not None:
            metrics = tu.get(output, "metrics")
            if not math.isfinite(metrics["grad_norm"]):
                raise TrainingHalted(f"the gradient norm is {metrics['grad_norm']}; the weights were left as they are")
            metrics["lr"] = rate
            tu.assign_non_tensor_data(output, "metrics", _of_mini_batch(metrics))
        return output

    def _select_first(self, data: TensorDict, seed: str) -> None:
        """Select now if it takes more than one micro-batch, and count the loss's divisor."""
        loss, group = self.loss_fn, self.engine.get_data_parallel_group()
        selection = loss.options
        loss.seed = f"{seed}/{self.engine.get_data_parallel_rank()}"
        mask_BT = data["response_mask"].to_padded_tensor(0).bool()
        own_cuts = selection.scope in ("micro_batch", "sequence")
        if SELECTED not in data and own_cuts and has_count(selection.rule):  # each micro-batch chooses
            own = count_selected(mask_BT, selection, self._cut(data) if selection.scope == "micro_batch" else [])
        else:
            entropy_N = data["entropy"].values().float()
            if SELECTED not in data:
                entropy_N = self._choose_first(data, seed, group, own_cuts=own_cuts)
            chosen_N = data[SELECTED].values().bool()
            own, loss.threshold = int(chosen_N.sum()), _lowest(entropy_N[chosen_N.to(entropy_N.device)])
        totals = torch.tensor([own, int(mask_BT.any(1).sum())], dtype=torch.int64, device=self.device_name)
        if group is not None:
            dist.all_reduce(totals, group=group)
        loss.num_selected, loss.num_sequences = totals.tolist()

    def _choose_first(self, data: TensorDict, seed: str, group: Any, *, own_cuts: bool) -> Tensor:
        """Choose before the micro-batches run, over those or over all ranks; returns the entropies ``[N]`` read."""
        loss = self.loss_fn
        measured = self._measure(data) if reads_current_policy(loss.options, loss.options.weights) else None
        names = ("response_mask", "old_log_probs", "advantages", "entropy", GROUP, REWARD)
        signals = read_signals(
            data.select(*names).to_padded_tensor(), (loss.loss.clip_low, loss.loss.clip_high), measured
        )
        if own_cuts:
            cuts = self._cut(data) if loss.options.scope == "micro_batch" else []
            choice = choose_tokens(signals, loss.options, seed, cuts)
        else:
            choice = choose_over_ranks(signals, loss.options, seed, group)
        data[SELECTED] = nested(choice.selected_BT.to(torch.int8), data)
        if choice.weights_BT is not None:
            data[WEIGHTS] = nested(choice.weights_BT, data)
        return nested(signals.entropy, data).values()

    def _measure(self, data: TensorDict) -> tuple[Tensor, Tensor]:
        """The current policy's log-probs and entropies, padded ``[B, T]``, by a pass without gradients."""
        inputs = data.select(*data.keys())
        tu.assign_non_tensor(inputs, calculate_entropy=True, **self._engine_settings(data))
        with self.engine.eval_mode(disable_auto_offload=True):
            output = self.engine.infer_batch(inputs, loss_function=None)
        found = output["model_output"]
        logprobs, entropy = (
            response_from_nested(found[name].cpu(), data["response_mask"].cpu()).to_padded_tensor(0.0)
            for name in ("log_probs", "entropy")
        )
        return logprobs, entropy

    def _cut(self, data: TensorDict) -> list[Tensor]:
        """The rows of each micro-batch, as verl's engine will cut them."""
        inputs = data.select(*data.keys())
        tu.assign_non_tensor(inputs, sp_size=self.engine.ulysses_sequence_parallel_size, **self._engine_settings(data))
        parts, rows = prepare_micro_batches(
            data=inputs, dp_group=self.engine.get_data_parallel_group(), same_micro_num_in_dp=True
        )
        if rows is not None:
            return [torch.as_tensor(part) for part in rows]
        return list(torch.arange(len(data)).split([len(part) for part in parts]))

    def _engine_settings(self, data: TensorDict) -> dict[str, Any]:
        """What verl's ``train_batch`` passes to its engine, unless the batch has it already."""
        names = ("use_dynamic_bsz", "max_token_len_per_gpu", "micro_batch_size_per_gpu", "use_fused_kernels")
        settings = {name: getattr(self.engine_config, name) for name in names}
        settings["use_remove_padding"] = self.model_config.get("use_remove_padding", False)
        return {name: value for name, value in settings.items() if name not in data}


def _of_mini_batch(metrics: dict[str, Any]) -> dict[str, Any]:
    """Sums over all ranks and micro-batches, and gradient-step means, in place of the parts."""
    found = {name: value for name, value in metrics.items() if not name.startswith(PREFIX)}
    for name, value in metrics.items():
        if name.startswith(PREFIX):
            found[name] = float(Metric.aggregate_dp(value) if isinstance(value, list) else value.aggregate())
    contributing = max(1.0, found[PREFIX + "contributing"])
    for name in ("clip_fraction", "approx_kl"):
        found[f"{PREFIX}loss/{name}"] = found.pop(PREFIX + name) / contributing
    return found


def loss_config(actor: Any, options: ForkOptions) -> LossConfig:
    """ForkRL's loss settings from those of verl's actor."""
    return LossConfig(
        objective=options.objective,
        options=options.objective_options,
        clip_low=actor.clip_ratio_low,
        clip_high=actor.clip_ratio_high,
        dual_clip=actor.clip_ratio_c if math.isfinite(actor.clip_ratio_c) else None,
        denominator=options.denominator,
        kl_coef=actor.kl_loss_coef if actor.use_kl_loss else 0.0,
        entropy_coef=actor.entropy_coeff,
    )


class ForkWorker(ActorRolloutRefWorker):  # type: ignore[misc]
    """One of verl's ranks, whose actor takes ForkRL's gradient steps."""

    actor_worker_cls = ForkTrainingWorker

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def init_model(self) -> None:
        """Load the model, and replace verl's loss by ForkRL's."""
        super().init_model()
        if "actor" in self.role:
            options = read_options(self.config)
            self.actor.set_loss_fn(ForkLoss(options, loss_config(self.loss_fn.keywords["config"], options)))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def take_details(self) -> list[dict[str, Any]]:
        """Selection and entropies of the marked sequences since the last call."""
        loss: ForkLoss = self.actor.loss_fn
        details, loss.details = loss.details, []
        return details
