"""The part of a response that counts: what follows the model's thinking, without markers of the end of a turn."""

from __future__ import annotations

import re

THINK, END_OF_THINKING = "<think>", "</think>"
_MARKER = r"(?:<\|[^<>|\s]{1,40}\|>|<｜[^<>｜\s]{1,40}｜>|<end_of_turn>|<turn\|>|<eos>|<pad>|</s>)"
_TRAILING = re.compile(rf"\s*(?:{_MARKER}\s*)+\Z")
"""``<|im_end|>``, ``<|endoftext|>``, ``<|eot_id|>`` … and others that common tokenizers have."""


def strip_turn_end(response: str) -> str:
    """The response without markers of the end of a turn at its very end, as servers and files of responses hold them.

    Markers elsewhere stay, as does ``</s>`` after an ``<s>``, which closes an HTML tag.
    """
    found = _TRAILING.search(response)
    if found is None or ("</s>" in found[0] and "<s>" in response):
        return response
    return response[: found.start()]


def reply_of(response: str) -> str:
    """The text after the last ``</think>``, without end-of-turn tokens; "" where thinking was never closed."""
    reply = response.rpartition(END_OF_THINKING)[2]
    return "" if THINK in reply else strip_turn_end(reply)


def with_opened_thinking(prompt: str, response: str) -> str:
    """The response with the ``<think>`` in front that a chat template wrote into the prompt."""
    return f"{THINK}{response}" if prompt.rstrip().endswith(THINK) else response
