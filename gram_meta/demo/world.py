"""The emoji world as ordinary files: a meta-corpus of image-caption pairs and few-shot datasets in CoOp's layout.

    ROOT/corpus/images/000000.png ...   pictures of the meta-corpus
    ROOT/corpus/pairs.tsv               header `image<TAB>caption`, paths relative to the file
    ROOT/corpus/truth.tsv               what is true of each pair (for reports, never for training)
    ROOT/emoji_<name>/images/...        pictures of a few-shot dataset
    ROOT/emoji_<name>/split_zhou_Emoji<Name>.json

A part whose manifest has the same RECIPE and settings is kept. The same recipe gives the same files.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gram_meta.bench.emoji import RECIPE
from gram_meta.demo.captions import Captioner
from gram_meta.demo.emoji import Concept, load_drawings, require_packages
from gram_meta.demo.roles import (
    COMMON_STYLES,
    HELD_STYLES,
    PLAIN_GROUNDS,
    RARE_STYLES,
    TEXTURED_GROUNDS,
    classes_of,
    digest,
    roles,
)
from gram_meta.demo.styles import GROUNDS, NUMBERS, POSES, SIZES, STYLES, Look, Scenes, even, render, sample_scenes
from gram_meta.errors import GramError
from gram_meta.files import atomic_folder, atomic_write, check_claimed, read_json, write_json
from gram_meta.progress import progress_bar

CORPUS_SIZE = 12_000
TRAIN_PER_CLASS, VAL_PER_CLASS, TEST_PER_CLASS = 20, 4, 56
WRONG_CAPTIONS = 0.12  # share of the meta-corpus whose caption describes another picture
ZERO_SHOT_TEMPLATE = "a photo of a {}."  # of ZeroshotCLIP on these datasets, as of CoOp's start

_COUNTS: dict[str, Any] = dict(numbers=(0.84, 0.08, 0.08), sizes=(0.8, 0.1, 0.1), poses=(0.8, 0.12, 0.08), company=0.1)
_STYLES = {style: 0.3 / len(COMMON_STYLES) for style in COMMON_STYLES}
_STYLES |= {style: 0.7 / len(RARE_STYLES) for style in RARE_STYLES}
CORPUS_LOOK = Look(styles=_STYLES, grounds=even(GROUNDS), **_COUNTS)


@dataclass(frozen=True)
class DatasetSpec:
    """One few-shot dataset: the classes of the part `source` (see `roles`), drawn in `look`."""

    name: str  # "animals": folder emoji_animals, registry name EmojiAnimals
    source: str
    look: Look
    test_per_class: int = TEST_PER_CLASS

    @property
    def folder(self) -> str:
        return f"emoji_{self.name}"

    @property
    def split_file(self) -> str:
        return f"split_zhou_Emoji{self.name.title().replace('_', '')}.json"


# Each dataset has its own look, in styles that the packaged CLIP has not seen these concepts in.
_LOOKS = {  # styles, grounds
    "animals": (("poster", "hues"), PLAIN_GROUNDS),
    "food": (("negative", "poster"), TEXTURED_GROUNDS),
    "travel": (("poster", "hues"), TEXTURED_GROUNDS),
    "objects": (("negative", "pixels"), TEXTURED_GROUNDS),
    "activities": (("negative", "pixels"), TEXTURED_GROUNDS),
    "faces": (("negative", "hues"), PLAIN_GROUNDS),
}
SPECS = {name: DatasetSpec(name, name, Look(even(of), even(on))) for name, (of, on) in _LOOKS.items()}

# Domain-shift targets: the same classes in styles of no training picture.
_HELD = Look(even(HELD_STYLES), even(PLAIN_GROUNDS))
SHIFTS = {f"{name}_shift": DatasetSpec(f"{name}_shift", name, _HELD) for name in SPECS}


def write_world(
    root: str | Path, datasets: Iterable[str] | None = None, corpus_size: int = CORPUS_SIZE, progress: bool = True
) -> dict[str, Path]:
    """Write the meta-corpus and few-shot datasets under `root`; complete parts are kept.

    Args:
        datasets: names from SPECS and SHIFTS (default: all of SPECS).
        corpus_size: pairs of the meta-corpus; 0 leaves it out.

    Returns:
        {"corpus": path of pairs.tsv, "truth": path of truth.tsv, "<dataset>": its folder, ...}.

    Raises:
        GramError: an unknown dataset, a missing package, or a folder that holds something else.
    """
    known = {**SPECS, **SHIFTS}
    names = list(SPECS if datasets is None else datasets)
    for name in names:
        if name not in known:
            raise GramError(f"{name!r} is no dataset of the emoji world; expected some of {', '.join(known)}")
    if corpus_size < 0:
        raise GramError(f"corpus_size must be at least 0, found {corpus_size}")
    root = Path(root)
    paths: dict[str, Path] = {}
    if corpus_size:
        folder = write_corpus(root / "corpus", corpus_size, progress)
        paths |= {"corpus": folder / "pairs.tsv", "truth": folder / "truth.tsv"}
    for name in names:
        paths[name] = write_dataset(root / known[name].folder, known[name], progress)
    return paths


def write_corpus(folder: Path, size: int = CORPUS_SIZE, progress: bool = True) -> Path:
    """Write the meta-corpus: `size` pairs of meta concepts, each picture with one caption."""
    facts = {"part": "corpus", "size": size, "recipe": RECIPE}
    if _is_whole(folder, facts):
        return folder
    require_packages()
    drawings, scenes, wrong, captions = corpus_entries(size)
    pixels = render(load_drawings(drawings, progress=progress), scenes)
    names = [f"images/{i:06d}.png" for i in range(size)]
    with atomic_folder(folder, _owner(facts)) as part:
        _save_pictures(part, names, pixels, progress, "meta-corpus")
        _write_tsv(part / "pairs.tsv", ["image", "caption"], zip(names, captions, strict=True))
        _write_tsv(part / "truth.tsv", TRUTH_COLUMNS, _truth(names, scenes, drawings, wrong))
        write_json(part / "manifest.json", facts)
    return folder


def write_dataset(folder: Path, spec: DatasetSpec, progress: bool = True) -> Path:
    """Write one few-shot dataset: pictures and a split file in CoOp's format."""
    facts = {"part": spec.name, "spec": json.loads(json.dumps(asdict(spec))), "recipe": RECIPE}
    if _is_whole(folder, facts):
        return folder
    require_packages()
    drawings, entries = dataset_entries(spec)
    pixels = render(load_drawings(drawings, progress=False), entries.scenes)
    with atomic_folder(folder, _owner(facts)) as part:
        names = [f"images/{name}" for name in entries.names]
        _save_pictures(part, names, pixels, progress, spec.folder)
        split: dict[str, list] = {key: [] for key in ("train", "val", "test")}
        columns = (entries.split, entries.names, entries.label.tolist(), entries.classname)
        for key, *row in zip(*columns, strict=True):
            split[key].append(row)
        write_json(part / spec.split_file, split)
        rows = _truth(names, entries.scenes, drawings, np.zeros(len(names), dtype=bool))
        _write_tsv(part / "truth.tsv", TRUTH_COLUMNS, rows)
        write_json(part / "manifest.json", facts)
    return folder


