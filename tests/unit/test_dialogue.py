"""Conversations as exact tokens, and how batches treat tokens that the model did not write."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from forkrl.config import TaskConfig, TrainConfig
from forkrl.errors import UserError
from forkrl.method.batches import collate
from forkrl.rollout.dialogue import Dialogue, require_continuable
from forkrl.rollout.endpoint import ChatRequest, Endpoint
from forkrl.tasks import open_task
from forkrl.tasks.environment import EnvironmentProcess
from forkrl.training.rollout_rows import rollout_rows
from forkrl.training.sft import build_character_tokenizer
from forkrl.types import Prompt, Rollout, RolloutGroup, VerifierResult

TEMPLATE = (
    "{% for m in messages %}{{ {'user': '?', 'assistant': '!', 'tool': '#', 'system': '%'}[m.role] }}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
)
EOS = 1


def chat_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = build_character_tokenizer('0123456789 ?!#%hl<>{}":,_/abcdefgijkmnoprstuvwxyz')
    tokenizer.chat_template = template
    return tokenizer


def turn(tokenizer: PreTrainedTokenizerFast, text: str, *, finished: bool = True) -> Rollout:
    ids = (*tokenizer.encode(text, add_special_tokens=False), *([EOS] if finished else []))
    figures = torch.arange(len(ids)).float() / 10
    return Rollout((), ids, -figures, figures, text, finished)


def hear(dialogue: Dialogue, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> None:
    dialogue.hear(messages, tools, dialogue.heard(messages, tools))


@pytest.mark.parametrize("finished", [True, False])
def test_the_tokens_of_a_conversation_are_those_of_its_text(finished: bool) -> None:
    tokenizer = chat_tokenizer()
    dialogue, messages = Dialogue(tokenizer, {}), [{"role": "user", "content": "12"}]
    hear(dialogue, messages)
    messages = [*messages, dialogue.say(turn(tokenizer, "45", finished=finished)), {"role": "tool", "content": "h"}]
    hear(dialogue, messages)
    messages.append(dialogue.say(turn(tokenizer, "7")))
    rollout = dialogue.rollout(VerifierResult(1.0), ())
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == "?12!45<eos>#h!7<eos>"
    assert list(rollout.prompt_ids + rollout.response_ids) == tokenizer.encode(whole, add_special_tokens=False)
    own = [3, 2] if finished else [2, 2]
    assert rollout.written == (True,) * own[0] + (False,) * (6 - own[0]) + (True,) * own[1]
    assert len(rollout) == sum(own) == len(rollout.logprobs) == len(rollout.entropy)
    assert rollout.finished


def test_content_in_parts_is_joined_and_images_are_refused() -> None:
    tokenizer = chat_tokenizer()
    dialogue = Dialogue(tokenizer, {})
    parts = [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]
    assert dialogue.heard([{"role": "user", "content": parts}], None) == tokenizer.encode("?12!")
    with pytest.raises(UserError, match="images or other content"):
        dialogue.heard([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda asked, reply: [{**asked, "content": "9"}, reply, asked], "does not continue the conversation"),
        (lambda asked, reply: [asked, {**reply, "content": "9"}, asked], "does not continue the conversation"),
        (lambda asked, reply: [asked, reply], "does not continue the conversation"),
        (lambda asked, reply: [asked, reply, reply, asked], "that the model did not write"),
    ],
)
def test_a_request_that_rewrites_the_conversation_is_refused(change: Any, message: str) -> None:
    tokenizer = chat_tokenizer()
    dialogue, asked = Dialogue(tokenizer, {}), {"role": "user", "content": "1"}
    hear(dialogue, [asked])
    reply = dialogue.say(turn(tokenizer, "2"))
    with pytest.raises(UserError, match=message):
        dialogue.heard(change(asked, reply), None)


def test_a_template_that_drops_thoughts_is_refused_in_one_sentence() -> None:
    only_last = "{% if m.role == 'assistant' and not loop.last %}0{% else %}{{ m.content }}{% endif %}"
    tokenizer = chat_tokenizer(TEMPLATE.replace("{{ m.content }}", only_last))
    dialogue, asked = Dialogue(tokenizer, {}), {"role": "user", "content": "1"}
    hear(dialogue, [asked])
    reply = dialogue.say(turn(tokenizer, "2"))
    with pytest.raises(UserError, match=r"chat template changes earlier turns .*; take another model or template"):
        dialogue.heard([asked, reply, asked], None)


def test_a_template_is_tried_before_anything_is_sampled() -> None:
    require_continuable(chat_tokenizer(), {})
    only_last = "{% if m.role == 'assistant' and not loop.last %}0{% else %}{{ m.content }}{% endif %}"
    with pytest.raises(UserError, match="changes earlier turns once a message follows"):
        require_continuable(chat_tokenizer(TEMPLATE.replace("{{ m.content }}", only_last)), {})
    refusing = chat_tokenizer(TEMPLATE + "{% if messages | length > 1 %}{{ raise_exception('no replies') }}{% endif %}")
    with pytest.raises(UserError, match="chat template fails for messages of user, assistant: no replies"):
        require_continuable(refusing, {})


def test_calls_with_arguments_in_a_string_and_endless_ones() -> None:
    tokenizer = chat_tokenizer("{% if tools %}%{% endif %}" + TEMPLATE)
    dialogue = Dialogue(tokenizer, {})
    hear(dialogue, [{"role": "user", "content": "1"}], [{"type": "function", "function": {"name": "add"}}])
    written = json.dumps({"name": "add", "arguments": '{"a": 1}'})
    text = f"<tool_call>{written}</tool_call><tool_call>" + '{"name": "add", "arguments": "1, 2"}</tool_call>'
    [call] = dialogue.say(turn(tokenizer, text))["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}
    # A search from every start took minutes.
    assert "tool_calls" not in dialogue.say(turn(tokenizer, '<tool_call>\n{"name": ' * 20_000))


def test_calls_of_tools_are_read_from_the_turn() -> None:
    tokenizer = chat_tokenizer("{% if tools %}%{{ tools[0].function.name }}{% endif %}" + TEMPLATE)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    dialogue, asked = Dialogue(tokenizer, {}), {"role": "user", "content": "1"}
    hear(dialogue, [asked], tools)
    assert tokenizer.decode(list(dialogue.prompt_ids)) == "%add?1!"
    text = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><tool_call>{"name"}</tool_call>'
    message = dialogue.say(turn(tokenizer, text))
    [call] = message["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'} and call["type"] == "function"
    # The environment returns the message, and the tool's output after it.
    result = {"role": "tool", "tool_call_id": call["id"], "content": "3"}
    assert tokenizer.decode(dialogue.heard([asked, message, result], tools)) == "#3!"
    with pytest.raises(UserError, match="does not show tools"):
        Dialogue(chat_tokenizer(), {}).heard([asked], tools)


def test_a_prefix_leaves_the_room_that_is_left() -> None:
    tokenizer = chat_tokenizer()
    dialogue = Dialogue(tokenizer, {})
    hear(dialogue, [{"role": "user", "content": "12345"}])
    prefix = dialogue.prefix(3, 7)
    assert prefix.ids == dialogue.prompt_ids and 7 - len(prefix.response_ids) == 3
    assert dialogue.prefix(7, 7).response_ids == ()


def two_turns() -> Rollout:
    written = (True, True, False, False, True)
    return Rollout((5, 6), (7, 1, 8, 9, 1), -torch.ones(3), torch.tensor([0.1, 0.2, 0.3]), "", True, written)


def test_a_batch_masks_what_the_model_did_not_write() -> None:
    groups = [RolloutGroup(Prompt("a", "", ""), (two_turns(),), (VerifierResult(1.0),))]
    batch = collate(groups, torch.ones(1, 1), pad_id=0)
    assert batch.targets.tolist() == [[6, 7, 1, 8, 9, 1]]
    assert batch.response_mask.tolist() == [[False, True, True, False, False, True]]
    assert batch.old_logprobs.tolist() == [[0, -1, -1, 0, 0, -1]]
    assert batch.rollout_entropy[0].tolist() == pytest.approx([0, 0.1, 0.2, 0, 0, 0.3])
    assert list(batch.rows_by_prompt()) == [(5, 6)]


def test_a_row_of_rollouts_has_no_figures_where_the_model_did_not_write() -> None:
    groups = [RolloutGroup(Prompt("a", "", ""), (two_turns(),), (VerifierResult(1.0),))]
    [row] = rollout_rows(1, groups, chat_tokenizer(), [[False, True, True]])
    assert [math.isnan(each) for each in row["entropy"]] == [False, False, True, True, False]
    assert [math.isnan(each) for each in row["logprobs"]] == [False, False, True, True, False]
    assert row["selected"] == [False, True, False, False, True]
    assert len(row["tokens"]) == len(row["token_ids"]) == 5


def ask(endpoint: Endpoint, path: str, body: dict[str, Any] | None = None, key: str = "") -> tuple[int, dict[str, Any]]:
    headers = {"Authorization": f"Bearer {key or endpoint.key}", "X-Session-ID": "7-x"}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint.url + path, data, headers), timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_endpoint_speaks_openai_s_protocol() -> None:
    def reply(request: ChatRequest) -> None:
        request.answer({"session": request.session, "asked": request.body["messages"]})

    endpoint = Endpoint(reply)
    try:
        messages = [{"role": "user", "content": "1"}]
        assert ask(endpoint, "/models")[1]["data"][0]["id"] == "forkrl"
        assert ask(endpoint, "/chat/completions", {"messages": messages}) == (
            200,
            {"session": "7-x", "asked": messages},
        )
        assert ask(endpoint, "/chat/completions", {"messages": messages}, key="other")[0] == 401
        assert ask(endpoint, "/chat/completions", {"messages": messages, "stream": True})[0] == 400
        assert ask(endpoint, "/chat/completions", {"messages": []})[0] == 400
        assert ask(endpoint, "/completions", {"prompt": "1"})[0] == 404
    finally:
        endpoint.close()


def test_a_missing_package_is_refused_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'forkrl\[environments\]'"):
        EnvironmentProcess(TaskConfig(name="environment", environment="guess_number"))


def test_other_commands_refuse_an_environment() -> None:
    with pytest.raises(UserError, match="is for forkrl train"):
        open_task(TaskConfig(name="environment", environment="guess_number"), chat_tokenizer())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"backward": "forks_only"}}, 'set it to "dense"'),
        ({"reward": {"terms": [{"name": "a", "verifier": "m:f"}]}}, "let the environment compute the whole reward"),
        ({"task": {"name": "environment"}}, "task.environment is empty"),
        ({"task": {"name": "countdown", "max_turns": 3}}, 'task.max_turns is for task.name = "environment"'),
    ],
)
def test_settings_that_do_not_go_with_an_environment(sections: dict[str, Any], message: str) -> None:
    task = {"name": "environment", "environment": "guess_number"}
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate({"task": task} | sections)
