"""Rollouts of several turns: an environment in its own process, and an engine that answers all its requests at once.

Every rollout is either computing in the environment or waits for the model. Once all wait, one batch of the engine
answers them. So the engine samples large batches, and results do not depend on when a request arrives.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from forkrl.config import TrainConfig
from forkrl.errors import UserError, printable
from forkrl.model.prompt_tokens import prompt_token_ids
from forkrl.parallel.processes import allow_many_files
from forkrl.rollout.dialogue import Dialogue, require_continuable
from forkrl.rollout.embedded import EmbeddedEngine
from forkrl.rollout.endpoint import MODEL, ChatRequest, Endpoint
from forkrl.tasks.environment import EnvironmentProcess
from forkrl.types import FAILURES, Prompt, Rollout, RolloutGroup, SamplingParams, VerifierResult

GRACE_S = 5.0
"""Time in which an environment must end a rollout that is cancelled, before its process is killed."""


class _Ended(NamedTuple):
    """The process has ended; ``process`` distinguishes it from the one that replaced it."""

    process: EnvironmentProcess


class EnvironmentEngine:
    """Samples rollouts of an environment with ``engine``, and has their scores: a RolloutEngine and a Verifier.

    Rollouts whose environment computes while none of them asks the model for ``reward.timeout_s`` (times the number of
    such rollouts over 64, if that is more) are cancelled. If that does not help, the process is killed, and all of its
    rollouts fail. So does one whose conversation cannot be continued exactly. Failures score 0 and are counted.
    """

    def __init__(self, engine: EmbeddedEngine, config: TrainConfig) -> None:
        self.engine = engine
        self.first_failures: dict[str, str] = {}
        self._task, self._limits = config.task, config.rollout
        self._timeout_s = config.reward.timeout_s
        require_continuable(engine.policy.tokenizer, config.task.chat_template_kwargs)
        allow_many_files()
        self._events: queue.SimpleQueue[ChatRequest | dict[str, Any] | _Ended] = queue.SimpleQueue()
        self._endpoint = Endpoint(self._events.put)
        self._process: EnvironmentProcess | None = None
        self._started = 0  # rollouts of all time: late messages of an earlier one are recognised
        engine.workers.closing.callback(self.close)

    def close(self) -> None:
        self._kill()
        self._endpoint.close()

    def check_prompts(self, prompts: Sequence[Prompt], response_tokens: int) -> None:
        self.engine.check_prompts(prompts, response_tokens)

    def verify(self, items: Sequence[tuple[Prompt, str]]) -> list[VerifierResult]:
        raise UserError("an environment scores its own rollouts, and no other responses")

    def submit(self, items: Sequence[tuple[Prompt, str]]) -> Future[list[VerifierResult]]:
        raise UserError("an environment scores its own rollouts, and no other responses")

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        sampling: SamplingParams,
        generator: torch.Generator,
        on_finished: Callable[[Prompt, Rollout], None] | None = None,
    ) -> list[RolloutGroup]:
        """As ``RolloutEngine.generate``; ``max_response_tokens`` bounds all tokens after the first prompt.

        Raises UserError for an environment whose conversations cannot be trained.
        """
        asked = [prompt for prompt in prompts for _ in range(group_size)]
        rollouts: list[Rollout] = []
        try:
            for start in range(0, len(asked), self.engine.wave_sequences):
                wave = asked[start : start + self.engine.wave_sequences]
                for prompt, rollout in zip(wave, self._run(wave, sampling, generator), strict=True):
                    rollouts.append(rollout)
                    if on_finished is not None:
                        on_finished(prompt, rollout)
        except BaseException:
            self._kill()  # it would wait for answers
            raise
        groups = [tuple(rollouts[start : start + group_size]) for start in range(0, len(asked), group_size)]
        return [RolloutGroup(prompt, group) for prompt, group in zip(prompts, groups, strict=True)]

    def _run(self, prompts: Sequence[Prompt], sampling: SamplingParams, generator: torch.Generator) -> list[Rollout]:
        """One rollout of each prompt, in order."""
        process = self._open()
        tokenizer, variables = self.engine.policy.tokenizer, self._task.chat_template_kwargs
        wave = _Wave({self._started + place: Dialogue(tokenizer, variables) for place in range(len(prompts))})
        self._started += len(prompts)
        self._require_same_tasks(process, prompts)
        process.send(
            {"run": [[number, int(each.answer)] for number, each in zip(wave.dialogues, prompts, strict=True)]}
        )
        while self._wait(wave):
            self._answer(wave, sampling, generator)
        for number, prompt in zip(wave.dialogues, prompts, strict=True):
            result, message = wave.results[number]
            if result.failure:
                self.first_failures.setdefault(result.failure, f"prompt {prompt.id}: {message}")
        return [
            dialogue.rollout(wave.results[number][0], prompt_token_ids(tokenizer, prompt))
            for (number, dialogue), prompt in zip(wave.dialogues.items(), prompts, strict=True)
        ]

    def _require_same_tasks(self, process: EnvironmentProcess, prompts: Sequence[Prompt]) -> None:
        """Tasks are asked for by index: it must mean the same in every process."""
        keys = {str(task["index"]): str(task["key"]) for task in process.tasks}
        for prompt in prompts:
            if not keys.get(prompt.answer, "").startswith(prompt.id):
                raise UserError(
                    f"task.environment = {self._task.environment!r} lists other tasks, or in another order, each time "
                    f"it is opened ({prompt.place} has changed); give its taskset a fixed order"
                )

    def _wait(self, wave: _Wave) -> bool:
        """Until every rollout has ended or waits for the model; whether any waits."""
        limit = self._timeout_s * max(1.0, len(wave.computing) / 64)  # one thread runs them all
        cancelled, deadline = False, time.monotonic() + limit
        while computing := wave.computing:
            try:
                event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                if cancelled:
                    self._kill()
                    late = f"the environment computes for {limit:g} s (reward.timeout_s = {self._timeout_s:g})"
                    wave.fail(computing, "timeout", late)
                    wave.fail(wave.waiting, "crash", "its process was killed because of another rollout")
                    break
                assert self._process is not None
                self._process.send({"cancel": sorted(computing)})
                cancelled, deadline = True, time.monotonic() + GRACE_S
                continue
            if isinstance(event, _Ended):
                if event.process is self._process:
                    reason = event.process.child.death()
                    self._kill()
                    wave.fail({*computing, *wave.waiting}, "crash", f"the environment's process {reason}")
            elif wave.take(event) and not cancelled:
                deadline = time.monotonic() + limit
        return bool(wave.waiting)

    def _answer(self, wave: _Wave, sampling: SamplingParams, generator: torch.Generator) -> None:
        """Sample the next turn of every rollout that waits, as one batch."""
        requests, rooms = dict(sorted(wave.waiting.items())), {}
        wave.waiting.clear()
        for number, request in requests.items():
            dialogue = wave.dialogues[number]
            messages, tools = request.body["messages"], request.body.get("tools") or None
            try:
                ids = self._heard(dialogue, messages, tools)
            except UserError as error:  # what a model wrote must not end the run
                request.refuse("cannot_continue", "this conversation cannot be continued")
                wave.fail({number}, "error", str(error))
                continue
            used = len(dialogue) + len(ids) if dialogue.prompt_ids else 0
            room = min(sampling.max_response_tokens - used, self._task.max_turn_tokens or math.inf)
            if room <= 0:
                dialogue.finished = False
                request.refuse("context_length_exceeded", "rollout.max_response_tokens is reached")
                continue
            dialogue.hear(messages, tools, ids)
            rooms[number] = int(room)
        longest = max(rooms.values(), default=0)
        numbers = list(rooms)
        prefixes = [wave.dialogues[number].prefix(rooms[number], longest) for number in numbers]
        stream = self.engine.stream(
            prefixes, count=1, sampling=replace(sampling, max_response_tokens=longest), generator=generator
        )
        for ended in stream if prefixes else ():
            number = numbers[ended.prefix]
            dialogue, turn = wave.dialogues[number], ended.rollout
            message = dialogue.say(turn)
            requests[number].answer(_completion(message, len(turn.prompt_ids), turn))

    def _heard(
        self, dialogue: Dialogue, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> list[int]:
        ids = dialogue.heard(messages, tools)
        if not dialogue.prompt_ids and len(ids) > self._limits.max_prompt_tokens:
            raise UserError(
                f"the environment's first messages have {len(ids)} tokens, over rollout.max_prompt_tokens = "
                f"{self._limits.max_prompt_tokens}; raise the limit"
            )
        return ids

    def _open(self) -> EnvironmentProcess:
        if self._process is not None and self._process.child.process.poll() is not None:
            self._kill()
        if self._process is None:
            process = EnvironmentProcess(self._task, url=self._endpoint.url, key=self._endpoint.key)
            self._process = process
            threading.Thread(target=self._listen, args=(process,), name="environment", daemon=True).start()
        return self._process

    def _listen(self, process: EnvironmentProcess) -> None:
        try:
            while True:
                self._events.put(process.receive())
        except (EOFError, OSError, ValueError):  # ended, closed here, or not JSON
            self._events.put(_Ended(process))

    def _kill(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None


class _Wave:
    """Rollouts that run at the same time, by number. ``results`` are of those that have ended, with a message."""

    def __init__(self, dialogues: dict[int, Dialogue]) -> None:
        self.dialogues = dialogues
        self.waiting: dict[int, ChatRequest] = {}
        self.results: dict[int, tuple[VerifierResult, str]] = {}

    @property
    def computing(self) -> set[int]:
        return self.dialogues.keys() - self.waiting.keys() - self.results.keys()

    def take(self, event: ChatRequest | Mapping[str, Any]) -> bool:
        """Note a request or the end of a rollout; whether it belongs to one that computes."""
        if isinstance(event, ChatRequest):
            session = event.session.partition("-")[0]
            number = int(session) if session.isdecimal() else -1
            if number in self.waiting:
                raise UserError(
                    "the environment asks the model twice at once in a rollout, which cannot be trained yet"
                )
            if number not in self.computing:
                event.refuse("ended", "this rollout has ended", status=410)
                return False
            self.waiting[number] = event
            return True
        done = event.get("done")
        if not isinstance(done, int) or done in self.results or done not in self.dialogues:
            return False
        if request := self.waiting.pop(done, None):  # it ended without waiting for the answer
            request.refuse("ended", "this rollout has ended", status=410)
        self.results[done] = _result(event)
        return True

    def fail(self, numbers: set[int] | Mapping[int, ChatRequest], failure: str, message: str) -> None:
        for number in list(numbers):
            if request := self.waiting.pop(number, None):
                request.refuse("ended", "the environment was killed", status=410)
            self.results[number] = (VerifierResult(0.0, failure), message)


def _result(event: Mapping[str, Any]) -> tuple[VerifierResult, str]:
    """The score that an environment's process sent, checked: it runs other people's code."""
    score, failure = event.get("score"), event.get("failure")
    if failure is not None:
        message = printable(str(event.get("message", "cancelled after reward.timeout_s")))[:500]
        return VerifierResult(0.0, failure if failure in FAILURES else "error"), message
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        return VerifierResult(0.0, "error"), f"its reward is {score!r}, not a number in [0, 1]"
    return VerifierResult(float(score)), ""


def _completion(message: dict[str, Any], num_prompt: int, turn: Rollout) -> dict[str, Any]:
    """An OpenAI chat completion."""
    reason = "tool_calls" if "tool_calls" in message else "stop" if turn.finished else "length"
    num_new = len(turn.response_ids)
    return {
        "id": f"chatcmpl-{time.monotonic_ns()}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": MODEL,
        "choices": [{"index": 0, "finish_reason": reason, "message": message}],
        "usage": {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new},
    }
