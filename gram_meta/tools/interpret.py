"""The words nearest to learned context tokens, as CoOp's interpret_prompt.py finds them, for any backbone.

Distances are Euclidean, to the rows of CLIP's token embedding. A learned token need not be near any word.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gram_meta.backbone.clip import Backbone, clip_module
from gram_meta.errors import GramError
from gram_meta.files import PathLike
from gram_meta.method.prompts import STATE_NAMES
from gram_meta.runs.reader import Saved, load_clip_of, read_saved

# Names of the context: CoOp's, CoCoOp's and our trainers save it alone, MaPLe's family saves the whole model
_CONTEXT = (STATE_NAMES["text"], "prompt_learner.ctx")
_VISUAL = (STATE_NAMES["visual"], "image_encoder.VPT")


@dataclass(frozen=True)
class NearWord:
    """A word near a context token."""

    class_index: int | None  # None: the context of all classes
    classname: str
    token: int  # from 1, in the order of the prompt
    rank: int  # from 1, nearest first
    word: str  # as text
    piece: str  # as in CLIP's vocabulary: "</w>" ends a word
    id: int
    distance: float


@dataclass(frozen=True)
class Interpretation:
    """The nearest words of a prompt."""

    saved: Saved  # the run or checkpoint of the prompt
    context: Tensor  # (M, d), or (N, M, d) with a context per class; float32
    backbone: str
    words: list[NearWord]
    remarks: list[str]  # on tensors without words


def interpret(path: PathLike, topk: int = 5, backbone: str = "", epoch: int | None = None) -> Interpretation:
    """Return the vocabulary words nearest to a learned text prompt.

    Args:
        path: a run's output folder, a checkpoint (`model.pth.tar-10`), or a meta-checkpoint (`.safetensors`).
        topk: number of words for each context token.
        backbone: the CLIP it was learned with, if no file beside it names one.
        epoch: of a run's checkpoints; None: the one that an evaluation of the run loads.

    Raises:
        GramError: no readable file, no text prompt in it, no backbone known, or another backbone.
    """
    if topk < 1:
        raise GramError(f"--topk is {topk}; expected at least 1")
    saved = read_saved(path, epoch)
    context, remarks = _context_of(saved)
    clip = load_clip_of(saved, backbone, {"text": context.shape[-1]})
    if (width := context.shape[-1]) != clip.text_width:
        found = f"{clip.name} has word embeddings of width {clip.text_width}; name its own backbone with --backbone"
        raise GramError(f"{saved.path}: holds context tokens of width {width}, but {found}")
    words, left_out = _near_words(context, saved.classnames or [], clip, topk)
    return Interpretation(saved, context, clip.name, words, remarks + left_out)


def nearest_rows(context: Tensor, embedding: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return the rows of an embedding (V, d) nearest to tokens (..., d).

    Returns:
        Distances and indices, each (..., topk), nearest first; equal distances in the order of the vocabulary.
    """
    flat = context.flatten(0, -2)  # (T, d)
    # exact differences: |x|^2 + |y|^2 - 2xy loses the distance of a token that is very near to a word
    exact = "donot_use_mm_for_euclid_dist"
    distances = torch.cat([torch.cdist(some, embedding, compute_mode=exact) for some in flat.split(256)])  # (T, V)
    distances, indices = (found[:, :topk] for found in distances.sort(dim=1, stable=True))
    shape = (*context.shape[:-1], distances.shape[1])
    return distances.reshape(shape), indices.reshape(shape)


def _near_words(context: Tensor, classnames: list[str], clip: Backbone, topk: int) -> tuple[list[NearWord], list[str]]:
    embedding = clip.model.token_embedding.weight.float()  # (V, d)
    rows, remarks = _own_rows(embedding)
    contexts = context if context.dim() == 3 else context[None]  # (N or 1, M, d)
    distances, near = nearest_rows(contexts, embedding[rows], topk)  # (N, M, topk)
    ids = rows[near]
    bpe = clip_module().simple_tokenizer.SimpleTokenizer()
    words = []
    for n, m, rank in np.ndindex(*ids.shape):
        token = int(ids[n, m, rank])
        piece = bpe.decoder.get(token, f"<{token}>")
        word = bpe.decode([token]).strip() if token in bpe.decoder else piece
        index = n if context.dim() == 3 else None
        classname = classnames[n] if index is not None and n < len(classnames) else ""
        words.append(NearWord(index, classname, m + 1, rank + 1, word, piece, token, float(distances[n, m, rank])))
    return words, remarks


def _own_rows(embedding: Tensor) -> tuple[Tensor, list[str]]:
    """Return the rows that belong to one token only; tokens that were never trained share one row, and are no words."""
    probe = torch.randn(embedding.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, inverse, counts = (embedding * probe).sum(1).unique(return_inverse=True, return_counts=True)
    own = counts[inverse] == 1  # (V,)
    rows = own.nonzero().squeeze(1)
    if len(rows) == len(own):
        return rows, []
    return rows, [f"left out: {len(own) - len(rows)} of {len(own)} tokens, which share one embedding"]


def _context_of(saved: Saved) -> tuple[Tensor, list[str]]:
    """Return the learned text prompt, (M, d) or (N, M, d) in float32, and remarks on the other learned tensors."""
    tensors = saved.state_dict
    context, visual = (next((tensors[it] for it in names if it in tensors), None) for names in (_CONTEXT, _VISUAL))
    if context is None:
        some = ", ".join(list(tensors)[:4]) or "no tensors"
        hint = "" if visual is None else " (a visual prompt, which has no words)"
        raise GramError(f"{saved.path}: expected a learned context ({' or '.join(_CONTEXT)}), found {some}{hint}")
    if context.dim() not in (2, 3):
        raise GramError(f"{saved.path}: expected a context of shape (M, d) or (N, M, d), found {tuple(context.shape)}")
    remarks = []
    if visual is not None:
        remarks.append(f"{visual.shape[-2]} visual tokens beside them have no words")
    if any("meta_net." in name for name in tensors):
        remarks.append("the words are those of the context before its meta-net shifts it for each image")
    if any("compound_prompts" in name or "VPT_shallow" in name for name in tensors):
        remarks.append("prompts of deeper layers are no word embeddings and are left out")
    return context.detach().float(), remarks
