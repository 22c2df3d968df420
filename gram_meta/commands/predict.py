"""`gram predict`: classes of your own images."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gram_meta.tools.predict import Prediction, Predictor

HELP = """Say which class each IMAGE is, with the prompts of a run; no dataset is needed.

IMAGE is a file, or a folder, whose images are found by their suffixes, subfolders too, in sorted order. RUN is the
output folder of `gram train` or of CoOp's own train.py, a checkpoint in it, or a meta-checkpoint (.safetensors).
Results go to stdout or to -o; images that cannot be read go to stderr with the reason, are left out, and are counted.

  gram predict --model-dir output/dtd/CoOpGRAM/seed1 photo.jpg holiday/
  gram predict --model-dir output/dtd/CoOpGRAM/seed1 holiday/ --topk 5 -o holiday.csv
  gram predict --model-dir meta/best.safetensors --classes "cat, dog, sea lion" photo.jpg

The exit status is 0 if at least one image was classified, 1 if none was, 2 for bad input."""

FORMATS = ("text", "csv", "json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image files and folders of them")
    add("--model-dir", required=True, metavar="RUN", help="folder of a run, or a checkpoint")
    add("--load-epoch", type=int, metavar="N", help="epoch of the prompts; default: the one the run was tested with")
    add(
        "--classes",
        metavar="NAMES|FILE",
        help='other classes than those of training: "cat, dog, sea lion", a file with a name a line, or a '
        "split_zhou_*.json",
    )
    add("--topk", type=int, default=1, metavar="K", help="classes to name for each image; default: 1")
    add("--format", choices=FORMATS, help="default: by the suffix of -o, else text")
    add("-o", "--out", metavar="FILE", help="write there instead of stdout, all of it or nothing")
    add("--backbone", default="", metavar="NAME", help="CLIP: a name or a file; default: the run's")
    add("--device", default="", help="cpu, cuda, cuda:1, mps; default: cuda where there is one")
    add(
        "--precision",
        choices=("fp32", "fp16", "bf16", "amp"),
        default="",
        help="of CLIP; default: the run's on a GPU, fp32 on a CPU",
    )
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="images in one pass; default: 32 on a CPU, on a GPU by its free memory and the model, up to 256",
    )
    add(
        "--workers",
        type=int,
        metavar="N",
        help="processes that read images; default: none on a CPU or for few images, else one for each core, up to 8",
    )


def run(args: argparse.Namespace) -> int:
    import os
    import sys

    from gram_meta.errors import GramError

    if args.topk < 1:
        raise GramError(f"--topk: expected at least 1, found {args.topk}")
    from gram_meta.tools.predict import Predictor

    predictor = Predictor.load(
        args.model_dir,
        classes=args.classes,
        epoch=args.load_epoch,
        backbone=args.backbone,
        device=args.device,
        precision=args.precision,
        batch_size=args.batch_size,
        workers=args.workers,
    )
    print(_headline(predictor), file=sys.stderr)
    style = args.format or _style_of(args.out)
    counted = _Counted(predictor.stream(args.images), bar=_wants_bar(args))
    try:
        if args.out:
            from gram_meta.files import atomic_write

            with atomic_write(args.out, "w") as file:
                WRITERS[style](file, counted, args.topk)
        else:
            WRITERS[style](sys.stdout, counted, args.topk)
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        raise GramError(f"{args.out or 'stdout'}: expected to be able to write there ({error.strerror})") from None
    print(counted.summary(), file=sys.stderr)
    return 0 if counted.classified else 1


def _headline(predictor: Predictor) -> str:
    saved, backbone = predictor.saved, predictor.backbone
    epoch = f" of epoch {saved.epoch}" if saved.epoch else ""
    what = f"{saved.trainer}{epoch} ({saved.path})"
    return (
        f"{what}, {len(predictor.classnames)} classes, {backbone.name} in {backbone.precision} on {backbone.device}, "
        f"batches of {predictor.batch_size}"
    )


def _style_of(out: str | None) -> str:
    suffix = (out or "").rpartition(".")[2].lower()
    return suffix if suffix in FORMATS else "text"


def _wants_bar(args: argparse.Namespace) -> bool:
    """A bar on a terminal, unless the results themselves run over it."""
    import sys

    return sys.stderr.isatty() and (bool(args.out) or not sys.stdout.isatty())


class _Counted:
    """Yield the predictions to write; print the others on stderr, and show a progress bar if it takes long."""

    def __init__(self, predictions: Iterable[Prediction], bar: bool) -> None:
        self.predictions, self.bar = predictions, bar
        self.classified = 0
        self.skipped: dict[str, int] = {}

    def __iter__(self) -> Iterator[Prediction]:
        from gram_meta.progress import progress_bar

        with progress_bar(self.predictions, unit="image", shown=self.bar, delay=3, smoothing=0.05) as bar:
            for row in bar:
                if row.error:
                    self.skipped[row.error] = self.skipped.get(row.error, 0) + 1
                    bar.write(f"{_printable(row.image)}: {row.error}; left out", file=_stderr())
                else:
                    self.classified += 1
                    yield row

    def summary(self) -> str:
        text = f"{self.classified} {'image' if self.classified == 1 else 'images'} classified"
        if self.skipped:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(self.skipped.items()))
            text += f", {sum(self.skipped.values())} left out ({reasons})"
        return text


def _stderr() -> IO[str]:
    import sys

    return sys.stderr


def _printable(path: str) -> str:
    """A file's name may be no text; what stands for its stray bytes cannot be written."""
    import os

    return os.fsencode(path).decode("utf-8", "replace")


# ----------------------------------------------------------------------------------------------------------- formats


def write_text(file: IO[str], rows: Iterable[Prediction], topk: int) -> None:
    """`photo.jpg: sea lion 97.3 %, dog 1.2 %`"""
    for row in rows:
        classes = ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in row.top(topk))
        file.write(f"{_printable(row.image)}: {classes}\n")


def write_csv(file: IO[str], rows: Iterable[Prediction], topk: int) -> None:
    """A line for each of an image's classes, best first."""
    import csv

    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["image", "rank", "class", "probability"])
    for row in rows:
        for rank, (name, probability) in enumerate(row.top(topk), 1):
            writer.writerow([_printable(row.image), rank, name, _digits(probability)])


def write_json(file: IO[str], rows: Iterable[Prediction], topk: int) -> None:
    """A list with an object for each image, a line each, written as they come."""
    from gram_meta.files import to_json

    between = "[\n"
    for row in rows:
        classes = [{"class": name, "probability": _digits(value)} for name, value in row.top(topk)]
        line = to_json({"image": _printable(row.image), "classes": classes}, row.image)
        file.write(f"{between}  {line}")
        between = ",\n"
    file.write("[]\n" if between == "[\n" else "\n]\n")


def _digits(probability: float) -> float:
    """All that float32 holds, and no more."""
    return float(f"{probability:.8g}")


WRITERS: dict[str, Callable[[IO[str], Iterable[Prediction], int], Any]] = {
    "text": write_text,
    "csv": write_csv,
    "json": write_json,
}
