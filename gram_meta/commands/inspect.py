"""`gram inspect`: show a hierarchy."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gram_meta.errors import GramError
from gram_meta.files import to_json

if TYPE_CHECKING:
    from gram_meta.clustering.hierarchy import Hierarchy

HELP = """Show a hierarchy: topics by size with words, scores and domains, and which pairs were dropped and why.

--truth FILE also shows how well topics, domains and the filter agree with known facts: a .tsv or .csv file
with the column image (optionally caption) and any of concept, group, subgroup, style, source and caption_is_wrong.

--html PAGE.html writes a page for a browser instead: a map, topics with images of every visual domain, a sampled task,
dropped pairs. The page is one file below 10 MB: if there are many topics, it shows some of them, or fewer images."""

PAGE_TOPICS, TABLE_TOPICS = 50, 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("hierarchy", metavar="HIERARCHY", help="folder written by gram cluster")
    shown = f"show the N largest (default: {TABLE_TOPICS}, with --html {PAGE_TOPICS}; 0: all)"
    add("--topics", type=int, metavar="N", help=shown)
    add("--truth", metavar="FILE", help="table of known facts to compare with")
    add("--store", metavar="STORE", help="present folder of the store (default: its former one)")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--verify", action="store_true", help="read all files of hierarchy and store, check their SHA-256")
    add = parser.add_argument_group("the page").add_argument
    add("--html", metavar="PAGE.html", help="write a page with images")
    add("--image-root", metavar="FOLDER", help="present folder of the images (default: at gram embed)")
    add("--images", type=int, default=8, metavar="N", help="images of each visual domain (default: %(default)s)")
    add("--seed", type=int, default=1, metavar="S", help="seed of all draws (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from gram_meta.clustering.hierarchy import Hierarchy

    if args.html and args.json:
        raise GramError("--html and --json: expected one of them, found both")
    topics = args.topics if args.topics is not None else PAGE_TOPICS if args.html else TABLE_TOPICS
    report = None
    hierarchy = Hierarchy.open(args.hierarchy, args.verify)
    if args.truth or args.html or args.verify:
        store = hierarchy.open_store(args.store, args.verify)
    if args.truth:
        from gram_meta.clustering.agreement import agreement, read_truth

        report = agreement(hierarchy, store, read_truth(args.truth))
    if args.html:
        from gram_meta.report.html.hierarchy import write_hierarchy_page

        found = _agreement(report) if report else ""
        page = args.html, hierarchy, store, topics, args.images, args.image_root, args.seed, found
        print(f"{args.html}: {write_hierarchy_page(*page)}")
    else:
        print((as_json if args.json else as_text)(hierarchy, topics, report))
    return 0


def as_json(hierarchy: Hierarchy, topics: int, report: dict[str, Any] | None) -> str:
    """Return the contents of `as_text` as JSON."""
    shown = hierarchy.topics[: topics or None]
    value = {**hierarchy.manifest, "topics": [asdict(topic) for topic in shown], "agreement": report}
    return to_json(value, "--json", indent=2)


def as_text(hierarchy: Hierarchy, topics: int, report: dict[str, Any] | None) -> str:
    """Return tables for a terminal: topics, counts, and agreement with a truth."""
    from tabulate import tabulate

    shown = hierarchy.topics[: topics or None]
    rows: list[list[Any]] = []
    for number, topic in enumerate(shown):
        domains, words = " ".join(map(str, topic.domains)), " ".join(word for word, _ in topic.words[1:7])
        rows.append([number, topic.word, f"{topic.score:.3f}", topic.size, topic.images, domains, words])
    headers = ["topic", "word", "score", "pairs", "images", "images per domain", "next words"]
    parts = [tabulate(rows, headers, disable_numparse=True, colalign=("right", "left", *["right"] * 3, "left", "left"))]
    if len(shown) < len(hierarchy.topics):
        parts[0] += f"\n... and {len(hierarchy.topics) - len(shown)} smaller topics (--topics 0 shows all)"
    parts.append(_counts(hierarchy))
    if report is not None:
        parts.append(_agreement(report))
    return "\n\n".join(parts)


def _counts(hierarchy: Hierarchy) -> str:
    from tabulate import tabulate

    pairs = dict(hierarchy.manifest["pairs"])
    total = pairs.pop("in")
    rows = [[name, count, f"{100 * count / max(total, 1):.1f} %"] for name, count in pairs.items() if count]
    table = tabulate([*rows, ["pairs of the store", total, ""]], ["what became of pairs", "pairs", "share"])
    words = len({topic.word for topic in hierarchy.topics})
    found = hierarchy.manifest["topics_found"]
    kind = "reproducible" if hierarchy.manifest["reproducible"] else "not reproducible (CHC.SEED is -1)"
    if hierarchy.manifest.get("labelled"):
        kind += "; labelled: topics are classes, their words are the classes' names and have no score"
    return f"{table}\n{len(hierarchy.topics)} topics with {words} different words, of {found} found; {kind}"


def _agreement(report: dict[str, Any]) -> str:
    from tabulate import tabulate

    rows = []
    for name in dict.fromkeys([*report["topics"], *report["domains"]]):
        topics, domains = report["topics"].get(name), report["domains"].get(name)
        of_topics = [f"{topics[which]:.3f}" if topics else "" for which in ("all", "right captions")]
        rows.append([name, *of_topics, f"{domains['mean']:.3f} ({domains['topics']} topics)" if domains else ""])
    headers = ["adjusted mutual information with", "topics", "of right captions", "domains within topics"]
    lines = [tabulate(rows, headers, disable_numparse=True)]
    lines.append(
        f"noise: {100 * report['noise']:.1f} % of the pairs that passed the filter; "
        f"in topics: {100 * report['in_topics']:.1f} % of all"
    )
    if "filter" in report:
        f = report["filter"]
        lines.append(
            f"filter on wrong captions: precision {100 * f['precision']:.1f} % ({f['wrong and dropped']} of "
            f"{f['dropped']} dropped), recall {100 * f['recall']:.1f} % (of {f['wrong']} wrong); right captions kept "
            f"{100 * f['right captions kept']:.1f} %; wrong in topics {100 * f['wrong in topics']:.1f} %"
        )
    return "\n".join(lines)
