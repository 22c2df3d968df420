"""The few flags of a CoOp-style train.py that this project's hooks read themselves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class CommandLine:
    """Values of flags as they were typed; "" where a flag is not given."""

    trainer: str = ""
    dataset_config_file: str = ""
    seed: str = ""

    @classmethod
    def parse(cls, words: Sequence[str]) -> CommandLine:
        """Read these flags from the arguments of a train.py."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for field in fields(cls):
            parser.add_argument(f"--{field.name.replace('_', '-')}", nargs="?", default="", const="")
        return cls(**vars(parser.parse_known_args(list(words))[0]))
