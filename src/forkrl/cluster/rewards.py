"""Rewards by ForkRL's verifiers, instead of verl's reward manager.

``reward.reward_manager.source=importlib reward.reward_manager.module.path=pkg://forkrl.cluster.rewards
reward.reward_manager.name=ForkRewardManager forkrl.verifiers=verifiers.json``
"""

from __future__ import annotations

import asyncio
import atexit
from pathlib import Path
from typing import Any

import torch
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from forkrl.cluster.data import read_prompt, read_verifiers
from forkrl.cluster.options import read_options
from forkrl.errors import UserError
from forkrl.method.advantages import overlong_penalty
from forkrl.model.stop_tokens import response_text
from forkrl.rewards import open_verifier


class ForkRewardManager(RewardManagerBase):  # type: ignore[misc]  # verl ships no types
    """Scores responses in a pool of killable processes (``forkrl.rewards``), one pool per reward worker.

    The reward is the score plus DAPO's overlong penalty. A verifier killed at its timeout scores 0, with ``failure``.
    """

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any = None, **unused: Any) -> None:
        super().__init__(config, tokenizer, compute_score)
        options = read_options(config)
        if options.verifiers is None:
            raise UserError("+forkrl.verifiers is not set; give ForkRewardManager the file that names the verifiers")
        self._judging = read_verifiers(Path(options.verifiers))
        self._stop_ids = options.stops(tokenizer)
        self._pool = open_verifier(self._judging.verifiers, self._judging.reward)
        atexit.register(self._pool.close)

    async def run_single(self, data: Any) -> dict[str, Any]:
        """Score and reward of one response, the last output of a conversation."""
        item = data[len(data) - 1]
        responses_T = item.batch["responses"]
        length = int(item.batch["attention_mask"][-len(responses_T) :].sum())
        ids = responses_T[:length].tolist()
        finished = bool(ids) and ids[-1] in self._stop_ids
        text = response_text(self.tokenizer, ids, finished=finished)
        [result] = await asyncio.wrap_future(self._pool.submit([(read_prompt(item.non_tensor_batch), text)]))
        longest, cache = self._judging.max_response_tokens, self._judging.reward.overlong_cache
        penalty, score = float(overlong_penalty(torch.tensor(length), longest, cache)), result.score
        extra = {"acc": score, "score": score, "failure": result.failure, "finished": finished}
        return {"reward_score": score + penalty, "reward_extra_info": extra}
