"""Measure a CoOpGRAM step's memory and time against the number of classes, with each setting of TRAINER.MEMORY.

Every setting runs in a process of its own, from few classes to many. The text part: class sentences -> features -> logits against fixed image
features -> loss -> gradient of the context -> regulator -> SGD. The whole step has the image tower in front. Class names are
ImageNet's (torchvision's list), drawn at random below 1,000, with made-up ones of that manner above. The part "images" is a
UniGRAM step (2 + 2 tokens) over 10 classes, against the images in its batch.

    python scripts/bench/classes.py --output docs/benchmarks/classes       # ViT-B/16 shapes; .json, .csv, .svg
    python scripts/bench/classes.py --classes 1000 --settings plain automatic --parts whole
    python scripts/bench/classes.py --images 1 4 8 --settings plain layers --parts images

A measurement that stands in the JSON file already is not repeated. `--repeats 0` times the first step, whose memory is
measured, and no other.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode

from gram_meta.backbone.clip import Backbone
from gram_meta.method.prompts import PromptedCLIP, initial_prompts, logits
from gram_meta.trainers import memory

COUNTS = (10, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
PLAIN, AUTOMATIC, LAYERS, CHUNKS = "plain", "automatic", "layers", "128 at a time"
SETTINGS: dict[str, dict[str, Any]] = {  # of TRAINER.MEMORY, where not its defaults
    PLAIN: {"CHECKPOINT": "never"},
    AUTOMATIC: {},
    LAYERS: {"CHECKPOINTING": "always", "TEXT_BUDGET": 1000.0},
    CHUNKS: {"CLASSES": 128},
}
TEXT, WHOLE, IMAGES = "text", "whole", "images"
FEW = 10  # classes where images are counted
Row = dict[str, Any]


def main() -> None:
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("--classes", type=int, nargs="+", default=COUNTS)
    options.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    options.add_argument("--parts", nargs="+", choices=(TEXT, WHOLE, IMAGES), default=[TEXT])
    options.add_argument("--images", type=int, nargs="+", default=(1, 2, 4, 8), help="batches of the part images")
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--most", type=float, default=8.0, help="GB; larger ones by arithmetic are left out")
    options.add_argument("--output", type=Path, help="results, with .json, .csv and .svg behind")
    options.add_argument("--one", nargs="+", metavar="PART SETTING CLASSES", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.one:
        part, setting, *counts = args.one
        backbone = common.begin(args)
        common.product_rate(args, 64, 512)  # the libraries' own buffers
        for count in counts:
            print(json.dumps(measure(args, backbone, int(count), setting, part)), flush=True)
        return
    rows = read(args.output)
    for part in args.parts:
        for setting in args.settings:
            counts = args.images if part == IMAGES else args.classes
            missing = [n for n in counts if not any(is_of(row, n, setting, part) for row in rows)]
            for found in in_own_process(missing, setting, part) if missing else ():
                rows.append(found)
                write(args.output, rows)
    print_rows(rows)
    if args.output:
        draw(rows, args.output.with_suffix(".svg"))


# --- one measurement --------------------------------------------------------------------------------------------------


class Step:
    """A CoOpGRAM training step, as its trainer takes it."""

    def __init__(self, args: argparse.Namespace, backbone: Backbone, count: int, setting: str, part: str) -> None:
        count, batch = (FEW, count) if part == IMAGES else (count, args.batch)
        tokens = (2, 2, "a photo") if part == IMAGES else (4, 0, "a photo of a")
        self.backbone = backbone
        self.model = PromptedCLIP(backbone, names(count), initial_prompts(backbone, *tokens))
        self.model.requires_grad_(False).prompt_learner.requires_grad_(True)
        self.prompts = self.model.prompt_learner.prompts()
        self.settings = settings(setting)
        self.summary = memory.arrange(self.model, self.settings, batch)
        self.regulator = common.regulator_for(self.prompts).to(backbone.device)
        self.optimiser = torch.optim.SGD(self.prompts.values(), lr=0.002, momentum=0.9, weight_decay=5e-4)
        size = self.backbone.image_size
        self.images = torch.randn(batch, 3, size, size, device=self.backbone.device)
        self.features = F.normalize(torch.randn(batch, self.backbone.embed_dim), dim=-1).to(args.device)
        self.labels = torch.arange(batch, device=args.device) % count

    def text(self) -> float:
        return self._learn(logits(self.features, self.model.class_features(), self.backbone.logit_scale))

    def whole(self) -> float:
        return self._learn(self.model(self.images))

    def _learn(self, scores: Tensor) -> float:
        self.optimiser.zero_grad()
        loss = F.cross_entropy(scores, self.labels)
        loss.backward()
        with torch.no_grad():
            gradients = {kind: prompt.grad for kind, prompt in self.prompts.items()}
            for kind, gradient in self.regulator(gradients).items():
                self.prompts[kind].grad = gradient
        self.optimiser.step()
        return loss.item()


def measure(args: argparse.Namespace, backbone: Backbone, count: int, setting: str, part: str) -> Row:
    step = Step(args, backbone, count, setting, part)
    text = step.model.class_text
    expected = memory.image_bytes(backbone, count, 2) if part == IMAGES else memory.text_bytes(text)
    if setting == PLAIN and expected > args.most * memory.GB:
        return row(count, setting, part, expected, left_out=f"more than {args.most:g} GB by arithmetic")
    run: Callable[[], float] = step.text if part == TEXT else step.whole
    spent = common.stopwatch(args)
    peak, loss = common.with_peak(run, args.device)
    first = spent()
    seconds = [common.timed(run, args) for _ in range(args.repeats)] or [first]
    return row(
        count,
        setting,
        part,
        expected,
        peak_mb=round(peak),
        seconds=sorted(seconds)[len(seconds) // 2],
        loss=loss,
        chunk=text.chunk,
        layers=bool(step.backbone.checkpointing),
        length=text.ids.shape[1],
        tokens=int((text.ends + 1).sum()),
        said=step.summary,
        load=os.getloadavg()[0],
        environment=common.environment(args),
    )


def row(count: int, setting: str, part: str, expected: float, **found: Any) -> Row:
    sizes = {"classes": FEW, "images": count} if part == IMAGES else {"classes": count}
    return {**sizes, "setting": setting, "part": part, "estimate_mb": round(expected / 1e6), **found}


def settings(name: str) -> CfgNode:
    from gram_meta.engine.options import extend_cfg

    tree = CfgNode({"TRAINER": CfgNode(), "DATASET": CfgNode(), "TEST": CfgNode(), "TRAIN": CfgNode()})
    extend_cfg(tree)
    for key, value in SETTINGS[name].items():
        tree.TRAINER.MEMORY[key] = value
    return tree.TRAINER.MEMORY


def names(count: int) -> list[str]:
    """ImageNet's class names, some of them, or all and made-up ones behind them."""
    from torchvision.models import ViT_B_16_Weights

    real = list(ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"])
    if count <= len(real):
        return random.Random(0).sample(real, count)
    made_up = [name for name in common.class_names(count) if name not in set(real)]
    return (real + made_up)[:count]


# --- all of them ------------------------------------------------------------------------------------------------------


def in_own_process(counts: Sequence[int], setting: str, part: str) -> Iterator[Row]:
    command = [sys.executable, *sys.argv, "--one", part, setting, *map(str, counts)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            found = json.loads(line)
            peak = found.get("peak_mb", found.get("left_out"))
            print(f"{part}, {setting}, {size(found)}: {peak}", file=sys.stderr, flush=True)
            yield found
    if process.returncode:
        print(f"{part}, {setting}: stopped with {process.returncode}", file=sys.stderr)


def is_of(found: Row, count: int, setting: str, part: str) -> bool:
    return (size(found), found["setting"], found["part"]) == (count, setting, part)


def size(found: Row) -> int:
    """Images where they are counted, else classes."""
    return found.get("images", found["classes"])


def read(output: Path | None) -> list[Row]:
    path = output.with_suffix(".json") if output else None
    return json.loads(path.read_text()) if path and path.exists() else []


def write(output: Path | None, rows: Sequence[Row]) -> None:
    if output is None:
        return
    rows = sorted(rows, key=lambda row: (row["part"], size(row), list(SETTINGS).index(row["setting"])))
    output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    columns = ["part", "classes", "setting", "chunk", "layers", "estimate_mb", "peak_mb", "seconds", "loss", "load"]
    with output.with_suffix(".csv").open("w", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def print_rows(rows: Sequence[Row]) -> None:
    """A table for each part: a row for a number of classes, peak memory and time for each setting."""
    for part in (TEXT, WHOLE, IMAGES):
        found = {(size(row), row["setting"]): row for row in rows if row["part"] == part}
        shown = [setting for setting in SETTINGS if any(setting == s for _, s in found)]
        if not shown:
            continue
        print(f"{part}: peak memory (MB), time (ms)")
        table = []
        for count in sorted({count for count, _ in found}):
            cells = [found.get((count, setting), {}) for setting in shown]
            table.append([f"{count:,}", *(cell(one) for one in cells)])
        common.print_table(["images" if part == IMAGES else "classes", *shown], table)


def cell(found: Row) -> str:
    if "peak_mb" not in found:
        return "" if not found else f"({found['estimate_mb']:,} MB by arithmetic)"
    chunk = f" [{found['chunk']}]" if found["chunk"] else ""
    return f"{found['peak_mb']:,} MB, {1000 * found['seconds']:,.0f} ms{chunk}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Peak memory of the text part against classes, both logarithmic."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError:
        print("No plot: expected matplotlib, found none; pip install 'gram-meta[figures]' brings it")
        return
    rcParams["svg.hashsalt"] = "classes"  # the same bytes from the same numbers
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    colours, looks = ("#D55E00", "#009E73", "#595959", "#0072B2"), ("-o", "--^", ":s", "-D")
    for setting, colour, look in zip((PLAIN, LAYERS, CHUNKS, AUTOMATIC), colours, looks, strict=True):
        points = [row for row in rows if row["setting"] == setting and row["part"] == TEXT and "peak_mb" in row]
        points.sort(key=lambda row: row["classes"])
        x, y = [row["classes"] for row in points], [row["peak_mb"] for row in points]
        axes.plot(x, y, look, color=colour, markersize=4, linewidth=1.5, label=setting)
    plain = [row for row in rows if row["setting"] == PLAIN and row["part"] == TEXT]
    plain = sorted((row["classes"], row["estimate_mb"]) for row in plain)
    axes.plot(*zip(*plain, strict=True), color="#D55E00", linewidth=0.8, linestyle=":", label="plain, by arithmetic")
    axes.set(xscale="log", yscale="log", xlabel="classes", ylabel="peak memory of the text part (MB)")
    axes.grid(color="#e0e0e0", linewidth=0.6, which="both")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
