"""Numbers to figures, and to one self-contained HTML page."""

from forkrl.report.fork_view import Branch, ForkView, Frame, ShownPrompt, ShownResponse, View
from forkrl.report.page import Card, Page, render_page, write_page
from forkrl.report.run_page import run_verdict, write_run_report
from forkrl.report.sections import FigureSection, figure_section
from forkrl.report.terminal import coloured_response, entropy_legend

__all__ = [
    "Branch",
    "Card",
    "FigureSection",
    "ForkView",
    "Frame",
    "Page",
    "ShownPrompt",
    "ShownResponse",
    "View",
    "coloured_response",
    "entropy_legend",
    "figure_section",
    "render_page",
    "run_verdict",
    "write_page",
    "write_run_report",
]
