"""Groups of responses in verl's TransferQueue, read as ForkRL's own types.

Keys are ``{uid}_{session}_{index}``: a prompt, one of its responses, a turn of it. ForkRL's tasks have one turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from forkrl.model.stop_tokens import response_text
from forkrl.types import Prompt, Rollout, RolloutGroup, VerifierResult

_BASE = ("prompts", "responses", "rm_scores", "extra_fields", "extra_info", "reward_model", "raw_prompt")
_NOTHING = torch.zeros(0)


def read_groups(
    keys: Sequence[str],
    partition_id: str,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    per_token: Mapping[str, str] | None = None,
    *,
    with_text: bool = False,
) -> list[RolloutGroup]:
    """The groups of these trajectories, in the order of their first keys.

    Args:
        keys: of trajectories, without verl's padding.
        partition_id: "train" or "val".
        tokenizer: the model's.
        stop_ids: tokens that end a response.
        per_token: the fields with ``logprobs`` and ``entropy``, if wanted.
        with_text: decode prompts and responses, which is slow for a large batch; otherwise their text is empty.
    """
    if not keys:
        return []
    names, speller = per_token or {}, tokenizer if with_text else None
    data = tq.kv_batch_get(keys=list(keys), partition_id=partition_id, select_fields=[*_BASE, *names.values()])
    members: dict[str, list[tuple[Rollout, VerifierResult]]] = {}
    prompts: dict[str, Prompt] = {}
    for place, key in enumerate(keys):
        uid = key.split("_")[0]
        own = {name: _item(data, name, place) for name in _BASE}
        values = {name: _item(data, field, place) for name, field in names.items()}
        members.setdefault(uid, []).append((_rollout(own, speller, stop_ids, values), _result(own)))
        if uid not in prompts:
            prompts[uid] = _prompt(own, speller)
    return [
        RolloutGroup(prompts[uid], tuple(rollout for rollout, _ in pairs), tuple(result for _, result in pairs))
        for uid, pairs in members.items()
    ]


def in_file_order(keys: Sequence[str], partition_id: str) -> list[str]:
    """The keys in the order of their prompts in the data."""
    data = tq.kv_batch_get(keys=list(keys), partition_id=partition_id, select_fields=["index"])
    rows = [int(_item(data, "index", place)) for place in range(len(keys))]
    return [key for _, key in sorted(zip(rows, keys, strict=True))]


def whole_groups(groups: Sequence[RolloutGroup], size: int) -> list[RolloutGroup]:
    """Groups with all their responses: verl drops a response that cannot be sampled or judged."""
    whole = [group for group in groups if len(group.rollouts) == size]
    if not whole:
        raise RuntimeError(f"none of {len(groups)} problems has all its {size} responses; the log has the errors")
    return whole


def _item(data: TensorDict, name: str, place: int) -> Any:
    """One trajectory's value, a tensor or a Python object; None where verl has no such field."""
    if name not in data.keys():  # noqa: SIM118  # `in` of a TensorDict is not a test for keys
        return None
    value = data[name]
    if isinstance(value, Tensor):
        return value[place]
    item = value[place]
    return getattr(item, "data", item)


def _rollout(
    own: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    stop_ids: Sequence[int],
    per_token: Mapping[str, Tensor | None],
) -> Rollout:
    ids = tuple(own["responses"].tolist())
    finished = bool(ids) and ids[-1] in stop_ids
    return Rollout(
        prompt_ids=tuple(own["prompts"].tolist()),
        response_ids=ids,
        logprobs=_values(per_token.get("logprobs"), len(ids)),
        entropy=_values(per_token.get("entropy"), len(ids)),
        text="" if tokenizer is None else response_text(tokenizer, ids, finished=finished),
        finished=finished,
    )


def _values(values_T: Tensor | None, length: int) -> Tensor:
    return _NOTHING if values_T is None else values_T[:length].detach().float().cpu()


def _result(own: Mapping[str, Any]) -> VerifierResult:
    """Score and failure of ForkRL's verifier, or the score or reward of another reward function."""
    said: Mapping[str, Any] = (own["extra_fields"] or {}).get("reward_extra_info") or {}
    score = said.get("score", said.get("acc"))
    return VerifierResult(float(own["rm_scores"].sum() if score is None else score), str(said.get("failure", "")))


def _spell(tokenizer: PreTrainedTokenizerBase | None, ids: Sequence[int]) -> str:
    return "" if tokenizer is None else str(tokenizer.decode(list(ids), skip_special_tokens=False))


def _prompt(own: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> Prompt:
    info, messages = own["extra_info"] or {}, own["raw_prompt"]
    single = len(messages) == 1 if messages is not None else False
    text = str(messages[0]["content"]) if single else _spell(tokenizer, own["prompts"].tolist())
    return Prompt(
        id=str(info.get("id", info.get("index", ""))),
        text=text,
        answer=str((own["reward_model"] or {}).get("ground_truth", "")),
        place=str(info.get("place") or ""),
        source=str(info.get("source") or ""),
        level=int(info.get("level") or 0),
    )
