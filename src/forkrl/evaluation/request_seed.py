"""The random seed of one response: the same whenever the same evaluation asks for it, whatever was asked before."""

from __future__ import annotations

import hashlib


def request_seed(seed: int, question: str, sample: int) -> int:
    """A seed for one response of an evaluation, stable across processes, machines and the order of requests.

    Args:
        seed: of the evaluation.
        question: id of the prompt.
        sample: which of the prompt's responses, counted from 0.

    Returns:
        An integer of 31 bits: some servers keep seeds in 32, signed or not, and take -1 for "any".
    """
    # Length-prefixed, so that no two different triples spell the same text.
    digest = hashlib.sha256(f"{seed}/{len(question)}/{question}/{sample}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "little") >> 1
