"""A bench on the emoji world, which is made first: `gram bench --emoji DIR` needs no data, no GPU and no model hub.

DIR/world/       pictures with captions, and few-shot datasets in CoOp's layout
DIR/store/, DIR/hierarchy/                              gram embed, gram cluster
DIR/labelled/    the corpus by concept, as class folders; DIR/labelled_store/, DIR/labelled_hierarchy/
DIR/output/      runs; DIR/output/meta/ for the meta-trainings
"""

import argparse
import csv
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from gram_meta.bench import matrix
from gram_meta.bench.matrix import BenchRun, BenchSettings
from gram_meta.config import flatten, load_meta_config
from gram_meta.errors import GramError
from gram_meta.files import MARK, Count, atomic_folder, check_claimed, read_json, sha256_file

# Version of everything that decides a pixel, a caption or a split of the world: a change of it makes every world anew.
# tests/pins/test_world.py fixes what it stands for.
RECIPE = "emoji-world-2"

SOURCE = "emoji_travel"
DATASETS = {
    "base2new": ("emoji_food", "emoji_travel", "emoji_objects", "emoji_activities", "emoji_faces"),
    "xd": ("emoji_food", "emoji_objects", "emoji_activities", "emoji_faces"),  # settings were tuned on "animals"
    "dg": tuple(f"{SOURCE}_{style}" for style in ("halftone", "mosaic", "shadow")),
}
TRUTH = Path("corpus", "truth.tsv")
CORPUS_SIZE = 36_000  # pairs: a few tens per concept, enough for topics as fine as concepts
META_CONFIG = "coop_gram_small"  # its settings of CHC made the hierarchy that all meta configs of this CLIP share


def settings(args: argparse.Namespace) -> BenchSettings:
    """Return the settings of `gram bench --emoji DIR`; a store or hierarchy that is given replaces the one in DIR."""
    folder = Path(args.emoji)
    if args.root:
        raise GramError("--root and --emoji: expected one of them, found both; the root is DIR/world")
    made = ("store", "hierarchy", "labelled_store", "labelled_hierarchy")
    places = {"root": str(folder / "world"), **{name: str(folder / name) for name in made}}
    world = {"backbone": "gram_small", "datasets": DATASETS, "source": SOURCE}
    return matrix.common_settings(args, folder / "output", **world, **places)


def bench_runs(settings: BenchSettings, folder: Path) -> list[BenchRun]:
    """Return every run, those that make the world first."""
    jobs = matrix.bench_runs(settings)
    needed = {upon for job in jobs for upon in job.after}
    made = list(_corpus(settings, folder, needed))
    corpus = bool(made)
    worlds = [_world(settings, corpus), *made]
    for leaf in (leaf for job in worlds for leaf in job.leaves):
        _check_part(leaf, Path(settings.root))
    return [*worlds, *jobs]


class _Part(TypedDict, total=False):
    """What is read here from the manifest.json of a part of the world."""

    size: Count
    recipe: str


def _check_part(leaf: Path, world: Path) -> None:
    """Refuse a part that is made of something else than this bench would make it of: its runs would not say so."""
    if not leaf.exists():
        check_claimed(leaf.parent, "")
    elif leaf.name == MARK:
        if (world / TRUTH).is_file():
            check_claimed(leaf.parent, _labelled_owner(world))
    elif (found := read_json(leaf, _Part).get("recipe")) != RECIPE:
        raise GramError(f"{leaf}: expected the emoji world of recipe {RECIPE}, found {found!r}; choose another folder")


def _world(settings: BenchSettings, corpus: bool) -> BenchRun:
    """Make pictures: the datasets that are asked for, and the corpus if a prompt is meta-trained."""
    root = Path(settings.root)
    names = {name for protocol in settings.protocols for name in settings.datasets[protocol]}
    if set(settings.protocols) - {"base2new"}:
        names.add(settings.source)
    parts = sorted({_part(name) for name in names})
    made = root / "corpus" / "manifest.json"  # a corpus of another size is kept, because stores were made from it
    size = (read_json(made, _Part).get("size", CORPUS_SIZE) if made.is_file() else CORPUS_SIZE) if corpus else 0
    code = (
        f"from gram_meta.demo.world import write_world; "
        f"write_world({str(root)!r}, {json.dumps(parts)}, corpus_size={size})"
    )
    leaves = [root / f"emoji_{part}" / "manifest.json" for part in parts]
    if corpus:
        leaves.append(made)
    return BenchRun(("python", "-c", code), root, "the emoji world", ("world",), leaves=tuple(leaves))


