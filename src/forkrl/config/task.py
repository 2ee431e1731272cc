"""Which prompts a run samples from, and which verifier scores the responses."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from forkrl.config.secret_values import reject_written_secrets
from forkrl.config.sections import FROM_LIST, Count, Decay, Positive, PositiveInt, Section, Seed

_INSTRUCTION = "Think step by step, then give the final answer"
GYM_INSTRUCTION = f"{_INSTRUCTION} alone between <answer> and </answer>."
ANSWER_FORMATS = {
    "boxed": (rf"{_INSTRUCTION} alone within \boxed{{}}.", r"\boxed{{answer}}"),
    "answer_tag": (GYM_INSTRUCTION, "<answer>{answer}</answer>"),
    "last_number": (f"{_INSTRUCTION} as the last number.", "{answer}"),
}
"""By named format: reasoning-gym's instruction, and the response of a few-shot example."""
_CALL_ARGUMENTS = (
    "conversation chat_template add_generation_prompt continue_final_message tokenize padding truncation max_length "
    "return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs messages"
)
"""Arguments of the tokenizer's ``apply_chat_template`` that are not variables of the template."""


class CurriculumConfig(Section):
    """Difficulty levels that follow the model's accuracy, for a reasoning-gym generator that has levels."""

    promote_above: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Go one level up when the mean accuracy of the last `window` groups is above this. Not set: no curriculum."""
    demote_below: Decay = 0.0
    """Go one level down when it is below this. 0: never."""
    window: PositiveInt = 64
    """Groups of responses at the current level; counting restarts whenever the level changes."""
    start: Count = 0
    """The first level."""
    max_level: Count | None = None
    """The last level. Not set: the generator's last level."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> CurriculumConfig:
        if self.promote_above is None:
            if changed := self.changed():
                raise ValueError(
                    f"task.curriculum.{changed[0]} has no effect without task.curriculum.promote_above; set that too"
                )
            return self
        if self.demote_below >= self.promote_above:
            raise ValueError(
                f"task.curriculum.demote_below = {self.demote_below} is not below promote_above = "
                f"{self.promote_above}; every window would change the level"
            )
        if self.max_level is not None and self.max_level < self.start:
            raise ValueError(f"task.curriculum.max_level = {self.max_level} is below start = {self.start}; raise it")
        return self


