"""One command trains a model and leaves a run folder behind; each setting that should change the weights does."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from forkrl.store.results import read_results
from tests.smoke.world import Run, World

RUN_FOLDER = Path(__file__).parents[2] / "docs/run-folder.md"
EVAL_SAMPLES = 8
LEARNING = (
    "optimizer.lr=0.03", "training.steps=16", "rollout.prompts_per_step=8", "training.mini_batch_prompts=4",
    "training.micro_batch_tokens=600", "task.held_out_rows=12", "eval.every=8", "eval.problems=12",
    "log.rollouts_every=4", "checkpoint.every=6", f"eval.samples={EVAL_SAMPLES}",
)  # fmt: skip
SHORT = ("training.steps=2", "eval.problems=1", "eval.every=0", "log.rollouts_sampled=0", "checkpoint.keep=1")


def documented_metrics() -> set[str]:
    """The names in the table of docs/run-folder.md, with pass@k spelled out for the samples of ``LEARNING``."""
    table = RUN_FOLDER.read_text().partition("## metrics.jsonl")[2].partition("\n###")[0]
    first_column = "".join(row.split("|")[1] for row in table.splitlines() if row.startswith("| `"))
    names = set(re.findall("`(.+?)`", first_column))
    for_each_k = {name for name in names if "@k" in name}
    return names - for_each_k | {name.replace("@k", f"@{k}") for name in for_each_k for k in (2, 4, EVAL_SAMPLES)}


@pytest.fixture(scope="module")
def learned(world: World) -> Run:
    """A run that learns, report and all."""
    outcome = world.train("learned", *LEARNING)
    assert outcome.code == 0, outcome.stderr
    return Run(world.folder / "learned", outcome)


def test_reward_and_held_out_accuracy_rise(learned: Run) -> None:
    accuracy = learned.column("reward/accuracy")
    assert sum(accuracy[-3:]) / 3 > sum(accuracy[:3]) / 3 + 0.3
    before, *_, after = [record for record in learned.metrics if "eval/accuracy" in record]
    assert (before["step"], after["step"]) == (0, 16)
    assert after["eval/accuracy_low"] > before["eval/accuracy_high"]


def test_metrics_have_every_documented_name_and_no_other(learned: Run) -> None:
    training = [record for record in learned.metrics if "reward/accuracy" in record]
    evaluations = [record for record in learned.metrics if "eval/accuracy" in record]
    assert [record["step"] for record in training] == list(range(1, 17))
    assert [record["step"] for record in evaluations] == [0, 8, 16]
    documented = documented_metrics()
    evaluation = {name for name in documented if name.startswith("eval/")}
    for record in training:
        assert record.keys() - {"step"} == documented - evaluation
        assert all(isinstance(value, int | float) for value in record.values()), record
    for record in evaluations:
        assert record.keys() - {"step"} == evaluation
    assert 0.2 <= training[0]["selection/kept_fraction"] < 0.25
    for record in training:  # the sampler's log-probs are the trainer's, and the weights moved before the second step
        assert 0 < record["loss/approx_kl"] < 1
        assert record["loss/ratio_max"] >= 1  # 1 in the first step; the second may lower all of its selected tokens
    assert any(record["loss/ratio_max"] > 1 for record in training)
    assert training[0]["entropy/selected_mean"] > training[0]["entropy/unselected_mean"]


def test_config_holds_the_resolved_recipe_and_where_it_ran(learned: Run) -> None:
    config = tomllib.loads((learned.folder / "config.toml").read_text())
    assert config["optimizer"]["lr"] == 0.03
    assert config["selection"] == {
        "rule": "top_entropy", "ratio": 0.2, "options": {}, "scope": "micro_batch", "entropy": "current",
    }  # fmt: skip
    assert config["provenance"].keys() >= {
        "forkrl", "torch", "transformers", "python", "commit", "data_fingerprint", "threads", "device"
    }  # fmt: skip


def test_rollouts_hold_a_value_per_token(learned: Run) -> None:
    names = {path.name for path in (learned.folder / "rollouts").glob("*.parquet")}
    assert names == {
        *(f"train-{step:06d}.parquet" for step in (4, 8, 12, 16)), *(f"eval-{step:06d}.parquet" for step in (0, 8, 16))
    }  # fmt: skip
    for name in names:
        rows = pq.read_table(learned.folder / "rollouts" / name).to_pylist()
        assert rows
        for row in rows:
            length = len(row["token_ids"])
            assert {len(row[key]) for key in ("tokens", "logprobs", "entropy", "selected")} == {length}
            assert row["finished"] == (row["token_ids"][-1] == 1)
            written = "".join(row["tokens"][: length - row["finished"]])  # a special token is a line break to verifiers
            assert "\n".join(filter(None, written.split("<pad>"))) == row["response"]
            assert row["score"] == (row["response"][:1] in tuple("13579"))
            assert (row["advantage"] is None) == name.startswith("eval")
        assert any(any(row["selected"]) for row in rows)


def test_the_scores_of_every_held_out_problem_are_kept(learned: Run) -> None:
    rows = [json.loads(line) for line in (learned.folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "eval/accuracy" in row]
    assert len(evaluations) >= 2
    for row in evaluations:
        scores = json.loads((learned.folder / f"rollouts/scores-{row['step']:06d}.json").read_bytes())
        assert len(scores) == row["eval/problems"]
        everything = [score for each in scores.values() for score in each]
        assert sum(everything) / len(everything) == pytest.approx(row["eval/accuracy"])
    assert "paired by problem, p" in learned.outcome.stdout


def test_checkpoints_load_with_transformers(learned: Run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert learned.checkpoints == ["step-12", "step-16"]
    model: Any = AutoModelForCausalLM.from_pretrained(learned.last_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(learned.last_checkpoint)
    ids = tokenizer("3+4=", return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1:]
    assert tokenizer.decode(answer) in list("13579")


def test_a_run_prints_what_it_does_as_plain_lines(learned: Run) -> None:
    lines = learned.outcome.stdout.splitlines()
    assert lines[0].startswith("training on the 20% of tokens with the highest entropy in each micro-batch")
    assert [line.split()[1] for line in lines if "accuracy" in line and line.startswith("step")] == [
        f"{step}/16" for step in range(1, 17)
    ]
    assert lines[-2].startswith("Held-out accuracy rose from ")
    assert lines[-1] == "report: learned/report.html"
    assert "\x1b" not in learned.outcome.stdout
    assert learned.outcome.stderr == ""
    assert "Held-out accuracy rose" in (learned.folder / "report.html").read_text()


def test_eval_of_a_run_takes_its_newest_checkpoint_and_its_task(world: World, learned: Run) -> None:
    outcome = world.run(
        "eval", "learned", "--problems", "12", "--samples", "4", "--out", "evaluation", without_report=True
    )
    assert outcome.code == 0, outcome.stderr
    assert "to 12 questions" in outcome.stdout
    tables = read_results(world.folder / "evaluation").tables
    (figures,) = tables["benchmarks"].to_dict("records")
    assert (figures["questions"], figures["available_questions"], figures["samples"]) == (12, 12, 4)
    assert figures["accuracy_low"] <= figures["accuracy"] <= figures["accuracy_high"]
    assert abs(figures["accuracy"] - learned.column("eval/accuracy")[-1]) < 0.15
    assert tables["passes"]["k"].tolist() == [1, 2, 4] and tables["passes"]["pass"].is_monotonic_increasing


def test_report_is_written_anew(world: World, learned: Run) -> None:
    before = (learned.folder / "report.html").read_text()
    (learned.folder / "report.html").unlink()
    outcome = world.run("report", "learned")
    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, "report: learned/report.html\n", "")
    assert (learned.folder / "report.html").read_text() == before


def test_dry_run_prints_the_resolved_recipe_and_touches_nothing(world: World) -> None:
    outcome = world.run("train", "recipe.toml", "selection.ratio=0.3", "--out", "dry", "--dry-run")
    assert outcome.code == 0, outcome.stderr
    printed = tomllib.loads(outcome.stdout)
    assert (printed["selection"]["ratio"], printed["rollout"]["group_size"]) == (0.3, 8)
    assert "# training on the 30% of tokens" in outcome.stdout
    assert not (world.folder / "dry").exists()


VARIATIONS = {
    "base": (),
    "rule all": ("selection.rule=all",),
    "rule bottom": ("selection.rule=bottom_entropy",),
    "rule random": ("selection.rule=random",),
    "rule threshold": ("selection.rule=threshold", "selection.threshold=2.7"),
    "ratio": ("selection.ratio=0.4",),
    "scope mini_batch": ("selection.scope=mini_batch",),
    "scope sequence": ("selection.scope=sequence",),
    "scope rollout_batch": ("selection.scope=rollout_batch", "selection.entropy=rollout"),
    "entropy rollout": ("selection.entropy=rollout",),
    "denominator": ("loss.denominator=response",),
    "clip low": ("loss.clip_low=0.01",),
    "clip high": ("loss.clip_high=0.01",),
    "dual clip": ("loss.dual_clip=1.01", "loss.clip_high=0.001"),
    "kl": ("loss.kl_coef=0.1",),
    "entropy bonus": ("loss.entropy_coef=0.1",),
    "adaptive bonus": ("loss.entropy_target=9.0", "loss.entropy_delta=0.05"),
    "gradient steps": ("training.mini_batch_prompts=4",),
    "overlong": ("reward.overlong_cache=3",),
    "weight decay": ("optimizer.weight_decay=0.9",),
    "gradient clipping": ("optimizer.max_grad_norm=1e-9",),
    "warm-up": ("optimizer.warmup_steps=10",),
    "linear": ("optimizer.schedule=linear",),
    "cosine": ("optimizer.schedule=cosine",),
    "minimum": ("optimizer.schedule=cosine", "optimizer.min_lr_ratio=0.5"),
    "temperature": ("rollout.temperature=0.7",),
    "top-p": ("rollout.top_p=0.5",),
    "top-k": ("rollout.top_k=3",),
    "stop": ('rollout.stop=["="]',),
    "seed": ("seed=4",),
}


@pytest.fixture(scope="module")
def variations(world: World) -> dict[str, Run]:
    common = (*SHORT, "optimizer.lr=0.02")
    return {name: world.trained(name.replace(" ", "-"), *common, *overrides) for name, overrides in VARIATIONS.items()}


def test_each_setting_changes_the_weights(variations: dict[str, Run]) -> None:
    by_weights: dict[bytes, list[str]] = {}
    for name, run in variations.items():
        by_weights.setdefault(run.weights, []).append(name)
    assert [names for names in by_weights.values() if len(names) > 1] == []


def test_settings_show_in_the_metrics(variations: dict[str, Run]) -> None:
    first = {name: run.metrics[1] for name, run in variations.items()}
    assert first["rule all"]["selection/kept_fraction"] == 1
    assert first["ratio"]["selection/kept_fraction"] > first["base"]["selection/kept_fraction"] + 0.15
    assert first["rule bottom"]["entropy/selected_mean"] < first["rule bottom"]["entropy/unselected_mean"]
    assert first["rule threshold"]["entropy/threshold"] >= 2.7 > first["base"]["entropy/unselected_mean"]
    assert first["kl"]["loss/kl"] > 0 == first["base"]["loss/kl"]
    # The bonus is of the current policy in every gradient step, entropy/mean of the policy that sampled.
    assert first["entropy bonus"]["loss/entropy"] == pytest.approx(first["entropy bonus"]["entropy/mean"], rel=0.03)
    assert first["overlong"]["reward/mean"] < first["overlong"]["reward/accuracy"]
    # The first step's weight is 0, in which the bonus is neither computed nor logged.
    assert variations["adaptive bonus"].column("loss/entropy_coef") == [0.0, 0.05]
    first_loss, second_loss = variations["adaptive bonus"].column("loss/entropy")
    assert first_loss == 0.0 < second_loss
    assert first["warm-up"]["optimizer/lr"] == pytest.approx(0.02 * (0.1 + 0.2) / 2)
    assert first["stop"]["response/length"] < first["base"]["response/length"]


def test_the_same_seed_gives_the_same_run(world: World, variations: dict[str, Run]) -> None:
    again = world.trained("again", *SHORT, "optimizer.lr=0.02")
    assert again.bits() == variations["base"].bits()


TERMS = """
def short(answer, response, *, limit):
    return float(len(response) < limit)


