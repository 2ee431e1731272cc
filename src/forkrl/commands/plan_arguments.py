"""The arguments of ``forkrl plan``. Imports nothing of weight, like ``arguments``."""

from __future__ import annotations

import argparse

PLAN_HELP = """\
examples:
  forkrl plan recipes/verl/qwen3-8b.toml                    the recipe as it is, on H100s
  forkrl plan recipes/verl/qwen3-32b.toml cluster.nodes=2 --gpu h200 --mean-response 7000
  forkrl plan recipes/small-gpu.toml --gpu rtx4090          one GPU, ForkRL's own loop
  forkrl plan recipes/verl/qwen3-8b.toml --gpu-memory 94 --gpu-tflops 835 --gpu-bandwidth 3.9 --json

Estimates from the shapes of the model: memory of each GPU in every phase of a step, whether it fits and which settings
make it fit, operations and hours. Nothing is run and no weights are read. Formulas and their limits: docs/plan.md.
"""


def add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``forkrl plan`` and its arguments."""
    plan = commands.add_parser(
        "plan",
        help="what a run needs: memory of each GPU, operations, hours",
        epilog=PLAN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument("recipe", help="a TOML file; see recipes/")
    plan.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    plan.add_argument("--gpu", metavar="NAME", help="h100 (default), h200, a100-80, l40s, rtx4090, …")
    plan.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="memory of your GPU, or instead of the named one's"
    )
    plan.add_argument("--gpu-tflops", type=float, metavar="T", help="dense bf16 rate, in 10^12 operations per second")
    plan.add_argument("--gpu-bandwidth", type=float, metavar="TB", help="memory bandwidth, in 10^12 bytes per second")
    plan.add_argument(
        "--mean-response", type=float, metavar="N", help="mean tokens of a response (default: half the limit)"
    )
    plan.add_argument("--mean-prompt", type=float, metavar="N", help="mean tokens of a prompt (default: 256)")
    plan.add_argument(
        "--oversampling", type=float, metavar="X",
        help="responses sampled per response that is trained on (default: 1; local engine: one generation batch)",
    )  # fmt: skip
    plan.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        metavar="X",
        help="share of the GPU's rate that training reaches (default: 0.4)",
    )
    plan.add_argument(
        "--rollout-efficiency", type=float, default=0.5, metavar="X",
        help="share of what memory or arithmetic allows that decoding reaches (default: 0.5)",
    )  # fmt: skip
    plan.add_argument(
        "--rollout-tokens-per-s", type=float, metavar="N", help="measured rate of one GPU, instead of the estimate"
    )
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.set_defaults(command="plan", activity="the plan")
