"""Captions of the emoji world: what a picture shows and, often but not always, how it is drawn.

A caption names the concept and states some of a scene's attributes, in the words of phrases.yaml. Every statement is
true of the scene; `world.write_world` makes wrong captions by describing another scene.
"""

import re
from collections.abc import Iterable
from importlib import resources

import numpy as np
import yaml

from gram_meta.demo.styles import GROUNDS, NUMBERS, POSES, SIZES, STYLES, Scenes

_WORDS = yaml.safe_load(resources.files("gram_meta.demo").joinpath("phrases.yaml").read_text(encoding="utf-8"))

# Columns of the statements that `Captioner` returns; -1 means "not stated".
STATED = ("style", "ground", "number", "size", "pose", "other")

# Chances of stating each attribute that is worth stating
_STATES = dict(style=0.55, ground=0.4, number=0.8, size=0.6, pose=0.6, company=0.7, group=0.06)
_BARE = 0.08  # of the name alone, perhaps with an article
_FILLER = 0.08  # of unrelated words around the name: a context without information
_LOOSE_PHOTO = 0.25  # of "a photo of" for any style


class Captioner:
    """Writes captions for scenes over drawings with these names and Unicode groups."""

    def __init__(self, names: list[str], groups: list[str]) -> None:
        self.names, self.groups = names, groups

    def __call__(self, scenes: Scenes, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
        """Return captions of B scenes, and what they state: (B, 6) int64, columns STATED, -1 if not stated."""
        captions, stated = [], np.full((len(scenes), len(STATED)), -1, dtype=np.int64)
        for i in range(len(scenes)):
            text, facts = self._caption(scenes, i, rng)
            captions.append(text)
            for key, value in facts.items():
                stated[i, STATED.index(key)] = value
        return captions, stated

    def _caption(self, s: Scenes, i: int, rng: np.random.Generator) -> tuple[str, dict[str, int]]:
        u = rng.random(12)
        name = self.names[s.drawing[i]]
        if u[0] < _BARE:
            return _finish(rng, ("", "a ", "the ")[int(u[1] * 3)] + name), {}
        if u[0] < _BARE + _FILLER:
            words = [_pick(rng, "filler") for _ in range(1 + int(u[1] * 6))]
            after = [_pick(rng, "filler")] if u[2] < 0.25 else []
            return _finish(rng, " ".join([*words, name, *after])), {}

        style, ground, count = STYLES[s.style[i]], GROUNDS[s.ground[i]], NUMBERS[s.number[i]]
        size, pose = SIZES[s.size[i]], POSES[s.pose[i]]
        facts: dict[str, int] = {}
        lead, adjectives, after = "", [], []
        if u[2] < _STATES["style"]:
            facts["style"] = int(s.style[i])
            if u[3] < 0.65:
                lead = _pick(rng, "style_of", style)
            else:
                adjectives.append(_pick(rng, "style_adjective", style))
        if not lead and u[4] < 0.75:
            lead = "a photo of" if u[5] < _LOOSE_PHOTO else _pick(rng, "any_of")

        if size != "normal" and u[6] < _STATES["size"]:
            adjectives.insert(0, _pick(rng, "size", size))
            facts["size"] = int(s.size[i])
        if count > 1 and u[7] < _STATES["number"]:
            facts["number"] = int(s.number[i])
            thing = " ".join([_pick(rng, "number", count), *adjectives, plural(name)])
        else:
            thing = article(" ".join([*adjectives, name]), rng)
        if s.other[i] >= 0 and u[8] < _STATES["company"]:
            facts["other"] = int(s.other[i])
            thing += f" {_pick(rng, 'company')} {article(self.names[s.other[i]], rng)}"
        if pose != "upright" and u[9] < _STATES["pose"]:
            after.append(_pick(rng, "pose", pose))
            facts["pose"] = int(s.pose[i])
        if u[10] < _STATES["ground"]:
            facts["ground"] = int(s.ground[i])
            after.append(_pick(rng, "ground_after", ground))
        if u[11] < _STATES["group"]:
            after.append(", " + _pick(rng, "group", self.groups[s.drawing[i]]))
        if after and rng.random() < 0.12 and not after[-1].startswith(","):
            parts = [*after[::-1], ",", lead, thing]  # "on blue, pixel art of a fox"
        else:
            parts = [lead, thing, *after]
        return _finish(rng, " ".join(part for part in parts if part)), facts


def article(phrase: str, rng: np.random.Generator) -> str:
    """Put an article in front of a phrase: "a" or "an", sometimes "the", sometimes none."""
    u = rng.random()
    if u < 0.1:
        return f"the {phrase}"
    if u < 0.25:
        return phrase
    return f"{'an' if phrase[:1].lower() in 'aeiou' else 'a'} {phrase}"


def plural(name: str) -> str:
    """Return the regular plural of a plain noun phrase; other names stay as they are."""
    if not re.search(r"[a-z]$", name) or name.endswith("s") or " with " in name or " of " in name:
        return name
    if re.search(r"(x|z|ch|sh)$", name):
        return f"{name}es"
    if re.search(r"[^aeiou]y$", name):
        return f"{name[:-1]}ies"
    return f"{name}s"


def all_words(names: Iterable[str]) -> list[str]:
    """Return texts that together hold every token of captions about drawings with these names."""
    words = [*names]
    words += [plural(name) for name in words]
    for phrases in _WORDS.values():
        words += sum(phrases.values(), []) if isinstance(phrases, dict) else phrases
    return [*words, "a an the , . ! ... ) ' ( : - )."]


def _pick(rng: np.random.Generator, kind: str, value: str | int | None = None) -> str:
    """Return one of the phrases of a kind in phrases.yaml, for this value of an attribute."""
    options = _WORDS[kind] if value is None else _WORDS[kind][value]
    return options[int(rng.random() * len(options))]


def _finish(rng: np.random.Generator, text: str) -> str:
    text = (_pick(rng, "start") + text + _pick(rng, "end")).replace(" ,", ",")
    return text[:1].upper() + text[1:] if rng.random() < 0.3 else text