class TaskConfig(Section):
    name: Literal["countdown", "countdown-validation", "dataset", "reasoning-gym", "environment", "mix"] = "countdown"
    """"countdown" generates its problems; "countdown-validation" evaluates on other problems, for choosing settings;
    "dataset" reads your data; "reasoning-gym" uses one of that package's generators; "environment" has several turns
    (docs/environments.md); "mix" mixes several tasks."""
    data: str = ""
    """dataset: a .jsonl or .parquet file, a folder of them, or a hub id."""
    subset: str | None = None
    """dataset: configuration name of a hub data set."""
    split: str = "train"
    """dataset: the split to train on."""
    held_out_data: str = ""
    """dataset: prompts to evaluate on, with the same columns; a hub id may name its split, "owner/name:test". Empty:
    hold out `held_out_rows` rows of `data`."""
    held_out_rows: PositiveInt = 256
    """dataset: rows to hold out if `held_out_data` is empty. reasoning-gym, environment: questions to evaluate on."""
    prompt_column: str = "prompt"
    """dataset: column with the question (text or chat messages). Dots select nested fields: "extra.question"."""
    answer_column: str = "answer"
    """dataset: column with the gold answer, such as "answer" or "reward_model.ground_truth"."""
    template: str = "{prompt}"
    """dataset, reasoning-gym: text around the question, which replaces {prompt}."""
    chat_template: bool = False
    """dataset, reasoning-gym: format the templated question as a user message with the tokenizer's chat template."""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """dataset, reasoning-gym, environment: variables of the chat template, such as { enable_thinking = false }."""
    system_prompt: str | None = None
    """dataset, reasoning-gym: the system message, in place of the rows' own. "": none, also not the chat template's
    default (on the command line task.system_prompt='""'). Not set: whatever rows and template say."""
    assistant_prefill: str = ""
    """dataset, reasoning-gym: beginning of every response, written at the end of the prompt. Verifiers read it as part
    of the response."""
    few_shot: Count = 0
    """dataset, reasoning-gym: training questions shown with their answers before every question; they are not trained
    on (docs/tasks.md)."""
    few_shot_response: str = ""
    """dataset, reasoning-gym: response of a few-shot example, with {answer} for the gold answer. Empty: the gold answer
    as answer_format writes it."""
    answer_format: str | None = None
    """dataset, reasoning-gym: how the answer is found in a response: "boxed", "answer_tag", "last_number", or a regular
    expression with one group (docs/tasks.md). The verifier gets what was found. Not set: the verifier looks itself, and
    reasoning-gym's reads <answer> tags."""
    skip_bad_rows: bool = False
    """dataset: skip and report unusable rows. Otherwise they are an error."""
    allow_unknown_tokens: bool = False
    """Accept prompts with characters that the tokenizer would drop or replace by its unknown token, which is otherwise
    an error."""
    verifier: str = "forkrl.rewards.math:verify_math"
    """dataset: import path "module:function" of (answer, response) -> score in [0, 1], or the "http://…" or "https://…"
    address of a verifier server, with credentials as ${NAME} (docs/verifiers.md). "code": the answers are tests for
    programs, which run in a sandbox (docs/code-rewards.md). "none": no answers and no scores, for commands that need
    none."""
    verifier_options: dict[str, Any] = Field(default={})
    """dataset: additional arguments of the verifier by name, as in task.verifier_options.tolerance = 0.1. ${NAME} in
    text is replaced by that environment variable. "code" takes float_tolerance (docs/code-rewards.md)."""
    generator: str = ""
    """reasoning-gym: the generator's name, such as "chain_sum" (docs/tasks.md lists them)."""
    settings: dict[str, Any] = Field(default={})
    """reasoning-gym: the generator's settings, such as { min_terms = 2, max_terms = 3 }."""
    difficulty: Count | None = None
    """reasoning-gym: a fixed level of the generator's curriculum, from 0. Not set: the generator's defaults."""
    train_prompts: PositiveInt = 2048
    """reasoning-gym: distinct questions to train on, per level of a curriculum. environment: tasks to train on, if it
    has that many."""
    question_seed: Seed = 0
    """reasoning-gym: random seed of the questions; their order depends on `seed`. It also chooses the few-shot
    examples, those of a data set too."""
    instruction: str | None = None
    """reasoning-gym: text after the question inside {prompt}. Not set: a sentence that asks for the answer in
    answer_format (none for a regular expression)."""
    strict: bool = False
    """reasoning-gym: turn partial scores, which many scorers give, into 0."""
    curriculum: CurriculumConfig = CurriculumConfig()
    environment: str = ""
    """environment: module of a taskset of the `verifiers` package, installed or in the current folder."""
    environment_args: dict[str, Any] = Field(default={})
    """environment: its configuration as `verifiers` reads it, such as { taskset = { highest = 16 } }."""
    max_turns: PositiveInt = 8
    """environment: the most turns of the model in a rollout."""
    max_turn_tokens: Count = 0
    """environment: the most tokens of a turn; 0: as many as rollout.max_response_tokens leaves, which bounds all that
    follows the first prompt."""
    parts: Annotated[tuple[PartConfig, ...], FROM_LIST] = ()
    """mix: the tasks, each a table [[task.parts]] with the settings of [task] and those below."""

    @model_validator(mode="after")
    def _settings_go_with_the_name(self) -> TaskConfig:
        changed = self.changed()
        for tasks, settings in _TASKS_THAT_READ.items():
            misplaced = [key for key in settings.split() if key in changed]
            if misplaced and self.name not in tasks:
                meant = " or ".join(f'"{task}"' for task in tasks)
                raise ValueError(
                    f'task.{misplaced[0]} is for task.name = {meant}, but task.name = "{self.name}"; set task.name too'
                )
        if self.name == "dataset" and not self.data:
            raise ValueError(
                'task.data is empty; name a .jsonl or .parquet file, or a hub data set, for task.name = "dataset"'
            )
        if self.verifier_options and self.verifier == "none":
            raise ValueError('task.verifier_options are for a verifier, but task.verifier = "none"; remove them')
        _require_json("task.chat_template_kwargs", self.chat_template_kwargs)
        _require_json("task.verifier_options", self.verifier_options)
        _require_json("task.settings", self.settings)
        if self.verifier == "code":
            _require_code_options(self.verifier_options)
        if self.name == "environment" and not self.environment:
            raise ValueError(
                "task.environment is empty; name the module of a taskset of the verifiers package "
                "(docs/environments.md)"
            )
        _require_json("task.environment_args", self.environment_args)
        reject_written_secrets("task.environment_args", self.environment_args)
        reject_written_secrets("task.verifier", self.verifier)
        reject_written_secrets("task.verifier_options", self.verifier_options)
        if self.name == "reasoning-gym" and not self.generator:
            raise ValueError(
                'task.generator is empty; name one of reasoning-gym\'s, such as "chain_sum" (docs/tasks.md lists them)'
            )
        if "{prompt}" not in self.template:
            raise ValueError("task.template has no {prompt}; every prompt would be the same text")
        if self.difficulty is not None and self.curriculum.promote_above is not None:
            raise ValueError(
                f"task.difficulty = {self.difficulty} is a fixed level, and task.curriculum changes levels; set one of "
                f"the two (task.curriculum.start is the first level)"
            )
        return self

    @model_validator(mode="after")
    def _prompt_and_answer_fit(self) -> TaskConfig:
        if self.answer_format is not None:
            _require_answer_format(self.answer_format)
            if self.verifier == "none":
                raise ValueError('task.answer_format is for a verifier, but task.verifier = "none"; remove it')
        for key in ("system_prompt", "chat_template_kwargs"):
            if key in self.changed() and not self.chat_template and self.name != "environment":
                raise ValueError(
                    f"task.{key} has no effect without task.chat_template = true; set that too, or write the whole "
                    f"prompt as task.template"
                )
        for name in self.chat_template_kwargs:
            if name in _CALL_ARGUMENTS.split():
                raise ValueError(
                    f"task.chat_template_kwargs.{name} is not a variable of chat templates but an argument of the "
                    f"function that applies them; remove it"
                )
        if not self.few_shot:
            if self.few_shot_response:
                raise ValueError("task.few_shot_response has no effect without task.few_shot; set that too")
            if self.question_seed and self.name == "dataset":
                raise ValueError("task.question_seed has no effect on a data set without task.few_shot; remove it")
            return self
        if self.verifier in ("none", "code"):
            what = "are tests" if self.verifier == "code" else "are not read"
            raise ValueError(
                f"task.few_shot = {self.few_shot} shows gold answers, but those of task.verifier = "
                f'"{self.verifier}" {what}; set it to 0'
            )
        if "{answer}" not in (self.few_shot_response or "{answer}"):
            raise ValueError(
                "task.few_shot_response has no {answer}; all examples would have the same response; put it where the "
                "gold answer belongs"
            )
        if self.answer_format not in (None, *ANSWER_FORMATS) and not self.few_shot_response:
            raise ValueError(
                f"task.few_shot = {self.few_shot} with a regular expression as task.answer_format needs "
                f'task.few_shot_response, a text that it matches, such as "Answer: {{answer}}"'
            )
        return self

    @property
    def gym_instruction(self) -> str:
        """``instruction``, or the one for ``answer_format``."""
        if self.instruction is not None:
            return self.instruction
        return ANSWER_FORMATS.get(self.answer_format or "answer_tag", ("", ""))[0]

    @property
    def example_response(self) -> str:
        """``few_shot_response``, or the one for ``answer_format``; with ``{answer}``."""
        default = "answer_tag" if self.name == "reasoning-gym" else "last_number"
        return self.few_shot_response or ANSWER_FORMATS[self.answer_format or default][1]

    @model_validator(mode="after")
    def _parts_are_told_apart(self) -> TaskConfig:
        if self.name != "mix":
            return self
        if not self.parts:
            raise ValueError('task.parts is empty; give a table [[task.parts]] for each task of task.name = "mix"')
        labels = [part.label for part in self.parts]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise ValueError(f'task.parts has two parts called "{twice}"; give one of them another source')
        return self


