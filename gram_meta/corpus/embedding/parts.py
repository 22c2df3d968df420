"""The parts of an embedding run: what the towers make of the pairs of each, in a file of its own.

Batches are formed inside parts, so the features depend neither on where a run was interrupted nor on how many processes
share its parts. While the images of a part pass through their tower, the captions of the part before are encoded in
between, so that the processes that read images never wait for long; whose image was broken is known by then.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from gram_meta.corpus.embedding.index import Index
from gram_meta.corpus.images import DIGEST_BYTES, NOT_FINITE, REASONS, ImageFiles, collate, images_of
from gram_meta.corpus.places import ImageReader, Place
from gram_meta.errors import GramError
from gram_meta.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

    from gram_meta.backbone.clip import Backbone
    from gram_meta.corpus.embedding.sentences import SentenceModel

AHEAD = 4  # batches that each worker has ready
SENTENCES = 4  # batches that Sentence-BERT is given at a time


def part_path(folder: Path, part: int) -> Path:
    return folder / f"{part:06d}.npz"


def load_part(folder: Path, part: int, name: str) -> np.ndarray:
    """One array of a part's file.

    Raises:
        GramError: not there, or damaged.
    """
    path = part_path(folder, part)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise GramError(
            f"{path}: expected a part of the store, found {error}; delete it and run the same command again"
        ) from None


def embed_parts(
    index: Index,
    parts: Sequence[int],
    root: Path,
    folder: Path,
    backbone: Backbone,
    sentence_model: SentenceModel,
    batch_size: int,
    workers: int,
    tell: Callable[[int], None],
) -> None:
    """Embed `parts` and write each to its file.

    Args:
        root: folder that the images' places are relative to.
        folder: of the parts' files.
        workers: processes that read images; 0: this one.
        tell: is called with numbers of pairs that are done, whose sum over all parts is the number of their pairs.

    Raises:
        GramError: a worker process died; a shard is gone or has changed.
    """
    images = _image_batches(index, parts, root, backbone, batch_size, workers)
    last: _Part | None = None
    with _Writer(folder) as writer:
        for number in parts:
            part = _Part(index, number, backbone, sentence_model, batch_size)
            for batch in range(part.batches):
                part.add_images(*next(images))
                tell(part.share_of_pairs(batch))
                if last is not None:
                    last.encode_captions((batch + 1) / part.batches)
            if last is not None:
                writer.write(last)
                tell(last.pairs_left)
            part.images_are_done()
            last = part
        if last is not None:
            writer.write(last)
            tell(last.pairs_left)


class _Writer:
    """Writes parts in a thread, one behind the work; an error of it comes up at the next part or at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self.pool.shutdown()
        if kind is None:
            self._check()

    def write(self, part: _Part) -> None:
        arrays = part.arrays()
        self._check()
        self.pending = self.pool.submit(_write, part_path(self.folder, part.number), arrays)

    def _check(self) -> None:
        if self.pending is not None:
            self.pending.result()


