"""``forkrl eval`` without benchmarks: which prompts it takes, that it measures what a run does, and that it refuses
before it samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from forkrl.evaluation.folder import read_results
from tests.smoke.world import Outcome, Run, World, write_prompts

DATASET = ("task.name=dataset", "task.verifier=first_character:first_character")
SHORT = ("rollout.max_prompt_tokens=8", "rollout.max_response_tokens=6", "runtime.device=cpu")


def evaluated(world: World, *argv: str) -> dict[str, Any]:
    """The figures of an evaluation that has to succeed, of its one benchmark; pass@2 is among them."""
    shutil.rmtree(world.folder / "evaluation", ignore_errors=True)
    outcome = world.run("eval", *argv, "--out", "evaluation", without_report=True)
    assert outcome.code == 0, outcome.stderr
    passes = read_results(world.folder / "evaluation").tables["passes"].set_index("k")["pass"]
    return {**figures_of(world.folder / "evaluation"), "pass@2": passes.get(2), "stdout": outcome.stdout}


def figures_of(folder: Path) -> dict[str, Any]:
    """The row of the one benchmark of an evaluation."""
    (figures,) = read_results(folder).tables["benchmarks"].to_dict("records")
    return {str(name): value for name, value in figures.items()}


def refused(world: World, *argv: str) -> str:
    """The one line of an evaluation that has to fail before a response is judged."""
    outcome = world.run("eval", *argv)
    assert outcome.code == 2, outcome
    assert "evaluating" not in outcome.stdout + outcome.stderr
    return outcome.line


@pytest.fixture(scope="module")
def run(world: World) -> Run:
    """Its engine's batches, of 5, fit neither the samples nor the prompts; its training samples from a nucleus."""
    overrides = ("training.steps=2", "rollout.max_sequences=5", "rollout.top_p=0.9", "rollout.top_k=12")
    return world.trained("run", *overrides, "eval.problems=7", "eval.samples=2")


def test_a_run_is_evaluated_as_it_was_while_it_trained(world: World, run: Run) -> None:
    figures = evaluated(world, "run", "--problems", "7", "--samples", "2", "--temperature", "1")
    last = run.metrics[-1]
    same = ("accuracy", "accuracy_low", "accuracy_high", "length", "entropy", "pass@2")
    measured = {name: figures[name] for name in same}
    measured |= {"truncated_fraction": figures["truncated"], "problems": figures["questions"]}
    assert measured == pytest.approx({name: last[f"eval/{name}"] for name in measured}, rel=1e-6)
    assert 0 < figures["accuracy"] < 1
    assert "note: prompts.jsonl: the first 7 of 8 questions." in figures["stdout"]


@pytest.fixture(scope="module")
def stepped(world: World) -> Run:
    """Keeps every checkpoint, and holds fewer rows out than the data set has."""
    return world.trained("stepped", "training.steps=3", "checkpoint.every=1", "checkpoint.keep=9", "eval.problems=7")


