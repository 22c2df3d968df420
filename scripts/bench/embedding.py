"""Measure `gram embed` beside its towers alone and image decoding alone, on this machine, in turns.

    python scripts/bench/embedding.py PAIRS.tsv                                  # ViT-B/16 shapes, random weights
    python scripts/bench/embedding.py PAIRS.tsv --backbone gram-small --images 1000 --workers 0 1 2 --threads 1
    python scripts/bench/embedding.py PAIRS.tsv --device cuda --precision fp16 --images 50000 --workers 16

Three rates in pairs a second, each round in turns:
- towers: image tower, CLIP's text tower and Sentence-BERT on tensors and tokens that are ready, in the same batches;
- decoding: processes that read images and bring them to the tower's size, nothing else; files and tar shards;
- `gram embed`, from the first look at the source to the finished store, without loading the models.

The goal is 0.9 of the smaller of the first two. Where decoding has no cores of its own, both share what there is, and
the bound is 1 / (1 / towers + 1 / decoding); that holds for --workers 0 on any CPU. The processor time of the main
process and of its workers does not depend on who else uses the machine. From it follows the ratio if each process had a
core.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import resource
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch

from gram_meta.backbone.clip import Backbone, end_positions
from gram_meta.corpus.embedding.parts import tokens_of
from gram_meta.corpus.embedding.run import embed_pairs
from gram_meta.corpus.embedding.sentences import SentenceBert, load_sentence_model
from gram_meta.corpus.loading import run_ahead
from gram_meta.corpus.places import ImageFiles, ImageReader, Place
from gram_meta.corpus.sources import Source, all_rows, open_source


class Spent(NamedTuple):
    """Seconds of one step: on the clock, of the main process, and of its workers."""

    wall: float
    main: float
    workers: float


def main() -> None:
    options = common.parser(__doc__, ("fp32", "fp16", "bf16"))
    options.add_argument("source", metavar="SOURCE", help="as for gram embed, with captions")
    options.add_argument("--images", type=int, default=256, help="distinct images (%(default)s)")
    options.add_argument("--captions", type=int, default=1, help="of each image, at most (%(default)s)")
    options.add_argument("--sentence-model", default="all-MiniLM-L6-v2")
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--part-size", type=int, default=2048)
    options.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--shards", type=int, default=4, help="tar files for the same pairs (%(default)s)")
    args = options.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    report = common.report(args)
    backbone = common.begin(args)
    sentence_model = load_sentence_model(args.sentence_model, args.device)
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        sources = make_sources(args, Path(folder))
        rows = {kind: [row for row in all_rows(source) if not row.skip] for kind, source in sources.items()}
        places = {kind: list(dict.fromkeys(row.place for row in of_kind)) for kind, of_kind in rows.items()}
        bench = Bench(args, backbone, sentence_model, sources, places, [row.caption for row in rows["files"]])
        steps = bench.steps(Path(folder) / "store")
        for name in list(steps)[:3]:  # to warm up: towers, decoding, `gram embed`, of the first kind
            steps[name]()
        rounds = [{name: spent_by(step) for name, step in steps.items()} for _ in range(args.repeats)]
    pairs = len(bench.texts)
    print(f"{common.environment(args)}; load average {os.getloadavg()[0]:.1f}")
    print(f"{pairs} pairs of {args.images} images, batches of {args.batch_size}, parts of {args.part_size}\n")
    ratios = {case: [of_round(one, *case, pairs) for one in rounds] for case in bench.cases()}
    common.print_table(
        [{"": f"{kind}, {workers} workers"} | medians(ratios[kind, workers]) for kind, workers in ratios]
    )
    common.write_report(args, report | {"pairs": pairs, "rounds": rounds})


# --- the same pairs as files and as shards ----------------------------------------------------------------------------


def make_sources(args: argparse.Namespace, folder: Path) -> dict[str, Source]:
    """Write a TSV of the first images of the source, and the same images and captions in tar shards."""
    captions: dict[Path, list[str]] = {}
    source = open_source(args.source)
    for row in all_rows(source):
        path = source.image_root / row.location
        if row.skip or (path not in captions and len(captions) == args.images):
            continue
        of_image = captions.setdefault(path, [])
        if len(of_image) < args.captions:
            of_image.append(row.caption)
    lines = [f"{path}\t{text}" for path, texts in captions.items() for text in texts]
    (folder / "pairs.tsv").write_text("\n".join(["image\tcaption", *lines]) + "\n")
    tars = folder / "tars"
    tars.mkdir()
    for shard in range(args.shards):
        with tarfile.open(tars / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (path, texts) in enumerate(list(captions.items())[shard :: args.shards]):
                caption = json.dumps({"caption": texts}).encode()
                for suffix, content in ((path.suffix, path.read_bytes()), (".json", caption)):
                    member = tarfile.TarInfo(f"{shard:05d}{number:04d}{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return {"files": open_source(folder / "pairs.tsv"), "tars": open_source(tars)}


# --- the three rates --------------------------------------------------------------------------------------------------


class Bench:
    """The models and all that they need ready: pixels, CLIP's tokens, Sentence-BERT's tokens."""

    def __init__(
        self,
        args: argparse.Namespace,
        backbone: Backbone,
        sentence_model: Any,
        sources: dict[str, Source],
        places: dict[str, list[Place]],
        texts: Sequence[str],
    ) -> None:
        self.args, self.backbone, self.sentence_model = args, backbone, sentence_model
        self.sources, self.places, self.texts = sources, places, texts
        pixels = (images for images, _, _ in self.decoded("files", 0))
        self.pixels = [backbone.normalise(images.to(args.device)) for images in pixels]
        ordered = sorted(texts, key=len, reverse=True)
        lists = [ordered[start : start + args.batch_size] for start in range(0, len(ordered), args.batch_size)]
        self.tokens = [tokens_of(backbone, batch)[0] for batch in lists]
        self.sentences: list[Any] = lists
        if isinstance(sentence_model, SentenceBert):
            model = sentence_model.model
            tokens = getattr(model, "preprocess", None) or model.tokenize  # its name up to sentence-transformers 5.1
            self.sentences = [
                {key: x.to(args.device) if isinstance(x, torch.Tensor) else x for key, x in tokens(batch).items()}
                for batch in lists
            ]

    def cases(self) -> list[tuple[str, int]]:
        """Return every kind of source with every number of workers."""
        return [(kind, workers) for workers in self.args.workers for kind in self.sources]

    def steps(self, out: Path) -> dict[str, Callable[[], Any]]:
        """Return what is timed, by name; `gram embed` writes to `out`."""
        steps: dict[str, Callable[[], Any]] = {"towers": self.towers}
        for kind, workers in self.cases():
            steps[f"decoding {kind} {workers}"] = partial(self.decode, kind, workers)
            steps[f"embed {kind} {workers}"] = partial(self.embed, kind, workers, out)
        return steps

    @torch.no_grad()
    def towers(self) -> None:
        """Run all towers."""
        for images in self.pixels:
            kept = self.backbone.encode_images(images)
        for tokens in self.tokens:
            ends = end_positions(tokens)
            kept = self.backbone.encode_text(self.backbone.embed_tokens(tokens[:, : int(ends.max()) + 1]), ends)
        for batch in self.sentences:
            if isinstance(batch, list):
                self.sentence_model.encode(batch)
            else:
                kept = self.sentence_model.model(dict(batch))["sentence_embedding"]
        kept.cpu()

    def decoded(self, kind: str, workers: int) -> Iterator[Any]:
        """Yield batches of images of the tower's size."""
        source, places, size = self.sources[kind], self.places[kind], self.args.batch_size
        reader = ImageReader(source.image_root, source.identity().get("shards"))
        files = ImageFiles(reader, self.backbone.preprocess(as_bytes=True))
        batches = [places[start : start + size] for start in range(0, len(places), size)]
        return run_ahead(files.read, batches, workers, "use fewer --workers", prefetch=4)

    def decode(self, kind: str, workers: int) -> None:
        """Read all images."""
        for _ in self.decoded(kind, workers):
            pass

    def embed(self, kind: str, workers: int, out: Path) -> None:
        """Make a store."""
        shutil.rmtree(out, ignore_errors=True)
        sizes = {"batch_size": self.args.batch_size, "part_size": self.args.part_size, "workers": workers}
        store = embed_pairs(self.sources[kind], out, self.backbone, self.sentence_model, **sizes)
        assert len(store) == len(self.texts)


