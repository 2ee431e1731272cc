"""``forkrl plan`` by arithmetic: parameters, sharding, room for sequences, time, and what makes a recipe fit."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from forkrl.cluster.translate import refuse_untranslatable
from forkrl.config import TrainConfig
from forkrl.config.recipe import load_recipe
from forkrl.errors import UserError
from forkrl.planning.advice import Change, changed, find_faster, find_remedies
from forkrl.planning.compute import Assumptions, Timing, assume, plan_time
from forkrl.planning.gpus import GIB, GPUS, Gpu, find_gpu
from forkrl.planning.memory import FITS, TIGHT, TOO_LARGE, Plan, plan_memory
from forkrl.planning.shapes import ModelShape, find_shape, known_shape, parse_shape

RECIPES = Path(__file__).parents[2] / "recipes"
KNOWN = json.loads(resources.files("forkrl.planning").joinpath("known_shapes.json").read_text(encoding="utf-8"))
ON_VERL = ("runtime.trainer=verl", "cluster.gpus_per_node=8")
CONFIG = {
    "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100, "tie_word_embeddings": False,
}  # fmt: skip
H100 = GPUS["h100"]


def recipe(name: str, *overrides: str) -> TrainConfig:
    return load_recipe(TrainConfig, RECIPES / f"{name}.toml", overrides)


def shape_of(config: TrainConfig) -> ModelShape:
    return find_shape(config.model.path).shape


def plan(config: TrainConfig, gpu: Gpu = H100) -> Plan:
    return plan_memory(config, shape_of(config), gpu)


def timed(config: TrainConfig, gpu: Gpu = H100, **given: Any) -> tuple[Plan, Timing, Assumptions]:
    planned, assumed = plan(config, gpu), assume(config, **given)
    return planned, plan_time(config, planned, assumed), assumed


def items(planned: Plan, phase: str) -> dict[str, float]:
    return {item.name: item.num_bytes for each in planned.phases if each.name == phase for item in each.items}


@pytest.mark.parametrize(("name", "published"), KNOWN["published_parameters"].items())
def test_known_shapes_have_the_published_number_of_parameters(name: str, published: float) -> None:
    found = known_shape(f"Qwen/{name}")
    assert found is not None
    digits = 3 if published < 5e9 else 4 if published >= 1e10 else 3
    assert float(f"{found.shape.parameters:.{digits}g}") == pytest.approx(published, rel=1e-9)


@pytest.mark.parametrize("name", ["qwen3-8b", "qwen3-14b", "qwen3-32b", "small-gpu"])
def test_the_recipes_of_hub_models_need_no_hub(name: str) -> None:
    config = recipe(name)
    found = find_shape(config.model.path)
    assert "in the package" in found.source
    assert (found.shape.max_positions or 0) >= config.rollout.max_prompt_tokens + config.rollout.max_response_tokens


def test_a_local_folder_comes_before_a_known_name(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen3-8B-Base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert find_shape(str(folder)).shape.hidden == 64


def test_another_owner_s_model_of_a_known_name_is_not_taken_for_it() -> None:
    assert known_shape("someone/Qwen3-8B-Base") is None


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model_type": "qwen3_moe", "num_experts": 128}, "mixture of experts (qwen3_moe)"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"model_type": "mamba"}, "architecture 'mamba', which forkrl plan does not model"),
        ({"model_type": None}, "architecture 'None'"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"hidden_size": 0}, "hidden_size = 0 in its config.json is not a positive integer"),
        ({"vocab_size": "many"}, "vocab_size = 'many'"),
        ({"num_hidden_layers": None}, "num_hidden_layers = None"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3 does not divide num_attention_heads = 4"),
    ],
)
def test_models_that_are_not_modelled_are_refused_by_name(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_shape(CONFIG | values, "some/model")
    assert says in str(caught.value) and "some/model" in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_that_is_nowhere_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for path in ("./nowhere", "embedded:nothing", "no-such-owner/no-such-model", str(tmp_path)):
        with pytest.raises(UserError, match="model.path") as caught:
            find_shape(path)
        assert "\n" not in str(caught.value)


def test_training_state_is_sharded_over_all_gpus() -> None:
    config = recipe("qwen3-8b", *ON_VERL, "cluster.nodes=2")
    found = items(plan(config), "update")
    number = 8_190_735_360 / 16
    assert found["weights, fp32"] == 4 * number
    assert found["gradients, fp32"] == 4 * number
    assert found["Adam's averages, fp32"] == 8 * number


def test_the_local_engine_shards_nothing() -> None:
    found = items(plan(recipe("qwen3-8b")), "update")
    assert found["weights, fp32"] + found["gradients, fp32"] + found["Adam's averages, fp32"] == 16 * 8_190_735_360
    assert "gathered weights" not in found and "logits" not in found


def test_sequence_parallelism_divides_activations_and_logits_and_nothing_else() -> None:
    whole = items(plan(recipe("qwen3-8b", *ON_VERL)), "update")
    divided = items(plan(recipe("qwen3-8b", *ON_VERL, "cluster.sequence_parallel=4")), "update")
    assert divided["activations"] == whole["activations"] / 4
    assert divided["logits"] < whole["logits"] / 2  # a chunk of fp32 stays
    assert {name for name in whole if divided[name] != whole[name]} == {"activations", "logits"}


def test_logits_are_counted_as_verl_holds_them() -> None:
    tokens, vocabulary, chunk = 22_528, 151_936, 3 * 4 * 2048 * 151_936
    with_entropy = items(plan(recipe("qwen3-8b", *ON_VERL)), "update")["logits"]
    assert with_entropy == 2 * 2 * tokens * vocabulary + chunk
    without = items(plan(recipe("qwen3-8b", *ON_VERL, "selection.entropy=rollout")), "update")["logits"]
    assert without == 2 * tokens * vocabulary + chunk


def test_checkpointing_keeps_the_inputs_of_the_layers_and_one_layer() -> None:
    dense = items(plan(recipe("qwen3-8b", *ON_VERL, "model.gradient_checkpointing=false")), "update")["activations"]
    less = items(plan(recipe("qwen3-8b", *ON_VERL)), "update")["activations"]
    streams = 22_528 * 36 * 2 * 4096
    assert streams < less < streams + 1.2 * dense / 36


def test_the_cache_of_a_token_is_what_its_keys_and_values_take() -> None:
    config = recipe("qwen3-8b", *ON_VERL)
    assert plan(config).rollout.cache_per_token == 2 * 2 * 36 * 8 * 128
    halved = plan(changed(config, [Change("cluster.tensor_parallel", 2)])).rollout
    assert halved.cache_per_token == 2 * 36 * 8 * 128
    assert halved.room_full > 2 * plan(config).rollout.room_full  # the weights are halved too


def test_waves_follow_from_room_workers_and_the_limit() -> None:
    _, timing, _ = timed(recipe("qwen3-8b", *ON_VERL, "rollout.max_sequences=4"))
    planned = plan(recipe("qwen3-8b", *ON_VERL, "rollout.max_sequences=4"))
    assert planned.rollout.at_once == 4 * 8
    assert timing.decoding is not None and timing.decoding.sequences == 4


def test_offloading_frees_the_gpu_while_sampling_and_takes_main_memory() -> None:
    kept, offloaded = (plan(recipe("qwen3-8b", *ON_VERL, f"cluster.offload={word}")) for word in ("false", "true"))
    assert items(kept, "rollout")["training state"] == 12 * 8_190_735_360 / 8
    assert "training state" not in items(offloaded, "rollout")
    (loading, sampling) = offloaded.host
    assert kept.host == (loading,) and sampling.num_bytes == 12 * 8_190_735_360
    assert items(kept, "update") == items(offloaded, "update")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("cluster.tensor_parallel=3",), "cluster.tensor_parallel = 3 does not divide"),
        (("cluster.sequence_parallel=3",), "cluster.sequence_parallel = 3 does not divide"),
        (("cluster.nodes=3",), "cannot be split evenly over 24 ranks"),
        (("cluster.sequence_parallel=2", "training.micro_batch_tokens=22529"), "training.micro_batch_tokens"),
        (("cluster.sequence_parallel=2", "model.precision=fp32"), "16 bits"),
        (("cluster.gpus_per_node=6", "cluster.nodes=2", "cluster.tensor_parallel=4"), "cluster.tensor_parallel = 4"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_as_on_launching(overrides: tuple[str, ...], says: str) -> None:
    config = recipe("qwen3-8b", *ON_VERL, "cluster.address=auto", *overrides)
    with pytest.raises(UserError, match=says.replace(".", r"\.")) as planned:
        plan(config)
    with pytest.raises(UserError) as launched:
        refuse_untranslatable(config)
    assert str(planned.value) == str(launched.value)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match=r"cluster\.tensor_parallel = 64 does not divide the 32 query heads"):
        plan(recipe("qwen3-8b", *ON_VERL, "cluster.nodes=8", "cluster.tensor_parallel=64"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"mfu": 0.0}, "--mfu 0: must be above 0"),
        ({"mfu": 1.5}, "at most 1"),
        ({"mfu": float("nan")}, "--mfu nan"),
        ({"rollout_efficiency": -0.1}, "--rollout-efficiency"),
        ({"mean_response": 30_000.0}, "rollout.max_response_tokens"),
        ({"mean_response": 0.0}, "--mean-response 0"),
        ({"mean_prompt": 4096.0}, "rollout.max_prompt_tokens"),
        ({"oversampling": 0.5}, "--oversampling 0.5: must be 1 or more"),
        ({"rollout_tokens_per_s": float("inf")}, "--rollout-tokens-per-s inf"),
    ],
)
def test_assumptions_out_of_range_are_refused(given: dict[str, float], says: str) -> None:
    with pytest.raises(UserError) as caught:
        assume(recipe("qwen3-8b"), **given)
    assert says in str(caught.value)


def test_gpus_by_name_by_number_and_mixed() -> None:
    assert find_gpu(None, None, None, None) == H100
    assert find_gpu("H200", None, None, None) == GPUS["h200"]
    own = find_gpu(None, 24, 100, 1)
    assert (own.memory, own.flops, own.bandwidth) == (24 * GIB, 100e12, 1e12)
    mixed = find_gpu("h100", 94, None, None)
    assert (mixed.memory, mixed.flops) == (94 * GIB, H100.flops)
    for wrong in (("h1000", None, None, None), (None, 24, None, None), ("h100", 0, None, None)):
        with pytest.raises(UserError):
            find_gpu(*wrong)


def test_without_a_bandwidth_a_rate_has_to_be_given() -> None:
    gpu = find_gpu(None, 80, 989, None)
    with pytest.raises(UserError, match="--gpu-bandwidth"):
        timed(recipe("qwen3-8b", *ON_VERL), gpu)
    _, timing, _ = timed(recipe("qwen3-8b", *ON_VERL), gpu, rollout_tokens_per_s=1000.0)
    rollout = timing.parts[0].seconds
    assert rollout == pytest.approx(512 * 16 * 10_240 / (8 * 1000), rel=0.01)  # and the prompts


def test_operations_are_six_or_eight_times_parameters_and_tokens() -> None:
    """With short responses attention is small, and with verl every token goes through the head."""
    config = recipe("qwen3-8b", *ON_VERL)
    shape = shape_of(config)
    _, timing, _ = timed(config, mean_response=100.0, mean_prompt=100.0)
    tokens = 512 * 16 * 200
    parts = {part.name: part for part in timing.parts}
    assert parts["log-probs of the old policy"].flops == pytest.approx(2 * shape.matrices * tokens, rel=0.01)
    head = 2 * shape.embedding_parameters * tokens  # not computed a second time by checkpointing
    assert parts["update"].flops == pytest.approx(8 * shape.matrices * tokens - head, rel=0.01)
    update = parts["update"].seconds
    assert update == pytest.approx(parts["update"].flops / (8 * 989e12 * 0.4))


def test_old_log_probs_of_the_trainer_are_one_more_pass() -> None:
    names = [
        {part.name for part in timed(recipe("countdown", change))[1].parts}
        for change in ("loss.old_logprobs=sampler", "loss.old_logprobs=trainer")
    ]
    assert names[1] - names[0] == {"log-probs of the old policy"}


def test_forks_only_costs_two_and_six_rho() -> None:
    dense = recipe("qwen3-8b", "model.gradient_checkpointing=false")
    forks = changed(dense, [Change("training.backward", "forks_only")])
    (_, dense_time, _), (_, forks_time, _) = (timed(each, GPUS["h200"]) for each in (dense, forks))
    ratio = forks_time.parts[-1].flops / dense_time.parts[-1].flops
    assert ratio == pytest.approx((2 + 6 * 0.2) / 6, rel=0.05)  # the head differs
    assert items(plan(forks), "update")["activations"] < 0.25 * items(plan(dense), "update")["activations"]


def test_decoding_alone_takes_the_time_of_reading_the_weights() -> None:
    config = recipe("qwen3-8b", *ON_VERL, "rollout.max_sequences=1")
    _, timing, _ = timed(config, rollout_efficiency=1.0, mean_response=1.0, mean_prompt=1.0)
    assert timing.decoding is not None and timing.decoding.bound == "bound by bandwidth"
    bytes_read = 2 * shape_of(config).matrices + 1.5 * plan(config).rollout.cache_per_token
    assert timing.decoding.tokens_per_s == pytest.approx(3.35e12 / bytes_read)


def test_the_local_engine_samples_at_least_a_generation_batch() -> None:
    assert assume(recipe("qwen3-8b")).oversampling == 3
    assert assume(recipe("qwen3-8b", *ON_VERL)).oversampling == 1
    assert assume(recipe("qwen3-8b", "dynamic_sampling.enabled=false")).oversampling == 1


def test_no_hours_are_given_for_a_run_that_cannot_sample() -> None:
    planned, timing, _ = timed(recipe("qwen3-32b", *ON_VERL, "cluster.nodes=4"))
    rollout = planned.phases[0]
    assert planned.status(rollout) == TOO_LARGE and "does not hold its weights" in planned.why(rollout)
    assert timing.step_s is None and timing.run_s is None


def test_a_gpu_nearly_full_is_tight_and_does_not_count_as_fitting() -> None:
    config = recipe("qwen3-8b", *ON_VERL)
    peak = plan(config).phases[1].num_bytes
    planned = plan(config, H100._replace(memory=peak * 1.05))
    assert planned.status(planned.phases[1]) == TIGHT and not planned.fits
    assert plan(config, H100._replace(memory=peak * 1.2)).status(planned.phases[1]) == FITS


@pytest.mark.parametrize(
    ("name", "overrides", "gpu_name"),
    [
        ("qwen3-32b", ("cluster.nodes=4",), "h100"),
        ("qwen3-32b", ("cluster.nodes=1",), "h100"),
        ("qwen3-14b", ("cluster.nodes=1",), "a100-40"),
        ("qwen3-8b", ("cluster.nodes=1", "model.gradient_checkpointing=false"), "h100"),
        ("qwen3-8b", ("cluster.nodes=1",), "l40s"),
    ],
)
def test_every_remedy_makes_it_fit_and_every_change_of_it_is_needed(
    name: str, overrides: tuple[str, ...], gpu_name: str
) -> None:
    config, gpu = recipe(name, *ON_VERL, *overrides), GPUS[gpu_name]
    assert not plan(config, gpu).fits
    remedies = find_remedies(config, shape_of(config), gpu)
    assert remedies
    for remedy in remedies:
        assert plan(changed(config, remedy.changes), gpu).fits
        written = [str(change).replace('"', "").replace(" = ", "=") for change in remedy.changes]
        assert plan(recipe(name, *ON_VERL, *overrides, *written), gpu).fits  # as the user would write it
        for left_out in remedy.changes:
            rest = [change for change in remedy.changes if change != left_out]
            assert not plan(changed(config, rest), gpu).fits


def test_a_recipe_too_large_for_one_gpu_is_sent_to_a_cluster() -> None:
    config = recipe("qwen3-32b")
    (remedy, *_) = find_remedies(config, shape_of(config), H100)
    assert str(remedy.changes[0]) == 'runtime.trainer = "verl"'
    assert plan(changed(config, remedy.changes)).fits


def test_the_way_to_a_cluster_leaves_behind_what_verl_would_refuse() -> None:
    config = recipe("qwen3-32b", "rollout.engine=vllm", "rollout.kv_cache_gib=8")
    (remedy, *_) = find_remedies(config, shape_of(config), H100)
    assert {Change("rollout.engine", "torch"), Change("rollout.kv_cache_gib", 4.0)} <= set(remedy.changes)


def test_vllm_has_weights_of_its_own_and_limited_keys_and_values() -> None:
    config = recipe("qwen3-8b", "model.precision=bf16", "rollout.engine=vllm", "rollout.kv_cache_gib=6")
    counted = items(plan(config), "rollout")
    assert counted["weights of vLLM, bf16"] == 2 * shape_of(config).parameters
    assert counted["KV cache"] == 6 * GIB
    assert "stacked layers" not in counted


def test_a_model_that_no_number_of_such_gpus_can_hold_has_no_remedy() -> None:
    config = recipe("qwen3-32b", *ON_VERL)
    assert find_remedies(config, shape_of(config), H100._replace(memory=2 * GIB)) == []


def test_what_is_called_faster_is_faster_and_fits() -> None:
    config = recipe("qwen3-8b", *ON_VERL)
    _, timing, assumed = timed(config)
    faster = find_faster(config, shape_of(config), H100, timing.run_s, assumed)
    assert faster and timing.run_s is not None
    for each in faster:
        other = changed(config, each.changes)
        again = plan_time(other, plan(other), assumed).run_s
        assert plan(other).fits and again is not None
        assert again == each.run_s and again < 0.95 * timing.run_s
