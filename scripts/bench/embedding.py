"""Measure `gram embed` beside its towers alone and image decoding alone, on this machine, in turns.

    python scripts/bench/embedding.py PAIRS.tsv                                  # ViT-B/16 shapes, random weights
    python scripts/bench/embedding.py PAIRS.tsv --backbone gram-small --images 1000 --workers 0 1 2 --threads 1
    python scripts/bench/embedding.py PAIRS.tsv --device cuda --precision fp16 --images 50000 --workers 16 --batch-size 256

Three rates in pairs a second, each round in turns:
- towers: image tower, CLIP's text tower and Sentence-BERT on tensors and tokens that are ready, in the same batches;
- decoding: processes that read images and bring them to the tower's size, nothing else; files and tar shards;
- `gram embed`, from the first look at the source to the finished store, without loading the models.

The goal is 0.9 of the smaller of the first two. Where decoding has no cores of its own, both share what there is, and the
bound is 1 / (1 / towers + 1 / decoding); that holds for --workers 0 on any CPU. Processor time beside it, of the main
process and of its workers, does not depend on who else uses the machine: from it follows what the ratio would be if every
process had a core.
"""

from __future__ import annotations

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
from gram_meta.files import write_json


class Spent(NamedTuple):
    """Seconds of one step: on the clock, of the main process, and of its workers."""

    wall: float
    main: float
    workers: float


def main() -> None:
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("source", metavar="SOURCE", help="as for gram embed, with captions")
    options.add_argument("--images", type=int, default=256, help="distinct images (%(default)s)")
    options.add_argument("--captions", type=int, default=1, help="of each image, at most (%(default)s)")
    options.add_argument("--sentence-model", default="all-MiniLM-L6-v2")
    options.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32")
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--part-size", type=int, default=2048)
    options.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--shards", type=int, default=4, help="tar files for the same pairs (%(default)s)")
    options.add_argument("-o", "--out", metavar="JSON", help="all numbers, round by round")
    args = options.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    backbone = common.begin(args)
    sentence_model = load_sentence_model(args.sentence_model, args.device)
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        sources = make_sources(args, Path(folder))
        rounds = measure(args, sources, backbone, sentence_model, Path(folder))
    pairs = rounds[0].pop("pairs")
    for one in rounds[1:]:
        one.pop("pairs")
    print_results(args, pairs, rounds)
    if args.out:
        write_json(args.out, {"options": vars(args), "load": os.getloadavg(), "pairs": pairs, "rounds": rounds})


# --- the same pairs as files and as shards ----------------------------------------------------------------------------


