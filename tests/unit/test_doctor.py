"""What the doctor finds on machines that are whole, broken and merely small."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from forkrl.commands import doctor
from forkrl.commands.doctor import Check, abilities, report_machine, run_doctor


@pytest.fixture(autouse=True)
def _quick_speed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_check_speed", lambda: Check("speed", "ok", "not measured in tests"))


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose only embedded model is a tiny one."""
    config = Qwen3Config(
        vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )
    folder = tmp_path / "tiny"
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "<eos>": 3}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    (tmp_path / "__pycache__").mkdir()
    monkeypatch.setattr(doctor, "_assets", lambda: tmp_path)
    return tmp_path


def found(name: str) -> Check:
    (check,) = [check for check in report_machine() if check.name == name]
    return check


def test_a_whole_machine_passes_and_says_what_it_can_do(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_doctor() == 0
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("embedded:tiny", "4 tokens, loads", "can run the embedded demo", "billion parameters"):
        assert words in printed


def test_a_truncated_model_is_found_and_fails_the_check(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = assets / "tiny" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    assert found("embedded:tiny").status == "missing"
    assert run_doctor() == 1
    assert "fix embedded:tiny" in capsys.readouterr().out


def test_a_package_without_model_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_assets", lambda: tmp_path / "nowhere")
    check = found("embedded model")
    assert (check.status, check.required) == ("missing", True)
    assert "forkrl sft recipes/countdown-base.toml" in check.remedy


def test_without_torch_the_rest_is_still_reported(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    checks = {check.name: check for check in report_machine()}
    assert checks["torch"].status == "missing"
    assert "pip install" in checks["torch"].remedy
    assert "disk" in checks
    assert "fix torch" in abilities(list(checks.values()))[0]


@pytest.mark.parametrize("version", ["5.8.9", "5.99.0"])
def test_a_version_outside_the_tested_range_is_a_warning(
    assets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], version: str
) -> None:
    installed = importlib.metadata.version
    monkeypatch.setattr(
        "importlib.metadata.version", lambda name: version if name == "transformers" else installed(name)
    )
    check = found("transformers")
    assert (check.status, check.required) == ("warn", True)
    assert check.detail.startswith(f"{version}; tested with ")
    assert re.fullmatch(r"pip install 'transformers<5\.\d+,>=5\.\d+'", check.remedy)
    assert run_doctor() == 0
    assert "tested with" in capsys.readouterr().out


def test_missing_extras_name_their_install_line_and_fail_nothing(
    assets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_EXTRAS", {"no-such-package": ("gym", "nothing")})
    assert found("no-such-package").remedy == "pip install 'forkrl[gym]'"
    assert run_doctor() == 0
    assert "forkrl[gym]" in capsys.readouterr().out  # rich must not read [gym] as a style


def test_spinning_threads_and_a_full_disk_are_warned_of(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert found("threads").status == "warn"
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert found("threads").status == "ok"
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    assert found("disk").status == "warn"


def test_model_size_follows_the_memory_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_training_memory", lambda: ("Some GPU", 24 * 2**30))
    sentences = abilities([])
    assert "up to 1.1 billion parameters" in sentences[1]
    assert "24.0 GiB of Some GPU" in sentences[1]
    assert not any("no accelerator" in sentence for sentence in sentences)
