"""The part of a response that counts: what follows the model's thinking."""

from __future__ import annotations

import re

THINK, END_OF_THINKING = "<think>", "</think>"
_END_MARKER = re.compile(r"(?:<\|(?:im_end|endoftext|eot_id|end_of_text|end)\|>|</s>|<eos>|<end_of_turn>)\Z")
_LONGEST_MARKER = 20


def reply_of(response: str) -> str:
    """The text after the last ``</think>``, without end-of-turn tokens; "" where thinking was never closed."""
    reply = response.rpartition(END_OF_THINKING)[2]
    if THINK in reply:
        return ""
    while marker := _END_MARKER.search(reply.rstrip()[-_LONGEST_MARKER:]):
        reply = reply.rstrip().removesuffix(marker[0])
    return reply


def with_opened_thinking(prompt: str, response: str) -> str:
    """The response with the ``<think>`` in front that a chat template wrote into the prompt."""
    return f"{THINK}{response}" if prompt.rstrip().endswith(THINK) else response
