"""Measure `gram embed` beside its towers alone and image decoding alone, on this machine, in turns.

    python scripts/bench/embedding.py PAIRS.tsv                                  # ViT-B/16 shapes, random weights
    python scripts/bench/embedding.py PAIRS.tsv --device cuda --precision fp16 --images 50000 --workers 16

docs/results/corpus.md explains the columns. With --clock cpu a time is the processor time of the main process or of one
worker, whichever is more.
"""

import argparse
import logging
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch

from gram_meta.backbone.clip import Backbone, end_positions
from gram_meta.config import CROP_ON
from gram_meta.corpus.embedding.parts import read_images, tokens_of
from gram_meta.corpus.embedding.run import embed_pairs
from gram_meta.corpus.embedding.sentences import SentenceBert, load_sentence_model
from gram_meta.corpus.places import ImageReader
from gram_meta.corpus.sources import Source, all_rows, open_source


def seconds(spent: Mapping[str, float], clock: str, workers: int) -> float:
    """Return the seconds that count: on the clock, or of the process that takes longest."""
    return spent["wall"] if clock == "wall" else max(spent["cpu"], spent["children"] / max(workers, 1))


def main() -> None:
    options = common.parser(__doc__, ("fp32", "fp16", "bf16"))
    options.add_argument("source", metavar="SOURCE", help="as for gram embed, with captions")
    options.add_argument("--images", type=int, default=256, help="distinct images (%(default)s)")
    options.add_argument("--sentence-model", default="all-MiniLM-L6-v2")
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--part-size", type=int, default=2048)
    options.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--crop-on", choices=CROP_ON, default=CROP_ON[0], help="as for gram embed")
    options.add_argument("--shards", type=int, default=4, help="tar files for the same pairs (%(default)s)")
    args = options.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    report = common.report(args)
    backbone = common.begin(args)
    sentence_model = load_sentence_model(args.sentence_model, args.device)
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        sources = make_sources(args, Path(folder))
        bench = Bench(args, backbone, sentence_model, sources)
        steps = bench.steps(Path(folder) / "store")
        for name in list(steps)[:3]:  # to warm up: towers, decoding, `gram embed`, of the first kind
            steps[name]()
        rounds = [{name: common.spent(step)[0] for name, step in steps.items()} for _ in range(args.repeats)]
    print(f"{common.environment(args)}; load average {os.getloadavg()[0]:.1f}")
    print(f"{args.images} pairs, batches of {args.batch_size}, parts of {args.part_size}; the least of the rounds\n")
    common.print_table([bench.row(rounds, *case) for case in bench.cases()])
    common.write_report(args, report | {"pairs": args.images, "rounds": rounds})


def make_sources(args: argparse.Namespace, folder: Path) -> dict[str, Source]:
    """Write a TSV of the first images of the source with a caption each, and the same pairs in tar shards."""
    source = open_source(args.source)
    captions: dict[Path, str] = {}
    for row in all_rows(source):
        if not row.skip and len(captions) < args.images:
            captions.setdefault(source.image_root / row.location, row.caption)
    args.images = len(captions)
    lines = [f"{path}\t{text}" for path, text in captions.items()]
    (folder / "pairs.tsv").write_text("\n".join(["image\tcaption", *lines]) + "\n")
    tars, caption = folder / "tars", folder / "caption.txt"
    tars.mkdir()
    for shard in range(args.shards):
        with tarfile.open(tars / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (path, text) in enumerate(list(captions.items())[shard :: args.shards]):
                caption.write_text(text)
                for file in (path, caption):
                    tar.add(file, f"{shard:05d}{number:04d}{file.suffix}")
    return {"files": open_source(folder / "pairs.tsv"), "tars": open_source(tars)}


class Bench:
    """The models and all that they need ready: pixels, CLIP's tokens, Sentence-BERT's tokens."""

    def __init__(
        self, args: argparse.Namespace, backbone: Backbone, sentence_model: Any, sources: dict[str, Source]
    ) -> None:
        self.args, self.backbone, self.sentence_model, self.sources = args, backbone, sentence_model, sources
        rows = {kind: list(all_rows(source)) for kind, source in sources.items()}
        self.places = {kind: [row.place for row in of_kind] for kind, of_kind in rows.items()}
        texts = self.texts = [row.caption for row in rows["files"]]
        pixels = (images for images, _, _ in self.decoded("files", 0) if images is not None)
        self.pixels = [backbone.normalise(images.to(args.device)) for images in pixels]
        ordered = sorted(texts, key=len, reverse=True)
        lists = [ordered[start : start + args.batch_size] for start in range(0, len(ordered), args.batch_size)]
        self.tokens = [tokens_of(backbone, batch)[0] for batch in lists]
        self.sentences: list[Any] = lists
        if isinstance(sentence_model, SentenceBert):
            from sentence_transformers.util import batch_to_device

            model = sentence_model.model
            tokens = getattr(model, "preprocess", None) or model.tokenize  # its name up to sentence-transformers 5.1
            self.sentences = [batch_to_device(tokens(batch), args.device) for batch in lists]

    def cases(self) -> list[tuple[str, int]]:
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
        batches = [places[start : start + size] for start in range(0, len(places), size)]
        return read_images(reader, batches, self.backbone, workers, self.args.crop_on)

    def decode(self, kind: str, workers: int) -> None:
        for images, _, _ in self.decoded(kind, workers):
            kept = images
        kept.cpu()

    def embed(self, kind: str, workers: int, out: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        sizes = {"batch_size": self.args.batch_size, "part_size": self.args.part_size, "workers": workers}
        sizes["crop_on"] = self.args.crop_on
        store = embed_pairs(self.sources[kind], out, self.backbone, self.sentence_model, **sizes)
        assert len(store) == len(self.texts)

    def row(self, rounds: Sequence[Mapping[str, Mapping[str, float]]], kind: str, workers: int) -> dict[str, str]:
        """Return the row of one kind of source and number of workers: the least seconds of the rounds."""
        names = {"towers": "towers", "decoding": f"decoding {kind} {workers}", "gram embed": f"embed {kind} {workers}"}
        least = {
            title: min(seconds(one[name], self.args.clock, workers) for one in rounds) for title, name in names.items()
        }
        towers, decoding, embed = least.values()
        bound = max(towers, decoding) if workers else towers + decoding
        shares = {"pairs/s": f"{len(self.texts) / embed:.1f}", "of the bound": f"{bound / embed:.2f}"}
        return {"": f"{kind}, {workers} workers"} | {f"{title} (s)": f"{s:.2f}" for title, s in least.items()} | shares


if __name__ == "__main__":
    main()