def spent_by(step: Callable[[], Any]) -> Spent:
    """Run a step; return the seconds of all processes."""

    def now() -> tuple[float, float, float]:
        workers = resource.getrusage(resource.RUSAGE_CHILDREN)
        return common.wall_clock(), time.process_time(), workers.ru_utime + workers.ru_stime

    before = now()
    step()
    return Spent(*(after - start for after, start in zip(now(), before, strict=True)))


# --- results ----------------------------------------------------------------------------------------------------------


def of_round(one: dict[str, Spent], kind: str, workers: int, pairs: int) -> dict[str, float]:
    """Return three rates in pairs a second, and `gram embed`'s as shares.

    These are the share of the smaller of the others and of the bound where both share cores, on the clock; and of what
    applies, by processor time, if each process had a core.
    """
    towers, decoding, embed = one["towers"], one[f"decoding {kind} {workers}"], one[f"embed {kind} {workers}"]
    beside = max(workers, 1)
    alone = (decoding.main + decoding.workers) / beside  # seconds of processor time of each decoding process
    least = max(towers.main, alone) if workers else towers.main + alone
    return {
        "towers (pairs/s)": pairs / towers.wall,
        "decoding (pairs/s)": pairs / decoding.wall,
        "gram embed (pairs/s)": pairs / embed.wall,
        "of the smaller": max(towers.wall, decoding.wall) / embed.wall,
        "of the shared bound": (towers.wall + decoding.wall) / embed.wall,
        "by processor time": least / max(embed.main, embed.workers / beside),
    }


def medians(rounds: list[dict[str, float]]) -> dict[str, str]:
    """Return the median over rounds of each rate and share as text."""
    middle = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    return {name: f"{value:.{1 if 'pairs' in name else 2}f}" for name, value in middle.items()}


if __name__ == "__main__":
    main()
