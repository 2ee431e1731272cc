"""``forkrl plan``: what a run needs before anyone rents GPUs. Imports no torch, and no figures without ``--out``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from forkrl.commands.options import PlanOptions
from forkrl.config import TrainConfig
from forkrl.config.recipe import load_recipe
from forkrl.errors import UserError
from forkrl.planning.advice import Change, changed, find_faster, find_remedies
from forkrl.planning.cards import CARDS, Card, find_card
from forkrl.planning.compute import assume
from forkrl.planning.plan import TOO_LARGE, Plan, in_gib, plan_memory, plan_time
from forkrl.planning.record import SCHEMA, plan_record
from forkrl.planning.shapes import ModelShape, find_shape
from forkrl.store.atomic import explained_write_errors, write_json

PLAN = "plan.json"
_COLORS = {"fits": "green", "tight": "yellow", TOO_LARGE: "red"}


class Outcome(NamedTuple):
    """The plan, and the page that shows it, if one was asked for."""

    record: dict[str, Any]
    page: Path | None


def run_plan(options: PlanOptions) -> int:
    """``forkrl plan``."""
    found = plan_run(options)
    if options.json:
        print(json.dumps(found.record, indent=2, allow_nan=False))
        return 0
    print_plan(found.record)
    if found.page is not None:
        print(f"report: {found.page}")
    return 0


def plan_run(options: PlanOptions) -> Outcome:
    """Plan a recipe, and write ``plan.json`` and ``report.html`` into ``options.out``.

    Raises:
        UserError: the recipe, the model or an option is not usable; or the folder is in use for something else.
    """
    if options.out is not None:
        _check_out(options.out)
    config = load_recipe(TrainConfig, options.recipe, options.overrides)
    found = find_shape(config.model.path, config.model.revision)
    card, is_assumed = find_card(options.gpu, options.gpu_memory, options.gpu_tflops, options.gpu_bandwidth)
    assumed = assume(
        config,
        mean_response=options.mean_response,
        mean_prompt=options.mean_prompt,
        oversampling=options.oversampling,
        mfu=options.mfu,
        rollout_efficiency=options.rollout_efficiency,
        rollout_tokens_per_s=options.rollout_tokens_per_s,
    )
    plan = plan_memory(config, found.shape, card)
    timing = plan_time(config, plan, assumed)
    record = plan_record(
        config,
        plan,
        timing,
        assumed,
        source=found.source,
        remedies=[] if plan.fits else find_remedies(config, found.shape, card),
        faster=find_faster(config, found.shape, plan, timing, assumed) if plan.fits else [],
    )
    if is_assumed:
        record["warnings"].append(f"no card was named: this is for --gpu {next(iter(CARDS))}")
    record["recipe"] = options.recipe or "defaults"
    if options.out is None:
        return Outcome(record, None)
    record["other_nodes"] = _other_nodes(config, found.shape, card, plan)
    return Outcome(record, _write(options.out, record))


def _other_nodes(config: TrainConfig, shape: ModelShape, card: Card, plan: Plan) -> list[dict[str, Any]]:
    """Memory of the same recipe on other numbers of nodes, for the figure; none for the local engine."""
    nodes = [plan.layout.nodes]
    if plan.layout.sharded:
        half = plan.layout.nodes // 2
        nodes = [half] * bool(half) + [plan.layout.nodes * times for times in (1, 2, 4)]
    rows = []
    for count in nodes:
        try:
            other = plan_memory(changed(config, [Change("cluster.nodes", count)]), shape, card)
        except UserError:  # so many ranks cannot share a mini-batch
            continue
        for phase in other.phases:
            items = {item.name: item.num_bytes for item in phase.items}
            rows.append({"nodes": count, "gpus": other.layout.gpus, "phase": phase.name, "items": items})
    return rows


def _write(out: Path, record: Mapping[str, Any]) -> Path:
    from forkrl.report.plan_page import write_plan_page

    with explained_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    write_json(out / PLAN, record)
    return write_plan_page(out, record)


def _check_out(out: Path) -> None:
    """Refuse a folder that holds something else; a plan may be made again."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not _is_plan(out):
        raise UserError(f"--out {out}: is not empty and holds no plan; name another folder")


def _is_plan(folder: Path) -> bool:
    try:
        stored = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(stored, dict) and stored.get("schema") == SCHEMA


