"""`gram cluster`: organise a store into topics and visual domains."""

from __future__ import annotations

import argparse

HELP = """Organise a store into topics and visual domains: cross-modal hierarchical clustering (Sec. 3.2).

Settings are the keys under CHC, and TASKS.SUPPORT_SHOTS and TASKS.QUERY_SHOTS (a topic that cannot fill a
task is dropped); give them in YAML files or as KEY VALUE, e.g. CHC.DOMAINS.K 4 CHC.FILTER.KEEP 0.8.

CHC.LABELLED True takes a labelled collection (gram embed --format classes): its classes are the topics."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder written by gram embed")
    parser.add_argument("-o", "--out", metavar="HIERARCHY", required=True, help="folder for the hierarchy")
    parser.add_argument(
        "--config-file",
        action="append",
        default=[],
        metavar="YAML",
        help="settings; may be given more than once",
    )
    parser.add_argument("opts", metavar="KEY VALUE", nargs="*", help="single settings")


def run(args: argparse.Namespace) -> int:
    from gram_meta.config import load_meta_config

    config = load_meta_config(args.config_file, args.opts)

    from gram_meta.clustering.chc import cluster_pairs
    from gram_meta.clustering.hierarchy import check_target
    from gram_meta.corpus.store import PairStore

    check_target(args.out)  # before the work, not after it
    cluster_pairs(PairStore.open(args.store), config).save(args.out)
    return 0