def make_sources(args: Any, folder: Path) -> dict[str, Source]:
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
    images = list(captions.items())
    for shard in range(args.shards):
        with tarfile.open(tars / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (path, texts) in enumerate(images[shard :: args.shards]):
                key = f"{shard:05d}{number:04d}"
                add(tar, f"{key}{path.suffix}", path.read_bytes())
                add(tar, f"{key}.json", json.dumps({"caption": texts}).encode())
    return {"files": open_source(folder / "pairs.tsv"), "tars": open_source(tars)}


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


# --- the three rates --------------------------------------------------------------------------------------------------


def measure(
    args: Any, sources: dict[str, Source], backbone: Backbone, sentence_model: Any, folder: Path
) -> list[dict[str, Any]]:
    """Run all steps in turns; return the `Spent` of each step by its name, for every round."""
    rows = {kind: [row for row in all_rows(source) if not row.skip] for kind, source in sources.items()}
    places = {kind: list(dict.fromkeys(row.place for row in of_kind)) for kind, of_kind in rows.items()}
    texts = [row.caption for row in rows["files"]]
    towers = Towers(args, backbone, sentence_model, sources["files"], places["files"], texts)
    steps: dict[str, Callable[[], Any]] = {"towers": towers.run}
    for workers in args.workers:
        for kind, source in sources.items():

            def decode(kind: str = kind, source: Source = source, workers: int = workers) -> None:
                for _ in batches(args, backbone, source, places[kind], workers):
                    pass

            def embed(source: Source = source, workers: int = workers) -> None:
                shutil.rmtree(folder / "store", ignore_errors=True)
                sizes = {"batch_size": args.batch_size, "part_size": args.part_size}
                store = embed_pairs(source, folder / "store", backbone, sentence_model, **sizes, workers=workers)
                assert len(store) == len(texts)

            steps[f"decoding {kind} {workers}"] = decode
            steps[f"embed {kind} {workers}"] = embed
    for name in list(steps)[:3]:  # to warm up: towers, decoding, `gram embed`, of the first kind
        steps[name]()
    rounds = []
    for _ in range(args.repeats):
        one: dict[str, Any] = {"pairs": len(texts)}
        for name, step in steps.items():
            one[name] = spent_by(step, args.device)
        rounds.append(one)
    return rounds


def batches(args: Any, backbone: Backbone, source: Source, places: Sequence[Place], workers: int) -> Iterator[Any]:
    sizes = source.identity().get("shards")
    files = ImageFiles(ImageReader(source.image_root, sizes), backbone.preprocess(as_bytes=True))
    numbers = [list(places[start : start + args.batch_size]) for start in range(0, len(places), args.batch_size)]
    return run_ahead(files.read, numbers, workers, "use fewer --workers", prefetch=4)


class Towers:
    """All towers over what is ready: pixels, CLIP's tokens, Sentence-BERT's tokens."""

    def __init__(
        self,
        args: Any,
        backbone: Backbone,
        sentence_model: Any,
        source: Source,
        places: Sequence[Place],
        texts: Sequence[str],
    ) -> None:
        self.backbone, self.sentence_model, self.device = backbone, sentence_model, args.device
        pixels = [images for images, _, _ in batches(args, backbone, source, places, 0)]
        self.pixels = [backbone.normalise(images.to(args.device)) for images in pixels]
        ordered = sorted(texts, key=len, reverse=True)
        lists = [ordered[start : start + args.batch_size] for start in range(0, len(ordered), args.batch_size)]
        self.tokens = [tokens_of(backbone, batch)[0] for batch in lists]
        self.sentences: list[Any] = lists
        if isinstance(sentence_model, SentenceBert):
            model = sentence_model.model
            tokens = getattr(model, "preprocess", None) or model.tokenize  # its name up to sentence-transformers 5.1
            self.sentences = [
                {
                    key: value.to(args.device) if isinstance(value, torch.Tensor) else value
                    for key, value in tokens(batch).items()
                }
                for batch in lists
            ]

    @torch.no_grad()
    def run(self) -> None:
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


def spent_by(step: Callable[[], Any], device: str) -> Spent:
    common.synchronise(device)
    start, own, workers = time.perf_counter(), time.process_time(), of_children()
    step()
    common.synchronise(device)
    return Spent(time.perf_counter() - start, time.process_time() - own, of_children() - workers)


def of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# --- results ----------------------------------------------------------------------------------------------------------


def print_results(args: Any, pairs: int, rounds: list[dict[str, Spent]]) -> None:
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{common.environment(args)}; load average {load}")
    print(f"{pairs} pairs of {args.images} images, batches of {args.batch_size}, parts of {args.part_size}\n")

    cases = [(workers, kind) for workers in args.workers for kind in ("files", "tars")]
    table = []
    for workers, kind in cases:
        ratios = [of_round(one, workers, kind, pairs) for one in rounds]
        middle = [statistics.median(column) for column in zip(*ratios, strict=True)]
        rates, shares = [f"{rate:.1f}" for rate in middle[:3]], [f"{ratio:.2f}" for ratio in middle[3:]]
        table.append([f"{kind}, {workers} workers", *rates, *shares])
    rates = ["towers", "decoding", "gram embed (pairs/s)"]
    common.print_table(["", *rates, "of the smaller", "of the shared bound", "by processor time"], table)


def of_round(one: dict[str, Spent], workers: int, kind: str, pairs: int) -> tuple[float, ...]:
    """Three rates in pairs a second; then `gram embed`'s as shares: of the smaller of the others and of the bound where
    they share cores, both on the clock; and of what applies, by processor time, if each process had a core."""
    towers, decoding, embed = one["towers"], one[f"decoding {kind} {workers}"], one[f"embed {kind} {workers}"]
    beside = max(workers, 1)
    alone = (decoding.main + decoding.workers) / beside  # seconds of processor time of each decoding process
    least = max(towers.main, alone) if workers else towers.main + alone
    busiest = max(embed.main, embed.workers / beside)
    return (
        pairs / towers.wall,
        pairs / decoding.wall,
        pairs / embed.wall,
        max(towers.wall, decoding.wall) / embed.wall,
        (towers.wall + decoding.wall) / embed.wall,
        least / busiest,
    )


if __name__ == "__main__":
    main()