def print_plan(record: Mapping[str, Any], console: Console | None = None) -> None:
    """The plan as tables for a person."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = 140  # a file has no width; the default of 80 would fold most lines
    console.print(escape(_heading(record)))
    for phase in record["phases"]:
        console.print(_memory_table(phase, record["card"]))
    for phase in record["host"]:
        console.print(_memory_table(phase, None))
    console.print(escape(describe_room(record)))
    console.print(_time_table(record))
    for line in [*_advice(record), *_small_print(record)]:
        console.print(escape(line))


def _heading(record: Mapping[str, Any]) -> str:
    model, layout, card = record["model"], record["layout"], record["card"]
    where = f"one {card['name']}"
    if layout["sharded"]:
        where = f"{counted(layout['nodes'], 'node')} of {layout['gpus_per_node']} x {card['name']}"
    return (
        f"{record['recipe']}: {model['path']}, {model['parameters']:,} parameters, engine {record['engine']} on {where}"
        f"\nshape: {model['source']}; card: {in_gib(card['memory'])}, {card['flops'] / 1e12:,.0f} TFLOP/s, "
        f"{card['bandwidth'] / 1e12:g} TB/s ({card['source']})"
    )


def _memory_table(phase: Mapping[str, Any], card: Mapping[str, Any] | None) -> Table:
    title = phase["name"] if card is None else f"{phase['name']}: one GPU"
    table = Table(box=None, pad_edge=False, show_header=False, title=title, title_justify="left", title_style="bold")
    table.add_column(width=30)
    table.add_column(justify="right", width=12)
    table.add_column(overflow="fold")
    for item in phase["items"]:
        table.add_row(escape(item["name"]), in_gib(item["bytes"]), f"[dim]{escape(item['note'])}[/dim]")
    total, verdict = in_gib(phase["bytes"]), ""
    if card is not None:
        color = _COLORS[phase["verdict"]]
        verdict = f"[{color}]{phase['verdict']}[/{color}] in {in_gib(card['memory'])}{escape(phase['why'])}"
    table.add_row("[bold]together[/bold]", f"[bold]{total}[/bold]", verdict)
    return table


def describe_room(record: Mapping[str, Any]) -> str:
    """A sentence on how many sequences are sampled at once."""
    rollout, layout = record["rollout"], record["layout"]
    text = (
        f"KV cache: {in_gib(rollout['cache_bytes_per_token'] * rollout['full_length'])} for a sequence of full length "
        f"({rollout['full_length']:,} tokens of {rollout['cache_bytes_per_token'] / 1024:,.0f} KiB"
        f"{' on each GPU of a replica' if layout['tensor_parallel'] > 1 else ''}). A replica has room for "
        f"{rollout['room_full']:,}"
    )
    if not rollout["at_once_full"]:
        return f"{text}: nothing can be sampled."
    if rollout["room_full"] > rollout["limit"]:
        text += f" and takes rollout.max_sequences = {rollout['limit']}"
    return (
        f"{text}; {counted(layout['replicas'], 'replica')} decode{'s' * (layout['replicas'] == 1)} "
        f"{rollout['at_once_full']:,} at once, so that "
        f"{rollout['sequences']:,} responses, if all were of full length, are {counted(rollout['waves_full'], 'wave')}."
    )


def counted(number: int, noun: str) -> str:
    """A number of things: "1 node", "1,024 nodes"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _time_table(record: Mapping[str, Any]) -> Table:
    table = Table(
        box=None, pad_edge=False, header_style="bold", title="a step", title_justify="left", title_style="bold"
    )
    table.add_column("", width=30)
    table.add_column("PFLOP", justify="right", width=12)
    table.add_column("time", justify="right", width=12)
    table.add_column("", overflow="fold")
    for part in record["step"]["parts"]:
        petaflop, seconds = f"{part['flops'] / 1e15:,.4g}", in_time(part["seconds"])
        table.add_row(part["name"], petaflop, seconds, f"[dim]{escape(part['note'])}[/dim]")
    step, run = record["step"], record["run"]
    table.add_row("[bold]together[/bold]", f"{step['flops'] / 1e15:,.4g}", in_time(step["seconds"]))
    evaluations = "evaluations included" if run["evaluation_seconds"] else ""
    hours = None if run["hours"] is None else run["hours"] * 3600
    total = f"{run['gpu_hours']:,.0f} GPU hours, {evaluations}" if run["gpu_hours"] is not None else ""
    table.add_row(f"[bold]{run['steps']:,} steps[/bold]", "", f"[bold]{in_time(hours)}[/bold]", total)
    return table


def in_time(seconds: float | None) -> str:
    """A duration for a person."""
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:,.3g} s"
    return f"{seconds / 60:,.3g} min" if seconds < 7200 else f"{seconds / 3600:,.4g} h"


def _advice(record: Mapping[str, Any]) -> list[str]:
    if not record["fits"]:
        if not record["remedies"]:
            return ["No change of up to three settings that was tried makes it fit on this card."]
        lines = ["What makes it fit, with a tenth of the card to spare:"]
        for remedy in record["remedies"]:
            peak = in_gib(max(remedy["bytes"].values()))
            lines.append(f"  {', '.join(remedy['changes'])}   ({remedy['gpus']} GPUs, at most {peak} of each)")
        return lines
    lines = ["It fits, with a tenth of the card to spare."]
    if record["faster"]:
        lines.append("What would be faster, by the same model of it:")
        lines += [f"  {', '.join(each['changes'])}   ({each['hours']:,.4g} h)" for each in record["faster"]]
    return lines


def describe_assumptions(assumed: Mapping[str, Any]) -> str:
    """What was assumed, in a sentence."""
    if assumed["rollout_tokens_per_s"] is not None:
        rate = f"{assumed['rollout_tokens_per_s']:,.0f} tokens/s of each GPU"
    else:
        rate = f"{assumed['rollout_efficiency']:.0%} of what memory or arithmetic allows (--rollout-efficiency)"
    return (
        f"Assumed: responses of {assumed['mean_response']:,.0f} tokens on average (--mean-response), prompts of "
        f"{assumed['mean_prompt']:,.0f} (--mean-prompt), {assumed['oversampling']:.3g} responses sampled for one "
        f"that is trained on (--oversampling), training at {assumed['mfu']:.0%} of the card's rate (--mfu), sampling "
        f"at {rate}."
    )


def _small_print(record: Mapping[str, Any]) -> list[str]:
    lines = [describe_assumptions(record["assumed"])]
    lines += [f"note: {warning}" for warning in record["warnings"]]
    return [*lines, "Not modelled: " + "; ".join(record["not_modelled"]) + "."]
