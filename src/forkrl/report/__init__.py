"""Plots and self-contained HTML pages."""

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
