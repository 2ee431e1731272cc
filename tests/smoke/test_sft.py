"""Making a base model: the shipped one keeps its promises, and an interrupted one goes on to the same weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tomli_w
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from forkrl.cli import main
from forkrl.config import ModelConfig, SftConfig
from forkrl.config.recipe import load_recipe, recipe_toml
from forkrl.errors import TrainingHalted, UserError
from forkrl.model.locations import model_location
from forkrl.model.policy import open_policy
from forkrl.parallel.workers import Workers
from forkrl.tasks.countdown import countdown_task
from forkrl.training import sft
from forkrl.training.model_card import measure_base_model

TINY = SftConfig.model_validate(
    {
        "steps": 6,
        "batch_tokens": 256,
        "warmup_steps": 2,
        "eval_problems": 4,
        "architecture": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8},
        "runtime": {"threads": 1},
    }
)


def test_the_embedded_base_model_executes_reliably_and_chooses_at_random() -> None:
    policy = open_policy(ModelConfig(path="embedded:countdown-base"), "cpu")
    config = load_recipe(SftConfig, Path("recipes/countdown-base.toml"), ["eval_problems=500"])
    figures = measure_base_model(Workers(policy), countdown_task(), config)
    assert figures.steps_right >= 0.98
    assert figures.below_hundredth >= 0.5
    assert 0.05 <= figures.solve_rate.mean <= 0.30  # 500 problems; the card's figure is of 1,000


def test_the_embedded_base_model_is_small_and_loads_as_any_other() -> None:
    folder = Path(model_location("embedded:countdown-base"))
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8 * 2**20
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = "2 5 9:90?2*5=10 [9 10], 10*9=90 [90] 90:90 !"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert model.config.model_type == "qwen3"


def test_a_recipe_names_one_sequence_of_data() -> None:
    policy, task = sft.build_base_policy(TINY), countdown_task()
    first, again = (sft.trace_batch(TINY, policy, task, step=3) for _ in range(2))
    assert all(a.equal(b) for one, other in zip(first, again, strict=True) for a, b in zip(one, other, strict=True))
    other_step = sft.trace_batch(TINY, policy, task, step=4)
    assert not first[0][0].equal(other_step[0][0])


def test_characters_that_the_alphabet_lacks_are_an_error() -> None:
    data = TINY.data.model_copy(update={"characters": TINY.data.characters.replace("?", "").replace("]", "")})
    config = TINY.model_copy(update={"data": data})
    with pytest.raises(UserError, match="data.characters lacks '.', .*which the traces use; add them"):
        sft.trace_batch(config, sft.build_base_policy(config), countdown_task(), step=0)


def test_prompt_and_padding_carry_no_label() -> None:
    policy = sft.build_base_policy(TINY)
    for input_ids_BT, labels_BT in sft.trace_batch(TINY, policy, countdown_task(), step=0):
        for ids_T, labels_T in zip(input_ids_BT, labels_BT, strict=True):
            labelled = labels_T != sft.IGNORED
            text = str(policy.tokenizer.decode(ids_T[~labelled & (ids_T != policy.tokenizer.pad_token_id)]))
            assert text.endswith("?")
            assert text.count("?") == 1
            assert ids_T[labelled].equal(labels_T[labelled])
            assert ids_T[labelled][-1] == policy.tokenizer.eos_token_id


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft, "CHECKPOINT_EVERY", 2)
    sft.make_base_model(TINY, tmp_path / "whole", recipe="tiny")

    def die(*arguments: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if arguments[-1] == 3:
            raise KeyboardInterrupt
        return original(*arguments)  # type: ignore[arg-type]

    original = sft.trace_batch
    monkeypatch.setattr(sft, "trace_batch", die)
    with pytest.raises(KeyboardInterrupt):
        sft.make_base_model(TINY, tmp_path / "cut", recipe="tiny")
    monkeypatch.setattr(sft, "trace_batch", original)
    with pytest.raises(UserError, match="begun with another recipe: lr: "):
        sft.make_base_model(TINY.model_copy(update={"lr": 0.5}), tmp_path / "cut", recipe="tiny")
    sft.make_base_model(TINY, tmp_path / "cut", recipe="tiny")

    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(tensor.equal(cut[name]) for name, tensor in whole.items())
    assert (tmp_path / "whole" / "README.md").read_text() == (tmp_path / "cut" / "README.md").read_text()
    assert not (tmp_path / "cut" / ".checkpoints").exists()


def test_a_folder_in_use_is_refused_and_a_diverging_loss_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("")
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(tomli_w.dumps(recipe_toml(TINY)))
    assert main(["sft", str(recipe), "--out", str(tmp_path / "taken")]) == 2
    assert "the folder is not empty; name a new one" in capsys.readouterr().err
    with pytest.raises(UserError, match="the folder is not empty"):
        sft.make_base_model(TINY, tmp_path / "taken", recipe="tiny")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["thesis.tex"]
    with pytest.raises(TrainingHalted, match=r"step \d: the loss is (nan|inf)"):
        sft.make_base_model(TINY.model_copy(update={"lr": 1e30}), tmp_path / "wild", recipe="tiny")


def test_the_command_line_says_what_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "wild.toml"
    recipe.write_text(tomli_w.dumps(recipe_toml(TINY.model_copy(update={"lr": 1e30}))))
    assert main(["sft", str(recipe), "--out", str(tmp_path / "wild")]) == 1
    said = capsys.readouterr().err
    assert re.search(r"forkrl: training the base model stopped at step \d: the loss is (nan|inf)", said)
