"""The command line, made from the options of the commands: parse, check what needs no torch, dispatch.

Exit codes: 0; 1 training stopped, or the reader of the output has closed the pipe; 2 an error that the user must fix,
in one line; 130 after Ctrl-C, 143 after SIGTERM and 129 after SIGHUP, with everything saved.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_origin

import typer
from typer.main import get_command

from forkrl import __version__
from forkrl.commands import options as of
from forkrl.commands import other_options as other
from forkrl.errors import TrainingHalted, UserError, first_line, is_out_of_memory
from forkrl.parallel.threads import configure_environment


class Command(NamedTuple):
    """A command: its options, the function in ``forkrl.commands`` that runs it, and what it does, for messages."""

    options: type[of.Options]
    run: str
    activity: str
    panel: str


TRAIN, MEASURE, OTHER = "Train", "Measure", "Other"
COMMANDS = {
    "train": Command(of.TrainOptions, "train:run_train", "training", TRAIN),
    "sft": Command(of.SftOptions, "train:run_sft", "training the base model", TRAIN),
    "model": Command(of.PretrainedOptions, "model:run_model", "getting the model", TRAIN),
    "plan": Command(of.PlanOptions, "plan:run_plan", "the plan", TRAIN),
    "preview": Command(of.PreviewOptions, "preview:run_preview", "the preview", TRAIN),
    "eval": Command(of.EvalOptions, "eval:run_eval", "the evaluation", MEASURE),
    "compare": Command(of.CompareOptions, "compare:run_compare", "the comparison", MEASURE),
    "study": Command(of.StudyOptions, "study:run_study", "the study", MEASURE),
    "analyze": Command(of.AnalyzeOptions, "analyze:run_analyze", "the analysis", MEASURE),
    "branch": Command(of.BranchOptions, "branch:run_branch", "branching", MEASURE),
    "drift": Command(of.DriftOptions, "drift:run_drift", "the drift", MEASURE),
    "decode-temps": Command(of.DecodeTempsOptions, "decode_temps:run_decode_temps", "the sweep", MEASURE),
    "chat": Command(other.ChatOptions, "chat:run_chat", "the chat", OTHER),
    "runs": Command(other.RunsOptions, "runs:run_runs", "the list", OTHER),
    "report": Command(other.ReportOptions, "report:run_report", "the report", OTHER),
    "push": Command(other.PushOptions, "push:run_push", "the upload", OTHER),
    "doctor": Command(other.DoctorOptions, "doctor:run_doctor", "the check", OTHER),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code of the process."""
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        if sys.stdout is not None:  # None: closed before the start
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at exit
        return 1
    return code


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as after ``| head``."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _run(argv: Sequence[str]) -> int:
    configure_environment()  # before anything imports torch
    activity = "the command"
    try:
        options = parse(argv)
        if isinstance(options, int):
            return options
        command = next(each for each in COMMANDS.values() if type(options) is each.options)
        activity = command.activity
        if isinstance(options, of.ModelOptions | of.DriftOptions):
            check_early(options)
        if isinstance(options, of.StudyOptions) and options.study is not None:
            from forkrl.config.study import load_study

            load_study(options.study)
        module, _, function = command.run.partition(":")
        return int(getattr(importlib.import_module(f"forkrl.commands.{module}"), function)(options))
    except typer.TyperException as error:
        print(f"forkrl: {explain(error)}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"forkrl: {error}", file=sys.stderr)
        return 2
    except TrainingHalted as error:
        where = f" at {error}" if str(error).startswith("step ") else f": {error}"
        print(f"forkrl: {activity} stopped{where}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:  # where no setting of its own decides
        if not is_out_of_memory(error):
            raise
        print(
            f"forkrl: out of memory ({first_line(error)}); lower runtime.workers or rollout.max_sequences, set "
            "model.precision=bf16, or take a smaller model or a machine with more memory",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("forkrl: interrupted", file=sys.stderr)
        return 130


def check_early(options: of.ModelOptions | of.DriftOptions) -> None:
    """Reject names and settings that cannot be used before importing torch, which takes seconds."""
    from forkrl.commands.subject import read_settings
    from forkrl.commands.work_folder import require_usable
    from forkrl.evaluation.benchmarks import GYM, find_benchmark
    from forkrl.model.locations import model_location

    if isinstance(options, of.EvalOptions) and options.list_benchmarks:
        return
    if options.out is not None:
        require_usable(options.out)
    settings = read_settings(options)
    if isinstance(options, of.EvalOptions):
        for name in options.bench:
            if not name.startswith(GYM):
                find_benchmark(name)
        if options.server is not None:
            return
    if settings.reference.run is None:
        model_location(options.model)


def parse(argv: Sequence[str]) -> of.Options | int:
    """The options of the command; or an exit code after --help, --version or completion."""
    app = typer.Typer(
        name="forkrl",
        help="Reinforcement learning of language models on their forking tokens.",
        epilog="forkrl COMMAND --help has examples. docs/README.md lists the guides.",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, command in COMMANDS.items():
        text = re.sub(r"(?<=\S)\n(?=\S)", " ", inspect.cleandoc(command.options.__doc__ or ""))
        text = re.sub(r"^(  forkrl .*\S) {2,}(\S.*)$", r"\1\n      \2", text, flags=re.MULTILINE)  # fits 80 columns
        app.command(name, help=text, rich_help_panel=command.panel)(_builder(command.options))
    words = list(_repeated_flags(argv)) or ["--help"]
    parsed: of.Options | int = get_command(app).main(words, prog_name="forkrl", standalone_mode=False)
    return parsed


def explain(error: typer.TyperException) -> str:
    """What is wrong with the arguments, in one line that says where to read on."""
    message = error.format_message().rstrip(".").replace(". Did", "; did").replace("Value error, ", "")
    message = re.sub(r" \(Possible options: (.*)\)", r"; did you mean \1?", message)
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "forkrl"
    return f"{message[:1].lower()}{message[1:]}; see {command} --help".replace("?; see", "? See")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"forkrl {__version__}")
        raise typer.Exit


_VERSION = typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)


def _root(version: Annotated[bool, _VERSION] = False) -> None:
    """Options of ``forkrl`` itself."""


def _builder(kind: type[of.Options]) -> Callable[..., of.Options]:
    """A function with the parameters of the options class, for typer."""

    def build(**values: Any) -> of.Options:
        return kind(**_sorted_words(kind, values))

    build.__signature__ = inspect.Signature([_parameter(each) for each in _shown(kind)])  # type: ignore[attr-defined]
    return build


def _shown(kind: type[of.Options]) -> list[Field[Any]]:
    """The fields in the order of the command line; of two lists of words only the first, which takes all words."""
    arguments = [each for each in fields(kind) if each.metadata["option"].positional]
    arguments.sort(key=lambda each: each.name == "overrides")
    if any(get_origin(each.type) is Sequence for each in arguments[:-1]):
        del arguments[-1]
    options = [each for each in fields(kind) if not each.metadata["option"].positional]
    options.sort(key=lambda each: of.PANELS.index(each.metadata["option"].panel))
    return [*arguments, *options]


def _parameter(each: Field[Any]) -> inspect.Parameter:
    declared: of.Option = each.metadata["option"]
    kind = list[str] if get_origin(each.type) is Sequence else each.type
    shared: dict[str, Any] = {"help": declared.help, "metavar": declared.metavar}
    if declared.positional:
        info = typer.Argument(show_default=False, **shared)
    else:
        number = next((number for number in (int, float) if each.type in (number, number | None)), None)
        info = typer.Option(
            of.flag_of(each.name, declared),
            show_default=each.default not in (None, False, ()),
            rich_help_panel=declared.panel,
            parser=None if number is None else _number_parser(number),
            **shared,
        )
    default = inspect.Parameter.empty if each.default is MISSING else each.default
    annotation = Annotated[kind, info]  # type: ignore[valid-type]
    return inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _number_parser(kind: type[int] | type[float]) -> Callable[[str], float]:
    """``1e3`` is a whole number too."""

    def parse_number(text: str) -> float:
        for read in (kind, float):
            with suppress(ValueError, OverflowError):
                value = read(text)
                if kind is float or value == int(value):
                    return kind(value)
        raise typer.BadParameter(f"{text!r} is not a {'whole ' if kind is int else ''}number")

    return parse_number


def _sorted_words(kind: type[of.Options], values: dict[str, Any]) -> dict[str, Any]:
    """The values with settings moved to ``overrides``: they may be anywhere among the other words."""
    if not issubclass(kind, of.RecipeOptions | of.TaskOptions):
        return values
    arguments = [each for each in _shown(kind) if each.metadata["option"].positional and each.name != "overrides"]
    given = [values.pop(each.name) for each in arguments] + [values.pop("overrides", None)]
    words = [word for value in given for word in ([value] if isinstance(value, str) else value or ()) if word]
    others = [word for word in words if not is_override(word)]
    for each in arguments:
        if get_origin(each.type) is Sequence:
            values[each.name], others = others, []
        elif others:
            values[each.name] = others.pop(0)
        elif each.default is MISSING:
            raise UserError(f"{each.metadata['option'].metavar} is missing: {each.metadata['option'].help}")
    # A further word is not a setting either; the recipe's reader says so.
    return {**values, "overrides": [*(word for word in words if is_override(word)), *others]}


def is_override(word: str) -> bool:
    """Whether a word is ``section.key=value``; folders of sweeps have ``=`` in their names, so a path is not."""
    key, equals, _ = word.partition("=")
    return bool(equals) and "/" not in key and not Path(word).exists()


_SEVERAL = ("--bench", "--runs")


def _repeated_flags(argv: Sequence[str]) -> Iterator[str]:
    """``--bench a b`` as ``--bench a --bench b``, which is how typer takes several values."""
    flag, first = "", False
    for word in argv:
        if word.startswith("-"):
            flag, first = (word, True) if word in _SEVERAL else ("", False)
        elif flag and not first and (flag == "--runs" or not is_override(word)):
            yield flag
        else:
            first = False
        yield word
