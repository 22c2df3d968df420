"""Tables, figures and pages from output folders, in which every test of a trainer writes an unrounded results.json."""

from gram_meta.report.against import compare, render_comparisons
from gram_meta.report.evidence import Evidence, gather, write_collection
from gram_meta.report.numbered import NUMBERS, all_tables, paper_tables
from gram_meta.report.runs import Run, read_runs, runs_of
from gram_meta.report.tables import Report, build_curve, build_reports
from gram_meta.report.text import render, render_all, render_curve
from gram_meta.report.tidy import tidy_rows, write_tidy

__all__ = [
    "NUMBERS",
    "Evidence",
    "Report",
    "Run",
    "all_tables",
    "build_curve",
    "build_reports",
    "compare",
    "gather",
    "paper_tables",
    "read_runs",
    "render",
    "render_all",
    "render_comparisons",
    "render_curve",
    "runs_of",
    "tidy_rows",
    "write_collection",
    "write_tidy",
]
