"""Measure a CoOpGRAM step's memory and time against the number of classes, with each setting of TRAINER.MEMORY.

    python scripts/bench/classes.py --output docs/benchmarks/classes       # ViT-B/16 shapes; .json and .svg
    python scripts/bench/classes.py --classes 1000 --settings plain automatic --parts whole
    python scripts/bench/classes.py --images 1 4 8 --settings plain layers --parts images

The part "images" is a UniGRAM step (2 + 2 tokens) over 10 classes, against the images in its batch. A measurement that
is in the JSON file already is not repeated; a file has measurements of one backbone, precision, batch, device and
number of threads. `--repeats 0` times only the first step, whose memory is measured.
"""

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import common
import pandas
import torch
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode

from gram_meta.backbone.clip import Backbone
from gram_meta.engine.options import extend_cfg
from gram_meta.files import read_json, write_json
from gram_meta.method.apply import Regulation
from gram_meta.method.prompts import PromptedCLIP, initial_prompts, logits
from gram_meta.method.regulator import GradientRegulator
from gram_meta.trainers import memory

COUNTS = (10, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
PLAIN = "plain"
SETTINGS: dict[str, dict[str, Any]] = {  # of TRAINER.MEMORY, where not its defaults
    PLAIN: {"CHECKPOINTING": "never"},
    "automatic": {},
    "layers": {"CHECKPOINTING": "always", "TEXT_BUDGET": 1000.0},
    "128 at a time": {"CLASSES": 128},
}
TEXT, WHOLE, IMAGES = PARTS = ("text", "whole", "images")
FEW = 10  # classes where images are counted
MOST = 8e9  # bytes by arithmetic; what needs more without a saving is not tried
Row = dict[str, Any]  # a measurement; "size" is the number of classes, or of images in the part "images"


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--classes", type=int, nargs="+", default=COUNTS)
    options.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    options.add_argument("--parts", nargs="+", choices=PARTS, default=[TEXT])
    options.add_argument("--images", type=int, nargs="+", default=(1, 2, 4, 8), help="batches of the part images")
    options.add_argument("--batch", type=int, default=32)
    args = options.parse_args()
    path = args.output.with_suffix(".json") if args.output else None
    here = conditions(args)
    rows: list[Row] = kept_rows(path, here) if path and path.exists() else []
    known = {(row["part"], row["setting"], row["size"]) for row in rows}
    for part, setting in itertools.product(args.parts, args.settings):
        sizes = args.images if part == IMAGES else args.classes
        for row in in_own_process(args, [size for size in sizes if (part, setting, size) not in known], setting, part):
            rows.append(row | {"conditions": here})
            rows.sort(key=lambda row: (row["part"], row["size"], list(SETTINGS).index(row["setting"])))
            if path:
                write_json(path, rows)
    print_rows(rows)
    if args.output and TEXT in args.parts:
        draw(rows, args.output.with_suffix(".svg"))


def conditions(args: argparse.Namespace) -> Row:
    """Return what all measurements of a file have in common."""
    threads = args.threads or torch.get_num_threads()
    same = {name: getattr(args, name) for name in ("backbone", "precision", "batch", "device", "clock")}
    return same | {"threads": threads}


def kept_rows(path: Path, wanted: Row) -> list[Row]:
    """Return the measurements in a file; refuse those under other conditions, or of an earlier version without any."""
    rows: list[Row] = read_json(path)
    for row in rows:
        if (found := row.get("conditions")) != wanted:
            raise SystemExit(f"{path}: expected measurements of {wanted}, found {found}; choose another --output")
    return rows


class Step:
    """A CoOpGRAM training step, or a UniGRAM step in the part "images", as the trainer takes it."""

    def __init__(self, args: argparse.Namespace, backbone: Backbone, size: int, setting: str, part: str) -> None:
        classes, batch = (FEW, size) if part == IMAGES else (size, args.batch)
        tokens = (2, 2, "a photo") if part == IMAGES else (4, 0, "a photo of a")
        self.backbone, device = backbone, backbone.device
        self.model = PromptedCLIP(backbone, common.class_names(classes), initial_prompts(backbone, *tokens))
        tree = CfgNode({node: CfgNode() for node in ("TRAINER", "DATASET", "TEST", "TRAIN")})
        extend_cfg(tree)
        tree.TRAINER.MEMORY.merge_from_other_cfg(CfgNode(SETTINGS[setting]))
        memory.arrange(self.model, tree.TRAINER.MEMORY, batch)
        prompts = self.model.prompts()
        self.optimiser = torch.optim.SGD(prompts.values(), lr=0.002, momentum=0.9, weight_decay=5e-4)
        regulator = GradientRegulator({kind: value.shape[-1] for kind, value in prompts.items()}).to(device)
        Regulation(prompts, regulator).attach(self.optimiser)
        self.images = torch.randn(batch, 3, backbone.image_size, backbone.image_size, device=device)
        self.features = F.normalize(torch.randn(batch, backbone.embed_dim), dim=-1).to(device)
        self.labels = torch.arange(batch, device=device) % classes

    def text(self) -> None:
        self._learn(logits(self.features, self.model.class_features(), self.backbone.logit_scale))

    def whole(self) -> None:
        self._learn(self.model(self.images))

    def _learn(self, scores: Tensor) -> None:
        self.optimiser.zero_grad()
        loss = F.cross_entropy(scores, self.labels)
        loss.backward()
        self.optimiser.step()
        self.loss = loss.item()


def measure(args: argparse.Namespace, size: int, setting: str, part: str) -> Row:
    """Measure memory and time of one step; of what is too large by arithmetic, return the estimate alone."""
    backbone = common.begin(args)
    step = Step(args, backbone, size, setting, part)
    text = step.model.class_text
    expected = memory.image_bytes(backbone, size, 2) if part == IMAGES else memory.text_bytes(text)
    row: Row = {"part": part, "size": size, "setting": setting, "estimate_mb": round(expected / 1e6)}
    if setting == PLAIN and expected > MOST:
        return row
    run = step.text if part == TEXT else step.whole
    common.product_rate(args, 64, 512)  # fills the libraries' own buffers
    peak, first = common.with_peak(lambda: common.timed(run, args), args.device)
    row |= {"peak_mb": round(peak), "loss": step.loss, "chunk": text.chunk, "layers": bool(backbone.checkpointing)}
    seconds = statistics.median([common.timed(run, args) for _ in range(args.repeats)] or [first])
    return row | {"seconds": seconds, "load": os.getloadavg()[0], "environment": common.environment(args)}


def in_own_process(args: argparse.Namespace, sizes: Sequence[int], setting: str, part: str) -> Iterator[Row]:
    """Yield the measurements of one setting, each as soon as it is there."""
    with common.own_process() as process:
        for size in sizes:
            try:
                row = process.submit(measure, args, size, setting, part).result()
            except BrokenProcessPool:
                print(f"{part}, {setting}, {size}: the process ended (perhaps for lack of memory)", file=sys.stderr)
                return
            print(f"{part}, {setting}, {size}: {cell(row)}", file=sys.stderr, flush=True)
            yield row


def print_rows(rows: Sequence[Row]) -> None:
    """Print a table for each part: a line for a number of classes, peak memory and time for each setting."""
    for part in PARTS:
        lines: dict[int, Row] = {}
        for row in (row for row in rows if row["part"] == part):
            title = "images" if part == IMAGES else "classes"
            lines.setdefault(row["size"], {title: f"{row['size']:,}"})[row["setting"]] = cell(row)
        if lines:
            print(f"{part}: peak memory, time, and classes at a time\n")
            common.print_table([lines[size] for size in sorted(lines)])


def cell(row: Row) -> str:
    if "peak_mb" not in row:
        return f"({row['estimate_mb']:,} MB by arithmetic)"
    return f"{row['peak_mb']:,} MB, {1000 * row['seconds']:,.0f} ms" + f" [{row['chunk']}]" * bool(row["chunk"])


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the peak memory of the text part against classes, both logarithmic."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "classes"  # the same bytes from the same numbers
    frame = pandas.DataFrame([row for row in rows if row["part"] == TEXT])
    lines = frame.pivot(index="size", columns="setting", values="peak_mb")
    lines["plain, by arithmetic"] = frame[frame.setting == PLAIN].set_index("size").estimate_mb
    axes = lines.plot(style=["-o", "--^", ":s", "-D", "-"][: lines.shape[1]], logx=True, logy=True, markersize=4)
    axes.set(xlabel="classes", ylabel="peak memory of the text part (MB)")
    axes.figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
