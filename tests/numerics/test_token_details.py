"""Entropy, log-prob, rank and alternatives of each position against plain fp64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from transformers import Gemma2Config, Gemma2ForCausalLM

from forkrl.analysis import entropy_summary, measure_tokens, token_details
from forkrl.analysis.measure import response_token_ids
from forkrl.config import ModelConfig
from forkrl.errors import UserError
from forkrl.model.policy import open_policy


def known_logits(probabilities: list[list[float]]) -> torch.Tensor:
    """Logits whose softmax has exactly these probabilities, shifted by a constant a row."""
    logits = torch.tensor(probabilities, dtype=torch.float64).log()
    return logits + torch.arange(len(probabilities), dtype=torch.float64)[:, None]


def test_known_distributions_by_hand() -> None:
    logits = known_logits([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]])
    found = token_details(logits, torch.eye(4, dtype=torch.float64), torch.tensor([1, 3, 0]), top=3)
    assert found.entropy.tolist() == pytest.approx(
        [1.75 * math.log(2), math.log(4), -0.7 * math.log(0.7) - 0.3 * math.log(0.1)]
    )
    assert found.logprobs.exp().tolist() == pytest.approx([0.25, 0.25, 0.7])
    assert found.ranks.tolist() == [2, 1, 1]  # equal probabilities share the better rank
    assert found.top_ids[0].tolist()[:2] == [0, 1]
    assert found.top_probs[0].tolist() == pytest.approx([0.5, 0.25, 0.125])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_agrees_with_fp64(dtype: torch.dtype, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forkrl.analysis.measure.TILE_ELEMENTS_CPU", 101 * 7)  # several tiles, the last one short
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(30, 16, generator=generator).to(dtype)
    weight = torch.randn(101, 16, generator=generator).to(dtype)
    bias = torch.randn(101, generator=generator).to(dtype)
    targets = torch.randint(101, (30,), generator=generator)
    found = token_details(hidden, weight, targets, bias=bias, temperature=temperature)
    logits = torch.nn.functional.linear(hidden, weight, bias).double() / temperature
    log_p = torch.log_softmax(logits, -1)
    torch.testing.assert_close(found.entropy.double(), torch.special.entr(log_p.exp()).sum(1), rtol=1e-5, atol=1e-5)
    target = log_p.gather(1, targets[:, None])
    torch.testing.assert_close(found.logprobs.double(), target[:, 0], rtol=1e-5, atol=1e-5)
    assert found.ranks.tolist() == ((log_p > target).sum(1) + 1).tolist()
    torch.testing.assert_close(found.top_probs.double(), log_p.exp().topk(5).values, rtol=1e-5, atol=1e-6)
    assert found.entropy.dtype == torch.float32


def test_small_vocabularies_and_no_rows() -> None:
    found = token_details(torch.zeros(0, 4), torch.randn(3, 4), torch.zeros(0, dtype=torch.int64))
    assert found.top_ids.shape == (0, 3)


def test_refuses_shapes_and_temperatures() -> None:
    with pytest.raises(ValueError, match=r"must be \[N, D\], \[V, D\] and \[N\]"):
        token_details(torch.zeros(2, 3), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="temperature = 0"):
        token_details(torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64), temperature=0)


def test_the_table_of_a_model_in_a_notebook_is_what_the_model_says() -> None:
    policy = open_policy(ModelConfig(path="embedded:countdown-base"), "cpu")
    prompts = ["2 5 9:90?", "1 2 3:6?", "2 5 9:90?"]
    frame = measure_tokens(policy.model, policy.tokenizer, prompts, ["5*2=10", "1+", "9"], correct=[True, False, False])
    assert frame.groupby(["prompt", "sample"])["length"].first().to_dict() == {(0, 0): 6, (0, 1): 1, (1, 0): 2}
    ids = policy.tokenizer.encode(prompts[0] + "5*2=10")
    with torch.no_grad():
        log_p = torch.log_softmax(policy.model(torch.tensor([ids])).logits[0, -7:-1].double(), -1)
    rows = frame[(frame["prompt"] == 0) & (frame["sample"] == 0)]
    assert rows["entropy"].tolist() == pytest.approx(torch.special.entr(log_p.exp()).sum(1).tolist(), abs=1e-5)
    assert "".join(rows["text"]) == "5*2=10"
    assert entropy_summary(frame)["value"]["tokens"] == 9
    with pytest.raises(ValueError, match="response 1: the response has no tokens"):
        measure_tokens(policy.model, policy.tokenizer, ["1", "1"], ["2", ""])


def tiny_gemma() -> tuple[Any, Any]:
    """A model that caps its logits softly, with the embedded tokenizer."""
    sizes: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16, "bos_token_id": 1,
    }  # fmt: skip
    tokenizer = open_policy(ModelConfig(path="embedded:countdown-base"), "cpu").tokenizer
    return Gemma2ForCausalLM(Gemma2Config(**sizes)).eval(), tokenizer


def test_a_notebooks_model_is_left_as_it_was_and_refused_where_its_logits_are_not_the_heads() -> None:
    policy = open_policy(ModelConfig(path="embedded:countdown-base"), "cpu")
    policy.model.set_attn_implementation("sdpa")
    measure_tokens(policy.model, policy.tokenizer, ["1 2 3:6?"], ["1+2"])
    assert policy.model.config._attn_implementation == "sdpa"
    with pytest.raises(UserError, match="soft-capping"):
        measure_tokens(*tiny_gemma(), ["1 2 3:6?"], ["1+2"])


@pytest.mark.parametrize(
    ("prompts", "responses", "says"),
    [
        ([], [], "no responses"),
        (["1"], ["x"], "response 0: the tokenizer does not know 'x' of the response"),
        (["1"], ["1" * 512], "response 0: prompt and response have 513 tokens, the model has 512 positions"),
    ],
)
def test_what_a_notebook_cannot_have_measured(prompts: list[str], responses: list[str], says: str) -> None:
    policy = open_policy(ModelConfig(path="embedded:countdown-base"), "cpu")
    with pytest.raises(ValueError, match=says):
        measure_tokens(policy.model, policy.tokenizer, prompts, responses)


def test_a_response_that_its_tokenizer_changes_is_refused() -> None:
    tokenizer = copy.deepcopy(open_policy(ModelConfig(path="embedded:countdown-base"), "cpu").tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("  ", " ")
    with pytest.raises(UserError, match=r"r0: response does not tokenise back: from character 3 on ' 2' becomes '2'"):
        response_token_ids(tokenizer, "5  2", "r0")


def test_a_notebooks_model_may_be_in_bf16_and_no_other_half() -> None:
    policy = open_policy(ModelConfig(path="embedded:countdown-base"), "cpu")
    exact = measure_tokens(policy.model, policy.tokenizer, ["2 5 9:90?"], ["5*2=10"])
    model: Any = policy.model
    coarse = measure_tokens(model.to(torch.bfloat16), policy.tokenizer, ["2 5 9:90?"], ["5*2=10"])
    assert coarse["entropy"].tolist() == pytest.approx(exact["entropy"].tolist(), abs=0.02)
    with pytest.raises(ValueError, match=r"the model is in torch.float16"):
        measure_tokens(model.to(torch.float16), policy.tokenizer, ["2 5 9:90?"], ["5*2=10"])
