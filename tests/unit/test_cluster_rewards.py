"""verl's reward manager with ForkRL's verifiers, called as verl's reward worker calls it."""

from __future__ import annotations

import asyncio
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from forkrl.cluster.data import write_verifiers
from forkrl.config import RewardConfig
from forkrl.errors import UserError
from forkrl.model.stop_tokens import response_text
from forkrl.types import VerifierSpec
from tests.models import random_policy
from tests.verl_here import needs_verl

pytestmark = needs_verl

JUDGES = '''
import time


def equal(answer, response):
    """Exactly the answer, no character more."""
    return float(response == answer)


def act(answer, response):
    while response == "1":  # inside C code no time-out of this process would help
        time.sleep(3600)
    if response == "2":
        raise ValueError("no such thing")
    return 0.5
'''
LONGEST = 8
POLICY = random_policy()
TOKENIZER = POLICY.tokenizer
EOS = int(str(TOKENIZER.eos_token_id))
Open = Callable[..., Any]


@pytest.fixture
def open_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens reward managers on verifiers of this test, and closes them."""
    from omegaconf import OmegaConf

    from forkrl.cluster.rewards import ForkRewardManager

    (tmp_path / "judges.py").write_text(textwrap.dedent(JUDGES))
    monkeypatch.chdir(tmp_path)
    opened = []

    def open_it(verifiers: Mapping[str, VerifierSpec], reward: RewardConfig, stop: tuple[int, ...] = ()) -> Any:
        path = tmp_path / "verifiers.json"
        write_verifiers(path, verifiers, reward, max_response_tokens=LONGEST)
        config = OmegaConf.create({"forkrl": {"verifiers": str(path), "stop_token_ids": list(stop)}})
        # All that verl hands to a reward manager.
        opened.append(
            ForkRewardManager(config, TOKENIZER, None, reward_router_address=None, reward_model_tokenizer=None)
        )
        return opened[-1]

    yield open_it
    for manager in opened:
        manager._pool.close()


def request(ids: list[int], answer: str, *, source: str = "", padded: int = 0) -> Any:
    """A response as verl's agent loop hands it to a reward worker."""
    import numpy as np
    from tensordict import TensorDict
    from verl import DataProto

    prompts_BT, responses_BT = torch.tensor([[3, 4, 5]]), torch.tensor([ids + [0] * padded])
    mask_BT = torch.tensor([[1] * (3 + len(ids)) + [0] * padded])
    fields = {"prompts": prompts_BT, "responses": responses_BT, "attention_mask": mask_BT}
    row = {
        "raw_prompt": [{"role": "user", "content": "3 + 4?"}],
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"index": 0, "id": "q", "place": "line 1", "source": source, "level": 0, "templated": False},
        "data_source": "test",
    }
    return DataProto(
        batch=TensorDict(fields, batch_size=1), non_tensor_batch={key: np.array([value]) for key, value in row.items()}
    )


def judge(manager: Any, *requests: Any) -> list[dict[str, Any]]:
    async def run() -> list[dict[str, Any]]:
        return list(await asyncio.gather(*(manager.run_single(each) for each in requests)))

    return asyncio.run(run())


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


EQUAL = {"": VerifierSpec("judges:equal")}
NO_PENALTY = RewardConfig(overlong_cache=0)


def test_the_closing_stop_token_is_not_judged(open_manager: Open) -> None:
    [result] = judge(open_manager(EQUAL, NO_PENALTY), request([*ids_of("7"), EOS], "7", padded=2))
    assert result == {
        "reward_score": 1.0,
        "reward_extra_info": {"acc": 1.0, "score": 1.0, "failure": "", "finished": True},
    }


def test_a_further_stop_token_closes_a_response_too(open_manager: Open) -> None:
    [nine] = ids_of("9")
    asked = request([*ids_of("7"), nine], "7")
    [with_it] = judge(open_manager(EQUAL, NO_PENALTY, stop=(nine,)), asked)
    [without] = judge(open_manager(EQUAL, NO_PENALTY), asked)
    assert with_it["reward_score"] == 1.0 and with_it["reward_extra_info"]["finished"] is True
    assert without["reward_score"] == 0.0 and without["reward_extra_info"]["finished"] is False


@pytest.mark.parametrize(
    ("ids", "finished"), [([*ids_of("12"), EOS], True), ([EOS, *ids_of("12")], False), ([EOS], True)]
)
def test_the_text_is_that_of_the_local_engine(open_manager: Open, ids: list[int], finished: bool) -> None:
    expected = response_text(TOKENIZER, ids, finished=finished)
    [result] = judge(open_manager(EQUAL, NO_PENALTY), request(ids, expected, padded=1))
    assert result["reward_score"] == 1.0
    assert result["reward_extra_info"]["finished"] is finished


def test_long_responses_are_penalised_beside_the_score(open_manager: Open) -> None:
    manager = open_manager(EQUAL, RewardConfig(overlong_cache=4))
    texts = ["1234", "12345", "1234567", "12345678"]
    results = judge(manager, *(request(ids_of(text), text, padded=3) for text in texts))
    assert [result["reward_score"] for result in results] == [1.0, 0.75, 0.25, 0.0]
    assert [result["reward_extra_info"]["score"] for result in results] == [1.0] * 4


def test_every_source_has_its_own_verifier(open_manager: Open) -> None:
    manager = open_manager(EQUAL | {"other": VerifierSpec("judges:act")}, NO_PENALTY)
    results = judge(manager, request(ids_of("7"), "7"), request(ids_of("7"), "7", source="other"))
    assert [result["reward_score"] for result in results] == [1.0, 0.5]


def test_a_source_without_a_verifier_is_an_error(open_manager: Open) -> None:
    with pytest.raises(UserError, match="no verifier for its source 'new'"):
        judge(open_manager(EQUAL, NO_PENALTY), request(ids_of("7"), "7", source="new"))


def test_a_hanging_verifier_is_a_failure_and_the_others_are_scored(open_manager: Open) -> None:
    reward = RewardConfig(overlong_cache=0, timeout_s=1.0)
    manager = open_manager({"": VerifierSpec("judges:act")}, reward)
    began = time.monotonic()
    results = judge(manager, *(request(ids_of(text), "") for text in ("1", "2", "3")))
    assert time.monotonic() - began < 10
    assert [result["reward_score"] for result in results] == [0.0, 0.0, 0.5]
    assert [result["reward_extra_info"]["failure"] for result in results] == ["timeout", "error", ""]


def test_a_verifier_that_cannot_be_loaded_is_told_at_once(open_manager: Open) -> None:
    with pytest.raises(UserError, match="judges:missing"):
        open_manager({"": VerifierSpec("judges:missing")}, NO_PENALTY)


def test_without_a_file_of_verifiers_there_is_no_manager() -> None:
    from omegaconf import OmegaConf

    from forkrl.cluster.rewards import ForkRewardManager

    with pytest.raises(UserError, match="forkrl.verifiers is not set"):
        ForkRewardManager(OmegaConf.create({}), TOKENIZER)