class PartConfig(TaskConfig):
    """One task of a mix."""

    source: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]*$")] = ""
    """Name of the part in metrics and reports. Empty: its generator, its data or its task name."""
    weight: Positive = 1.0
    """Its share of the prompts is its weight divided by the sum of all weights."""

    @model_validator(mode="after")
    def _is_no_mix(self) -> PartConfig:
        if self.name == "mix":
            raise ValueError("task.name: a part of a mix cannot be a mix; list its parts next to the others")
        if self.name == "environment":
            raise ValueError("task.name: a part of a mix cannot be an environment yet; train on it alone")
        if self.verifier == "none":
            raise ValueError(
                'task.verifier = "none" gives no scores, which a mix needs for training; choose a verifier'
            )
        return self

    @property
    def label(self) -> str:
        """``source``, or a name derived from the part's generator, data or task name."""
        data = Path(self.data)
        name = self.source or self.generator or (data.stem if data.suffix in (".jsonl", ".parquet") else data.name)
        return re.sub(r"[^A-Za-z0-9_.-]", "-", name or self.name)


_TASKS_THAT_READ = {
    ("dataset",): "data subset split held_out_data prompt_column answer_column skip_bad_rows verifier verifier_options",
    ("reasoning-gym",): "generator settings difficulty instruction strict curriculum",
    ("reasoning-gym", "environment"): "train_prompts",
    ("environment",): "environment environment_args max_turns max_turn_tokens",
    ("dataset", "reasoning-gym"): "template chat_template system_prompt assistant_prefill few_shot few_shot_response "
    "answer_format question_seed",
    ("dataset", "reasoning-gym", "environment"): "held_out_rows chat_template_kwargs",
    ("dataset", "reasoning-gym", "environment", "countdown", "countdown-validation"): "allow_unknown_tokens",
    ("mix",): "parts",
}
"""The settings that are specific to some tasks, by ``task.name``."""

