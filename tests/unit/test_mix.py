"""Mixed tasks and curricula: whose prompt is next, what each part may train on, and that all of it resumes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from forkrl.config import CurriculumConfig, TaskConfig, TrainConfig
from forkrl.config.recipe import parse_recipe
from forkrl.errors import UserError
from forkrl.report.plots import inline_svg
from forkrl.report.run_data import RunData, read_run
from forkrl.report.run_page import sections
from forkrl.rollout.held_out import summarise
from forkrl.tasks.mix import mix_task
from forkrl.tasks.stream import PromptStream, open_stream, repeated_prompts
from forkrl.training.metrics import level_metrics, part_metrics, rollout_metrics
from forkrl.types import Prompt, Rollout, RolloutGroup, Task, VerifierResult, VerifierSpec
from tests.fabricated_run import write_run


def prompts(source: str, count: int, level: int = 0) -> list[Prompt]:
    return [Prompt(f"{source}{level}-{i}", "", "", source=source, level=level) for i in range(count)]


def group(prompt: Prompt, *scores: float) -> RolloutGroup:
    rollout = Rollout((1,), (2, 3), torch.zeros(2), torch.zeros(2), "", True)
    return RolloutGroup(prompt, (rollout,) * len(scores), tuple(VerifierResult(score) for score in scores))


WEIGHTS = [
    {"a": 1.0, "b": 1.0},
    {"a": 3.0, "b": 1.0},
    {"a": 0.7, "b": 0.2, "c": 0.1},
    {"a": 1000.0, "b": 1.0},
    {name: 1.0 + index for index, name in enumerate("abcdefgh")},
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda weights: "-".join(f"{value:g}" for value in weights.values()))
@pytest.mark.parametrize("seed", [0, 1])
def test_parts_are_drawn_in_the_proportions_of_their_weights_at_any_moment(
    weights: dict[str, float], seed: int
) -> None:
    every = [prompt for name in weights for prompt in prompts(name, 3)]
    stream = PromptStream(every, seed, weights=weights)
    counts: Counter[str] = Counter()
    for drawn in range(1, 2001):
        counts[stream.take(1)[0].source] += 1
        for name, weight in weights.items():
            assert abs(counts[name] - drawn * weight / sum(weights.values())) < 1.5


def test_each_part_goes_through_all_its_prompts_each_epoch_in_an_order_of_its_own() -> None:
    stream = PromptStream([*prompts("a", 5), *prompts("b", 7)], 0, weights={"a": 1, "b": 1})
    drawn = stream.take(140)
    for name, count in (("a", 5), ("b", 7)):
        ids = [prompt.id for prompt in drawn if prompt.source == name]
        assert all(len(set(ids[i : i + count])) == count for i in range(0, 70, count))
        assert ids[:count] != ids[count : 2 * count]


def stream_with_levels() -> PromptStream:
    every = [*prompts("a", 5), *(prompt for level in range(3) for prompt in prompts("b", 4, level))]
    curriculum = CurriculumConfig(promote_above=0.6, demote_below=0.2, window=3)
    return PromptStream(every, 7, weights={"a": 1, "b": 2}, curricula={"b": curriculum})


def story(stream: PromptStream, start: int, end: int) -> list[tuple[list[str], dict[str, int]]]:
    """Take and observe, a step at a time; how well the model does depends on the step alone."""
    told = []
    for step in range(start, end):
        taken = stream.take(4)
        score = float(step % 10 < 6)
        stream.observe([group(prompt, score) for prompt in taken])
        told.append(([prompt.id for prompt in taken], stream.levels))
    return told


def test_a_stream_resumes_from_its_state_at_any_step() -> None:
    whole = story(stream_with_levels(), 0, 20)
    assert {levels["b"] for _, levels in whole} == {0, 1, 2}
    for stop in range(20):
        before = stream_with_levels()
        story(before, 0, stop)
        state = json.loads(json.dumps(before.state()))
        after = stream_with_levels()
        after.restore(state)
        assert story(after, stop, 20) == whole[stop:]


def test_epochs_are_the_prompts_drawn_over_all_prompts_of_every_part_and_level() -> None:
    """5 prompts in one part and 4 in each of three levels of the other; a restored stream counts on."""
    stream, restored = stream_with_levels(), stream_with_levels()
    assert stream.epochs == 0
    story(stream, 0, 5)
    assert stream.epochs == 20 / 17
    restored.restore(stream.state())
    assert restored.epochs == 20 / 17
    restored.take(14)
    assert restored.epochs == 2


def test_an_abandoned_step_leaves_no_trace() -> None:
    stream, other = stream_with_levels(), stream_with_levels()
    story(stream, 0, 5)
    story(other, 0, 5)
    mark = stream.state()
    stream.observe([group(prompt, 1.0) for prompt in stream.take(9)])
    stream.restore(mark)
    assert stream.state() == mark == other.state()
    assert story(stream, 5, 12) == story(other, 5, 12)


CURRICULUM: list[tuple[str, list[float], list[int]]] = [
    ("rises when the window is full and good", [1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 2]),
    ("stays at the last level", [1] * 9, [0, 0, 1, 1, 1, 2, 2, 2, 2]),
    ("is above, not at the bound", [0.6] * 4, [0, 0, 0, 0]),
    ("goes by the mean of a window that slides", [0, 0.5, 1, 1, 1], [0, 0, 0, 1, 1]),
    ("falls when the window is bad", [1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0]),
    ("stays at the first level", [0, 0, 0, 0], [0, 0, 0, 0]),
]


@pytest.mark.parametrize(("_", "scores", "levels"), CURRICULUM, ids=[case[0] for case in CURRICULUM])
def test_the_level(_: str, scores: list[float], levels: list[int]) -> None:
    stream = stream_with_levels()
    seen = []
    for score in scores:
        prompt = next(prompt for prompt in stream.take(30) if prompt.source == "b")
        assert prompt.level == stream.levels["b"]
        stream.observe([group(prompt, score)])
        seen.append(stream.levels["b"])
    assert seen == levels


def test_groups_of_another_level_or_part_do_not_move_it() -> None:
    """As those that were sampled before the level changed, and scored after."""
    stream = stream_with_levels()
    stream.observe([group(prompt, 1.0) for prompt in prompts("b", 3)])
    assert stream.levels == {"b": 1}
    stream.observe([group(prompt, 1.0) for prompt in (*prompts("b", 3), *prompts("a", 3))])
    assert stream.levels == {"b": 1}
    assert level_metrics(stream.levels) == {"task/level/b": 1.0}
    assert level_metrics({"": 2}) == {"task/level": 2.0}


def part_task(train: Sequence[str], held_out: Sequence[str]) -> Task:
    def ask(id: str) -> Prompt:
        return Prompt(id, f"{id}?", id)

    return Task("t", [ask(id) for id in train], [ask(id) for id in held_out], {"": VerifierSpec("m:f")}, "")


def mixed(tasks: dict[str, Task], weights: dict[str, float] | None = None) -> Task:
    parts = [{"name": "dataset", "data": f"{name}.jsonl", "weight": (weights or {}).get(name, 1.0)} for name in tasks]
    config = TaskConfig(name="mix", parts=parts)  # type: ignore[arg-type]
    return mix_task(config, lambda part: tasks[Path(part.data).stem])


def test_every_prompt_knows_its_part_and_every_part_its_verifier() -> None:
    tasks = {"a": part_task("12", "3"), "b": part_task("45", "6")}
    task = mixed(tasks)
    assert [(prompt.id, prompt.source) for prompt in task.train] == [("1", "a"), ("2", "a"), ("4", "b"), ("5", "b")]
    assert task.verifiers == {"a": VerifierSpec("m:f"), "b": VerifierSpec("m:f")}
    assert task.fingerprint != mixed({"a": tasks["a"], "c": tasks["b"]}).fingerprint
    assert task.fingerprint == mixed(tasks).fingerprint


def test_what_one_part_holds_out_no_other_trains_on(capsys: pytest.CaptureFixture[str]) -> None:
    task = mixed({"a": part_task("123", "45"), "b": part_task("4678", "1596")})
    assert [(prompt.id, prompt.source) for prompt in task.train] == [
        ("2", "a"), ("3", "a"), ("7", "b"), ("8", "b"),
    ]  # fmt: skip
    assert sorted(prompt.id for prompt in task.held_out) == ["1", "4", "5", "6", "9"]
    assert {prompt.id: prompt.source for prompt in task.held_out}["5"] == "a"
    said = capsys.readouterr().err
    assert "a: 1 questions are held out by another part and will not be trained on" in said
    assert task.left_out["held_out"] == 3
    assert "b: 1 held-out questions are held out by a part before it" in said


def test_held_out_prompts_take_turns_by_weight() -> None:
    task = mixed({"a": part_task("z", "123456"), "b": part_task("y", "78")}, {"a": 2.0, "b": 1.0})
    assert "".join(prompt.source for prompt in task.held_out) == "abaabaaa"


def test_the_first_held_out_prompts_are_in_the_proportions_of_the_weights_at_any_number() -> None:
    weights = {"a": 10.0} | {f"b{number}": 1.0 for number in range(10)}
    sizes = {name: int(weight) for name, weight in weights.items()}
    tasks = {name: part_task([name], [f"{name}-{number}" for number in range(size)]) for name, size in sizes.items()}
    task = mixed(tasks, weights)
    for count in range(1, 21):
        drawn = Counter(prompt.source for prompt in task.held_out[:count])
        assert abs(drawn["a"] - count / 2) <= 1
    assert Counter(prompt.source for prompt in task.held_out) == {name: int(weights[name]) for name in weights}


def test_parts_that_are_left_keep_their_proportions_when_another_is_used_up() -> None:
    sizes = {"a": 50, "b": 50, "c": 4}
    tasks = {name: part_task([name], [f"{name}{number}" for number in range(size)]) for name, size in sizes.items()}
    task = mixed(tasks, {"a": 4.0, "b": 1.0, "c": 5.0})
    drawn = Counter(prompt.source for prompt in task.held_out[:54])
    assert drawn["c"] == 4 and abs(drawn["a"] - 40) <= 1


@pytest.mark.parametrize(
    ("rollout", "dynamic", "says"),
    [
        (8, {}, ""),
        (16, {}, "rollout.prompts_per_step = 16 takes 16 prompts at a time from the task, which has 8 to train on: "),
        (8, {"enabled": True, "generation_prompts": 12}, "dynamic_sampling.generation_prompts = 12 takes 12 prompts"),
        (8, {"generation_prompts": 12}, ""),
    ],
)
def test_more_prompts_per_step_than_there_are_is_said(rollout: int, dynamic: dict[str, Any], says: str) -> None:
    recipe = {"rollout": {"prompts_per_step": rollout}, "dynamic_sampling": {"enabled": False} | dynamic}
    config = parse_recipe(TrainConfig, recipe | {"training": {"mini_batch_prompts": 8}}, "test")
    found = repeated_prompts(prompts("", 8), config)
    assert found.startswith(says) and bool(found) == bool(says)


def test_a_part_with_too_few_prompts_for_its_weight_is_named() -> None:
    parts = [{"name": "countdown", "source": "a", "weight": 3}, {"name": "countdown", "source": "b"}]
    recipe = {"task": {"name": "mix", "parts": parts}, "rollout": {"prompts_per_step": 16}}
    config = parse_recipe(TrainConfig, recipe | {"training": {"mini_batch_prompts": 16}}, "test")
    assert repeated_prompts([*prompts("a", 12), *prompts("b", 4)], config) == ""
    said = repeated_prompts([*prompts("a", 11), *prompts("b", 4)], config)
    assert "takes 12 prompts at a time from part a, which has 11 to train on" in said


def test_a_part_left_with_nothing_is_named() -> None:
    with pytest.raises(UserError, match="every question of a is held out by another part"):
        mixed({"a": part_task("12", "3"), "b": part_task("45", "12")})


def test_a_fault_in_a_part_names_the_part() -> None:
    def fail(part: TaskConfig) -> Task:
        raise UserError("task.data = 'x.jsonl': no such file or folder")

    config = TaskConfig(name="mix", parts=[{"name": "dataset", "data": "x.jsonl"}])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="part x of task.parts: task.data = 'x.jsonl': no such file"):
        mix_task(config, fail)


COUNTDOWN, GYM = {"name": "countdown"}, {"name": "reasoning-gym", "generator": "chain_sum"}
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"name": "mix"}, "task.parts is empty; give a table [[task.parts]] for each task"),
    ({"parts": [COUNTDOWN]}, 'task.parts is for task.name = "mix", but task.name = "countdown"'),
    ({"name": "mix", "parts": [COUNTDOWN, COUNTDOWN]}, 'task.parts has two parts called "countdown"; give one of'),
    ({"name": "mix", "parts": [COUNTDOWN | {"weight": 0}]}, "task.parts.0.weight = 0: input should be greater than 0"),
    ({"name": "mix", "parts": [GYM, GYM | {"wieght": 1}]}, "task.parts.1.wieght is not a setting; did you mean"),
    ({"name": "mix", "parts": [COUNTDOWN | {"source": "a b"}]}, "task.parts.0.source = 'a b': string should match"),
    ({"name": "mix", "parts": [GYM, {"name": "mix", "parts": [GYM]}]}, "task.parts.1: task.name: a part of a mix can"),
    ({"name": "mix", "parts": [{"name": "dataset"}]}, "task.parts.0: task.data is empty"),
    ({"name": "mix", "parts": [{"name": "reasoning-gym"}]}, "task.parts.0: task.generator is empty"),
    ({"name": "mix", "parts": [GYM], "template": "{prompt}!"}, "task.template is for task.name = "),
    ({"name": "mix", "parts": [{"name": "dataset", "data": "x.jsonl", "verifier": "none"}]}, "gives no scores, which"),
    (
        {"name": "mix", "parts": [COUNTDOWN | {"curriculum": {"promote_above": 0.7}}]},
        "task.curriculum is for task.name",
    ),
    (GYM | {"curriculum": {"window": 3}}, "task.curriculum.window has no effect without task.curriculum.promote_above"),
    (
        GYM | {"curriculum": {"promote_above": 0.5, "demote_below": 0.5}},
        "demote_below = 0.5 is not below promote_above",
    ),
    (GYM | {"curriculum": {"promote_above": 0.5, "start": 3, "max_level": 2}}, "max_level = 2 is below start = 3"),
    (GYM | {"curriculum": {"promote_above": 0.5}, "difficulty": 1}, "task.difficulty = 1 is a fixed level"),
    ({"strict": True}, 'task.strict is for task.name = "reasoning-gym", but task.name = "countdown"'),
]


@pytest.mark.parametrize(("values", "message"), MISTAKES, ids=lambda value: str(value)[:60])
def test_a_mistake_is_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(TrainConfig, {"task": values}, "recipe.toml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_opens_its_stream() -> None:
    recipe = {"name": "mix", "parts": [COUNTDOWN | {"weight": 3}, GYM | {"curriculum": {"promote_above": 0.5}}]}
    config = parse_recipe(TrainConfig, {"task": recipe}, "recipe.toml").task
    assert [part.label for part in config.parts] == ["countdown", "chain_sum"]
    stream = open_stream([*prompts("countdown", 5), *prompts("chain_sum", 5)], config, 0)
    assert Counter(prompt.source for prompt in stream.take(40)) == {"countdown": 30, "chain_sum": 10}
    assert stream.levels == {"chain_sum": 0}


def test_metrics_of_each_part() -> None:
    a, b = prompts("a", 2), prompts("b", 1)
    groups = [group(a[0], 1.0, 0.0), group(a[1], 1.0, 1.0), group(b[0], 0.0, 0.0)]
    assert part_metrics(groups, groups[1:]) == {
        "reward/accuracy/a": 0.75, "response/length/a": 2.0, "response/truncated_fraction/a": 0.0,
        "sampling/groups/a": 2.0, "sampling/dropped/a": 1.0,
        "reward/accuracy/b": 0.0, "response/length/b": 2.0, "response/truncated_fraction/b": 0.0,
        "sampling/groups/b": 1.0, "sampling/dropped/b": 1.0,
    }  # fmt: skip
    assert part_metrics([group(Prompt("1", "", ""), 1.0)], []) == {}
    figures = summarise(groups)
    assert (figures["accuracy"], figures["accuracy/a"], figures["accuracy/b"]) == (0.5, 0.75, 0.0)
    assert figures["accuracy_low/a"] < 0.75 < figures["accuracy_high/a"]
    assert figures["problems/a"] == 2


def test_a_dropped_group_of_equal_partial_marks_was_not_right() -> None:
    a = prompts("a", 3)
    dropped = [group(a[0], 0.01, 0.01), group(a[1], 1.0, 1.0), group(a[2], 0.0, 0.0)]
    metrics = rollout_metrics(dropped, dropped, 0, 1, {"rollout": 1.0, "reward": 1.0})
    assert (metrics["sampling/dropped_all_right"], metrics["sampling/dropped_all_wrong"]) == (1.0, 2.0)


def test_the_report_shows_each_part_and_each_level(tmp_path: Path) -> None:
    run = with_parts(write_run(tmp_path / "run", steps=20, planned_steps=20))
    titles = [section.title for section in sections(run)]
    assert titles[:3] == ["Learning curve", "Accuracy by part", "Level of difficulty"]
    section = sections(run)[1]
    assert section.figure is not None
    svg = inline_svg(section.figure, "parts")
    assert "chain$um" in svg and "countdown" in svg
    assert not section.missing
    plain = read_run(write_run(tmp_path / "plain", steps=20, planned_steps=20), 4)
    assert "Accuracy by part" not in [section.title for section in sections(plain)]


def with_parts(folder: Path) -> RunData:
    """The same figures for two parts, one of a name that mathematics would spoil."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        for name in ("reward/accuracy", "eval/accuracy", "eval/accuracy_low", "eval/accuracy_high"):
            if name in row:
                row |= {f"{name}/countdown": row[name], f"{name}/chain$um$": row[name] / 2}
        if row["step"]:
            row["task/level/chain$um$"] = row["step"] // 5
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_run(folder, 4)
