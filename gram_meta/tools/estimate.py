"""What a corpus will cost on this machine, or on a named GPU: time, memory and disk of each step.

Rates are measured here: decoded images, passes of the towers, meta-steps. Arithmetic over sizes makes estimates of
them. Where neither is possible, an estimate rests on a measurement of another machine, as all times on a GPU that is
not here do (`cards`). Each row names its origin.
"""

from __future__ import annotations

import copy
import io
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from yacs.config import CfgNode

from gram_meta.backbone.clip import Backbone
from gram_meta.backbone.footprint import GB, forward_bytes
from gram_meta.clustering.hierarchy import Hierarchy, Topic
from gram_meta.config import load_meta_config
from gram_meta.corpus.embedding.sentences import DEFAULT, SentenceModel, load_sentence_model
from gram_meta.corpus.places import ImageReader
from gram_meta.corpus.sources import all_rows, open_source
from gram_meta.corpus.sources.patterns import is_pattern
from gram_meta.corpus.store import PairStore
from gram_meta.errors import GramError
from gram_meta.images import BadImage, decode_image
from gram_meta.method.memory_plan import FITS, MemoryConfig, plan
from gram_meta.method.meta_trainer import MetaTrainer
from gram_meta.processes import worker_count, workers_for
from gram_meta.tools.cards import COCOOP_STEP, FEW_SHOT_STEP, Card

MEASURED, FORMULA, ASSUMED = "measured", "formula", "assumption"
FAMILIES = {"text": "coop", "visual": "vpt", "joint": "unigram", "conditional": "cocoop"}  # prompts: meta configs
PICTURE = (500, 375)  # pixels of the JPEGs that are decoded, the size of ImageNet's photographs
CAPTION = "a brown dog runs over a green meadow behind a red ball in the evening sun"
TEXTS = [f"a photo of a {word}." for word in ("cat", "house boat", "red apple", "very old tree")] * 16
BATCH = 64  # images in a pass of `gram embed`
LONGEST = 5.0  # seconds that a measured meta-step may be expected to take; else a part of it is measured
WORDS_BYTES = 120  # a caption, a location and a digest in Parquet
SENTENCE_WIDTH, SENTENCES = 384, 300.0  # of Sentence-BERT where it is not installed: width, captions a second
SENTENCE_FLOP = 20 * 6 * 2 * 12 * 384**2  # of Sentence-BERT for a caption: 20 tokens, 6 layers of 12 d^2 weights
# Pairs of known corpora; COCO: the captions of train2017; Flickr30k: 31,783 images x 5
PUBLISHED = {"cc3m": 3_318_333, "cc12m": 12_423_374, "coco": 591_753, "flickr30k": 158_915}
OWN_IMAGES = 16  # images of a corpus that are decoded

# Training and test images of all datasets, and class prompts that CoOp encodes in training with batches of 32 and of 1:
# 16 shots, 10 epochs, the eleven datasets or ImageNet and its targets; one trainer, one seed
PROTOCOLS = {
    "base2new": (176_000, 134_000, 1_570_000, 50_200_000),
    "xd and dg": (160_000, 226_000, 5_000_000, 160_000_000),
}


@dataclass(frozen=True)
class Row:
    """One number of the estimate."""

    step: str  # the command
    what: str  # time, memory or disk
    value: float  # seconds or bytes
    origin: str  # MEASURED, FORMULA or ASSUMED: the weakest of what went into it
    how: str  # where it comes from, in words

    def __str__(self) -> str:
        return as_time(self.value) if self.what == "time" else as_size(self.value)


@dataclass
class Rates:
    """What was measured: numbers a second, and seconds of a whole meta-step by family."""

    decoded: float  # images, by one process
    images: float  # images through the image tower, without gradients
    texts: float  # class prompts through the text tower
    captions: float  # through Sentence-BERT; SENTENCES where it is not installed
    sentence_width: int = SENTENCE_WIDTH
    has_sentence_model: bool = False
    steps: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)  # share of a step that was measured, by family
    own_decoded: float = 0.0  # of the corpus's own images, by one process; 0: not measured
    card: Card | None = None  # for which all but the decoding was computed


