"""What a checkpoint restores, and what it refuses."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import pickle  # noqa: TID251 - to make the bombs that must never go off
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from forkrl.errors import UserError
from forkrl.store.checkpoint import FORMAT, adopt_weights, latest_checkpoint, load_checkpoint, verify_checkpoint
from tests.tiny_state import WORDS, TinyState, tiny_config, tiny_state

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer/optimizer.json",
    "trainer/optimizer.safetensors",
    "trainer/progress.json",
    "trainer/rng.safetensors",
)


def experts() -> PreTrainedModel:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_experts=4,
            num_experts_per_tok=2, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=32,
        )
    )  # fmt: skip


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "tied": lambda: Qwen3ForCausalLM(tiny_config()),
    "untied": lambda: Qwen3ForCausalLM(tiny_config(tie_word_embeddings=False)),
    "bf16": lambda: Qwen3ForCausalLM(tiny_config()).bfloat16(),
    "experts": experts,
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of two steps of training."""
    state = tiny_state()
    state.train(2)
    return state.save(tmp_path, 2)


def sign(folder: Path) -> None:
    """Write a manifest that fits whatever the folder holds, as someone with bad intentions would."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    contents = {name: (folder / name).read_bytes() for name in names if name != "manifest.json"}
    files = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "step": 2, "files": files}))


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


class TestResume:
    @pytest.mark.parametrize(
        ("kind", "flags"),
        [*((kind, {}) for kind in MODELS), *(("tied", {flag: True}) for flag in ("foreach", "fused", "amsgrad"))],
    )
    def test_ten_steps_equal_five_and_a_resumed_five_to_the_bit(
        self, tmp_path: Path, kind: str, flags: dict[str, Any]
    ) -> None:
        torch.manual_seed(7)
        straight = tiny_state(model=MODELS[kind](), **flags)
        straight.train(5)
        path = straight.save(tmp_path, 5, figures=[0.1, 1e-300, 1 / 3], text="−ρ")
        losses = straight.train(5)
        expected = straight.bits()

        resumed = tiny_state(seed=3, model=MODELS[kind](), **flags)
        resumed.train(1)
        assert resumed.load(path) == {"step": 5, "figures": [0.1, 1e-300, 1 / 3], "text": "−ρ"}
        assert resumed.train(5) == losses
        assert resumed.bits() == expected

    def test_before_the_first_step_there_is_no_optimizer_state_and_that_is_fine(self, tmp_path: Path) -> None:
        straight = tiny_state()
        path = straight.save(tmp_path, 0)
        straight.train(3)
        expected = straight.bits()
        resumed = tiny_state(seed=1)
        resumed.load(path)
        resumed.train(3)
        assert resumed.bits() == expected

    def test_saving_draws_no_random_number_and_changes_no_weight(self, tmp_path: Path) -> None:
        state = tiny_state()
        state.train(1)
        before = state.bits()
        state.save(tmp_path, 1)
        assert state.bits() == before

    def test_every_number_of_a_group_is_restored(self, tmp_path: Path) -> None:
        state = tiny_state(betas=(0.8, 0.95), eps=1e-7, maximize=True)
        state.optimizer.param_groups[1]["lr"] = 1 / 3
        path = state.save(tmp_path, 0)
        other = tiny_state()
        other.load(path)
        assert other.bits()["groups"] == state.bits()["groups"]
        assert other.optimizer.param_groups[0]["betas"] == (0.8, 0.95)


class TestSave:
    @pytest.mark.parametrize("kind", MODELS)
    def test_transformers_opens_a_checkpoint(self, tmp_path: Path, kind: str) -> None:
        state = tiny_state(model=MODELS[kind]())
        path = state.save(tmp_path, 3)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=state.model.dtype)
        for name, tensor in state.model.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
        assert AutoTokenizer.from_pretrained(path).encode("1+2=3") == state.tokenizer.encode("1+2=3")

    def test_the_files_are_those_of_the_documentation_and_none_is_a_pickle(self, saved: Path) -> None:
        present = sorted(path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file())
        assert present == sorted([*FILES, "manifest.json"])
        assert set(load_file(saved / "model.safetensors")) == set(dict(tiny_state().model.named_parameters()))

    def test_weights_that_change_after_a_save_do_not_change_it(self, tmp_path: Path) -> None:
        state = tiny_state()
        state.train(2)
        expected = state.bits()
        path = state.save(tmp_path, 2)
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.fill_(0)
                for moment in state.optimizer.state[parameter].values():
                    moment.fill_(0)
        state.train(1)
        other = tiny_state(seed=1)
        other.load(path)
        assert other.bits() == expected

    def test_a_second_save_of_a_step_replaces_the_first(self, tmp_path: Path) -> None:
        state = tiny_state()
        state.save(tmp_path, 2, note="first")
        state.train(1)
        path = state.save(tmp_path, 2, note="second")
        assert [folder.name for folder in tmp_path.iterdir()] == ["step-2"]
        assert tiny_state(seed=1).load(path)["note"] == "second"

    def test_bars_stay_off_the_terminal(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        state = tiny_state()
        state.load(state.save(tmp_path, 2))
        assert capfd.readouterr() == ("", "")

    def test_what_cannot_be_saved_exactly_is_refused(self, tmp_path: Path) -> None:
        state = tiny_state()
        with pytest.raises(ValueError, match="keep = 0"):
            state.save(tmp_path, 1, keep=0)
        with pytest.raises(ValueError, match="Out of range float"):
            state.save(tmp_path, 1, figure=float("nan"))
        state.optimizer.state[next(state.model.parameters())] = {"step": 3}
        with pytest.raises(TypeError, match="AdamW keeps step as int, not as a tensor"):
            state.save(tmp_path, 1)
        assert list(tmp_path.iterdir()) == []


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


class TestPrune:
    def names(self, folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir())

    @pytest.mark.parametrize("keep", [1, 2, 4, 5, 9])
    def test_the_newest_stay(self, tmp_path: Path, keep: int) -> None:
        state, steps = tiny_state(), range(7, 14)
        for step in steps:
            state.save(tmp_path, step, keep=keep)
            saved = range(7, step + 1)
            assert set(self.names(tmp_path)) == {f"step-{each}" for each in saved[-keep:]}

    def test_a_spared_step_stays_in_addition_until_another_is_spared(self, tmp_path: Path) -> None:
        state, spared = tiny_state(), {7: 0, 8: 8, 9: 8, 10: 8, 11: 8, 12: 11, 13: 11}
        for step, best in spared.items():
            state.save(tmp_path, step, keep=2, spared=best)
            newest = range(max(7, step - 1), step + 1)
            assert set(self.names(tmp_path)) == {f"step-{each}" for each in {*newest, best} - {0}}

    def test_a_save_that_fails_removes_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        state = tiny_state()
        state.save(tmp_path, 1, keep=2)
        state.save(tmp_path, 2, keep=2)
        monkeypatch.setattr("forkrl.store.checkpoint._write_manifest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            state.save(tmp_path, 3, keep=1)
        assert self.names(tmp_path) == ["step-1", "step-2"]

    def test_going_back_behind_a_damaged_one_never_removes_what_was_just_saved(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        state = tiny_state()
        state.save(tmp_path, 10, keep=2)
        flip(state.save(tmp_path, 20, keep=2) / "model.safetensors", -1)
        caplog.set_level(logging.WARNING, "forkrl")
        state.save(tmp_path, 11, keep=1)
        assert self.names(tmp_path) == ["step-11"]
        assert "step-20: removed; the run went back behind it" in caplog.text

    def test_a_checkpoint_moved_to_another_disk_is_only_unlinked(self, tmp_path: Path) -> None:
        state = tiny_state()
        elsewhere = state.save(tmp_path, 1).rename(tmp_path / "elsewhere")
        (tmp_path / "step-1").symlink_to(elsewhere)
        assert latest_checkpoint(tmp_path) == tmp_path / "step-1"
        state.save(tmp_path, 2)
        assert self.names(tmp_path) == ["elsewhere", "step-2"]
        assert (elsewhere / "manifest.json").exists()


class TestDamage:
    @pytest.mark.parametrize("name", FILES)
    def test_a_flipped_bit_is_named(self, saved: Path, name: str) -> None:
        file = saved / name
        size = file.stat().st_size
        for position in {0, size // 3, size // 2, size - 1}:
            flip(file, position)
            with pytest.raises(UserError, match=rf"{name}: damaged checkpoint: sha256 \w+…, the manifest says"):
                tiny_state().load(saved)
            flip(file, position)
        tiny_state().load(saved)

    @pytest.mark.parametrize("name", FILES)
    def test_a_file_cut_short_or_missing_is_named(self, saved: Path, name: str) -> None:
        file = saved / name
        size = file.stat().st_size
        with file.open("r+b") as stream:
            stream.truncate(size - 1)
        with pytest.raises(UserError, match=f"{name}: damaged checkpoint: {size - 1} bytes, the manifest says {size}"):
            tiny_state().load(saved)
        file.unlink()
        with pytest.raises(UserError, match=f"{name}: damaged checkpoint: the file is missing"):
            tiny_state().load(saved)
        file.mkdir()
        with pytest.raises(UserError, match=f"{name}: damaged checkpoint: not a regular file"):
            tiny_state().load(saved)

    def test_no_byte_of_the_manifest_can_change_unseen(self, saved: Path) -> None:
        manifest = saved / "manifest.json"
        for position in range(0, manifest.stat().st_size, 7):  # all of them hold too, and take ten seconds
            flip(manifest, position)
            with pytest.raises(UserError, match=r"checkpoint"):
                verify_checkpoint(saved)
            flip(manifest, position)
        verify_checkpoint(saved)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "null",
            '{"format": 1}',
            "[" * 100_000,
            f'{{"format": {FORMAT}, "step": 2, "files": {{"../x": {{"size": 1}}}}}}',
        ],
    )
    def test_a_manifest_of_nonsense_is_refused(self, saved: Path, text: str) -> None:
        (saved / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"manifest.json: damaged checkpoint"):
            verify_checkpoint(saved)

    def test_a_checkpoint_of_another_version_is_refused_by_number(self, saved: Path) -> None:
        manifest = json.loads((saved / "manifest.json").read_text())
        (saved / "manifest.json").write_text(json.dumps(manifest | {"format": FORMAT - 1}))
        with pytest.raises(UserError, match=rf"checkpoint format {FORMAT - 1}, .* reads {FORMAT}"):
            verify_checkpoint(saved)

    def test_a_checkpoint_in_the_folder_of_another_step_is_refused(self, saved: Path) -> None:
        moved = saved.rename(saved.with_name("step-3"))
        with pytest.raises(
            UserError, match=r"manifest.json: damaged checkpoint: it says step 2 in a folder named step-3"
        ):
            verify_checkpoint(moved)
        verify_checkpoint(moved.rename(saved.with_name("the-best-one")))  # a name of the user's own is fine

    def test_a_manifest_reaches_nothing_outside_the_checkpoint(self, saved: Path) -> None:
        manifest = json.loads((saved / "manifest.json").read_text())
        manifest["files"]["../../etc/passwd"] = {"size": 0, "sha256": ""}
        (saved / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="outside the checkpoint"):
            verify_checkpoint(saved)

    def test_a_damaged_shard_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        state = tiny_state()
        in_shards = functools.partial(state.model.save_pretrained, max_shard_size="5KB")
        monkeypatch.setattr(state.model, "save_pretrained", in_shards)
        path = state.save(tmp_path, 1)
        shards = sorted(path.glob("model-*-of-*.safetensors"))
        assert len(shards) > 1
        tiny_state(seed=1).load(path)
        flip(shards[1], -1)
        with pytest.raises(UserError, match=f"{shards[1].name}: damaged checkpoint: sha256"):
            tiny_state().load(path)

    def test_the_older_good_one_is_taken_loudly(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        state = tiny_state()
        folders = [state.save(tmp_path, step, keep=3) for step in (9, 10, 11)]
        assert latest_checkpoint(tmp_path) == folders[2]
        assert not caplog.records
        flip(folders[2] / "model.safetensors", -1)
        (folders[1] / "manifest.json").unlink()
        assert latest_checkpoint(tmp_path) == folders[0]
        assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
        assert "step-11/model.safetensors: damaged checkpoint: sha256" in caplog.text
        assert "step-10: no checkpoint of ForkRL, or not a whole one: it has no manifest.json" in caplog.text
        flip(folders[0] / "trainer/rng.safetensors", -1)
        with pytest.raises(UserError, match=r"no checkpoint is whole; .*step-11/model.*step-10.*step-9/trainer/rng"):
            latest_checkpoint(tmp_path)

    def test_where_nothing_was_saved_there_is_none(self, tmp_path: Path) -> None:
        assert latest_checkpoint(tmp_path) is None
        assert latest_checkpoint(tmp_path / "missing") is None
        (tmp_path / "step-x").mkdir()
        (tmp_path / ".saving-step-3").mkdir()
        assert latest_checkpoint(tmp_path) is None


class TestAdoptWeights:
    def test_weights_alone_are_a_checkpoint(self, tmp_path: Path) -> None:
        made = tmp_path / "made"
        with pytest.raises(UserError, match="made: no model was written there, it has no config.json"):
            adopt_weights(tmp_path / "checkpoints", 4, made)
        Qwen3ForCausalLM(tiny_config()).save_pretrained(made)
        folder = adopt_weights(tmp_path / "checkpoints", 4, made)
        assert latest_checkpoint(tmp_path / "checkpoints") == folder == tmp_path / "checkpoints/step-4"
        assert not made.exists()

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        Qwen3ForCausalLM(tiny_config()).save_pretrained(tmp_path / "made")
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"file/step-4: cannot be written \(File exists\)"):
            adopt_weights(tmp_path / "file", 4, tmp_path / "made")
        assert (tmp_path / "made/config.json").exists()


class TestAnother:
    """Checkpoints that are whole, but not of this run."""

    def refused(self, path: Path, state: TinyState, message: str) -> None:
        state.train(1)
        before = state.bits()
        with pytest.raises(UserError, match=message):
            state.load(path)
        assert state.bits() == before, "a refused checkpoint leaves everything as it was"

    def test_another_architecture(self, saved: Path) -> None:
        config = LlamaConfig(**{**tiny_config().to_diff_dict(), "model_type": "llama", "architectures": None})
        self.refused(
            saved,
            tiny_state(model=LlamaForCausalLM(config)),
            "another model: qwen3 in float32, this run trains llama in",
        )

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"hidden_size": 32}, r"embed_tokens.weight is float32 \[18, 16\], here float32 \[18, 32\]"),
            ({"num_hidden_layers": 2}, r"it has no model.layers.1"),
            ({"attention_bias": True}, r"it has no model.layers.0.self_attn.q_proj.bias"),
            ({"num_attention_heads": 1, "head_dim": 16}, r"k_proj|q_norm"),
            ({"rms_norm_eps": 1e-3}, r"its config.json has rms_norm_eps = 1e-06, here 0.001"),
            ({"tie_word_embeddings": False}, r"its config.json has tie_word_embeddings = True, here False"),
        ],
    )
    def test_another_shape(self, saved: Path, changes: dict[str, Any], message: str) -> None:
        other = tiny_state(model=Qwen3ForCausalLM(tiny_config(**changes)))
        self.refused(saved, other, f"checkpoint of another model: .*({message})")

    def test_a_deeper_model(self, tmp_path: Path) -> None:
        deep = tiny_state(model=Qwen3ForCausalLM(tiny_config(num_hidden_layers=2))).save(tmp_path, 1)
        self.refused(deep, tiny_state(), r"it holds model.layers.1.\S+, which this model lacks")

    def test_another_precision(self, tmp_path: Path) -> None:
        half = tiny_state(model=MODELS["bf16"]()).save(tmp_path, 1)
        self.refused(half, tiny_state(), "qwen3 in bfloat16, this run trains qwen3 in float32")

    def test_a_missing_tensor_is_never_made_up(self, saved: Path) -> None:
        weights = load_file(saved / "model.safetensors")
        del weights["model.norm.weight"]
        save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
        sign(saved)
        self.refused(saved, tiny_state(), "it has no model.norm.weight")

    def test_another_optimizer(self, saved: Path) -> None:
        state = tiny_state()
        state.optimizer = torch.optim.SGD(state.model.parameters(), lr=0.1)
        self.refused(saved, state, "optimizer.json: checkpoint of another optimizer: AdamW, this run uses SGD")
        state = tiny_state()
        state.optimizer = torch.optim.AdamW(state.model.parameters())
        self.refused(saved, state, r"groups of \[\d+, \d+\] parameters, here \[\d+\]; first difference")
        state = tiny_state()
        state.optimizer.param_groups[-1]["params"].pop()
        self.refused(saved, state, r"first difference: \S+ there, nothing here")

    def test_other_generators(self, saved: Path) -> None:
        state = tiny_state()
        state.generators["dropout"] = torch.Generator()
        with pytest.raises(UserError, match=r"rng.safetensors: random generators \['data', 'sampling'\], this run has"):
            state.load(saved)

    def test_without_the_states_that_training_needs(self, saved: Path) -> None:
        states = load_file(saved / "trainer/rng.safetensors")
        del states["torch/cpu"]
        save_file(states, saved / "trainer/rng.safetensors")
        sign(saved)
        self.refused(saved, tiny_state(), "rng.safetensors: no random state of the CPU")
        (saved / "trainer/optimizer.json").write_text("{")
        sign(saved)
        self.refused(saved, tiny_state(), r"optimizer.json: cannot be read as JSON \(Expecting property name")

    def test_generators_of_another_device(self, saved: Path) -> None:
        states = load_file(saved / "trainer/rng.safetensors")
        save_file({**states, "generator/data": torch.zeros(16, dtype=torch.uint8)}, saved / "trainer/rng.safetensors")
        sign(saved)
        self.refused(saved, tiny_state(), "random generator 'data' lived on another kind of device than cpu")

    def test_not_a_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no checkpoint of ForkRL, .*it has no manifest.json"):
            tiny_state().load(tmp_path / "missing")
        state = tiny_state()
        state.model.save_pretrained(tmp_path)
        with pytest.raises(UserError, match=r"it has no manifest.json"):
            state.load(tmp_path)


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


class TestPickle:
    def bomb(self, mark: Path) -> bytes:
        data = pickle.dumps(Bomb(mark))
        pickle.loads(data)  # noqa: S301 - it does work
        assert mark.exists()
        mark.unlink()
        return data

    @pytest.mark.parametrize("signed", [False, True])
    @pytest.mark.parametrize(
        "name",
        ["pytorch_model.bin", "model.pt", "trainer/optimizer.pt", "trainer/rng_state.pth", "x.pkl", "deep/er/y.ckpt"],
    )
    def test_a_pickle_anywhere_is_refused(self, saved: Path, tmp_path: Path, name: str, signed: bool) -> None:
        mark = tmp_path / "mark"
        (saved / name).parent.mkdir(parents=True, exist_ok=True)
        (saved / name).write_bytes(self.bomb(mark))
        if signed:
            sign(saved)
        with pytest.raises(UserError, match=f"{name}: a pickle, which could run code"):
            tiny_state().load(saved)
        with pytest.raises(UserError, match=f"{name}: a pickle"):
            latest_checkpoint(tmp_path)
        assert not mark.exists()

    @pytest.mark.parametrize("name", sorted({*FILES, "manifest.json"} - {"tokenizer.json", "tokenizer_config.json"}))
    def test_a_pickle_in_the_place_of_a_file_is_refused(self, saved: Path, tmp_path: Path, name: str) -> None:
        mark = tmp_path / "mark"
        (saved / name).write_bytes(self.bomb(mark))
        if name != "manifest.json":
            sign(saved)
        if name == "generation_config.json":  # nothing that training needs: transformers may read it or not
            load_checkpoint_quietly(saved)
        else:
            with pytest.raises(UserError, match=f"{name}|weights cannot be read"):
                tiny_state().load(saved)
        assert not mark.exists()

    def test_weights_that_the_manifest_does_not_list_are_refused(self, saved: Path) -> None:
        (saved / "notes.txt").write_text("a note of the user's is no danger")
        verify_checkpoint(saved)
        for name in ("model-00001-of-00002.safetensors", "adapter_config.json", "modeling_x.py"):
            (saved / name).write_bytes(b"")
            with pytest.raises(UserError, match=f"{name}: not part of the checkpoint"):
                verify_checkpoint(saved)
            (saved / name).unlink()


def load_checkpoint_quietly(path: Path) -> None:
    state = tiny_state()
    try:
        load_checkpoint(path, model=state.model, optimizer=state.optimizer, generators=state.generators)
    except UserError:
        return
