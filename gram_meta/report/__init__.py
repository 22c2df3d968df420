"""Tables and figures from output folders.

Every test of a trainer writes an unrounded `results.json` into its output folder. This package collects them, rejects
runs that cannot share a table, and lists the runs that are missing.

    evidence  reading: results, logs of meta-training, collections of both in one file
    logs      reading: log.txt of a CoOp-style checkout
    runs      what each result measured, and how it differs from others of its trainer
    tables    rows, cells, differences, missing runs, conflicts; accuracy while training
    paper     the paper's numbers
    numbered  the paper's Tables 1 to 7
    text      terminal, Markdown, LaTeX, CSV, JSON
    figures   Figures 1 and 3 (matplotlib)
    html      the pages of `gram report --html` and `gram inspect --html`
"""

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
