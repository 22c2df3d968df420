"""Who may see what in the emoji world: the fixed division of concepts, drawing sources and styles.

Three readers are kept apart: the packaged CLIP (its pre-training pictures), the meta-corpus, and the few-shot datasets
downstream.

- Concepts are either *meta* (meta-corpus), *downstream* (classes of a few-shot dataset) or *name-only*: close relatives
  of a downstream class ("cat face" where "cat" is a class), which only the packaged CLIP sees.
- The packaged CLIP has seen a downstream concept's three drawings, but only in common styles on plain grounds. The
  few-shot datasets show them in other styles, and their training pool and test set never share a drawing.
- The packaged CLIP has seen two of a meta concept's three drawings; the third is first shown by the meta-corpus.
- Styles are *common* (pre-training of everything), *rare* (pre-training of meta concepts only, so that the text tower
  knows their words) or *held* (in no training picture of the packaged CLIP or of the meta-corpus).
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from functools import lru_cache

from gram_meta.demo.emoji import SOURCES, Concept, concepts
from gram_meta.demo.styles import GROUND_COLOURS, GROUNDS

WORLD_SEED = "gram-emoji-world-1"

COMMON_STYLES = ("photo", "grey", "blur", "faded")
RARE_STYLES = ("outline", "pixels", "hues", "negative", "poster", "sticker", "neon")
HELD_STYLES = ("halftone", "mosaic", "shadow")
PLAIN_GROUNDS = ("white", "dark", *GROUND_COLOURS)
TEXTURED_GROUNDS = tuple(ground for ground in GROUNDS if ground not in PLAIN_GROUNDS)

CLASSES_PER_DATASET = 36
# Datasets downstream and the Unicode groups, or single subgroups, that their classes come from.
DATASETS: dict[str, tuple[str, ...]] = {
    "animals": ("Animals & Nature",),
    "food": ("Food & Drink",),
    "travel": ("Travel & Places",),
    "objects": ("Objects",),
    "activities": ("Activities", "People & Body"),
    "faces": ("Smileys & Emotion",),
}
# Concepts that differ in a clock's hand, a moon's phase or a hand's direction make no sensible classes.
_NO_CLASSES = {
    "time",
    "hand-fingers-closed",
    "hand-fingers-open",
    "hand-fingers-partial",
    "hand-prop",
    "hand-single-finger",
    "family",
    "award-medal",
    "heart",
    "sound",
    "lock",
}
_PLAIN_WORDS = {"face", "with", "of", "and", "the", "person", "in", "on", "man", "woman", "a", "sign", "button", "eyes"}


@dataclass(frozen=True)
class Role:
    """What happens to one concept.

    `part` is "meta", "name-only" or a dataset's name; `label` is the class index within the dataset (-1 elsewhere);
    `seen` are the sources whose drawings the packaged CLIP was trained on, `unseen` the others. For a downstream
    concept `seen` has all three, in this order: two sources of the few-shot pool, then the source of the test set.
    """

    concept: Concept
    part: str
    label: int
    seen: tuple[str, ...]
    unseen: tuple[str, ...]


@lru_cache(maxsize=1)
def roles() -> tuple[Role, ...]:
    """Return the roles of all concepts, in the order of `emoji.concepts()`; a pure function of the packaged table."""
    classes = _downstream_classes()
    relatives = _relatives(classes)
    orders = list(itertools.permutations(SOURCES))
    place = {concept.code: (name, label) for name, members in classes.items() for label, concept in enumerate(members)}
    turn = {code: i for i, code in enumerate(sorted(place, key=lambda code: _rank("hands", code)))}
    out = []
    for concept in concepts():
        if concept.code in place:
            name, label = place[concept.code]
            out.append(Role(concept, name, label, orders[turn[concept.code] % len(orders)], ()))
        elif concept.code in relatives:
            out.append(Role(concept, "name-only", -1, concept.sources, ()))
        elif len(concept.sources) < len(SOURCES):
            out.append(Role(concept, "meta", -1, concept.sources, ()))
        else:
            held = SOURCES[_rank("held", concept.code) % len(SOURCES)]
            out.append(Role(concept, "meta", -1, tuple(source for source in SOURCES if source != held), (held,)))
    return tuple(out)


def classes_of(dataset: str) -> list[Role]:
    """Return the roles of one dataset's classes, in the order of their labels."""
    return sorted((role for role in roles() if role.part == dataset), key=lambda role: role.label)


def roles_hash() -> str:
    """Return the SHA-256 of the division: names, codes, parts and the sources that the packaged CLIP has seen."""
    lines = (f"{r.concept.code} {r.concept.name} {r.part} {r.label} {r.seen} {r.unseen}" for r in roles())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _downstream_classes() -> dict[str, list[Concept]]:
    classes = {}
    for name, groups in DATASETS.items():
        able = [c for c in concepts() if c.group in groups and _can_be_class(c)]
        able.sort(key=lambda c: _rank("class", c.code))
        members = able[:CLASSES_PER_DATASET]
        # Labels in another order: the first half are base classes and should not be one subgroup.
        classes[name] = sorted(members, key=lambda c: _rank("label", c.code))
    return classes


def _can_be_class(concept: Concept) -> bool:
    name = concept.name
    return (
        len(concept.sources) == len(SOURCES)
        and concept.subgroup not in _NO_CLASSES
        and len(name.split()) <= 3
        and name.replace(" ", "").replace("-", "").isalpha()
        and name.isascii()
    )


def _relatives(classes: dict[str, list[Concept]]) -> set[str]:
    """Return the codes of concepts that share a characteristic word with a class of the same group."""
    words = {(c.group, word) for members in classes.values() for c in members for word in _words(c)}
    chosen = {c.code for members in classes.values() for c in members}
    return {c.code for c in concepts() if c.code not in chosen and any((c.group, word) in words for word in _words(c))}


def _words(concept: Concept) -> set[str]:
    return set(concept.name.lower().replace("-", " ").split()) - _PLAIN_WORDS


def _rank(purpose: str, code: str) -> int:
    digest = hashlib.sha256(f"{WORLD_SEED}/{purpose}/{code}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
