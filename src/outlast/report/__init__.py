"""Results as one self-contained HTML page."""

from outlast.report._page import render, write_report

__all__ = ["render", "write_report"]
