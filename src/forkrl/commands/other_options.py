"""The options of commands that neither train nor measure, declared as in ``options``. Imports nothing heavy."""

from dataclasses import dataclass, field
from pathlib import Path

from forkrl.commands.options import MODEL, SAMPLING, Options, argument, option


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Options):
    """Write report.html of a run, finished or not, or of the output folder of any other command.

    examples:
      forkrl report runs/first
      forkrl report runs/first --watch                          again every 20 seconds, until the run has ended
      forkrl report analyses/drift --figures                    plots and a coloured response as SVG too, for a paper
    """

    folder: Path = field(kw_only=False, metadata=argument("a run folder, or the folder given to --out", "DIR"))
    watch: bool = option(False, "refresh the report of a run while it trains")
    figures: bool = option(False, "also write the plots and a coloured response as SVG files into DIR/figures")


@dataclass(frozen=True, kw_only=True)
class RunsOptions(Options):
    """List the runs in a folder: status, step and held-out accuracy, the latest last.

    examples:
      forkrl runs
      forkrl runs runs/sweep --json
    """

    folder: Path = field(
        default=Path("runs"), kw_only=False, metadata=argument("searched at any depth (default: runs)", "DIR")
    )
    json: bool = option(False, "print the list as JSON")


@dataclass(frozen=True, kw_only=True)
class ChatOptions(Options):
    """Talk to a model or run in the terminal, its responses coloured by entropy.

    examples:
      forkrl chat Qwen/Qwen3-0.6B --system "Answer in one sentence."
      forkrl chat runs/first                                    a run: its newest checkpoint, its prompts as in training
      forkrl chat runs/first@base --temperature 0               its starting model, greedy
      forkrl chat models/smollm2 < questions.txt                one message a line; only responses on standard output

    A model with a chat template remembers the conversation. Others continue each line on its own. /alternatives shows
    what the model could have written at the forks of its last response; /reset forgets, /help lists the commands.
    Ctrl-C stops a response, Ctrl-D leaves.
    """

    model: str = field(kw_only=False, metadata=argument(MODEL, "MODEL|RUN"))
    temperature: float | None = option(
        None, "sampling temperature, also of entropies; 0 is greedy (default: eval.temperature of the run, or 1)", "T",
        SAMPLING, low=0,
    )  # fmt: skip
    max_tokens: int | None = option(
        None, "limit on the length of a response (default: the run's, or what the model has room for)", "N", SAMPLING,
        low=1,
    )  # fmt: skip
    system: str | None = option(
        None, "system message, in place of the run's or the template's own; '': none", "TEXT", SAMPLING
    )
    seed: int = option(0, "seed of the sampling", "N", SAMPLING, low=0)


@dataclass(frozen=True, kw_only=True)
class PushOptions(Options):
    """Upload a run's checkpoint to the Hugging Face hub, with a model card and its report.

    examples:
      forkrl push runs/first me/my-model --dry-run              what would be uploaded, in runs/first/hub
      forkrl push runs/first me/my-model --private              the newest checkpoint
      forkrl push runs/first@step-8 me/my-model --revision step-8

    Uploads model or adapter as saved, the tokenizer, report.html, and a card with the held-out accuracy before and
    after, the recipe and the command that repeats the run. Optimizer state and paths of this machine stay here. Log in
    first: hf auth login, or export HF_TOKEN.
    """

    run: str = field(kw_only=False, metadata=argument("a run with checkpoints: RUN or RUN@step-N", "RUN"))
    name: str = field(kw_only=False, metadata=argument("name of the repository on the hub", "USER/NAME"))
    dry_run: bool = option(False, "upload nothing: write the files into RUN/hub and list them")
    private: bool = option(False, "make a private repository")
    revision: str | None = option(None, "upload to this branch, which is created if need be", "BRANCH")


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(Options):
    """Check what this machine can do, and how to fix what is missing."""
