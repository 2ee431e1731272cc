"""Whatever the user got wrong: exit 2, one line that names it and the remedy, and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.smoke.world import Run, World, make_model, make_tokenizer

SHORT = ("training.steps=2", "eval.problems=1", "eval.every=0", "checkpoint.every=1")


class Case(NamedTuple):
    """A mistake: the command's arguments, what its line has to say, and how to make the files wrong."""

    argv: tuple[str, ...]
    says: tuple[str, ...]
    prepare: Callable[[Path], object] = lambda folder: None
    environment: dict[str, str] = {}  # noqa: RUF012 - a named tuple's default is never written to


def train(*overrides: str) -> tuple[str, ...]:
    return ("train", "recipe.toml", *SHORT, *overrides, "--out", "bad")


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def rows(*changes: dict[str, Any] | str) -> Callable[[Path], object]:
    """Prompts of which the ones after the tenth are wrong."""
    good = [json.dumps({"prompt": f"{number}+1=", "answer": "13579"}) for number in range(10)]
    lines = good + [change if isinstance(change, str) else json.dumps(change) for change in changes]
    return text("odd.jsonl", "".join(line + "\n" for line in lines))


def occupied(folder: Path) -> None:
    (folder / "bad").mkdir()
    (folder / "bad/thesis.tex").touch()


def without_eos(folder: Path) -> None:
    make_model(folder / "odd")
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder / "odd")


