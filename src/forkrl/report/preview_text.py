"""``forkrl preview`` on a terminal or in a log. Prompts and responses are escaped, never read as markup."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from forkrl.errors import lost_terminal_ignored, printable, write_line
from forkrl.report.colors import coloured_response, entropy_legend, top_entropy

SHOWN_RESPONSES = 2
SHOWN_TOKENS = 600
_SHOWN_GOLDS, _SHOWN_CHARACTERS, _UNCERTAIN, _BAR = 3, 100, 3, 40
Record = Mapping[str, Any]


def show(text: Text, end: str = "\n") -> None:
    """Print to standard output, in colour on a terminal."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        write_line(sys.stdout, text.plain, end)
        return
    with lost_terminal_ignored():
        console.print(text, soft_wrap=True, end=end)


def data_report(record: Record) -> Text:
    """What was found in the data, one line each."""
    examples = f", {record['examples']} few-shot examples" if record["examples"] else ""
    text = Text(printable(f"{record['recipe']}: {record['task']}"), style="bold", end="")
    text.append(
        f"\n{record['training']:,} training and {record['held_out']:,} held-out questions{examples}\n", "not bold"
    )
    lengths = record["prompt_tokens"]
    shown = ", ".join(f"{name} {length:.0f}" for name, length in lengths["lengths"].items())
    over = f"; {lengths['over']:,} LONGER THAN" if lengths["over"] else "; all within"
    _line(text, "prompt tokens", f"{shown}{over} rollout.max_prompt_tokens = {lengths['limit']}", bad=lengths["over"])
    _details(text, [f"at {place}" for place in lengths["first_over"]])
    _gold_lines(text, record["golds"])
    _repeated_lines(text, "duplicates", "dropped", record["duplicates"])
    _repeated_lines(text, "overlap", "of training dropped, because held out", record["overlap"])
    _benchmark_lines(text, record["benchmarks"])
    return text


def _line(text: Text, name: str, value: str, *, bad: object = False) -> None:
    text.append(f"\n  {name:14}", "bold").append(printable(value), "red not bold" if bad else "not bold")


def _details(text: Text, lines: Sequence[str]) -> None:
    for line in lines:
        text.append(f"\n{' ' * 18}{printable(line)}", "not bold")


def _repeated_lines(text: Text, name: str, dropped: str, found: Record) -> None:
    values = [f"{found['dropped']:,} {dropped}"] if found["dropped"] else []
    if kept := found["kept"]:
        values.append(f"{kept:,} not dropped: the answers differ, or they are in different parts")
    _line(text, name, "; ".join(values) or "none", bad=kept)
    _details(text, found["first"])


def _gold_lines(text: Text, golds: Record) -> None:
    failed, unchecked = golds["failed"], golds["unchecked"]
    right = golds["checked"] - len(failed)
    value = f"{right:,} of {golds['checked']:,} get full reward from their verifier" if golds["checked"] else ""
    if unchecked:
        value += f"{'; ' if value else ''}{unchecked:,} are not checked: {golds['why_unchecked']}"
    _line(text, "gold answers", value, bad=failed)
    for gold in failed[:_SHOWN_GOLDS]:
        why = f"the verifier fails ({gold['failure']})" if gold["failure"] else f"scores {gold['score']:g}"
        read = f", read as {_short(gold['read'])}" if gold["read"] else ""
        _details(text, [f"{gold['place']}: {_short(gold['answer'])} {why}{read}"])
    _details(text, [f"… {len(failed) - _SHOWN_GOLDS:,} more (all with --json)"] if len(failed) > _SHOWN_GOLDS else [])
    _details(text, [f"first error: {golds['error']}"] if failed and golds["error"] else [])
    for source in golds["unread"]:
        name = f"{source}: " if source else ""
        why = "no common form of writing an answer is accepted by this verifier; set task.answer_format"
        _details(text, [f"warning: {name}{why}"])


def _benchmark_lines(text: Text, found: Record) -> None:
    compared, missing = found["compared"], found["missing"]
    if not compared and not missing:
        return
    shared = {name: each for name, each in compared.items() if each["training"] or each["held_out"]}
    values = [f"questions of {', '.join(shared)} are in the data"] if shared else []
    if clean := [name for name in compared if name not in shared]:
        values.append(f"no questions of {', '.join(clean)}")
    _line(text, "benchmarks", "; ".join(values) or "not compared", bad=shared)
    for name, each in shared.items():
        first = ", ".join(each["first"])
        _details(text, [f"{name}: {each['training']:,} in training, {each['held_out']:,} held out, the first: {first}"])
    if missing:
        _details(text, [f"no local copy of {', '.join(missing)}: give --mirror DIR"])


