"""Results as one self-contained HTML page; `page.py` says what stands where."""

from stages.report.page import report

__all__ = ["report"]
