"""Tables of tokens made up for tests: given entropies, or random ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from forkrl.analysis import TOKEN_SCHEMA


def token_frame(responses: Sequence[tuple[int, Sequence[int], Sequence[float], bool | None]]) -> pd.DataFrame:
    """Rows of the table for responses given as (prompt, token ids, entropies, correct); token 3 reads "t3 "."""
    rows = []
    samples: dict[int, int] = {}
    for prompt, ids, entropies, correct in responses:
        sample = samples[prompt] = samples.get(prompt, -1) + 1
        for position, (token_id, entropy) in enumerate(zip(ids, entropies, strict=True)):
            rows.append(
                {
                    "prompt_id": f"p{prompt}", "prompt": prompt, "sample": sample, "position": position,
                    "length": len(ids), "token_id": token_id, "text": f"t{token_id} ", "entropy": entropy,
                    "logprob": -entropy, "rank": 1, "top_ids": [token_id], "top_texts": [f"t{token_id} "],
                    "top_probs": [1.0], "correct": correct,
                }
            )  # fmt: skip
    return pd.DataFrame(rows, columns=TOKEN_SCHEMA.names)


def random_frame(
    seed: int, num_prompts: int = 7, most_samples: int = 3, longest: int = 30, vocabulary: int = 9
) -> pd.DataFrame:
    """Responses of random lengths, with many entropies tied at 0."""
    rng = np.random.default_rng(seed)
    responses = []
    for prompt in range(num_prompts):
        for _ in range(rng.integers(1, most_samples + 1)):
            length = int(rng.integers(1, longest + 1))
            entropies = np.where(rng.random(length) < 0.5, 0.0, rng.exponential(1.0, length)).astype(np.float32)
            ids = rng.integers(0, vocabulary, length).tolist()
            responses.append((prompt, ids, entropies.tolist(), bool(rng.random() < 0.5)))
    return token_frame(responses)


def write_parts(folder: Path, frame: pd.DataFrame, prompts_per_group: int = 1, prompts_per_part: int = 3) -> Path:
    """The frame as a folder of parts, whose row groups hold whole prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = frame["prompt"].unique()
    for part, start in enumerate(range(0, len(prompts), prompts_per_part)):
        with pq.ParquetWriter(folder / f"part-{part:05d}.parquet", TOKEN_SCHEMA) as writer:
            inside = prompts[start : start + prompts_per_part]
            for first in range(0, len(inside), prompts_per_group):
                rows = frame[frame["prompt"].isin(inside[first : first + prompts_per_group])]
                writer.write_table(pa.Table.from_pandas(rows, schema=TOKEN_SCHEMA, preserve_index=False))
    return folder
