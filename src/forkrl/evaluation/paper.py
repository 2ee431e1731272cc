"""What arXiv 2506.01939v2 reports in its Table 2: Acc@16 in percent at temperature 1.

It gives no seeds and no intervals, and does not control for the longer answers of the forks.
"""

from __future__ import annotations

from typing import NamedTuple


class PaperPair(NamedTuple):
    """A figure after training on all tokens, and after training on the forks alone."""

    all_tokens: float
    forks: float


TABLE_2: dict[str, dict[str, PaperPair]] = {
    "aime24": {"8B": PaperPair(33.33, 34.58), "14B": PaperPair(45.21, 50.42), "32B": PaperPair(55.83, 63.54)},
    "aime25": {"8B": PaperPair(25.42, 26.25), "14B": PaperPair(38.13, 42.92), "32B": PaperPair(45.63, 56.67)},
    "amc23": {"8B": PaperPair(77.81, 77.19), "14B": PaperPair(89.53, 91.56), "32B": PaperPair(91.88, 94.22)},
    "math500": {"8B": PaperPair(89.24, 89.70), "14B": PaperPair(92.23, 93.59), "32B": PaperPair(94.36, 94.88)},
    "minerva": {"8B": PaperPair(39.77, 40.26), "14B": PaperPair(42.16, 43.20), "32B": PaperPair(45.70, 45.82)},
    "olympiad": {"8B": PaperPair(56.67, 57.43), "14B": PaperPair(61.14, 64.62), "32B": PaperPair(66.16, 69.02)},
}
"""Accuracy by benchmark and size of the Qwen3 base model."""

AVERAGE: dict[str, PaperPair] = {
    "8B": PaperPair(53.71, 54.23), "14B": PaperPair(61.40, 64.39), "32B": PaperPair(66.59, 70.69),
}  # fmt: skip
"""Over the six benchmarks, each weighing the same."""

MEAN_LENGTH: dict[str, PaperPair] = {
    "8B": PaperPair(4022, 5508), "14B": PaperPair(4752, 7628), "32B": PaperPair(5849, 7227),
}  # fmt: skip
"""Tokens of a response, averaged over the six benchmarks."""

LONGER_TRAINING_AIME24 = (63.54, 68.12)
"""32B on AIME'24, trained on forks: as in ``TABLE_2``, and after going on with responses of up to 29,696 tokens."""