def corpus_entries(size: int) -> tuple[list[tuple[Concept, str]], Scenes, np.ndarray, list[str]]:
    """Return drawings (concept, source) of the meta-corpus, its scenes, which captions are wrong, and the captions."""
    rng = _rng("corpus", size)
    meta = [role for role in roles() if role.part == "meta"]
    drawings = [(role.concept, source) for role in meta for source in role.seen]  # 3 per concept
    # The concepts take turns, so that all are shown equally often; their drawings are at random.
    concept = np.concatenate([rng.permutation(len(meta)) for _ in range(-(-size // len(meta)))])[:size]
    drawing = 3 * concept + rng.integers(0, 3, size)
    scenes = sample_scenes(CORPUS_LOOK, drawing, np.arange(len(drawings)), rng)
    captioner = Captioner([c.name for c, _ in drawings], [c.group for c, _ in drawings])
    wrong = np.zeros(size, dtype=bool)
    wrong[rng.choice(size, round(size * WRONG_CAPTIONS), replace=False)] = True
    captions, _ = captioner(_swap_drawings(scenes, wrong, drawings, rng), rng)
    return drawings, scenes, wrong, captions


@dataclass
class DatasetEntries:
    """Pictures of a few-shot dataset before they are rendered, one entry per picture."""

    scenes: Scenes
    names: list[str]
    split: list[str]
    label: np.ndarray
    classname: list[str]


def dataset_entries(spec: DatasetSpec) -> tuple[list[tuple[Concept, str]], DatasetEntries]:
    """Return the drawings and pictures of a dataset; training and validation never share a source with the test set."""
    classes = classes_of(spec.source)
    drawings = [(role.concept, source) for role in classes for source in role.seen]  # 3 per class
    counts = {"train": TRAIN_PER_CLASS, "val": VAL_PER_CLASS, "test": spec.test_per_class}
    drawing, split, names = [], [], []
    for role in classes:
        for key, count in counts.items():
            places = (2,) if key == "test" else (0, 1)  # see roles.Role.seen
            drawing += [3 * role.label + places[i % len(places)] for i in range(count)]
            split += [key] * count
            names += [f"{role.concept.name.replace(' ', '_').lower()}/{key}_{i:03d}.png" for i in range(count)]
    scenes = sample_scenes(spec.look, np.array(drawing), np.arange(len(drawings)), _rng("dataset", spec.name))
    label = scenes.drawing // 3
    classname = [classes[i].concept.name for i in label]
    return drawings, DatasetEntries(scenes, names, split, label, classname)


TRUTH_COLUMNS = ("image concept code group subgroup style ground source number size pose caption_is_wrong").split()


def _rng(*what: object) -> np.random.Generator:
    return np.random.default_rng(list(digest(*what)))


def _swap_drawings(
    scenes: Scenes, wrong: np.ndarray, drawings: list[tuple[Concept, str]], rng: np.random.Generator
) -> Scenes:
    """Return the scenes that captions describe: where `wrong`, with a drawing of another concept."""
    code = np.array([concept.code for concept, _ in drawings])
    others = scenes.drawing.copy()
    others[wrong] = rng.integers(0, len(drawings), wrong.sum())
    while (same := wrong & (code[others] == code[scenes.drawing])).any():
        others[same] = rng.integers(0, len(drawings), same.sum())
    return replace(scenes, drawing=others)


def _truth(names: list[str], scenes: Scenes, drawings: list[tuple[Concept, str]], wrong: np.ndarray):
    for i, name in enumerate(names):
        concept, source = drawings[scenes.drawing[i]]
        look = STYLES[scenes.style[i]], GROUNDS[scenes.ground[i]], source
        counts = NUMBERS[scenes.number[i]], SIZES[scenes.size[i]], POSES[scenes.pose[i]]
        yield name, concept.name, concept.code, concept.group, concept.subgroup, *look, *counts, int(wrong[i])


def _is_whole(folder: Path, facts: dict) -> bool:
    """Return whether the folder holds this part; raise where it holds anything else."""
    manifest = folder / "manifest.json"
    if manifest.is_file() and read_json(manifest) == facts:
        return True
    check_claimed(folder, _owner(facts))
    return False


def _owner(facts: dict) -> str:
    return f"emoji world, {facts['part']}"


def _save_pictures(folder: Path, names: list[str], pixels: np.ndarray, progress: bool, what: str) -> None:
    for parent in {(folder / name).parent for name in names}:
        parent.mkdir(parents=True, exist_ok=True)
    pairs = zip(names, pixels, strict=True)
    for name, picture in progress_bar(pairs, total=len(names), desc=what, unit="", shown=progress):
        Image.fromarray(picture).save(folder / name, compress_level=1)


def _write_tsv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    with atomic_write(path, "w") as file:
        file.write("\t".join(header) + "\n")
        for row in rows:
            file.write("\t".join(map(str, row)) + "\n")
