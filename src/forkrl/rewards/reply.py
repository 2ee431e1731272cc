"""The part of a response that counts: what follows the model's thinking, without markers of the end of a turn."""

from __future__ import annotations

import re

THINK, END_OF_THINKING = "<think>", "</think>"
_MARKER = re.compile(r"(?:<\|[^<>|\s]{1,40}\|>|<｜[^<>｜\s]{1,40}｜>|<end_of_turn>|<turn\|>|<eos>|<pad>|</s>)\Z")
"""``<|im_end|>``, ``<|endoftext|>``, ``<|eot_id|>`` … and others that common tokenizers have."""
_LONGEST_MARKER = 44


def strip_turn_end(response: str) -> str:
    """The response without markers of the end of a turn at its very end, as servers and files of responses hold them.

    Markers elsewhere stay, as does ``</s>`` after an ``<s>``, which closes an HTML tag. Takes linear time.
    """
    end = _end_of_text(response, len(response))
    has_html_tag = "<s>" in response
    while marker := _MARKER.search(response[max(0, end - _LONGEST_MARKER) : end]):
        if marker[0] == "</s>" and has_html_tag:
            return response
        end = _end_of_text(response, end - len(marker[0]))
    return response if end == _end_of_text(response, len(response)) else response[:end]


def _end_of_text(response: str, end: int) -> int:
    """The end of the first ``end`` characters without trailing whitespace."""
    while end and response[end - 1].isspace():
        end -= 1
    return end


def reply_of(response: str) -> str:
    """The text after the last ``</think>``, without end-of-turn tokens; "" where thinking was never closed."""
    reply = response.rpartition(END_OF_THINKING)[2]
    return "" if THINK in reply else strip_turn_end(reply)


def with_opened_thinking(prompt: str, response: str) -> str:
    """The response with the ``<think>`` in front that a chat template wrote into the prompt."""
    return f"{THINK}{response}" if prompt.rstrip().endswith(THINK) else response
