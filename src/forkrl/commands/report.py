"""``forkrl report DIR``: rebuild the page of any output folder, or its plots as files, from its data."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path

from forkrl.commands.other_options import ReportOptions
from forkrl.commands.runs import describe_run
from forkrl.errors import UserError
from forkrl.report.colors import response_svg, top_entropy
from forkrl.report.page import Page, write_page
from forkrl.report.plots import standalone_svg
from forkrl.report.run_page import run_folder_page, run_headline
from forkrl.store.atomic import explained_write_errors, write_text
from forkrl.store.results import REPORT, RESULTS, Results, read_json, read_results
from forkrl.store.run_folder import CONFIG

_PAGES = {
    "analyze": "forkrl.commands.analyze:make_page",
    "branch": "forkrl.commands.branch:make_page",
    "compare": "forkrl.report.compare_page:compare_page",
    "decode-temps": "forkrl.commands.decode_temps:make_page",
    "drift": "forkrl.commands.drift:make_page",
    "eval": "forkrl.commands.evaluate:make_page",
    "study": "forkrl.report.study_page:study_page",
}
"""By command name in the schema: the function that makes a page of ``Results``."""


FIGURES = "figures"
_REFRESH_S = 20.0


def run_report(options: ReportOptions) -> int:
    if options.watch and not (options.folder / CONFIG).is_file():
        raise UserError(f"--watch: {options.folder} is not a run folder; drop --watch")
    if options.watch and options.figures:
        raise UserError("--figures: cannot be combined with --watch; drop one of them")
    page = folder_page(options.folder)
    print(f"report: {write_page(options.folder / REPORT, page)}", flush=True)
    if options.figures:
        print(f"figures: {write_figures(options.folder / FIGURES, page)}", flush=True)
    if options.watch:
        _watch(options.folder)
    return 0


def _watch(folder: Path) -> None:
    """Write the report of a run again whenever its metrics have changed, until the run has ended."""
    metrics = folder / "metrics.jsonl"
    size, running = metrics.stat().st_size, True
    while running:
        running = describe_run(folder).status == "running"  # before reading, so that the last lines are not missed
        if (now := metrics.stat().st_size) != size or not running:
            size = now
            write_report(folder)
            print(run_headline(folder), flush=True)
        if running:
            time.sleep(_REFRESH_S)


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into an output folder and return its path."""
    return write_page(folder / REPORT, folder_page(folder))


def write_figures(folder: Path, page: Page) -> Path:
    """Write every plot of a page as ``NAME.svg``, and its longest correct response, coloured, as ``response.svg``."""
    with explained_write_errors(folder):
        folder.mkdir(exist_ok=True)
    for section in page.sections:
        if section.figure is not None:
            write_text(folder / f"{section.name}.svg", standalone_svg(section.figure))
    views = page.forks.views if page.forks is not None else ()
    prompts = [prompt for view in views for frame in view.frames for prompt in frame.prompts]
    responses = [each for prompt in prompts for each in prompt.responses]
    if responses:
        shown = max(responses, key=lambda each: (each.score == 1, each.finished is True, len(each.tokens)))
        entropy = shown.entropy[-1]
        write_text(folder / "response.svg", response_svg(shown.tokens, entropy, top_entropy(entropy)))
    return folder


def folder_page(folder: Path) -> Page:
    """The page of an output folder.

    Raises:
        UserError: there is no finished output of ForkRL in it, or of another version.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a run, or the folder given to --out")
    path = folder / (CONFIG if (folder / CONFIG).is_file() else RESULTS)
    if not path.is_file():
        raise UserError(
            f"{folder}: no finished output of forkrl (neither {CONFIG} nor {RESULTS}); name a run, or the folder given "
            "to --out; the same command finishes an interrupted one"
        )
    try:
        if path.name == CONFIG:
            return run_folder_page(folder)
        schema = str(read_json(path).get("schema"))
        command = schema.removeprefix("forkrl-").partition("/")[0]
        if command not in _PAGES:
            raise UserError(f"{path}: has the unknown schema {schema!r}; run the command that wrote it again")
        module, _, function = _PAGES[command].partition(":")
        make_page: Callable[[Results], Page] = getattr(importlib.import_module(module), function)
        return make_page(read_results(folder))
    except KeyError as error:
        raise UserError(f"{path}: has no {error}: another version of ForkRL wrote it; run its command again") from error
