"""A world small enough to train in a second: a random model of a few thousand weights, prompts, a verifier, a recipe.

Everything goes through the real command line, in processes of their own (``launcher.py``).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.processes import state, wait_until

STALL_TIMEOUT_S = 300.0
ALPHABET = "0123456789+-*/=ab "
VERIFIER = '''"""Pays for a response that begins with one of the characters of the answer."""

import os
import signal


def first_character(answer, response):
    return float(response[:1] in tuple(answer))


def nobody(answer, response):
    return 0.0
'''
RECIPE = """\
seed = 3

[model]
path = "model"

[task]
name = "dataset"
data = "prompts.jsonl"
held_out_rows = 8
verifier = "first_character:first_character"

[rollout]
prompts_per_step = 4
group_size = 8
max_prompt_tokens = 8
max_response_tokens = 6
max_sequences = 64

[reward]
overlong_cache = 0

[dynamic_sampling]
max_generation_batches = 3

[optimizer]
lr = 1e-2

[training]
steps = 6
mini_batch_prompts = 2
micro_batch_tokens = 20

[eval]
every = 3
problems = 8
samples = 2

[checkpoint]
every = 2
keep = 2

[log]
rollouts_every = 2
rollouts_sampled = 8

[runtime]
device = "cpu"
"""


PROGRESS = re.compile(r"^(?!forkrl: ).*  \d+/\d+  [\d.]+ (s|min).*\n", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """How a command ended. ``code`` is negative where a signal killed it."""

    code: int
    stdout: str
    stderr: str

    @property
    def line(self) -> str:
        """The one line on standard error of a command that failed, after lines of progress on a slow machine."""
        lines = PROGRESS.sub("", self.stderr)
        assert lines.endswith("\n") and lines.count("\n") == 1, f"not one line: {self.stderr!r}"
        return lines[:-1]


@dataclass
class Started:
    """A command under way."""

    pid: int
    launcher: Launcher
    files: dict[str, Path]

    def wait(self) -> Outcome:
        """Its outcome, once it has ended."""
        deadline = time.monotonic() + STALL_TIMEOUT_S
        while (code := self.launcher.ask({"wait": self.pid})) is None:
            assert time.monotonic() < deadline, f"still running: {self.files['stdout'].read_text()}"
            time.sleep(0.005)
        return Outcome(code, **{name: path.read_text() for name, path in self.files.items()})

    def wait_until_stopped(self) -> None:
        """Until a SIGSTOP has reached it."""
        assert wait_until(lambda: state(self.pid) == "T", STALL_TIMEOUT_S)

    def send(self, signum: int) -> None:
        os.kill(self.pid, signum)


@dataclass
class Launcher:
    """The process that forks the commands; see ``launcher.py``. With ``accelerator``, all have the pretend one."""

    scratch: Path
    accelerator: bool = False
    _process: subprocess.Popen[str] = field(init=False)
    _count: int = 0

    def __post_init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.smoke.launcher", *(["--accelerator"] if self.accelerator else [])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def ask(self, request: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, cwd: Path, **request: Any) -> Started:
        """Start a command (``argv``) or a test, with all that ``launcher.py`` knows to arrange."""
        self._count += 1
        files = {name: self.scratch / f"{self._count}.{name}" for name in ("stdout", "stderr")}
        pid = self.ask({"cwd": str(cwd), **{name: str(path) for name, path in files.items()}, **request})
        return Started(pid, self, files)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(STALL_TIMEOUT_S)


@dataclass(frozen=True)
class World:
    """A folder with a model, prompts, a verifier and a recipe, and commands that run in it."""

    folder: Path
    launcher: Launcher

    def start(self, *argv: str | Path, **how: Any) -> Started:
        """Start ``forkrl ARGV``. ``how``: faults, disk, stdin, environment, without_report of ``launcher.py``."""
        return self.launcher.start(self.folder, argv=[str(part) for part in argv], **how)

    def run(self, *argv: str | Path, **how: Any) -> Outcome:
        """Run ``forkrl ARGV`` to its end."""
        return self.start(*argv, **how).wait()

    def train(self, out: str, *overrides: str, **how: Any) -> Outcome:
        return self.run("train", "recipe.toml", *overrides, "--out", out, **how)

    def trained(self, out: str, *overrides: str) -> Run:
        """A run that has to succeed; its report is left out."""
        outcome = self.train(out, *overrides, without_report=True)
        assert outcome.code == 0, outcome.stderr
        return Run(self.folder / out, outcome)

    def resumed(self, out: str) -> Run:
        """A run taken up again, which has to succeed; its report is left out."""
        outcome = self.run("train", "--resume", out, without_report=True)
        assert outcome.code == 0, outcome.stderr
        return Run(self.folder / out, outcome)


@dataclass(frozen=True)
class Run:
    """What a finished run left behind, read without ForkRL."""

    folder: Path
    outcome: Outcome

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def column(self, name: str) -> list[float]:
        return [record[name] for record in self.metrics if name in record]

    @property
    def timeless(self) -> list[dict[str, Any]]:
        """The metrics without the clock."""
        left_out = ("time/", "rollout/tokens_per_s")
        return [
            {key: value for key, value in record.items() if not key.startswith(left_out)} for record in self.metrics
        ]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())

    @property
    def last_checkpoint(self) -> Path:
        return max((self.folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))

    @property
    def weights(self) -> bytes:
        return (self.last_checkpoint / "model.safetensors").read_bytes()

    def bits(self) -> dict[str, Any]:
        """All that a run is, but for the clock: metrics, samples, and every byte of its last checkpoint."""
        last = self.last_checkpoint
        return {
            "metrics": self.timeless,
            "rollouts": {path.name: path.read_bytes() for path in (self.folder / "rollouts").iterdir()},
            "checkpoint": {
                path.relative_to(last.parent).as_posix(): _checkpoint_file(path)
                for path in last.rglob("*")
                if path.is_file() and path.name != "manifest.json"  # digests of the rest, progress.json among them
            },
        }


def _checkpoint_file(path: Path) -> Any:
    if path.name != "progress.json":
        return path.read_bytes()
    progress = json.loads(path.read_text())
    del progress["metrics_bytes"]  # how long the log is depends on how many digits the clock gave
    return progress


def make_template(folder: Path) -> None:
    """The files of a world."""
    make_model(folder / "model")
    write_prompts(folder / "prompts.jsonl")
    (folder / "first_character.py").write_text(VERIFIER)
    (folder / "recipe.toml").write_text(RECIPE)


def write_prompts(path: Path, rows: Sequence[Mapping[str, Any]] | None = None) -> None:
    """24 questions, all answered by any odd digit; or the given rows."""
    rows = rows or [{"prompt": f"{left}+{right}=", "answer": "13579"} for left in range(6) for right in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ("<pad>", "<eos>", *ALPHABET)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_model(folder: Path, **changes: Any) -> None:
    """One layer, random weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": len(ALPHABET) + 2, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
        "initializer_range": 0.2, "tie_word_embeddings": True, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(11)
    Qwen3ForCausalLM(Qwen3Config(**(sizes | changes))).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def copy_world(template: Path, folder: Path, launcher: Launcher) -> World:
    shutil.copytree(template, folder, dirs_exist_ok=True)
    return World(folder, launcher)
