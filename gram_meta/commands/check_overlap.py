"""`gram check-overlap`: near-duplicates between a corpus and the test images of datasets."""

from __future__ import annotations

import argparse
import io
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gram_meta.config import COMMAND_BOUNDS, check_bounds
from gram_meta.errors import GramError
from gram_meta.processes import ALONE, device_for

if TYPE_CHECKING:
    from gram_meta.corpus.store import PairStore
    from gram_meta.tools.overlap import Match, TestImage

HELP = """Find datasets' test images in a corpus: equal files, and re-encoded, resized, cropped or mirrored copies.

Without --datasets, the command checks every known dataset whose folder is in DATA. A folder beside the TSV caches data
computed from images. The exit status is 1 if a dataset could not be read and, with --fail, if there is a match.

  gram check-overlap STORE --root DATA -o overlap.tsv
  gram cluster STORE -o HIERARCHY --exclude overlap.tsv          leaves the matches out"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from gram_meta.tools.overlap import DISTANCE, NEIGHBOURS, PIXEL_THRESHOLD, THRESHOLD

    add = parser.add_argument
    add("store", metavar="STORE", help="folder written by gram embed")
    add("--root", metavar="DATA", required=True, help="folder that holds the datasets' folders")
    names = "names of dataset configs (caltech101), or of folders of class folders in DATA"
    add("--datasets", nargs="+", metavar="NAME", help=names)
    parts = "parts whose images are searched for (default: test)"
    add("--parts", nargs="+", default=["test"], choices=("train", "val", "test"), help=parts)
    add("-o", "--out", metavar="TSV", default="overlap.tsv", help="file for the matches (default: %(default)s)")
    add("--image-root", metavar="FOLDER", help="folder of the corpus' images now (default: where gram embed read them)")
    add("--backbone", metavar="NAME", help="the CLIP of the store's features (default: the one the store names)")
    only = "find candidates without CLIP, by 8 x 8 pixel thumbnails; reads every image of the corpus"
    add("--pixels-only", action="store_true", help=only)
    too = "find candidates by CLIP and by thumbnails: finds most; reads every image of the corpus once"
    add("--pixels-too", action="store_true", help=too)
    compared = "corpus images that are compared with a test image, and with its mirror image (default: %(default)s)"
    add("--neighbours", type=int, default=NEIGHBOURS, metavar="K", help=compared)
    least = f"least cosine of a candidate by CLIP (default: {THRESHOLD}; by thumbnails it is {PIXEL_THRESHOLD})"
    add("--threshold", type=float, default=THRESHOLD, metavar="COSINE", help=least)
    largest = "largest distance of near-duplicates, 1 - correlation of pixels (default: %(default)s)"
    add("--distance", type=float, default=DISTANCE, metavar="D", help=largest)
    add("--workers", type=int, default=4, metavar="N", help="threads that read images (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: cuda where there is one)")
    add("--fail", action="store_true", help="exit with status 1 if there is a match")


def run(args: argparse.Namespace) -> int:
    from gram_meta.corpus.store import PairStore
    from gram_meta.datasets.check import data_root
    from gram_meta.tools.overlap import PIXEL_THRESHOLD, SearchSettings, find_overlap, write_matches

    _check(args)
    root = data_root(args.root)
    store = PairStore.open(args.store)
    tests, unread = test_images(root, args.datasets, args.parts)
    if not tests:
        raise GramError(f"{root}: expected a dataset with images, found none" + "".join(f"; {why}" for why in unread))
    device = device_for(ALONE, args.device)
    backbone = None if args.pixels_only else _backbone(store, args.backbone, device)
    pixels = PIXEL_THRESHOLD if args.pixels_only or args.pixels_too else None
    limits = args.neighbours, args.threshold, pixels, args.distance
    settings = SearchSettings(Path(f"{args.out}.cache"), *limits, args.workers, device, args.image_root)
    matches, counts = find_overlap(store, tests, backbone, settings)
    write_matches(args.out, store, tests, matches)
    print(as_text(store, tests, matches, counts, args))
    for why in unread:
        print(f"not checked: {why}", file=sys.stderr)
    return 1 if unread or (args.fail and matches) else 0


def _check(args: argparse.Namespace) -> None:
    check_bounds({"--neighbours": args.neighbours, "--workers": args.workers}, COMMAND_BOUNDS)
    if not 0 <= args.distance <= 2:
        raise GramError(f"--distance: expected a number from 0 to 2, found {args.distance}")
    if args.pixels_only and args.backbone:
        raise GramError("--pixels-only and --backbone: expected one of them, found both")


def _backbone(store: PairStore, name: str | None, device: str) -> Any:
    """Load the CLIP of the store's features."""
    from gram_meta.backbone.clip import load_backbone

    clip = store.manifest["settings"]["clip"]
    try:
        store.check_backbone_name(name or clip["name"])
        backbone = load_backbone(name or clip["name"], device, clip.get("precision", "fp32"))
    except GramError as error:
        raise GramError(f"{error} (--pixels-only needs no CLIP, but reads every image of the corpus)") from None
    store.check_backbone(backbone)
    return backbone


