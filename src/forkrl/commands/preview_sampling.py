"""The responses of ``forkrl preview``: a few to look at, and pass rates, measured part by part in a work folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from forkrl.commands.preview_checks import Record, parts_of, place_of
from forkrl.commands.session import open_model, part_seed
from forkrl.commands.work_folder import open_work_folder, say_kept, stored_settings, weights_fingerprint
from forkrl.config import TrainConfig
from forkrl.method.advantages import informative_groups
from forkrl.model.prompt_tokens import prompt_token_ids
from forkrl.model.token_texts import TokenTexts
from forkrl.report.progress import progress
from forkrl.rewards import VerifierPool, open_verifier
from forkrl.rewards.code import with_sandbox
from forkrl.rollout import EmbeddedEngine, training_sampling
from forkrl.rollout.held_out import sample_and_score
from forkrl.store.atomic import write_json, write_text
from forkrl.tasks.checks import bin_pass_rates, gold_of
from forkrl.tasks.dataset import rows_of_questions
from forkrl.types import Prompt, Rollout, RolloutGroup, Task, VerifierResult

SCHEMA = "forkrl-preview/2"
KEPT = "kept.jsonl"
_PARTS = "pass-rates"


class Sampler(NamedTuple):
    """A model and verifiers, for responses as in training."""

    config: TrainConfig
    task: Task
    engine: EmbeddedEngine
    verifier: VerifierPool

    def respond(self, prompts: Sequence[Prompt], samples: int, seed: int) -> list[RolloutGroup]:
        """Scored responses."""
        policy = self.engine.policy
        return sample_and_score(
            self.engine,
            self.verifier,
            prompts,
            group_size=samples,
            sampling=training_sampling(self.config, policy),
            generator=torch.Generator(policy.device).manual_seed(seed),
        )


@contextmanager
def open_sampler(config: TrainConfig, task: Task) -> Iterator[Sampler]:
    with ExitStack() as stack:
        engine = stack.enter_context(open_model(config))
        engine.check_prompts(task.train, config.rollout.max_response_tokens)
        verifiers = with_sandbox(task.verifiers, config.sandbox)
        yield Sampler(config, task, engine, stack.enter_context(open_verifier(verifiers, config.reward)))


def show_prompts(
    config: TrainConfig,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    sampler: Sampler | None,
    samples: int,
) -> list[Record]:
    """The prompts token by token, with ``samples`` responses each if there is a sampler."""
    texts = TokenTexts(tokenizer)
    parts = parts_of(config.task)
    groups = sampler.respond(prompts, samples, part_seed("preview", config.seed, 0)) if sampler and prompts else []
    found = []
    for number, prompt in enumerate(prompts):
        ids = prompt_token_ids(tokenizer, prompt)
        gold = gold_of(parts[prompt.source], prompt)
        found.append(
            {
                "id": prompt.id,
                "place": place_of(prompt),
                "text": _as_read(tokenizer, prompt, ids, texts),
                "token_ids": list(ids),
                "tokens": [texts[id] for id in ids],
                "answer": None if gold is None else gold.answer,
                "responses": [
                    _described(rollout, result, texts)
                    for group in groups[number : number + 1]
                    for rollout, result in zip(group.rollouts, group.results, strict=True)
                ],
            }
        )
    return found


def _as_read(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, ids: Sequence[int], texts: TokenTexts) -> str:
    """The prompt's text with the special tokens that the tokenizer adds around it."""
    written = tuple(tokenizer.encode(prompt.text, add_special_tokens=False))
    for start in range(len(ids) - len(written) + 1):
        end = start + len(written)
        if tuple(ids[start:end]) == written:
            return "".join([*(texts[id] for id in ids[:start]), prompt.text, *(texts[id] for id in ids[end:])])
    return prompt.text


def _described(rollout: Rollout, result: VerifierResult, texts: TokenTexts) -> Record:
    return {
        "text": rollout.text,
        "token_ids": list(rollout.response_ids),
        "tokens": [texts[id] for id in rollout.response_ids],
        "entropy": rollout.entropy.tolist(),
        "finished": rollout.finished,
        "score": result.score,
        "failure": result.failure,
        "answer": result.answer,
    }


