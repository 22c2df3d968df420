"""Captions of the emoji world: what a picture shows and, often but not always, how it is drawn.

A caption names the concept and states some of a scene's attributes (style, ground, number, size, pose, company) in
varied syntax, length and punctuation. Every statement is true of the scene; `world.write_world` makes wrong captions by
describing another scene, and records them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from gram_meta.demo.styles import GROUND_COLOURS, GROUNDS, NUMBERS, POSES, SIZES, STYLES, Scenes

# Words for a style: before the name ("an outline of a fox") or as an adjective ("blurry fox").
_STYLE_OF = {
    "photo": (
        *("a photo of", "a photo of", "a photo of", "photo of"),
        *("a good photo of", "a photograph of", "a colour photo of"),
    ),
    "grey": ("a grey picture of", "a black and white photo of", "a greyscale image of", "a grey drawing of"),
    "outline": ("an outline of", "a line drawing of", "the contours of", "an outlined drawing of"),
    "pixels": ("pixel art of", "a pixelated picture of", "coarse pixels of", "a blocky pixel image of"),
    "hues": ("a picture in swapped colours of", "a false colour image of", "a recoloured drawing of"),
    "negative": ("a negative of", "an inverted picture of", "a photo negative of", "an inverted image of"),
    "blur": ("a blurry photo of", "a blurred picture of", "an out of focus image of"),
    "poster": ("a poster of", "a high contrast print of", "a posterised image of", "a poster print of"),
    "faded": ("a faded picture of", "a washed out photo of", "a pale print of", "a low contrast image of"),
    "sticker": ("a sticker of", "a sticker showing", "a cut out sticker of"),
    "neon": ("a neon sign of", "glowing neon contours of", "neon lights showing"),
    "halftone": ("a halftone print of", "a dotted print of", "a newspaper print of"),
    "shadow": ("a shadow of", "the silhouette of", "a dark silhouette of"),
    "mosaic": ("a mosaic of", "a tiled picture of", "coloured tiles showing"),
}
_STYLE_ADJECTIVE = {
    "photo": ("colourful", "photographed"),
    "grey": ("grey", "black and white", "greyscale"),
    "outline": ("outlined", "line drawn"),
    "pixels": ("pixelated", "pixel art", "blocky"),
    "hues": ("recoloured", "false colour"),
    "negative": ("inverted", "negative"),
    "blur": ("blurry", "blurred"),
    "poster": ("posterised", "high contrast"),
    "faded": ("faded", "washed out", "pale"),
    "sticker": ("sticker of a", "cut out"),
    "neon": ("neon", "glowing"),
    "halftone": ("dotted", "halftone"),
    "shadow": ("silhouetted", "shadow of a"),
    "mosaic": ("tiled", "mosaic"),
}
_ANY_OF = (
    "a picture of/a picture of/an image of/an image of/a drawing of/a photo of/this is/here is/look at/a rendering of/"
    "an icon of/the emoji/a depiction of/one of my pictures:/there is/art of/a cropped photo of/itap of/a nice picture "
    "of/a design showing/i see/we drew/a close-up of"
).split("/")
_GROUND_AFTER = {
    "white": ("on white", "on a white ground", "on white paper", "on a light background"),
    "dark": ("on black", "on a dark ground", "against a dark background", "in the dark"),
    "noise": ("on noise", "over colour noise", "on a noisy background", "in static"),
    "stripes": ("on stripes", "on a striped ground", "over stripes"),
    "checks": ("on checks", "on a checkered ground", "over a checkered background"),
    "gradient": ("on a gradient", "on fading colours", "over a colour gradient"),
    "confetti": ("among confetti", "on confetti", "with confetti around"),
}
for _colour in GROUND_COLOURS:
    _a = "an" if _colour == "orange" else "a"
    _GROUND_AFTER[_colour] = (f"on {_colour}", f"on {_a} {_colour} ground", f"against {_a} {_colour} background")
_SIZE = {"small": ("small", "tiny", "little"), "large": ("large", "big", "huge")}
_POSE = {"tilted": ("tilted", "leaning", "slanted"), "upside down": ("upside down", "turned over", "on its head")}
_NUMBER = {2: ("two", "a pair of", "2"), 3: ("three", "three of the", "3")}
_COMPANY = ("next to", "beside", "with", "and", "together with", "near")
_END = ("", "", "", "", ".", ".", ".", "!", " .", "...", ", nice", " emoji", " , see")
_START = ("",) * 10 + ("hey, ", "my favourite: ", "new: ", "wow, ", "again ", "just ", "for you: ")
_FILLER = (
    "x the some really what ok very thing of my your so new old one item stuff well art try most this that here any "
    "good bad nice kind type about just more class object word name to from in at by like as two red see look is was"
).split()
GROUP_WORDS = {
    "Activities": ("an activity", "something to do", "a leisure thing"),
    "Animals & Nature": ("a kind of animal or plant", "an animal or plant", "something from nature"),
    "Food & Drink": ("a type of food", "a kind of food or drink", "something to eat"),
    "Objects": ("an object", "a household thing", "a kind of object"),
    "People & Body": ("a person", "a kind of person", "a human thing"),
    "Smileys & Emotion": ("a feeling", "a kind of face", "an emotion"),
    "Symbols": ("a symbol", "a sign", "a kind of sign"),
    "Travel & Places": ("a place or vehicle", "something seen when travelling", "travel and places"),
}

# Columns of the statements that `Captioner` returns; -1 means "not stated".
STATED = ("style", "ground", "number", "size", "pose", "other")


@dataclass(frozen=True)
class Talk:
    """How much captions say: probabilities of stating each attribute (of those that are worth stating)."""

    style: float = 0.55
    ground: float = 0.4
    number: float = 0.8
    size: float = 0.6
    pose: float = 0.6
    company: float = 0.7
    group: float = 0.06
    bare: float = 0.08  # the name alone, perhaps with an article
    filler: float = 0.08  # unrelated words around the name: a context without information
    loose_photo: float = 0.25  # "a photo of" for any style


class Captioner:
    """Writes captions for scenes over a list of named drawings.

    Args:
        names, groups: one entry per drawing.
        talk: how much captions state.
    """

    def __init__(self, names: list[str], groups: list[str], talk: Talk | None = None) -> None:
        self.names, self.groups, self.talk = names, groups, talk or Talk()

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
        talk, u = self.talk, rng.random(12)
        name = self.names[s.drawing[i]]
        if u[0] < talk.bare:
            return _finish(rng, ("", "a ", "the ")[int(u[1] * 3)] + name), {}
        if u[0] < talk.bare + talk.filler:
            words = [_pick(rng, _FILLER) for _ in range(1 + int(u[1] * 6))]
            after = [_pick(rng, _FILLER)] if u[2] < 0.25 else []
            return _finish(rng, " ".join([*words, name, *after])), {}

        style, ground = STYLES[s.style[i]], GROUNDS[s.ground[i]]
        facts: dict[str, int] = {}
        adjectives, after = [], []
        lead = ""
        if u[2] < talk.style:
            facts["style"] = int(s.style[i])
            if u[3] < 0.65:
                lead = _pick(rng, _STYLE_OF[style])
            else:
                adjectives.append(_pick(rng, _STYLE_ADJECTIVE[style]))
        if not lead and u[4] < 0.75:
            lead = "a photo of" if u[5] < talk.loose_photo else _pick(rng, _ANY_OF)

        count = NUMBERS[s.number[i]]
        if SIZES[s.size[i]] != "normal" and u[6] < talk.size:
            adjectives.insert(0, _pick(rng, _SIZE[SIZES[s.size[i]]]))
            facts["size"] = int(s.size[i])
        if count > 1 and u[7] < talk.number:
            facts["number"] = int(s.number[i])
            thing = " ".join([_pick(rng, _NUMBER[count]), *adjectives, plural(name)])
        else:
            thing = article(" ".join([*adjectives, name]), rng)
        if s.other[i] >= 0 and u[8] < talk.company:
            facts["other"] = int(s.other[i])
            thing += f" {_pick(rng, _COMPANY)} {article(self.names[s.other[i]], rng)}"
        if POSES[s.pose[i]] != "upright" and u[9] < talk.pose:
            after.append(_pick(rng, _POSE[POSES[s.pose[i]]]))
            facts["pose"] = int(s.pose[i])
        if u[10] < talk.ground:
            facts["ground"] = int(s.ground[i])
            after.append(_pick(rng, _GROUND_AFTER[ground]))
        if u[11] < talk.group:
            after.append(", " + _pick(rng, GROUP_WORDS[self.groups[s.drawing[i]]]))
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
    for table in (_STYLE_OF, _STYLE_ADJECTIVE, _GROUND_AFTER, _SIZE, _POSE, _NUMBER, GROUP_WORDS):
        words += [phrase for phrases in table.values() for phrase in phrases]
    return [*words, *_ANY_OF, *_COMPANY, *_END, *_START, *_FILLER, "a an the , . ! ... ) ' ( : - )."]


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.random() * len(options))]


def _finish(rng: np.random.Generator, text: str) -> str:
    text = (_pick(rng, _START) + text + _pick(rng, _END)).replace(" ,", ",")
    return text[:1].upper() + text[1:] if rng.random() < 0.3 else text
