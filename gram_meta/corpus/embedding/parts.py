"""The parts of an embedding run: the features of each part's pairs, in a file of its own.

Batches are formed inside parts, so the features depend neither on where a run was interrupted nor on how many processes
share its parts. While the images of a part pass through their tower, the captions of the part before are encoded in
between, so that the processes that read images never wait for long; by then it is known which images are broken.
"""

from __future__ import annotations

import zipfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from gram_meta.corpus.embedding.index import Index
from gram_meta.corpus.loading import run_ahead
from gram_meta.corpus.places import NOT_FINITE, REASONS, ImageBatch, ImageFiles, ImageReader
from gram_meta.corpus.sources.rows import Place
from gram_meta.errors import GramError
from gram_meta.files import write_arrays
from gram_meta.images import DIGEST_BYTES

if TYPE_CHECKING:
    from torch import Tensor

    from gram_meta.backbone.clip import Backbone
    from gram_meta.corpus.embedding.sentences import SentenceModel

AHEAD = 4  # batches that each worker has ready
SENTENCES = 4  # batches that Sentence-BERT is given at a time


def part_path(folder: Path, part: int) -> Path:
    """Return the path of a part's file."""
    return folder / f"{part:06d}.npz"


def load_part(folder: Path, part: int, name: str) -> np.ndarray:
    """Return one array of a part's file; raise `GramError` if the file is missing or damaged."""
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
    count: Callable[[int], None],
    crop_on: str = "images",
) -> None:
    """Embed `parts` and write each to its file, in a thread and one behind the work.

    Args:
        root: the folder that the images' places are relative to.
        folder: of the parts' files.
        workers: processes that read images; 0: this one.
        count: called with the number of pairs that are done since its last call.
        crop_on: as for `gram_meta.embed`.

    Raises:
        GramError: a worker process died; a shard is missing or has changed.
    """
    images = _image_batches(index, parts, root, backbone, batch_size, workers, crop_on)
    last: _Part | None = None
    writing: Future[None] | None = None
    with ThreadPoolExecutor(1) as pool:
        for number in [*parts, None]:  # None: only the captions of the last part are left
            part = None if number is None else _Part(index, number, backbone, sentence_model, batch_size)
            for batch in range(part.batches if part else 0):
                assert part is not None
                part.add_images(next(images))
                count(part.share_of_pairs(batch))
                if last is not None:
                    last.encode_captions((batch + 1) / part.batches)
            if last is not None:
                arrays = last.arrays()
                if writing is not None:
                    writing.result()  # raises if that part could not be written
                writing = pool.submit(write_arrays, part_path(folder, last.number), arrays)
                count(last.pairs_left)
            if part is not None:
                part.finish_images()
            last = part
    if writing is not None:
        writing.result()


class _Part:
    """The features of a part's pairs, step by step; they stay on the towers' device, so that nothing waits for it."""

    def __init__(
        self, index: Index, number: int, backbone: Backbone, sentence_model: SentenceModel, batch_size: int
    ) -> None:
        self.index = index
        self.number = number
        self.backbone = backbone
        self.sentence_model = sentence_model
        self.batch_size = batch_size
        self.first = index.bounds[number]
        self.images = index.bounds[number + 1] - self.first  # that first appear in this part
        self.batches = -(-self.images // batch_size)
        self.pairs = self.pairs_left = index.sizes[number]
        self.status: list[int] = []  # indices into REASONS
        self.digests: list[bytes] = []
        self.image_features: list[Tensor] = []
        self.text_features: list[Tensor] = []  # of `texts`, by CLIP
        self.sentence_features: list[Tensor] = []  # of `texts`, by Sentence-BERT
        self.steps: list[tuple[Callable[[list[str]], Any], list[Tensor], list[str]]] = []
        self.done = 0
        self.shortened = 0

    # --- images ---------------------------------------------------------------------------------------------

    def add_images(self, batch: ImageBatch) -> None:
        """Encode one more batch of images."""
        import torch

        images, reasons, digests = batch
        self.status += reasons
        self.digests += digests
        if images is None:
            return
        with torch.no_grad():
            pixels = self.backbone.normalise(images.to(self.backbone.device, non_blocking=True))
            self.image_features.append(self.backbone.encode_images(pixels).to(torch.float16))

    def share_of_pairs(self, batch: int) -> int:
        """Return how many pairs to count as done after a batch of images; a tenth of all is left for the captions."""
        left = self.pairs - self.pairs * (batch + 1) // self.batches * 9 // 10
        more, self.pairs_left = self.pairs_left - left, left
        return more

    def finish_images(self) -> None:
        """Read the pairs, find the usable ones, and plan the encoding of their captions.

        Each caption is encoded once, in batches of about equal length.
        """
        import torch

        self.features = np.zeros((self.images, self.backbone.embed_dim), np.float16)
        status = np.array(self.status, np.uint8)
        if self.image_features:
            self.features[status == 0] = torch.cat(self.image_features).cpu().numpy()
        status[~np.isfinite(self.features).all(axis=1)] = REASONS.index(NOT_FINITE)
        self.image_status = status
        pairs = self.index.read(self.number, "image", "caption")
        self.image = pairs["image"].to_numpy()
        # as far as this part knows: an image of an earlier part may be broken
        self.usable = np.ones(len(self.image), bool)
        own = self.image >= self.first
        self.usable[own] = status[self.image[own] - self.first] == 0

        chosen = pairs["caption"].filter(pa.array(self.usable)).to_pylist()
        self.copies = Counter(chosen)
        texts = sorted(self.copies, key=len, reverse=True)
        row = {text: number for number, text in enumerate(texts)}
        self.text_of_pair = [row[caption] for caption in chosen]
        encode_sentences = partial(self.sentence_model.encode, batch_size=self.batch_size)
        for encode, features, size in (
            (self._encode_texts, self.text_features, self.batch_size),
            (encode_sentences, self.sentence_features, SENTENCES * self.batch_size),
        ):
            self.steps += [(encode, features, texts[at : at + size]) for at in range(0, len(texts), size)]

    # --- captions -------------------------------------------------------------------------------------------

    def encode_captions(self, share: float = 1.0) -> None:
        """Continue until this share of the captions' batches is encoded."""
        import torch

        while self.done < share * len(self.steps):
            encode, features, texts = self.steps[self.done]
            features.append(torch.as_tensor(encode(texts)).to(torch.float16))
            self.done += 1

    def _encode_texts(self, texts: list[str]) -> Tensor:
        import torch

        from gram_meta.backbone.clip import end_positions

        tokens, cut = tokens_of(self.backbone, texts)
        self.shortened += sum(self.copies[text] for text in cut)
        ends = end_positions(tokens)
        with torch.no_grad():
            embedded = self.backbone.embed_tokens(tokens[:, : int(ends.max()) + 1])
            return self.backbone.encode_text(embedded, ends)

    def arrays(self) -> dict[str, Any]:
        """Encode the captions that are left, and return the content of the part's file."""
        import torch

        self.encode_captions()
        texts = np.zeros((self.pairs, self.backbone.embed_dim), np.float16)
        sentences = np.zeros((self.pairs, self.sentence_model.width), np.float16)
        if self.text_of_pair:
            texts[self.usable] = torch.cat(self.text_features).cpu().numpy()[self.text_of_pair]
            sentences[self.usable] = torch.cat(self.sentence_features).cpu().numpy()[self.text_of_pair]
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
            # pairs whose image first appears in an earlier part: joining computes their similarity
            "late": np.flatnonzero(~own),
            "late_text_features": texts[~own],
            "shortened": np.int64(self.shortened),
        }


