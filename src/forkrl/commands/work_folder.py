"""Shared by all commands: a folder that is resumable part by part, and the final output.

settings.json       every setting that changes the numbers; a call with other settings is rejected
…                   parts, each written all at once when it is done
results.json        what was found (``forkrl.store.results``)
tables/*.csv
report.html
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forkrl.errors import UserError, write_line
from forkrl.model.locations import adapter_base, model_location
from forkrl.store.atomic import explained_write_errors, temporary_beside, write_json
from forkrl.store.run_folder import LOCK, clear_folder, lock_folder

if TYPE_CHECKING:
    from forkrl.commands.subject import Subject
    from forkrl.report.page import Page

SETTINGS = "settings.json"
_ENGINE = {"engine": "torch"}  # not in folders from before there was another
# Weights, architecture, and every possible tokenizer file.
_MODEL_FILES = (
    "*.safetensors", "config.json", "*token*.json", "vocab.json", "merges.txt", "*.model", "*.tiktoken",
    "adapter_config.json", "base_model.json",
)  # fmt: skip


@contextmanager
def open_work_folder(path: Path, settings: Mapping[str, Any]) -> Iterator[Path]:
    """Start the work in a new or empty folder, or resume it if its settings are the same; locked while open.

    ``settings`` are JSON values and include ``schema``. A new folder in which an error left no work is removed.
    """
    with explained_write_errors(path):
        existed = path.exists()
        _require_same_settings(path, dict(settings))
        path.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(path, "at work")
        try:
            _require_same_settings(path, dict(settings))  # again: another process may have been faster
            if not (path / SETTINGS).exists():
                write_json(path / SETTINGS, settings)
            with _removed_if_rejected(path, whole=not existed):
                yield path
        except KeyboardInterrupt:
            print(f"forkrl: what was finished is kept in {path}; the same command resumes", file=sys.stderr)
            raise
        finally:
            os.close(lock)


@contextmanager
def _removed_if_rejected(path: Path, *, whole: bool) -> Iterator[None]:
    """On a ``UserError``, empty a folder without finished work; ``whole``: remove it."""
    try:
        yield
    except UserError:
        files = [file for file in path.rglob("*") if file.is_file() and file.name not in (SETTINGS, LOCK)]
        # Evaluations write questions before the first response, and create their other files empty.
        if not any(file.stat().st_size and file.parent.name != "questions" for file in files):
            clear_folder(path)
            if whole:
                path.rmdir()
        raise


def require_usable(path: Path) -> None:
    """Reject a folder that holds anything but a command's work."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; name another folder with --out")
    if not path.exists() or stored_settings(path):
        return
    ours = {LOCK, temporary_beside(Path(SETTINGS)).name}
    if others := sorted(entry.name for entry in path.iterdir() if entry.name not in ours):
        raise UserError(
            f"{path}: is not empty (it holds {others[0]}) and has no {SETTINGS}; name another folder with --out"
        )


def stored_settings(folder: Path) -> dict[str, Any]:
    """The settings of the work in a folder; empty if none was started."""
    try:
        stored = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / SETTINGS}: cannot be read ({error}); name another folder with --out") from error
    if not isinstance(stored, dict) or not stored:
        raise UserError(f"{folder / SETTINGS}: is not a JSON object; name another folder with --out")
    return stored


def weights_fingerprint(path: str) -> str:
    """Hash of all files of a local model, and of the model below an adapter; empty for a hub model, which its name and
    revision identify.
    """
    from forkrl.report.progress import progress  # imports rich

    folder = Path(model_location(path))
    if not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    files = sorted({file for pattern in _MODEL_FILES for file in folder.glob(pattern)})
    for file in progress(files, f"reading {folder.name}"):
        with file.open("rb") as stream:
            digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    if (base := adapter_base(str(folder))) is not None:
        digest.update(f"base {weights_fingerprint(base[0])}\n".encode())
    return digest.hexdigest()[:16]


def model_settings(schema: str, subject: Subject) -> dict[str, Any]:
    """The settings that name the command and its model."""
    model = subject.config.model
    return {
        "schema": schema,
        "model": subject.name,
        "checkpoint": subject.checkpoint,
        "weights": model.path,
        "revision": model.revision,
        "fingerprint": weights_fingerprint(model.path),
        "precision": model.precision,
        "temperature": subject.config.eval.temperature,
    }


def say_kept(kept: int, total: int, unit: str, folder: Path) -> None:
    if 0 < kept < total:
        print(f"forkrl: {kept} of {total} {unit} are in {folder} already", file=sys.stderr, flush=True)


def present(folder: Path, page: Page) -> int:
    """Write ``report.html``, print its text form, and return the exit code."""
    from forkrl.report.page import write_page
    from forkrl.report.terminal import describe_page
    from forkrl.store.results import REPORT

    path = write_page(folder / REPORT, page)
    write_line(sys.stdout, f"{describe_page(page)}\nreport: {path}")
    return 0


def _require_same_settings(path: Path, settings: dict[str, Any]) -> None:
    require_usable(path)
    stored = stored_settings(path)
    if not stored:
        return
    asked = _ENGINE | json.loads(json.dumps(settings))
    stored = _ENGINE | stored
    if changed := sorted(key for key in stored.keys() | asked.keys() if stored.get(key) != asked.get(key)):
        key = changed[0]
        raise UserError(
            f"{path}: was created with different settings ({key} = {_short(stored.get(key))}, now "
            f"{_short(asked.get(key))}); name another folder with --out, or remove this one"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
