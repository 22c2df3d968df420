"""The packaged small CLIP, `gram-small`: OpenAI's architecture, trained on the emoji world.

scripts/train_packaged_clip.py trains it. The weights file is float16 and has only the embedding rows of tokens that
occurred in training. Loading puts them into the full table of 49,408 rows, so that `clip.model.build_model` and CLIP's
tokenizer work unchanged.
"""

from __future__ import annotations

import json
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gram_meta.errors import GramError
from gram_meta.files import atomic_write

if TYPE_CHECKING:
    import numpy as np
    import torch

NAME = "gram-small"
VOCABULARY = 49_408
_ROWS, _IDS = "token_embedding.rows", "token_embedding.ids"
_FORMAT = "gram-small-1"


def weights_path() -> Path:
    """Return the path of the packaged weights."""
    return Path(str(resources.files("gram_meta.backbone").joinpath(f"{NAME}.safetensors")))


def load_packaged_state_dict(path: Path | None = None) -> dict[str, torch.Tensor]:
    """Return the full state dict under OpenAI's names, float32, as `clip.model.build_model` expects it.

    Embedding rows of tokens that were never trained hold the mean of the trained rows (see `untrained_tokens`). Raises
    `GramError` if the file is missing or not of this format.
    """
    import torch

    tensors = _read(str(path or weights_path()))
    state = {name: tensor.float() for name, tensor in tensors.items() if name not in (_ROWS, _IDS)}
    rows = tensors[_ROWS].float()  # (V, d)
    table = rows.mean(0, keepdim=True).repeat(VOCABULARY, 1)
    table[tensors[_IDS].long()] = rows
    state["token_embedding.weight"] = table
    state["logit_scale"] = state["logit_scale"].reshape(())
    sizes = {"input_resolution": 64, "context_length": 77, "vocab_size": VOCABULARY}  # as in published archives
    return state | {name: torch.tensor(size) for name, size in sizes.items()}


def untrained_tokens(texts: list[str]) -> dict[str, list[str]]:
    """Return the texts with tokens that were never trained, each with these tokens as words."""
    tensors = _read(str(weights_path()))
    known = set(tensors[_IDS].tolist())
    bpe = _tokenizer()
    out = {}
    for text in texts:
        unknown = [bpe.decoder[token].replace("</w>", "") for token in bpe.encode(text) if token not in known]
        if unknown:
            out[text] = unknown
    return out


def save_packaged(model: dict[str, torch.Tensor], ids: np.ndarray, path: Path, training: dict) -> None:
    """Write a training state (compact embedding table) as a packaged weights file, atomically."""
    import torch
    from safetensors.torch import save

    tensors = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in model.items()}
    tensors[_ROWS] = tensors.pop("token_embedding.weight")
    tensors[_IDS] = torch.as_tensor(ids).to(torch.int32)
    tensors["logit_scale"] = model["logit_scale"].detach().float().reshape(1)  # one number: keep it exact
    text = {"format": _FORMAT, "name": NAME, "training": json.dumps(training, sort_keys=True)}
    with atomic_write(path) as file:
        file.write(save(tensors, metadata=text))


@lru_cache(maxsize=2)
def _read(path: str) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    if not Path(path).is_file():
        raise GramError(f"{path}: expected the weights of {NAME}, found nothing there")
    with safe_open(path, framework="pt") as file:
        found = (file.metadata() or {}).get("format")
        if found != _FORMAT:
            raise GramError(f"{path}: expected weights in the format {_FORMAT}, found {found!r}")
        return {name: file.get_tensor(name) for name in file.keys()}


@cache
def _tokenizer() -> Any:
    from clip.simple_tokenizer import SimpleTokenizer

    return SimpleTokenizer()
