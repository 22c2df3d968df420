"""Images a second, read for few-shot training: from files or kept, by processes, on tensors, and decoded on a device.

    python scripts/bench/loading.py --workers 0 2
    python scripts/bench/loading.py --device cuda --workers 0 4 8 16

A round is an epoch over random JPEGs with the built-in engine's loader in CoOp's way; "on DEVICE", torchvision decodes
and crops there, in one process. The second table has the differences of the bytes (0 to 255) from Pillow's.
"""

import contextlib
import io
import tempfile
from collections import deque
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import cpu_model, measure, numbers, parser, print_table, report, spread, write_report
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode, v2

from gram_meta import engine
from gram_meta.images import kept_images, read_rgb

BATCH = 32
CROP = v2.Compose([v2.RandomResizedCrop(224, interpolation=InterpolationMode.BICUBIC), v2.RandomHorizontalFlip()])


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--images", type=int, default=320, help="JPEGs in an epoch (%(default)s)")
    options.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="loader processes (%(default)s)")
    args = options.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        files, kept = (write_images(Path(folder, name), args.images) for name in ("files", "kept"))
        steps: dict[str, Any] = {}
        for workers in args.workers:
            for paths, of in ((files, ""), (kept, ", kept images")):
                for on in ("images", "tensors", *["device"] * (workers == 0)):
                    loader = loader_of(paths, workers, on)
                    loader.normalise_on(torch.device(args.device))
                    name = f"{workers} processes{of}, cropped on {on}"
                    steps[name] = partial(deque, loader, 0)  # runs an epoch and keeps nothing
        steps[f"decoded and cropped on {args.device}"] = lambda: [
            torch.stack([CROP(image) for image in decode(files[start : start + BATCH], args.device)]).float().div_(255)
            for start in range(0, args.images, BATCH)
        ]
        with kept_images(kept, 1e11, False):
            measured = measure(steps, args)
        print(f"{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.device}\n")
        speeds = ([args.images / seconds for seconds in one.rounds] for one in measured.values())
        print_table([{"": name, "images/s": spread(speed)} for name, speed in zip(measured, speeds, strict=True)])
        print_table(differences(files[:BATCH], args.device))
    write_report(args, report(args) | {"measured": numbers(measured)})


def write_images(folder: Path, count: int) -> list[str]:
    """Write JPEGs of 500 x 375 pixels with structure at every scale; return their paths."""
    folder.mkdir()
    rng, paths = np.random.default_rng(0), [str(folder / f"{number}.jpg") for number in range(count)]
    for path in paths:
        pixels = np.full((375, 500, 3), 128.0)
        for side in (4, 8, 16, 32, 64, 128, 256):
            octave = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize((500, 375))
            pixels += (np.asarray(octave) - 128.0) * 1.5 / side**0.6
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def loader_of(paths: list[str], workers: int, on: str) -> Any:
    cfg = engine.get_cfg_default()
    cfg.INPUT.TRANSFORMS, cfg.INPUT.INTERPOLATION = ("random_resized_crop", "random_flip", "normalize"), "bicubic"
    cfg.INPUT.CROP_ON, cfg.DATALOADER.NUM_WORKERS = on, workers
    with contextlib.redirect_stdout(io.StringIO()):
        transform = engine.build_transform(cfg)
    items = [SimpleNamespace(impath=path, label=0, domain=0) for path in paths]
    return engine.build_data_loader(cfg, "RandomSampler", items, BATCH, tfm=transform)


def decode(paths: list[str], device: str) -> list[Tensor]:
    """Return decoded JPEGs (3, H, W) on a device."""
    return decode_jpeg([torch.from_numpy(np.fromfile(path, np.uint8)) for path in paths], ImageReadMode.RGB, device)


def differences(paths: list[str], device: str) -> list[dict[str, str]]:
    """Compare decoded images and crops with Pillow's."""
    images, decoded = [read_rgb(path) for path in paths], decode(paths, device)
    theirs = [v2.functional.pil_to_tensor(image) for image in images]

    def cropped(images: list[Any]) -> list[Tensor]:
        torch.manual_seed(0)
        return [v2.functional.to_image(CROP(image)) for image in images]

    def row(name: str, *sides: list[Tensor]) -> dict[str, str]:
        one, other = (torch.cat([image.flatten().cpu().int() for image in side]) for side in sides)
        off = (one - other).abs()
        shares = {f"more than {most}": f"{(off > most).float().mean():.3%}" for most in (0, 1, 4)}
        return {"": name, "largest": str(off.max().item()), "mean": f"{off.float().mean():.3f}", **shares}

    return [
        row(f"decoded on {device}", decoded, theirs),
        row("cropped on tensors", cropped(theirs), cropped(images)),
        row(f"decoded and cropped on {device}", cropped(decoded), cropped(images)),
    ]


if __name__ == "__main__":
    main()
