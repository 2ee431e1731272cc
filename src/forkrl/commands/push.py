"""``forkrl push``: a run's checkpoint with card and report, on the Hugging Face hub or in a folder."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

from forkrl.commands.other_options import PushOptions
from forkrl.commands.reference import BASE, ModelReference, parse_reference
from forkrl.commands.subject import why_no_weights
from forkrl.errors import UserError, first_line, write_line
from forkrl.model.adapter import BASE_MODEL
from forkrl.model.locations import ADAPTER_CONFIG
from forkrl.report.page import render_page
from forkrl.report.plots import standalone_svg
from forkrl.report.run_card import model_card, published_base, published_run
from forkrl.report.run_data import read_run
from forkrl.report.run_page import MAX_TRAIN_STEPS, run_page
from forkrl.report.terminal import aligned
from forkrl.store.atomic import explained_write_errors, temporary_beside
from forkrl.store.checkpoint import checkpoint_of_step, latest_checkpoint, model_files

FOLDER, CURVE = "hub", "learning.svg"
_OWN = re.compile(r"(merged/)?(model|adapter)[\w.-]*\.(safetensors|json)|merged/.*|base_model\.json|config\.json")
"""Files of an earlier push that make another model of this one."""
Files = dict[str, Path | bytes]
"""Content by name in the repository."""


def run_push(options: PushOptions) -> int:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", options.name, re.ASCII):
        raise UserError(f"{options.name}: is not the name of a repository; write USER/NAME, as in me/my-model")
    reference = parse_reference(options.run)
    if reference.run is None:
        raise UserError(f"{options.run}: is not a run; name the folder given to forkrl train --out, or RUN@step-N")
    checkpoint = _checkpoint(reference, reference.run)
    files = published_files(reference.run, checkpoint, options.name)
    if options.dry_run:
        folder = _write(reference.run / FOLDER, files)
        sizes = [[name, f"{(folder / name).stat().st_size:,}"] for name in sorted(files)]
        listed = "\n".join(aligned([["file", "bytes"], *sizes], numbers=True))
        write_line(sys.stdout, f"{listed}\n{folder}: what would be uploaded to {options.name}; drop --dry-run to do so")
    else:
        write_line(sys.stdout, f"uploaded {checkpoint.name}: {_upload(options, files, checkpoint.name)}")
    return 0


def _checkpoint(reference: ModelReference, run: Path) -> Path:
    if reference.at == BASE:
        raise UserError(f"{reference.name}: is the model before training; push a checkpoint, as in {run}@step-8")
    if reference.at:
        return checkpoint_of_step(run / "checkpoints", int(reference.at.removeprefix("step-")))
    if (newest := latest_checkpoint(run / "checkpoints")) is None:
        raise UserError(f"{why_no_weights(run)}, so there is nothing to upload")
    return newest


def published_files(folder: Path, checkpoint: Path, name: str) -> Files:
    """Everything that is uploaded for a checkpoint: its model and tokenizer, card, learning curve and report.

    Raises UserError if the run cannot be read, or if its settings hold a credential.
    """
    run = read_run(folder, MAX_TRAIN_STEPS)
    base = published_base(str(run.setting("model.path")), run.provenance.get("model_source"))
    run = published_run(run)
    files: Files = {file: checkpoint / file for file in model_files(checkpoint)}
    for file, key in ((ADAPTER_CONFIG, "base_model_name_or_path"), (BASE_MODEL, "path")):
        if file in files:
            values = json.loads((checkpoint / file).read_bytes())
            files[file] = json.dumps(values | {key: base}, indent=2, sort_keys=True).encode() + b"\n"
    page = run_page(run)
    files["report.html"] = render_page(page).encode()
    if (figure := page.sections[0].figure) is not None:
        files[CURVE] = standalone_svg(figure).encode()
    step = int(checkpoint.name.rpartition("-")[2])
    files["README.md"] = model_card(run, name, base, step, CURVE if CURVE in files else "").encode()
    return files


def _write(folder: Path, files: Files) -> Path:
    """Write the files; replaces what an earlier call wrote."""
    work = temporary_beside(folder)
    with explained_write_errors(folder):
        shutil.rmtree(work, ignore_errors=True)
        for name, content in files.items():
            path = work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                shutil.copyfile(content, path)
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    return folder


def _upload(options: PushOptions, files: Files, what: str) -> str:
    """Upload the files in one commit and return its address."""
    if get_token() is None:
        raise UserError(f"{options.name}: no token of the Hugging Face hub; run hf auth login, or export HF_TOKEN")
    api = HfApi(library_name="forkrl")
    with _explained(options.name):
        api.create_repo(options.name, private=options.private, exist_ok=True)
        is_private = api.model_info(options.name).private
    if options.private and not is_private:
        raise UserError(f"--private: {options.name} exists and is public; drop --private, or choose another name")
    with _explained(options.name):
        if options.revision is not None:
            api.create_branch(options.name, branch=options.revision, exist_ok=True)
        there = api.model_info(options.name, revision=options.revision).siblings or []
        left_over = [each.rfilename for each in there if _OWN.fullmatch(each.rfilename) and each.rfilename not in files]
        commit = api.create_commit(
            options.name,
            [
                *(CommitOperationAdd(name, content) for name, content in files.items()),
                *(CommitOperationDelete(name) for name in left_over),
            ],
            commit_message=f"Upload {what} with ForkRL",
            revision=options.revision,
        )
    return commit.commit_url


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's library changes its HTTP client, and with it the errors
        raise UserError(
            f"{name}: could not be uploaded ({first_line(error)}); check the network, the token's rights and the name, "
            "and repeat the command"
        ) from error
