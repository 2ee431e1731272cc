"""``forkrl drift``: how training changed entropy across checkpoints (arXiv 2506.01939v2, section 4).

All checkpoints are teacher-forced on the same tokens: responses of the final one, as in the paper.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import AutoTokenizer

from forkrl import analysis
from forkrl.analysis.drift import change_table
from forkrl.analysis.measure import Written, measure_responses
from forkrl.analysis.token_table import token_batches, tokens_of_prompts
from forkrl.commands.options import DriftOptions
from forkrl.commands.reference import parse_reference
from forkrl.commands.subject import Subject, locate_weights, why_no_weights
from forkrl.commands.token_parts import collect_tokens, entropy_temperature, open_response_subject, read_responses
from forkrl.commands.work_folder import model_settings, open_work_folder, present, stored_settings, weights_fingerprint
from forkrl.config import ModelConfig
from forkrl.errors import UserError, first_line
from forkrl.model.locations import adapter_base, model_location
from forkrl.model.policy import open_policy
from forkrl.parallel.workers import open_workers
from forkrl.report.drift_page import drift_headline, drift_page
from forkrl.report.fork_view import choose_prompts, shown_prompts
from forkrl.report.formatting import evenly_spaced, interval_of
from forkrl.report.page import Page
from forkrl.report.progress import progress
from forkrl.stats.intervals import as_columns
from forkrl.store.checkpoint import all_checkpoints
from forkrl.store.parquet import part_paths, reading_parquet, writing_parquet
from forkrl.store.results import Results, write_results
from forkrl.store.resuming import stored_config

SCHEMA = "forkrl-drift/2"
SHOWN_LAYERS = 12
_ENTROPY = pa.schema([pa.field("entropy", pa.float32(), nullable=False)])


class Checkpoint(NamedTuple):
    name: str
    path: str
    revision: str | None = None


def run_drift(options: DriftOptions) -> int:
    results = measure_drift(options)
    return present(results.folder, make_page(results))


def measure_drift(options: DriftOptions) -> Results:
    """Measure every checkpoint's entropy on the final one's responses, and compare."""
    series = _series(options.models)
    _require_one_vocabulary(series)
    subject = open_response_subject(options)
    folder = options.out or parse_reference(options.model).default_folder("drift")
    named = [[point.name, point.path, weights_fingerprint(point.path)] for point in series]
    notes = collect_tokens(folder, subject, options, {**model_settings(SCHEMA, subject), "checkpoints": named})
    settings = stored_settings(folder)
    with open_work_folder(folder, settings):
        _measure_checkpoints(folder, series, subject)
    if len(series) == 2:
        notes.append("Two checkpoints only; a run keeps more for this with checkpoint.every=5 checkpoint.keep=100.")
    entropies = {point.name: _entropy(folder, place, len(series)) for place, point in enumerate(series)}
    prompt_N = _column(folder / "tokens", "prompt").long()
    if len(prompt_N) < options.bins:
        raise UserError(
            f"{folder}: {len(prompt_N)} tokens are fewer than the {options.bins} percentile ranges; take more "
            "responses (--samples, --problems) or fewer ranges (--bins)"
        )
    first, last = series[0].name, series[-1].name
    tables = {
        "overlap": analysis.overlap_table(entropies, prompt_N, options.ratio),
        "change": change_table(entropies[first].double(), entropies[last].double(), prompt_N, options.bins),
        "percentiles": analysis.percentile_table(entropies),
    }
    facts = {
        "checkpoints": list(entropies),
        "temperature": entropy_temperature(subject),
        "tokens": len(prompt_N),
        "prompts": len(prompt_N.unique()),
        "ratio": options.ratio,
        "bins": options.bins,
        **as_columns("overlap", interval_of(tables["overlap"].iloc[-1], "with_first")),
    }
    headline = drift_headline(facts, tables["change"])
    return write_results(folder, SCHEMA, settings=settings, headline=headline, notes=notes, facts=facts, tables=tables)


def make_page(results: Results) -> Page:
    folder, names = results.folder, results.facts["checkpoints"]
    layers = evenly_spaced(len(names), SHOWN_LAYERS)
    responses = read_responses(folder, ["prompt", "token_ids"])
    lengths = pd.DataFrame({"prompt": responses["prompt"], "length": responses["token_ids"].map(len)})
    numbers = choose_prompts(lengths, layers=len(layers))
    rows = read_responses(folder, ["prompt", "sample", "prompt_text", "finished", "correct"], numbers)
    tokens = tokens_of_prompts(folder / "tokens", numbers)
    inside_N = torch.isin(_column(folder / "tokens", "prompt"), torch.tensor(numbers))
    for place in layers:
        tokens[f"entropy of {names[place]}"] = _entropy(folder, place, len(names))[inside_N].numpy()
    shown = shown_prompts(tokens, rows, [f"entropy of {names[place]}" for place in layers])
    return drift_page(results, shown, [names[place] for place in layers])


def _series(models: Sequence[str]) -> list[Checkpoint]:
    """The models to compare, in training order; a run in a list of several means its newest checkpoint."""
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
    reference = parse_reference(model)
    if reference.run is None or reference.at:
        raise UserError(
            f"{model}: is not a run folder; name a run, or two models at least, the first to the last of training"
        )
    folder = reference.run
    steps = [Checkpoint(f"step {step}", str(path)) for step, path in all_checkpoints(folder / "checkpoints").items()]
    if not steps:
        raise UserError(f"{why_no_weights(folder)}; name another run, or two models at least")
    trained = _model_settings(folder)
    start = [] if steps[0].name == "step 0" else [Checkpoint("step 0", trained.path, trained.revision)]
    return [*start, *steps]


def _model_settings(run: Path) -> ModelConfig:
    return stored_config(run).model


def _require_one_vocabulary(series: Sequence[Checkpoint]) -> None:
    """Reject, before any work, checkpoints whose vocabulary differs from the last one's."""
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
    path, revision = checkpoint.path, checkpoint.revision
    while (base := adapter_base(model_location(path))) is not None:
        path, revision = base
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_location(path), revision=revision)
    except UserError:
        raise
    except Exception as error:  # the libraries raise many types for a damaged or foreign folder
        raise UserError(f"{checkpoint.path}: its tokenizer cannot be opened ({first_line(error)})") from error
    return dict(tokenizer.get_vocab())