def asked(answer, response, *, prompt):
    return float(len(prompt) > 0)


def broken(answer, response):
    if len(response) < 6:
        raise RuntimeError("no")
    return 0.0


def broken_always(answer, response):
    raise RuntimeError("no")


def prefilled(answer, response):
    return float(response.startswith("1"))
"""


def test_reward_terms_are_weighted_added_and_logged(own_world: World) -> None:
    (own_world.folder / "terms.py").write_text(TERMS)
    terms = (
        '{name="short", verifier="terms:short", weight=-0.5, options={limit=6}}',
        '{name="asked", verifier="terms:asked", weight=2.0}',
        '{name="broken", verifier="terms:broken"}',
        '{name="fined", verifier="terms:broken", weight=-1.0}',
    )
    setting = f"reward.terms=[{', '.join(terms)}]"
    run = own_world.trained("terms", *SHORT, "dynamic_sampling.enabled=false", setting)
    first = run.metrics[1]
    assert 0 < first["reward/terms/short"] < 1 == first["reward/terms/asked"]
    assert first["reward/terms/broken"] == first["reward/terms/fined"] == 0
    assert first["verifier/failures_error"] == 2 * 32 * first["reward/terms/short"]
    # Where it fails, a term with a negative weight counts as 1.
    expected = first["reward/accuracy"] - 0.5 * first["reward/terms/short"] + 2 - first["reward/terms/short"]
    assert first["reward/mean"] == pytest.approx(expected, abs=1e-6)
    assert own_world.trained("plain", *SHORT, "dynamic_sampling.enabled=false").weights != run.weights


def test_a_term_that_fails_on_every_response_ends_the_run(own_world: World) -> None:
    (own_world.folder / "terms.py").write_text(TERMS)
    setting = 'reward.terms=[{name="broken", verifier="terms:broken_always"}]'
    outcome = own_world.train("failing", *SHORT, setting, without_report=True)
    assert outcome.code == 1
    assert "reward.terms (broken): none of the 32 responses could be judged; the verifier's first error" in outcome.line
    assert "RuntimeError: no" in outcome.line


def test_a_term_reads_the_prefill_as_well(own_world: World) -> None:
    (own_world.folder / "terms.py").write_text(TERMS)
    setting = 'reward.terms=[{name="prefilled", verifier="terms:prefilled"}]'
    run = own_world.trained(
        "prefilled", *SHORT, setting, "dynamic_sampling.enabled=false", 'task.assistant_prefill="1"'
    )
    assert run.metrics[1]["reward/terms/prefilled"] == 1


def test_groups_that_only_a_term_tells_apart_are_kept(own_world: World) -> None:
    (own_world.folder / "terms.py").write_text(TERMS)
    nothing = (*SHORT, "task.verifier=first_character:nobody", "rollout.prompts_per_step=2")
    assert own_world.train("nothing", *nothing, without_report=True).code == 1
    setting = 'reward.terms=[{name="short", verifier="terms:short", options={limit=6}}]'
    assert own_world.trained("something", *nothing, setting).metrics[1]["sampling/groups_kept"] == 2


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        (
            'reward.terms=[{name="a", verifier="terms:none"}]',
            r"reward.terms \(a\): verifier = .terms:none. could",
        ),
        ('reward.terms=[{name="a/b", verifier="terms:short"}]', r"reward.terms.0.name"),
        (
            'reward.terms=[{name="a", verifier="terms:asked"}, {name="a", verifier="terms:broken"}]',
            r"two of them have the name 'a'; rename one",
        ),
        ('reward.terms=[{name="a", verifier="terms:short"}]', r"do not fit terms:short\(answer, response, \*, limit\)"),
    ],
)
def test_terms_that_cannot_be_computed_are_refused(own_world: World, setting: str, says: str) -> None:
    (own_world.folder / "terms.py").write_text(TERMS)
    outcome = own_world.train("refused", setting)
    assert outcome.code == 2 and re.search(says, outcome.line), outcome.line


def test_dynamic_sampling_drops_counts_and_samples_on(world: World) -> None:
    """With four responses a group is often all wrong; the cap on generation batches is reached here and there."""
    run = world.trained("dynamic", *SHORT, "training.steps=3", "rollout.group_size=4")
    kept_all = world.trained(
        "static", *SHORT, "training.steps=3", "rollout.group_size=4", "dynamic_sampling.enabled=false"
    )
    for record in run.metrics[1:4]:
        sampled = 4 * record["sampling/generation_batches"]
        dropped = record["sampling/dropped_all_right"] + record["sampling/dropped_all_wrong"]
        assert record["sampling/groups_kept"] == min(4, sampled - dropped)
        assert record["sampling/generation_batches"] == 3 or record["sampling/groups_kept"] == 4
    assert any(record["sampling/dropped_all_wrong"] for record in run.metrics[1:4])
    for record in kept_all.metrics[1:4]:
        assert (record["sampling/generation_batches"], record["sampling/groups_kept"]) == (1, 4)
        assert record["sampling/dropped_all_right"] == record["sampling/dropped_all_wrong"] == 0


def test_at_the_cap_training_goes_on_with_the_groups_at_hand(world: World) -> None:
    run = world.trained("cap", *SHORT, "rollout.group_size=2", "dynamic_sampling.max_generation_batches=1")
    records = run.metrics[1:3]
    assert any(0 < record["sampling/groups_kept"] < 4 for record in records)
    assert all(record["sampling/generation_batches"] == 1 for record in records)


DRYING = """
calls = 0


