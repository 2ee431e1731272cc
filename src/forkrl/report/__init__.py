"""Numbers to figures, and to one self-contained HTML page."""

from forkrl.report.page import write_run_report

__all__ = ["write_run_report"]
