"""Responses of a temperature sweep: one Parquet file per setting, written when the setting is finished."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from forkrl.analysis.temperatures import FORK_FRACTION, Setting, ends_in_loop, holds_no_text
from forkrl.model.token_texts import TokenTexts
from forkrl.store.parquet import reading_parquet, write_rows
from forkrl.store.run_folder import encodable_text
from forkrl.types import RolloutGroup

RESPONSE_SCHEMA = pa.schema(
    [
        pa.field("high", pa.float64(), nullable=False),
        pa.field("low", pa.float64(), nullable=False),
        pa.field("threshold", pa.float64(), nullable=False),  # nats
        pa.field("prompt", pa.int32(), nullable=False),  # index, from 0
        pa.field("sample", pa.int32(), nullable=False),  # index among the responses to the prompt, from 0
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt_text", pa.string(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("tokens", pa.list_(pa.string()), nullable=False),
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),  # of the unscaled model, nats
        pa.field("entropy", pa.list_(pa.float32()), nullable=False),  # of the unscaled model, nats
        pa.field("score", pa.float32(), nullable=False),
        pa.field("failure", pa.string(), nullable=False),  # why the verifier gave no result; else empty
        pa.field("length", pa.int32(), nullable=False),  # tokens, including a final stop token
        pa.field("cut", pa.bool_(), nullable=False),
        pa.field("loop", pa.bool_(), nullable=False),
        pa.field("garbled", pa.bool_(), nullable=False),
        pa.field("surprise", pa.float64(), nullable=False),  # sum of -log-prob, nats
        pa.field("forks", pa.int32(), nullable=False),  # tokens with entropy above the threshold
    ]
)
_LONG = ("token_ids", "tokens", "logprobs", "entropy", "prompt_id", "prompt_text", "response")
_FIGURES = [name for name in RESPONSE_SCHEMA.names if name not in _LONG]


def setting_path(folder: Path, setting: Setting) -> Path:
    return folder / f"high-{setting.high!r}-low-{setting.low!r}.parquet"


def write_setting(
    folder: Path,
    setting: Setting,
    groups: Sequence[RolloutGroup],
    threshold: float,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write a finished setting atomically."""
    folder.mkdir(exist_ok=True)
    write_rows(setting_path(folder, setting), list(_rows(setting, groups, threshold, tokenizer)), RESPONSE_SCHEMA)


def stored_threshold(folder: Path, baseline: Setting) -> float:
    """The sweep's threshold, from the file of its baseline."""
    return float(_read(folder, baseline, ["threshold"])["threshold"].iloc[0])


def read_figures(folder: Path, settings: Sequence[Setting]) -> pd.DataFrame:
    """All responses of all settings without tokens and texts, for ``temperature_table``."""
    return pd.concat([_read(folder, setting, _FIGURES) for setting in settings], ignore_index=True)


def first_responses(folder: Path, setting: Setting, num_prompts: int) -> pd.DataFrame:
    """The first response to each of the first prompts, all columns."""
    return _read(folder, setting, RESPONSE_SCHEMA.names, [("prompt", "<", num_prompts), ("sample", "==", 0)])


def fork_threshold(groups: Sequence[RolloutGroup]) -> float:
    """Exact 80th percentile of all token entropies in nats, as in ``forkrl analyze``."""
    entropies = [rollout.entropy.numpy() for group in groups for rollout in group.rollouts]
    return float(np.quantile(np.concatenate(entropies).astype(np.float64), FORK_FRACTION))


def _read(folder: Path, setting: Setting, columns: list[str], filters: Any = None) -> pd.DataFrame:
    path = setting_path(folder, setting)
    with reading_parquet(path):
        frame: pd.DataFrame = pq.read_table(path, columns=columns, filters=filters).to_pandas()
    return frame


def _rows(
    setting: Setting, groups: Sequence[RolloutGroup], threshold: float, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    texts = TokenTexts(tokenizer)
    for number, group in enumerate(groups):
        for sample, (rollout, result) in enumerate(zip(group.rollouts, group.results, strict=True)):
            yield {
                "high": setting.high,
                "low": setting.low,
                "threshold": threshold,
                "prompt": number,
                "sample": sample,
                "prompt_id": encodable_text(group.prompt.id),
                "prompt_text": encodable_text(group.prompt.text),
                "response": encodable_text(rollout.text),
                "token_ids": rollout.response_ids,
                "tokens": [texts[token_id] for token_id in rollout.response_ids],
                "logprobs": rollout.logprobs.numpy(),
                "entropy": rollout.entropy.numpy(),
                "score": result.score,
                "failure": result.failure,
                "length": len(rollout),
                "cut": not rollout.finished,
                "loop": ends_in_loop(rollout.response_ids[:-1] if rollout.finished else rollout.response_ids),
                "garbled": holds_no_text(rollout.text),
                "surprise": -float(rollout.logprobs.double().sum()),
                "forks": int((rollout.entropy > threshold).sum()),
            }
