"""The command line: parse, validate, dispatch.

Exit codes: 0; 1 training could not go on; 2 one clear line about the user's mistake; 130 after Ctrl-C, 143 after
SIGTERM and 129 after SIGHUP, with everything saved.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from pathlib import Path

from forkrl.commands.arguments import parse_arguments, subject_overrides
from forkrl.config import SftConfig, TrainConfig
from forkrl.config.recipe import load_recipe
from forkrl.config.reference import recipe_reference
from forkrl.errors import TrainingHalted, UserError
from forkrl.parallel.threads import configure_environment

DEMO_RECIPE = Path(__file__).parent / "assets" / "countdown.toml"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code is returned."""
    configure_environment()  # before anything imports torch
    arguments = parse_arguments(argv)
    try:
        if arguments.command in WORK_FOLDER_COMMANDS:
            check_names(arguments)  # before torch is imported, which takes seconds
        return COMMANDS[arguments.command](arguments)
    except UserError as error:
        print(f"forkrl: {error}", file=sys.stderr)
        return 2
    except TrainingHalted as error:
        where = f" at {error}" if str(error).startswith("step ") else f": {error}"
        print(f"forkrl: {arguments.activity} stopped{where}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("forkrl: interrupted", file=sys.stderr)
        return 130


def check_names(arguments: argparse.Namespace) -> None:
    """Reject an output folder that cannot be used, and a local model that is not there."""
    from forkrl.commands.reference import parse_reference
    from forkrl.commands.work_folder import require_usable
    from forkrl.model.locations import model_location

    if arguments.out is not None:
        require_usable(arguments.out)
    model, server = getattr(arguments, "model", None), getattr(arguments, "server", None)
    if model is not None and server is None and is_model(model) and parse_reference(model).run is None:
        model_location(model)


def run_train(arguments: argparse.Namespace) -> int:
    """``forkrl train``."""
    if arguments.settings:
        print(recipe_reference(), end="")
        return 0
    from forkrl.store.resuming import stored_config
    from forkrl.store.run_folder import refuse_occupied

    recipe, overrides = arguments.recipe, list(arguments.overrides)
    if recipe is not None and "=" in recipe:  # an override where the recipe could stand
        recipe, overrides = None, [recipe, *overrides]
    if arguments.engine is not None:
        overrides.append(f"runtime.engine={arguments.engine}")
    changed = {override.partition("=")[0].strip() for override in overrides}
    stored = stored_config(arguments.resume) if arguments.resume is not None else None
    if stored is None and recipe is None and not any(key.startswith(("model.", "task.")) for key in changed):
        recipe = str(DEMO_RECIPE)
        print(f"forkrl: no recipe given, so this is the demo: {recipe}", file=sys.stderr)
    config = load_recipe(TrainConfig, recipe, overrides, base=stored)
    out = arguments.out or Path("runs") / (Path(recipe).stem if recipe else "train")
    if arguments.dry_run:
        return (
            print_recipe(config)
            if config.runtime.engine == "local"
            else print_verl_command(config, arguments.resume or out)
        )
    if arguments.resume is None:
        refuse_occupied(out)  # before torch is imported, which takes seconds
    elif arguments.out is not None:
        raise UserError("--resume continues in the run's own folder; drop --out")

    from forkrl.store.interruption import Interrupted

    try:
        train_by_engine(config, out, arguments.resume, changed)
    except Interrupted as stop:
        folder = arguments.resume or out
        print(f"forkrl: {stop} {stop.outcome}; go on with: forkrl train --resume {folder}", file=sys.stderr)
        return int(stop.exit_code)
    return print_outcome(arguments.resume or out)


def train_by_engine(config: TrainConfig, out: Path, resume: Path | None, changed: Collection[str]) -> None:
    """Train in this process, or by verl; ``changed``: settings that the command line changes in a resumed run."""
    if config.runtime.engine == "verl":
        from forkrl.cluster.launch import train_on_cluster

        train_on_cluster(config, out, resume=resume)
        return
    from forkrl.train.loop import train
    from forkrl.train.run import open_run

    with open_run(config, out, resume=resume, changed=changed) as run:
        train(run)


def print_verl_command(config: TrainConfig, out: Path) -> int:
    """The complete command that would hand the recipe to verl."""
    from forkrl.cluster.launch import dry_run

    print(dry_run(config, out))
    return 0


def print_recipe(config: TrainConfig) -> int:
    """The resolved recipe as TOML, and in a sentence what it selects."""
    import tomli_w

    from forkrl.config.recipe import recipe_toml
    from forkrl.report.progress import describe_selection

    print(tomli_w.dumps(recipe_toml(config)))
    print(f"# {describe_selection(config)}")
    return 0


def print_outcome(folder: Path) -> int:
    """The last lines of a run: accuracy before and after, and where the report is."""
    from forkrl.report import run_verdict, write_run_report

    report = write_run_report(folder)
    print(run_verdict(folder))
    print(f"report: {report}")
    return 0


def run_sft(arguments: argparse.Namespace) -> int:
    """``forkrl sft``."""
    config = load_recipe(SftConfig, arguments.recipe, arguments.overrides)
    from forkrl.store.interruption import Interrupted
    from forkrl.train.sft import make_base_model

    try:
        make_base_model(config, arguments.out, recipe=arguments.recipe)
    except Interrupted as stop:
        print(f"forkrl: {stop} and saved; the same command goes on", file=sys.stderr)
        return int(stop.exit_code)
    print((arguments.out / "README.md").read_text(encoding="utf-8"))
    return 0


def run_eval(arguments: argparse.Namespace) -> int:
    """``forkrl eval``."""
    if arguments.list:
        from forkrl.commands.eval_table import list_benchmarks

        print(list_benchmarks())
        return 0
    if arguments.model is None or not is_model(arguments.model):
        raise UserError("forkrl eval: name a model first: forkrl eval MODEL --bench NAME (--list shows the benchmarks)")
    # Settings that follow --bench look like names of benchmarks to argparse.
    overrides = [*arguments.overrides, *(word for word in arguments.bench if "=" in word)]
    arguments.bench = [word for word in arguments.bench if "=" not in word]
    from forkrl.commands.eval_table import describe_evaluation
    from forkrl.commands.evaluate import EvalOptions, evaluate_model

    options = EvalOptions(**{each.name: getattr(arguments, each.name) for each in fields(EvalOptions)})
    found = evaluate_model(arguments.model, recipe=arguments.recipe, overrides=overrides, options=options)
    print(describe_evaluation(found.results))
    print(f"report: {found.page}")
    return 0


def run_compare(arguments: argparse.Namespace) -> int:
    """``forkrl compare``."""
    from forkrl.commands.compare import compare_evaluations, describe_comparison

    found = compare_evaluations(arguments.a, arguments.b, seed=arguments.seed, out=arguments.out)
    print(describe_comparison(found.comparison))
    print(f"report: {found.page}")
    return 0


def run_analyze(arguments: argparse.Namespace) -> int:
    """``forkrl analyze``."""
    from rich.console import Console

    from forkrl.commands.analyze import analyze_model, coloured_sample, describe_analysis, write_analysis_report

    found = analyze_model(
        arguments.model,
        recipe=arguments.recipe,
        overrides=subject_overrides(arguments),
        responses=arguments.responses,
        skip_unusable=arguments.skip_unusable,
        problems=arguments.problems,
        samples=arguments.samples,
        temperature=arguments.temperature,
        threshold=arguments.threshold,
        min_count=arguments.min_count,
        out=arguments.out,
    )
    if sys.stdout.isatty():
        Console(highlight=False).print(coloured_sample(found))
    print(describe_analysis(found))
    print(f"report: {write_analysis_report(found)}")
    return 0


def run_branch(arguments: argparse.Namespace) -> int:
    """``forkrl branch``."""
    from forkrl.commands.branch import branch_model, describe_branching, write_branch_report

    found = branch_model(
        arguments.model,
        recipe=arguments.recipe,
        overrides=subject_overrides(arguments),
        problems=arguments.problems,
        responses=arguments.responses_per_problem,
        forks=arguments.forks,
        random=arguments.random,
        low=arguments.low,
        alternatives=arguments.alternatives,
        continuations=arguments.continuations,
        temperature=arguments.temperature,
        out=arguments.out,
    )
    print(describe_branching(found))
    print(f"report: {write_branch_report(found)}")
    return 0


def is_model(word: str) -> bool:
    """Whether a word names a model and is no setting: folders of sweeps have ``=`` in their names."""
    return "=" not in word or Path(word).is_dir()


def run_drift(arguments: argparse.Namespace) -> int:
    """``forkrl drift``."""
    from forkrl.commands.drift import describe_drift, measure_drift, write_drift_report

    words = subject_overrides(arguments)
    found = measure_drift(
        [word for word in words if is_model(word)],
        recipe=arguments.recipe,
        overrides=[word for word in words if not is_model(word)],
        responses=arguments.responses,
        skip_unusable=arguments.skip_unusable,
        problems=arguments.problems,
        samples=arguments.samples,
        temperature=arguments.temperature,
        ratio=arguments.ratio,
        bins=arguments.bins,
        out=arguments.out,
    )
    print(describe_drift(found))
    print(f"report: {write_drift_report(found)}")
    return 0


def run_decode_temps(arguments: argparse.Namespace) -> int:
    """``forkrl decode-temps``."""
    from forkrl.commands.decode_temps import decode_temps, describe_outcome, parse_temperatures

    outcome = decode_temps(
        arguments.model,
        recipe=arguments.recipe,
        overrides=subject_overrides(arguments),
        problems=arguments.problems,
        samples=arguments.samples,
        temperature=arguments.temperature,
        threshold=arguments.threshold,
        temperatures=parse_temperatures(arguments.temperatures),
        out=arguments.out,
    )
    print(describe_outcome(outcome))
    print(f"report: {outcome.page}")
    return 0


def run_plan(arguments: argparse.Namespace) -> int:
    """``forkrl plan``."""
    from forkrl.commands.plan import PlanOptions, plan_run, print_plan

    recipe, overrides = arguments.recipe, list(arguments.overrides)
    if "=" in recipe:  # an override where the recipe could stand
        recipe, overrides = None, [recipe, *overrides]
    options = PlanOptions(**{each.name: getattr(arguments, each.name) for each in fields(PlanOptions)})
    record = plan_run(recipe, overrides, options)
    if arguments.json:
        print(json.dumps(record, indent=2, allow_nan=False))
    else:
        print_plan(record)
    return 0


def run_report(arguments: argparse.Namespace) -> int:
    """``forkrl report``."""
    from forkrl.report import write_run_report

    print(f"report: {write_run_report(arguments.run)}")
    return 0


def run_doctor(arguments: argparse.Namespace) -> int:
    """``forkrl doctor``."""
    from forkrl.commands.doctor import run_doctor as examine

    return examine()


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": run_train,
    "sft": run_sft,
    "eval": run_eval,
    "compare": run_compare,
    "analyze": run_analyze,
    "branch": run_branch,
    "drift": run_drift,
    "decode_temps": run_decode_temps,
    "plan": run_plan,
    "report": run_report,
    "doctor": run_doctor,
}

WORK_FOLDER_COMMANDS = {"eval", "analyze", "branch", "drift", "decode_temps"}


if __name__ == "__main__":
    sys.exit(main())
