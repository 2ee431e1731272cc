"""From a question to the text that the model reads: templates, system message, few-shot examples, prefill."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from forkrl.config import TaskConfig
from forkrl.errors import UserError
from forkrl.rewards.answer_format import answer_extractor
from forkrl.types import Example, Messages

ApplyChatTemplate = Callable[[Messages], str]
RenderPrompt = Callable[[str | Messages, str], str]


_REJECTIONS = (TemplateError, TypeError, ValueError)
"""Some templates reject a system message, roles that do not alternate, or the value of a variable."""


def chat_template(config: TaskConfig, tokenizer: PreTrainedTokenizerBase | None) -> ApplyChatTemplate | None:
    """The tokenizer's chat template with the recipe's variables; None if it is not wanted or there is none."""
    if not config.chat_template or tokenizer is None or not tokenizer.chat_template:
        return None
    for name in config.chat_template_kwargs:
        if not re.search(rf"\b{re.escape(name)}\b", tokenizer.get_chat_template()):
            raise UserError(
                f"task.chat_template_kwargs.{name} has no effect: the tokenizer's chat template does not read it; "
                f"correct the name or remove it"
            )

    def apply(messages: Messages) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **config.chat_template_kwargs
            )
        )

    return apply


def prompt_renderer(
    config: TaskConfig, apply_chat_template: ApplyChatTemplate | None, examples: Sequence[Example] = ()
) -> RenderPrompt:
    """The function from a question (with its place) to a prompt; raises UserError for settings the template ignores."""
    if config.chat_template and apply_chat_template is None:
        raise UserError(
            "task.chat_template = true, but the model's tokenizer has no chat template (base models often have none); "
            "set it to false and write the whole prompt as task.template"
        )
    if apply_chat_template is None:
        return partial(_plain, config, examples)
    apply = apply_chat_template
    if config.system_prompt is not None:
        _require_system_message(config.system_prompt, apply_chat_template)
        if not config.system_prompt:
            apply = partial(_without_system, apply_chat_template)
    turns = [turn for example in examples for turn in _turns(config, example)]

    def render(content: str | Messages, place: str) -> str:
        system, asked = _split(config, content)
        try:
            return apply([*system, *turns, *asked]) + config.assistant_prefill
        except _REJECTIONS as error:
            raise UserError(f"{place}: the tokenizer's chat template rejects the messages ({error})") from error

    return render


def gym_question(config: TaskConfig, question: str) -> str:
    """A question of reasoning-gym with the recipe's instruction."""
    return f"{question.rstrip()}\n{config.gym_instruction}" if config.gym_instruction else question


def choose_examples(config: TaskConfig, questions: Mapping[str, Example]) -> dict[str, Example]:
    """The recipe's few-shot examples among training questions by id, the same in any order of rows."""
    if config.few_shot and config.few_shot >= len(questions):
        raise UserError(
            f"task.few_shot = {config.few_shot} takes all of the {len(questions)} training questions that have an "
            f"answer; lower it, or add questions"
        )
    order = sorted(questions, key=lambda id: hashlib.sha256(f"{config.question_seed}/{id}".encode()).digest())
    examples = {id: questions[id] for id in order[: config.few_shot]}
    _require_readable_answers(config, list(examples.values()))
    return examples


def _require_readable_answers(config: TaskConfig, examples: Sequence[Example]) -> None:
    """Reject examples that teach another form of answer than the verifier reads."""
    answer_format = config.answer_format or ("answer_tag" if config.name == "reasoning-gym" else None)
    if answer_format is None:
        return
    find = answer_extractor(answer_format)
    for example in examples:
        response, due = gold_response(config, example.answer), example.answer.strip()
        found = find(response)
        # A gold answer may hold more than the answer, such as a solution that ends in #### 72.
        if found is None or found not in (due, find(due)):
            raise UserError(
                f"task.few_shot_response = {config.example_response!r}: the answer format {answer_format!r} does not "
                f"find the gold answer {due[-200:]!r} in the example {response[-200:]!r}; write it as the format does"
            )


def _split(config: TaskConfig, content: str | Messages) -> tuple[Messages, Messages]:
    """The system messages that apply to a question, and its other messages with the recipe's template."""
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    start = next((index for index, message in enumerate(messages) if message["role"] != "system"), 0)
    # Not str.format: a question may contain braces.
    asked = {"role": "user", "content": config.template.replace("{prompt}", messages[-1]["content"])}
    system = messages[:start]
    if config.system_prompt is not None:
        system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
    return system, [*messages[start:-1], asked]


def _turns(config: TaskConfig, example: Example) -> Messages:
    _, asked = _split(config, example.content)
    return [*asked, {"role": "assistant", "content": gold_response(config, example.answer)}]


def _plain(config: TaskConfig, examples: Sequence[Example], content: str | Messages, place: str) -> str:
    shown = ""
    for example in examples:
        [asked] = _split(config, example.content)[1]
        text = asked["content"]
        gap = "" if config.assistant_prefill or text[-1:].isspace() else "\n"
        shown += f"{text}{gap}{gold_response(config, example.answer)}\n\n"
    [asked] = _split(config, content)[1]
    return shown + asked["content"] + config.assistant_prefill


def gold_response(config: TaskConfig, answer: str) -> str:
    """The response with a gold answer as a few-shot example shows it, including the prefill."""
    prefill, opening = config.assistant_prefill, config.example_response.partition("{answer}")[0]
    text = config.example_response.replace("{answer}", answer)
    if text.startswith(prefill):
        return text
    return prefill + (text.removeprefix(opening) if prefill.endswith(opening) else text)


def _require_system_message(text: str, apply: ApplyChatTemplate) -> None:
    """Reject a system prompt that the template rejects, leaves out or, if empty, cannot do without."""
    probe = [{"role": "user", "content": "?"}]
    try:
        if not text:
            _without_system(apply, probe)
        elif text.strip() not in apply([{"role": "system", "content": text}, *probe]):
            raise UserError(
                f"task.system_prompt = {text!r} is left out by the tokenizer's chat template; remove it, or write it "
                f"into task.template"
            )
    except _REJECTIONS as error:
        raise UserError(
            f"task.system_prompt = {text!r}: the tokenizer's chat template rejects a system message ({error}); remove "
            f"it, or write it into task.template"
        ) from error


def _without_system(apply: ApplyChatTemplate, messages: Messages) -> str:
    """The conversation without the template's default system message.

    An empty system message replaces the default. Its turn is what a second one adds, and is cut out.
    """
    empty = {"role": "system", "content": ""}
    once, twice = apply([empty, *messages]), apply([empty, empty, *messages])
    length = len(twice) - len(once)
    end = next((i for i, (a, b) in enumerate(zip(once, twice, strict=False)) if a != b), len(once))
    is_turn = 0 <= length <= end and once[end - length : end] == twice[end : end + length]
    if not is_turn or (not length and once != apply(messages)):
        raise UserError(
            'task.system_prompt = "": the tokenizer\'s chat template always writes a system turn, which cannot be left '
            "out; remove the setting, or give a text"
        )
    return once[: end - length] + once[end:]