def prompts_report(record: Record, *, token_ids: bool) -> Text:
    """Prompts as the model reads them, and responses coloured by entropy."""
    prompts = record["prompts"]
    top = top_entropy(value for prompt in prompts for response in prompt["responses"] for value in response["entropy"])
    text = Text(end="")
    if sampling := record.get("sampling"):
        limit = sampling["max_response_tokens"]
        how = "with vLLM, " if sampling["engine"] == "vllm" else ""
        how += f"temperature {sampling['temperature']:g}, at most {limit:,} tokens"
        text.append(f"\nResponses are sampled as in training: {how}.\n")
    for number, prompt in enumerate(prompts, start=1):
        length = len(prompt["token_ids"])
        heading = f"Prompt {number} of {len(prompts)} ({prompt['place'].removeprefix('prompt ')}): {length:,} tokens"
        text.append(f"\n{printable(heading)}\n", "bold").append(_lines(prompt["text"])).append("⟨response⟩\n", "dim")
        if token_ids:
            text.append(_with_ids(prompt)).append("\n")
        if prompt["answer"] is not None:
            text.append("gold answer: ", "bold").append(f"{_short(prompt['answer'])}\n")
        for index, response in _chosen(prompt["responses"]):
            _append_response(text, index, response, top, token_ids=token_ids)
        if responses := prompt["responses"]:
            right = sum(response["score"] == 1 for response in responses)
            text.append("pass rate: ", "bold").append(f"{right} of {len(responses)} responses\n")
    if any(prompt["responses"] for prompt in prompts) and Console().is_terminal:
        text.append("\nentropy ").append_text(entropy_legend(top)).append("\n")
    return text


def _chosen(responses: Sequence[Record]) -> list[tuple[int, Record]]:
    """The first response of the highest and of the lowest score, or the first two."""
    numbered = list(enumerate(responses, start=1))
    if len({response["score"] for response in responses}) > 1:
        numbered.sort(key=lambda pair: -pair[1]["score"])
        worst = numbered[-1][1]["score"]
        numbered = [numbered[0], next(pair for pair in numbered if pair[1]["score"] == worst)]
    return numbered[:SHOWN_RESPONSES]


def _append_response(text: Text, index: int, response: Record, top: float, *, token_ids: bool) -> None:
    tokens, entropy = response["tokens"], response["entropy"]
    facts = [f"score {response['score']:g}", f"{len(tokens):,} tokens"]
    if response["failure"]:
        facts[0] = f"not judged ({response['failure']})"
    if response["answer"] is not None:
        facts.insert(1, f"answer {_short(response['answer'])}" if response["answer"] else "no answer found")
    if not response["finished"]:
        facts.append("cut off at rollout.max_response_tokens")
    if tokens:
        facts.append(f"mean entropy {sum(entropy) / len(entropy):.2f} nats")
    style = "bold green" if response["score"] == 1 else "bold red"
    text.append(f"response {index}: ", "bold").append(f"{', '.join(facts)}\n", style)
    text.append_text(coloured_response(tokens[:SHOWN_TOKENS], entropy[:SHOWN_TOKENS], top=top))
    text.append(f" … {len(tokens) - SHOWN_TOKENS:,} more tokens\n" if len(tokens) > SHOWN_TOKENS else "\n")
    if token_ids:
        text.append(_with_ids(response)).append("\n")
    order = sorted(range(len(tokens)), key=lambda place: -entropy[place])[:_UNCERTAIN]
    highest = ", ".join(f"{tokens[place]!r} {entropy[place]:.2f}" for place in order)
    text.append(f"highest entropies: {printable(highest)}\n" if tokens else "", "dim")


def _lines(text: str) -> str:
    """Escaped, with line breaks kept and marked."""
    return "⏎\n".join(map(printable, text.split("\n")))


def _with_ids(tokens: Record) -> str:
    pairs = zip(tokens["token_ids"], tokens["tokens"], strict=True)
    return "token ids: " + "  ".join(f"{id} {printable(repr(token))}" for id, token in pairs)


def pass_rates_report(record: Record) -> Text:
    rates = record["pass_rates"]
    count = len(rates["prompts"])
    text = Text(end="")
    text.append(f"\nPass rates of {count:,} training prompts, {rates['samples']} responses each\n", "bold")
    for name, number in rates["bins"].items():
        text.append(f"  {name:>10}  {number:>7,}  {'█' * round(_BAR * number / count)}\n")
    passed = sum(rate["passed"] for rate in rates["prompts"]) / (count * rates["samples"])
    equal = sum(not rate["informative"] for rate in rates["prompts"])
    gradient = f"; {equal:,} prompts have responses of equal scores, which gives no gradient"
    text.append(f"mean {passed:.3f}{gradient if rates['samples'] > 1 else ''}\n")
    text.append(printable(f"by prompt: {rates['folder']}/pass-rates") + "\n")
    if rates["failures"]:
        text.append(f"{rates['failures']:,} responses could not be judged and count as wrong\n", "red")
    return text


def kept_report(record: Record) -> Text:
    kept = record["pass_rates"]["kept"]
    low, high = kept["interval"]
    others = kept["rows"] - kept["questions"]
    more = f", and {others:,} held-out questions and examples" if others else ""
    text = Text(end="")
    text.append(
        printable(f"kept {kept['questions']:,} with a pass rate from {low:g} to {high:g}{more}: {kept['file']}") + "\n"
    )
    replaced = {each.partition("=")[0] for each in kept["overrides"]}
    overrides = [each for each in record["overrides"] if each.partition("=")[0].strip() not in replaced]
    command = shlex.join(["forkrl", "train", record["recipe"], *overrides, *kept["overrides"]])
    return text.append(printable(f"train on them: {command}"), "bold")


def _short(value: str) -> str:
    return repr(value) if len(value) <= _SHOWN_CHARACTERS else f"{value[:_SHOWN_CHARACTERS]!r}…"
