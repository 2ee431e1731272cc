"""A mirror of every benchmark's data set, made up but in the layouts and schemas of the hub, a few rows each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = Sequence[Mapping[str, Any]]

AIME24: Rows = [
    {
        "id": 60 + n,
        "problem": f"What is {n} + {n}?",
        "solution": "…",
        "answer": f"{2 * n:03}",
        "url": "",
        "year": "2024",
    }
    for n in range(3)
]
AIME25: Rows = [{"problem": f"{n} + 1 =", "answer": str(n + 1), "id": str(n)} for n in range(4)]
AMC23: Rows = [{"id": n, "answer": float(n), "url": "", "question": f"{n} times 1 ="} for n in range(3)]
MATH500: Rows = [
    {
        "problem": f"{n} - {n} =", "solution": "…", "answer": "\\frac{0}{7}", "subject": "Algebra", "level": 1,
        "unique_id": f"test/algebra/{n}.json",
    }
    for n in range(3)
]  # fmt: skip
MINERVA: Rows = [{"question": "How many $\\mathrm{km}$ are 5000 m?", "answer": "5"}] * 2
OLYMPIAD: Rows = [
    {
        "id": 1, "question": "Find all $x$.", "solution": ["…"], "final_answer": ["1", "2"],
        "context": "Let $x^2-3x+2=0$.", "image_1": None, "is_multiple_answer": True, "unit": None, "error": None,
    },
    {
        "id": 2, "question": "Find $y$.", "solution": ["…"], "final_answer": ["$3 y$"], "context": None,
        "image_1": None, "is_multiple_answer": False, "unit": "m", "error": None,
    },
]  # fmt: skip
GSM8K: Rows = [
    {"question": "Ann has 3 apples, Bob 1,000. Together?", "answer": "3+1000=<<3+1000=1003>>1003\n#### 1,003"}
]
_STARTER = "class Solution:\n    def twice(self, n: int) -> int:\n        "
LIVECODEBENCH: Rows = [
    {
        "question_title": "Twice", "question_content": "Print twice the number.", "platform": "atcoder",
        "question_id": f"abc{number}_a", "contest_id": f"abc{number}", "contest_date": date, "starter_code": starter,
        "difficulty": "easy",
        "public_test_cases": json.dumps([{"input": f"2{end}", "output": f"4{end}", "testtype": kind}]),
        "private_test_cases": json.dumps([{"input": f"5{end}", "output": f"10{end}", "testtype": kind}]),
        "metadata": json.dumps({"func_name": "twice"} if starter else {}),
    }
    for number, date, starter, kind, end in (
        (1, "2024-07-31T00:00:00", "", "stdin", "\n"),
        (2, "2024-08-01T00:00:00", "", "stdin", "\n"),
        (3, "2025-01-31T23:59:59", _STARTER, "functional", ""),
        (4, "2025-02-01T00:00:00", "", "stdin", "\n"),
    )
]  # fmt: skip
HUMANEVAL: Rows = [
    {
        "task_id": "HumanEval/0", "prompt": '\n\ndef twice(n: int) -> int:\n    """Twice the number."""\n',
        "canonical_solution": "    return 2 * n\n",
        "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(2) == 4\n", "entry_point": "twice",
    }
]  # fmt: skip
_CONFIGS = {
    "HuggingFaceH4/aime_2024": "default\n  data_files:\n  - split: train\n    path: data/train-*",
    "Hothan/OlympiadBench": (
        "OE_TO_maths_en_COMP\n  data_files: OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet"
    ),
    "openai/openai_humaneval": "openai_humaneval\n  data_files:\n  - split: test\n    path: openai_humaneval/test-*",
    "openai/gsm8k": (
        "main\n  data_files:\n  - split: train\n    path: main/train-*\n  - split: test\n    path: main/test-*"
    ),
}
FILES: Mapping[str, Rows] = {
    "HuggingFaceH4/aime_2024/data/train-00000-of-00001.parquet": AIME24,
    "math-ai/aime25/test.jsonl": AIME25,
    "math-ai/amc23/test-00000-of-00001.parquet": AMC23,
    "HuggingFaceH4/MATH-500/test.jsonl": MATH500,
    "math-ai/minervamath/test.jsonl": MINERVA,
    "Hothan/OlympiadBench/OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet": OLYMPIAD,
    "openai/gsm8k/main/train-00000-of-00001.parquet": [{"question": "Not this one.", "answer": "#### 0"}],
    "openai/gsm8k/main/test-00000-of-00001.parquet": GSM8K,
    "openai/openai_humaneval/openai_humaneval/test-00000-of-00001.parquet": HUMANEVAL,
    "livecodebench/code_generation_lite/test.jsonl": LIVECODEBENCH[:2],
    **{f"livecodebench/code_generation_lite/test{n}.jsonl": LIVECODEBENCH[n:][:1] for n in (2, 3)},
    **{f"livecodebench/code_generation_lite/test{n}.jsonl": () for n in (4, 5)},
}


def make_mirror(folder: Path) -> Path:
    """Write all of it below ``folder``."""
    for name, rows in FILES.items():
        write_rows(folder / name, rows)
    for name, config in _CONFIGS.items():
        (folder / name / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n---\n")
    return folder


def write_rows(path: Path, rows: Rows) -> None:
    """A JSONL or Parquet file of these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
