"""``forkrl push``: what is uploaded of a run, what stays on the machine, and what goes wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from forkrl.cli import main
from forkrl.commands import push
from tests.smoke.world import Run, World

MODEL = {"config.json", "generation_config.json", "model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
PAGES = {"README.md", "learning.svg", "report.html"}


@pytest.fixture(scope="module")
def run(world: World) -> Run:
    """Its model, data and folder are given by absolute paths."""
    folder = world.folder
    return world.trained("run", f"model.path={folder}/model", f"task.data={folder}/prompts.jsonl", "eval.every=4")


@pytest.fixture
def here(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """The world as the current folder of this process, which has a token."""
    monkeypatch.chdir(world.folder)
    monkeypatch.setenv("HF_TOKEN", "hf_s3cret")
    return world


def dry_run(world: World, run: str) -> Path:
    outcome = world.run("push", run, "me/tiny", "--dry-run", environment={"HF_TOKEN": "hf_s3cret"})
    assert (outcome.code, outcome.stderr) == (0, "")
    folder = world.folder / run.partition("@")[0] / "hub"
    assert outcome.stdout.splitlines()[-1] == (
        f"{folder.relative_to(world.folder)}: what would be uploaded to me/tiny; drop --dry-run to do so"
    )
    listed = {line.split()[0]: line.split()[1] for line in outcome.stdout.splitlines()[1:-1]}
    sizes = {path: (folder / path).stat().st_size for path in files(folder)}
    assert listed == {path: f"{size:,}" for path, size in sizes.items()}
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def assert_nothing_of_this_machine(folder: Path, world: World) -> None:
    for path in files(folder):
        content = (folder / path).read_bytes()
        for secret in (str(world.folder), str(world.folder.parent), "hf_s3cret", str(Path.home())):
            assert secret.encode() not in content, (path, secret)


def card(folder: Path) -> tuple[dict[str, Any], str]:
    found = ModelCard.load(folder / "README.md")
    return found.data.to_dict(), found.text


def test_a_dry_run_writes_model_tokenizer_card_and_report(world: World, run: Run) -> None:
    folder = dry_run(world, "run")
    assert files(folder) == MODEL | TOKENIZER | PAGES
    assert (folder / "model.safetensors").read_bytes() == run.weights
    assert_nothing_of_this_machine(folder, world)
    AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).encode("1+2")
    assert "<svg" in (folder / "learning.svg").read_text()
    metadata, text = card(folder)
    assert metadata["library_name"] == "transformers"
    assert "forkrl" in metadata["tags"] and "base_model" not in metadata
    assert "| base model | a local model |" in text and "| checkpoint | after step 6 of 6 |" in text
    assert "| tokens that carried gradient | rule top_entropy, ratio 0.2, scope micro_batch, entropy current |" in text
    for record, what in ((run.metrics[0], "before training"), (run.metrics[-1], "step 6, this checkpoint")):
        mean, low, high = (100 * record[f"eval/accuracy{end}"] for end in ("", "_low", "_high"))
        assert f"| {what} | {mean:.1f}% [{low:.1f}, {high:.1f}] |" in text
    assert "paired by problem" in text and "forkrl 0." in text and 'rule = "top_entropy"' in text
    [command] = re.findall(r"```bash\n(.*)\n```", text)
    assert command.startswith("forkrl train seed=3 model.path=model ") and "task.data=prompts.jsonl" in command


def test_the_command_of_the_card_repeats_the_run(world: World, run: Run) -> None:
    [command] = re.findall(r"```bash\n(.*)\n```", card(dry_run(world, "run"))[1])
    outcome = world.run(*command.split()[1:], "--out", "repeated", without_report=True)
    assert outcome.code == 0, outcome.stderr
    assert Run(world.folder / "repeated", outcome).weights == run.weights


def test_a_step_that_was_not_evaluated_says_so(world: World, run: Run) -> None:
    (world.folder / "run/hub").mkdir(exist_ok=True)
    (world.folder / "run/hub/of-an-earlier-call").touch()
    folder = dry_run(world, "run@step-4")
    assert files(folder) == MODEL | TOKENIZER | PAGES
    _, text = card(folder)
    assert "| checkpoint | after step 4 of 6 |" in text
    assert "| step 4, this checkpoint |" in text and "paired by problem" not in text


def test_an_adapter_names_no_folder_of_this_machine(world: World) -> None:
    pytest.importorskip("peft")
    run = world.trained("lora", "lora.rank=2", "checkpoint.merged=true", "training.steps=2")
    folder = dry_run(world, "lora")
    merged = {f"merged/{name}" for name in MODEL | TOKENIZER}
    adapter = {"adapter_model.safetensors", "adapter_config.json", "base_model.json"}
    assert files(folder) == adapter | merged | TOKENIZER | PAGES
    assert_nothing_of_this_machine(folder, world)
    settings = json.loads((folder / "adapter_config.json").read_text())
    saved = json.loads((run.last_checkpoint / "adapter_config.json").read_text())
    assert settings == saved | {"base_model_name_or_path": "a local model"}
    base = json.loads((folder / "base_model.json").read_text())
    assert base["path"] == "a local model" and len(base["sha256"]) == 64
    assert load_file(folder / "adapter_model.safetensors").keys()
    metadata, text = card(folder)
    assert metadata["library_name"] == "peft" and "a LoRA adapter of rank 2" in text


def test_a_run_with_a_written_credential_is_not_uploaded(own_world: World) -> None:
    own_world.trained("run", "training.steps=1", "eval.every=0")
    config = own_world.folder / "run/config.toml"
    config.write_text(config.read_text().replace("[task.verifier_options]", '[task.verifier_options]\napi_key = "s3"'))
    outcome = own_world.run("push", "run", "me/tiny", "--dry-run")
    assert outcome.code == 2 and "task.verifier_options.api_key: is written out" in outcome.line
    assert not (own_world.folder / "run/hub").exists()


class Hub:
    """The calls of the hub's library, noted."""

    def __init__(self, *, private: bool = False, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.private, self.error = private, error

    def __call__(self, **_: Any) -> Hub:
        return self

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(("repo", (name, private, exist_ok)))

    def model_info(self, name: str, revision: str | None = None) -> SimpleNamespace:
        there = (
            "README.md",
            "notes.md",
            "model-00001-of-00002.safetensors",
            "merged/config.json",
            "adapter_config.json",
        )
        return SimpleNamespace(private=self.private, siblings=[SimpleNamespace(rfilename=name) for name in there])

    def create_branch(self, name: str, *, branch: str, exist_ok: bool) -> None:
        self.calls.append(("branch", (name, branch, exist_ok)))

    def create_commit(self, name: str, operations: Any, *, commit_message: str, revision: str | None) -> Any:
        added: list[Any] = [each for each in operations if isinstance(each, CommitOperationAdd)]
        self.deleted = [each.path_in_repo for each in operations if each not in added]
        with_content = {each.path_in_repo: each.path_or_fileobj for each in added}
        contents = {
            path: part if isinstance(part, bytes) else Path(part).read_bytes() for path, part in with_content.items()
        }
        self.calls.append(("commit", (name, contents, commit_message, revision)))
        return SimpleNamespace(commit_url=f"https://hub/{name}/commit/1")


def test_an_upload_is_one_commit_of_what_a_dry_run_writes(
    here: World, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = dry_run(here, "run")
    hub = Hub(private=True)
    monkeypatch.setattr(push, "HfApi", hub)
    assert main(["push", "run", "me/tiny", "--private", "--revision", "six"]) == 0
    assert capsys.readouterr().out == "uploaded step-6: https://hub/me/tiny/commit/1\n"
    repo, branch, (_, (name, contents, message, revision)) = hub.calls
    assert repo == ("repo", ("me/tiny", True, True)) and branch == ("branch", ("me/tiny", "six", True))
    assert (name, message, revision) == ("me/tiny", "Upload step-6 with ForkRL", "six")
    assert contents == {path: (folder / path).read_bytes() for path in files(folder)}
    # What an earlier push of another kind of model left; not what somebody else wrote.
    assert hub.deleted == ["model-00001-of-00002.safetensors", "merged/config.json", "adapter_config.json"]


def test_an_existing_public_repository_is_not_taken_for_a_private_one(
    here: World, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub(private=False)
    monkeypatch.setattr(push, "HfApi", hub)
    assert main(["push", "run", "me/tiny", "--private"]) == 2
    assert "--private: me/tiny exists and is public; drop --private, or choose another name" in capsys.readouterr().err
    assert [kind for kind, _ in hub.calls] == ["repo"]


def test_an_error_of_the_hub_is_one_line(
    here: World, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(push, "HfApi", Hub(error=RuntimeError("403 Forbidden\nmore")))
    assert main(["push", "run", "me/tiny"]) == 2
    assert capsys.readouterr().err == (
        "forkrl: me/tiny: could not be uploaded (403 Forbidden); check the network, the token's rights and the name, "
        "and repeat the command\n"
    )


def test_a_hub_that_cannot_be_reached_is_one_line(world: World, run: Run) -> None:
    """The real library, offline."""
    outcome = world.run("push", "run", "me/tiny", environment={"HF_TOKEN": "hf_s3cret"})
    assert outcome.code == 2 and "me/tiny: could not be uploaded (Cannot reach" in outcome.line
    assert "hf_s3cret" not in outcome.line


ERRORS = [
    ("nowhere", "me/tiny", "nowhere: is not a run; name the folder given to forkrl train --out, or RUN@step-N"),
    ("model", "me/tiny", "model: is not a run"),
    ("run@step-3", "me/tiny", "run/checkpoints: no checkpoint of step 3; available: step-4, step-6"),
    ("run@base", "me/tiny", "run@base: is the model before training; push a checkpoint, as in run@step-8"),
    ("none", "me/tiny", 'none: with checkpoint.kind = "none" this run saved no weights, so there is nothing to upload'),
    ("run", "tiny", "tiny: is not the name of a repository; write USER/NAME, as in me/my-model"),
    ("run", "me/a/b", "me/a/b: is not the name of a repository; write USER/NAME"),
    ("run", "me/t y", "me/t y: is not the name of a repository; write USER/NAME"),
    ("run", "me/tiny", "me/tiny: no token of the Hugging Face hub; run hf auth login, or export HF_TOKEN"),
]


@pytest.mark.parametrize(("subject", "name", "says"), ERRORS)
def test_mistakes_are_one_line(world: World, run: Run, subject: str, name: str, says: str) -> None:
    if subject == "none" and not (world.folder / "none").exists():
        world.trained("none", "checkpoint.kind=none", "training.steps=1", "eval.every=0")
    outcome = world.run("push", subject, name, environment={"HF_TOKEN": "", "HF_HOME": str(world.folder / "empty")})
    assert outcome.code == 2 and outcome.line.startswith(f"forkrl: {says}")
