"""The report page: what it says of a run, what it says when pieces are missing, and that hostile text stays text."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forkrl.config import TrainConfig
from forkrl.config.recipe import load_recipe, recipe_toml
from forkrl.errors import UserError
from forkrl.report import write_run_report
from forkrl.report.fork_data import fork_data
from forkrl.report.formatting import duration
from forkrl.report.run_data import read_run
from forkrl.report.run_page import histogram_counts, reproducing_command, run_forks
from forkrl.report.run_summary import cards, headline, status
from forkrl.stats.intervals import mean_with_interval
from tests.fabricated_run import SCHEMA, response_row, write_rollouts, write_run
from tests.report_page import Page, decoded

HOSTILE = "</script><img src=x onerror=alert(1)>&\u2028\x1b[31m\x00\u202e"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "countdown-top20", problems=40)


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(write_run_report(run))


def metrics_of(folder: Path, *rows: dict[str, Any]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_verdict_states_change_intervals_problems_steps_and_time(page: Page) -> None:
    assert "Held-out accuracy rose from 17.0% [13.7, 20.3] at step 0 to 45.5% [41.2, 49.8] at step 60" in page.text
    change = r"\+28\.5 points \[\+24\.\d, \+32\.\d\] paired by problem, p < 0\.001"
    assert re.search(rf"on 512 problems; {change}\. 60 training steps took 4 min", page.text)
    assert "This run stopped at step" not in page.text


def evaluated(folder: Path, before: list[list[float]], after: list[list[float]]) -> Path:
    """A run with two evaluations of the same problems."""
    write_run(folder, steps=0)
    rows = []
    for step, scores in ((0, before), (5, after)):
        estimate = mean_with_interval(scores)._asdict()
        rows.append({"step": step, "eval/accuracy": estimate["mean"]})
        rows[-1] |= {f"eval/accuracy_{end}": estimate[end] for end in ("low", "high")}
        (folder / f"rollouts/scores-{step:06d}.json").write_text(
            json.dumps({f"q{i}": row for i, row in enumerate(scores)})
        )
    metrics_of(folder, *rows)
    return folder


def test_evaluations_in_which_nothing_was_judged_are_no_result(tmp_path: Path) -> None:
    write_run(tmp_path, steps=0)
    row = {
        "eval/accuracy": 0.0,
        "eval/accuracy_low": 0.0,
        "eval/accuracy_high": 0.1,
        "eval/problems": 8,
        "eval/samples": 2,
    }
    failed = {"eval/verifier_failures": 16}
    metrics_of(tmp_path, {"step": 0} | row | failed, {"step": 5} | row | failed)
    text = headline(read_run(tmp_path, 12))
    assert text.startswith("The verifier judged no held-out response at step 0 and 5, so accuracy measures nothing")
    metrics_of(tmp_path, {"step": 0} | row | {"eval/verifier_failures": 15}, {"step": 5} | row)
    assert "measures nothing" not in headline(read_run(tmp_path, 12))


GAIN = [[0.0]] * 60 + [[1.0]] * 40, [[1.0]] * 8 + [[0.0]] * 52 + [[1.0]] * 40  # intervals overlap, 8 won and none lost
NOISE = [[0.0]] * 60 + [[1.0]] * 40, [[1.0]] * 8 + [[0.0]] * 52 + [[0.0]] * 4 + [[1.0]] * 36


def test_two_evaluations_of_the_same_problems_are_compared_problem_by_problem(tmp_path: Path) -> None:
    before, after = GAIN
    text = headline(read_run(evaluated(tmp_path / "up", before, after), 12))
    assert "rose from 40.0%" in text and "+8.0 points [+2.0, +13.7] paired by problem, p = 0.009" in text
    text = headline(read_run(evaluated(tmp_path / "down", after, before), 12))
    assert "fell from 48.0%" in text and "-8.0 points" in text
    text = headline(read_run(evaluated(tmp_path / "same", *NOISE), 12))
    assert "accuracy was 40.0%" in text and "no clear change" in text
    assert not re.search("rose|fell|overlap", text)
    text = headline(read_run(evaluated(tmp_path / "equal", before, before), 12))
    assert "is unchanged at 40.0% [" in text and "from step 0 to step 5" in text and "no clear change" in text


def test_a_run_without_the_scores_of_each_problem_claims_no_more_than_it_knows(tmp_path: Path) -> None:
    folder = evaluated(tmp_path / "run", *GAIN)
    (folder / "rollouts/scores-000000.json").unlink()
    ends = [{"eval/accuracy_low": low, "eval/accuracy_high": low + 0.2} for low in (0.1, 0.6)]
    without_ends: list[dict[str, float]] = [{}, {}]
    for rows in (ends, without_ends):
        before, after = ({"step": 5 * i, "eval/accuracy": 0.2 + 0.5 * i} | row for i, row in enumerate(rows))
        metrics_of(folder, before, after)
        run = read_run(folder, 12)
        assert any("rollouts/scores-000000.json cannot be read" in note for note in run.notes)
        text = headline(run)
        assert "accuracy was 20.0%" in text and "rose" not in text
        assert "the scores of each problem were not recorded, so they are not compared" in text


CHANGED = """
[[provenance.changes]]
after_step = 3
settings = ["training.steps: 3 -> 5", "{}"]
"""


def test_evaluations_of_other_problems_are_compared_on_those_that_both_have(tmp_path: Path) -> None:
    before, after = GAIN
    folder = evaluated(tmp_path / "run", before, after)
    more = {f"q{i}": row for i, row in enumerate([*after, *[[1.0]] * 100])}
    (folder / "rollouts/scores-000005.json").write_text(json.dumps(more))
    with (folder / "config.toml").open("a") as file:
        file.write(CHANGED.format("eval.problems: 100 -> 200"))
    run = read_run(folder, 12)
    text = headline(run)
    assert "rose from 40.0%" in text and "to 48.0%" in text and "+8.0 points [+2.0, +13.7] paired" in text
    assert "on the 100 problems that both evaluations have" in text
    assert "Evaluations changed after step 3: eval.problems: 100 -> 200." in run.notes
    assert ("48.0%", "40.0%") in [(card.value, card.before) for card in cards(run)]
    (folder / "rollouts/scores-000005.json").write_text(json.dumps({f"r{i}": row for i, row in enumerate(after)}))
    text = headline(read_run(folder, 12))
    assert "different problems, so they are not compared" in text and "paired" not in text


def test_evaluations_at_different_temperatures_are_not_compared(tmp_path: Path) -> None:
    folder = evaluated(tmp_path / "run", *GAIN)
    with (folder / "config.toml").open("a") as file:
        file.write(CHANGED.format("eval.temperature: 1.0 -> 0.0"))
    run = read_run(folder, 12)
    text = headline(run)
    assert "was 40.0%" in text and "sampled in different ways (eval.temperature: 1.0 -> 0.0), so they are not" in text
    assert "paired" not in text
    assert "not compared" in next(card.note for card in cards(run))
    Page(write_run_report(folder))


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"q0": [1, 0], "q1": [1]}', '{"q0": ["x"]}', '{"q0": [7]}', "{}", "\xff"]
)
def test_damaged_scores_are_left_out_with_a_note(tmp_path: Path, content: str) -> None:
    folder = evaluated(tmp_path / "run", *GAIN)
    (folder / "rollouts/scores-000005.json").write_text(content, encoding="latin-1")
    run = read_run(folder, 12)
    assert any("rollouts/scores-000005.json cannot be read" in note for note in run.notes)
    assert "the scores of each problem were not recorded" in headline(run)


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.24, "4.2 s"), (251.4, "4 min 11 s"), (7260, "2 h 01 min"), (200_000, "2 d 7 h")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_every_figure_is_vector_with_its_numbers_behind_it(page: Page) -> None:
    assert page.source.count('class="plot"') == page.source.count("<svg viewBox") + page.source.count("<svg xmlns") - 1
    assert "<image" not in page.source
    downloads = {attrs["download"]: attrs["href"] for tag, attrs in page.elements if tag == "a"}
    assert sorted(str(name) for name in downloads) == [
        "entropy.csv", "gradient.csv", "histogram.csv", "kept.csv", "learning.csv", "length.csv", "mismatch.csv",
        "rate.csv",
    ]  # fmt: skip
    text = base64.b64decode(str(downloads["learning.csv"]).partition("base64,")[2]).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 61
    assert float(rows[60]["eval/accuracy"]) == pytest.approx(0.455, abs=1e-3)
    assert rows[1]["eval/accuracy"] == ""


def test_histogram_facts_count_every_written_token(run: Path, page: Page) -> None:
    for step in (0, 60):
        rows = pq.read_table(run / f"rollouts/eval-{step:06d}.parquet").column("entropy").to_pylist()
        entropy = np.concatenate(rows)
        fact = (
            f"step {step}: {len(entropy):,} tokens, {np.mean(entropy < 0.01):.1%} below 0.01 nats, "
            f"80th percentile {np.percentile(entropy, 80):.3f} nats"
        )
        assert fact in page.text


def test_histogram_loses_no_token() -> None:
    samples = [np.array([-1e-9, 0.0, 0.01, 2.5]), np.array([1.0])]
    edges, counts = histogram_counts(samples)
    assert [count.sum() for count in counts] == [4, 1]
    assert edges[0] == 0
    assert edges[-1] == 2.5


def test_before_and_after_answer_the_same_prompts(run: Path, page: Page) -> None:
    view = page.views[0]
    cards = view["frames"][0]["prompts"]
    assert len(cards) == 40
    assert view["note"].startswith("The first 40 of 40 held-out problems, in file order")
    tables = {step: pq.read_table(run / f"rollouts/eval-{step:06d}.parquet").to_pylist() for step in (0, 60)}
    for index, card in enumerate(cards):
        before, after = card["responses"]
        assert (before["label"], after["label"]) == ("Step 0", "Step 60")
        for shown, row in ((before, tables[0][index]), (after, tables[60][index])):
            assert card["prompt"] == row["prompt"]
            assert shown["t"] == row["tokens"]
            assert shown["e"][0] == pytest.approx(row["entropy"], abs=1e-4)
            assert shown["l"] == pytest.approx(row["logprobs"], abs=1e-4)
            assert [flag == "1" for flag in shown["f"]] == row["selected"]
            assert shown["score"] == row["score"]
        assert (card["outcome"] == "gained") == (before["score"] == 0 and after["score"] == 1)


def test_pairs_go_by_prompt_id_not_by_row(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=0)
    one = {name: response_row([name], [0.5], prompt_id=name, prompt=name) for name in "abc"}
    write_rollouts(folder / "rollouts/eval-000000.parquet", [one["a"], one["b"], one["c"] | {"prompt_id": "b"}])
    write_rollouts(folder / "rollouts/eval-000009.parquet", [one["c"], one["b"]])
    cards = decoded(fork_data(run_forks(read_run(folder, 12))))[0]["frames"][0]["prompts"]
    assert [card["prompt"] for card in cards] == ["b"]
    assert [response["t"] for response in cards[0]["responses"]] == [["b"], ["b"]]


def test_training_samples_are_limited_and_say_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=0)
    for step in range(1, 31):
        rows = [response_row(["x"], [0.1], prompt_id=str(i // 4)) for i in range(38)]
        write_rollouts(folder / f"rollouts/train-{step:06d}.parquet", rows)
    view = decoded(fork_data(run_forks(read_run(folder, 12))))[1]
    assert len(view["frames"]) == 12
    assert (view["frames"][0]["label"], view["frames"][-1]["label"]) == ("1", "30")
    assert [len(card["responses"]) for card in view["frames"][0]["prompts"]] == [4] * 8
    assert "12 of 30 sampled steps" in view["note"]


@pytest.mark.parametrize(
    ("rule", "mark", "outlined"),
    [("top_entropy", None, "11111"), ("random", 0.72, "11111"), ("all", 0.72, "")],
)
def test_forks_are_the_selection_only_where_the_rule_means_that(
    tmp_path: Path, rule: str, mark: float | None, outlined: str
) -> None:
    folder = write_run(tmp_path / "run", steps=0, rule=rule)
    row = response_row(list("abcde"), [0.1, 0.2, 0.3, 0.4, 2.0]) | {"selected": [True] * 5}
    write_rollouts(folder / "rollouts/eval-000000.parquet", [row])
    forks = run_forks(read_run(folder, 12))
    assert forks.mark == (None if mark is None else pytest.approx(mark))
    assert decoded(fork_data(forks))[0]["frames"][0]["prompts"][0]["responses"][0]["f"] == outlined


def test_settings_provenance_and_what_differs(page: Page) -> None:
    for fact in ("prompts_per_step", "embedded:countdown-base", "commit 0123abc", "torch 2.13.0"):
        assert fact in page.text
    assert re.search(r'class="differs"><th scope="row">group_size<', page.source)
    assert re.search(r'<tr><th scope="row">ratio<', page.source)


def test_reproducing_command_resolves_to_the_same_recipe() -> None:
    overrides = [
        "rollout.prompts_per_step=64", "rollout.stop=['!', '?']", "optimizer.betas=[0.8, 0.99]", "seed=7",
        "task.name=dataset", "task.data=x.jsonl", "task.template=Q: {prompt} it's",
        "dynamic_sampling.enabled=false", "optimizer.lr=3e-4",
    ]  # fmt: skip
    recipe = load_recipe(TrainConfig, None, overrides)
    program, command, *found = shlex.split(reproducing_command(recipe_toml(recipe)))
    assert (program, command) == ("forkrl", "train")
    assert len(found) == len(overrides)
    assert load_recipe(TrainConfig, None, found) == recipe


def test_a_removed_setting_at_its_default_is_not_repeated(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=0)
    config = folder / "config.toml"
    config.write_text(config.read_text("utf-8").replace("[rollout]", "[rollout]\ncuda_graphs = false"), "utf-8")
    run = read_run(folder, 0)
    assert "cuda_graphs" not in run.settings["rollout"]
    assert "group_size=8" in reproducing_command(run.settings)
    assert "cuda_graphs" not in reproducing_command(run.settings)


def test_reproducing_command_of_a_mix() -> None:
    gym = '{name="reasoning-gym", generator="gcd", settings={max_value=9}, curriculum={promote_above=0.5}}'
    overrides = ["task.name=mix", f'task.parts=[{{name="dataset", data="it\'s.jsonl", weight=2}}, {gym}]']
    recipe = load_recipe(TrainConfig, None, overrides)
    found = shlex.split(reproducing_command(recipe_toml(recipe)))[2:]
    assert len(found) == 2
    assert load_recipe(TrainConfig, None, found) == recipe


def test_recorded_command_is_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=0)
    config = folder / "config.toml"
    config.write_text(config.read_text("utf-8") + 'command = "forkrl train mine.toml seed=3"\n', encoding="utf-8")
    page = Page(write_run_report(folder))
    assert "forkrl train mine.toml seed=3" in page.text
    assert "The command itself was not recorded" not in page.text


def test_page_may_load_nothing_and_run_only_its_own_script(page: Page) -> None:
    policy = next(
        attrs["content"] for _, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    script = re.findall(r"<script>(.*?)</script>", page.source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert len(script) == 1
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:" in str(policy)
    loaders = {"link", "img", "iframe", "object", "embed", "image", "video", "audio", "base", "form"}
    assert not [tag for tag, _ in page.elements if tag in loaders]
    links = [attrs["href"] for tag, attrs in page.elements if tag == "a"]
    assert all(str(link).startswith("data:text/csv;base64,") for link in links)
    assert "url(http" not in page.source
    assert "innerHTML" not in script[0]
    assert len(page.source) < 1_000_000


def test_ids_are_unique(page: Page) -> None:
    ids = [attrs["id"] for _, attrs in page.elements if attrs.get("id")]
    assert len(ids) == len(set(ids))


def test_hostile_text_everywhere_stays_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "<img src=x onerror=alert(1)>\u202e", steps=0)
    row = response_row([HOSTILE, "'\"`"], [1.0, 0.0], prompt=HOSTILE, prompt_id=HOSTILE)
    write_rollouts(folder / "rollouts/eval-000000.parquet", [row])
    (folder / "rollouts/train-000001.parquet").write_bytes(b"<img src=x onerror=alert(1)>")
    config = folder / "config.toml"
    evil = "<img src=x onerror=alert(1)>\\u202e\\u001b"
    config.write_text(config.read_text("utf-8") + f'command = "{evil}"\n"{evil}" = "{evil}"\n', encoding="utf-8")
    page = Page(write_run_report(folder))
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert "img" not in [tag for tag, _ in page.elements]
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert not re.search(
        "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", page.source
    )
    shown = page.views[0]["frames"][0]["prompts"][0]
    assert shown["responses"][0]["t"][0] == "</script><img src=x onerror=alert(1)>&⟨U+2028⟩␛[31m␀⟨U+202E⟩"


def test_interrupted_run_says_where_it_stands(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=3, planned_steps=60)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward/acc')
    page = Page(write_run_report(folder))
    assert "This run stopped at step 3 of 60" in page.text
    assert "line 5 (cut short in writing?)" in page.text
    assert "there is no second evaluation to compare; 3 training steps took" in page.text


@pytest.mark.parametrize(("epochs", "ended"), [(1.5, True), (2.5, False), (0, False), ('"two"', False)])
def test_a_run_that_its_epochs_ended_is_not_called_interrupted(
    tmp_path: Path, epochs: float | str, ended: bool
) -> None:
    folder = write_run(tmp_path / "run", steps=0)
    config = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(config.replace("steps = 60", f"steps = 60\nepochs = {epochs}"))
    rows = [{"step": step, "reward/mean": 0.5, "sampling/epochs": step * 0.75} for step in (1, 2)]
    metrics_of(folder, {"step": 0, "eval/accuracy": 0.1}, *rows, {"step": 2, "eval/accuracy": 0.2})
    says = status(read_run(folder, 12))
    if ended:
        assert says == "Stopped early at step 2 of 60: sampling/epochs is 1.5 (training.epochs = 1.5)."
    else:
        assert says.startswith("This run stopped at step 2 of 60: it was interrupted")


def test_run_that_never_logged(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[training]\nsteps = 5\n")
    page = Page(write_run_report(tmp_path))
    assert "Nothing was evaluated on held-out problems; no training step was logged." in page.text
    assert "metrics.jsonl is missing" in page.text
    assert "no sampled responses that can be read" in page.text
    assert page.source.count('class="empty">Not recorded:') == 2, "the histogram, and the provenance"
    assert page.text.count("Not recorded: ") == 9
    assert "Not recorded: versions and commit are unknown" in page.text
    assert "fork-data" not in page.source


def test_null_and_nan_metrics_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=2, planned_steps=2)
    metrics_of(
        folder,
        {"step": 1, "entropy/mean": None, "entropy/threshold": float("nan"), "grad/norm": float("inf"), "loss/kl": "x"},
        {"step": 2, "entropy/mean": 0.5, "reward/accuracy": 0.25},
    )
    run = read_run(folder, 12)
    assert run.metrics == {1: {}, 2: {"entropy/mean": 0.5, "reward/accuracy": 0.25}}
    page = Page(write_run_report(folder))
    assert "2 values are NaN or infinite" in page.text
    assert "Not recorded: entropy/selected_mean, entropy/unselected_mean, entropy/threshold." in page.text
    assert "Not recorded: grad/norm, loss/clip_fraction." in page.text


@pytest.mark.parametrize(
    "line", ["[1]", '{"step": "1"}', '{"step": true}', '{"step": -1}', "{}", "\x00", "[" * 100_000]
)
def test_lines_that_are_no_step_are_named(tmp_path: Path, line: str) -> None:
    folder = write_run(tmp_path / "run", steps=0)
    (folder / "metrics.jsonl").write_text('{"step": 0}\n' + line + "\n")
    run = read_run(folder, 12)
    assert list(run.metrics) == [0]
    assert any("line 2" in note for note in run.notes)


@pytest.mark.parametrize(("floor", "step"), [(0.3, 2), (0.05, None), (0.0, None)])
def test_entropy_below_the_floor_is_noted_once(tmp_path: Path, floor: float, step: int | None) -> None:
    folder = write_run(tmp_path / "run", steps=0)
    entropies = enumerate((0.4, 0.2, 0.1, 0.5), start=1)
    metrics_of(folder, *({"step": step, "entropy/mean": entropy} for step, entropy in entropies))
    with (folder / "config.toml").open("a") as file:
        file.write(f"\n[log]\nentropy_floor = {floor}\n")
    notes = [note for note in read_run(folder, 12).notes if "entropy" in note]
    assert len(notes) == (step is not None)
    if step is not None:
        assert notes[0].startswith(f"Mean entropy fell below log.entropy_floor = {floor} nats at step {step}, to 0.2: ")


@pytest.mark.parametrize(("kept", "chosen"), [((1, 2, 3), 1), ((2, 3), 2), ((), None)])
def test_the_accuracy_of_a_chosen_checkpoint_is_said_to_be_biased(
    tmp_path: Path, kept: tuple[int, ...], chosen: int | None
) -> None:
    """Of evaluations whose checkpoint is gone none can have been chosen."""
    folder = write_run(tmp_path / "run", steps=0)
    accuracies = enumerate((0.25, 0.5, 0.5, 0.375))
    metrics_of(folder, *({"step": step, "eval/accuracy": accuracy} for step, accuracy in accuracies))
    with (folder / "config.toml").open("a") as file:
        file.write("\n[checkpoint]\nkeep_best = true\n")
    for step in kept:
        (folder / f"checkpoints/step-{step}").mkdir(parents=True)
    (note,) = [note for note in read_run(folder, 12).notes if "keep_best" in note]
    if chosen is None:
        assert note.startswith("checkpoint.keep_best kept no checkpoint")
    else:
        assert note.startswith(f"checkpoint.keep_best chose step {chosen}, the best of 4 evaluations, ")
        assert "50.0% on them is biased upwards" in note


def test_damaged_rollouts_are_named_and_the_next_best_is_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=60)
    whole = (folder / "rollouts/eval-000060.parquet").read_bytes()
    (folder / "rollouts/eval-000060.parquet").write_bytes(whole[: len(whole) // 2])
    table = pq.read_table(folder / "rollouts/train-000010.parquet")
    pq.write_table(table.drop_columns(["entropy"]), folder / "rollouts/train-000010.parquet")
    page = Page(write_run_report(folder))
    assert "rollouts/eval-000060.parquet cannot be read and is left out" in page.text
    assert "rollouts/train-000010.parquet is left out: it has no column entropy." in page.text
    assert [r["label"] for r in page.views[0]["frames"][0]["prompts"][0]["responses"]] == ["Step 0", "Step 40"]
    assert "10" not in [frame["label"] for frame in page.views[1]["frames"]]


@pytest.mark.parametrize(
    "damage",
    [
        {"entropy": [0.5]},
        {"tokens": None},
        {"prompt": None},
        {"logprobs": [None, None]},
        {"selected": [True, None]},
        {"score": None},
    ],
)
def test_rows_with_gaps_are_left_out_and_counted(tmp_path: Path, damage: dict[str, Any]) -> None:
    folder = write_run(tmp_path / "run", steps=0)
    good, bad = (response_row(["a", "b"], [0.1, 0.2], prompt_id=i) for i in "gb")
    write_rollouts(folder / "rollouts/eval-000000.parquet", [bad | damage, good])
    run = read_run(folder, 12)
    assert run.evals[0].prompt_ids == ["g"]
    assert run.notes == ["rollouts/eval-000000.parquet: 1 rows with gaps or lists of unequal length are left out."]


def test_column_of_another_type_is_a_note(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=0)
    rows = pa.Table.from_pylist([response_row(["a"], [0.1])], schema=SCHEMA)
    column = rows.schema.get_field_index("tokens")
    pq.write_table(rows.set_column(column, "tokens", pa.array([3])), folder / "rollouts/eval-000000.parquet")
    page = Page(write_run_report(folder))
    assert "rollouts/eval-000000.parquet cannot be read and is left out" in page.text


def test_text_that_is_not_utf8_is_a_note(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=0)
    rows = pa.Table.from_pylist([response_row(["a"], [0.1])], schema=SCHEMA)
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"], pa.binary()).buffers())
    column = rows.schema.get_field_index("prompt")
    pq.write_table(rows.set_column(column, "prompt", broken), folder / "rollouts/eval-000000.parquet")
    page = Page(write_run_report(folder))
    assert "rollouts/eval-000000.parquet cannot be read and is left out" in page.text


def test_values_that_are_not_finite_reach_the_page_as_gaps(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=0)
    row = response_row(["a", "b", "c"], [0.1, 0.2, 0.3])
    row |= {"entropy": [float("nan"), 0.2, float("inf")], "logprobs": [float("-inf"), -0.5, -0.1]}
    write_rollouts(folder / "rollouts/eval-000000.parquet", [row])
    response = Page(write_run_report(folder)).views[0]["frames"][0]["prompts"][0]["responses"][0]
    assert response["e"] == [[None, 0.2, None]]
    assert response["l"] == [None, -0.5, -0.1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a run folder, it has no config.toml"),
        ("[x", "config.toml: cannot be read"),
        (b"\xff", "cannot be read"),
    ],
)
def test_folder_that_is_no_run(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.toml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        write_run_report(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder; name the folder given to"):
        write_run_report(tmp_path / "nowhere")


def test_failed_write_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", steps=0)
    (folder / "report.html").write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"report.html: cannot be written \(No space left on device\)"):
        write_run_report(folder)
    assert (folder / "report.html").read_text() == "old"
    assert not list(folder.glob(".report*"))


def test_new_page_replaces_the_old_at_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=0)
    (folder / "report.html").write_text("old")
    (tmp_path / "reader").hardlink_to(folder / "report.html")  # whoever has the old page open keeps a whole one
    write_run_report(folder)
    assert (tmp_path / "reader").read_text() == "old"
    assert (folder / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")


def test_same_run_gives_the_same_page(run: Path, page: Page) -> None:
    assert write_run_report(run).read_text(encoding="utf-8") == page.source
    assert not list(run.glob(".report*"))