def _write(path: Path, arrays: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        np.savez(file, **arrays)


class _Part:
    """What is known of a part's pairs, step by step: images, then captions.

    Features stay on the towers' device until a part is done, so that nothing waits for a GPU in between.
    """

    def __init__(
        self, index: Index, number: int, backbone: Backbone, sentence_model: SentenceModel, batch_size: int
    ) -> None:
        self.number = number
        self.backbone = backbone
        self.sentence_model = sentence_model
        self.batch_size = batch_size
        self.first = index.bounds[number]
        self.images = index.bounds[number + 1] - self.first  # that this part brings in
        self.batches = -(-self.images // batch_size)
        self.pairs = self.pairs_left = index.sizes[number]
        self.image, captions = index.pairs_of(number)
        self.captions: list[str] = captions.to_pylist()
        self.status: list[int] = []  # indices into REASONS
        self.digests: list[bytes] = []
        self.image_features: list[Tensor] = []
        self.steps: list[Callable[[], None]] = []
        self.done = 0

    # --- images ---------------------------------------------------------------------------------------------

    def add_images(self, images: Tensor | None, reasons: list[int], digests: list[bytes]) -> None:
        """One more batch: the readable images (k, 3, H, W) as bytes, reasons and digests of all."""
        import torch

        self.status += reasons
        self.digests += digests
        if images is None:
            return
        with torch.no_grad():
            pixels = self.backbone.normalise(images.to(self.backbone.device, non_blocking=True))
            self.image_features.append(self.backbone.encode_images(pixels).to(torch.float16))

    def share_of_pairs(self, batch: int) -> int:
        """Pairs to be told of after a batch of images; a tenth of them stands for the captions."""
        left = self.pairs - self.pairs * (batch + 1) // self.batches * 9 // 10
        more, self.pairs_left = self.pairs_left - left, left
        return more

    def images_are_done(self) -> None:
        """Now it is known whose captions are needed."""
        width = self.backbone.embed_dim
        self.features = np.zeros((self.images, width), np.float16)
        status = np.array(self.status, np.uint8)
        if self.image_features:
            self.features[status == 0] = _joined(self.image_features)
        status[~np.isfinite(self.features).all(axis=1)] = REASONS.index(NOT_FINITE)
        self.image_status = status
        # as far as this part knows: an image of an earlier part may be broken
        self.usable = np.ones(len(self.image), bool)
        own = self.image >= self.first
        self.usable[own] = status[self.image[own] - self.first] == 0
        self._plan_captions()

    # --- captions -------------------------------------------------------------------------------------------

    def _plan_captions(self) -> None:
        """Every different caption is encoded once, in batches of about equal length."""
        chosen = [caption for caption, use in zip(self.captions, self.usable, strict=True) if use]
        self.captions = []
        self.count = Counter(chosen)
        different = list(self.count)
        number = {caption: row for row, caption in enumerate(different)}
        self.again = [number[caption] for caption in chosen]
        self.shortened = 0
        self.texts, self.sentences = _Ordered(different), _Ordered(different)
        texts = self.texts.batches(self.batch_size)
        sentences = self.sentences.batches(SENTENCES * self.batch_size)
        self.steps = [partial(self._encode_texts, batch) for batch in texts]
        self.steps += [partial(self._encode_sentences, batch) for batch in sentences]

    def _encode_texts(self, texts: list[str]) -> None:
        import torch

        from gram_meta.backbone.clip import end_positions

        tokens, cut = tokens_of(self.backbone, texts)
        self.shortened += sum(self.count[text] for text in cut)
        ends = end_positions(tokens)
        with torch.no_grad():
            own = self.backbone.embed_tokens(tokens[:, : int(ends.max()) + 1])
            self.texts.kept.append(self.backbone.encode_text(own, ends).to(torch.float16))

    def _encode_sentences(self, sentences: list[str]) -> None:
        import torch

        features = self.sentence_model.encode(sentences, self.batch_size)
        self.sentences.kept.append(torch.from_numpy(features).to(torch.float16))

    def encode_captions(self, share: float = 1.0) -> None:
        """Go on until this share of the captions' work is done."""
        while self.done < share * len(self.steps):
            self.steps[self.done]()
            self.done += 1

    def arrays(self) -> dict[str, Any]:
        """What the part's file holds, captions that are left included."""
        self.encode_captions()
        texts = np.zeros((self.pairs, self.backbone.embed_dim), np.float16)
        sentences = np.zeros((self.pairs, self.sentence_model.width), np.float16)
        if self.again:
            texts[self.usable] = self.texts.features()[self.again]
            sentences[self.usable] = self.sentences.features()[self.again]
        own = self.image >= self.first
        similarity = np.zeros(self.pairs, np.float32)
        similarity[own] = cosine(self.features[self.image[own] - self.first], texts[own])
        return {
            "status": self.image_status,
            "digests": np.frombuffer(b"".join(self.digests), np.uint8).reshape(-1, DIGEST_BYTES),
            "image_features": self.features,
            "sentence_features": sentences,
            "finite": np.isfinite(texts).all(axis=1) & np.isfinite(sentences).all(axis=1),
            "similarity": similarity,
            # of pairs whose image an earlier part has brought in; their similarity is computed when parts are joined
            "late": np.flatnonzero(~own),
            "late_text_features": texts[~own],
            "shortened": np.int64(self.shortened),
        }


def cosine(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """(n,) float32 from normalised features (n, D) as they are stored, rounded to float16."""
    return np.einsum("nd,nd->n", images.astype(np.float32), texts.astype(np.float32))


class _Ordered:
    """Texts from the longest to the shortest, and their features in the order in which they were given."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        self.kept: list[Tensor] = []

    def batches(self, size: int) -> Iterator[list[str]]:
        for start in range(0, len(self.order), size):
            yield [self.texts[row] for row in self.order[start : start + size]]

    def features(self) -> np.ndarray:
        joined = _joined(self.kept)
        features = np.empty_like(joined)
        features[self.order] = joined
        return features


def _joined(features: list[Tensor]) -> np.ndarray:
    import torch

    return torch.cat(features).cpu().numpy()


# --- reading images -----------------------------------------------------------------------------------------


def _image_batches(
    index: Index, parts: Sequence[int], root: Path, backbone: Backbone, batch_size: int, workers: int
) -> Iterator[tuple[Tensor | None, list[int], list[bytes]]]:
    """Batches of images in the order of their parts, none across a part's border; workers read ahead."""
    from torch.utils.data import DataLoader

    def places() -> Iterator[list[Place]]:
        for part in parts:
            of_part = index.places_of(part)
            for start in range(0, len(of_part), batch_size):
                yield of_part[start : start + batch_size]

    # as bytes: a quarter of what floats would need on their way between processes
    files = ImageFiles(ImageReader(root, index.shard_bytes), backbone.preprocess(as_bytes=True))
    loader: DataLoader[Any] = DataLoader(
        cast(Any, files),
        batch_sampler=_Lists(places),
        num_workers=workers,
        collate_fn=collate,
        prefetch_factor=AHEAD if workers else None,
        pin_memory=backbone.device.type == "cuda",
    )
    advice = "what is done is kept: run the same command again, with fewer workers if memory was short"
    for batch in images_of(loader, advice):
        if isinstance(batch, GramError):
            raise batch
        yield batch


class _Lists:
    """A batch sampler over batches that are made when they are asked for."""

    def __init__(self, make: Callable[[], Iterator[list[Place]]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[list[Place]]:
        return self.make()


# --- captions that are too long -----------------------------------------------------------------------------


def tokens_of(backbone: Backbone, texts: Sequence[str]) -> tuple[Tensor, list[str]]:
    """CLIP's tokens (n, 77) of texts, cut at their end where they do not fit, and those that had to be cut."""
    try:
        return backbone.tokenize(texts), []
    except GramError:
        pass  # one of them is too long: look at each
    fitted, _ = fit_texts(backbone, texts)
    return backbone.tokenize(fitted), [a for a, b in zip(texts, fitted, strict=True) if a != b]


def fit_texts(backbone: Backbone, texts: Sequence[str]) -> tuple[list[str], int]:
    """Texts cut at their end to fit into CLIP's positions, and how many had to be cut."""
    fitted = [text if _fits(backbone, text) else _shortened(backbone, text) for text in texts]
    return fitted, sum(a != b for a, b in zip(fitted, texts, strict=True))


def _fits(backbone: Backbone, text: str) -> bool:
    try:
        backbone.tokenize([text])
        return True
    except GramError:
        return False


def _shortened(backbone: Backbone, text: str) -> str:
    words = text.split(" ")
    if not _fits(backbone, words[0]):
        words, join = list(text), ""
    else:
        join = " "
    fits, too_long = 0, len(words)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        fits, too_long = (middle, too_long) if _fits(backbone, join.join(words[:middle])) else (fits, middle)
    return join.join(words[:fits])