def evaluated_inside(world: World, model: str, folder: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """The figures, the questions and the settings of an evaluation that writes into its run."""
    outcome = world.run("eval", model, without_report=True)
    assert outcome.code == 0, outcome.stderr
    path = world.folder / "stepped/analysis" / folder
    figures = figures_of(path)
    (questions,) = (path / "questions").iterdir()
    return figures, questions.read_text(), json.loads((path / "settings.json").read_text())


def test_a_run_at_a_step_is_evaluated_as_the_run_is(world: World, stepped: Run) -> None:
    _, questions, settings = evaluated_inside(world, "stepped", "eval")
    for at in ("step-1", "base"):
        figures, questions_there, settings_there = evaluated_inside(world, f"stepped@{at}", f"eval-{at}")
        assert figures["questions"] == 7
        assert questions_there == questions
        assert {key for key in settings if settings[key] != settings_there[key]} == {"model", "checkpoint", "weights"}
        assert settings_there["checkpoint"] == at
    # The run itself measured its first model, at step 0.
    assert figures["accuracy"] == pytest.approx(stepped.metrics[0]["eval/accuracy"])
    # A path inside the run is the same question as RUN@step-N: in the same folder nothing is left to sample.
    by_path = evaluated_inside(world, "stepped/checkpoints/step-1", "eval-step-1")
    assert by_path[1:] == (questions, settings | {key: by_path[2][key] for key in ("model", "checkpoint", "weights")})
    assert by_path[2]["model"] == "stepped@step-1"
    assert not (world.folder / "evals").exists()


def test_a_step_that_was_not_kept_is_an_error_that_lists_those_there_are(world: World, stepped: Run) -> None:
    for model in ("stepped@step-8", "stepped/checkpoints/step-8"):
        for command in ("eval", "analyze", "branch", "decode-temps"):
            outcome = world.run(command, model)
            assert outcome.code == 2, outcome
            assert outcome.line == (
                "forkrl: stepped/checkpoints: no checkpoint of step 8; available: step-1, step-2, step-3"
            )
    for at in ("step-x", "step-02", "latest", ""):
        assert f"stepped@{at}: after @ comes step-N or base" in refused(world, f"stepped@{at}")
    assert "'nowhere@step-8': no such folder" in refused(world, "nowhere@step-8")


def test_commands_that_compare_models_take_a_run_at_a_step(world: World, stepped: Run) -> None:
    outcome = world.run("drift", "stepped@base", "stepped/checkpoints/step-2", "stepped", "--bins", "2")
    assert outcome.code == 0, outcome.stderr
    stored = json.loads((world.folder / "stepped/analysis/drift/settings.json").read_text())
    assert [path for _, path, _ in stored["checkpoints"]] == [
        "model", "stepped/checkpoints/step-2", "stepped/checkpoints/step-3"
    ]  # fmt: skip


def test_a_file_is_evaluated_whole(world: World) -> None:
    write_prompts(world.folder / "aime.jsonl", [{"prompt": f"{n}=", "answer": "13579"} for n in range(30)])
    figures = evaluated(world, "model", *DATASET, *SHORT, "task.data=aime.jsonl", "--samples", "1")
    assert figures["questions"] == 30


def test_held_out_data_is_evaluated_whole_whatever_the_recipe_takes_of_it(world: World, run: Run) -> None:
    write_prompts(world.folder / "aside.jsonl", [{"prompt": f"{n}+", "answer": "13579"} for n in range(11)])
    for model in ("model", "run"):
        recipe = ("--recipe", "recipe.toml") if model == "model" else ()
        figures = evaluated(world, model, *recipe, "task.held_out_data=aside.jsonl")
        assert figures["questions"] == 11, model
    assert evaluated(world, "run", "task.held_out_data=aside.jsonl", "eval.problems=4")["questions"] == 4


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("run", "model.path=model"), "model.path=model: has no effect; the model is the first argument"),
        (("run", "rollout.top_p=0.5"), "rollout.top_p=0.5: has no effect on an evaluation"),
        (("run", "training.steps=9"), "training.steps=9: has no effect on an evaluation"),
        (("run", "eval={samples=2}"), "write each setting as section.key=value"),
        (("run", "eval.samples=2", "--samples", "3"), "has no effect along with --samples"),
        (("run", "eval.smaples=2"), "eval.smaples is not a setting; did you mean eval.samples?"),
        (("run", "--recipe", "recipe.toml"), "run is a run and keeps its own recipe"),
        (("model", "task.data=prompts.jsonl"), "task.name"),
        (("model", *DATASET, "task.data=prompts.jsonl", "task.held_out_rows=3"), "has no effect; all rows are taken"),
        (("run", "task.data=a", "task.held_out_data=b"), "the prompts come from task.held_out_data = 'b'; set that"),
        (("run", "--out", "recipe.toml"), "recipe.toml: is a file; name another folder with --out"),
        (("run", "--out", "model"), "model: is not empty (it holds config.json) and has no settings.json"),
        (("run", "--samples", "0"), "--samples 0: must be at least 1"),
        (("run", "--max-tokens", "0"), "--max-tokens 0: must be at least 1"),
        (("run", "--max-tokens", "4", "rollout.max_response_tokens=5"), "has no effect along with --max-tokens"),
        (("run", "--prompt", "chat"), "--prompt: is for --bench; a task has settings of its own"),
        (("run", "--mirror", "there"), "--mirror: is for --bench; a task has settings of its own"),
        (("run", "--server", "http://127.0.0.1:9"), "give the model's name at the server in place of the run"),
        (("model", "--server", "http://127.0.0.1:9", "rollout.max_sequences=4"), "on a model that a server holds"),
        (("model", "--server", "http://127.0.0.1:9"), "--server http://127.0.0.1:9/v1: cannot be reached"),
        (("model", "--engine", "vllm", "--server", "http://127.0.0.1:9"), "has no effect on a model that a server hol"),
        ((), "name a model first: forkrl eval MODEL --bench NAME"),
        (("run", "--temperature", "-1"), "--temperature -1: must be at least 0"),
        (("run", "--temperature", "nan"), "--temperature nan: must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused(world: World, run: Run, argv: tuple[str, ...], says: str) -> None:
    assert says in refused(world, *argv)


def test_a_prompt_that_is_too_long_is_found_before_the_first_is_sampled(world: World) -> None:
    rows = [{"prompt": f"{n}=", "answer": "1"} for n in range(40)] + [{"prompt": "11111+11=", "answer": "1"}]
    write_prompts(world.folder / "long.jsonl", rows)
    outcome: Outcome = world.run(
        "eval", "model", *DATASET, *SHORT, "task.data=long.jsonl", "rollout.max_sequences=4", "--samples", "1",
        faults=[{"point": "token", "count": 7, "signal": 9}],  # after the few tokens that opening a model decodes
    )  # fmt: skip
    assert outcome.code == 2, outcome
    assert "long.jsonl line 41: 9 tokens, over rollout.max_prompt_tokens = 8" in outcome.line


def test_weights_that_become_nan_stop_the_evaluation(world: World) -> None:
    outcome = world.run(
        "eval", "model", *DATASET, *SHORT, "task.data=prompts.jsonl",
        faults=[{"point": "token", "count": 1, "after": True, "action": "poison"}],
    )  # fmt: skip
    assert outcome.code == 1, outcome
    last = outcome.stderr.splitlines()[-1]
    assert last.startswith("forkrl: the evaluation stopped: the model's logits are NaN or infinite while sampling")


def test_responses_shorter_than_the_penalty_of_training(world: World, tmp_path: Path) -> None:
    """The defaults of reward.overlong_cache and training.micro_batch_tokens bind no evaluation."""
    figures = evaluated(
        world, "model", *DATASET, "task.data=prompts.jsonl", "rollout.max_response_tokens=2", "--problems", "3"
    )
    assert figures["length"] <= 2


def test_a_format_that_matches_nothing_is_reported_and_announced(world: World) -> None:
    """By an evaluation with its share and three responses, and in training too."""
    nothing = ("recipe.toml", "task.answer_format=boxed", "eval.problems=24")
    shutil.rmtree(world.folder / "evaluation", ignore_errors=True)
    outcome = world.run("eval", "model", "--recipe", *nothing, "--samples", "9", "--out", "evaluation")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stderr.count("task.answer_format = 'boxed' found no answer in the first 200 responses") == 1
    assert "note: prompts.jsonl: no answer was found in 100.0% of the responses." in outcome.stdout
    shown = outcome.stdout.partition("Responses without an answer:\n")[2].splitlines()[1:4]
    assert [line.split()[0] for line in shown] == ["prompts"] * 3
    texts = [json.loads(line)["text"] for line in (world.folder / "evaluation/responses/prompts.jsonl").open()]
    table = read_results(world.folder / "evaluation").tables["unanswered"]
    assert len(table) == 3 and set(map(str, table["end_of_response"])) <= {text[-300:] for text in texts} | {"nan"}

    trained = world.train("nothing", *nothing[1:], "eval.samples=32")
    assert trained.code == 1
    assert "task.answer_format = 'boxed' found no answer in the first 200 responses" in trained.stdout + trained.stderr


def test_a_format_decides_what_the_verifier_reads(world: World) -> None:
    """Its answer is any odd digit; the prefill is one, so without a format every response is right."""
    given = ("model", "--recipe", "recipe.toml", 'task.assistant_prefill="1"', "--samples", "2")
    assert evaluated(world, *given)["accuracy"] == 1
    figures = evaluated(world, *given, "task.answer_format=(?s)^1(.)")
    assert 0 < figures["accuracy"] < 1
    odd = 0
    for line in (world.folder / "evaluation/responses/prompts.jsonl").open():
        text = json.loads(line)["text"]
        odd += text[:1] in tuple("13579") and bool(text.strip())
    assert figures["accuracy"] == odd / 48
    (first, *_) = (world.folder / "evaluation/questions/prompts.jsonl").read_text().splitlines()
    assert json.loads(first)["prompt"].endswith("=1")
