"""Options that take a list and may be followed by KEY VALUE pairs: `--seeds 1 2 3 OPTIM.MAX_EPOCH 5`."""

import argparse
import re

from gram_meta.errors import GramError

KEY = re.compile(r"[A-Z][A-Z_]*(\.[A-Z0-9_]+)+")


def give_back_options(args: argparse.Namespace, *names: str) -> None:
    """Move KEY VALUE pairs, which argparse gives to the list before, to `args.opts`; refuse a list of such only."""
    for name in names:
        words = getattr(args, name) or []
        first = next((i for i, word in enumerate(words) if KEY.fullmatch(str(word))), None)
        if first is None:
            continue
        if first == 0:
            raise GramError(f"--{name}: expected a value, found {words[0]}")
        args.opts = [*args.opts, *words[first:]]
        setattr(args, name, words[:first])
