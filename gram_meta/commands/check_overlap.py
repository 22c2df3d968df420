"""`gram check-overlap`: near-duplicates between a corpus and the test images of datasets."""

from __future__ import annotations

import argparse

from gram_meta.errors import GramError

HELP = "Near-duplicates between a corpus and the test images of the datasets under a root."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder written by gram embed")


def run(args: argparse.Namespace) -> int:
    raise GramError("check-overlap: is being written")