def cosine(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Return cosines (n,) float32 of normalised features (n, D) as they are stored, rounded to float16."""
    return np.einsum("nd,nd->n", images.astype(np.float32), texts.astype(np.float32))


def _image_batches(
    index: Index, parts: Sequence[int], root: Path, backbone: Backbone, batch_size: int, workers: int, crop_on: str
) -> Iterator[ImageBatch]:
    """Return an iterator over batches of images in the order of their parts, none across a part's border."""

    def batches() -> Iterator[list[Place]]:
        for part in parts:
            places = index.places_of(part)
            for start in range(0, len(places), batch_size):
                yield places[start : start + batch_size]

    return read_images(ImageReader(root, index.shard_bytes), batches(), backbone, workers, crop_on)


def read_images(
    reader: ImageReader, batches: Iterable[Sequence[Place]], backbone: Backbone, workers: int, crop_on: str
) -> Iterator[ImageBatch]:
    """Return an iterator over batches of images of the tower's size; `workers` processes read ahead."""
    # as bytes: a quarter of the memory of floats on their way between processes
    transform = backbone.preprocess(as_bytes=True, on_tensors=crop_on != "images")
    advice = "what is done is kept: run the same command again, with fewer workers if memory was short"
    if crop_on == "device":
        from gram_meta.corpus.on_device import DeviceDecoder, JpegFiles

        encoded = run_ahead(JpegFiles(reader, transform).read_encoded, batches, workers, advice, prefetch=AHEAD)
        return map(DeviceDecoder(backbone).decode, encoded)
    on_gpu = backbone.device.type == "cuda"
    return run_ahead(ImageFiles(reader, transform).read, batches, workers, advice, prefetch=AHEAD, pin_memory=on_gpu)


# --- captions that are too long -----------------------------------------------------------------------------


def tokens_of(backbone: Backbone, texts: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Return CLIP's tokens (n, 77) of texts, cut at their end if they do not fit, and the texts that had to be cut."""
    try:
        return backbone.tokenize(texts), []
    except GramError:
        pass  # at least one is too long
    fitted = [fit_text(backbone, text) for text in texts]
    return backbone.tokenize(fitted), [a for a, b in zip(texts, fitted, strict=True) if a != b]


def fit_text(backbone: Backbone, text: str) -> str:
    """Return the words of a text that fit into CLIP's positions, or the letters if the first word does not fit."""

    def too_long(pieces: Sequence[str]) -> bool:
        try:
            backbone.tokenize([join.join(pieces)])
        except GramError:
            return True
        return False

    pieces, join = text.split(" "), " "
    if too_long(pieces[:1]):
        pieces, join = list(text), ""
    return join.join(pieces[: bisect_left(range(len(pieces) + 1), True, key=lambda n: too_long(pieces[:n])) - 1])
