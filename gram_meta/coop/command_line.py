"""The few flags of a CoOp-style train.py that this project's hooks read themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise


@dataclass(frozen=True)
class CommandLine:
    """Values of flags as they were typed; "" where a flag is not given."""

    trainer: str = ""
    dataset_config_file: str = ""
    seed: str = ""

    @classmethod
    def parse(cls, words: Sequence[str]) -> CommandLine:
        """Read `--trainer X` or `--trainer=X`, and the other flags likewise, from the arguments of a train.py."""
        return cls(**{field.name: _value(f"--{field.name.replace('_', '-')}", words) for field in fields(cls)})


def _value(flag: str, words: Sequence[str]) -> str:
    for word, following in pairwise([*words, ""]):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return ""
