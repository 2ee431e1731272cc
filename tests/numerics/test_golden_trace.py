"""Mathematics that is not meant to change gives the losses it always gave.

``python -m tests.numerics.test_golden_trace`` writes the traces anew; a commit that does so says why they moved.

Shapes: ``B`` sequences, ``T`` token positions.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from forkrl.config import ModelConfig, TrainConfig
from forkrl.model.forward import compute_token_stats
from forkrl.model.policy import Policy, open_policy
from forkrl.parallel.workers import Workers
from forkrl.training.update import update_policy
from forkrl.types import TokenBatch

TRACES = Path(__file__).parents[1] / "data" / "golden_traces.json"
NUM_SEQUENCES, PROMPT, LONGEST, STEPS = 8, 6, 40, 3
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "all tokens": {"selection": {"rule": "all"}},
    "random": {"selection": {"rule": "random"}},
    "bottom": {"selection": {"rule": "bottom_entropy", "ratio": 0.8}},
    "threshold": {"selection": {"rule": "threshold", "threshold": 0.672}},
    "mini-batch": {"selection": {"scope": "mini_batch"}, "loss": {"denominator": "response"}},
    "sequence, rollout entropy": {"selection": {"scope": "sequence", "entropy": "rollout"}},
    "penalties, dual clip": {"loss": {"kl_coef": 0.1, "entropy_coef": 0.01, "dual_clip": 3.0}},
}


def build_batch() -> TokenBatch:
    """Made-up responses of several lengths; log-probs of a policy that was another."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 26, (NUM_SEQUENCES, LONGEST + 1), generator=generator)
    lengths_B1 = torch.linspace(PROMPT + 4, LONGEST, NUM_SEQUENCES).long()[:, None]
    attention_mask = torch.arange(LONGEST) < lengths_B1
    response_mask = attention_mask & (torch.arange(LONGEST) >= PROMPT - 1)
    noise_BT, entropy_BT = torch.rand(2, NUM_SEQUENCES, LONGEST, generator=generator)
    old_logprobs, entropy = -4 * noise_BT * response_mask, 2 * entropy_BT * response_mask
    advantages = torch.linspace(-1.5, 1.5, NUM_SEQUENCES)
    return TokenBatch(ids[:, :-1], ids[:, 1:], attention_mask, response_mask, old_logprobs, entropy, advantages)


def trace(policy: Policy, sections: dict[str, Any]) -> list[dict[str, float]]:
    """Metrics of a few gradient steps on the same batch."""
    working = Policy(copy.deepcopy(policy.model), policy.tokenizer)
    values = {"training": {"micro_batch_tokens": 120}, "rollout": {"max_response_tokens": 64, "max_prompt_tokens": 16}}
    config = TrainConfig.model_validate(values | {"reward": {"overlong_cache": 0}} | sections)
    reference = policy if config.loss.kl_coef else None
    optimizer = torch.optim.AdamW(working.model.parameters(), lr=1e-4)
    generator, batch, records = torch.Generator().manual_seed(1), build_batch(), []
    for _ in range(STEPS):
        with torch.no_grad():
            entropy = compute_token_stats(working, batch, temperature=1.0).entropy
        update = update_policy(Workers(working, reference), optimizer, batch, config, generator)
        selected = update.selected_BT
        update.metrics.pop("entropy/threshold")
        facts = {"num_selected": float(selected.sum()), "entropy_of_selected": float(entropy[selected].mean())}
        records.append({name: round(value, 7) for name, value in (update.metrics | facts).items()})
    return records


@pytest.fixture(scope="module")
def policy() -> Policy:
    return open_policy(ModelConfig(path="embedded:countdown-base"), "cpu")


@pytest.mark.parametrize("name", RECIPES)
def test_losses_are_what_they_were(policy: Policy, name: str) -> None:
    expected = json.loads(TRACES.read_text())[name]
    for step, (now, then) in enumerate(zip(trace(policy, RECIPES[name]), expected, strict=True)):
        assert now == pytest.approx(then, rel=1e-4, abs=1e-5), f"step {step}"


if __name__ == "__main__":
    opened = open_policy(ModelConfig(path="embedded:countdown-base"), "cpu")
    TRACES.write_text(
        json.dumps({name: trace(opened, sections) for name, sections in RECIPES.items()}, indent=1) + "\n"
    )
