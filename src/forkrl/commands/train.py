"""``forkrl train`` and ``forkrl sft``."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

from forkrl.commands.options import SftOptions, TrainOptions
from forkrl.config import SftConfig, TrainConfig
from forkrl.config.recipe import load_recipe
from forkrl.errors import UserError

DEMO_RECIPE = Path(__file__).parents[1] / "assets" / "countdown.toml"


def run_train(options: TrainOptions) -> int:
    if options.settings:
        from forkrl.config.reference import print_settings

        print_settings([*([] if options.recipe is None else [options.recipe]), *options.overrides])
        return 0
    from forkrl.model.locations import model_location
    from forkrl.store.resuming import stored_config
    from forkrl.store.run_folder import refuse_occupied

    if options.resume is not None and options.out is not None:
        raise UserError("--resume continues in the run's own folder; drop --out")
    trainer = [] if options.trainer is None else [f"runtime.trainer={options.trainer}"]
    recipe, overrides = options.recipe, [*options.overrides, *trainer]
    changed = {override.partition("=")[0].strip() for override in overrides}
    stored = stored_config(options.resume) if options.resume is not None else None
    if stored is None and recipe is None and not any(key.startswith(("model.", "task.")) for key in changed):
        recipe = str(DEMO_RECIPE)
        print(f"forkrl: no recipe given, so this is the demo: {recipe}", file=sys.stderr)
    config = load_recipe(TrainConfig, recipe, overrides, base=stored)
    out = options.out or Path("runs") / (Path(recipe).stem if recipe else "train")
    if options.dry_run:
        print_dry_run(config, options.resume or out)
        return 0
    if options.resume is None:  # before importing torch, which takes seconds
        refuse_occupied(out)
        if config.runtime.trainer == "local":
            model_location(config.model.path)

    from forkrl.store.interruption import Interrupted

    folder = options.resume or out
    try:
        _train_by_engine(config, out, options.resume, changed)
    except Interrupted as stop:
        remedy = stop.remedy or f"continue with: forkrl train --resume {folder}"
        print(f"forkrl: {stop} {stop.outcome}; {remedy}", file=sys.stderr)
        return int(stop.exit_code)
    from forkrl.report import run_headline, write_run_report

    report = write_run_report(folder)
    print(run_headline(folder))
    print(f"report: {report}")
    return 0


def _train_by_engine(config: TrainConfig, out: Path, resume: Path | None, changed: Collection[str]) -> None:
    """Train in this process or with verl; ``changed``: settings that the command line changes in a resumed run."""
    if config.runtime.trainer == "verl":
        from forkrl.cluster.launch import train_on_cluster

        train_on_cluster(config, out, resume=resume)
        return
    from forkrl.training.loop import train
    from forkrl.training.open_run import open_run

    with open_run(config, out, resume=resume, changed=changed) as run:
        train(run)


def print_dry_run(config: TrainConfig, out: Path) -> None:
    """Print the complete recipe as TOML and what it selects; for verl also the command that would run it."""
    if config.runtime.trainer == "verl":
        from forkrl.cluster.launch import dry_run

        print(dry_run(config, out))
        return
    import tomli_w

    from forkrl.config.recipe import recipe_toml
    from forkrl.report.progress import describe_selection

    print(tomli_w.dumps(recipe_toml(config)))
    print(f"# {describe_selection(config)}")


def run_sft(options: SftOptions) -> int:
    config = load_recipe(SftConfig, options.recipe, options.overrides)
    from forkrl.store.run_folder import refuse_unusable

    refuse_unusable(options.out)
    if options.out.exists() and not (options.out / ".checkpoints").exists() and any(options.out.iterdir()):
        raise UserError(f"--out {options.out}: the folder is not empty; name a new one")
    from forkrl.store.interruption import Interrupted
    from forkrl.training.sft import make_base_model

    try:
        make_base_model(config, options.out, recipe=options.recipe)
    except Interrupted as stop:
        print(f"forkrl: {stop} and saved; the same command continues", file=sys.stderr)
        return int(stop.exit_code)
    print((options.out / "README.md").read_text(encoding="utf-8"))
    return 0
