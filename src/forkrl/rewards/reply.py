"""The scored part of a response: the text after the thinking, without end-of-turn markers."""

from __future__ import annotations

import re

THINK, END_OF_THINKING = "<think>", "</think>"
_MARKER = re.compile(r"(?:<\|[^<>|\s]{1,40}\|>|<｜[^<>｜\s]{1,40}｜>|<end_of_turn>|<turn\|>|<eos>|<pad>|</s>)\Z")
"""``<|im_end|>``, ``<|endoftext|>``, ``<|eot_id|>`` and other common markers."""
_LONGEST_MARKER = 44


def strip_turn_end(response: str) -> str:
    """Remove end-of-turn markers at the end, in linear time; keeps ``</s>`` after ``<s>``, which closes an HTML tag."""
    end = _end_of_text(response, len(response))
    has_html_tag = "<s>" in response
    while marker := _MARKER.search(response[max(0, end - _LONGEST_MARKER) : end]):
        if marker[0] == "</s>" and has_html_tag:
            return response
        end = _end_of_text(response, end - len(marker[0]))
    return response if end == _end_of_text(response, len(response)) else response[:end]


def _end_of_text(response: str, end: int) -> int:
    """Where the first ``end`` characters end without trailing whitespace."""
    while end and response[end - 1].isspace():
        end -= 1
    return end


def reply_of(response: str) -> str:
    """The text after the last ``</think>``, without end-of-turn markers; "" if thinking was never closed."""
    reply = response.rpartition(END_OF_THINKING)[2]
    return "" if THINK in reply else strip_turn_end(reply)


def with_opened_thinking(prompt: str, response: str) -> str:
    """The response, with the ``<think>`` that a chat template put at the end of the prompt."""
    return f"{THINK}{response}" if prompt.rstrip().endswith(THINK) else response
