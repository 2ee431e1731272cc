"""Resolves model paths: local, inside the package, or a Hugging Face hub name. Imports no torch."""

from __future__ import annotations

import difflib
import json
import re
from importlib import resources
from pathlib import Path

from forkrl.errors import UserError, first_line

EMBEDDED_PREFIX = "embedded:"
ADAPTER_CONFIG = "adapter_config.json"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_FILE_SUFFIXES = {".jsonl", ".json", ".parquet", ".csv", ".txt", ".toml", ".safetensors", ".bin", ".pt", ".gguf"}


def model_location(path: str) -> str:
    """The folder or hub id for ``model.path``."""
    if path.startswith(EMBEDDED_PREFIX):
        assets = resources.files("forkrl") / "assets"
        folder = assets / path.removeprefix(EMBEDDED_PREFIX)
        if not folder.is_dir():
            names = sorted(entry.name for entry in assets.iterdir() if entry.is_dir())
            raise UserError(f"model.path = {path!r}: no such embedded model; there is {', '.join(names)}")
        return str(folder)
    _require_no_gguf(path)
    local = Path(path).expanduser()
    if local.is_dir():
        return str(local)
    require_hub_id(path, "model.path", "folder")
    return path


def adapter_base(location: str) -> tuple[str, str | None] | None:
    """Path and revision of the base model if ``location`` is a folder with an adapter alone."""
    file = Path(location) / ADAPTER_CONFIG
    if not file.is_file() or (Path(location) / "config.json").is_file():
        return None
    seen, path, revision = {file.parent.resolve()}, *_named_base(file)
    below = Path(path).expanduser()
    while (below / ADAPTER_CONFIG).is_file() and not (below / "config.json").is_file():
        if below.resolve() in seen:
            raise UserError(f"{file}: its base model is an adapter of itself; set base_model_name_or_path there")
        seen.add(below.resolve())
        below = Path(_named_base(below / ADAPTER_CONFIG)[0]).expanduser()
    return path, revision


def _named_base(file: Path) -> tuple[str, str | None]:
    """Path and revision that an adapter's settings name."""
    try:
        values = json.loads(file.read_bytes())
        path, revision = values["base_model_name_or_path"], values.get("revision")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as the settings of an adapter ({first_line(error)})") from error
    if not isinstance(path, str) or not path:
        raise UserError(
            f"{file}: does not name its base model; set base_model_name_or_path there to a folder or hub id"
        )
    try:
        model_location(path)
    except UserError as error:  # the checksums of a checkpoint do not allow changing the file
        raise UserError(f"{file}: its base model is not here ({error}); put it there, or a link to it") from error
    return path, revision


def _require_no_gguf(path: str) -> None:
    """Reject a GGUF file, or a folder of GGUF files without safetensors."""
    given = Path(path).expanduser()
    files = sorted(given.glob("*.gguf")) if given.is_dir() and not any(given.glob("*.safetensors")) else []
    if path.endswith(".gguf") or files:
        file = files[0] if files else given
        load = f"from_pretrained({str(file.parent)!r}, gguf_file={file.name!r}).save_pretrained(FOLDER)"
        raise UserError(
            f"model.path = {path!r} is in GGUF format; convert it with transformers first: AutoModelForCausalLM.{load} "
            f"and AutoTokenizer.{load}, then set model.path to FOLDER"
        )


def require_hub_id(name: str, key: str, kind: str) -> None:
    """Reject a hub name that looks like a local path (a ``kind``) or whose parent folder exists; lookups are slow."""
    path = Path(name).expanduser()
    if path.is_file():
        raise UserError(f"{key} = {name!r}: is a file, not a {kind}")
    if not _HUB_ID.fullmatch(name) or path.suffix in _FILE_SUFFIXES:
        raise UserError(f"{key} = {name!r}: no such {kind}{_similar(path)}")
    if "/" in name and path.parent.exists():
        raise UserError(
            f"{key} = {name!r}: no such {kind}{_similar(path)} (the folder {path.parent} exists, so this is not looked "
            f"up on the hub)"
        )
    if name.startswith("runs/"):  # default output folder of forkrl train
        raise UserError(f"{key} = {name!r}: no such {kind}, and there is no folder runs")


def _similar(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