def cut_model(folder: Path) -> None:
    make_model(folder / "odd")
    weights = folder / "odd/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def incomplete_model(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_model(folder / "odd")
    tensors = load_file(folder / "odd/model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "odd/model.safetensors", metadata={"format": "pt"})


def nan_model(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    make_model(folder / "odd")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "odd")
    model.get_input_embeddings().weight.data[2] = torch.nan
    model.save_pretrained(folder / "odd")


def soft_capped_model(folder: Path) -> None:
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, final_logit_softcapping=30.0,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(folder / "odd")
    make_tokenizer().save_pretrained(folder / "odd")


def scaled_model(folder: Path) -> None:
    import torch
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, logit_scale=0.0625, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    CohereForCausalLM(config).save_pretrained(folder / "odd")
    make_tokenizer().save_pretrained(folder / "odd")


DATA = "task.data=odd.jsonl"
MODEL = "model.path=./odd"
CASES = {
    "misspelt key": Case(train("loss.clip_hgh=0.3"), ("command line: loss.clip_hgh is not a setting", "clip_high?")),
    "misspelt section": Case(train("optimiser.lr=0.3"), ("optimiser is not a setting", "optimizer?")),
    "misspelt key of the file": Case(
        ("train", "bad.toml"), ("bad.toml: rollout.grup_size", "rollout.group_size?"),
        text("bad.toml", "[rollout]\ngrup_size = 4\n"),
    ),
    "wrong type": Case(train("training.steps=many"), ("training.steps = 'many'", "integer")),
    "out of range": Case(train("selection.ratio=1.5"), ("selection.ratio = 1.5", "less than or equal to 1")),
    "unknown choice": Case(train("selection.rule=top"), ("selection.rule = 'top'", "top_entropy", "threshold")),
    "sizes that disagree": Case(train("training.mini_batch_prompts=3"), ("mini_batch_prompts = 3 does not divide",)),
    "no override": Case(train("optimizer.lr"), ("'optimizer.lr' is not an override", "section.key=value")),
    "spaces around =": Case(("train", "training.steps", "=", "3"), ("training.steps: no such", "without spaces")),
    "no list": Case(train("rollout.stop=[<x>]"), ("rollout.stop", "should be a list")),
    "missing recipe": Case(("train", "none.toml"), ("none.toml: no such recipe",)),
    "a folder for a recipe": Case(("train", "model"), ("model: cannot be read as a recipe",)),
    "broken TOML": Case(("train", "bad.toml"), ("bad.toml: not valid TOML", "line 1"), text("bad.toml", "seed = =\n")),
    "missing model folder": Case(train("model.path=./none"), ("model.path = './none': no such folder",)),
    "unknown hub model": Case(train("model.path=nobody/none"), ("model.path = 'nobody/none'",)),
    "a folder without a model": Case(train("model.path=./odd"), ("cannot be opened as a model", "no config.json"),
                                     lambda folder: (folder / "odd").mkdir()),
    "cut model": Case(train(MODEL), ("model.path = './odd' cannot be opened as a model",), cut_model),
    "model of NaN": Case(train(MODEL), ("'./odd': its logits are NaN or infinite",), nan_model),
    "unknown embedded model": Case(train("model.path=embedded:none"), ("'embedded:none': no such embedded model",)),
    "tokenizer without EOS": Case(train(MODEL), ("tokenizer of './odd' has no EOS token", "tokenizer_config.json"),
                                  without_eos),
    "soft-capped logits": Case(train(MODEL), ("'./odd': Gemma2ForCausalLM transforms its logits",), soft_capped_model),
    "scaled logits": Case(train(MODEL), ("'./odd': CohereForCausalLM transforms its logits",), scaled_model),
    "bad device": Case(train("runtime.device=abacus"), ("runtime.device = 'abacus' is not usable here",)),
    "absent device": Case(train("runtime.device=cuda:7"), ("runtime.device = 'cuda:7' is not usable here",)),
    "stop of several tokens": Case(train('rollout.stop=["=="]'), ("rollout.stop: '==' is 2 tokens",)),
    "chat template that is not there": Case(train("task.chat_template=true"), ("tokenizer has no chat template",)),
    "nonsense threads": Case(train(), ("OMP_NUM_THREADS = 'lots'",), environment={"OMP_NUM_THREADS": "lots"}),
    "missing data": Case(train("task.data=none.jsonl"), ("task.data = 'none.jsonl': no such file or folder",)),
    "no data": Case(train("task.data="), ("task.data is empty",)),
    "broken row": Case(train(DATA), ("odd.jsonl line 11 is not JSON",), rows("{")),
    "row without the column": Case(train(DATA), ("odd.jsonl line 11 has no column 'prompt'", "'prompts'?"),
                                   rows({"prompts": "1+1=", "answer": "1"})),
    "row without an answer": Case(train(DATA), ("odd.jsonl line 12 has no column 'answer'",),
                                  rows({"prompt": "1+2=", "answer": "1"}, {"prompt": "1+3="})),
    "empty prompt": Case(train(DATA), ("odd.jsonl line 11: prompt is empty",), rows({"prompt": " ", "answer": "1"})),
    "too little data": Case(train(DATA, "task.held_out_rows=10"), ("held_out_rows = 10 leaves nothing to train on",),
                            rows()),
    "prompt over the limit": Case(
        train(DATA, "task.held_out_rows=1"), ("odd.jsonl line 11", "9 tokens, over rollout.max_prompt_tokens = 8"),
        rows({"prompt": "11111+11=", "answer": "1"}),
    ),
    "verifier that is not there": Case(train("task.verifier=nowhere:none"), ('task.verifier = "nowhere:none" could',)),
    "verifier without a function": Case(train("task.verifier=first_character"), ('write "module:function"',)),
    "folder that is not empty": Case(train(), ("bad: is not empty (it holds thesis.tex)", "another --out"),
                                     occupied),
    "file for a folder": Case(train(), ("bad: is a file; choose another --out",), text("bad", "")),
    "resume of nothing": Case(("train", "--resume", "none"), ("none: no such run folder",)),
    "resume elsewhere": Case((*train(), "--resume", "none"), ("--resume",)),
    "resume of no run": Case(("train", "--resume", "model"), ("model: not a run folder",)),
    "eval of nothing": Case(("eval", "./none"), ("model.path = './none': no such folder",)),
    "eval of no problems": Case(("eval", "model", "--problems", "0"), ("--problems 0",)),
    "eval with a missing recipe": Case(("eval", "model", "--recipe", "none.toml"), ("none.toml: no such recipe",)),
    "report of nothing": Case(("report", "none"), ("none",)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_exit_2(own_world: World, name: str) -> None:
    case = CASES[name]
    case.prepare(own_world.folder)
    before = sorted(own_world.folder.rglob("*"))
    outcome = own_world.run(*case.argv, environment=case.environment)
    assert outcome.code == 2, outcome
    assert outcome.line.startswith("forkrl: ")
    missing = [part for part in case.says if part not in outcome.line]
    assert not missing, f"{outcome.line!r} does not say {missing}"
    assert "Traceback" not in outcome.stdout
    assert sorted(own_world.folder.rglob("*")) == before, "a refused command left something behind"


def test_a_model_without_all_its_weights(own_world: World) -> None:
    """transformers reports at length and would go on with random numbers; the last line is ours."""
    incomplete_model(own_world.folder)
    outcome = own_world.run(*train(MODEL))
    assert outcome.code == 2
    last = outcome.stderr.splitlines()[-1]
    assert last.startswith("forkrl: model.path = './odd': its weights lack model.norm.weight")
    assert not (own_world.folder / "bad").exists()


@pytest.fixture(scope="module")
def finished(world: World) -> Run:
    return world.trained("finished", *SHORT)


def test_a_folder_that_holds_another_run(world: World, finished: Run) -> None:
    before = finished.bits()
    outcome = world.train("finished", *SHORT)
    assert outcome.code == 2
    assert "finished: already holds a run; continue it with --resume finished" in outcome.line
    assert finished.bits() == before


def copied(world: World, run: Run, name: str) -> Path:
    shutil.copytree(run.folder, world.folder / name)
    return world.folder / name


def test_checkpoints_all_cut_short(world: World, finished: Run) -> None:
    for checkpoint in (copied(world, finished, "cut") / "checkpoints").iterdir():
        weights = checkpoint / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    outcome = world.run("train", "--resume", "cut")
    assert outcome.code == 2
    assert "no checkpoint is whole" in outcome.stderr.splitlines()[-1]
    assert "step-2/model.safetensors: damaged checkpoint" in outcome.stderr.splitlines()[-1]


def test_a_checkpoint_of_another_model(own_world: World, finished: Run) -> None:
    folder = copied(own_world, finished, "run")
    make_model(own_world.folder / "model", num_hidden_layers=2)
    outcome = own_world.run("train", "--resume", "run")
    assert outcome.code == 2
    assert "checkpoint of another model" in outcome.line
    assert "step-2" in outcome.line
    assert Run(folder, outcome).bits() == finished.bits()


def test_a_damaged_config(world: World, finished: Run) -> None:
    (copied(world, finished, "garbled") / "config.toml").write_text("seed = 3\n[")
    outcome = world.run("train", "--resume", "garbled")
    assert outcome.code == 2
    assert "garbled/config.toml: cannot be read" in outcome.line


def can_mount() -> bool:
    return sys.platform == "linux" and os.geteuid() == 0 and subprocess.run(
        ["unshare", "--mount", "true"], capture_output=True, check=False
    ).returncode == 0  # fmt: skip


@pytest.mark.skipif(not can_mount(), reason="a small disk of one's own takes root and mount namespaces")
def test_a_full_disk(world: World) -> None:
    """Whatever step it fills up at, the run ends with one line, and goes on elsewhere from what was saved."""
    whole = world.trained("whole", *SHORT, "training.steps=4", "checkpoint.keep=4")
    for kib in (60, 120, 170):
        at, copy = world.folder / f"disk-{kib}", world.folder / f"copy-{kib}"
        outcome = world.run(
            "train", "recipe.toml", *SHORT, "training.steps=4", "checkpoint.keep=4", "--out", at / "run",
            disk={"at": str(at), "size": kib * 1024, "copy": str(copy)}, without_report=True,
        )  # fmt: skip
        assert outcome.code == 2, (kib, outcome)
        assert "the disk is full: free some space there" in outcome.line
        resumed = world.resumed(f"copy-{kib}/run")
        assert resumed.bits() == whole.bits()


def test_weights_that_become_nan_stop_the_run(world: World) -> None:
    """Found by whatever reads them first: the loss, or the sampling of the next step."""
    for point, count, after, cause in (
        ("gradient", 9, False, "the gradient norm is nan"),
        ("reward", 6, True, "NaN"),
        ("optimizer", 6, True, "the optimizer's step left weights that are NaN or infinite"),
    ):
        out = f"nan-{point}"
        outcome = world.train(
            out, "training.steps=9", "checkpoint.every=1", "training.micro_batch_tokens=640", without_report=True,
            faults=[{"point": point, "count": count, "after": after, "action": "poison"}],
        )  # fmt: skip
        assert outcome.code == 1, (point, outcome)
        assert outcome.line.startswith("forkrl: training stopped at step ")
        assert cause in outcome.line, outcome.line
        step = int(outcome.line.split("step ")[1].split(":")[0])
        run = Run(world.folder / out, outcome)
        assert run.last_checkpoint.name == f"step-{step - 1}"
        assert all(isinstance(value, int | float) for record in run.metrics for value in record.values())
        assert world.resumed(out).metrics[-1]["step"] == 9


def test_a_run_that_diverges_by_itself(world: World) -> None:
    outcome = world.train("diverged", "optimizer.lr=1e30", "training.steps=9", "checkpoint.every=1")
    assert outcome.code == 1
    assert outcome.line.startswith("forkrl: training stopped at step ")


def test_the_process_itself_exits_with_2(own_world: World) -> None:
    """The whole way, without the launcher."""
    command = [sys.executable, "-m", "forkrl", "train", "recipe.toml", "loss.clip_hgh=0.3"]
    done = subprocess.run(command, cwd=own_world.folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n"), signal.SIGTERM) == (2, 1, 15)
