"""What files a checkpoint has: the list that is written last, and held against them before anything is read."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path, PurePosixPath

from forkrl.errors import UserError
from forkrl.store.atomic import fsync
from forkrl.store.checkpoint.files import write_json
from forkrl.store.checkpoint.folders import REPLACED, STEP_FOLDER

MANIFEST = "manifest.json"
OPTIMIZER_TENSORS = "trainer/optimizer.safetensors"
OPTIMIZER_GROUPS = "trainer/optimizer.json"
RANDOM_STATES = "trainer/rng.safetensors"
PROGRESS = "trainer/progress.json"
FORMAT = 1

_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_LOADABLE = {".safetensors", ".json", ".py"}  # what a loader might pick up unasked; anything else is a note


def write_manifest(folder: Path, step: int, *, weights_only: bool = False) -> None:
    """Put every file on the disk, and then the list of them."""
    files: dict[str, dict[str, int | str]] = {}
    for path in sorted(folder.rglob("*")):
        fsync(path)
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {"format": FORMAT, "step": step, "files": files} | ({"weights_only": True} if weights_only else {})
    write_json(folder / MANIFEST, manifest)
    fsync(folder / MANIFEST)
    fsync(folder)


def verify_checkpoint(path: Path) -> None:
    """Check every file against the manifest: present, no other, same size, same SHA-256; and no pickle anywhere."""
    try:
        present = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()}
        for name in sorted(present):
            if PurePosixPath(name).suffix in _PICKLES:
                raise UserError(
                    f"{path / name}: a pickle, which could run code; ForkRL loads only safetensors and JSON"
                )
        listed = _read_manifest(path)
        for name in sorted(present - listed.keys() - {MANIFEST}):
            if PurePosixPath(name).suffix in _LOADABLE:
                raise UserError(
                    f"{path / name}: not part of the checkpoint, its {MANIFEST} does not list it; remove it"
                )
        for name, (size, digest) in listed.items():
            _verify_file(path / name, size, digest)
    except OSError as error:
        raise UserError(f"{error.filename or path}: damaged checkpoint: cannot be read ({error.strerror})") from error


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of every file, by its path relative to the checkpoint."""
    file = path / MANIFEST
    if not file.is_file():
        raise UserError(f"{path}: no checkpoint of ForkRL, or not a whole one: it has no {MANIFEST}")
    try:
        manifest = json.loads(file.read_bytes())
        found, step, weights_only = manifest["format"], manifest["step"], bool(manifest.get("weights_only"))
        listed = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: damaged checkpoint: not a manifest ({type(error).__name__}: {error})") from error
    if found != FORMAT:
        raise UserError(f"{file}: checkpoint format {found!r}, this version of ForkRL reads {FORMAT}")
    if path.name.removeprefix(REPLACED) != f"step-{step}" and STEP_FOLDER.fullmatch(path.name):
        raise UserError(f"{file}: damaged checkpoint: it says step {step!r} in a folder named {path.name}")
    for name in listed:
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
            raise UserError(f"{file}: damaged checkpoint: it lists {name!r}, outside the checkpoint")
    training = set() if weights_only else {OPTIMIZER_TENSORS, OPTIMIZER_GROUPS, RANDOM_STATES, PROGRESS}
    for name in sorted(({"config.json"} | training) - listed.keys()):
        raise UserError(f"{file}: damaged checkpoint: it does not list {name}")
    return listed


def _verify_file(file: Path, size: int, digest: str) -> None:
    try:
        status = file.stat()
    except FileNotFoundError:
        raise UserError(f"{file}: damaged checkpoint: the file is missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{file}: damaged checkpoint: not a regular file")
    if status.st_size != size:
        raise UserError(f"{file}: damaged checkpoint: {status.st_size} bytes, the manifest says {size}")
    if (actual := _sha256(file)) != digest:
        raise UserError(f"{file}: damaged checkpoint: sha256 {actual[:12]}…, the manifest says {digest[:12]}…")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
