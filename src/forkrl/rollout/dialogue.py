"""A conversation of several turns as the exact tokens that the model read and wrote."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from forkrl.errors import UserError, first_line
from forkrl.rollout.embedded import Prefix
from forkrl.types import Rollout, VerifierResult

_BEGIN, _END = "<tool_call>", "</tool_call>"
"""How Qwen, SmolLM and Hermes models write calls of tools."""


def require_continuable(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> None:
    """Raise UserError for a chat template that changes the model's first turn once the user replies."""
    dialogue = Dialogue(tokenizer, template_kwargs)
    first, turn, reply = ({"role": role, "content": "1"} for role in ("user", "assistant", "user"))
    dialogue.require_same_start([first, turn], [reply])


class Dialogue:
    """One rollout. Tokens once read or written never change: each request of the environment adds to them.

    ``template_kwargs`` are variables of the chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> None:
        self.prompt_ids: tuple[int, ...] = ()
        self.ids: list[int] = []
        self.finished = True
        self._tokenizer = tokenizer
        self._template_kwargs = template_kwargs
        self._written: list[bool] = []
        self._turns: list[Rollout] = []
        self._messages: list[dict[str, Any]] = []
        self._tools: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        """Tokens after the first prompt."""
        return len(self.ids)

    def heard(self, messages: Sequence[Mapping[str, Any]], tools: list[dict[str, Any]] | None) -> list[int]:
        """The tokens that a request adds, read before the next turn; nothing is remembered before ``hear``.

        Raises UserError for a request that does not continue the conversation, and for a chat template that cannot be
        continued.
        """
        asked = [_plain(message) for message in messages]
        if not self._turns:
            text = self._render(asked, tools, prompt=True)
            if tools and text == self._render(asked, None, prompt=True):
                raise UserError("the tokenizer's chat template does not show tools, which the environment offers")
            return self._encode(text)
        known, new = self._messages, asked[len(self._messages) :]
        if tools != self._tools or not new or not _same(asked[: len(known)], known):
            raise UserError(
                "the environment's request does not continue the conversation: it changes earlier messages or tools, "
                "which cannot be trained yet"
            )
        if any(message["role"] == "assistant" for message in new):
            raise UserError("the environment adds an assistant message that the model did not write")
        return self._encode(self._added_text(new))

    def hear(self, messages: Sequence[Mapping[str, Any]], tools: list[dict[str, Any]] | None, ids: list[int]) -> None:
        """Append ``ids``, which :meth:`heard` returned for the request."""
        if self._turns:
            self.ids += ids
            self._written += [False] * len(ids)
        else:
            self.prompt_ids = tuple(ids)
        self._messages, self._tools = [_plain(message) for message in messages], tools

    def prefix(self, room: int, longest: int) -> Prefix:
        """All tokens so far, split so that an engine with the limit ``longest`` adds at most ``room`` more."""
        ids = (*self.prompt_ids, *self.ids)
        start = len(ids) - (longest - room)
        return Prefix(ids[:start], ids[start:])

    def say(self, turn: Rollout) -> dict[str, Any]:
        """Append the model's turn; returns it as an OpenAI message, with tool calls."""
        self._turns.append(turn)
        self.ids += turn.response_ids
        self._written += [True] * len(turn.response_ids)
        self.finished = turn.finished
        self._messages.append({"role": "assistant", "content": turn.text})
        calls = _tool_calls(turn.text, len(self._turns)) if self._tools else []
        return {"role": "assistant", "content": turn.text} | ({"tool_calls": calls} if calls else {})

    def rollout(self, result: VerifierResult, otherwise: tuple[int, ...]) -> Rollout:
        """The whole conversation; ``otherwise``: the prompt's tokens if the model was not asked."""
        none = [torch.zeros(0)]
        return Rollout(
            self.prompt_ids or otherwise,
            tuple(self.ids),
            logprobs=torch.cat([turn.logprobs for turn in self._turns] or none),
            entropy=torch.cat([turn.entropy for turn in self._turns] or none),
            text=str(self._tokenizer.decode(self.ids, skip_special_tokens=False)),
            finished=self.finished and bool(self._turns),
            written=tuple(self._written),
            result=result,
        )

    def require_same_start(self, messages: list[dict[str, Any]], new: list[dict[str, Any]]) -> None:
        """Raise UserError if the template changes ``messages`` once ``new`` ones follow."""
        before, after = (self._render(messages + more, self._tools, prompt=bool(more)) for more in ([], new))
        if not after.startswith(before):
            raise UserError(
                "the tokenizer's chat template changes earlier turns once a message follows (it may drop or add "
                "thoughts), so that the model would read other tokens than it wrote; take another model or template"
            )

    def _added_text(self, new: list[dict[str, Any]]) -> str:
        """What the template writes after the model's last token, up to its next turn."""
        self.require_same_start(self._messages, new)
        # The template ends the last turn after its text, wherever that text ends: a marker finds the place.
        marker = uuid.uuid4().hex
        marked = [*self._messages[:-1], {"role": "assistant", "content": marker}, *new]
        _, found, end = self._render(marked, self._tools, prompt=True).partition(marker)
        if not found:
            raise UserError("the tokenizer's chat template leaves out the model's turns")
        last = list(self._turns[-1].response_ids[-1:])
        return end.removeprefix(str(self._tokenizer.decode(last, skip_special_tokens=False))) if self.finished else end

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, *, prompt: bool) -> str:
        offered: list[Any] | None = tools
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=offered, tokenize=False, add_generation_prompt=prompt, **self._template_kwargs
            )
        except TemplateError as error:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise UserError(
                f"the tokenizer's chat template fails for messages of {roles}: {first_line(error)}"
            ) from error
        return str(text)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with text as its content; raises UserError for images."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        if any(part.get("type") != "text" for part in content):
            raise UserError("the environment sends images or other content than text, which cannot be sampled from yet")
        content = "".join(part["text"] for part in content)
    others = {name: message[name] for name in ("name", "tool_call_id") if message.get(name)}
    return {"role": message["role"], "content": content, **others}


def _same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> bool:
    return [(each["role"], each["content"]) for each in first] == [(each["role"], each["content"]) for each in second]


def _between(text: str) -> Iterator[str]:
    """The text of each call; linear in time, whatever a model repeats."""
    start = text.find(_BEGIN)
    while start >= 0 and (end := text.find(_END, start)) >= 0:
        yield text[start + len(_BEGIN) : end].strip()
        start = text.find(_BEGIN, end)


def _tool_calls(text: str, turn: int) -> list[dict[str, Any]]:
    """The calls in a turn; what is not a JSON object with a name is none."""
    calls = []
    for number, written in enumerate(_between(text)):
        try:
            call = json.loads(written)
            given = call.get("arguments", {})
            # Some models write the arguments as a string that holds them.
            name, arguments = str(call["name"]), given if isinstance(given, str) else json.dumps(given)
            json.loads(arguments)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        function = {"name": name, "arguments": arguments}
        calls.append({"id": f"call-{turn}-{number}", "type": "function", "function": function})
    return calls
