"""Classification of your own images with the prompts of a run: no dataset, no data manager.

Probabilities are the softmax of the logits that the trainer's own evaluation computes (Eq. 1), by the same code.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import chain, islice
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from gram_meta.backbone.clip import PACKAGED, RUN_PRECISIONS, Backbone
from gram_meta.backbone.footprint import forward_bytes
from gram_meta.config import COMMAND_BOUNDS, check_bounds, flatten
from gram_meta.corpus.loading import run_ahead
from gram_meta.corpus.sources.rows import IMAGE_SUFFIXES
from gram_meta.errors import GramError, in_one_line
from gram_meta.files import PathLike
from gram_meta.images import BROKEN, BadImage, as_rgb, decode_image, file_content
from gram_meta.processes import ALONE, device_for, workers_for
from gram_meta.runs.reader import Saved, infer_trainer, load_clip_of, read_classes, read_saved

if TYPE_CHECKING:
    from torch import Tensor

Source = str | os.PathLike[str] | Image.Image
Transform = Callable[[Image.Image], "Tensor"]

NO_IMAGES = "no image files in this folder"
CPU_BATCH = 32
GPU_BATCH = 256
FEW = 128  # images that one process decodes before others would have started


@dataclass(frozen=True)
class Prediction:
    """The class of one image."""

    image: str  # its path; "" for a PIL image that has none
    classnames: Sequence[str]  # N names, in the order of `probabilities`
    probabilities: np.ndarray = field(repr=False)  # (N,) float32, summing to 1; empty if the image could not be read
    error: str = ""  # why it could not be read, such as "broken image"; "" if it was read

    @property
    def classname(self) -> str:
        """The most probable class; "" if the image could not be read."""
        return "" if self.error else self.classnames[int(self.probabilities.argmax())]

    @property
    def probability(self) -> float:
        """The probability of that class; NaN if the image could not be read."""
        return float("nan") if self.error else float(self.probabilities.max())

    def top(self, k: int) -> list[tuple[str, float]]:
        """Return the k most probable classes (all, if there are fewer) with their probabilities, best first."""
        order = np.argsort(-self.probabilities, kind="stable")[:k]
        return [(self.classnames[index], float(self.probabilities[index])) for index in order]


class Predictor:
    """A frozen classifier, callable on images; make one with `Predictor.load`.

    Attributes:
        saved: the contents of the run.
        backbone: its CLIP.
        classnames: the classes to choose from.
        batch_size: images in one pass.
        workers: processes that read images ahead; 0: none.
        as_coop: whether images are decoded as CoOp does (DATALOADER.COOP_DECODING of the run).
    """

    def __init__(
        self,
        classifier: Any,
        saved: Saved,
        transform: Transform,
        batch_size: int | None = None,
        workers: int | None = None,
    ) -> None:
        self.saved = saved
        self.backbone: Backbone = classifier.backbone
        self.classnames: list[str] = classifier.classnames
        self.transform = transform
        self.batch_size = batch_size or default_batch_size(self.backbone)
        self.workers = workers
        self.as_coop = bool(saved.config.get("DATALOADER.COOP_DECODING"))
        self._classifier = classifier

    @classmethod
    def load(
        cls,
        run: PathLike,
        *,
        classes: Sequence[str] | str | None = None,
        epoch: int | None = None,
        backbone: str = "",
        device: str = "",
        precision: str = "",
        batch_size: int | None = None,
        workers: int | None = None,
    ) -> Predictor:
        """Build the classifier of a run. The class prompts are encoded here, once (CoCoOp's depend on the image).

        Args:
            run: an output folder of this project's or of an official CoOp's trainer, a checkpoint in one, or a
                meta-checkpoint (.safetensors); see `gram_meta.runs.reader.read_saved`.
            classes: other class names than those of training, or a file of them (see `read_classes`). They are required
                for an official run and for a meta-checkpoint, which do not hold any.
            epoch: of the checkpoint; default: the one that the run was tested with.
            backbone: name or file of the CLIP; default: the run's.
            device: "cpu", "cuda", "cuda:1", "mps"; default: cuda if there is one, else cpu.
            precision: "fp32", "tf32", "fp16", "bf16" or "amp"; default: the run's on a GPU, float32 on a CPU.
            batch_size: images in one pass; default: see `default_batch_size`.
            workers: processes that read images ahead; default: see `workers_for`.

        Raises:
            GramError: no classifier at `run`, another backbone than that of the prompts, missing class names.
        """
        check_bounds({"batch size": batch_size, "workers": workers}, COMMAND_BOUNDS)
        saved = read_saved(run, epoch)
        saved.trainer = saved.trainer or infer_trainer(saved)
        trainer = _trainer(saved)
        names = _classes(saved, classes, os.fspath(run))
        device = _device(device)
        cfg = _config(saved)
        of_run = cfg.TRAINER.get(trainer.node, {}).get("PREC", "fp32")
        precision = _precision(precision or of_run, asked=bool(precision), device=device)
        cfg.TRAINER[trainer.node].PREC = precision
        clip = load_clip_of(saved, backbone, {}, device, "fp32" if precision == "amp" else precision)
        _print_unknown_words(clip, names)
        if saved.template is not None and hasattr(trainer, "template"):
            trainer = type(trainer.__name__, (trainer,), {"template": lambda self: saved.template})
        with _notes_on_stderr():
            classifier = trainer.for_use(cfg, clip, names, saved.state_dict, os.fspath(saved.path))
            transform = _transform(saved, cfg, clip)
        return cls(classifier, saved, transform, batch_size, workers)

    def __call__(self, images: Source | Iterable[Source]) -> list[Prediction]:
        """Classify paths, folders (their images, sorted, subfolders too) and PIL images, in the given order.

        An image that cannot be read has an `error` instead of probabilities.
        """
        return list(self.stream(images))

    def stream(self, images: Source | Iterable[Source]) -> Iterator[Prediction]:
        """Yield the predictions one by one, with at most a few batches of images in memory."""
        sources = find_images([images] if isinstance(images, str | os.PathLike | Image.Image) else images)
        beginning = list(islice(sources, FEW + 1))
        workers = self.workers
        if workers is None:
            workers = workers_for(self.backbone.device) if len(beginning) > FEW else 0
        batches = _batches(chain(beginning, sources), self.batch_size)
        advice = f"expected enough memory for {workers} of them, try --workers 0"
        read, pin = partial(_read_batch, self.transform, self.as_coop), self.backbone.device.type == "cuda"
        for names, pixels, errors in run_ahead(read, batches, workers, advice, pin_memory=pin):
            probabilities = iter(self.probabilities(pixels) if pixels is not None else ())
            for name, error in zip(names, errors, strict=True):
                found = np.zeros(0, np.float32) if error else next(probabilities)
                yield Prediction(name, self.classnames, found, error)

    @torch.no_grad()
    def probabilities(self, pixels: Tensor) -> np.ndarray:
        """Return the probabilities (B, N), float32, of images (B, 3, H, W) that went through `transform`."""
        try:
            logits = self._classifier.model_inference(pixels.to(self.backbone.device, non_blocking=True))  # (B, N)
            return logits.float().softmax(dim=1).cpu().numpy()
        except torch.cuda.OutOfMemoryError:
            if len(pixels) == 1:
                found = "not enough memory for one image; expected more of it, or --device cpu"
                raise GramError(f"{self.backbone.device}: {found}") from None
        torch.cuda.empty_cache()
        return np.concatenate([self.probabilities(half) for half in pixels.tensor_split(2)])


def find_images(sources: Iterable[Source]) -> Iterator[Source]:
    """Yield the sources, with each folder replaced by the images in and below it, sorted.

    A folder without images is yielded itself, so that it can be reported.
    """
    for source in sources:
        if not isinstance(source, Image.Image) and os.path.isdir(source):
            found = _below(os.fspath(source), frozenset())
            first = next(found, None)
            yield from [source] if first is None else chain([first], found)
        else:
            yield source


def _below(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Yield the images below a folder. Linked folders are followed, but not back to a folder above on the path."""
    try:
        status = os.stat(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        print(f"{folder}: {error.strerror}; left out", file=sys.stderr)
        return
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue  # the file system's own, such as macOS's ._image.jpg
        if entry.is_dir():
            yield from _below(entry.path, above | {here})
        elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
            yield entry.path


Batch = tuple[list[str], list[Source]]  # names and images


def _batches(sources: Iterator[Source], size: int) -> Iterator[Batch]:
    while batch := list(islice(sources, size)):
        # a PIL image has no file's name in a worker process
        yield [os.fspath(getattr(it, "filename", "") if isinstance(it, Image.Image) else it) for it in batch], batch


def _read_batch(transform: Transform, as_coop: bool, batch: Batch) -> tuple[list[str], Tensor | None, list[str]]:
    """Return the names of a batch, its readable images (k, 3, H, W), None without any, and the errors of all."""
    names, sources = batch
    read = [_read(transform, as_coop, source) for source in sources]
    pixels = [pixel for pixel, _ in read if pixel is not None]
    return names, torch.stack(pixels) if pixels else None, [error for _, error in read]


def _read(transform: Transform, as_coop: bool, source: Source) -> tuple[Tensor | None, str]:
    """Return a path or PIL image as (3, H, W), or None and the reason why it cannot be read."""
    try:
        if isinstance(source, Image.Image):
            return transform(source.convert("RGB") if as_coop else as_rgb(source)), ""
        if os.path.isdir(source):
            return None, NO_IMAGES
        return transform(decode_image(file_content(Path(source)), as_coop)), ""
    except BadImage as error:
        return None, str(error)
    except Exception:  # noqa: BLE001 - some pixels raise only when they are used
        return None, BROKEN


def default_batch_size(backbone: Backbone) -> int:
    """Return the number of images in one pass.

    On a CPU it is 32: larger batches are not faster there. On a GPU it is the largest power of two, up to 256, whose
    activations take an eighth of the free memory by estimate; a batch that does not fit is halved.
    """
    if backbone.device.type != "cuda":
        return CPU_BATCH
    free, _ = torch.cuda.mem_get_info(backbone.device)
    fitting = max(1, free // 8 // forward_bytes(backbone))
    return min(GPU_BATCH, 1 << (fitting.bit_length() - 1))


def _device(name: str) -> str:
    """Return the device `name`, checked; by default cuda if there is one, else cpu."""
    name = device_for(ALONE, name)
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, ValueError) as error:
        found = in_one_line(error)
        raise GramError(f"--device {name}: expected a device of this machine, found none ({found})") from None
    return name


def _precision(name: str, asked: bool, device: str) -> str:
    if name not in RUN_PRECISIONS:
        raise GramError(f"--precision: expected one of {', '.join(RUN_PRECISIONS)}, found {name!r}")
    if device == "cpu" and (name == "amp" or not asked):
        return "fp32"  # 16 bits gain nothing on a CPU
    return name


def _trainer(saved: Saved) -> Any:
    """Return the class that the run's trainer names: this project's, else a registered one that has `for_use`."""
    import gram_meta.plugin  # noqa: F401, registers this project's trainers
    from gram_meta.engine import TRAINER_REGISTRY
    from gram_meta.engine.registries import own_trainers

    registered = {name: TRAINER_REGISTRY.get(name) for name in TRAINER_REGISTRY.registered_names()}
    trainers = [*registered.items(), *own_trainers.items()]  # those of a checkout can only train
    known = {name: trainer for name, trainer in trainers if hasattr(trainer, "for_use")}
    if saved.trainer not in known:
        raise GramError(f"{saved.path}: expected prompts of {', '.join(sorted(known))}, found those of {saved.trainer}")
    return known[saved.trainer]


def _classes(saved: Saved, given: Sequence[str] | str | None, run: str) -> list[str]:
    """Return the class names to choose from; a context per class (CSC) allows only those of training."""
    names = read_classes(given) if isinstance(given, str) else list(given) if given else saved.classnames
    if names is None:
        advice = "give --classes, such as a file of them or the dataset's split_zhou_*.json"
        raise GramError(f"{run}: expected class names in it, found none; {advice}")
    context = saved.state_dict.get("ctx")
    if context is None or context.dim() != 3:
        return names
    if saved.classnames is not None and names != saved.classnames:
        held = "a context for each class of training (CSC), and none for other classes"
        raise GramError(f"{saved.path}: holds {held}; expected no --classes")
    if len(names) != len(context):
        wanted = f"contexts for {len(context)} classes (CSC); expected as many names, in the order of training"
        raise GramError(f"{saved.path}: holds {wanted}, found {len(names)}")
    return names


def _config(saved: Saved) -> Any:
    """Return the run's configuration, completed with defaults, without options that this version does not know."""
    from gram_meta import engine
    from gram_meta.engine.options import extend_cfg

    cfg = engine.get_cfg_default().clone()
    cfg.defrost()
    extend_cfg(cfg)
    for key in flatten(cfg):
        if key in saved.config:
            *nodes, last = key.split(".")
            value = saved.config[key]
            reduce(getitem, nodes, cfg)[last] = tuple(value) if isinstance(value, list) else value
    return cfg


def _transform(saved: Saved, cfg: Any, backbone: Backbone) -> Transform:
    """Return the run's transform for tests, at the backbone's size; CLIP's if no file names the run's."""
    if "INPUT.TRANSFORMS" not in saved.config:
        return backbone.preprocess()
    from gram_meta import engine

    cfg.INPUT.SIZE = (backbone.image_size, backbone.image_size)
    if cfg.INPUT.get("CROP_ON") == "device":
        cfg.INPUT.CROP_ON = "tensors"  # other processes may read
    return engine.build_transform(cfg, is_train=False)


def _print_unknown_words(backbone: Backbone, names: Sequence[str]) -> None:
    """Print a note about classes whose words are not in the small vocabulary of the packaged CLIP."""
    if backbone.name != PACKAGED:
        return
    from gram_meta.backbone.packaged import untrained_tokens

    unknown = list(untrained_tokens([name.replace("_", " ") for name in names]))
    if unknown:
        some = ", ".join(unknown[:5] + ["..."] * (len(unknown) > 5))
        seen = f"{PACKAGED} has never seen words of {len(unknown)} of {len(names)} classes"
        print(f"Note: {seen} ({some})", file=sys.stderr)


@contextlib.contextmanager
def _notes_on_stderr() -> Iterator[None]:
    """Drop what trainers print while they are built, except notes and warnings, which go to stderr."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            if re.match(r"(Note|Warning)\b", line):
                print(line, file=sys.stderr)