def up(answer, response):
    global calls
    calls += 1
    return float(calls <= 2 + 32 and calls % 2)  # the first evaluation and one step
"""


def test_nothing_to_learn_ends_with_one_line_and_exit_1(world: World) -> None:
    outcome = world.train("hopeless", *SHORT, "task.verifier=first_character:nobody")
    assert outcome.code == 1
    assert outcome.line.startswith(
        "forkrl: training stopped at step 1: nothing to learn: every group of 12 prompts in 3"
    )
    assert "accuracy 0.000" in outcome.line
    assert outcome.line.endswith("; no checkpoint was saved; start a new run with another --out")
    assert list((world.folder / "hopeless/checkpoints").iterdir()) == []


def test_nothing_left_to_learn_saves_the_finished_steps_for_a_new_run(world: World) -> None:
    """A verifier that from the second step on finds everything wrong."""
    (world.folder / "drying.py").write_text(DRYING)
    slow = ("training.steps=4", "checkpoint.every=4", "reward.workers=1")
    outcome = world.train("dried", *SHORT, *slow, "task.verifier=drying:up")
    assert outcome.code == 1
    assert outcome.line.startswith("forkrl: training stopped at step 2: nothing to learn")
    assert "the checkpoint of step 1 is intact" in outcome.line
    weights = "model.path=dried/checkpoints/step-1"
    assert weights in outcome.line
    again = world.trained("from-there", *SHORT, weights)
    assert again.metrics[-1]["step"] == 2


def test_a_run_that_diverged_saves_nothing_more(world: World) -> None:
    """Its weights may be what went wrong."""
    poison = {"point": "gradient", "count": 9, "action": "poison"}
    whole = "training.micro_batch_tokens=640"
    outcome = world.train("poisoned", "checkpoint.every=6", whole, faults=[poison], without_report=True)
    assert outcome.code == 1
    assert outcome.line.endswith("; no checkpoint was saved; start a new run with another --out")
    assert not outcome.line.startswith("forkrl: training stopped at step 1:")
    assert list((world.folder / "poisoned/checkpoints").iterdir()) == []


def test_a_run_without_a_terminal_or_utf8_still_runs(world: World) -> None:
    """A batch system's C locale cannot print "≥"."""
    outcome = world.train("plain", *SHORT, *VARIATIONS["rule threshold"], without_report=True,
                          environment={"LC_ALL": "C", "PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    assert isinstance(world.folder, Path)
