"""An environment of several turns without network: guess a number with the help of "higher" and "lower".

    forkrl train recipes/guess-number.toml --out runs/guess

Run that in this folder, or put the folder into PYTHONPATH. It needs pip install 'forkrl[environments]'.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import verifiers.v1 as vf


class NumberData(vf.TaskData):
    """``number`` is what the model has to find; it never sees this."""

    number: int


class NumberTask(vf.Task[NumberData, vf.State]):
    @vf.reward(weight=0.8)
    async def found(self, trace: vf.Trace) -> float:
        """1 if the last guess is the number."""
        replies = replies_of(trace)
        return float(bool(replies) and guess_of(replies[-1]) == self.data.number)

    @vf.reward(weight=0.2)
    async def only_numbers(self, trace: vf.Trace) -> float:
        """The share of replies that are a number and nothing else: a small model has to learn that first."""
        replies = replies_of(trace)
        return sum(reply.strip().isdecimal() for reply in replies) / max(len(replies), 1)


class NumbersConfig(vf.TasksetConfig):
    largest: int = 64
    """The largest number of all tasks."""
    width: int = 8
    """Numbers to choose from in a task."""
    prompt: str = "Guess my number from {low} to {high}. Reply with a number only."


class Numbers(vf.Taskset[NumberTask, NumbersConfig]):
    def load(self) -> Iterator[NumberTask]:
        config = self.config
        for low in range(1, config.largest - config.width + 2):
            prompt = config.prompt.format(low=low, high=low + config.width - 1)
            for number in range(low, low + config.width):
                yield NumberTask(NumberData(prompt=prompt, number=number), config.task)


class GuessConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()
    hints: tuple[str, str, str] = ("Higher.", "Lower.", "Reply with a number only.")
    """What follows a guess that is too low, one that is too high, and a reply without a number."""


class GuessNumber(vf.Env[GuessConfig]):
    """The game ends when the number is found or task.max_turns is reached."""

    async def run(self, task: NumberTask, agents: vf.Agents) -> None:
        too_low, too_high, unclear = self.config.hints
        async with agents.player.interaction(task) as game:
            reply = await game.turn()
            while not reply.terminated:
                guess = guess_of(reply.last_reply)
                if guess == task.data.number:
                    break
                hint = unclear if guess is None else too_low if guess < task.data.number else too_high
                reply = await game.turn(hint)


def replies_of(trace: vf.Trace) -> list[str]:
    return [str(message.content or "") for message in trace.messages if message.role == "assistant"]


def guess_of(reply: str | None) -> int | None:
    """The first number in a reply, if it has one of at most six digits."""
    found = re.search(r"\d+", reply or "")
    return int(found[0]) if found and len(found[0]) <= 6 else None


__all__ = ["GuessNumber", "Numbers"]
