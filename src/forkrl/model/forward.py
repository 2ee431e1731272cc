"""The dense forward pass: all positions run through the model, only requested positions through the head.

Sequences are packed (``packing.py``) if the model allows it, else padded on the right, so that causal attention needs
no mask and uses its fast path.

Shapes: ``B`` sequences, ``T`` token positions, ``N`` requested positions, ``D`` hidden.
"""

from __future__ import annotations

from torch import Tensor

from forkrl.head import token_stats
from forkrl.model.packing import pack, packed_hidden_states
from forkrl.model.policy import Policy
from forkrl.types import TokenBatch, TokenStats


def compute_token_stats(
    policy: Policy,
    batch: TokenBatch,
    *,
    temperature: float,
    entropy_grad: bool = False,
    at_BT: Tensor | None = None,
) -> TokenStats:
    """Log-prob and entropy of the policy at every response token, fp32 ``[B, T]``, 0 elsewhere.

    Args:
        batch: on the policy's device.
        temperature: sampling temperature; applies to both statistics.
        entropy_grad: also backpropagate through the entropy, for an entropy bonus.
        at_BT: bool, subset of the response mask: compute only these positions; None: all.
    """
    asked_BT = batch.response_mask if at_BT is None else at_BT
    if policy.packs:
        packing = pack(batch)
        hidden_ND = packing.unpack(packed_hidden_states(policy, packing), asked_BT)
    else:
        hidden_ND = policy.hidden_states(batch.input_ids, use_cache=False)[asked_BT]
    return head_stats(policy, hidden_ND, batch, asked_BT, temperature=temperature, entropy_grad=entropy_grad)


def head_stats(
    policy: Policy,
    hidden_ND: Tensor,
    batch: TokenBatch,
    at_BT: Tensor,
    *,
    temperature: float,
    entropy_grad: bool = False,
) -> TokenStats:
    """Statistics of the hidden states at ``at_BT``, fp32 ``[B, T]``, 0 elsewhere."""
    with policy.autocast():
        stats_N = token_stats(
            hidden_ND.to(policy.head_weight.dtype),
            policy.head_weight,
            batch.targets[at_BT],
            temperature=temperature,
            bias=policy.head_bias,
            backend=policy.head,
            entropy_grad=entropy_grad,
        )
    empty_BT = hidden_ND.new_zeros(at_BT.shape, dtype=stats_N.logprobs.dtype)
    return TokenStats(*(empty_BT.masked_scatter(at_BT, values_N) for values_N in stats_N))
