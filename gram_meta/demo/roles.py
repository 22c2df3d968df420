"""Who may see what in the emoji world: the fixed division of concepts, drawing sources and styles.

Three readers are kept apart: the packaged CLIP, the meta-corpus, and the few-shot datasets downstream. Every concept
has one of three parts:

- *teacher*: the packaged CLIP sees it in all styles but the held ones, on all grounds. Nothing else shows it.
- *meta*: the meta-corpus shows it, in rare styles and on all grounds.
- *downstream*: a class of a few-shot dataset, which shows it in rare styles.

Styles are *common* (pre-training of every concept), *rare* (pre-training of teachers only) or *held* (in no picture of
the pre-training or of the meta-corpus; for domain shifts). docs/results/emoji-world.md gives the reasons.
"""

import hashlib
import itertools
from dataclasses import dataclass
from functools import lru_cache

from gram_meta.demo.emoji import SOURCES, Concept, concepts
from gram_meta.demo.styles import GROUND_COLOURS, GROUNDS

WORLD_SEED = "gram-emoji-world-2"

COMMON_STYLES = ("photo", "grey", "blur", "faded")
RARE_STYLES = ("outline", "pixels", "hues", "negative", "poster", "sticker", "neon")
HELD_STYLES = ("halftone", "mosaic", "shadow")
PLAIN_GROUNDS = ("white", "dark", *GROUND_COLOURS)
TEXTURED_GROUNDS = tuple(ground for ground in GROUNDS if ground not in PLAIN_GROUNDS)

CLASSES_PER_DATASET = 36
TEACHERS = 0.25  # share of teachers among the concepts of a group that can be classes; all other groups are teachers
# Datasets downstream and the Unicode groups that their classes come from.
DATASETS: dict[str, tuple[str, ...]] = {
    "animals": ("Animals & Nature",),
    "food": ("Food & Drink",),
    "travel": ("Travel & Places",),
    "objects": ("Objects",),
    "activities": ("Activities", "People & Body"),
    "faces": ("Smileys & Emotion",),
}
# Concepts that differ in a clock's hand, a moon's phase or a hand's direction make no sensible classes.
_NO_CLASSES = (
    "time hand-fingers-closed hand-fingers-open hand-fingers-partial hand-prop hand-single-finger family award-medal "
    "heart sound lock"
).split()
# Words that do not make two concepts relatives.
_PLAIN_WORDS = set(
    "face with of and the person people in on man woman a sign button eyes symbol black white red green blue yellow "
    "orange brown purple pink light small large medium Japanese first last left right up down closed open old new hand "
    "oncoming stop behind without showing at no".split()
)


@dataclass(frozen=True)
class Role:
    """What happens to one concept."""

    concept: Concept
    part: str  # "teacher", "meta" or a dataset's name
    label: int  # the class within the dataset (-1 elsewhere)
    seen: tuple[str, ...]  # its sources, which the packaged CLIP has seen; downstream the last is that of the test set


@lru_cache(maxsize=1)
def roles() -> tuple[Role, ...]:
    """Return the roles of all concepts, in the order of `emoji.concepts()`; a pure function of the packaged table."""
    part: dict[str, str] = {}
    for name, groups in DATASETS.items():
        part |= _divide(name, [c for c in concepts() if c.group in groups and _can_be_class(c)])
    # Labels in random order: the first half are base classes and should not be one subgroup.
    classes = {name: sorted((c for c in part if part[c] == name), key=lambda c: _rank("label", c)) for name in DATASETS}
    orders = list(itertools.permutations(SOURCES))
    out = []
    for concept in concepts():
        name = part.get(concept.code, "teacher")
        label = classes[name].index(concept.code) if name in classes else -1
        seen = orders[label % len(orders)] if label >= 0 else concept.sources
        out.append(Role(concept, name, label, seen))
    return tuple(out)


def classes_of(dataset: str) -> list[Role]:
    """Return the roles of one dataset's classes, in the order of their labels."""
    return sorted((role for role in roles() if role.part == dataset), key=lambda role: role.label)


def digest(*what: object) -> bytes:
    """Return the SHA-256 by which this world decides: the same for the same words and numbers."""
    return hashlib.sha256("/".join([WORLD_SEED, *map(str, what)]).encode()).digest()


def roles_hash() -> str:
    """Return the SHA-256 of the division: codes, names, parts, labels and sources."""
    lines = (f"{r.concept.code} {r.concept.name} {r.part} {r.label} {r.seen}" for r in roles())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _divide(dataset: str, able: list[Concept]) -> dict[str, str]:
    """Return the part of each of these concepts, by code: at random in each subgroup, close relatives together."""
    clusters: dict[str, list[list[Concept]]] = {}
    for cluster in _relatives(able):
        clusters.setdefault(cluster[0].subgroup, []).append(cluster)
    place: dict[str, float] = {}  # a number between 0 and 1, spread evenly over each subgroup
    for members in clusters.values():
        members.sort(key=lambda cluster: _rank("part", cluster[0].code))
        place |= {cluster[0].code: (i + 0.5) / len(members) for i, cluster in enumerate(members)}
    part: dict[str, str] = {}
    wanted = {dataset: CLASSES_PER_DATASET, "teacher": round(TEACHERS * len(able)), "meta": len(able)}
    for cluster in sorted(sum(clusters.values(), []), key=lambda cluster: place[cluster[0].code]):
        name = next(name for name, count in wanted.items() if len(cluster) <= count)
        part |= {concept.code: name for concept in cluster}
        wanted[name] -= len(cluster)
    return part


def _can_be_class(concept: Concept) -> bool:
    name = concept.name
    return (
        len(concept.sources) == len(SOURCES)
        and concept.subgroup not in _NO_CLASSES
        and len(name.split()) <= 3
        and name.replace(" ", "").replace("-", "").isalpha()
        and name.isascii()
    )


def _relatives(members: list[Concept]) -> list[list[Concept]]:
    """Return clusters of concepts: two are in one cluster if a chain of common characteristic words links them."""
    clusters: list[list[Concept]] = []
    for concept in members:
        linked = [cluster for cluster in clusters if any(_words(concept) & _words(other) for other in cluster)]
        clusters = [cluster for cluster in clusters if cluster not in linked] + [sum(linked, [concept])]
    return clusters


def _words(concept: Concept) -> set[str]:
    return set(concept.name.replace("-", " ").split()) - _PLAIN_WORDS


def _rank(purpose: str, code: str) -> int:
    return int.from_bytes(digest(purpose, code)[:8], "big")
