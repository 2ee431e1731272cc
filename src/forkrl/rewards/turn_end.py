"""Markers of the end of a turn, which are not part of an answer."""

from __future__ import annotations

import re

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