TaskConfig.model_rebuild()


def _require_code_options(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name != "float_tolerance":
            raise ValueError(
                f'task.verifier_options.{name} is not an option of task.verifier = "code", which takes '
                f"float_tolerance; the limits of programs are settings of [sandbox]"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(
                f"task.verifier_options.float_tolerance = {value!r} is not a number in [0, 1), such as 1e-6"
            )


def _require_answer_format(text: str) -> None:
    if text in ANSWER_FORMATS:
        return
    named = ", ".join(f'"{name}"' for name in ANSWER_FORMATS)
    try:
        groups = re.compile(text).groups
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"task.answer_format = {text!r} is none of {named}, and not a regular expression ({error}); correct it"
        ) from None
    if groups != 1:
        found = f"has {groups} groups" if groups else "has no group"
        near = difflib.get_close_matches(text, ANSWER_FORMATS, n=1)
        remedy = "put the answer in one group, as in 'Answer: (.+)', and write other brackets as (?:...)"
        raise ValueError(
            f"task.answer_format = {text!r} is none of {named}, and as a regular expression it {found}; "
            + (f"did you mean {near[0]!r}?" if near else remedy)
        )


def _require_json(key: str, values: dict[str, Any]) -> None:
    for name, value in values.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(f"{key}.{name} = {value!r} is not a JSON value; write it as text") from None
