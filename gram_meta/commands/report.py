"""`gram report`: tables from output folders."""

from __future__ import annotations

import argparse

HELP = """Tables from output folders: base, new and their harmonic mean, with 95 % intervals over seeds, and the
differences to a reference trainer, paired by seed.

Collects every results.json in and below the folders. What is missing is shown as missing; two runs of the same thing,
or runs whose settings contradict each other, are refused."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "folders", nargs="+", metavar="OUTPUT_DIR", help="folder with results.json files in or below it"
    )
    parser.add_argument(
        "--format",
        choices=("table", "markdown", "csv", "latex", "json"),
        default="table",
        help="default: table",
    )
    parser.add_argument(
        "--reference", metavar="TRAINER", help="differences are taken to this one (default: CoOp)"
    )
    parser.add_argument("--metric", choices=("accuracy", "error_rate", "macro_f1"), default="accuracy")
    parser.add_argument("--split", choices=("test", "val"), default="test")
    parser.add_argument(
        "--by",
        action="append",
        default=[],
        metavar="KEY",
        help="keep runs with different values of this setting apart",
    )
    parser.add_argument(
        "--curve", action="store_true", help="accuracy after 0, 1, 5, ... steps, where runs logged it"
    )
    parser.add_argument(
        "--digits", type=int, default=1, help="decimals in the table (csv and json are unrounded)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    from gram_meta import report

    runs = report.read_runs(args.folders, args.metric, args.by, args.split)
    if args.curve:
        print(report.render_curve(*report.build_curve(runs), args.format, args.digits))
        return 0
    reports = report.build_reports(runs, args.reference)
    tables = [report.render(one, args.format, args.digits) for one in reports]
    print("[" + ",\n".join(tables) + "]" if args.format == "json" else "\n\n".join(tables))
    return 0
