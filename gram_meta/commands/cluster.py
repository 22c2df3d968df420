"""`gram cluster`: organise a store into topics and visual domains."""

import argparse

HELP = """Organise a store into topics and visual domains: cross-modal hierarchical clustering (Sec. 3.2).

The settings are the keys under CHC, and TASKS.SUPPORT_SHOTS and TASKS.QUERY_SHOTS: a topic that cannot fill a task is
dropped. Give them in YAML files or as KEY VALUE, e.g. CHC.DOMAINS.K 4 CHC.FILTER.KEEP 0.8. CHC.LABELLED True takes a
labelled collection (gram embed --format classes): its classes are the topics. See docs/guide/clustering.md."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("store", metavar="STORE", help="folder written by gram embed")
    add("-o", "--out", metavar="HIERARCHY", required=True, help="folder for the hierarchy")
    add("--config-file", action="append", default=[], metavar="YAML", help="settings; may be given more than once")
    left_out = "a .tsv file with a column image: locations of images to leave out, as gram check-overlap writes it"
    add("--exclude", metavar="FILE", help=left_out)
    replace = "replace a hierarchy that was made from another store or with other settings"
    add("--force", action="store_true", help=replace)
    add("opts", metavar="KEY VALUE", nargs="*", help="single settings")


def run(args: argparse.Namespace) -> int:
    from gram_meta.api import cluster
    from gram_meta.config import load_meta_config
    from gram_meta.method.tasks import TaskConfig, what_tasks_allow

    hierarchy = cluster(
        args.store, args.out, config=args.config_file, opts=args.opts, exclude=args.exclude, force=args.force
    )
    print(what_tasks_allow(hierarchy, TaskConfig.from_config(load_meta_config(args.config_file, args.opts))))
    return 0
