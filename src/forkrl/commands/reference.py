"""How commands name a model: a folder or hub id, a run, or a step of a run. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from forkrl.errors import UserError
from forkrl.store.run_folder import CONFIG

BASE = "base"
_AT = re.compile(r"(?P<run>.+)@(?P<at>[^@/]*)")
_STEP = re.compile(r"step-(?:0|[1-9]\d*)")


class ModelReference(NamedTuple):
    """A model and its name in results. ``at``: "base" or "step-N" of the run; empty: its newest checkpoint."""

    name: str
    run: Path | None = None
    at: str = ""

    def default_folder(self, command: str) -> Path:
        """Output folder without ``--out``: inside the run, or below ``analyses/``."""
        if self.run is not None:
            return self.run / "analysis" / (f"{command}-{self.at}" if self.at else command)
        last = self.name.rstrip("/").removeprefix("embedded:").split("/")[-1]
        word = re.sub(r"[^\w.-]+", "-", last).strip("-.") or "model"
        return Path("analyses") / f"{word}-{command}"


def parse_reference(name: str) -> ModelReference:
    """Recognise RUN, RUN@step-N, RUN@base and RUN/checkpoints/step-N; any other name is a model."""
    if is_run(Path(name)):
        return ModelReference(name, Path(name))
    if (match := _AT.fullmatch(name)) and not Path(name).exists() and is_run(Path(match["run"])):
        if match["at"] != BASE and not _STEP.fullmatch(match["at"]):
            raise UserError(f"{name}: after @ comes step-N or base, as in {match['run']}@step-8 or {match['run']}@base")
        return ModelReference(name, Path(match["run"]), match["at"])
    for path in (Path(name), Path(name).resolve()):  # resolved for "." and links
        run = path.parent.parent
        if _STEP.fullmatch(path.name) and path.parent.name == "checkpoints" and is_run(run):
            return ModelReference(f"{run}@{path.name}", run, path.name)
    return ModelReference(name)


def is_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file()
