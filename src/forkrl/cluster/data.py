"""What a recipe hands to verl as files: prompts as Parquet, verifiers as JSON. Imports no verl."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from forkrl.config import RewardConfig
from forkrl.config.recipe import parse_recipe
from forkrl.errors import UserError
from forkrl.store.atomic import write_bytes, write_json
from forkrl.types import Prompt, VerifierSpec

PROMPT_SCHEMA = pa.schema(
    [
        pa.field("data_source", pa.string(), nullable=False),
        pa.field("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])), nullable=False),
        pa.field("ability", pa.string(), nullable=False),
        pa.field("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())]), nullable=False),
        pa.field(
            "extra_info",
            pa.struct(
                [
                    ("index", pa.int64()),
                    ("id", pa.string()),
                    ("place", pa.string()),
                    ("source", pa.string()),
                    ("level", pa.int64()),
                    ("templated", pa.bool_()),
                ]
            ),
            nullable=False,
        ),
    ]
)
"""The columns that verl's ``RLHFDataset`` reads. ``content`` is all that the model reads, with nothing added to it."""


class Judging(NamedTuple):
    """What a file of verifiers holds: who judges, within what limits, and what is a long response."""

    verifiers: dict[str, VerifierSpec]
    reward: RewardConfig
    max_response_tokens: int


def write_prompts(path: Path, prompts: Sequence[Prompt], task_name: str) -> None:
    """Write prompts as verl reads them, in their order.

    Args:
        path: a Parquet file; its name must end in ".parquet", by which verl knows the format.
        prompts: in their order.
        task_name: the data source of prompts that name none.

    Raises:
        UserError: the file cannot be written.
    """
    rows = [_row(index, prompt, task_name) for index, prompt in enumerate(prompts)]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA), buffer, compression="zstd")
    write_bytes(path, buffer.getvalue())


def _row(index: int, prompt: Prompt, task_name: str) -> dict[str, object]:
    return {
        "data_source": prompt.source or task_name,
        "prompt": [{"role": "user", "content": prompt.text}],
        "ability": "reasoning",
        "reward_model": {"style": "rule", "ground_truth": prompt.answer},
        "extra_info": {
            "index": index,
            "id": prompt.id,
            "place": prompt.place,
            "source": prompt.source,
            "level": prompt.level,
            "templated": prompt.templated,
        },
    }


def read_prompt(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a row that ``write_prompts`` wrote, as verl hands it around."""
    [message], told = row["raw_prompt"], row["extra_info"]
    return Prompt(
        id=told["id"],
        text=message["content"],
        answer=row["reward_model"]["ground_truth"],
        place=told["place"],
        source=told["source"],
        level=told["level"],
        templated=told["templated"],
    )


def write_verifiers(
    path: Path, verifiers: Mapping[str, VerifierSpec], reward: RewardConfig, *, max_response_tokens: int
) -> None:
    """Write who judges responses, and within what limits, for ``read_verifiers`` in verl's processes.

    Args:
        path: a JSON file.
        verifiers: one for every ``Prompt.source``, bound to their sandbox where they need one.
        reward: the recipe's ``[reward]``.
        max_response_tokens: the longest response, from which the penalty for long ones counts.

    Raises:
        UserError: the file cannot be written.
    """
    write_json(
        path,
        {
            "verifiers": {
                source: {"path": spec.path, "options": dict(spec.options), "deadline_s": spec.deadline_s}
                for source, spec in verifiers.items()
            },
            "reward": reward.model_dump(mode="json"),
            "max_response_tokens": max_response_tokens,
        },
    )


def read_verifiers(path: Path) -> Judging:
    """What ``write_verifiers`` wrote.

    Raises:
        UserError: there is no such file, or it is not one of those.
    """
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        verifiers = {source: VerifierSpec(**spec) for source, spec in written["verifiers"].items()}
        reward, max_response_tokens = dict(written["reward"]), int(written["max_response_tokens"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"forkrl.verifiers = {str(path)!r} cannot be read as verifiers ({type(error).__name__}: {error}); give the "
            f"file that forkrl train --engine verl wrote"
        ) from error
    return Judging(verifiers, parse_recipe(RewardConfig, reward, str(path)), max_response_tokens)
