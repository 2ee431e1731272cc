"""A gradient step inside a rank of verl's: selection, ForkRL's loss, learning rate, and what is told of it.

verl's engine runs the model, cuts the mini-batch, sums gradients over ranks and moves the weights. Three things are
ForkRL's: which tokens carry gradient, the loss, which are those of the local engine, and the warm-up, which counts
gradient steps as the local engine does.

Axes: ``B`` sequences, ``T`` token positions of responses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.engine.utils import prepare_micro_batches
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.utils.padding import no_padding_2_padding, response_from_nested

from forkrl.cluster.options import ForkOptions, read_options
from forkrl.cluster.selection import seeded, select, select_over_ranks, sum_over_ranks
from forkrl.config import LossConfig
from forkrl.errors import TrainingHalted
from forkrl.method.loss import Counts, step_loss
from forkrl.method.selection import count_selected, reads_current_entropy
from forkrl.types import TokenStats

SELECTED, ROW = "forkrl_selected", "forkrl_row"
"""Fields of the batch: the driver's selection, if it made one; and the place of a sequence to be told of, else -1."""
PREFIX = "forkrl/"


@dataclass
class ForkLoss:
    """The loss of one micro-batch, called by verl's engine; and, for its worker, what the mini-batch adds up to."""

    options: ForkOptions
    loss: LossConfig
    num_selected: int = 0
    """Of the whole mini-batch, over all ranks."""
    seed: str = ""
    """Of a random selection inside a micro-batch."""
    threshold: float = math.inf
    """The lowest entropy selected before the first micro-batch, on this rank; infinite if none was."""
    told: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, model_output: Any, data: TensorDict, dp_group: Any = None) -> tuple[Tensor, dict[str, Metric]]:
        """Loss and token sums of a micro-batch, as verl wants them: times the ranks, which it takes the mean over."""
        logprobs_BT = no_padding_2_padding(model_output["log_probs"], data)
        entropy = model_output.get("entropy")
        current_BT = None if entropy is None else no_padding_2_padding(entropy, data)
        num_response, num_ranks = data["batch_num_tokens"], data["dp_size"]
        names = ["response_mask", "old_log_probs", "advantages", "entropy", SELECTED]
        names += [name for name in ("ref_log_prob", "rollout_is_weights") if name in data]
        part = data.select(*[name for name in names if name in data]).to_padded_tensor()
        mask_BT, advantages_BT = part["response_mask"].bool(), part["advantages"].float()
        if "rollout_is_weights" in part:  # the loss is homogeneous in the advantage
            advantages_BT = advantages_BT * part["rollout_is_weights"]
        sampled_BT, threshold = part["entropy"].float(), self.threshold
        if SELECTED in part:
            selected_BT = part[SELECTED].bool() & mask_BT
        else:
            entropy_BT = sampled_BT if current_BT is None else current_BT.detach().float()
            selected_BT = self._choose(entropy_BT, mask_BT)
            threshold = _lowest(entropy_BT[selected_BT])

        ref_BT = part["ref_log_prob"].float() if self.loss.kl_coef else None
        loss, sums = step_loss(
            TokenStats(logprobs_BT.float(), sampled_BT if current_BT is None else current_BT),
            part["old_log_probs"].float(),
            advantages_BT,
            mask_BT,
            selected_BT,
            Counts(int(num_response), self.num_selected),
            self.loss,
            ref_BT,
        )
        self._tell(data, sampled_BT, selected_BT)
        added = {"loss/policy": sums.policy, "loss/kl": sums.kl, "loss/entropy": sums.entropy}
        added |= {"clip_fraction": sums.clipped, "approx_kl": sums.approx_kl, "carrying": sums.contributing}
        added |= _token_sums(sampled_BT, selected_BT, mask_BT, advantages_BT)
        metrics = {
            PREFIX + name: Metric(AggregationType.SUM, float(value) * num_ranks) for name, value in added.items()
        }
        metrics[PREFIX + "ratio_max"] = Metric(AggregationType.MAX, sums.ratio_max)
        metrics[PREFIX + "threshold_min"] = Metric(AggregationType.MIN, threshold)
        return loss * num_ranks, metrics

    def _choose(self, entropy_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """From the tokens of this micro-batch alone."""
        selection = self.options.selection
        chosen_BT = select(entropy_BT.cpu(), mask_BT.cpu(), selection, seeded(self.seed))
        self.seed += "/"  # the next micro-batch draws others
        return chosen_BT.to(mask_BT.device)

    def _tell(self, data: TensorDict, entropy_BT: Tensor, selected_BT: Tensor) -> None:
        """Keep what the driver will ask for of the sequences that it marked."""
        if ROW not in data:
            return
        lengths_B = data["response_mask"].offsets().diff().tolist()
        rows_B = data[ROW].values() if data[ROW].is_nested else data[ROW].flatten()
        for place, row in enumerate(rows_B.tolist()):
            if row >= 0:
                selected, entropy = selected_BT[place, : lengths_B[place]], entropy_BT[place, : lengths_B[place]]
                self.told.append({"row": row, "selected": selected.tolist(), "entropy": entropy.tolist()})


def _lowest(entropy_N: Tensor) -> float:
    return float(entropy_N.min()) if len(entropy_N) else math.inf


def _token_sums(entropy_BT: Tensor, selected_BT: Tensor, mask_BT: Tensor, advantages_BT: Tensor) -> dict[str, float]:
    """Counts and sums over tokens, from which the driver computes the means of a step."""
    entropy_BT = torch.where(mask_BT, entropy_BT, 0.0)
    positive_BT, negative_BT = mask_BT & (advantages_BT > 0), mask_BT & (advantages_BT < 0)
    sums = {
        "response": mask_BT.sum(),
        "selected": selected_BT.sum(),
        "entropy": entropy_BT.sum(),
        "entropy_selected": torch.where(selected_BT, entropy_BT, 0.0).sum(),
        "positive": positive_BT.sum(),
        "positive_selected": (positive_BT & selected_BT).sum(),
        "negative": negative_BT.sum(),
        "negative_selected": (negative_BT & selected_BT).sum(),
    }
    return {name: float(value) for name, value in sums.items()}


class ForkTrainingWorker(TrainingWorker):  # type: ignore[misc]  # verl ships no types
    """verl's training worker, with ForkRL's gradient step."""

    loss_fn: ForkLoss

    def train_batch(self, data: TensorDict) -> TensorDict:
        """One gradient step of this rank."""
        # verl's scheduler counts what it is told to count: gradient steps, here.
        tu.assign_non_tensor(data, update_lr_scheduler=True)
        done = self.engine.lr_scheduler.last_epoch
        self._set_learning_rate(done)
        self._select_ahead(data, f"{self.loss_fn.options.seed}/{done}")
        output = super().train_batch(data)
        if output is not None:
            metrics = tu.get(output, "metrics")
            grad_norm = metrics["grad_norm"]
            if not math.isfinite(grad_norm):
                raise TrainingHalted(f"the gradient norm is {grad_norm}; the weights were left as they are")
            metrics["lr"] = self.engine.optimizer.param_groups[0]["lr"] if done < 0 else self._rate(done)
            tu.assign_non_tensor_data(output, "metrics", _of_mini_batch(metrics))
        return output

    def _rate(self, done: int) -> float:
        warmup = self.loss_fn.options.warmup_steps
        return float(self.optimizer_config.lr) * min(1.0, (done + 1) / warmup if warmup else 1.0)

    def _set_learning_rate(self, done: int) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self._rate(done)

    def _select_ahead(self, data: TensorDict, seed: str) -> None:
        """Choose what needs more than one micro-batch to choose from, and count what the loss will divide by."""
        loss, group = self.loss_fn, self.engine.get_data_parallel_group()
        selection = loss.options.selection
        loss.seed = f"{seed}/{self.engine.get_data_parallel_rank()}"
        mask_BT = data["response_mask"].to_padded_tensor(0).bool()
        entropy = data["entropy"]
        # A threshold selects the same tokens in every scope, and only knowing them tells how many.
        if SELECTED not in data and (selection.scope == "mini_batch" or selection.rule == "threshold"):
            entropy = self._measure_entropies(data) if reads_current_entropy(selection) else entropy
            entropy_BT = entropy.to_padded_tensor(0.0)
            selected_BT = select_over_ranks(entropy_BT, mask_BT, selection, seed, group)
            lengths_B = data["response_mask"].offsets().diff().tolist()
            rows = [row_T[:length] for row_T, length in zip(selected_BT.to(torch.int8), lengths_B, strict=True)]
            data[SELECTED] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        if SELECTED in data:
            chosen_N = data[SELECTED].values().bool()
            own, loss.threshold = int(chosen_N.sum()), _lowest(entropy.values()[chosen_N.to(entropy.device)].float())
        else:
            own = count_selected(mask_BT, selection, self._cut(data) if selection.scope == "micro_batch" else [])
        loss.num_selected = sum_over_ranks(own, self.device_name, group)

    def _measure_entropies(self, data: TensorDict) -> Tensor:
        """A pass without gradients over the mini-batch: the current policy's entropies, nested ``[B, T]``."""
        ahead = data.select(*data.keys())
        tu.assign_non_tensor(ahead, calculate_entropy=True, **self._engine_settings(data))
        with self.engine.eval_mode(disable_auto_offload=True):
            output = self.engine.infer_batch(ahead, loss_function=None)
        entropy: Tensor = response_from_nested(output["model_output"]["entropy"].cpu(), data["response_mask"].cpu())
        return entropy

    def _cut(self, data: TensorDict) -> list[Tensor]:
        """The rows of each micro-batch, as verl's engine is about to cut them."""
        cut = data.select(*data.keys())
        tu.assign_non_tensor(cut, sp_size=self.engine.ulysses_sequence_parallel_size, **self._engine_settings(data))
        parts, rows = prepare_micro_batches(
            data=cut, dp_group=self.engine.get_data_parallel_group(), same_micro_num_in_dp=True
        )
        if rows is not None:
            return [torch.as_tensor(part) for part in rows]
        return list(torch.arange(len(data)).split([len(part) for part in parts]))

    def _engine_settings(self, data: TensorDict) -> dict[str, Any]:
        """What verl's own ``train_batch`` is about to tell its engine, where the batch does not say it already."""
        settings = {
            "use_remove_padding": self.model_config.get("use_remove_padding", False),
            "use_dynamic_bsz": self.engine_config.use_dynamic_bsz,
            "max_token_len_per_gpu": self.engine_config.max_token_len_per_gpu,
            "micro_batch_size_per_gpu": self.engine_config.micro_batch_size_per_gpu,
            "use_fused_kernels": self.engine_config.use_fused_kernels,
        }
        return {name: value for name, value in settings.items() if name not in data}


def _of_mini_batch(metrics: dict[str, Any]) -> dict[str, Any]:
    """Sums of all ranks and micro-batches, and the means that go by gradient step, in place of the parts."""
    found = {name: value for name, value in metrics.items() if not name.startswith(PREFIX)}
    for name, value in metrics.items():
        if name.startswith(PREFIX):
            found[name] = float(Metric.aggregate_dp(value) if isinstance(value, list) else value.aggregate())
    carrying = max(1.0, found[PREFIX + "carrying"])
    for name in ("clip_fraction", "approx_kl"):
        found[f"{PREFIX}loss/{name}"] = found.pop(PREFIX + name) / carrying
    return found


def loss_config(actor: Any, options: ForkOptions) -> LossConfig:
    """ForkRL's settings of the loss from verl's of the actor."""
    return LossConfig(
        clip_low=actor.clip_ratio_low,
        clip_high=actor.clip_ratio_high,
        dual_clip=actor.clip_ratio_c if math.isfinite(actor.clip_ratio_c) else None,
        denominator=options.denominator,
        kl_coef=actor.kl_loss_coef if actor.use_kl_loss else 0.0,
        entropy_coef=actor.entropy_coeff,
    )


class ForkWorker(ActorRolloutRefWorker):  # type: ignore[misc]
    """A rank of verl's whose actor takes ForkRL's gradient steps."""

    actor_worker_cls = ForkTrainingWorker

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def init_model(self) -> None:
        """Load the model, and put ForkRL's loss in the place of verl's."""
        super().init_model()
        if "actor" in self.role:
            options = read_options(self.config)
            self.actor.set_loss_fn(ForkLoss(options, loss_config(self.loss_fn.keywords["config"], options)))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def take_told(self) -> list[dict[str, Any]]:
        """Selection and entropies of the sequences that the driver marked, since it last asked."""
        loss: ForkLoss = self.actor.loss_fn
        told, loss.told = loss.told, []
        return told
