"""``forkrl drift``: how training moved entropy, from checkpoint to checkpoint (arXiv 2506.01939v2, section 4).

All checkpoints read the same tokens, teacher-forced: responses of the final one, as in the paper.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import AutoTokenizer

from forkrl import analysis
from forkrl.analysis.drift import change_table
from forkrl.analysis.token_pass import Written, measure_responses
from forkrl.analysis.token_table import part_paths, reading_parquet, token_batches, tokens_of_prompts
from forkrl.commands.collect_tokens import Request, collect_tokens, make_request
from forkrl.commands.options import DriftOptions
from forkrl.commands.reference import parse_reference
from forkrl.commands.runner import open_work_folder, stored_question, weights_fingerprint
from forkrl.commands.subject import locate_weights
from forkrl.commands.token_parts import read_responses, writing_parquet
from forkrl.config import ModelConfig
from forkrl.errors import UserError, first_line
from forkrl.model.locations import model_location
from forkrl.model.policy import open_policy
from forkrl.parallel.workers import open_workers
from forkrl.report.drift_page import drift_page
from forkrl.report.fork_view import choose_prompts, shown_prompts
from forkrl.report.formatting import evenly_spaced
from forkrl.report.page import write_page
from forkrl.report.progress import progress
from forkrl.store.atomic import write_json, write_text
from forkrl.store.checkpoint import all_checkpoints
from forkrl.store.results import command_line, read_json
from forkrl.store.resuming import stored_config

SCHEMA = "forkrl-drift/1"
SHOWN_LAYERS = 12
_ENTROPY = pa.schema([pa.field("entropy", pa.float32(), nullable=False)])


class Checkpoint(NamedTuple):
    """A model of the series, by the name that tables and figures give it."""

    name: str
    path: str
    revision: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Drift:
    """What was found, beside the tables of tokens and responses in ``folder``."""

    folder: Path
    facts: dict[str, Any]
    tables: dict[str, pd.DataFrame]
    entropies: dict[str, Tensor]
    notes: list[str]


def run_drift(options: DriftOptions) -> int:
    """``forkrl drift``."""
    found = measure_drift(options)
    print(describe_drift(found))
    print(f"report: {write_drift_report(found)}")
    return 0


def measure_drift(options: DriftOptions) -> Drift:
    """Measure every checkpoint's entropy on the final one's responses, and compare."""
    series = _series(options.models)
    _require_one_vocabulary(series)
    request = make_request(options)
    folder = options.out or parse_reference(options.model).default_folder("drift")
    named = [[point.name, point.path, weights_fingerprint(point.path)] for point in series]
    notes = collect_tokens(folder, request, {"schema": SCHEMA, "checkpoints": named})
    with open_work_folder(folder, stored_question(folder)):
        _measure_checkpoints(folder, series, request)
    return _summarise(folder, series, options.ratio, options.bins, notes, command_line())


def describe_drift(found: Drift) -> str:
    """The main figures as a few lines for a person."""
    facts, overlap = found.facts, found.tables["overlap"]
    lines = [
        f"{facts['model']}: {len(overlap)} checkpoints on {facts['tokens']:,} tokens of the final one's responses; "
        f"entropies at temperature {facts['temperature']:g}",
        f"overlap of the top {100 * facts['ratio']:g}% of positions, with 95% intervals:",
        f"  {'checkpoint':24}  with {facts['first']!s:18}  with {facts['last']}",
    ]
    for _, row in overlap.iterrows():
        shares = (f"{row[c]:6.1%} [{row[c + '_low']:.1%}, {row[c + '_high']:.1%}]" for c in ("with_first", "with_last"))
        lines.append(f"  {row['checkpoint']:24}  " + "   ".join(shares))
    change = found.tables["change"]
    lines.append(
        f"change of entropy from {facts['first']} to {facts['last']}: {change['change'].iloc[0]:+.4f} nats in the "
        f"lowest of {len(change)} percentile ranges, {change['change'].iloc[-1]:+.4f} in the highest"
    )
    return "\n".join([*lines, *found.notes])


def rewrite_report(folder: Path) -> Path:
    """Make the page of a finished folder again."""
    return write_drift_report(read_drift(folder))


def write_drift_report(found: Drift) -> Path:
    """Write ``report.html``: the figures, and responses to look at under every checkpoint."""
    names = [list(found.entropies)[i] for i in evenly_spaced(len(found.entropies), SHOWN_LAYERS)]
    numbers = choose_prompts(_lengths(found.folder), layers=len(names))
    rows = read_responses(found.folder, ["number", "sample", "prompt", "finished", "correct"], numbers)
    tokens = tokens_of_prompts(found.folder / "tokens", numbers)
    inside_N = pd.Series(_prompt_of_tokens(found.folder).numpy()).isin(numbers).to_numpy()
    for name in names:
        tokens[f"entropy of {name}"] = found.entropies[name].numpy()[inside_N]
    shown = shown_prompts(tokens, rows, [f"entropy of {name}" for name in names])
    page = drift_page(
        found.facts,
        found.tables,
        shown,
        names,
        notes=found.notes,
        provenance=_provenance(found.folder),
        command=found.facts["command"],
    )
    return write_page(found.folder / "report.html", page)


def _provenance(folder: Path) -> list[tuple[str, str]]:
    rows = [(key, str(value)) for key, value in stored_question(folder).items() if key != "checkpoints"]
    return [*rows, *((name, path) for name, path, _ in stored_question(folder)["checkpoints"])]


def _series(models: Sequence[str]) -> list[Checkpoint]:
    """The models to compare, in the order of training; a run among several is its newest checkpoint."""
    if len(models) == 1:
        return _series_of_run(models[0])
    short = Counter(Path(model).name for model in models)
    series = [_checkpoint(model, Path(model).name if short[Path(model).name] == 1 else model) for model in models]
    places = Counter(Path(point.path).resolve() for point in series)
    if repeated := [point.path for point in series if places[Path(point.path).resolve()] > 1]:
        raise UserError(f"{repeated[-1]}: is named twice; every model of a series is another one")
    return series


def _checkpoint(model: str, name: str) -> Checkpoint:
    reference = parse_reference(model)
    if reference.run is None:
        return Checkpoint(name, model)
    weights = locate_weights(reference, _model_settings(reference.run))
    return Checkpoint(name, weights.path, weights.revision)


def _series_of_run(model: str) -> list[Checkpoint]:
    """The model that the run started from, and all its checkpoints."""
    reference = parse_reference(model)
    if reference.run is None or reference.at:
        raise UserError(
            f"{model}: is no run folder; name a run, or two models at least, the first to the last of training"
        )
    folder = reference.run
    steps = [Checkpoint(f"step {step}", str(path)) for step, path in all_checkpoints(folder / "checkpoints").items()]
    if not steps:
        raise UserError(f"{folder}: this run has no checkpoint yet")
    trained = _model_settings(folder)
    start = [] if steps[0].name == "step 0" else [Checkpoint("step 0", trained.path, trained.revision)]
    return [*start, *steps]


def _model_settings(run: Path) -> ModelConfig:
    return stored_config(run).model


def _require_one_vocabulary(series: Sequence[Checkpoint]) -> None:
    """Refuse, before any work, checkpoints that read other tokens than the last one writes."""
    last = series[-1]
    there = _vocabulary(last)
    for checkpoint in series[:-1]:
        here = _vocabulary(checkpoint)
        if here != there:
            token = min(here.items() ^ there.items(), key=lambda item: (item[1], item[0]))
            raise UserError(
                f"{checkpoint.path}: another vocabulary than that of {last.path} ({len(here)} tokens against "
                f"{len(there)}, the first difference at token {token[1]}); drift compares checkpoints on the same "
                f"tokens, so leave it out"
            )


def _vocabulary(checkpoint: Checkpoint) -> dict[str, int]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_location(checkpoint.path), revision=checkpoint.revision)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged or foreign folder provokes inside the libraries
        raise UserError(f"{checkpoint.path}: its tokenizer cannot be opened ({first_line(error)})") from error
    return dict(tokenizer.get_vocab())


def _measure_checkpoints(folder: Path, series: Sequence[Checkpoint], request: Request) -> None:
    """Write ``entropies/N/part-*.parquet``, a value a token, of every checkpoint but the last, which wrote them."""
    config = request.subject.config
    parts = part_paths(folder / "responses")
    for place, checkpoint in enumerate(series[:-1]):
        target = folder / "entropies" / str(place)
        target.mkdir(parents=True, exist_ok=True)
        missing = [path for path in parts if not (target / path.name).exists()]
        if not missing:
            continue
        model = ModelConfig(path=checkpoint.path, revision=checkpoint.revision, precision=config.model.precision)
        policy = open_policy(model, config.runtime.device)
        with open_workers(policy, None, config.runtime) as workers:
            for path in progress(missing, f"measuring {checkpoint.name} ({place + 1} of {len(series) - 1})"):
                with reading_parquet(path):
                    rows = pq.read_table(path, columns=["prompt_token_ids", "token_ids"]).to_pydict()
                written = [Written(tuple(p), tuple(r)) for p, r in zip(*rows.values(), strict=True)]
                details = measure_responses(workers, written, temperature=request.entropy_temperature, top=0)
                with writing_parquet(target / path.name, _ENTROPY) as writer:
                    entropy_N = torch.cat([detail.entropy for detail in details]).float().numpy()
                    writer.write_table(pa.table({"entropy": entropy_N}, schema=_ENTROPY))


def read_drift(folder: Path) -> Drift:
    """A finished drift, from its folder."""
    facts = read_json(folder / "drift.json")
    series = [Checkpoint(name, path) for name, path, _ in stored_question(folder)["checkpoints"]]
    return _summarise(folder, series, facts["ratio"], facts["bins"], facts["notes"], facts["command"])


def _summarise(
    folder: Path, series: Sequence[Checkpoint], ratio: float, bins: int, notes: list[str], command: str
) -> Drift:
    entropies = {
        point.name: _entropy(folder / "tokens" if place == len(series) - 1 else folder / "entropies" / str(place))
        for place, point in enumerate(series)
    }
    first, last = series[0].name, series[-1].name
    prompt_N = _prompt_of_tokens(folder)
    if len(prompt_N) < bins:
        raise UserError(
            f"{folder}: {len(prompt_N)} tokens are fewer than the {bins} percentile ranges; take more responses "
            f"(--samples, --problems) or fewer ranges (--bins)"
        )
    tables = {
        "overlap": analysis.overlap_table(entropies, prompt_N, ratio),
        "change": change_table(entropies[first].double(), entropies[last].double(), prompt_N, bins),
        "percentiles": analysis.percentile_table(entropies),
    }
    facts = {
        "schema": SCHEMA,
        "model": stored_question(folder)["model"],
        "checkpoints": [point.name for point in series],
        "first": first,
        "last": last,
        "temperature": stored_question(folder)["temperature"] or 1.0,
        "tokens": len(prompt_N),
        "prompts": len(prompt_N.unique()),
        "ratio": ratio,
        "bins": bins,
        "overlap_of_last_with_first": _last_with_first(tables["overlap"]),
        "mean_entropy": {name: float(entropy_N.double().mean()) for name, entropy_N in entropies.items()},
        "notes": notes,
        "command": command,
    }
    (folder / "tables").mkdir(exist_ok=True)
    for name, table in tables.items():
        write_text(folder / "tables" / f"{name}.csv", table.to_csv(index=False))
    write_json(folder / "drift.json", facts)
    if len(series) == 2:
        notes = [*notes, _few_checkpoints()]
    return Drift(folder, facts, tables, entropies, notes)


def _last_with_first(overlap: pd.DataFrame) -> Mapping[str, float]:
    row = overlap.iloc[-1]
    return {name: float(row[f"with_first{end}"]) for name, end in (("share", ""), ("low", "_low"), ("high", "_high"))}


def _few_checkpoints() -> str:
    return "Two checkpoints only; a run keeps more for this with checkpoint.every=5 checkpoint.keep=100."


def _entropy(table: Path) -> Tensor:
    """The entropy column of a table of parts, ``[N]``."""
    return torch.cat(
        [torch.from_numpy(batch["entropy"].to_numpy().copy()) for batch in token_batches(table, ["entropy"])]
    )


def _lengths(folder: Path) -> pd.DataFrame:
    """``prompt`` and ``length`` of every response."""
    rows = read_responses(folder, ["number", "token_ids"])
    return pd.DataFrame({"prompt": rows["number"], "length": rows["token_ids"].map(len)})


def _prompt_of_tokens(folder: Path) -> Tensor:
    """The number of the prompt of each token, ``[N]``."""
    batches = token_batches(folder / "tokens", ["prompt"])
    return torch.cat([torch.from_numpy(batch["prompt"].to_numpy().copy()) for batch in batches]).long()
