"""The exact way: every position runs with gradients; the head sees response positions only.

Shapes: ``B`` sequences, ``T`` token positions, ``N`` response positions, ``D`` hidden.
"""

from __future__ import annotations

from forkrl.model import Policy
from forkrl.token_stats import token_stats
from forkrl.types import TokenBatch, TokenStats


def compute_token_stats(
    policy: Policy, batch: TokenBatch, *, temperature: float, entropy_grad: bool = False
) -> TokenStats:
    """Log-prob of every response token and entropy of its position under the policy, fp32 ``[B, T]``, 0 elsewhere.

    Args:
        policy: gradients flow into its weights where autograd is on.
        batch: on the policy's device.
        temperature: of sampling; the statistics are of the same distribution.
        entropy_grad: let gradients flow through the entropy too, for an entropy bonus.
    """
    # Padding stands on the right, where causal attention never looks: no mask, and attention takes its fast path.
    hidden_BTD = policy.hidden_states(batch.input_ids, use_cache=False)
    with policy.autocast():
        stats_N = token_stats(
            hidden_BTD[batch.response_mask].to(policy.head_weight.dtype),
            policy.head_weight,
            batch.targets[batch.response_mask],
            temperature=temperature,
            bias=policy.head_bias,
            entropy_grad=entropy_grad,
        )
    empty_BT = hidden_BTD.new_zeros(batch.response_mask.shape, dtype=stats_N.logprobs.dtype)
    return TokenStats(*(empty_BT.masked_scatter(batch.response_mask, values_N) for values_N in stats_N))
