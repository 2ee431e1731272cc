"""``forkrl branch``: what a token is worth. Force alternatives at forks and elsewhere, continue, compare outcomes."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from forkrl import __version__
from forkrl.analysis import branching
from forkrl.commands.branch_parts import (
    Design,
    PartSampler,
    branches_table,
    missing_parts,
    prompts_per_part,
    read_parts,
    write_part,
)
from forkrl.commands.options import BranchOptions
from forkrl.commands.reference import parse_reference
from forkrl.commands.runner import open_work_folder, stored_question, weights_fingerprint
from forkrl.commands.session import Session, open_session
from forkrl.commands.subject import Subject, open_subject
from forkrl.errors import UserError
from forkrl.report.branch_page import KINDS, BranchResults, branch_headline, branch_page
from forkrl.report.formatting import duration, plain
from forkrl.report.page import write_page
from forkrl.report.progress import progress
from forkrl.rollout.held_out import evaluation_generator, evaluation_sampling
from forkrl.rollout.scoring import none_judged
from forkrl.stats.intervals import ClusterSums
from forkrl.store.atomic import write_bytes, write_json, write_text
from forkrl.store.results import command_line, read_json
from forkrl.types import SamplingParams, Verifier

SCHEMA = "forkrl-branch/1"
PROBE_PROMPTS, PROBE_STEPS = 16, 8


@dataclass(frozen=True, slots=True, eq=False)
class Branching(BranchResults):
    """What was found: the responses with their branches as they were stored, tables, and the summary."""

    folder: Path


def run_branch(options: BranchOptions) -> int:
    """``forkrl branch``."""
    found = branch_model(options)
    print(describe_branching(found))
    print(f"report: {write_branch_report(found)}")
    return 0


def branch_model(options: BranchOptions) -> Branching:
    """Sample responses, force alternatives at some of their positions, continue each, judge, and compare.

    Work is kept part by part in the output folder: the same call continues an interrupted one, and one for more
    problems adds those.
    """
    subject = open_subject(options)
    temperature = subject.config.eval.temperature
    if not temperature > 0:
        raise UserError(
            f"temperature = {temperature:g}: must be above 0, as greedy continuations of a branch are all the "
            "same; give --temperature (default: eval.temperature)"
        )
    design = Design(
        options.responses_per_problem, options.forks, options.random, options.low, options.alternatives,
        options.continuations, temperature,
    )  # fmt: skip
    folder = options.out or parse_reference(options.model).default_folder("branch")
    with open_session(subject) as session:
        if session.verifier is None:
            raise UserError(f"{session.task.name}: its rows have no answers, so no branch can be judged")
        earlier = stored_question(folder).get("prompts_per_part")
        size = earlier or prompts_per_part(design, session.engine.wave_sequences)
        with open_work_folder(folder, _question(subject, session, design, size)):
            _write_missing(folder, session, session.verifier, design, size)
            rows = read_parts(folder, size, len(session.prompts))
        available = len(session.task.held_out)
    return summarise(folder, rows, available, command_line())


def _question(subject: Subject, session: Session, design: Design, size: int) -> dict[str, Any]:
    """Whatever changes the numbers. How many problems is no part of it: more of them go on in the same folder."""
    config = session.config
    return {
        "schema": SCHEMA,
        "model": subject.name,
        "weights": config.model.path,
        "revision": config.model.revision,
        "fingerprint": weights_fingerprint(config.model.path),
        "precision": config.model.precision,
        "task": session.task.name,
        "data": session.task.fingerprint,
        "verifier": {source: spec.path for source, spec in session.task.verifiers.items()},
        "seed": config.seed,
        "max_response_tokens": config.rollout.max_response_tokens,
        "stop": list(config.rollout.stop),
        **asdict(design),
        "prompts_per_part": size,  # it decides which responses share a generator
    }


def _write_missing(folder: Path, session: Session, verifier: Verifier, design: Design, size: int) -> None:
    """Sample and write the parts that are not there yet, with progress and time left."""
    (folder / "parts").mkdir(exist_ok=True)
    missing = missing_parts(folder, session.prompts, size)
    num_prompts = sum(len(prompts) for prompts in missing.values())
    if done := len(session.prompts) - num_prompts:
        print(f"{done} of {len(session.prompts)} prompts are in {folder} already", file=sys.stderr, flush=True)
    if not missing:
        return
    print(
        describe_work(num_prompts, design, expected_seconds(session, design, num_prompts)), file=sys.stderr, flush=True
    )
    sampler = PartSampler(session, verifier, design)
    for index in progress(sorted(missing), "branching", total=len(missing)):
        write_part(folder, index, index * size, sampler.rows(index, missing[index]))


def describe_work(num_prompts: int, design: Design, seconds: float) -> str:
    """One line on what is about to be sampled."""
    most = num_prompts * design.responses * design.positions * (design.alternatives + 1) * design.continuations
    return (
        f"{num_prompts} prompts, {design.responses} response(s) to each; {design.positions} positions a response "
        f"({design.forks} forks, {design.random} random, {design.low} of low entropy), {design.alternatives} "
        f"alternatives and the token taken at each, {design.continuations} continuations of each branch: "
        f"up to {most:,} continuations, roughly {duration(seconds)}"
    )


def expected_seconds(session: Session, design: Design, num_prompts: int) -> float:
    """Roughly, from the mean length of a few responses and the time of a few steps of a full batch.

    A continuation counts as a whole response: of what is left after a position, half a response is too little wherever
    the model may give up or go on at any time. The token taken is seldom a branch of its own.
    """
    sampling = evaluation_sampling(session.config, design.temperature, session.policy)
    generator = evaluation_generator(session.config.seed, session.policy.device)
    few = session.engine.generate(session.prompts[:PROBE_PROMPTS], group_size=1, sampling=sampling, generator=generator)
    length = sum(len(group.rollouts[0]) for group in few) / len(few)
    short = SamplingParams(min(PROBE_STEPS, sampling.max_response_tokens), temperature=design.temperature)
    sequences = session.engine.wave_sequences
    began = time.monotonic()
    session.engine.generate(session.prompts[:1], group_size=sequences, sampling=short, generator=generator)
    per_token = (time.monotonic() - began) / (sequences * short.max_response_tokens)
    return num_prompts * design.sequences_per_prompt * length * per_token


def read_branching(folder: Path) -> Branching:
    """A finished branching, from its folder."""
    facts = read_json(folder / "branches.json")
    rows = read_parts(folder, stored_question(folder)["prompts_per_part"], facts["prompts"])
    return summarise(folder, rows, facts["prompts_available"], facts["command"])


def summarise(folder: Path, rows: list[dict[str, Any]], available: int, command: str) -> Branching:
    """Tables and figures from the stored responses; writes branches.parquet, branches.csv and branches.json."""
    settings = stored_question(folder)
    branches = branching.branch_rates(branches_table(rows))
    spreads = branching.position_spreads(branches)
    tables = {
        "kinds": branching.summarise_kinds(spreads),
        "differences": branching.compare_kinds(spreads),
        "relation": branching.entropy_relation(spreads, settings["seed"]),
        "bins": branching.entropy_bins(spreads),
        "tokens": branching.fork_tokens(branches, spreads),
    }
    sums = ClusterSums(2)
    for _, scores in pd.DataFrame(rows).groupby("prompt")["score"]:
        sums.add([float(scores.sum()), len(scores)])
    accuracy = sums.share(0, 1)
    facts = {
        "settings": settings,
        "prompts": len({row["prompt"] for row in rows}),
        "prompts_available": available,
        "responses": len(rows),
        "positions": len(spreads),
        "branches": len(branches),
        "continuations": int(branches.loc[~branches["exact"], "count"].sum()),
        "exact_branches": int(branches["exact"].sum()),
        "cut_fraction": float(branches["cut"].mean()),
        "verifier_failures": int(branches["failures"].sum()),
        "unjudged": none_judged(int(branches["failures"].sum()), int(branches["count"].sum()), {}),
        "accuracy": accuracy.mean,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "command": command,
    }
    found = Branching(rows, branches, spreads, tables, facts, folder)
    _write_results(found)
    return found


def _write_results(found: Branching) -> None:
    folder, branches = found.folder, found.branches
    write_bytes(folder / "branches.parquet", branches.to_parquet(None, index=False))
    # As JSON strings: any text keeps to its line, and none can start like a spreadsheet's formula.
    quoted = {
        name: [json.dumps(text, ensure_ascii=False) for text in branches[name]] for name in ("prompt_id", "token")
    }
    write_text(folder / "branches.csv", branches.drop(columns="scores").assign(**quoted).to_csv(index=False))
    write_text(folder / "positions.csv", found.spreads.to_csv(index=False))
    record = {"schema": SCHEMA, **found.facts}
    record |= {name: table.to_dict("records") for name, table in found.tables.items()}
    write_json(folder / "branches.json", record)


def describe_branching(found: Branching) -> str:
    """The main figures as a few lines for a person."""
    facts, relation = found.facts, found.tables["relation"].set_index("measure")
    lines = [
        *([f"{facts['unjudged']}; the rates of 0 below measure nothing"] if facts["unjudged"] else []),
        f"{facts['settings']['model']}: {facts['positions']:,} positions of {facts['responses']:,} responses to "
        f"{facts['prompts']:,} of {facts['prompts_available']:,} prompts of {facts['settings']['task']}; "
        f"{facts['branches']:,} branches, {facts['continuations']:,} continuations; temperature "
        f"{facts['settings']['temperature']:g}",
        branch_headline(found.tables),
        "",
        f"{'':14}{'positions':>9}{'entropy':>9}  {'natural (decides)':27}{'forced':27}{'gain (best - taken)'}",
    ]
    for _, row in found.tables["kinds"].iterrows():
        figures = "".join(f"{_with_interval(row, name):27}" for name in ("natural", "forced", "gain"))
        lines.append(f"{KINDS[row['kind']][0]:14}{row['positions']:9,}{row['entropy']:9.3f}  {figures}".rstrip())
    for _, row in found.tables["differences"].iterrows():
        figures = "".join(f"{_with_interval(row, name):27}" for name in ("natural", "forced", "gain"))
        lines.append(f"{'forks - ' + row['against']:14}{row['responses']:9,}{'':9}  {figures}".rstrip())
    correlation = relation.loc["natural"]
    lines.append(
        f"Spearman's correlation of natural spread and entropy: {correlation['spearman']:.2f} "
        f"[{correlation['low']:.2f}, {correlation['high']:.2f}]"
    )
    if facts["verifier_failures"]:
        lines.append(f"{facts['verifier_failures']:,} continuations could not be verified and count as wrong")
    return "\n".join(lines)


def _with_interval(row: pd.Series, name: str) -> str:
    mean, low, high = (round(float(row[name + end]), 4) + 0.0 for end in ("", "_low", "_high"))  # no -0.0
    return f"{mean:.4f} [{low:.4f}, {high:.4f}]"


def rewrite_report(folder: Path) -> Path:
    """Make the page of a finished folder again."""
    return write_branch_report(read_branching(folder))


def write_branch_report(found: Branching) -> Path:
    """Write ``report.html`` next to the results; its path."""
    settings = found.facts["settings"]
    page = branch_page(
        found,
        name=settings["model"],
        settings=[("branch", [(key, plain(value), False) for key, value in settings.items()])],
        provenance=[("forkrl", __version__), ("schema", SCHEMA)],
        command=found.facts["command"],
    )
    return write_page(found.folder / "report.html", page)
