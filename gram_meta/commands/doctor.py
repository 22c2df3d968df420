"""`gram doctor`."""

from __future__ import annotations

import argparse

HELP = "doctor"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """To be written."""


def run(args: argparse.Namespace) -> int:
    raise NotImplementedError
