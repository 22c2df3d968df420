"""`gram report`: the paper's tables from output folders."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gram_meta.errors import GramError

if TYPE_CHECKING:
    from gram_meta.report import Evidence, Report, Run

HELP = """Print the paper's tables from the results.json files, and the logs of a checkout's runs, in and below folders:
mean over seeds with 95 % intervals, differences to a reference trainer paired by seed, and the paper's numbers where
dataset, backbone and shots are the paper's. Without --table: every table that there are runs of.

  gram report output
  gram report output --table 1 --format latex
  gram report --collect results.json output      one compact file, which replaces the folders:
  gram report results.json --table 6
  gram report my_method --against output         one's own method beside others: paired differences and a test"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    folders = "folder with results.json files or CoOp's log.txt in or below it, or a file of --collect"
    add("folders", nargs="+", metavar="OUTPUT_DIR", help=folders)
    tables = "a table of the paper, with all its rows; may be repeated (default: those that there are runs of)"
    add("--table", action="append", default=[], choices=(*"1234567", "all"), help=tables)
    formats = ("table", "markdown", "csv", "latex", "json")
    add("--format", choices=formats, default="table", help="default: table; latex needs booktabs")
    collect = "write everything that reports need into one file, and print no table"
    add("--collect", metavar="FILE.json", help=collect)
    tidy = "write every run and metric as a row of a tidy table, for pandas or R, and print no table"
    add("--tidy", metavar="FILE", help=tidy + " (.csv or .parquet)")
    against = "folder or file of other runs: print differences to them, paired by dataset and seed; may be repeated"
    add("--against", action="append", default=[], metavar="RUNS", help=against)
    figures = "write Figures 1(a), 1(b), 3(a), 3(b) as PNG, and their numbers as CSV, if the runs logged them"
    add("--figures", metavar="DIR", help=figures)
    add("--html", metavar="FILE.html", help="write one page with tables, figures and what every run was made with")
    add("--datasets", metavar="A,B", help="only these datasets, by the names they are registered under")
    add("--without", metavar="A,B", help="not these datasets, such as the one that was tuned on")
    add("--reference", metavar="TRAINER", help="trainer that is subtracted in differences (default: CoOp)")
    add("--metric", choices=("accuracy", "error_rate", "macro_f1"), default="accuracy")
    add("--split", choices=("test", "val"), default="test")
    apart = "keep runs with different values of this setting apart"
    add("--by", action="append", default=[], metavar="KEY", help=apart)
    add("--curve", action="store_true", help="print accuracy after 0, 1, 5, ... steps, if the runs logged it")
    add("--digits", type=int, default=1, help="decimals in the table (csv and json are unrounded)")


def run(args: argparse.Namespace) -> int:
    """Print the tables, or write the files that the options name."""
    from gram_meta import report

    evidence = _gather(args.folders)
    if args.collect:
        report.write_collection(evidence, args.collect)
        _say(f"{args.collect}: {len(evidence.results)} results, {len(evidence.metas)} meta-trainings")
    has_runs = evidence.results or args.tidy or args.against
    groups = [_runs(args, evidence) if has_runs else [], _runs(args, _gather(args.against)) if args.against else []]
    runs, others = _chosen(groups, args.datasets, args.without)
    if args.tidy:
        _say(f"{args.tidy}: {report.write_tidy(runs, args.tidy)} rows of {len(runs)} runs")
    if args.figures:
        _write_figures(args.figures, runs, evidence)
    if args.html:
        _write_page(args, runs, evidence)
    if args.against:
        print(report.render_comparisons(report.compare(runs, others), args.format, args.digits))
    elif args.collect or args.tidy or args.figures or args.html:
        return 0
    elif args.curve:
        print(report.render_curve(*report.build_curve(runs), args.format, args.digits))
    else:
        print(report.render_all(_tables(args, runs), args.format, args.digits))
    return 0


def _gather(folders: Sequence[str]) -> Evidence:
    from gram_meta import report

    evidence = report.gather(folders)
    for path in evidence.unfinished[:10]:
        _say(f"left out: {path}, the log of a run that has not finished")
    if len(evidence.unfinished) > 10:
        _say(f"left out: {len(evidence.unfinished) - 10} more logs of runs that have not finished")
    return evidence


def _runs(args: argparse.Namespace, evidence: Evidence) -> list[Run]:
    from gram_meta import report

    return report.runs_of(evidence, args.metric, args.by, args.split)


def _write_figures(folder: str, runs: Sequence[Run], evidence: Evidence) -> None:
    from gram_meta.report.figures import draw, write_figures

    drawings, lacking = draw(runs, evidence.metas)
    for path in write_figures(drawings, folder):
        _say(f"{path}")
    for line in lacking:
        _say(f"left out: {line}")
    if not drawings:
        raise GramError("--figures: expected runs that logged what a figure shows, found none")


def _write_page(args: argparse.Namespace, runs: Sequence[Run], evidence: Evidence) -> None:
    from gram_meta.files import atomic_write
    from gram_meta.report.figures import draw
    from gram_meta.report.html.page import page

    try:
        drawings, not_drawn = draw(runs, evidence.metas)
    except GramError as error:  # no matplotlib: printed here, and shown on the page
        drawings, not_drawn = [], [str(error)]
        _say(f"left out: {error}")
    text = page(_tables(args, runs), drawings, not_drawn, runs, evidence, args.digits)
    with atomic_write(args.html, "w") as file:
        file.write(text)
    _say(f"{args.html}: {len(runs)} runs, {len(drawings)} figures")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _tables(args: argparse.Namespace, runs: Sequence[Run]) -> list[Report]:
    from gram_meta import report

    if args.table:
        numbers = report.NUMBERS if "all" in args.table else sorted({int(number) for number in args.table})
        tables = report.paper_tables(runs, numbers, args.reference)
        absent = [str(number) for number in numbers if number not in {table.number for table in tables}]
        if absent:
            _say(f"no runs of Table {', '.join(absent)}")
        return tables
    if args.by:  # the paper has no such rows
        return report.build_reports(runs, args.reference)
    return report.all_tables(runs, args.reference)


def _chosen(groups: Sequence[Sequence[Run]], only: str | None, without: str | None) -> list[list[Run]]:
    """Return the runs of each group that --datasets and --without leave."""
    known = {run.dataset for runs in groups for run in runs}
    for option, names in (("--datasets", only), ("--without", without)):
        for name in (names or "").split(","):
            if name and name not in known:
                raise GramError(f"{option} {name}: expected one of {', '.join(sorted(known))}, found no such runs")
    wanted = (set(only.split(",")) if only else known) - set((without or "").split(","))
    kept = [[run for run in runs if run.dataset in wanted] for runs in groups]
    if any(runs and not left for runs, left in zip(groups, kept, strict=True)):
        raise GramError("expected runs on other datasets than those left out, found none")
    return kept
