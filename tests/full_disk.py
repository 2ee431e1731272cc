"""Save onto a disk that fills up at every possible page and file, for real: a tmpfs that grows step by step.

``unshare --mount python -m tests.full_disk FOLDER`` mounts it where nobody else sees it, and prints
what happened as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from forkrl.errors import UserError
from forkrl.store.checkpoint import latest_checkpoint
from forkrl.store.run_folder import RunFolder
from tests.tiny_state import TinyState, tiny_state

_PAGE = os.sysconf("SC_PAGE_SIZE")


def mount(folder: Path, options: str) -> None:
    """Mount a tmpfs, or change the limits of the one that is there (``remount,...``)."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def listing(folder: Path) -> list[str]:
    """Every file and folder below ``folder``."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def grow_until_saved(disk: Path, state: TinyState, step: int, unit: str) -> dict[str, Any]:
    """Give the disk one page (or one file) more after every refused save."""
    attempts: list[dict[str, Any]] = []
    before = listing(disk)
    used = os.statvfs(disk)
    for room in range(500):
        pages, files = used.f_blocks - used.f_bfree, used.f_files - used.f_ffree
        mount(disk, f"remount,size={(pages + room) * _PAGE}" if unit == "page" else f"remount,nr_inodes={files + room}")
        message = ""
        try:
            state.save(disk / "checkpoints", step)
        except UserError as error:
            message = str(error)
        found = latest_checkpoint(disk / "checkpoints")
        attempts.append({"message": message, "found": found and found.name, "unchanged": listing(disk) == before})
        if not message:
            break
    mount(disk, "remount,size=64m,nr_inodes=10000")
    return {"attempts": attempts, "left": listing(disk / "checkpoints")}


def fill(disk: Path) -> None:
    """Leave no page free."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * _PAGE):
                pass
        except OSError:
            return


def run_folder_on_a_full_disk(disk: Path) -> dict[str, Any]:
    """What metrics, rollouts and a new run say and leave when the disk is full."""
    messages: dict[str, str] = {}
    with RunFolder.create(disk / "run", {"seed": 1}, {}) as run:
        run.append_metrics({"step": 0, "reward/mean": 0.5})
        fill(disk)
        before = listing(disk)
        logged = 0
        try:
            while True:  # the last page of the log has room for some lines
                run.append_metrics({"step": logged, "note": "x" * 100})
                logged += 1
        except UserError as error:
            messages["metrics"] = str(error)
        try:
            run.write_rollouts("train-000001", [])
        except UserError as error:
            messages["rollouts"] = str(error)
        *lines, torn = (disk / "run" / "metrics.jsonl").read_text().split("\n")
    try:
        RunFolder.create(disk / "another", {"seed": 1}, {})
    except UserError as error:
        messages["create"] = str(error)
    log = {"logged": logged, "lines": len(lines) - 1, "torn": torn}
    return {"messages": messages, **log, "new_files": sorted({*listing(disk)} - {*before})}


def main(disk: Path) -> None:
    mount(disk, "size=64m,nr_inodes=10000")
    old, new = tiny_state(seed=0), tiny_state(seed=1)
    old.train(1)
    new.train(2)
    old.save(disk / "checkpoints", 5)
    report = {
        "page": grow_until_saved(disk, new, 10, "page"),
        "file": grow_until_saved(disk, new, 15, "file"),
        "run_folder": run_folder_on_a_full_disk(disk),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
