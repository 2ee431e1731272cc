"""Files that verl reads: prompts as Parquet, verifiers as JSON. Imports no verl."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from forkrl.config import RewardConfig
from forkrl.config.recipe import parse_recipe
from forkrl.errors import UserError
from forkrl.store.atomic import write_bytes, write_json
from forkrl.types import Prompt, VerifierSpec

_TEXT, _KEPT = pa.string(), ("id", "place", "source", "level", "templated")
PROMPT_SCHEMA = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in {
            "data_source": _TEXT,
            "prompt": pa.list_(pa.struct({"role": _TEXT, "content": _TEXT})),
            "ability": _TEXT,
            "reward_model": pa.struct({"style": _TEXT, "ground_truth": _TEXT}),
            "extra_info": pa.struct(
                {"index": pa.int64(), "id": _TEXT, "place": _TEXT, "source": _TEXT, "level": pa.int64(),
                 "templated": pa.bool_()}
            ),
        }.items()
    ]
)  # fmt: skip
"""The columns that verl's ``RLHFDataset`` reads. ``content`` is the complete prompt."""


class Judging(NamedTuple):
    """Verifiers, their limits and the maximum length for the overlong penalty."""

    verifiers: dict[str, VerifierSpec]
    reward: RewardConfig
    max_response_tokens: int


def write_prompts(path: Path, prompts: Sequence[Prompt], task_name: str) -> None:
    """Write prompts in order for verl; ``path`` ends in ".parquet", ``task_name`` replaces an empty source."""
    rows = [
        {
            "data_source": prompt.source or task_name,
            "prompt": [{"role": "user", "content": prompt.text}],
            "ability": "reasoning",
            "reward_model": {"style": "rule", "ground_truth": prompt.answer},
            "extra_info": {"index": index, **{name: getattr(prompt, name) for name in _KEPT}},
        }
        for index, prompt in enumerate(prompts)
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA), buffer, compression="zstd")
    write_bytes(path, buffer.getvalue())


def read_prompt(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a row from ``write_prompts``, as verl's data loader returns it."""
    [message], kept = row["raw_prompt"], {name: row["extra_info"][name] for name in _KEPT}
    return Prompt(text=message["content"], answer=row["reward_model"]["ground_truth"], **kept)


def write_verifiers(
    path: Path, verifiers: Mapping[str, VerifierSpec], reward: RewardConfig, *, max_response_tokens: int
) -> None:
    """Write the verifiers of every ``Prompt.source`` for ``read_verifiers`` in verl's processes."""
    specs = {source: asdict(spec) | {"options": dict(spec.options)} for source, spec in verifiers.items()}
    limits = {"reward": reward.model_dump(mode="json"), "max_response_tokens": max_response_tokens}
    write_json(path, {"verifiers": specs, **limits})


def read_verifiers(path: Path) -> Judging:
    """Read a file of ``write_verifiers``; raises UserError for any other."""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        verifiers = {source: VerifierSpec(**spec) for source, spec in written["verifiers"].items()}
        reward, max_response_tokens = dict(written["reward"]), int(written["max_response_tokens"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"forkrl.verifiers = {str(path)!r} cannot be read as verifiers ({type(error).__name__}: {error}); give the "
            f"file that forkrl train --trainer verl wrote"
        ) from error
    return Judging(verifiers, parse_recipe(RewardConfig, reward, str(path)), max_response_tokens)
