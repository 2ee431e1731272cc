"""verl's TransferQueue read as ForkRL's groups. Keys are ``{uid}_{session}_{index}``: prompt, response, turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transfer_queue as tq
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
    """The groups of these trajectories (without padding keys), in the order of their first keys.

    ``per_token`` maps ``logprobs`` and ``entropy`` to the fields to read. ``with_text`` decodes text, which is slow.
    """
    if not keys:
        return []
    names, speller = per_token or {}, tokenizer if with_text else None
    data = tq.kv_batch_get(keys=list(keys), partition_id=partition_id, select_fields=[*_BASE, *names.values()])
    rows: dict[str, list[dict[str, Any]]] = {}
    for place, key in enumerate(keys):
        row = {name: _item(data, name, place) for name in (*_BASE, *names.values())}
        rows.setdefault(key.split("_")[0], []).append(row)
    return [
        RolloutGroup(
            _prompt(members[0], speller),
            tuple(_rollout(row, speller, stop_ids, names) for row in members),
            tuple(_result(row) for row in members),
        )
        for members in rows.values()
    ]


def in_file_order(keys: Sequence[str], partition_id: str) -> list[str]:
    """The keys in the order of their prompts in the data."""
    data = tq.kv_batch_get(keys=list(keys), partition_id=partition_id, select_fields=["index"])
    rows = [int(_item(data, "index", place)) for place in range(len(keys))]
    return [key for _, key in sorted(zip(rows, keys, strict=True))]


def complete_groups(groups: Sequence[RolloutGroup], size: int) -> list[RolloutGroup]:
    """Groups with all responses: verl drops one that cannot be sampled or scored."""
    complete = [group for group in groups if len(group.rollouts) == size]
    if not complete:
        raise RuntimeError(f"none of {len(groups)} problems has all its {size} responses; the log has the errors")
    return complete


def _item(data: Any, name: str, place: int) -> Any:
    """One trajectory's value, a tensor or a Python object; None where verl has no such field."""
    if name not in data.keys():  # noqa: SIM118  # a TensorDict's `in` does not test for keys
        return None
    value = data[name][place]
    return value if isinstance(value, Tensor) else getattr(value, "data", value)


def _rollout(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    stop_ids: Sequence[int],
    per_token: Mapping[str, str],
) -> Rollout:
    ids = tuple(row["responses"].tolist())
    finished = bool(ids) and ids[-1] in stop_ids
    values = {name: row[field] for name, field in per_token.items() if row[field] is not None}
    values = {name: values_T[: len(ids)].detach().float().cpu() for name, values_T in values.items()}
    return Rollout(
        prompt_ids=tuple(row["prompts"].tolist()),
        response_ids=ids,
        logprobs=values.get("logprobs", _NOTHING),
        entropy=values.get("entropy", _NOTHING),
        text="" if tokenizer is None else response_text(tokenizer, ids, finished=finished),
        finished=finished,
    )


def _result(row: Mapping[str, Any]) -> VerifierResult:
    """Score and failure of ForkRL's verifier, or another reward function's score or reward."""
    found: Mapping[str, Any] = (row["extra_fields"] or {}).get("reward_extra_info") or {}
    score = found.get("score", found.get("acc"))
    return VerifierResult(float(row["rm_scores"].sum() if score is None else score), str(found.get("failure", "")))


def _prompt(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> Prompt:
    info, messages, text = row["extra_info"] or {}, row["raw_prompt"], ""
    if messages is not None and len(messages) == 1:
        text = str(messages[0]["content"])
    elif tokenizer is not None:
        text = str(tokenizer.decode(row["prompts"].tolist(), skip_special_tokens=False))
    return Prompt(
        id=str(info.get("id", info.get("index", ""))),
        text=text,
        answer=str((row["reward_model"] or {}).get("ground_truth", "")),
        place=str(info.get("place") or ""),
        source=str(info.get("source") or ""),
        level=int(info.get("level") or 0),
    )
