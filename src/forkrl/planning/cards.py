"""Memory and rates of GPUs.

Rates are dense bf16 operations (no sparsity, fp32 sums) and bytes of memory a second, from the vendor's data sheet.
Memory is what a process can have of the card as drivers report it, a little below the number on the box; the rest is
the driver's and error correction's. Both were written down without the data sheets at hand: check a card before money
depends on it, and give its own numbers with ``--gpu-memory``, ``--gpu-tflops`` and ``--gpu-bandwidth``.
"""

from __future__ import annotations

import difflib
import math
from typing import NamedTuple

from forkrl.errors import UserError

GIB = 2**30


class Card(NamedTuple):
    """One GPU."""

    name: str
    memory: float
    """Bytes."""
    flops: float
    """Dense bf16 operations a second."""
    bandwidth: float
    """Bytes of memory a second; 0: not known."""
    source: str


def _card(name: str, gib: float, tflops: float, tb_per_s: float, source: str) -> Card:
    return Card(name, gib * GIB, tflops * 1e12, tb_per_s * 1e12, source)


CARDS = {
    "h100": _card("H100 SXM 80 GB", 79, 989, 3.35, "NVIDIA H100 Tensor Core GPU data sheet"),
    "h100-pcie": _card("H100 PCIe 80 GB", 79, 756, 2.0, "NVIDIA H100 PCIe GPU product brief"),
    "h200": _card("H200 SXM 141 GB", 139, 989, 4.8, "NVIDIA H200 Tensor Core GPU data sheet"),
    "b200": _card("B200 SXM 180 GB", 178, 2250, 7.7, "NVIDIA HGX B200 data sheet"),
    "a100-80": _card("A100 SXM 80 GB", 79, 312, 2.039, "NVIDIA A100 Tensor Core GPU data sheet"),
    "a100-40": _card("A100 SXM 40 GB", 39, 312, 1.555, "NVIDIA A100 Tensor Core GPU data sheet"),
    "l40s": _card("L40S 48 GB", 44, 362, 0.864, "NVIDIA L40S data sheet"),
    "rtx4090": _card("GeForce RTX 4090 24 GB", 23.5, 165, 1.008, "NVIDIA Ada GPU architecture white paper"),
    "mi300x": _card("Instinct MI300X 192 GB", 191, 1307, 5.3, "AMD Instinct MI300X data sheet"),
}
DEFAULT_CARD = "h100"


def find_card(
    name: str | None, memory_gib: float | None, tflops: float | None, bandwidth_tb: float | None
) -> tuple[Card, bool]:
    """A card by name, by its own numbers, or a named one with some of them replaced; and whether it was assumed.

    Raises:
        UserError: no card of that name, or a number that is not above 0.
    """
    given = {"--gpu-memory": memory_gib, "--gpu-tflops": tflops, "--gpu-bandwidth": bandwidth_tb}
    for option, number in given.items():
        if number is not None and not (number > 0 and math.isfinite(number)):
            raise UserError(f"{option} {number}: must be above 0")
    if name is None and any(number is not None for number in given.values()):
        if memory_gib is None or tflops is None:
            raise UserError("--gpu-memory and --gpu-tflops describe a card together; give both, or name it with --gpu")
        own = _card("your card", memory_gib, tflops, bandwidth_tb or 0.0, "numbers given on the command line")
        return own, False
    key = name or DEFAULT_CARD
    if key.lower() not in CARDS:
        near = difflib.get_close_matches(key.lower(), CARDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--gpu {key}: not one of {', '.join(CARDS)}{hint} Others: --gpu-memory and --gpu-tflops")
    card = CARDS[key.lower()]
    changed = [option for option, number in given.items() if number is not None]
    if changed:
        card = card._replace(
            memory=card.memory if memory_gib is None else memory_gib * GIB,
            flops=card.flops if tflops is None else tflops * 1e12,
            bandwidth=card.bandwidth if bandwidth_tb is None else bandwidth_tb * 1e12,
            source=f"{card.source}, with {', '.join(changed)} of your own",
        )
    return card, name is None
