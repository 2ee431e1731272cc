"""Every command's arguments, and the help that teaches them. Imports nothing of weight: ``--help`` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from forkrl.commands.plan_arguments import add_plan

TRAIN_HELP = """\
examples:
  forkrl train                                              the demo: the embedded model, minutes on a laptop
  forkrl train recipes/countdown.toml --out runs/first      the same, by its recipe
  forkrl train recipes/countdown.toml selection.rule=all    plain DAPO: one override
  forkrl train recipes/qwen3-8b.toml --dry-run              what would run, in full
  forkrl train --resume runs/first                          continue after Ctrl-C, a kill, a full disk
  forkrl train --resume runs/first training.steps=60        train a finished run further
  forkrl train recipes/verl/qwen3-8b.toml --engine verl     the same method on a cluster (--dry-run: verl's command)

Every setting is section.key=value; --settings lists them all. Ctrl-C saves and ends; --resume goes on to the
very same weights.
"""

DECODE_TEMPS_HELP = """\
What do forks want: a high or a low temperature? One temperature applies where the model is undecided (the entropy
of its unscaled distribution is above the threshold), another everywhere else. First one is swept while the other
stays at 1, then the reverse: for the paper's eight temperatures 15 settings, all on the same problems with the same
seed. You get accuracy with 95% intervals, length, and the share of broken outputs, as a table and a page.

examples:
  forkrl decode-temps embedded:countdown-base --recipe recipes/countdown.toml --problems 128 --samples 4
  forkrl decode-temps runs/first --temperatures 0,0.5,1,2               the newest checkpoint of a run
  forkrl decode-temps Qwen/Qwen3-0.6B --data prompts.jsonl --threshold 0.672

Ctrl-C keeps the settings that are finished; the same command goes on from there.
"""

EVAL_HELP = """\
examples:
  forkrl eval --list                                        the benchmarks
  forkrl eval Qwen/Qwen3-8B-Base --bench aime24 math500     as in the paper: 16 responses a question, temperature 1
  forkrl eval runs/first --bench aime24 --mirror mirrors    a run's newest checkpoint, data sets from local copies
  forkrl eval Qwen/Qwen3-8B --bench gsm8k --prompt chat --server http://localhost:8000/v1
  forkrl eval runs/first --samples 16                       without --bench: the run's own held-out problems
  forkrl eval runs/first@step-8                             the same, at a step that was kept; or runs/first@base
  forkrl eval my-model --recipe recipes/countdown.toml      ... or those of a recipe

Writes into --out (default: inside the run, or evals/NAME): responses/, verdicts/ and questions/ (JSON
lines), results.json and report.html. Ctrl-C keeps every response that is finished; the same command goes on.
"""

ANALYZE_HELP = """\
examples:
  forkrl analyze embedded:countdown-base --recipe recipes/countdown.toml --samples 4
  forkrl analyze runs/first                                 a run: its newest checkpoint on its held-out problems
  forkrl analyze Qwen/Qwen3-0.6B --data prompts.jsonl rollout.max_response_tokens=4096
  forkrl analyze my-model --responses rollouts.jsonl        responses that you have: {"prompt": …, "response": …}

Writes into --out (default: inside the run, or analyses/NAME-analyze): tokens/ (Parquet, a row for every token: text,
entropy, log-prob, rank, five alternatives), responses/, tables/*.csv, analysis.json and report.html. Ctrl-C keeps what
is finished; the same command goes on.
"""

BRANCH_HELP = """\
examples:
  forkrl branch embedded:countdown-base --recipe recipes/countdown.toml     minutes on a laptop
  forkrl branch runs/first --problems 128                                   the run's newest checkpoint
  forkrl branch Qwen/Qwen3-1.7B --data math.jsonl task.chat_template=true --problems 20 --continuations 8

At a few positions of a response (forks, and controls) each of the likeliest tokens is forced, continued many times and
judged: the causal test of whether the outcome is decided there. Two spreads of the success rates, both corrected for
the noise of sampling: "natural" weighs the branches by the model's own probabilities, and is the part of the outcome's
variance that this one choice decides; "forced" weighs them alike, and is large also where a slip of the pen that the
model never makes would derail it. The cost, problems x positions x alternatives x continuations, is said beforehand.

Ctrl-C keeps what is finished; the same command goes on.
"""

DRIFT_HELP = """\
examples:
  forkrl train recipes/countdown.toml checkpoint.every=2 checkpoint.keep=100 --out runs/kept
  forkrl drift runs/kept --samples 4                        the starting model and every checkpoint that was kept
  forkrl drift base-model sft-model rl-model --data prompts.jsonl

Every checkpoint reads the final one's responses. Writes into --out (default: inside the run, or analyses/NAME-drift):
the tokens, tables/*.csv (overlap, change by percentile, percentiles), drift.json and report.html. Ctrl-C keeps what is
finished; the same command goes on.
"""

COMPARE_HELP = """\
examples:
  forkrl compare evals/base evals/trained
  forkrl compare evals/all-tokens evals/forks --out analyses/forks

B minus A, paired by question: accuracy with a 95% interval and a p-value, length, pass@k, maj@k, and accuracy at equal
tokens, since longer responses alone can raise it. What forkrl eval --out wrote is all that is read. Writes
comparison.json and report.html.
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a command; overrides may stand anywhere, before, between and after its options."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if unknown := [word for word in rest if word.startswith("-") or not hasattr(arguments, "overrides")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:  # argparse takes positional arguments from one place only
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """Every command with its arguments."""
    parser = argparse.ArgumentParser(
        prog="forkrl", description="Reinforcement learning of language models on their forking tokens."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    train = commands.add_parser(
        "train", help="train on forks", epilog=TRAIN_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    train.add_argument("recipe", nargs="?", help="a TOML file; see recipes/ (default: the demo)")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    train.add_argument("--out", type=Path, metavar="DIR", help="folder of the new run (default: runs/NAME)")
    train.add_argument("--resume", type=Path, metavar="DIR", help="continue the run in DIR")
    train.add_argument(
        "--engine",
        choices=["local", "verl"],
        help="local (default): in this process; verl: the same recipe on a Ray cluster (docs/cluster.md)",
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved recipe and stop; with --engine verl, the complete command for verl",
    )
    train.add_argument("--settings", action="store_true", help="print every setting with its default, and stop")
    train.set_defaults(command="train", activity="training")

    sft = commands.add_parser(
        "sft",
        help="make a base model from generated traces",
        epilog="forkrl train --settings lists the settings of this command too.",
    )
    sft.add_argument("recipe", help="a TOML file, such as recipes/countdown-base.toml")
    sft.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    sft.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the model")
    sft.set_defaults(command="sft", activity="training the base model")

    add_eval(commands)
    add_compare(commands)
    add_analyze(commands)
    add_branch(commands)
    add_drift(commands)
    add_decode_temps(commands)

    add_plan(commands)

    report = commands.add_parser("report", help="write report.html of a run, finished or not")
    report.add_argument("run", type=Path, help="a run folder")
    report.set_defaults(command="report", activity="the report")

    doctor = commands.add_parser("doctor", help="what this machine can do")
    doctor.set_defaults(command="doctor", activity="the examination")
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model that a command looks at, and settings."""
    parser.add_argument(
        "model", help="a model folder, hub id, embedded:countdown-base, or a run: RUN, RUN@step-N or RUN@base"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings, as in rollout.max_response_tokens=4096"
    )


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Where prompts come from; ``subject_overrides`` reads them."""
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="take task and rollout settings from this recipe")
    parser.add_argument("--task", metavar="NAME", help="task.name: countdown, dataset with --data, or reasoning-gym")
    parser.add_argument("--data", metavar="FILE", help="prompts: .jsonl, .parquet or a hub data set (task.data)")


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command takes that samples so many responses to prompts."""
    add_task_arguments(parser)
    parser.add_argument("--problems", type=int, metavar="N", help="prompts, from the first")
    parser.add_argument("--samples", type=int, metavar="K", help="responses to each (default: eval.samples)")


def add_response_arguments(parser: argparse.ArgumentParser) -> None:
    """What commands take besides that also read ready responses, and measure their tokens."""
    add_prompt_arguments(parser)
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="of sampling, and at which entropies are measured; 0 samples greedily (default: eval.temperature)",
    )
    parser.add_argument(
        "--responses", type=Path, metavar="FILE", help="ready responses (JSON lines); then nothing is generated"
    )
    parser.add_argument(
        "--skip-unusable", action="store_true", help="leave out rows of --responses that cannot be used"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")


def subject_overrides(arguments: argparse.Namespace) -> list[str]:
    """The overrides, with those that --task and --data stand for."""
    named = list(arguments.overrides)
    if arguments.data is not None:
        named += [f"task.name={arguments.task or 'dataset'}", f"task.data={arguments.data}"]
    elif arguments.task is not None:
        named.append(f"task.name={arguments.task}")
    return named


def add_eval(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``forkrl eval`` and its arguments."""
    evaluate = commands.add_parser(
        "eval",
        help="accuracy of a model or run on benchmarks or held-out prompts, with intervals",
        epilog=EVAL_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument(
        "model",
        nargs="?",
        help="a model folder, hub id, embedded:countdown-base, a server's model, or a run: RUN, RUN@step-N or RUN@base",
    )
    evaluate.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings, as in task.name=dataset task.data=prompts.jsonl",
    )
    evaluate.add_argument(
        "--bench", nargs="+", action="extend", default=[], metavar="NAME", help="benchmarks; --list shows them"
    )
    evaluate.add_argument("--list", action="store_true", help="list the benchmarks and stop")
    evaluate.add_argument("--mirror", type=Path, metavar="DIR", help="local copies of the benchmarks: DIR/owner/name")
    evaluate.add_argument("--recipe", type=Path, metavar="FILE", help="take task and rollout settings from this recipe")
    evaluate.add_argument("--engine", choices=("embedded", "vllm"), default="embedded", help="what samples")
    evaluate.add_argument("--server", metavar="URL", help="an OpenAI-compatible server samples, as http://host:8000/v1")
    evaluate.add_argument(
        "--concurrency", type=int, metavar="N", help="requests that a server is given at once (default: 32)"
    )
    evaluate.add_argument(
        "--prompt", choices=("plain", "chat"), help="of benchmarks: the paper's for base models, or the chat template"
    )
    evaluate.add_argument(
        "--problems",
        type=int,
        metavar="N",
        help="questions of each, from the first (default: all; of a task: eval.problems)",
    )
    evaluate.add_argument(
        "--samples", type=int, metavar="K", help="responses to each (default: 16; of a task: eval.samples)"
    )
    evaluate.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: eval.temperature)")
    evaluate.add_argument("--max-tokens", type=int, metavar="N", help="of a response (rollout.max_response_tokens)")
    evaluate.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    evaluate.set_defaults(command="eval", activity="the evaluation")


def add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``forkrl compare`` and its arguments."""
    compare = commands.add_parser(
        "compare",
        help="how much better one evaluation is than another, with an interval and a p-value",
        epilog=COMPARE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument("a", type=Path, metavar="EVAL_A", help="a folder that forkrl eval --out wrote: before")
    compare.add_argument("b", type=Path, metavar="EVAL_B", help="another one, on the same benchmarks: after")
    compare.add_argument("--out", type=Path, metavar="DIR", help="folder of the results (default: analyses/A-vs-B)")
    compare.add_argument("--seed", type=int, default=0, help="of resampling (default: 0)")
    compare.set_defaults(command="compare", activity="the comparison")


def add_analyze(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``forkrl analyze`` and its arguments."""
    analyze = commands.add_parser(
        "analyze",
        help="where a model forks: the entropy of every token, and its patterns",
        epilog=ANALYZE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(analyze)
    add_response_arguments(analyze)
    analyze.add_argument(
        "--threshold",
        type=float,
        metavar="NATS",
        help="entropy above which a token is a fork (default: 80th percentile)",
    )
    analyze.add_argument(
        "--min-count", type=int, default=100, metavar="N", help="leave token types seen less often out (default: 100)"
    )
    analyze.set_defaults(command="analyze", activity="the analysis")


def add_branch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``forkrl branch`` and its arguments."""
    branch = commands.add_parser(
        "branch",
        help="what a fork is worth: force each alternative, continue, compare the outcomes",
        epilog=BRANCH_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(branch)
    add_task_arguments(branch)
    counts = {
        "--problems": (64, "prompts, from the first; more of them in the same folder only add to it"),
        "--responses-per-problem": (1, "responses to each"),
        "--forks": (4, "positions of highest entropy, in each response"),
        "--random": (2, "positions drawn from all the others: the control"),
        "--low": (2, "positions drawn from the half of lowest entropy"),
        "--alternatives": (3, "likeliest tokens tried at each position; the one taken is tried too"),
        "--continuations": (16, "sampled of each branch"),
    }
    for name, (default, text) in counts.items():
        branch.add_argument(name, type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    branch.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="of all sampling, probabilities and entropies (default: eval.temperature)",
    )
    branch.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the results (default: RUN/analysis/branch, or analyses/NAME-branch)",
    )
    branch.set_defaults(command="branch", activity="branching")


def add_drift(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``forkrl drift`` and its arguments."""
    drift = commands.add_parser(
        "drift",
        help="how training moved entropy, from checkpoint to checkpoint",
        epilog=DRIFT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    drift.add_argument(
        "overrides", nargs="+", metavar="RUN|MODEL",
        help="a run folder, or the models of a series, first to last; and section.key=value settings",
    )  # fmt: skip
    add_response_arguments(drift)
    drift.add_argument(
        "--ratio", type=float, default=0.2, metavar="R", help="the top share whose overlap is measured (default: 0.2)"
    )
    drift.add_argument(
        "--bins", type=int, default=20, metavar="N", help="percentile ranges of the change (default: 20)"
    )
    drift.set_defaults(command="drift", activity="the drift")


def add_decode_temps(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``forkrl decode-temps`` and its arguments."""
    temps = commands.add_parser(
        "decode-temps",
        help="accuracy against temperature, at forks and elsewhere",
        epilog=DECODE_TEMPS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(temps)
    add_prompt_arguments(temps)
    temps.add_argument(
        "--threshold",
        type=float,
        metavar="NATS",
        help="entropy above which a token is a fork (default: the 80th percentile at --temperature, measured first)",
    )
    temps.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="where nothing is swept, and of the baseline (default: eval.temperature)",
    )
    temps.add_argument(
        "--temperatures", metavar="T,T,...", help="from 0 (greedy) up (default: the paper's 0,.05,.3,.6,1,2,3,5)"
    )
    temps.add_argument(
        "--out", type=Path, metavar="DIR", help="folder (default: analyses/NAME-decode-temps, or inside the run)"
    )
    temps.set_defaults(command="decode_temps", activity="the sweep")
