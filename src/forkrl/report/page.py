"""One self-contained HTML page about a run, written beside its data."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.colors import to_hex

from forkrl.config import TrainConfig, recipe_toml
from forkrl.errors import UserError
from forkrl.report import fork_view, summary
from forkrl.report.run_data import RunData, read_run
from forkrl.report.sections import figure_sections
from forkrl.report.visible_text import script_json, visible

# Magma: lightness falls evenly, and the order survives every kind of colour blindness. The page's own ground stands
# for 0, so each theme takes the part of the map that starts near its ground.
_LIGHT_MAP, _DARK_MAP = ("magma_r", 0.03, 0.80), ("magma", 0.16, 0.95)


def write_run_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run folder, whole or not at all, and return its path.

    Reads only config.toml, metrics.jsonl and rollouts/*.parquet. What is missing or damaged is said in the page.

    Raises:
        UserError: the folder is no run, or the page cannot be written.
    """
    run = read_run(Path(run_dir), fork_view.MAX_TRAIN_STEPS)
    path = Path(run_dir) / "report.html"
    _write_atomically(path, render_run_report(run))
    return path


def run_verdict(run_dir: Path) -> str:
    """The sentence that heads the report: accuracy before and after, with intervals, and what it took."""
    return summary.verdict(read_run(Path(run_dir), max_train_files=0))


def render_run_report(run: RunData) -> str:
    """The page as text."""
    script = Markup(_template("report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    view = fork_view.fork_view(run)
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible_value,
    )
    return environment.get_template("report.html").render(
        name=run.name,
        verdict=summary.verdict(run),
        status=summary.status(run),
        notes=run.notes,
        cards=summary.cards(run),
        figures=figure_sections(run),
        has_views=bool(view["views"]),
        fork_note=_fork_note(run),
        data=Markup(script_json(view)),
        settings=_settings(run),
        provenance=sorted((key, _plain(value)) for key, value in run.provenance.items() if key != "command"),
        command=str(run.provenance.get("command", "")),
        reproduce=reproducing_command(run.settings),
        style=Markup(_template("report.css") + token_colors(fork_view.COLOR_BINS)),
        script=script,
        script_hash=digest,
    )


def reproducing_command(settings: dict[str, Any]) -> str:
    """A command line that resolves to the same recipe: every setting that differs from the defaults, as an override."""
    defaults = recipe_toml(TrainConfig())
    overrides = []
    for section, table in settings.items():
        if not isinstance(table, dict):
            overrides += [] if defaults.get(section) == table else [f"{section}={_plain(table)}"]
            continue
        known = defaults.get(section, {})
        overrides += [f"{section}.{key}={_plain(value)}" for key, value in table.items() if known.get(key) != value]
    return " ".join(["forkrl train", *(shlex.quote(visible(override)) for override in overrides)])


def token_colors(bins: int) -> str:
    """CSS for the classes ``.e0`` … of the entropy bins: ground and readable text, in both themes."""
    rules = []
    for index in range(bins):
        light, dark = (_map_color(index / (bins - 1), *part) for part in (_LIGHT_MAP, _DARK_MAP))
        rules.append(
            f".e{index}{{background:light-dark({light},{dark});color:light-dark({_readable_on(light)},{_readable_on(dark)})}}"
        )
    return "\n".join(rules)


def _map_color(fraction: float, name: str, start: float, stop: float) -> str:
    return to_hex(matplotlib.colormaps[name](start + fraction * (stop - start)))


def _readable_on(color: str) -> str:
    """Black or white, whichever has the higher contrast (WCAG relative luminance) on ``color``."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"


def _fork_note(run: RunData) -> str:
    rule = run.setting("selection.rule") or "not recorded"
    if rule == "all":
        return (
            "This run trained on every token, so none is outlined; "
            "the keys visit the fifth of the tokens shown with the highest entropy."
        )
    if rule in ("top_entropy", "threshold"):
        return "Outlined tokens are those the run's rule selects to carry gradient; the keys visit them one by one."
    return (
        f"Outlined tokens are those the run's rule ({rule}) selects to carry gradient; "
        "the keys visit the fifth of the tokens shown with the highest entropy."
    )


def _settings(run: RunData) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """Sections of (key, value, differs from the default), settings outside any section first."""
    defaults = recipe_toml(TrainConfig())
    loose = [
        (key, _plain(value), defaults.get(key) != value)
        for key, value in run.settings.items()
        if not isinstance(value, dict)
    ]
    tables = [
        (section, [(key, _plain(value), defaults.get(section, {}).get(key) != value) for key, value in table.items()])
        for section, table in run.settings.items()
        if isinstance(table, dict)
    ]
    return ([("run", loose)] if loose else []) + [table for table in tables if table[1]]


def _plain(value: Any) -> str:
    """The value as TOML and JSON both write it; text bare."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _visible_value(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _template(name: str) -> str:
    return files("forkrl.report").joinpath("templates", name).read_text(encoding="utf-8")


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)  # os.replace: the old page or the new one, never half
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free space or mend permissions, then forkrl report again"
        ) from None