def estimate(
    backbone: Backbone,
    pairs: int,
    families: Sequence[str] = ("text",),
    *,
    config: str = "",
    opts: Sequence[str] = (),
    sentence_model: str = DEFAULT,
    seconds: float = 2.0,
    images: Sequence[bytes] = (),
    card: Card | None = None,
) -> tuple[Rates, list[Row]]:
    """Measure this machine, and return the rates and the rows of the estimate.

    Args:
        backbone: frozen CLIP, on the device to measure.
        pairs: N, image-text pairs of the corpus.
        families: of prompts to meta-train, keys of `FAMILIES`.
        config: suffix of the meta configs, such as `vit_b16`; "": that of the backbone's name.
        opts: KEY VALUE settings of meta-training.
        sentence_model: as for `load_sentence_model`.
        seconds: of each measurement, at least.
        images: the content of some of the corpus's image files, to decode for `gram embed`.
        card: estimate for this GPU, with `backbone` on the CPU; only the decoding is then measured.

    Raises:
        GramError: no pairs, an unknown family or setting, visual prompts for another tower than OpenAI's ViT.
    """
    if pairs < 1:
        raise GramError(f"--pairs: expected at least 1, found {pairs}")
    configs = {name: _config(name, backbone, config, opts) for name in families}
    rates = _rates_on(card, backbone, seconds) if card else _measure(backbone, sentence_model, seconds)
    rates.own_decoded = _decoding(images, backbone, seconds) if images else 0.0
    for name, settings in configs.items():
        rates.steps[name], rates.parts[name] = _step_seconds(backbone, settings, rates, seconds)
    rows = [*_embed(backbone, rates, pairs), *_cluster(pairs)]
    for name, settings in configs.items():
        rows += _pretrain(name, backbone, settings, rates)
        rows += _protocols(name, backbone, rates)
    return rates, [_row_on(card, row) for row in rows] if card else rows


def read_corpus(corpus: str) -> tuple[int, list[bytes]]:
    """Return the usable pairs of a corpus, a path or a name of `PUBLISHED`, and the content of some image files of it.

    Raises:
        GramError: neither of them, or a corpus without a usable pair.
    """
    if corpus.lower() in PUBLISHED:
        return PUBLISHED[corpus.lower()], []
    path = Path(corpus).expanduser()
    if not path.exists() and not is_pattern(path):
        raise GramError(f"--corpus: expected a path or one of {', '.join(PUBLISHED)}, found nothing at {corpus!r}")
    source, pairs, images = open_source(path), 0, []
    for row in all_rows(source):
        pairs += not row.skip
        if not row.skip and pairs <= OWN_IMAGES:
            with suppress(BadImage):  # `gram embed` skips it
                decode_image(content := ImageReader(source.image_root).content(row.place))
                images.append(content)
    if not pairs:
        raise GramError(f"--corpus {corpus}: expected image-text pairs, found none that can be used")
    return pairs, images


