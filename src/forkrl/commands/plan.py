"""``forkrl plan``: what a run needs, before renting GPUs. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from forkrl.commands.options import PlanOptions
from forkrl.config import TrainConfig
from forkrl.config.recipe import load_recipe
from forkrl.planning.advice import find_faster, find_remedies
from forkrl.planning.compute import Assumptions, Timing, assume, plan_time
from forkrl.planning.gpus import DEFAULT_GPU, GPUS, find_gpu, in_gib
from forkrl.planning.memory import HEADROOM, TOO_LARGE, Phase, Plan, full_length, plan_memory
from forkrl.planning.shapes import ModelShape, find_shape

NOT_MODELLED = (
    "fragmentation of the allocator, the CUDA context, buffers of NCCL, kernels' workspaces and the gradients that "
    f"flow through a layer during its backward: {HEADROOM:.0%} of the GPU is left to all of them",
    "micro-batches that verl balances by their work, and which may then hold more tokens than the limit",
    "the spread of lengths: attention costs more, and the end of a rollout runs emptier, than with all responses of "
    "the mean length",
    "the time of verifiers, of moving weights to the sampling engine, of offloading, of checkpoints and of start-up",
    "communication between GPUs and the launching of kernels, except as part of --mfu and --rollout-efficiency",
)
SMALL_MODEL = 100e6
"""Below this many parameters, kernel launches take longer than the kernels."""
_COLORS = {"fits": "green", "tight": "yellow", TOO_LARGE: "red"}
Record = Mapping[str, Any]


def run_plan(options: PlanOptions) -> int:
    record = plan_run(options)
    if options.json:
        print(json.dumps(record, indent=2, allow_nan=False))
    else:
        print_plan(record)
    return 0


def plan_run(options: PlanOptions) -> dict[str, Any]:
    config = load_recipe(TrainConfig, options.recipe, options.overrides)
    shape, source = find_shape(config.model.path, config.model.revision)
    gpu = find_gpu(options.gpu, options.gpu_memory, options.gpu_tflops, options.gpu_bandwidth)
    assumed = assume(config, **{name: getattr(options, name) for name in Assumptions._fields})
    plan = plan_memory(config, shape, gpu)
    timing = plan_time(config, plan, assumed)
    record = {"recipe": str(options.recipe or "defaults")} | _plan_record(config, plan, timing, assumed)
    record["model"]["source"] = source
    record["remedies"] = [
        {
            "changes": [str(change) for change in remedy.changes],
            "gpus": remedy.plan.layout.gpus,
            "bytes": {phase.name: phase.num_bytes for phase in remedy.plan.phases},
        }
        for remedy in ([] if plan.fits else find_remedies(config, shape, gpu))
    ]
    record["faster"] = [
        {"changes": [str(change) for change in each.changes], "hours": each.run_s / 3600}
        for each in (find_faster(config, shape, gpu, timing.run_s, assumed) if plan.fits else [])
    ]
    if options.gpu is None and gpu == GPUS[DEFAULT_GPU]:
        record["warnings"].append(f"no GPU was named: this is for --gpu {DEFAULT_GPU}")
    return record


def _plan_record(config: TrainConfig, plan: Plan, timing: Timing, assumed: Assumptions) -> dict[str, Any]:
    """A plan as JSON: bytes, and seconds unless the key says hours."""
    layout, fit, decoding, run_s = plan.layout, plan.rollout, timing.decoding, timing.run_s
    sequences = math.ceil(config.rollout.prompts_per_step * assumed.oversampling) * config.rollout.group_size
    return {
        "model": {"path": config.model.path, "parameters": plan.shape.parameters} | plan.shape._asdict(),
        "engine": config.runtime.trainer,
        "layout": {**layout._asdict(), "gpus": layout.gpus, "workers": layout.workers},
        "gpu": {**plan.gpu._asdict(), "usable": (1 - HEADROOM) * plan.gpu.memory},
        "assumed": assumed._asdict(),
        "phases": [
            _phase_record(phase) | {"status": plan.status(phase), "why": plan.why(phase)} for phase in plan.phases
        ],
        "host": [_phase_record(phase) for phase in plan.host],
        "rollout": {
            "cache_bytes_per_token": fit.cache_per_token,
            "full_length": fit.full_length,
            "room_full": fit.room_full,
            "limit": fit.limit,
            "at_once_full": fit.at_once,
            "sequences": sequences,
            "waves_full": -(-sequences // fit.at_once) if fit.at_once else None,
            "decoding": None if decoding is None else decoding._asdict(),
        },
        "step": {
            "parts": [part._asdict() for part in timing.parts],
            "flops": sum(part.flops for part in timing.parts),
            "seconds": timing.step_s,
        },
        "run": {
            "steps": timing.steps,
            "evaluation_seconds": timing.evaluation_s,
            "hours": None if run_s is None else run_s / 3600,
            "gpu_hours": None if run_s is None else run_s * layout.gpus / 3600,
        },
        "fits": plan.fits,
        "warnings": list(_warnings(config, plan.shape)),
        "not_modelled": list(NOT_MODELLED),
    }


def _phase_record(phase: Phase) -> dict[str, Any]:
    items = [{"name": item.name, "bytes": item.num_bytes, "note": item.note} for item in phase.items]
    return {"name": phase.name, "bytes": phase.num_bytes, "items": items}


def _warnings(config: TrainConfig, shape: ModelShape) -> Iterator[str]:
    length, positions, overrides = full_length(config), shape.max_positions, config.cluster.overrides
    if positions is not None and length > positions:
        yield (
            f"prompts and responses of {length:,} tokens are longer than the {positions:,} positions that the model "
            f"is declared to handle"
        )
    if config.runtime.device == "cpu":
        yield 'runtime.device = "cpu": the figures are still those of the GPU'
    if shape.parameters < SMALL_MODEL:
        yield "the model is so small that launching kernels takes most of its time: the times are far too short"
    if config.model.precision == "fp32":
        yield "model.precision = fp32: the GPU's rate is that of bf16; give a much lower --mfu"
    if overrides:
        fused = any("use_fused_kernels" in text for text in overrides)
        yield "cluster.overrides are not read" + (
            ": the logits are counted as verl holds them without fused kernels" if fused else ""
        )


def print_plan(record: Record) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140  # a file has no width; the default of 80 folds most lines
    console.print(escape(_heading(record)))
    for phase in [*record["phases"], *record["host"]]:
        console.print(_memory_table(phase, record["gpu"]))
    console.print(escape(_describe_room(record)))
    console.print(_time_table(record))
    for line in _advice(record):
        console.print(escape(line))


def _heading(record: Record) -> str:
    model, layout, gpu = record["model"], record["layout"], record["gpu"]
    where = f"one {gpu['name']}"
    if layout["sharded"]:
        where = f"{_counted(layout['nodes'], 'node')} of {layout['gpus_per_node']} x {gpu['name']}"
    return (
        f"{record['recipe']}: {model['path']}, {model['parameters']:,} parameters, engine {record['engine']} on {where}"
        f"\nshape: {model['source']}; GPU: {in_gib(gpu['memory'])}, {gpu['flops'] / 1e12:,.0f} TFLOP/s, "
        f"{gpu['bandwidth'] / 1e12:g} TB/s ({gpu['source']})"
    )


def _table(title: str) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, title=title, title_justify="left", title_style="bold")
    table.add_column(width=30)
    table.add_column(justify="right", width=12)
    return table


def _memory_table(phase: Record, gpu: Record) -> Table:
    on_gpu = "status" in phase
    table = _table(f"{phase['name']}: one GPU" if on_gpu else phase["name"])
    table.add_column(overflow="fold")
    for item in phase["items"]:
        table.add_row(escape(item["name"]), in_gib(item["bytes"]), f"[dim]{escape(item['note'])}[/dim]")
    status = ""
    if on_gpu:
        color = _COLORS[phase["status"]]
        status = f"[{color}]{phase['status']}[/{color}] in {in_gib(gpu['memory'])}{escape(phase['why'])}"
    table.add_row("[bold]together[/bold]", f"[bold]{in_gib(phase['bytes'])}[/bold]", status)
    return table


def _describe_room(record: Record) -> str:
    rollout, layout = record["rollout"], record["layout"]
    text = (
        f"KV cache: {in_gib(rollout['cache_bytes_per_token'] * rollout['full_length'])} for a sequence of full length "
        f"({rollout['full_length']:,} tokens of {rollout['cache_bytes_per_token'] / 1024:,.0f} KiB"
        f"{' on each GPU of a worker' if layout['tensor_parallel'] > 1 else ''}). A worker has room for "
        f"{rollout['room_full']:,}"
    )
    if not rollout["at_once_full"]:
        return f"{text}: nothing can be sampled."
    if rollout["room_full"] > rollout["limit"]:
        text += f" and is limited by rollout.max_sequences = {rollout['limit']}"
    return (
        f"{text}; {_counted(layout['workers'], 'worker')} decode{'s' * (layout['workers'] == 1)} "
        f"{rollout['at_once_full']:,} at once, so that {rollout['sequences']:,} responses of full length take "
        f"{_counted(rollout['waves_full'], 'wave')}."
    )


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _time_table(record: Record) -> Table:
    table = _table("a step")
    table.add_column(justify="right", width=12)
    table.add_column(overflow="fold")
    table.add_row("", "[bold]PFLOP[/bold]", "[bold]time[/bold]")
    step, run = record["step"], record["run"]
    for part in step["parts"]:
        note = f"[dim]{escape(part['note'])}[/dim]"
        table.add_row(part["name"], f"{part['flops'] / 1e15:,.4g}", _in_time(part["seconds"]), note)
    table.add_row("[bold]together[/bold]", f"{step['flops'] / 1e15:,.4g}", _in_time(step["seconds"]))
    evaluations = ", evaluations included" if run["evaluation_seconds"] else ""
    known = run["hours"] is not None
    gpu_hours = f"{run['gpu_hours']:,.0f} GPU hours{evaluations}" if known else ""
    hours = _in_time(run["hours"] * 3600 if known else None)
    table.add_row(f"[bold]{run['steps']:,} steps[/bold]", "", f"[bold]{hours}[/bold]", gpu_hours)
    return table


def _in_time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:,.3g} s"
    return f"{seconds / 60:,.3g} min" if seconds < 7200 else f"{seconds / 3600:,.4g} h"


def _advice(record: Record) -> Iterator[str]:
    if record["fits"]:
        yield "It fits, with a tenth of the GPU to spare."
        if record["faster"]:
            yield "Faster, according to the same estimate:"
    elif record["remedies"]:
        yield "What makes it fit, with a tenth of the GPU to spare:"
    else:
        yield "No change of up to three settings that was tried makes it fit on this GPU."
    for each in record["faster"]:
        yield f"  {', '.join(each['changes'])}   ({each['hours']:,.4g} h)"
    for remedy in record["remedies"]:
        peak = in_gib(max(remedy["bytes"].values()))
        yield f"  {', '.join(remedy['changes'])}   ({remedy['gpus']} GPUs, at most {peak} of each)"
    assumed = record["assumed"]
    rate = f"{assumed['rollout_efficiency']:.0%} of what memory or arithmetic allows (--rollout-efficiency)"
    if assumed["rollout_tokens_per_s"] is not None:
        rate = f"{assumed['rollout_tokens_per_s']:,.0f} tokens/s of each GPU (--rollout-tokens-per-s)"
    yield (
        f"Assumed: responses of {assumed['mean_response']:,.0f} tokens on average (--mean-response), prompts of "
        f"{assumed['mean_prompt']:,.0f} (--mean-prompt), {assumed['oversampling']:.3g} responses sampled per response "
        f"that is trained on (--oversampling), training at {assumed['mfu']:.0%} of the GPU's rate (--mfu), sampling "
        f"at {rate}."
    )
    for warning in record["warnings"]:
        yield f"note: {warning}"
    yield "Not modelled: " + "; ".join(record["not_modelled"]) + "."
