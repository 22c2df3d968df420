"""`gram cluster`: organise a store into topics and visual domains."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from gram_meta.corpus.store import PairStore

HELP = """Organise a store into topics and visual domains: cross-modal hierarchical clustering (Sec. 3.2).

Settings are the keys under CHC, and TASKS.SUPPORT_SHOTS and TASKS.QUERY_SHOTS (a topic that cannot fill a
task is dropped); give them in YAML files or as KEY VALUE, e.g. CHC.DOMAINS.K 4 CHC.FILTER.KEEP 0.8.

Of more than CHC.TOPICS.SAMPLE pairs, topics are found on a sample, and the others are assigned to them by a rule learned
from it. An interrupted run of that kind goes on where it was when the same command is given again.

CHC.LABELLED True takes a labelled collection (gram embed --format classes): its classes are the topics."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder written by gram embed")
    parser.add_argument("-o", "--out", metavar="HIERARCHY", required=True, help="folder for the hierarchy")
    parser.add_argument(
        "--config-file", action="append", default=[], metavar="YAML", help="settings; may be given more than once"
    )
    parser.add_argument(
        "--exclude",
        metavar="FILE",
        help="a .tsv file with a column image: locations of images to leave out, as gram check-overlap writes it",
    )
    parser.add_argument("opts", metavar="KEY VALUE", nargs="*", help="single settings")


def run(args: argparse.Namespace) -> int:
    from gram_meta.config import load_meta_config

    config = load_meta_config(args.config_file, args.opts)

    from gram_meta.clustering.chc import cluster_pairs
    from gram_meta.clustering.hierarchy import check_target
    from gram_meta.clustering.steps import Steps
    from gram_meta.corpus.store import PairStore

    out = check_target(args.out)  # before the work, not after it
    store = PairStore.open(args.store)
    excluded = excluded_images(args.exclude, store) if args.exclude else None
    hierarchy = cluster_pairs(store, config, excluded=excluded, scratch=out, progress=True)
    hierarchy.save(out)
    Steps(out).forget()
    return 0


def excluded_images(path: str, store: PairStore) -> np.ndarray:
    """Rows of the images of `store` whose locations stand in the column `image` of a TSV.

    Raises:
        GramError: no such file or column, or a location that the store does not have.
    """
    import numpy as np

    from gram_meta.errors import GramError

    try:
        with open(path, encoding="utf-8-sig") as file:
            rows = [line.rstrip("\r\n").split("\t") for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise GramError(f"{path}: expected a .tsv file of images to exclude, found none ({reason})") from None
    if not rows or "image" not in rows[0]:
        raise GramError(f"{path}: expected a column image, found {', '.join(rows[0]) if rows else 'an empty file'}")
    column = rows[0].index("image")
    wanted = {row[column] for row in rows[1:] if len(row) > column}
    found = {location: row for row, location in enumerate(store.locations) if location in wanted}
    if unknown := sorted(wanted - found.keys()):
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise GramError(f"{path}: expected locations of images of {store.path}, found {', '.join(unknown[:3])}{more}")
    return np.array(sorted(found.values()), np.int64)