def as_time(seconds: float) -> str:
    """Return a duration in words, with two digits."""
    for unit, size in (("d", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 100 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds:.0f} s"


def as_size(number: float) -> str:
    """Return a number of bytes in words, with two digits."""
    unit, size = next(((u, s) for u, s in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if number >= s), ("kB", 1e3))
    return f"{number / size:.2g} {unit}" if number < 100 * size else f"{number / size:.0f} {unit}"


# ------------------------------------------------------------------------------------------------------- measurements


def _measure(backbone: Backbone, sentence_model: str, seconds: float) -> Rates:
    images = BATCH if backbone.device.type == "cuda" else 8  # on a CPU more are not faster
    pixels = torch.randn(images, 3, backbone.image_size, backbone.image_size, device=backbone.device)
    with torch.no_grad():
        rates = Rates(
            decoded=_decoding([_jpeg()], backbone, seconds),
            images=_rate(lambda: backbone.encode_images(pixels), len(pixels), seconds, backbone.device),
            texts=_rate(lambda: backbone.encode_texts(TEXTS), len(TEXTS), seconds, backbone.device),
            captions=SENTENCES,
        )
    if (model := _sentences(sentence_model, backbone.device)) is not None:
        captions = [f"{CAPTION} {number}" for number in range(BATCH)]
        rates.captions = _rate(lambda: model.encode(captions), BATCH, seconds)
        rates.sentence_width, rates.has_sentence_model = model.width, True
    return rates


def _decoding(images: Sequence[bytes], backbone: Backbone, seconds: float) -> float:
    transform = backbone.preprocess()
    return _rate(lambda: [transform(decode_image(content)) for content in images], len(images), seconds)


def _rate(function: Callable[[], Any], count: int, seconds: float, device: torch.device | None = None) -> float:
    """Return how many of `count` things a call does are done a second, after one call that is not counted.

    A call that takes longer than `seconds` is counted alone.
    """

    def call() -> None:
        function()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    began, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - began < seconds:
        call()
        calls += 1
    return count * calls / (time.perf_counter() - began)


def _rates_on(card: Card, backbone: Backbone, seconds: float) -> Rates:
    """Return this machine's rate of decoding, and the card's rates by the FLOP of an image and of a class prompt."""
    gpu = _as_on_gpu(backbone)
    pixels = torch.zeros(1, 3, gpu.image_size, gpu.image_size)
    image, text = _flop(lambda: gpu.encode_images(pixels)), _flop(lambda: gpu.encode_texts(TEXTS[:4])) / 4
    decoded, captions = _decoding([_jpeg()], backbone, seconds), card.fp32_speed / SENTENCE_FLOP
    return Rates(decoded, card.speed / image, card.speed / text, captions, card=card)


def _as_on_gpu(backbone: Backbone) -> Backbone:
    """Return the backbone with the text tower's layout of a GPU; the weights are the same."""
    gpu = copy.copy(backbone)
    gpu.packs_texts = False
    return gpu


def _flop(function: Callable[[], Any]) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # not fused kernels
        function()
    return int(counter.get_total_flops())


def _jpeg() -> bytes:
    """Return a JPEG of a photograph's size and detail: a smooth picture with some noise."""
    width, height = PICTURE
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([np.sin(x / 37) + np.cos(y / 29), np.sin((x + y) / 53), np.cos(x / 71) * np.sin(y / 17)], -1)
    noise = np.random.default_rng(0).normal(0, 6, smooth.shape)
    file = io.BytesIO()
    Image.fromarray((127 + 60 * smooth + noise).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def _sentences(name: str, device: torch.device) -> SentenceModel | None:
    try:
        return load_sentence_model(name, str(device))
    except GramError:
        return None


def _config(family: str, backbone: Backbone, suffix: str, opts: Sequence[str]) -> CfgNode:
    if family not in FAMILIES:
        raise GramError(f"--prompts: expected some of {', '.join(FAMILIES)}, found {family!r}")
    known = {"ViT-B/32": "vit_b32", "ViT-L/14": "vit_l14", "gram-small": "gram_small"}
    name = f"{FAMILIES[family]}_{suffix or known.get(backbone.name.removeprefix('random-'), 'vit_b16')}"
    config = load_meta_config([name], [*opts, "BACKBONE.NAME", backbone.name, "BACKBONE.PRECISION", backbone.precision])
    if config.PROMPT.VISUAL_TOKENS and not backbone.is_vit:
        raise GramError(f"--prompts {family}: expected a ViT image tower of OpenAI's kind, found {backbone.name}")
    return config


def _support_passes(config: CfgNode) -> float:
    """Return the forward passes that the inner loop costs: 4 for a step, 2 for one without a second derivative."""
    inner = config.INNER
    return (2.0 if inner.FIRST_ORDER else 4.0) * inner.STEPS + 2.0 * inner.DETACHED if config.OUTER.META else 0.0


def _passes(config: CfgNode) -> float:
    """Return the forward passes of images that a step costs: those of the inner loop, and 2 for a query image."""
    tasks = config.TASKS
    of_a_class = _support_passes(config) * tasks.SUPPORT_SHOTS + 2.0 * tasks.QUERY_SHOTS
    return config.OUTER.BATCH * tasks.WAYS * of_a_class


def _work(config: CfgNode) -> float:
    """Return what a step's time grows with: passes of images, each with all class prompts if they are conditional."""
    return _passes(config) * (config.TASKS.WAYS if config.PROMPT.CONDITIONAL else 1)


def _step_seconds(backbone: Backbone, config: CfgNode, rates: Rates, seconds: float) -> tuple[float, float]:
    """Return the seconds of a meta-step, and the share of its work that was measured; on a card by its passes."""
    expected = 0.0
    if config.PROMPT.VISUAL_TOKENS:
        expected = _work(config) / rates.images
    elif config.PROMPT.CONDITIONAL:
        expected = _work(config) / rates.texts
    if rates.card:
        if config.PROMPT.TEXT_TOKENS and not config.PROMPT.CONDITIONAL:  # the classes once for each pass of a side
            expected += config.OUTER.BATCH * config.TASKS.WAYS * (_support_passes(config) + 2) / rates.texts
        least = rates.card.least_step * (_support_passes(config) + 2) / (4 + 2)  # it was measured with one inner step
        return max(expected, least), 1.0
    measured = config
    if expected > LONGEST:
        measured = config.clone()
        measured.defrost()
        measured.OUTER.BATCH, measured.TASKS.WAYS = 1, 2
        measured.TASKS.SUPPORT_SHOTS, measured.TASKS.QUERY_SHOTS = 1, 2
        measured.freeze()
    part = _work(measured) / _work(config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(Path(folder), backbone, measured)
        coming = iter(trainer.episodes_of(0, 10_000))
        number = 0

        def step() -> None:
            nonlocal number
            number += 1
            trainer.step(number, next(coming))

        try:
            each = 1 / _rate(step, 1, seconds, backbone.device)
        finally:
            coming.close()  # type: ignore[attr-defined] # ends its worker processes
    return each / part, part


class _MadeStore(PairStore):
    """A store of random features, whose images are copies of one JPEG in `folder`."""

    def __init__(self, folder: Path, backbone: Backbone, images: int) -> None:
        self.path = self.image_root = folder
        self.fingerprint, self.has_shards = "made", False
        clip = {"name": backbone.name, "fingerprint": backbone.fingerprint, "width": backbone.embed_dim}
        self.manifest = {"settings": {"clip": clip, "sentence_model": {"fingerprint": "made"}, "source": {}}}
        features = np.random.default_rng(0).normal(size=(images, backbone.embed_dim))
        self.image_features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)
        self.similarity, self.image = np.zeros(images, np.float32), np.arange(images)  # type: ignore[misc]
        self.locations = [f"{number}.jpg" for number in range(images)]  # type: ignore[assignment]

    def write_images(self) -> None:
        """Write the image files, for prompts that need their pixels."""
        content = _jpeg()
        for name in self.locations:
            (self.path / name).write_bytes(content)


def _trainer(folder: Path, backbone: Backbone, config: CfgNode) -> MetaTrainer:
    """Return a meta-trainer of made-up topics, which can take steps; nothing of it is worth keeping."""
    tasks = config.TASKS
    size = 2 * max(tasks.SUPPORT_SHOTS + tasks.QUERY_SHOTS, 2)  # images of a topic, in two domains
    topics = 2 * tasks.WAYS + 2
    words = [
        f"{first} {second}" for first in ("cat", "house", "tree", "boat") for second in ("red", "old", "big", "wet")
    ]
    words += [f"thing {number}" for number in range(topics)]
    row = np.arange(topics * size)
    found = [Topic(words[number], 1.0, [(words[number], 1.0)], size, size, [size // 2] * 2) for number in range(topics)]
    store = _MadeStore(folder, backbone, len(row))
    if config.PROMPT.VISUAL_TOKENS:
        store.write_images()
    made_from = {"clip": backbone.fingerprint, "sentence_model": "made", "store": "made"}
    domain = row // (size // 2) % 2
    hierarchy = Hierarchy(
        row, row, row // size, domain, found, np.zeros(len(row), np.uint8), {"fingerprints": made_from}
    )
    hierarchy.manifest["labelled"] = config.CHC.LABELLED
    return MetaTrainer(store, hierarchy, folder / "run", config, backbone.device, progress=False, backbone=backbone)


# ------------------------------------------------------------------------------------------------------------- the rows


def _weights(backbone: Backbone) -> float:
    return float(sum(value.numel() * value.element_size() for value in backbone.model.state_dict().values()))


def _row_on(card: Card, row: Row) -> Row:
    if row.step != "cluster" and row.what == "time":
        return replace(row, origin=ASSUMED, how=f"{row.how}; H200's efficiency, peak of {card.name}")
    if row.step != "cluster" and row.what == "memory" and row.value > card.memory * GB:
        return replace(row, how=f"{row.how}; does not fit into the {card.name}'s {card.memory:g} GB")
    return row


def _embed(backbone: Backbone, rates: Rates, pairs: int) -> Iterator[Row]:
    workers = worker_count() if rates.card else workers_for(backbone.device)
    compute = 1 / rates.images + 1 / rates.texts + 1 / rates.captions
    decoded = rates.own_decoded or rates.decoded
    decoding = 1 / decoded
    each = max(decoding / workers, compute) if workers else decoding + compute
    rate = f"{pairs:,} pairs; a second: {decoded:.3g} decoded ({workers or 1} at a time), "
    rate += f"{rates.images:.3g} images, {rates.texts:.3g} and {rates.captions:.3g} captions"
    origin = MEASURED if rates.has_sentence_model and workers < 2 else ASSUMED
    if not rates.has_sentence_model:
        rate += " (Sentence-BERT: assumed)"
    yield Row("embed", "time", pairs * each, origin, rate)
    width = f"{pairs:,} x ({backbone.embed_dim} + {rates.sentence_width}) numbers of 2 bytes"
    size = pairs * (2 * (backbone.embed_dim + rates.sentence_width) + 4 + WORDS_BYTES)
    yield Row("embed", "disk", size, FORMULA, f"{width}, {WORDS_BYTES} bytes of words; twice that at the end")
    held = _weights(backbone) + BATCH * forward_bytes(backbone)
    yield Row("embed", "memory", held, FORMULA, f"weights, and the activations of {BATCH} images")


def _cluster(pairs: int) -> Iterator[Row]:
    """Yield rows from the measurements of docs/results/clustering.md, up to 3.1 million pairs."""
    sample = min(pairs, 100_000)
    seconds = 1.95e-3 * sample + 1.8e-4 * (pairs - sample) + 1.5e-4 * pairs
    yield Row("cluster", "time", seconds, ASSUMED, "docs/results/clustering.md: one core of a Xeon, sample of 100,000")
    held = 0.4e9 + 8e3 * sample + 270 * (pairs - sample)
    yield Row("cluster", "memory", held, ASSUMED, "docs/results/clustering.md, without the mapped features")


def _pretrain(family: str, backbone: Backbone, config: CfgNode, rates: Rates) -> Iterator[Row]:
    outer, tasks, seconds = config.OUTER, config.TASKS, rates.steps[family]
    evaluations = math.ceil(outer.STEPS / config.EVAL.EVERY) + 1
    # a held-out task costs first-order passes: two for a support image in each inner step, three for the query images,
    # which are scored before and after; in units of a step's
    support = 2.0 * (config.INNER.STEPS + config.INNER.DETACHED) * tasks.SUPPORT_SHOTS
    share = config.EVAL.TASKS * tasks.WAYS * (support + 3.0 * tasks.QUERY_SHOTS) / _passes(config)
    part = rates.parts[family]
    how = f"{outer.STEPS:,} steps of {seconds:.3g} s, {evaluations} evaluations of {share:.3g} steps"
    origin = MEASURED if part == 1 else FORMULA
    how += "" if part == 1 else f"; {100 * part:.2g} % of a step measured"
    yield Row(f"pretrain, {family}", "time", seconds * (outer.STEPS + evaluations * share), origin, how)
    memory = MemoryConfig.from_config(config)
    if rates.card:
        memory = replace(memory, budget=memory.budget or FITS * rates.card.memory)
        backbone = _as_on_gpu(backbone)
    passes = plan(memory, backbone, outer.BATCH, memory.bytes_on(backbone.device))
    yield Row(f"pretrain, {family}", "memory", _weights(backbone) + passes.estimate, FORMULA, f"weights; {passes}")


def _protocols(family: str, backbone: Backbone, rates: Rates) -> Iterator[Row]:
    """Yield the time of a trainer with such prompts, one seed, over the protocols; a gradient costs one more pass."""
    visual = family in ("visual", "joint")
    workers = worker_count() if rates.card or backbone.device.type == "cuda" else 1
    least = (COCOOP_STEP if family == "conditional" else FEW_SHOT_STEP / 32) if rates.card else 0.0  # for an image
    for protocol, (train, test, texts, single) in PROTOCOLS.items():
        classes = {"visual": 0, "conditional": single}.get(family, texts)
        training = train * (2 if visual else 1) / rates.images + 2 * classes / rates.texts
        decoding = (train + test) / rates.decoded / workers
        compute = max(training, train * least) + test / rates.images
        seconds = max(decoding, compute) if workers > 1 else decoding + compute
        how = f"{train:,} training and {test:,} test images, {classes:,} class prompts, at the rates of embed"
        yield Row(f"{protocol}, {family}", "time", seconds, FORMULA, f"{how}; one trainer, one seed")
