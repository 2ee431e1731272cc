"""The responses of a temperature sweep on disk: one Parquet file a setting, there when the setting is finished."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from forkrl.analysis.temperatures import FORK_FRACTION, Setting, ends_in_loop, holds_no_text
from forkrl.analysis.token_table import reading_parquet
from forkrl.model.token_texts import TokenTexts
from forkrl.store.atomic import write_bytes
from forkrl.store.run_folder import encodable_text
from forkrl.types import Rollout, RolloutGroup

RESPONSE_SCHEMA = pa.schema(
    [
        pa.field("high", pa.float64(), nullable=False),
        pa.field("low", pa.float64(), nullable=False),
        pa.field("threshold", pa.float64(), nullable=False),  # nats
        pa.field("problem", pa.int32(), nullable=False),  # its number, from 0
        pa.field("sample", pa.int32(), nullable=False),  # the response's number among those to its problem, from 0
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("tokens", pa.list_(pa.string()), nullable=False),
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),  # of the unscaled model, nats
        pa.field("entropy", pa.list_(pa.float32()), nullable=False),  # likewise
        pa.field("score", pa.float32(), nullable=False),
        pa.field("failure", pa.string(), nullable=False),  # why the verifier gave no result; empty if it did
        pa.field("length", pa.int32(), nullable=False),  # tokens, a closing stop token among them
        pa.field("cut", pa.bool_(), nullable=False),
        pa.field("loop", pa.bool_(), nullable=False),
        pa.field("garbled", pa.bool_(), nullable=False),
        pa.field("surprise", pa.float64(), nullable=False),  # sum of -log-prob, nats
        pa.field("forks", pa.int32(), nullable=False),  # tokens with an entropy above the threshold
    ]
)
_PER_TOKEN = ("token_ids", "tokens", "logprobs", "entropy")
_FIGURES = [name for name in RESPONSE_SCHEMA.names if name not in (*_PER_TOKEN, "prompt_id", "prompt", "response")]


@dataclass(frozen=True, slots=True)
class SweepResponses:
    """The files of one sweep.

    Args:
        folder: where they are; made when the first is written.
        settings: all of the sweep, the baseline first.
    """

    folder: Path
    settings: Sequence[Setting]

    @property
    def missing(self) -> list[Setting]:
        """Settings still to be sampled, in order."""
        return [setting for setting in self.settings if not self._path(setting).exists()]

    def write(
        self, setting: Setting, groups: Sequence[RolloutGroup], threshold: float, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Put a finished setting on the disk, all at once."""
        rows = list(_rows(setting, groups, threshold, tokenizer))
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, RESPONSE_SCHEMA), buffer, compression="zstd")
        self.folder.mkdir(exist_ok=True)
        write_bytes(self._path(setting), buffer.getvalue())

    def threshold(self) -> float:
        """The one that the sweep began with, from the file of the baseline."""
        return float(self._read(self.settings[0], ["threshold"])["threshold"].iloc[0])

    def figures(self) -> pd.DataFrame:
        """All responses of all settings without what is long: what ``temperature_table`` needs."""
        return pd.concat([self._read(setting, _FIGURES) for setting in self.settings], ignore_index=True)

    def first_responses(self, setting: Setting, problems: int) -> pd.DataFrame:
        """The first response to each of the first problems, in full."""
        wanted = [("problem", "<", problems), ("sample", "==", 0)]
        return self._read(setting, RESPONSE_SCHEMA.names, wanted)

    def _read(self, setting: Setting, columns: list[str], filters: Any = None) -> pd.DataFrame:
        path = self._path(setting)
        with reading_parquet(path):
            frame: pd.DataFrame = pq.read_table(path, columns=columns, filters=filters).to_pandas()
        return frame

    def _path(self, setting: Setting) -> Path:
        return self.folder / f"high-{setting.high!r}-low-{setting.low!r}.parquet"


def fork_threshold(groups: Sequence[RolloutGroup]) -> float:
    """The 80th percentile of the entropies of all tokens, nats: exact, as of ``forkrl analyze``."""
    entropies = [rollout.entropy.numpy() for group in groups for rollout in group.rollouts]
    return float(np.quantile(np.concatenate(entropies).astype(np.float64), FORK_FRACTION))


def _rows(
    setting: Setting, groups: Sequence[RolloutGroup], threshold: float, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """A row of ``RESPONSE_SCHEMA`` for each response."""
    texts = TokenTexts(tokenizer)
    for problem, group in enumerate(groups):
        for sample, (rollout, result) in enumerate(zip(group.rollouts, group.results, strict=True)):
            yield {
                "high": setting.high,
                "low": setting.low,
                "threshold": threshold,
                "problem": problem,
                "sample": sample,
                "prompt_id": encodable_text(group.prompt.id),
                "prompt": encodable_text(group.prompt.text),
                "response": encodable_text(rollout.text),
                "token_ids": rollout.response_ids,
                "tokens": [texts[token_id] for token_id in rollout.response_ids],
                "logprobs": rollout.logprobs.numpy(),
                "entropy": rollout.entropy.numpy(),
                "score": result.score,
                "failure": result.failure,
                "length": len(rollout),
                **_flags(rollout),
                "surprise": -float(rollout.logprobs.double().sum()),
                "forks": int((rollout.entropy > threshold).sum()),
            }


def _flags(rollout: Rollout) -> dict[str, bool]:
    """The three ways to be broken."""
    written = rollout.response_ids[:-1] if rollout.finished else rollout.response_ids
    return {"cut": not rollout.finished, "loop": ends_in_loop(written), "garbled": holds_no_text(rollout.text)}
