"""The page of ``forkrl plan``: memory of one GPU against the card's, and where a step's time goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from forkrl.report.page import Card, Page, write_page
from forkrl.report.plan_figures import kind_of, memory_bars
from forkrl.report.sections import FigureSection, figure_section

GIB = 2**30
Record = Mapping[str, Any]


def write_plan_page(folder: Path, record: Record) -> Path:
    """Write ``report.html`` of a plan.

    Args:
        folder: where it goes.
        record: as ``plan.json`` holds it (schema forkrl-plan/1), with "other_nodes".

    Raises:
        UserError: the page cannot be written.
    """
    return write_page(folder / "report.html", plan_page(record))


def plan_page(record: Record) -> Page:
    """What the page says of a plan."""
    model, card = record["model"], record["card"]
    return Page(
        name=f"{model['path']} on {record['layout']['gpus']} x {card['name']}",
        kind="plan",
        verdict=plan_verdict(record),
        figures=[_memory(record), _items(record), _time(record)],
        figures_title="What it needs",
        notes=[*record["warnings"], *(f"Not modelled: {each}." for each in record["not_modelled"])],
        cards=_cards(record),
        settings=[
            ("Assumed", [(key, str(value), False) for key, value in record["assumed"].items()]),
            ("Layout", [(key, str(value), False) for key, value in record["layout"].items()]),
            ("Shape", [(key, str(value), False) for key, value in model.items()]),
        ],
        provenance=[("shape", model["source"]), ("card", card["source"]), ("recipe", str(record["recipe"]))],
        source="plan.json in this folder",
    )


def plan_verdict(record: Record) -> str:
    """Whether it fits, and what makes it fit."""
    if record["fits"]:
        return "Every phase fits, with a tenth of the card to spare. Nothing was run: this is arithmetic on shapes."
    faulty = ", ".join(
        f"{phase['name']}: {phase['verdict']}" for phase in record["phases"] if phase["verdict"] != "fits"
    )
    ways = [" and ".join(remedy["changes"]) for remedy in record["remedies"]]
    mend = f"What makes it fit: {'; or '.join(ways)}." if ways else "Nothing that was tried makes it fit on this card."
    return f"{faulty}. {mend} Nothing was run: this is arithmetic on shapes."


def _cards(record: Record) -> list[Card]:
    run, peak = record["run"], max(phase["bytes"] for phase in record["phases"])
    known = run["hours"] is not None
    return [
        Card("Parameters", f"{record['model']['parameters'] / 1e9:.3g} billion"),
        Card("Highest memory", f"{peak / GIB:,.1f} GiB", note=f"of {record['card']['memory'] / GIB:,.0f} in one GPU"),
        Card("At once", f"{record['rollout']['at_once_full']:,}", note="sequences of full length sampled"),
        Card("Hours", f"{run['hours']:,.4g}" if known else "–", note=f"for {run['steps']:,} steps"),
        Card("GPU hours", f"{run['gpu_hours']:,.4g}" if known else "–"),
    ]


def _memory(record: Record) -> FigureSection:
    rows = [
        {"nodes": row["nodes"], "GPUs": row["gpus"], "phase": row["phase"], "item": item, "GiB": size / GIB,
         "drawn as": kind_of(item)}
        for row in record["other_nodes"] for item, size in row["items"].items()
    ]  # fmt: skip
    return figure_section(
        "Memory of one GPU",
        "By phase of a step and number of GPUs. What is sharded shrinks with more of them; activations and logits of a "
        "micro-batch do not. The line is the memory of the card, the dashed one leaves a tenth of it.",
        memory_bars(record["other_nodes"], record["card"]),
        pd.DataFrame(rows),
        "plan-memory",
    )


def _items(record: Record) -> FigureSection:
    rows = [
        {"phase": phase["name"], "item": item["name"], "GiB": item["bytes"] / GIB, "how": item["note"]}
        for phase in [*record["phases"], *record["host"]]
        for item in phase["items"]
    ]
    return figure_section("Item by item", "As the recipe stands.", None, pd.DataFrame(rows), "plan-items")


def _time(record: Record) -> FigureSection:
    rows = [
        {"part": part["name"], "PFLOP": part["flops"] / 1e15, "seconds": part["seconds"], "how": part["note"]}
        for part in record["step"]["parts"]
    ]
    return figure_section("A step", "Operations and time of its parts.", None, pd.DataFrame(rows), "plan-step")
