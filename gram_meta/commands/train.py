"""`gram train`: CoOp's train.py with this project's trainers and datasets."""

from __future__ import annotations

import argparse

from gram_meta.engine import launch

HELP = """Train or evaluate a trainer on a dataset: CoOp's train.py, flag by flag, with the trainers ZeroshotCLIP, CoOp and
CoOpGRAM. Config files are found by name in the package when there is no such file here."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-h", "--help", action="help", help="show this help message and exit")
    launch.add_flags(parser)


def run(args: argparse.Namespace) -> int:
    launch.run(args)
    return 0