def _measure_checkpoints(folder: Path, series: Sequence[Checkpoint], subject: Subject) -> None:
    """Write ``entropies/N/part-*.parquet``, one value per token, for every checkpoint but the last."""
    config = subject.config
    parts = part_paths(folder / "responses")
    for place, checkpoint in enumerate(series[:-1]):
        target = folder / "entropies" / str(place)
        target.mkdir(parents=True, exist_ok=True)
        missing = [path for path in parts if not (target / path.name).exists()]
        if not missing:
            continue
        model = config.model.model_copy(update={"path": checkpoint.path, "revision": checkpoint.revision})
        policy = open_policy(model, config.runtime.device)
        with open_workers(policy, None, config.runtime) as workers:
            total = sum(pq.read_metadata(path).num_rows for path in missing)
            description = f"measuring {checkpoint.name} ({place + 1} of {len(series) - 1})"
            for path in progress(missing, description, total=total, finished=lambda: workers.sequences_finished):
                with reading_parquet(path):
                    rows = pq.read_table(path, columns=["prompt_token_ids", "token_ids"]).to_pydict()
                written = [Written(tuple(p), tuple(r)) for p, r in zip(*rows.values(), strict=True)]
                details = measure_responses(workers, written, temperature=entropy_temperature(subject), top=0)
                with writing_parquet(target / path.name, _ENTROPY) as writer:
                    entropy_N = torch.cat([detail.entropy for detail in details]).float().numpy()
                    writer.write_table(pa.table({"entropy": entropy_N}, schema=_ENTROPY))


def _entropy(folder: Path, place: int, count: int) -> Tensor:
    """Entropies ``[N]`` of a checkpoint; those of the last one are in the token table."""
    return _column(folder / "tokens" if place == count - 1 else folder / "entropies" / str(place), "entropy")


def _column(table: Path, name: str) -> Tensor:
    return torch.cat([torch.from_numpy(batch[name].to_numpy().copy()) for batch in token_batches(table, [name])])
