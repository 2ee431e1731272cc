"""``forkrl chat``: through a pipe and a terminal, its prompts, and what it shows of a hostile model."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from forkrl.config import ModelConfig
from forkrl.model.policy import open_policy
from forkrl.rollout.embedded import Prefix, decode
from forkrl.types import SamplingParams
from tests.smoke.world import STALL_TIMEOUT_S, Outcome, Run, World, make_model, make_tokenizer

CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)
CHAT = CHAT.replace("{{ m['role'][0] }}", "{{ {'user': '+', 'assistant': '-', 'system': '*'}[m['role']] }}")
CHAT = CHAT.replace("%}a{%", "%}={%")


def chat(world: World, lines: str, *argv: str) -> Outcome:
    file = world.folder / "lines.txt"
    file.write_text(lines)
    return world.run("chat", *argv, stdin=str(file))


@pytest.fixture(scope="module")
def run(world: World) -> Run:
    return world.trained("run", "task.template=b{prompt}", "rollout.max_prompt_tokens=12")


def sampled(folder: Path, prompt: str, seed: int, temperature: float, limit: int) -> list[int]:
    """What the engine samples after a prompt."""
    policy = open_policy(ModelConfig(path=str(folder)), "cpu")
    ids = tuple(policy.tokenizer.encode(prompt))
    generator = torch.Generator().manual_seed(seed)
    [(_, rollout)] = decode(policy, [Prefix(ids)], SamplingParams(limit, temperature=temperature), generator)
    return list(rollout.response_ids)


def shown(ids: list[int]) -> str:
    return str(make_tokenizer().decode(ids)).removesuffix("<eos>")


def test_a_pipe_gets_responses_only(world: World, run: Run) -> None:
    outcome = chat(world, "1+2=\n\n1+2=\n/exit\n3+3=\n", "run", "--temperature", "0")
    assert outcome.code == 0
    expected = shown(sampled(run.last_checkpoint, "b1+2=", 0, 0, 6))
    assert outcome.stdout == f"{expected}\n" * 2
    first, *others = outcome.stderr.splitlines()
    assert first == (
        "forkrl: run: prompts as in its training; no chat template, so the model continues each message on its own"
    )
    assert all(line == "forkrl: cut off after 6 tokens (--max-tokens)" for line in others)


def test_the_prompt_of_a_run_is_that_of_its_training(world: World, run: Run) -> None:
    rollouts = pd.concat([pd.read_parquet(file) for file in (run.folder / "rollouts").glob("train-*.parquet")])
    prompt = str(rollouts["prompt"].iloc[0])
    outcome = chat(world, prompt.removeprefix("b"), "run@base", "--seed", "5")
    assert prompt.startswith("b") and outcome.stdout == shown(sampled(world.folder / "model", prompt, 5, 1, 6)) + "\n"


def test_seed_temperature_and_length(world: World, run: Run) -> None:
    long = chat(world, "1+2=\n", "model", "--max-tokens", "20", "--seed", "7", "--temperature", "0.5").stdout
    assert long == shown(sampled(world.folder / "model", "1+2=", 7, 0.5, 20)) + "\n"
    other = chat(world, "1+2=\n", "model", "--max-tokens", "20", "--seed", "8", "--temperature", "0.5").stdout
    assert other != long
    # The model has 64 positions.
    assert "cut off after 60 tokens (the model has no further positions)" in chat(world, "1+2=\n", "model").stderr or (
        len(sampled(world.folder / "model", "1+2=", 0, 1, 60)) < 60
    )
    outcome = chat(world, "1" * 64, "model")
    assert outcome.code == 2
    assert "the conversation has 64 tokens, and the model has 64 positions; /reset begins a new one" in outcome.stderr


def test_alternatives_are_those_of_the_model(world: World, run: Run) -> None:
    outcome = chat(world, "1+2=\n/alternatives\n", "model", "--max-tokens", "10", "--seed", "1")
    ids = sampled(world.folder / "model", "1+2=", 1, 1, 10)
    policy = open_policy(ModelConfig(path=str(world.folder / "model")), "cpu")
    whole = torch.tensor([policy.tokenizer.encode("1+2=") + ids])
    with torch.no_grad():
        probs = policy.logits(policy.hidden_states(whole)[0, 3:-1]).softmax(-1)
    entropy = -(probs * probs.log()).sum(-1)
    rows = outcome.stdout.splitlines()[2:]
    count = -(-len(ids) // 5)
    assert [int(row.split()[0]) - 1 for row in rows] == sorted(entropy.topk(count).indices.tolist())
    for row in rows:
        place = int(row.split()[0]) - 1
        text = policy.tokenizer.decode([ids[place]])
        assert row.split()[1] == f"{entropy[place]:.2f}"
        assert f"'{text}' {probs[place, ids[place]]:.1%}" in row
        best = int(probs[place].argmax())
        assert f"'{policy.tokenizer.decode([best])}' {probs[place, best]:.1%}" in row


def test_a_template_carries_the_conversation(own_world: World) -> None:
    make_model(own_world.folder / "model", initializer_range=1.0)  # what it says depends on all that it reads
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(own_world.folder / "model")
    asked = ("model", "--temperature", "0", "--max-tokens", "4", "--system", "ab")
    outcome = chat(own_world, "1+1\n2+2\n/reset\n2+2\n", *asked)
    assert "forkrl: model: the chat template, with the turns before" in outcome.stderr
    first = shown(sampled(own_world.folder / "model", "*ab+1+1=", 0, 0, 4))
    second = shown(sampled(own_world.folder / "model", f"*ab+1+1-{first}+2+2=", 0, 0, 4))
    alone = shown(sampled(own_world.folder / "model", "*ab+2+2=", 0, 0, 4))
    assert outcome.stdout == f"{first}\n{second}\n{alone}\n" and second != alone


def test_a_mixed_task_has_no_prompt_of_its_own(own_world: World) -> None:
    recipe = own_world.folder / "recipe.toml"
    part = '[task]\nname = "mix"\n\n[[task.parts]]\nname = "dataset"\n'
    recipe.write_text(recipe.read_text().replace('[task]\nname = "dataset"\n', part))
    run = own_world.trained("run", "training.steps=1", "eval.every=0")
    outcome = chat(own_world, "1+2=\n", "run", "--temperature", "0")
    assert (
        "forkrl: run: its task mixes several prompt formats, so prompts are not those of its training" in outcome.stderr
    )
    assert outcome.stdout == shown(sampled(run.last_checkpoint, "1+2=", 0, 0, 6)) + "\n"


MISTAKES: list[tuple[str, tuple[str, ...], str]] = [
    ("/alternatives\n", ("model",), "/alternatives: there is no response yet"),
    ("/altrnatives\n", ("model",), "/altrnatives: no such command; /help lists them"),
    ("z\n", ("model",), "the message: the tokenizer does not know 'z'"),
    ("1\n", ("model", "--system", "x"), "--system: the prompts of model have no chat template"),
    ("1\n", ("nowhere/model",), "model.path = 'nowhere/model'"),
    ("1\n", ("run@step-9",), "run/checkpoints: no checkpoint of step 9; available: step-4, step-6"),
    ("1\n", ("model", "--temperature", "-1"), "--temperature -1: must be at least 0"),
]


@pytest.mark.parametrize(("lines", "argv", "says"), MISTAKES)
def test_mistakes_are_one_line(world: World, run: Run, lines: str, argv: tuple[str, ...], says: str) -> None:
    outcome = chat(world, lines, *argv)
    assert outcome.code == 2 and outcome.stderr.splitlines()[-1].startswith(f"forkrl: {says}")


def test_a_closed_standard_input_is_one_line(world: World) -> None:
    command = f"{shlex.quote(sys.executable)} -m forkrl chat model <&-"
    outcome = subprocess.run(["bash", "-c", command], cwd=world.folder, capture_output=True, text=True, check=False)
    assert outcome.returncode == 2
    assert outcome.stderr.splitlines()[-1] == (
        "forkrl: standard input is closed; forkrl chat reads its messages from there"
    )


def test_help_lists_the_commands(world: World) -> None:
    outcome = chat(world, "/help\n", "model")
    assert [line.split()[0] for line in outcome.stdout.splitlines()] == ["/alternatives", "/reset", "/exit", "/help"]


def make_hostile_model(folder: Path) -> None:
    """A model whose tokens are escape sequences, line breaks and parts of a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    make_model(folder)
    words = ["<pad>", "<eos>", "1", "\x1b[2J", "\u202e", "\r", "\n", "<0xE6>", "<0xBC>", "<0xA2>"]
    vocabulary = {word: index for index, word in enumerate(words + [f"w{n}" for n in range(10)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def test_control_characters_of_a_model_are_escaped(own_world: World) -> None:
    folder = own_world.folder / "hostile"
    make_hostile_model(folder)
    outcome = chat(own_world, "1\n/alternatives\n" * 6, "hostile", "--max-tokens", "40", "--temperature", "3")
    assert outcome.code == 0, outcome.stderr
    assert "\\x1b[2J" in outcome.stdout and "\\u202e" in outcome.stdout and "\\x0d" in outcome.stdout
    assert "⏎\n" in outcome.stdout
    assert not set(outcome.stdout) & {"\x1b", "\u202e", "\r"}


def test_tokens_that_share_a_character_are_shown_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from forkrl.commands import chat as command

    make_hostile_model(tmp_path)
    parts: list[str] = []
    monkeypatch.setattr(command, "show", lambda text, end="\n": parts.append(text.plain))
    stream = command._Stream(open_policy(ModelConfig(path=str(tmp_path)), "cpu"), (1,))
    for token in (2, 7, 8, 9, 2, 7, 1):
        stream.add(torch.tensor([token]), torch.tensor([0.5]))
    stream.end()
    assert parts == ["1", "漢", "1", "\ufffd", ""]


class Terminal:
    """A command at a pseudo-terminal."""

    def __init__(self, world: World, *argv: str) -> None:
        self.main, other = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "forkrl", *argv], cwd=world.folder, env=environment, stdin=other, stdout=other,
            stderr=other, start_new_session=True,
        )  # fmt: skip
        os.close(other)
        self.text = ""

    def write(self, text: str) -> None:
        os.write(self.main, text.encode())

    def read_until(self, pattern: str) -> None:
        """Read on until the rest of the text has the pattern."""
        start, deadline = len(self.text), time.monotonic() + STALL_TIMEOUT_S
        while not re.search(pattern, self.text[start:], re.DOTALL):
            assert time.monotonic() < deadline, self.text
            if select.select([self.main], [], [], 1)[0]:
                self.text += os.read(self.main, 4096).decode(errors="replace")


def test_a_terminal_has_a_prompt_colours_and_keys(world: World) -> None:
    make_model(world.folder / "long", max_position_embeddings=200_000)
    terminal = Terminal(world, "chat", "long", "--max-tokens", "100000", "--temperature", "0.2")
    terminal.read_until("> ")
    terminal.write("1+2=\n")
    terminal.read_until(r"\x1b\[[0-9;]*48;2;")
    terminal.process.send_signal(signal.SIGINT)
    terminal.read_until("> ")
    assert "cut off" not in terminal.text
    terminal.write("z\n")
    terminal.read_until("forkrl: the message: the tokenizer does not know.*> ")
    terminal.write("/alternatives\n")
    terminal.read_until("position +entropy +after +sampled.*> ")
    terminal.write("\x04")
    assert terminal.process.wait(STALL_TIMEOUT_S) == 0
