"""Table 2 of arXiv 2506.01939v2: Acc@16 in percent at temperature 1, after training on all tokens and on forks only.

The paper gives no seeds or intervals, and does not control for the longer responses after training on forks.
"""

from __future__ import annotations

TABLE_2 = {
    "aime24": {"8B": (33.33, 34.58), "14B": (45.21, 50.42), "32B": (55.83, 63.54)},
    "aime25": {"8B": (25.42, 26.25), "14B": (38.13, 42.92), "32B": (45.63, 56.67)},
    "amc23": {"8B": (77.81, 77.19), "14B": (89.53, 91.56), "32B": (91.88, 94.22)},
    "math500": {"8B": (89.24, 89.70), "14B": (92.23, 93.59), "32B": (94.36, 94.88)},
    "minerva": {"8B": (39.77, 40.26), "14B": (42.16, 43.20), "32B": (45.70, 45.82)},
    "olympiad": {"8B": (56.67, 57.43), "14B": (61.14, 64.62), "32B": (66.16, 69.02)},
}
"""By benchmark and size of the Qwen3 base model."""
AVERAGE = {"8B": (53.71, 54.23), "14B": (61.40, 64.39), "32B": (66.59, 70.69)}
"""Unweighted mean over the six benchmarks."""
