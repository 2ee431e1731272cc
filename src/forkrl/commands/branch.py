"""``forkrl branch``: force alternative tokens at forks and control positions, continue each, compare the outcomes."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from forkrl.analysis import branching
from forkrl.analysis.patterns import share_by_cluster
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
from forkrl.commands.session import Session, open_session, session_settings
from forkrl.commands.subject import open_subject
from forkrl.commands.work_folder import model_settings, open_work_folder, present, say_kept, stored_settings
from forkrl.errors import UserError
from forkrl.report.branch_page import branch_headline, branch_page
from forkrl.report.formatting import duration, sentence, unverified
from forkrl.report.page import Page
from forkrl.report.progress import counting
from forkrl.rollout.held_out import evaluation_generator, evaluation_sampling
from forkrl.rollout.scoring import none_judged
from forkrl.stats.intervals import as_columns
from forkrl.store.results import Results, write_results
from forkrl.types import SamplingParams, Verifier

SCHEMA = "forkrl-branch/2"
PROBE_PROMPTS, PROBE_STEPS = 16, 8


def run_branch(options: BranchOptions) -> int:
    results = branch_model(options)
    return present(results.folder, make_page(results))


def branch_model(options: BranchOptions) -> Results:
    """Sample responses, branch at some positions, continue and judge each branch, and compare.

    Resumable: finished parts stay in the output folder. A call with more problems only adds those.
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
        earlier = stored_settings(folder).get("prompts_per_part")
        size = earlier or prompts_per_part(design, session.engine.wave_sequences)
        # More problems can be added to a folder, so their number is not recorded.
        settings = {
            **model_settings(SCHEMA, subject),
            **session_settings(session),
            **asdict(design),
            "prompts_per_part": size,  # decides which responses share a generator
        }
        with open_work_folder(folder, settings):
            _sample_missing(folder, session, session.verifier, design, size)
            rows = read_parts(folder, size, len(session.prompts))
        available = len(session.task.held_out)
    return _summarise(folder, settings, rows, available)


def _sample_missing(folder: Path, session: Session, verifier: Verifier, design: Design, size: int) -> None:
    (folder / "parts").mkdir(exist_ok=True)
    missing = missing_parts(folder, session.prompts, size)
    num_missing = sum(len(prompts) for prompts in missing.values())
    say_kept(len(session.prompts) - num_missing, len(session.prompts), "prompts", folder)
    if missing:
        cost = describe_work(num_missing, design, expected_seconds(session, design, num_missing))
        print(cost, file=sys.stderr, flush=True)
    sampler = PartSampler(session, verifier, design)
    work = sampler.work(num_missing)
    with counting(lambda: work.stage, work.total, work.finished, work.seconds_left):
        for index in sorted(missing):
            write_part(folder, index, index * size, sampler.rows(index, missing[index], work))


def _summarise(folder: Path, settings: dict[str, Any], rows: list[dict[str, Any]], available: int) -> Results:
    branches = branching.branch_rates(branches_table(rows))
    positions = branching.position_spreads(branches)
    tables = {
        "kinds": branching.summarise_kinds(positions),
        "differences": branching.compare_kinds(positions),
        "relation": branching.entropy_relation(positions, settings["seed"]),
        "bins": branching.entropy_bins(positions),
        "tokens": branching.fork_tokens(branches, positions),
    }
    scores = pd.DataFrame(rows).groupby("prompt")["score"]
    failures, continued = int(branches["failures"].sum()), int(branches["count"].sum())
    facts = {
        "prompts": scores.ngroups,
        "prompts_available": available,
        "responses": len(rows),
        "positions": len(positions),
        "branches": len(branches),
        "continuations": int(branches.loc[~branches["exact"], "count"].sum()),
        "exact_branches": int(branches["exact"].sum()),
        "cut_fraction": float(branches["cut"].mean()),
        "verifier_failures": failures,
        **as_columns("accuracy", share_by_cluster(scores.sum(), scores.size())),
    }
    unjudged = none_judged(failures, continued, {})
    return write_results(
        folder,
        SCHEMA,
        settings=settings,
        headline=sentence(unjudged) if unjudged else branch_headline(tables),
        notes=unverified(failures, "continuations"),
        facts=facts,
        tables=tables | {"branches": branches, "positions": positions},
    )


def make_page(results: Results) -> Page:
    rows = read_parts(results.folder, results.settings["prompts_per_part"], results.facts["prompts"])
    return branch_page(results, rows)


def describe_work(num_prompts: int, design: Design, seconds: float) -> str:
    most = num_prompts * design.responses * design.positions * (design.alternatives + 1) * design.continuations
    return (
        f"{num_prompts} prompts, {design.responses} response(s) to each; {design.positions} positions a response "
        f"({design.forks} forks, {design.random} random, {design.low} of low entropy), {design.alternatives} "
        f"alternatives and the token taken at each, {design.continuations} continuations of each branch: "
        f"up to {most:,} continuations, roughly {duration(seconds)}"
    )


def expected_seconds(session: Session, design: Design, num_prompts: int) -> float:
    """Rough estimate from a few responses and steps of a full batch, counting a continuation as a whole response."""
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
