"""Plots and self-contained HTML pages.

Names are imported on first use: progress is shown from the start of a training run, which needs no pandas and
matplotlib until its report.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forkrl.report.colors import coloured_response, entropy_legend
    from forkrl.report.fork_view import Branch, ForkView, Frame, ShownPrompt, ShownResponse, View
    from forkrl.report.page import Card, Page, Section, render_page, write_page
    from forkrl.report.run_page import run_headline, write_run_report

__all__ = [
    "Branch",
    "Card",
    "ForkView",
    "Frame",
    "Page",
    "Section",
    "ShownPrompt",
    "ShownResponse",
    "View",
    "coloured_response",
    "entropy_legend",
    "render_page",
    "run_headline",
    "write_page",
    "write_run_report",
]

_HOMES = {
    "coloured_response": "colors",
    "entropy_legend": "colors",
    "Card": "page",
    "Page": "page",
    "Section": "page",
    "render_page": "page",
    "write_page": "page",
    "run_headline": "run_page",
    "write_run_report": "run_page",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'fork_view')}"), name)
    globals()[name] = value
    return value