def _part(dataset: str) -> str:
    """Return the name that `write_world` has for a dataset's folder: emoji_travel_mosaic is part of travel_shift."""
    words = dataset.removeprefix("emoji_").split("_")
    if not dataset.startswith("emoji_"):
        raise GramError(f"{dataset}: expected a dataset of the emoji world (emoji_food, ...), found another")
    return words[0] if len(words) == 1 else f"{words[0]}_shift"


def _corpus(settings: BenchSettings, folder: Path, needed: set[Path]) -> Iterator[BenchRun]:
    """Yield what makes the stores and hierarchies, captioned and labelled, that meta-trainings need."""
    root, labelled = Path(settings.root), folder / "labelled"
    if Path(settings.store) in needed:
        pairs = (str(root / "corpus" / "pairs.tsv"),)
        yield from _organised(settings, "", pairs, META_CONFIG, root)
    if Path(settings.labelled_store) in needed:
        code = f"from gram_meta.bench.emoji import write_labelled; write_labelled({str(root)!r}, {str(labelled)!r})"
        argv, title = ("python", "-c", code), "the corpus as class folders"
        yield BenchRun(argv, labelled, title, ("labelled",), (root,), (labelled / MARK,))
        source = str(labelled), "--format", "classes"
        yield from _organised(settings, "labelled_", source, "unigram_gram_small_labelled", labelled)


def _organised(
    settings: BenchSettings, kind: str, source: tuple[str, ...], config: str, upon: Path
) -> Iterator[BenchRun]:
    """Yield `gram embed` and `gram cluster` of one corpus, which the folder `upon` holds; `kind`: "" or "labelled_"."""
    store, hierarchy = getattr(settings, f"{kind}store"), getattr(settings, f"{kind}hierarchy")
    if (Path(store), Path(hierarchy)) == (upon.parent / f"{kind}store", upon.parent / f"{kind}hierarchy"):
        _check_store(Path(store), Path(source[0]))
        wanted = load_meta_config([config], settings.meta_opts)
        keys = [key for key in flatten(wanted) if key.startswith("CHC.") or key.endswith("_SHOTS")]
        matrix.check_hierarchy(Path(hierarchy), wanted, keys)  # others, which the user named, are taken as they are
    backbone = str(load_meta_config([META_CONFIG], settings.meta_opts).BACKBONE.NAME)
    embed = ("embed", source[0], "-o", store, "--backbone", backbone, *source[1:])
    yield BenchRun(embed, Path(store), f"features in {store}", ("embed",), (upon,))
    cluster = ("cluster", store, "-o", hierarchy, "--config-file", f"configs/gram_meta/{config}.yaml")
    argv, title = (*cluster, *settings.meta_opts), f"topics in {hierarchy}"
    yield BenchRun(argv, Path(hierarchy), title, ("cluster",), (Path(store),))


def _labelled_owner(world: Path) -> str:
    return f"class folders of {sha256_file(world / TRUTH)}"


def _check_store(store: Path, source: Path) -> None:
    """Refuse a store of other pairs than those of the file `source` now."""
    if not ((store / "manifest.json").is_file() and source.is_file()):
        return
    made = flatten(read_json(store / "manifest.json", dict[str, Any])).get("settings.source.sha256")
    if made != (found := sha256_file(source)):
        raise GramError(f"{store}: expected a store of {source} ({found[:12]}), found one of {str(made)[:12]}")


def write_labelled(world: str | Path, folder: str | Path) -> Path:
    """Write the corpus of the emoji world as class folders, FOLDER/<concept>/<image>, by hard links if possible."""
    images, folder, owner = Path(world) / "corpus", Path(folder), _labelled_owner(Path(world))
    if (folder / MARK).is_file():
        check_claimed(folder, owner)
        return folder
    with atomic_folder(folder, owner) as part, open(Path(world, TRUTH), encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            image = images / row["image"]
            place = part / row["concept"].replace("/", "-").replace(" ", "_") / image.name
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(image, place)
            except OSError:
                shutil.copy2(image, place)
    return folder
