"""`gram check-data`: list the datasets under a folder, what is missing or wrong, and where to get it."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from gram_meta.config import COMMAND_BOUNDS, check_bounds
from gram_meta.files import to_json

if TYPE_CHECKING:
    from gram_meta.datasets.check import Finding

HELP = """List the datasets under ROOT (the --root of training), what is missing or wrong, and where to get it.

Without --datasets, it checks the paper's eleven and ImageNetV2, -Sketch, -A and -R. It counts the files and compares
them with the published numbers; --deep opens every image. It writes no file. The exit status is 0 if all datasets are
fine, else 1."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("root", metavar="ROOT", help="folder that holds the datasets' folders")
    names = "names of their configs (caltech101), or of folders of class folders in ROOT"
    add("--datasets", nargs="+", metavar="NAME", help=names)
    add("--deep", action="store_true", help="open every image")
    add("--workers", type=int, default=8, metavar="N", help="threads for --deep (default: %(default)s)")
    add("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    import gram_meta.plugin  # noqa: F401, registers the datasets
    from gram_meta.datasets.check import FINE, MISSING, PAPER, check, data_root, find_datasets, split_names

    root = data_root(args.root)
    check_bounds({"--workers": args.workers}, COMMAND_BOUNDS)
    names = split_names(args.datasets or PAPER)
    found = [check(root, name, dataset, args.deep, args.workers) for name, dataset in find_datasets(root, names)]
    absent = [] if args.datasets else [finding for finding in found if finding.state == MISSING]
    print(as_json(found) if args.json else as_text([finding for finding in found if finding not in absent], absent))
    return 0 if all(finding.state == FINE for finding in found) else 1


def as_json(found: list[Finding]) -> str:
    """Return the contents of `as_text` as JSON."""
    return to_json([asdict(finding) for finding in found], "--json", indent=2)


def as_text(found: list[Finding], absent: Sequence[Finding] = ()) -> str:
    """Return a table, below it the problems and notes, and one line for the absent datasets that nobody asked for."""
    from tabulate import tabulate

    parts_of = ("train", "val", "test")
    rows = [[it.name, it.state, it.classes, *map(it.images.get, parts_of)] for it in found]
    table = tabulate(rows, ["dataset", "", "classes", *parts_of], missingval="-", intfmt=",")
    parts = [table] if found else []
    parts += [_details(finding) for finding in found if finding.problems or finding.notes]
    if absent:
        names = ", ".join(finding.name for finding in absent)
        parts.append(f"Not in this folder: {names} (--datasets NAME prints where to get one)")
    counts = Counter(finding.state for finding in (*found, *absent))
    parts.append(", ".join(f"{counts[state]} {state}" for state in ("fine", "missing", "wrong") if counts[state]))
    return "\n\n".join(parts)


def _details(finding: Finding) -> str:
    lines = [f"{finding.name}: {finding.state}", *(f"  {problem}" for problem in finding.problems)]
    if finding.problems and finding.expected:
        numbers = ", ".join(f"{what} {number:,}" for what, number in finding.expected.items())
        lines.append(f"  published: {numbers}")
    if finding.problems:
        lines += [f"  {what}: {where}" for what, where in finding.sources.items()]
    return "\n".join([*lines, *(f"  note: {note}" for note in finding.notes)])
