"""Mutation testing of the code that decides gradients, statistics and checkpoints, with mutmut.

python tools/mutants.py [AREA ...]    every mutant of method and stats, a fixed sample of 150 of head, update and store

Prints the counts of each area and the diff of every survivor; results are kept in mutants/, so a second call continues.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

AREAS: dict[str, tuple[str, int | None]] = {
    "method": ("forkrl.method.", None),
    "stats": ("forkrl.stats.", None),
    "head": ("forkrl.head.", 150),
    "update": ("forkrl.training.update.", 150),
    "store": ("forkrl.store.", 150),
}
OUTCOMES = {0: "survived", 1: "killed", 3: "killed", 33: "no test", 24: "timeout", 36: "timeout", 37: "caught by mypy"}
MUTMUT = (sys.executable, "-m", "mutmut")


def results() -> dict[str, int | None]:
    """The exit code of every mutant's tests; None where they have not run."""
    found: dict[str, int | None] = {}
    for path in sorted(Path("mutants").rglob("*.meta")):
        found |= json.loads(path.read_text())["exit_code_by_key"]
    return found


def chosen(area: str, names: list[str]) -> list[str]:
    prefix, sample = AREAS[area]
    names = sorted(name for name in names if name.startswith(prefix))
    if sample is None or len(names) <= sample:
        return names
    return sorted(random.Random(0).sample(names, sample))


def _outcome(code: int | None) -> str:
    return "not run" if code is None else OUTCOMES.get(code, "crashed")


def main(areas: list[str]) -> None:
    if unknown := set(areas) - AREAS.keys():
        sys.exit(f"no area {', '.join(sorted(unknown))}; choose from {', '.join(AREAS)}")
    if not results():
        subprocess.run([*MUTMUT, "run", "--max-children", "1", "none"], check=False)  # generates, then finds no match
    names = {area: chosen(area, list(results())) for area in areas}
    subprocess.run([*MUTMUT, "run", *(name for group in names.values() for name in group)], check=False)
    codes = results()
    for area, group in names.items():
        outcomes = Counter(_outcome(codes[name]) for name in group).most_common()
        print(f"{area}: {len(group)} mutants;", ", ".join(f"{count} {outcome}" for outcome, count in outcomes))
    for name in (name for group in names.values() for name in group if codes[name] in (0, 33)):
        print(f"\n{name}", subprocess.run([*MUTMUT, "show", name], capture_output=True, text=True).stdout, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:] or list(AREAS))
