"""`gram predict`: classes of your own images."""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import IO, TYPE_CHECKING, Any

from gram_meta.errors import GramError, as_gram_error
from gram_meta.files import atomic_write, to_json

if TYPE_CHECKING:
    from gram_meta.tools.predict import Prediction, Predictor

HELP = """Classify each IMAGE with the prompts of a run; no dataset is needed.

IMAGE is a file, or a folder, which is searched with its subfolders. RUN is the output folder of `gram train` or of
CoOp's own train.py, a checkpoint in it, or a meta-checkpoint (.safetensors). Images that cannot be read are reported.

  gram predict --model-dir output/dtd/CoOpGRAM/seed1 holiday/ --topk 5 -o holiday.csv
  gram predict --model-dir meta/best.safetensors --classes "cat, dog, sea lion" photo.jpg

The exit status is 0 if at least one image was classified, 1 if none was, 2 for bad input."""

FORMATS = ("text", "csv", "json")
OPTIONS = ("classes", "backbone", "device", "precision", "batch_size", "workers")  # also of `Predictor.load`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image files and folders of them")
    add("--model-dir", required=True, metavar="RUN", help="folder of a run, or a checkpoint")
    add("--load-epoch", type=int, metavar="N", help="epoch of the prompts; default: the one the run was tested with")
    names = '"cat, dog, sea lion", a file with a name a line, or a split_zhou_*.json'
    add("--classes", metavar="NAMES|FILE", help=f"other classes than those of training: {names}")
    add("--topk", type=int, default=1, metavar="K", help="classes to name for each image; default: 1")
    add("--format", choices=FORMATS, help="default: by the suffix of -o, else text")
    add("-o", "--out", metavar="FILE", help="write there instead of stdout, all of it or nothing")
    add("--backbone", default="", metavar="NAME", help="CLIP: a name or a file; default: the run's")
    add("--device", default="", help="cpu, cuda, cuda:1, mps; default: cuda where there is one")
    precision = "of CLIP; default: the run's on a GPU, fp32 on a CPU"
    add("--precision", choices=("fp32", "tf32", "fp16", "bf16", "amp"), default="", help=precision)
    batch = "images in one pass; default: 32 on a CPU, on a GPU by its free memory and the model, up to 256"
    add("--batch-size", type=int, metavar="N", help=batch)
    beside = "processes that read images; default: none on a CPU or for few images, else one for each core, up to 8"
    add("--workers", type=int, metavar="N", help=beside)


def run(args: argparse.Namespace) -> int:
    if args.topk < 1:
        raise GramError(f"--topk: expected at least 1, found {args.topk}")
    from gram_meta.tools.predict import Predictor

    options = {name: getattr(args, name) for name in OPTIONS}
    predictor = Predictor.load(args.model_dir, epoch=args.load_epoch, **options)
    print(_headline(predictor), file=sys.stderr)
    write = WRITERS[args.format or _style_of(args.out)]
    counts: Counter[str] = Counter()
    bar = sys.stderr.isatty() and (bool(args.out) or not sys.stdout.isatty())  # results do not run over it
    rows = _readable(predictor.stream(args.images), counts, bar)
    try:
        output = atomic_write(args.out, "w") if args.out else nullcontext(sys.stdout)
        with as_gram_error(args.out or "stdout"), output as file:
            write(file, rows, args.topk)
            file.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    print(_summary(counts), file=sys.stderr)
    return 0 if counts[""] else 1


def _headline(predictor: Predictor) -> str:
    saved, backbone = predictor.saved, predictor.backbone
    epoch = f" of epoch {saved.epoch}" if saved.epoch else ""
    what = f"{saved.trainer}{epoch} ({saved.path}), {len(predictor.classnames)} classes"
    where = f"{backbone.name} in {backbone.precision} on {backbone.device}"
    return f"{what}, {where}, batches of {predictor.batch_size}"


def _style_of(out: str | None) -> str:
    suffix = (out or "").rpartition(".")[2].lower()
    return suffix if suffix in FORMATS else "text"


def _readable(predictions: Iterable[Prediction], counts: Counter[str], bar: bool) -> Iterator[Prediction]:
    """Yield the predictions of readable images, and print the others on stderr; count each error, and "" for none."""
    from gram_meta.progress import progress_bar

    with progress_bar(predictions, unit="image", shown=bar, delay=3, smoothing=0.05) as shown:
        for row in shown:
            counts[row.error] += 1
            if row.error:
                shown.write(f"{_printable(row.image)}: {row.error}; left out", file=sys.stderr)
            else:
                yield row


def _summary(counts: Counter[str]) -> str:
    classified, skipped = counts[""], counts.total() - counts[""]
    text = f"{classified} {'image' if classified == 1 else 'images'} classified"
    if not skipped:
        return text
    reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(counts.items()) if reason)
    return f"{text}, {skipped} left out ({reasons})"


def _printable(path: str) -> str:
    """Return a path as text; bytes of a file's name that are no text are replaced."""
    return os.fsencode(path).decode("utf-8", "replace")


# ----------------------------------------------------------------------------------------------------------- formats


def write_text(file: IO[str], rows: Iterable[Prediction], topk: int) -> None:
    """Write a line like `photo.jpg: sea lion 97.3 %, dog 1.2 %` for each image."""
    for row in rows:
        classes = ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in row.top(topk))
        file.write(f"{_printable(row.image)}: {classes}\n")


def write_csv(file: IO[str], rows: Iterable[Prediction], topk: int) -> None:
    """Write a line for each of an image's classes, best first."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["image", "rank", "class", "probability"])
    for row in rows:
        for rank, (name, probability) in enumerate(row.top(topk), 1):
            writer.writerow([_printable(row.image), rank, name, _digits(probability)])


def write_json(file: IO[str], rows: Iterable[Prediction], topk: int) -> None:
    """Write a list with an object for each image, a line each, as they come."""
    between = "[\n"
    for row in rows:
        classes = [{"class": name, "probability": _digits(value)} for name, value in row.top(topk)]
        line = to_json({"image": _printable(row.image), "classes": classes}, row.image)
        file.write(f"{between}  {line}")
        between = ",\n"
    file.write("[]\n" if between == "[\n" else "\n]\n")


def _digits(probability: float) -> float:
    """Return the digits that float32 holds."""
    return float(f"{probability:.8g}")


WRITERS: dict[str, Any] = {"text": write_text, "csv": write_csv, "json": write_json}
