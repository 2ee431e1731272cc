"""Numbers to figures, and to one self-contained HTML page."""

from forkrl.report.page import run_verdict, write_run_report

__all__ = ["run_verdict", "write_run_report"]
