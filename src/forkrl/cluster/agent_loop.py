"""verl's agent loop for complete prompts, without a chat template."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput, register
from verl.utils.profiler import simple_timer

from forkrl.cluster.data import read_prompt
from forkrl.cluster.options import read_options
from forkrl.model.prompt_tokens import prompt_token_ids


@register("forkrl_exact_prompt")
class ExactPromptAgentLoop(AgentLoopBase):  # type: ignore[misc]  # verl ships no types
    """One response to a complete prompt, up to and including EOS or a stop token, or ``rollout.response_length``."""

    def __init__(self, trainer_config: Any, server_manager: Any, tokenizer: Any, **unused: Any) -> None:
        # Skips verl's own __init__, which prepares for further chat turns and fails for tokenizers without chat tokens.
        self.rollout_config = trainer_config.config.actor_rollout_ref.rollout
        self.server_manager = server_manager
        self.tokenizer = tokenizer
        self._options = read_options(trainer_config.config)

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        """Sample one response; raises UserError if the prompt is empty or over ``rollout.prompt_length``."""
        limit, max_tokens = self.rollout_config.response_length, self.rollout_config.prompt_length
        prompt_ids = list(prompt_token_ids(self.tokenizer, read_prompt(row), max_tokens=max_tokens))
        stop_ids = list(self._options.stops(self.tokenizer))
        timing: dict[str, float] = {}
        with simple_timer("generate_sequences", timing):
            answer = await self.server_manager.generate(
                request_id=uuid4().hex,
                prompt_ids=prompt_ids,
                sampling_params=sampling_params | {"stop_token_ids": stop_ids, "max_tokens": limit},
            )
        preempted = -1 if answer.num_preempted is None else answer.num_preempted
        response_ids = list(answer.token_ids[:limit])
        return AgentLoopOutput(
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            response_mask=[1] * len(response_ids),
            response_logprobs=answer.log_probs[:limit] if answer.log_probs else None,
            num_turns=2,
            metrics=AgentLoopMetrics(num_preempted=preempted, **timing),
            # verl's batches need the fields that its own loops write.
            extra_fields=answer.extra_fields | {"turn_scores": [], "tool_rewards": []},
        )