def test_images(root: Path, names: Sequence[str] | None, parts: Sequence[str]) -> tuple[list[TestImage], list[str]]:
    """Return the images of these parts of datasets, and a sentence for each unreadable one; if named, raise it."""
    import gram_meta.plugin  # noqa: F401 - registers the datasets
    from gram_meta.datasets.check import find_datasets, known_datasets, split_names
    from gram_meta.tools.overlap import TestImage

    chosen = split_names(names)
    found: list[TestImage] = []
    unread: list[str] = []
    for name, dataset in find_datasets(root, chosen or known_datasets()):
        folder = root / dataset.dataset_dir
        if not chosen and not folder.is_dir():
            continue
        try:
            with redirect_stdout(io.StringIO()):
                splits = dataset.look(folder / dataset.split_file)
        except GramError as error:
            if chosen:
                raise
            unread.append(f"{name}: {error}")
            continue
        images = folder / dataset.image_dir
        named = dict.fromkeys(image for part in parts for image, _label, _class in splits[part])
        found += [TestImage(name, image, str(images / image)) for image in named]
    return found, unread


def as_text(
    store: PairStore,
    tests: Sequence[TestImage],
    matches: Sequence[Match],
    counts: dict[str, int],
    args: argparse.Namespace,
) -> str:
    """Return a table of datasets, and the counts of the search."""
    from tabulate import tabulate

    from gram_meta.tools.overlap import EXACT

    total = Counter(test.dataset for test in tests)
    exact = {match.test for match in matches if match.kind == EXACT}
    near = {match.test for match in matches} - exact
    rows = []
    for name, count in total.items():
        of_kind = [sum(tests[test].dataset == name for test in kind) for kind in (exact, near)]
        rows.append([name, count, *of_kind, f"{100 * sum(of_kind) / count:.2f} %"])
    what = " and ".join(args.parts)
    lines = [tabulate(rows, ["dataset", f"{what} images", "equal files", "near-duplicates", "share"], intfmt=",")]
    images = len({match.row for match in matches})
    found = f"{images:,} of the {len(store.locations):,} images of {store.path} equal a {what} image or nearly do"
    lines += [f"{found}: {args.out}", f"{counts['candidates']:,} pairs were compared pixel by pixel"]
    if images:
        lines.append(f"gram cluster {args.store} -o HIERARCHY --exclude {args.out} leaves them out")
    for key, where in (("unreadable tests", f"{what} images"), ("unreadable candidates", "images of the corpus")):
        if counts[key]:
            lines.append(f"{counts[key]:,} {where} could not be read and were not compared")
    return "\n".join(lines)
