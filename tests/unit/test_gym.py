"""reasoning-gym as a task: questions that are the same in every process, judged by its scorers, none of which may run
what a model wrote."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import forkrl.tasks.gym
from forkrl.config import CurriculumConfig, TaskConfig
from forkrl.errors import UserError
from forkrl.rewards import VerifierPool
from forkrl.rewards.gym import _READABLE, Source, final_answer, make_entry, open_source, verify_gym
from forkrl.tasks.gym import GYM_VERIFIER, gym_prompts, gym_task
from forkrl.tasks.gym_questions import questions
from forkrl.types import Prompt, Task
from tests.gym_survey import EXAMPLES, WRONG, examine, gold_answer

# Those whose questions depend on the order of hashing or of the global random numbers, on the size of the data set, or
# which have no gold answer; and two that do not.
SELECTION = ("isomorphic_strings", "list_functions", "acre", "graph_color", "chain_sum", "word_ladder")


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool({"": GYM_VERIFIER}) as pool:
        yield pool


def task(generator: str, **settings: Any) -> Task:
    sizes = {"held_out_rows": 8, "train_prompts": 8}
    return gym_task(
        TaskConfig(name="reasoning-gym", generator=generator, **(sizes | settings)), apply_chat_template=None
    )


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions that depend on no order of hashing need no process of their own, which takes most of a second."""
    monkeypatch.setattr(forkrl.tasks.gym, "_questions", lambda request: questions(**request))


def asked(generator: str, **changes: Any) -> list[dict[str, Any]]:
    request: dict[str, Any] = {"settings": {}, "seed": 0, "levels": [None], "held_out": 2, "train": 2} | changes
    return list(questions(generator=generator, **request))


@pytest.mark.parametrize("generator", SELECTION)
def test_a_question_is_made_again_in_another_process_and_judged(generator: str, pool: VerifierPool) -> None:
    prompts = gym_prompts(generator, count=4)
    gold = [gold_answer(prompt) for prompt in prompts]
    results = pool.verify(
        [(prompt, f"So: <answer>{text}</answer>") for prompt, text in zip(prompts, gold, strict=True)]
    )
    assert [(result.score, result.failure) for result in results] == [(1.0, "")] * 4
    wrong = pool.verify([(prompt, f"<answer>{text}</answer>") for prompt in prompts for text in WRONG])
    assert all(result.score < 1 and not result.failure for result in wrong)


@pytest.mark.slow
def test_every_generator_as_the_documentation_says(pool: VerifierPool) -> None:
    """The table of docs/tasks.md, whatever its times."""
    text = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.count(" | ") == 5 and not line.startswith("| gen")]
    assert len(rows) == 104
    for name, levels, _, gold, _, note in rows:
        found = examine(name.strip("| "), pool)
        assert found.levels == levels
        assert (not found.gold) == (gold == "none known")
        assert not found.failures
        if found.gold:
            assert gold == f"{sum(score == 1 for score in found.gold)} of {len(found.gold)}"
        assert found.best_wrong < 1
        assert ("guarded" in note) == (found.generator in _READABLE)


FINAL = [
    ("<answer>4</answer>", "4"),
    ("<answer>\n 4 5 \n</answer> done", "4 5"),
    ("<answer>1</answer> no: <answer>2</answer>", "2"),
    ("<answer>1 <answer>2</answer>", "2"),
    ("<answer></answer>", ""),
    ("4", None),
    ("<answer>4", None),
    ("4</answer>", None),
    ("</answer>4<answer>", None),
    ("<answer>7</answer></answer>", "7"),
    ("<answer>" * 300_000, None),
    ("<answer>" * 300_000 + "7</answer>" * 300_000, ""),
]


@pytest.mark.parametrize(("response", "answer"), FINAL, ids=lambda value: str(value)[:20])
def test_the_last_complete_answer_counts(response: str, answer: str | None) -> None:
    found = final_answer(response)
    assert (found is None) == (answer is None)
    if answer:
        assert found == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think><answer>3</answer>", None),
        ("<think><answer>3</answer></think>", None),
        ("<think><answer>3</answer></think><answer>4</answer>", "4"),
        ("<answer>3</answer></think><answer>4</answer><|im_end|>", "4"),
    ],
)
def test_an_answer_inside_the_thinking_does_not_count(response: str, answer: str | None) -> None:
    assert final_answer(response) == answer


CODE = [
    "__import__('os').system('touch {path}')",
    "open('{path}', 'w')",
    "[open('{path}', 'w') for x in [1]]",
    "(lambda: open('{path}', 'w'))()",
    'S(\'open("{path}","w")\')',
    "[].__class__.__base__.__subclasses__()",
    "x.func.__globals__['__builtins__']['open']('{path}', 'w')",
    "exec(chr(111))",
    "print(1)",
    "1 if open('{path}', 'w') else 2",
]


