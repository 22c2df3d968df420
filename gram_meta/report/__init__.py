"""Tables, figures and pages from output folders, in which every test of a trainer writes an unrounded results.json."""

from gram_meta.report.evidence import Evidence, gather, write_collection
from gram_meta.report.numbered import NUMBERS, all_tables, paper_tables
from gram_meta.report.runs import Run, read_runs, runs_of
from gram_meta.report.tables import Report, build_curve, build_reports
from gram_meta.report.text import render, render_all, render_curve

__all__ = [
    "NUMBERS",
    "Evidence",
    "Report",
    "Run",
    "all_tables",
    "build_curve",
    "build_reports",
    "gather",
    "paper_tables",
    "read_runs",
    "render",
    "render_all",
    "render_curve",
    "runs_of",
    "write_collection",
]