def measure_pass_rates(
    out: Path, sampler: Sampler, count: int | None, samples: int, interval: tuple[float, float] | None
) -> Record:
    """The share of responses with full reward of the first ``count`` training prompts; the same call resumes."""
    prompts = sampler.task.train[:count]
    settings = {
        **_settings(sampler),
        "prompts": len(prompts),
        "samples": samples,
        # Decides which prompts share a generator.
        "prompts_per_part": stored_settings(out).get("prompts_per_part")
        or max(sampler.engine.wave_sequences // samples, 1),
    }
    size = settings["prompts_per_part"]
    parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    with open_work_folder(out, settings) as folder:
        files = _sample_parts(folder, sampler, parts, samples)
        rates = [rate for file in files for rate in json.loads(file.read_text(encoding="utf-8"))]
        found = {
            "folder": str(out),
            "samples": samples,
            "bins": bin_pass_rates([rate["passed"] for rate in rates], samples),
            "failures": sum(rate["failures"] for rate in rates),
            "prompts": rates,
        }
        kept = None if interval is None else _keep_questions(folder, sampler, found, interval)
        return {**found, "kept": kept}


def _sample_parts(folder: Path, sampler: Sampler, parts: Sequence[Sequence[Prompt]], samples: int) -> list[Path]:
    """The files of all parts, after sampling those that are missing."""
    (folder / _PARTS).mkdir(exist_ok=True)
    files = [folder / _PARTS / f"part-{number:05}.json" for number in range(len(parts))]
    missing = [number for number, file in enumerate(files) if not file.exists()]
    say_kept(len(parts) - len(missing), len(parts), "parts", folder)
    workers = sampler.engine.workers
    before = workers.sequences_finished
    for number in progress(
        missing,
        "pass rates: responses",
        total=samples * sum(len(parts[number]) for number in missing),
        finished=lambda: workers.sequences_finished - before,
    ):
        groups = sampler.respond(parts[number], samples, part_seed("pass rates", sampler.config.seed, number))
        write_json(files[number], [_pass_rate(group) for group in groups])
    return files


def _pass_rate(group: RolloutGroup) -> Record:
    return {
        "id": group.prompt.id,
        "place": place_of(group.prompt),
        "passed": sum(score == 1 for score in group.scores),
        "failures": sum(bool(result.failure) for result in group.results),
        "informative": len(group.scores) > 1 and bool(informative_groups(torch.tensor([group.scores]))),
    }


def _settings(sampler: Sampler) -> Record:
    """What the pass rates depend on."""
    config, task = sampler.config, sampler.task
    sampling = ("temperature", "top_p", "top_k", "max_response_tokens", "stop")
    return {
        "schema": SCHEMA,
        "model": config.model.path,
        "revision": config.model.revision,
        "fingerprint": weights_fingerprint(config.model.path),
        "precision": config.model.precision,
        "engine": config.rollout.engine,
        "task": task.name,
        "data": task.fingerprint,
        "verifiers": {
            source: [spec.path, dict(spec.options), spec.answer_format] for source, spec in task.verifiers.items()
        },
        "rollout": {name: value for name, value in config.rollout.model_dump(mode="json").items() if name in sampling},
        "seed": config.seed,
    }


def _keep_questions(folder: Path, sampler: Sampler, rates: Record, interval: tuple[float, float]) -> Record | None:
    """Write the rows whose pass rate lies in ``interval`` as a data file for the same recipe; None if there are none.

    Questions held out of the same data and few-shot examples are written too: both are chosen by hashes of the
    questions, so training on the file has the same ones.
    """
    config, task, file = sampler.config.task, sampler.task, folder / KEPT
    low, high = interval
    kept = {rate["id"] for rate in rates["prompts"] if low <= rate["passed"] / rates["samples"] <= high}
    if not kept:
        file.unlink(missing_ok=True)
        return None
    same = task.examples.keys() | (frozenset() if config.held_out_data else {prompt.id for prompt in task.held_out})
    lines = [json.dumps(row, default=str) + "\n" for row in rows_of_questions(config, kept | same)]
    write_text(file, "".join(lines))
    others = [key for key in ("subset", "split") if key in config.changed()]
    return {
        "interval": [low, high],
        "questions": len(kept),
        "rows": len(lines),
        "file": str(file),
        "overrides": [f"task.data={file}", *(f"task.{key}=" for key in others)],
    }
