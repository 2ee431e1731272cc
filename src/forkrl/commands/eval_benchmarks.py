r"""What an evaluation asks: named benchmarks, or the task of a recipe or run as one benchmark."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from forkrl.commands.subject import Subject
from forkrl.config import SandboxConfig
from forkrl.errors import UserError
from forkrl.evaluation.benchmarks import CODE, GYM, Benchmark, find_benchmark, runs_programs
from forkrl.evaluation.load import fingerprint, load_questions
from forkrl.rewards.code import code_verifier
from forkrl.rewards.code.sandbox import require_sandbox
from forkrl.tasks import open_evaluation_task, open_task
from forkrl.tasks.gym import GYM_VERIFIER, gym_prompts
from forkrl.types import Prompt, Task, VerifierSpec

PLAIN = "User:\n{question}\n\nAssistant:\n"
"""The paper's prompt of base models (arXiv 2506.01939v2, section 5.2)."""

GYM_QUESTIONS = 100
"""Of a reasoning-gym generator, which could make any number."""


@dataclass(frozen=True, slots=True)
class AskedBenchmark:
    """A benchmark with the questions that are asked of it; ``available`` is how many it has.

    ``revision`` and ``expected`` are None where there is nothing to compare with; ``notice`` says what is odd.
    """

    name: str
    title: str
    hub: str
    revision: str | None
    fingerprint: str
    available: int
    expected: int | None
    prompts: Sequence[Prompt]
    verifiers: Mapping[str, VerifierSpec]
    notice: str = ""

    def rendered(self, render: Callable[[Prompt], Prompt]) -> AskedBenchmark:
        """The same with every prompt as the model reads it."""
        return replace(self, prompts=[render(prompt) for prompt in self.prompts])


def ask_benchmarks(
    names: Sequence[str], mirror: Path | None, problems: int | None, sandbox: SandboxConfig
) -> list[AskedBenchmark]:
    """Load the named benchmarks, each once.

    Args:
        names: as in ``BENCHMARKS``, or ``gym:NAME``.
        mirror: see ``load_questions``.
        problems: questions of each, from the first; None: all, of reasoning-gym ``GYM_QUESTIONS``.
        sandbox: where programs run, where there are any.
    """
    # All names, and the sandbox, are checked before anything is loaded.
    entries = [name if name.startswith(GYM) else find_benchmark(name) for name in dict.fromkeys(names)]
    if runs_programs(names):
        require_sandbox(sandbox)
    return [
        _ask_gym(entry, problems) if isinstance(entry, str) else _ask(entry, mirror, problems, sandbox)
        for entry in entries
    ]


def _ask(entry: Benchmark, mirror: Path | None, problems: int | None, sandbox: SandboxConfig) -> AskedBenchmark:
    questions = load_questions(entry, mirror)
    return AskedBenchmark(
        name=entry.name,
        title=entry.title,
        hub=entry.hub,
        revision=questions.revision or None,
        fingerprint=fingerprint(questions.prompts),
        available=len(questions.prompts),
        expected=entry.expected_questions,
        prompts=questions.prompts[:problems],
        verifiers={entry.name: code_verifier(sandbox) if entry.verifier == CODE else entry.verifier},
        notice=questions.notice,
    )


def _ask_gym(name: str, problems: int | None) -> AskedBenchmark:
    """Questions of a reasoning-gym generator, the same ones whatever the seed of sampling."""
    made = gym_prompts(name.removeprefix(GYM), count=problems or GYM_QUESTIONS)
    return AskedBenchmark(
        name=name,
        title=name.removeprefix(GYM),
        hub="",
        revision=f"reasoning-gym {version('reasoning-gym')}",
        fingerprint=fingerprint(made),
        available=len(made),
        expected=None,
        prompts=[replace(prompt, source=name) for prompt in made],
        verifiers={name: GYM_VERIFIER},
    )


def ask_task(
    subject: Subject,
    tokenizer: PreTrainedTokenizerBase | None,
    problems: int | None,
    *,
    max_prompt_tokens: int | None = None,
) -> list[AskedBenchmark]:
    """The held-out prompts of the subject's own task, as the model reads them; of a mix, each part as a benchmark.

    Without a tokenizer the chat template is left to the server: a prompt is then the text of one user message.

    Args:
        subject: the model and its settings.
        tokenizer: the model's; None where a server keeps it.
        problems: of all parts together, from the first; None: all.
        max_prompt_tokens: longer prompts are rejected; None: any length.
    """
    config = subject.config.task
    if tokenizer is None:
        config = config.model_copy(update={"chat_template": False})
    task = (open_evaluation_task if subject.whole else open_task)(
        config, tokenizer, max_prompt_tokens=max_prompt_tokens
    )
    if not task.verifiers:
        raise UserError(f"{task.name}: its rows have no answers, so nothing can be judged")
    asked = task.held_out[:problems]
    return [
        _ask_part(task, source, [prompt for prompt in asked if prompt.source == source]) for source in _parts(asked)
    ]


def _parts(prompts: Sequence[Prompt]) -> list[str]:
    return list(dict.fromkeys(prompt.source for prompt in prompts))


def _ask_part(task: Task, source: str, prompts: Sequence[Prompt]) -> AskedBenchmark:
    name = source or re.sub(r"[^\w.-]+", "-", Path(task.name).stem).strip("-.") or "task"
    return AskedBenchmark(
        name=name,
        title=source or task.name,
        hub="",
        revision=None,
        fingerprint=task.fingerprint,
        available=sum(prompt.source == source for prompt in task.held_out),
        expected=None,
        prompts=prompts,
        verifiers={source: task.verifiers[source]},
    )


def prompt_renderer(prompt_format: str, tokenizer: PreTrainedTokenizerBase | None) -> Callable[[Prompt], Prompt]:
    """What puts a question into the form that the engine wants.

    Args:
        prompt_format: plain: the paper's prompt of base models; chat: the tokenizer's template, or without a tokenizer
            the bare question, which a server puts into its own.
        tokenizer: the model's; None where a server keeps it.
    """
    if prompt_format == "plain":
        return lambda prompt: replace(prompt, text=PLAIN.replace("{question}", prompt.text))
    if tokenizer is None:
        return lambda prompt: prompt
    if not tokenizer.chat_template:
        raise UserError(
            "--prompt chat: the tokenizer has no chat template (base models often have none); use --prompt plain"
        )

    def chat(prompt: Prompt) -> Prompt:
        messages = [{"role": "user", "content": prompt.text}]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return replace(prompt, text=text, templated=True)

    return chat


def all_verifiers(asked: Iterable[AskedBenchmark]) -> dict[str, VerifierSpec]:
    """Those of all benchmarks, by ``Prompt.source``."""
    return {source: spec for benchmark in asked for source, spec in benchmark.verifiers.items()}
