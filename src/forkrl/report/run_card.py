"""The model card of a checkpoint, and the page of its run as they may be published: without paths of this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePath
from typing import Any

import tomli_w
from huggingface_hub import ModelCardData

from forkrl.errors import UserError
from forkrl.model.locations import EMBEDDED_PREFIX, require_hub_id
from forkrl.report.formatting import percent, plain, visible
from forkrl.report.run_data import RunData
from forkrl.report.run_page import reproducing_command
from forkrl.report.run_summary import evaluations, headline

LOCAL = "a local model"
_PATH = re.compile(r"([\w.+]+=)?((?:/|~|file:/).*)", re.DOTALL)
"""An absolute path, or an override whose value is one."""
_PATH_IN_TEXT = re.compile(r"(?<![\w.])(?:~|file:)?/[^\s'\":;,]+")
_VERSIONS = ("forkrl", "torch", "transformers", "python", "commit", "device", "threads")
_SELECTION = ("rule", "ratio", "threshold", "scope", "entropy")


def published_run(run: RunData) -> RunData:
    """The run with every absolute path reduced to its last part, and without the command that was typed."""
    provenance = {key: value for key, value in run.provenance.items() if key != "command"}
    notes = [_PATH_IN_TEXT.sub("a local file", note) for note in run.notes]
    return replace(run, settings=_without_paths(run.settings), provenance=_without_paths(provenance), notes=notes)


def published_base(path: str, source: str | None) -> str:
    """The name by which others can get a run's base model, a hub id or one inside ForkRL; ``LOCAL`` if there is none.

    ``source``: ``model_source`` of the run's provenance; None (older runs): counts as a folder.
    """
    if path.startswith(EMBEDDED_PREFIX):
        return path
    if source != "hub":
        return LOCAL
    try:
        require_hub_id(path, "model.path", "folder")
    except UserError:  # a folder that is not here any more
        return LOCAL
    return path


def model_card(run: RunData, name: str, base: str, step: int, curve: str) -> str:
    """README.md of a repository.

    Args:
        run: a published one.
        name: of the repository, ``user/name``.
        base: published name of the base model.
        step: of the checkpoint.
        curve: file name of the learning curve; empty if there is none.
    """
    rank = run.setting("lora.rank")
    hub_base = None if base == LOCAL or base.startswith(EMBEDDED_PREFIX) else base
    metadata = ModelCardData(
        base_model=hub_base,
        library_name="peft" if rank else "transformers",
        pipeline_tag="text-generation",
        tags=["forkrl", "reinforcement-learning", "rlvr", "dapo"],
    )
    rows = {
        "base model": base if hub_base is None else f"[{base}](https://huggingface.co/{base})",
        "task": _task(run),
        "tokens that carried gradient": _selection(run),
        "checkpoint": f"after step {step} of {run.planned_steps}",
        "trained": f"a LoRA adapter of rank {rank}" if rank else "all weights",
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    versions = ", ".join(f"{key} {_cell(run.provenance[key])}" for key in _VERSIONS if run.provenance.get(key))
    picture = f"![Learning curve: held-out and training accuracy by step]({curve})\n\n" if curve else ""
    return f"""\
---
{metadata.to_yaml()}
---

# {name.partition("/")[2]}

Trained by reinforcement learning with verifiable rewards (DAPO) with ForkRL.

| | |
|---|---|
{table}

## Held-out accuracy

{_accuracy(run, step)}

{picture}[report.html](report.html) has all curves, and responses coloured by entropy: download it to read it.

## Repeat

{_fenced("bash", reproducing_command(run.settings))}

{versions}

The recipe, with every default:

{_fenced("toml", tomli_w.dumps(run.settings).strip())}
"""


def _task(run: RunData) -> str:
    named = (run.setting(f"task.{key}") for key in ("name", "generator", "data"))
    return " ".join(str(each) for each in (*named, *run.parts) if each)


def _selection(run: RunData) -> str:
    if run.setting("selection.rule") == "all":
        return "all"
    found = {key: run.setting(f"selection.{key}") for key in _SELECTION}
    return ", ".join(f"{key} {value}" for key, value in found.items() if value is not None)


def _accuracy(run: RunData, step: int) -> str:
    """A table of the evaluations before training and of this checkpoint, and what the report says on them."""
    found = evaluations(run)
    if not found:
        return "Nothing was evaluated."
    lines = ["| | accuracy [95% interval] |", "|---|---|"]
    for each in sorted({min(found), step}):
        what = "before training" if each == 0 else f"step {each}, this checkpoint" if each == step else f"step {each}"
        lines.append(f"| {what} | {percent(found[each]) if each in found else 'not evaluated'} |")
    notes = [headline(run)] if step == max(found) else []
    return "\n\n".join(["\n".join(lines), *(visible(note) for note in [*notes, *run.notes])])


def _cell(value: Any) -> str:
    return visible(plain(value)).replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")


def _fenced(language: str, text: str) -> str:
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{visible(text)}\n{fence}"


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_paths(each) for each in value]
    if isinstance(value, str) and (found := _PATH.fullmatch(value)):
        return f"{found[1] or ''}{PurePath(found[2]).name}"
    return value
