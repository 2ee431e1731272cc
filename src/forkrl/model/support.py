"""Rejects models that ForkRL would train or measure wrongly; docs/models.md lists supported families.

Last hidden states and output embedding must determine the logits, and must not depend on batching or caching.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils import find_adapter_config_file  # type: ignore[attr-defined]  # public, but not in its __all__

from forkrl.errors import UserError, first_line, is_out_of_memory

if TYPE_CHECKING:
    from forkrl.model.policy import Policy

PROBE_ERRORS = (AttributeError, TypeError, ValueError, RuntimeError, LookupError)
"""Raised by a model's code if it is called in an unsupported way."""
_PROBE_LOGIT = 100.0
"""Above common soft caps (Gemma 2: 30), and within the range of every precision."""


def require_no_adapter(location: str, revision: str | None, path: str) -> None:
    """Reject a model with an adapter, which would be ignored (``open_policy`` merges one in a folder of its own)."""
    if find_adapter_config_file(location, revision=revision) is not None:
        raise UserError(
            f"model.path = {path!r} has an adapter (adapter_config.json), which only ForkRL's own engine reads, from "
            f"a folder without other weights; merge it into the weights (checkpoint.merged = true, or PEFT: "
            f"merge_and_unload, then save_pretrained), or remove that file to use the weights without it"
        )


def require_fixed_frequencies(config: PretrainedConfig, path: str) -> None:
    """Reject rotary frequencies that depend on the longest sequence of a batch: log-probs would depend on the batch."""
    for kind in rope_types(config.to_dict()):
        if kind == "longrope" or "dynamic" in kind:
            raise UserError(
                f"model.path = {path!r} has a rotary embedding of type {kind!r}, whose frequencies depend on the "
                f"longest sequence of a batch, so that sampling and training would disagree on log-probs; ForkRL does "
                f"not support it: use a model with another type, such as default, linear, yarn or llama3"
            )


def rope_types(settings: Any) -> Iterator[str]:
    """The types of rotary embedding in a config; each kind of layer may have its own."""
    if isinstance(settings, Mapping):
        if isinstance(kind := settings.get("rope_type"), str):
            yield kind
        for value in settings.values():
            yield from rope_types(value)


@torch.no_grad()
def require_supported(policy: Policy, path: str) -> None:
    require_fixed_frequencies(policy.model.config, path)
    for fault_of in (_infinite_logits, _dependence_on_batch, _other_head):
        try:
            fault = fault_of(policy)
        except PROBE_ERRORS as error:
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"model.path = {path!r}: {type(policy.model).__name__} cannot be run as a decoder with an output "
                f"embedding ({type(error).__name__}: {first_line(error)}); docs/models.md lists the supported families"
            ) from error
        if fault:
            raise UserError(f"model.path = {path!r}: {fault}")


def _infinite_logits(policy: Policy) -> str:
    ids = _probe_ids(policy, 4)
    finite = policy.logits(policy.hidden_states(ids, torch.ones_like(ids))[0]).isfinite().all()
    return "" if finite else "its logits are NaN or infinite; the weights are damaged"


def _dependence_on_batch(policy: Policy) -> str:
    """Hidden states must not depend on later padding or on other sequences."""
    ids = _probe_ids(policy, 8)
    padded = torch.cat([torch.cat([ids[:, :4], torch.zeros_like(ids[:, 4:])], 1), ids])
    half = policy.head_weight.dtype == torch.bfloat16
    with torch.autocast(policy.device.type, dtype=torch.bfloat16, enabled=half):  # the precision of the weights
        alone, together = (
            policy.decoder(input_ids=each, use_cache=False).last_hidden_state[0, :4].float()
            for each in (ids[:, :4], padded)
        )
    if not _differ(alone, together, 5e-2 if half else 1e-3):
        return ""
    return (
        f"the hidden states of {type(policy.model).__name__} change with the padding behind a sequence, so its "
        f"log-probs would depend on the batch; ForkRL does not support it"
    )


def _other_head(policy: Policy) -> str:
    """Logits must be ``hidden @ weight.T + bias``; inputs are scaled up, since soft caps barely change small logits."""
    ids, name = _probe_ids(policy, 4), type(policy.model).__name__
    mask = torch.ones_like(ids)
    hidden_TD = policy.hidden_states(ids, mask)[0]
    scale = _PROBE_LOGIT / max(float(policy.logits(hidden_TD).abs().max()), 1e-6)
    inputs: list[Tensor] = []

    def enlarge(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs.append(arguments[0])
        return (arguments[0] * scale,)

    with policy.model.get_output_embeddings().register_forward_pre_hook(enlarge), policy.autocast():
        expected = policy.model(input_ids=ids, attention_mask=mask).logits[0].float()
    tolerance = 1e-3 if policy.precision == "fp32" else 5e-2
    if len(inputs) != 1 or inputs[0][0].shape != hidden_TD.shape or _differ(inputs[0][0], hidden_TD, tolerance):
        return (
            f"{name} changes its last hidden states before the output embedding (a projection or scaling), which "
            f"ForkRL does not support"
        )
    if _differ(policy.logits(hidden_TD * scale), expected, tolerance):
        return (
            f"{name} transforms its logits after the output embedding (soft-capping or scaling), which ForkRL does not "
            f"support"
        )
    return ""


def _probe_ids(policy: Policy, length: int) -> Tensor:
    return torch.arange(length, device=policy.device)[None] % policy.head_weight.shape[0]


def _differ(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    return not torch.allclose(
        actual.float(), expected.float(), rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )
