"""`gram predict`."""

from __future__ import annotations

import argparse

HELP = "predict"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """To be written."""


def run(args: argparse.Namespace) -> int:
    raise NotImplementedError
