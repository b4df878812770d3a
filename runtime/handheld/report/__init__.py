"""Run records as one page of HTML that needs nothing else."""

from handheld.report.page import render

__all__ = ["render"]