@pytest.mark.parametrize("generator", sorted(_READABLE))
@pytest.mark.parametrize("code", CODE)
def test_no_scorer_runs_what_a_model_wrote(generator: str, code: str, tmp_path: Path) -> None:
    """In this very process, so that a file would be seen."""
    prompt = _one_prompt(generator)
    path = tmp_path / "seen"
    judgement = verify_gym(prompt.answer, f"<answer>{code.replace('{path}', str(path))}</answer>")
    assert not path.exists()
    assert judgement.score == 0
    assert not _READABLE[generator](code)


@pytest.mark.parametrize("generator", sorted(_READABLE))
def test_right_answers_pass_the_guard(generator: str) -> None:
    for entry in asked(generator, held_out=12, train=0):
        if "Integral" in entry["answer"]:  # the generator could not solve its own question
            continue
        assert _READABLE[generator](entry["answer"].strip())


@pytest.mark.parametrize(
    ("generator", "answer"),
    [
        ("complex_arithmetic", "nan"),
        ("complex_arithmetic", "(nan)"),
        ("coin_flip", "0"),
        ("coin_flip", "0.0"),
        ("coin_flip", "1e-999999999"),
        ("simple_integration", "m" * 5_000 + "!"),
        ("polynomial_multiplication", "1" * 5_000 + "!"),
    ],
)
def test_what_would_fool_a_scorer_or_hold_it_up_scores_nothing(generator: str, answer: str) -> None:
    prompt = _one_prompt(generator)
    assert verify_gym(prompt.answer, f"<answer>{answer}</answer>").score == 0


def test_a_probability_is_right_where_it_is_close() -> None:
    for entry in asked("coin_flip", held_out=12, train=0):
        prompt = _as_prompt("coin_flip", entry)
        assert verify_gym(prompt.answer, f"<answer>{Fraction(entry['answer'])}</answer>").score == 1
        assert verify_gym(prompt.answer, f"<answer>{float(entry['answer']) * 1.5}</answer>").score < 1


def test_an_integral_left_as_it_was_is_no_answer() -> None:
    """reasoning-gym differentiates it, finds the question, and gives full marks."""
    (asking,) = asked("simple_integration", held_out=1, train=0)
    (integrand,) = re.findall(r"∫ (.*) d\w", asking["question"])
    unsolved = f"Integral({integrand}, {'X' if 'X' in integrand else 'x'})"
    source = Source("simple_integration", "{}", None, asking["seed"], asking["size"])
    assert open_source(source).score_answer(unsolved, make_entry(source, asking["index"])) == 1
    assert verify_gym(_one_prompt("simple_integration").answer, f"<answer>{unsolved}</answer>").score == 0


def _one_prompt(generator: str) -> Prompt:
    """Made in this process: these nine generators do not depend on string hashing."""
    return _as_prompt(generator, asked(generator, held_out=1, train=0)[0])


def _as_prompt(generator: str, entry: dict[str, Any]) -> Prompt:
    config = TaskConfig(name="reasoning-gym", generator=generator)
    return forkrl.tasks.gym._prompt(config, entry, lambda content, place: "")


def test_another_question_than_the_prompts_is_not_judged(pool: VerifierPool) -> None:
    (prompt,) = gym_prompts("chain_sum", count=1)
    changed = json.loads(prompt.answer) | {"index": 1}
    result = pool.verify([(Prompt("1", "", json.dumps(changed)), "<answer>1</answer>")])[0]
    assert result.failure == "error"
    assert "gives another question" in pool.first_failures["error"]


@pytest.mark.usefixtures("same_process")
def test_partial_marks_and_strict_ones() -> None:
    prompt = _one_prompt("countdown")
    numbers = "<answer>1+2</answer>"
    assert 0 < verify_gym(prompt.answer, numbers).score < 1
    assert verify_gym(prompt.answer, numbers, strict=True) == (0.0, "1+2")
    right = f"<answer>{json.loads(prompt.answer)['answer']}</answer>"
    assert verify_gym(prompt.answer, right, strict=True).score == 1
    assert task("countdown", strict=True).verifiers[""].options == {"strict": True}


def test_questions_are_distinct_and_held_out_ones_stay_out() -> None:
    """Neighbouring seeds too: reasoning-gym's entry i of seed s is entry i - 1 of seed s + 1."""
    found = [entry["question"] for entry in asked("chain_sum", held_out=200, train=400)]
    assert len(found) == len(set(found)) == 600
    beside = {entry["question"] for entry in asked("chain_sum", held_out=200, train=400, seed=1)}
    assert len(beside & set(found)) < 60


