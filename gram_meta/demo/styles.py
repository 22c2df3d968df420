"""Scenes: drawings placed, multiplied and rendered in styles on grounds.

`sample_scenes` draws the attributes of a batch of pictures, `render` turns them into pixels. Both are vectorised over
the batch and deterministic for a seed.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F

SIZE = 64  # pixels of a rendered picture

# Treatments of the drawing or of the whole picture.
STYLES = (
    "photo",  # the drawing as it is
    "grey",  # shades of grey
    "outline",  # dark contours on the ground
    "pixels",  # coarse pixels
    "hues",  # colour channels swapped
    "negative",  # the whole picture inverted
    "blur",  # out of focus
    "poster",  # three levels per channel, strong contrast
    "faded",  # low contrast, washed out
    "sticker",  # a thick pale border around the drawing
    "neon",  # bright contours on a dark ground
    "halftone",  # dots
    "shadow",  # the silhouette alone
    "mosaic",  # tiles that are shifted in colour
)
GROUND_COLOURS = {
    "red": (205, 60, 60),
    "orange": (240, 150, 60),
    "yellow": (245, 220, 90),
    "green": (90, 175, 90),
    "blue": (75, 120, 215),
    "purple": (150, 95, 190),
    "pink": (245, 165, 195),
    "brown": (140, 100, 70),
}
GROUNDS = ("white", "dark", *GROUND_COLOURS, "noise", "stripes", "checks", "gradient", "confetti")
NUMBERS = (1, 2, 3)
SIZES = ("normal", "small", "large")
POSES = ("upright", "tilted", "upside down")


@dataclass
class Scenes:
    """Attributes of B pictures; every field is an int64 array of shape (B,).

    `drawing` and `other` index rows of an array of drawings (`other` is -1 without company), the others STYLES,
    GROUNDS, NUMBERS, SIZES and POSES. `seed` fixes what is left to chance: a picture does not depend on its batch.
    """

    drawing: np.ndarray
    other: np.ndarray
    style: np.ndarray
    ground: np.ndarray
    number: np.ndarray
    size: np.ndarray
    pose: np.ndarray
    seed: np.ndarray

    def __len__(self) -> int:
        return len(self.drawing)

    def __getitem__(self, rows) -> "Scenes":
        return Scenes(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


@dataclass(frozen=True)
class Look:
    """Probabilities from which the scenes of a set of pictures are drawn; a dict maps names to weights."""

    styles: dict[str, float]
    grounds: dict[str, float]
    numbers: tuple[float, float, float] = (1.0, 0.0, 0.0)
    sizes: tuple[float, float, float] = (1.0, 0.0, 0.0)
    poses: tuple[float, float, float] = (1.0, 0.0, 0.0)
    company: float = 0.0


def even(names) -> dict[str, float]:
    """Return equal weights over `names`."""
    return {name: 1.0 / len(names) for name in names}


def sample_scenes(look: Look, drawing: np.ndarray, others: np.ndarray, rng: np.random.Generator) -> Scenes:
    """Draw the attributes of len(drawing) pictures from `look`; company is drawn from the indices `others`."""
    n = len(drawing)
    company = rng.random(n) < look.company
    other = rng.choice(others, n) if len(others) else np.full(n, -1)
    number = rng.choice(len(NUMBERS), n, p=look.numbers)
    return Scenes(
        drawing=np.asarray(drawing, dtype=np.int64),
        other=np.where(company & (number == 0), other, -1).astype(np.int64),
        style=_choice(STYLES, look.styles, n, rng),
        ground=_choice(GROUNDS, look.grounds, n, rng),
        number=number.astype(np.int64),
        size=rng.choice(len(SIZES), n, p=look.sizes).astype(np.int64),
        pose=rng.choice(len(POSES), n, p=look.poses).astype(np.int64),
        seed=rng.integers(0, 2**31, n, dtype=np.int64),
    )


def render(drawings: np.ndarray, scenes: Scenes, chunk: int = 256) -> np.ndarray:
    """Return pictures (B > 0, 64, 64, 3) uint8 of scenes, from drawings (N, 64, 64, 4) uint8 with straight alpha."""
    parts = [scenes[slice(i, i + chunk)] for i in range(0, len(scenes), chunk)]
    with torch.no_grad():
        pictures = torch.cat([_render(drawings, part) for part in parts])
    return pictures.permute(0, 2, 3, 1).contiguous().numpy()


def _choice(names: tuple[str, ...], weights: dict[str, float], n: int, rng: np.random.Generator) -> np.ndarray:
    p = np.array([weights.get(name, 0.0) for name in names], dtype=np.float64)
    return rng.choice(len(names), n, p=p / p.sum()).astype(np.int64)


class _Chance:
    """Uniform numbers in [0, 1), a pure function of (picture's seed, counter): splitmix64, vectorised."""

    def __init__(self, seed: np.ndarray) -> None:
        self.state = seed.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self.used = 0

    def __call__(self, *shape: int) -> np.ndarray:  # (B, *shape)
        count = int(np.prod(shape)) if shape else 1
        steps = np.arange(self.used + 1, self.used + count + 1, dtype=np.uint64)
        self.used += count
        z = self.state[:, None] + steps[None] * np.uint64(0xD1342543DE82EF95)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
        uniform = (z >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
        return uniform.reshape(len(self.state), *shape)


def _between(u: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * u


def _render(drawings: np.ndarray, s: Scenes) -> torch.Tensor:  # (B, 3, 64, 64) uint8
    chance = _Chance(s.seed)
    objects = _compose(drawings, s, chance)  # (B, 4, S, S), premultiplied
    ground = _grounds(s, chance)  # (B, 3, S, S)
    rgb, alpha = objects[:, :3], objects[:, 3:]
    pick = {name: np.flatnonzero(s.style == i) for i, name in enumerate(STYLES)}

    # Styles of the drawing, before it lies on its ground.
    rows = pick["grey"]
    rgb[rows] = _luma(rgb[rows])
    rows = pick["hues"]
    rgb[rows] = rgb[rows][:, [2, 0, 1]]
    rows = pick["shadow"]
    rgb[rows] = _ink(ground[rows]) * alpha[rows]
    rows = pick["sticker"]
    border = F.max_pool2d(alpha[rows], 7, stride=1, padding=3)
    rgb[rows], alpha[rows] = rgb[rows] + 0.97 * (border - alpha[rows]), border
    for name in ("outline", "neon"):
        rows = pick[name]
        edges = _edges(rgb[rows] + 0.5 * (1 - alpha[rows]), alpha[rows])
        rgb[rows] = edges * (_ink(ground[rows]) if name == "outline" else _neon(chance(3)[rows]))
        alpha[rows] = edges
    rows = pick["neon"]
    ground[rows] = 0.25 * ground[rows]

    picture = rgb + ground * (1 - alpha)

    for name, change in _OF_PICTURE.items():
        picture[pick[name]] = change(picture[pick[name]])
    rows = pick["mosaic"]
    tint = torch.from_numpy(_between(chance(3, 8, 8), -0.22, 0.22))[rows]
    picture[rows] += tint.repeat_interleave(8, 2).repeat_interleave(8, 3)
    return (picture.clamp_(0, 1) * 255 + 0.5).to(torch.uint8)


def _compose(drawings: np.ndarray, s: Scenes, chance: _Chance) -> torch.Tensor:  # (B, 4, S, S) premultiplied, float32
    """Place up to three drawings per picture, later ones above earlier ones."""
    b = len(s)
    count = np.array(NUMBERS)[s.number]
    company = s.other >= 0
    u = chance(3, 5)  # per slot: scale, angle, dx, dy, mirrored
    base = np.select(
        [s.size == 0, s.size == 1],
        [_between(u[:, 0, 0], 0.72, 0.98), _between(u[:, 0, 0], 0.42, 0.56)],
        _between(u[:, 0, 0], 1.05, 1.3),
    )
    tilt = np.select([s.pose == 0, s.pose == 1], [np.zeros(b), np.where(u[:, 0, 4] < 0.5, 0.6, -0.6)], np.pi)
    # Places of the slots: one in the middle; two and three side by side; company in a lower corner.
    layout_x = np.array([[0, 0, 0], [-0.5, 0.5, 0], [-0.55, 0.55, 0]])
    layout_y = np.array([[0, 0, 0], [0, 0, 0], [0.45, 0.45, -0.5]])
    shrink = np.array([1.0, 0.58, 0.54])

    scale = np.tile((base * shrink[s.number])[:, None], (1, 3)) * _between(u[:, :, 0], 0.95, 1.05)
    angle = tilt[:, None] + _between(u[:, :, 1], -0.2, 0.2)
    room = np.clip(1 - scale, 0.06, None)
    x = layout_x[s.number] + _between(u[:, :, 2], -0.8, 0.8) * np.minimum(room, 0.5)
    y = layout_y[s.number] + _between(u[:, :, 3], -0.8, 0.8) * np.minimum(room, 0.5)
    side = np.where(u[:, 1, 4] < 0.5, -1.0, 1.0)
    x[company, 0] = -0.22 * side[company]
    scale[company, 0] *= 0.78
    scale[company, 1] = 0.42
    x[company, 1], y[company, 1] = 0.6 * side[company], 0.5
    mirrored = np.where(u[:, :, 4] * 7 % 1 < 0.3, -1.0, 1.0)

    used = np.arange(3)[None] < np.where(company, 2, count)[:, None]  # (B, 3)
    which = np.tile(s.drawing[:, None], (1, 3))
    which[company, 1] = s.other[company]
    row, slot = np.nonzero(used)
    cos, sin = np.cos(angle[row, slot]), np.sin(angle[row, slot])
    k, m = 1 / scale[row, slot], mirrored[row, slot]
    tx, ty = x[row, slot], y[row, slot]
    # Picture -> drawing coordinates: shift back, turn back, scale back, mirror.
    to_x = np.stack([m * k * cos, m * k * sin, -m * k * (cos * tx + sin * ty)], -1)
    to_y = np.stack([-k * sin, k * cos, -k * (-sin * tx + cos * ty)], -1)
    theta = np.stack([to_x, to_y], 1).astype(np.float32)  # (M, 2, 3)
    source = torch.from_numpy(drawings[which[row, slot]]).permute(0, 3, 1, 2).float().div_(255)
    source[:, :3] *= source[:, 3:]
    grid = F.affine_grid(torch.from_numpy(theta), [len(row), 4, SIZE, SIZE], align_corners=False)
    placed = F.grid_sample(source, grid, align_corners=False)  # (M, 4, S, S)

    out = torch.zeros(b, 4, SIZE, SIZE)
    for i in range(3):
        here = np.flatnonzero(slot == i)
        rows = row[here]
        out[rows] = placed[here] + out[rows] * (1 - placed[here, 3:])
    return out


def _grounds(s: Scenes, chance: _Chance) -> torch.Tensor:  # (B, 3, S, S) float32
    b = len(s)
    u = chance(8)
    name = np.array(GROUNDS)[s.ground]
    colours = np.array(list(GROUND_COLOURS.values()), dtype=np.float32) / 255
    first = np.minimum((u[:, 0] * len(colours)).astype(int), len(colours) - 1)
    second = (first + 1 + np.minimum((u[:, 1] * (len(colours) - 1)).astype(int), len(colours) - 2)) % len(colours)
    flat = colours[first]
    for i, colour in enumerate(GROUND_COLOURS):
        flat[name == colour] = colours[i]
    flat = flat + _between(u[:, 2:5], -0.06, 0.06)
    flat[name == "white"] = _between(u[name == "white", 2:5], 0.93, 1.0)
    flat[name == "dark"] = _between(u[name == "dark", 2:5], 0.02, 0.16)
    ground = torch.from_numpy(flat.astype(np.float32))[:, :, None, None].expand(b, 3, SIZE, SIZE).clone()
    for kind in ("stripes", "checks", "gradient"):
        rows = np.flatnonzero(name == kind)
        mix = torch.from_numpy(_pattern(kind, u[rows, 5:]))[:, None]  # (R, 1, S, S)
        other = torch.from_numpy(colours[second[rows]])[:, :, None, None]
        ground[rows] = ground[rows] * mix + other * (1 - mix)
    rows = np.flatnonzero(name == "noise")
    ground[rows] = torch.from_numpy(_Chance(s.seed[rows] ^ 0x5EED)(3, SIZE, SIZE))
    rows = np.flatnonzero(name == "confetti")
    ground[rows] = _confetti(ground[rows], _Chance(s.seed[rows] ^ 0xC0FE), colours)
    return ground


def _pattern(kind: str, u: np.ndarray) -> np.ndarray:  # (R, S, S) float32 in [0, 1]
    """Where the first of two colours lies; u (R, 3): phase, width, slant."""
    line = np.arange(SIZE, dtype=np.float32)
    x, y = line[None, None, :], line[None, :, None]
    phase, width = u[:, 0, None, None], _between(u[:, 1, None, None], 5.0, 10.0)
    slant = np.round(_between(u[:, 2, None, None], -1.49, 1.49))
    if kind == "stripes":
        mix = ((x + slant * y) / width + phase * 7) % 2 < 1
    elif kind == "checks":
        mix = (np.floor(x / width + phase * 3) + np.floor(y / width)) % 2
    else:
        mix = np.broadcast_to(y / SIZE, (len(u), SIZE, SIZE))
    return mix.astype(np.float32)


def _confetti(ground: torch.Tensor, chance: _Chance, colours: np.ndarray) -> torch.Tensor:
    xx = torch.arange(SIZE, dtype=torch.float32)
    for _ in range(14):
        u = chance(4)
        cx, cy, r = (torch.from_numpy(v)[:, None, None] for v in (u[:, 0] * SIZE, u[:, 1] * SIZE, 2 + 4 * u[:, 2]))
        inside = (((xx[None, None] - cx).abs() + (xx[None, :, None] - cy).abs()) < r).float()[:, None]
        colour = torch.from_numpy(colours[(u[:, 3] * len(colours)).astype(int) % len(colours)])[:, :, None, None]
        ground = ground * (1 - inside) + colour * inside
    return ground


def _luma(rgb: torch.Tensor) -> torch.Tensor:
    return (0.299 * rgb[:, :1] + 0.587 * rgb[:, 1:2] + 0.114 * rgb[:, 2:3]).expand_as(rgb)


def _edges(rgb: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:  # (B, 1, S, S) in [0, 1]
    """Strength of contours in colour and alpha: morphological gradient (largest minus smallest neighbour)."""
    planes = torch.cat([rgb, alpha], 1)
    gradient = F.max_pool2d(planes, 3, 1, 1) + F.max_pool2d(-planes, 3, 1, 1)
    return (gradient.amax(1, keepdim=True) * 2.2 - 0.3).clamp(0, 1)


def _ink(ground: torch.Tensor) -> torch.Tensor:  # (B, 1, 1, 1): black on light grounds, white on dark ones
    return torch.where(ground.mean((1, 2, 3), keepdim=True) > 0.3, 0.1, 0.95)


def _neon(u: np.ndarray) -> torch.Tensor:  # (B, 3, 1, 1): one channel off, one full
    colour = np.array([0.1, 0.9, 1.0], dtype=np.float32)[np.argsort(u, axis=1)]
    return torch.from_numpy(colour)[:, :, None, None]


def _blur(picture: torch.Tensor) -> torch.Tensor:
    taps = torch.exp(-0.5 * (torch.arange(-5, 6).float() / 2.1) ** 2)
    taps = (taps / taps.sum()).view(1, 1, 1, 11).expand(3, 1, 1, 11)
    padded = F.pad(picture, (5, 5, 5, 5), mode="replicate")
    return F.conv2d(F.conv2d(padded, taps, groups=3), taps.transpose(2, 3), groups=3)


def _pixels(picture: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(picture, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)


def _halftone(picture: torch.Tensor) -> torch.Tensor:
    tone = _pixels(picture)
    axis = (torch.arange(SIZE) % 4 - 1.5) ** 2
    distance = (axis[None] + axis[:, None]).sqrt() / 2.2
    return torch.where(distance[None, None] < (1 - tone).sqrt(), 0.15, 1.0) * 0.75 + 0.25 * tone


_OF_PICTURE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # styles of the whole picture
    "negative": lambda picture: 1 - picture,
    "blur": _blur,
    "pixels": _pixels,
    "poster": lambda picture: (picture * 2.999).floor() / 2,
    "faded": lambda picture: 0.62 + 0.28 * (picture - 0.5),
    "halftone": _halftone,
}