def test_a_task_is_the_same_in_every_process() -> None:
    one = task("isomorphic_strings")
    assert one.fingerprint == task("isomorphic_strings").fingerprint
    assert len(one.train) == len(one.held_out) == 8


@pytest.mark.usefixtures("same_process")
def test_a_task_changes_with_its_settings() -> None:
    changes: list[dict[str, Any]] = [
        {}, {"question_seed": 1}, {"settings": {"max_terms": 9}}, {"instruction": ""}, {"train_prompts": 9},
    ]  # fmt: skip
    tasks = [task("chain_sum", **change) for change in changes]
    assert len({one.fingerprint for one in tasks}) == 5
    assert all(prompt.text.endswith("between <answer> and </answer>.") for prompt in tasks[0].train)


@pytest.mark.usefixtures("same_process")
def test_the_templates_go_around_the_question() -> None:
    config = TaskConfig(
        name="reasoning-gym", generator="chain_sum", held_out_rows=1, train_prompts=1, template="User: {prompt}\nBot:"
    )
    (prompt,) = gym_task(config, apply_chat_template=lambda messages: f"<{messages[0]['content']}>").train
    assert prompt.text.startswith("<User: State the final answer") and prompt.text.endswith("</answer>.\nBot:>")


@pytest.mark.usefixtures("same_process")
def test_a_curriculum_has_questions_of_every_level() -> None:
    curriculum = CurriculumConfig(promote_above=0.7, start=1, max_level=3)
    found = task("chain_sum", curriculum=curriculum, held_out_rows=7, train_prompts=5)
    assert Counter(prompt.level for prompt in found.train) == {1: 5, 2: 5, 3: 5}
    assert Counter(prompt.level for prompt in found.held_out) == {1: 3, 2: 2, 3: 2}
    assert all(json.loads(prompt.answer)["level"] == prompt.level for prompt in found.train)


def test_a_curriculum_ends_at_the_last_level_that_the_generator_can_do() -> None:
    assert {entry["level"] for entry in asked("caesar_cipher", levels=[0, None])} == {0, 1}


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("chain_smu", {}, 'task.generator = "chain_smu" is not a generator of reasoning-gym; did you mean chain_sum or'),
    ("zzz", {}, "docs/tasks.md lists them"),
    ("composite", {}, 'it mixes other generators; task.name = "mix"'),
    ("game_of_life_halting", {}, "calls every answer right"),
    ("chain_sum", {"settings": {"min_term": 2}}, "not a setting of reasoning-gym's chain_sum; did you mean min_terms?"),
    ("chain_sum", {"settings": {"zzz": 2}}, "it has: min_terms, max_terms"),
    ("chain_sum", {"settings": {"min_terms": 5, "max_terms": 2}}, "max_terms must be >= min_terms; change them"),
    ("chain_sum", {"settings": {"min_terms": "two"}}, "'>' not supported between instances of 'str' and 'int'"),
    ("chain_sum", {"settings": {"seed": 2}}, "task.settings.seed cannot be set; use task.question_seed"),
    ("chain_sum", {"levels": [77]}, "chain_sum has levels 0 to 10, not 77"),
    ("chain_sum", {"levels": [0, 77]}, "chain_sum has levels 0 to 10, not 77"),
    ("chain_sum", {"levels": [77, None]}, "chain_sum has levels 0 to 10, not 77"),
    ("acre", {"levels": [1]}, "acre has no levels of difficulty"),
    ("caesar_cipher", {"levels": [2]}, "at level 2: rotation must be in range"),
    ("caesar_cipher", {"levels": [0, 3]}, "at level 2: rotation must be in range"),
    ("chain_sum", {"levels": [1], "settings": {"min_terms": 2}}, "min_terms of chain_sum is decided by its level"),
]  # fmt: skip


@pytest.mark.parametrize(("generator", "changes", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_line(generator: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        asked(generator, **changes)
    assert "\n" not in str(caught.value)


def test_mistakes_come_out_of_the_process_that_makes_the_questions() -> None:
    with pytest.raises(UserError, match="chain_smu"):
        gym_prompts("chain_smu", count=1)


@pytest.mark.usefixtures("same_process")
def test_too_few_distinct_questions() -> None:
    few = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(
        UserError, match=r"leaves nothing to train on: chain_sum has few distinct .* \(\d+ were found\)"
    ):
        task("chain_sum", settings=few, held_out_rows=2000)


def test_without_the_package_the_line_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'forkrl\[gym\]'"):
        gym_prompts("chain_sum", count=1)


def test_the_examples_of_the_survey_are_needed() -> None:
    """A generator that gets a gold answer needs no example any more."""
    for generator in EXAMPLES:
        assert asked(generator, held_out=1, train=0)[0]["answer"] is None
