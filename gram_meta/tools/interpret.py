"""The words nearest to learned context tokens, as CoOp's interpret_prompt.py looks for them, for any backbone.

Distances are Euclidean, to the rows of CLIP's token embedding. A learned token need not be near any word.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gram_meta.backbone.clip import Backbone, clip_module, load_backbone
from gram_meta.engine.checkpoints import read_checkpoint
from gram_meta.errors import GramError
from gram_meta.files import PathLike, read_json
from gram_meta.method.checkpoint import load_meta_checkpoint
from gram_meta.runs.coop_log import FILE as LOG
from gram_meta.runs.coop_log import read_log
from gram_meta.runs.reader import options_of

META = "best.safetensors"  # of a folder of `gram pretrain`

# What learners call their context: CoOp's, CoCoOp's and ours save it alone, MaPLe's family the whole model
_CONTEXT = ("ctx", "prompt_learner.ctx")
_VISUAL = ("visual_ctx", "image_encoder.VPT")


@dataclass(frozen=True)
class LearnedPrompt:
    """A context as it was saved, and what is known of where it comes from.

    Attributes:
        path: the file.
        context: (M, d), or (N, M, d) with a context per class; float32.
        trainer, backbone, fingerprint: "" where nothing says.
        epoch: 0 where nothing says, and for meta-checkpoints.
        classnames: of a context per class; empty where nothing says.
        remarks: what a reader of the words should know.
    """

    path: Path
    context: Tensor
    trainer: str = ""
    backbone: str = ""
    fingerprint: str = ""
    epoch: int = 0
    classnames: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class NearWord:
    """One line: a context token's word of some rank."""

    class_index: int | None  # None: the context of all classes
    classname: str
    token: int  # from 1, in the order of the prompt
    rank: int  # from 1, nearest first
    word: str  # as one reads it
    piece: str  # as CLIP's vocabulary has it: "</w>" ends a word
    id: int
    distance: float


@dataclass(frozen=True)
class Interpretation:
    """Nearest words of a prompt."""

    prompt: LearnedPrompt
    backbone: str
    words: list[NearWord]
    remarks: list[str] = field(default_factory=list)


def interpret(path: PathLike, topk: int = 5, backbone: str = "", epoch: int | None = None) -> Interpretation:
    """Nearest vocabulary words of a run's prompt, of a checkpoint's, or of a meta-checkpoint's.

    Args:
        path: a run's output folder, a checkpoint (`model.pth.tar-10`), or a meta-checkpoint (`.safetensors`).
        topk: how many words per context token.
        backbone: the CLIP it was learned with, where neither results.json nor a log beside it says so.
        epoch: of a run's checkpoints; None: the one that the run would be tested with.

    Raises:
        GramError: nothing readable there, no text prompt in it, no backbone known, or another backbone.
    """
    if topk < 1:
        raise GramError(f"--topk is {topk}; expected at least 1")
    prompt = read_prompt(path, epoch)
    name = backbone or prompt.backbone
    if not name:
        raise GramError(
            f"{prompt.path}: expected a results.json or log.txt of its run, which names the backbone, found none; "
            "name it with --backbone"
        )
    clip = load_backbone(name)
    if prompt.fingerprint and prompt.fingerprint != clip.fingerprint:
        raise GramError(
            f"{prompt.path}: was learned with {prompt.backbone or 'another CLIP'} ({prompt.fingerprint[:12]}), found "
            f"{name} ({clip.fingerprint[:12]})"
        )
    if prompt.context.shape[-1] != clip.text_width:
        raise GramError(
            f"{prompt.path}: holds context tokens of width {prompt.context.shape[-1]}, but {name} has word embeddings of "
            f"width {clip.text_width}; name its own backbone with --backbone"
        )
    words, remarks = _near_words(prompt, clip, topk)
    return Interpretation(prompt, name, words, [*prompt.remarks, *remarks])


def nearest_rows(context: Tensor, embedding: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The nearest rows of an embedding (V, d) to tokens (..., d).

    Returns:
        distances and indices, each (..., topk), nearest first; equal distances in the order of the vocabulary.
    """
    flat = context.flatten(0, -2)  # (T, d)
    # exact differences: |x|^2 + |y|^2 - 2xy loses the distance of a token that has hardly moved from a word
    exact = "donot_use_mm_for_euclid_dist"
    distances = torch.cat([torch.cdist(some, embedding, compute_mode=exact) for some in flat.split(256)])  # (T, V)
    distances, indices = (found[:, :topk] for found in distances.sort(dim=1, stable=True))
    shape = (*context.shape[:-1], distances.shape[1])
    return distances.reshape(shape), indices.reshape(shape)


def _near_words(prompt: LearnedPrompt, clip: Backbone, topk: int) -> tuple[list[NearWord], list[str]]:
    embedding = clip.model.token_embedding.weight.float()  # (V, d)
    rows, remarks = _told_apart(embedding)
    contexts = prompt.context if prompt.context.dim() == 3 else prompt.context[None]  # (N or 1, M, d)
    distances, near = nearest_rows(contexts, embedding[rows], topk)  # (N, M, topk)
    ids = rows[near]
    bpe = clip_module().simple_tokenizer.SimpleTokenizer()
    words = []
    for n, m, rank in (
        (n, m, k) for n in range(ids.shape[0]) for m in range(ids.shape[1]) for k in range(ids.shape[2])
    ):
        token = int(ids[n, m, rank])
        piece = bpe.decoder.get(token, f"<{token}>")
        word = bpe.decode([token]).strip() if token in bpe.decoder else piece
        index = n if prompt.context.dim() == 3 else None
        classname = prompt.classnames[n] if index is not None and n < len(prompt.classnames) else ""
        words.append(NearWord(index, classname, m + 1, rank + 1, word, piece, token, float(distances[n, m, rank])))
    return words, remarks


def _told_apart(embedding: Tensor) -> tuple[Tensor, list[str]]:
    """Rows that are one token's alone: those that many share (tokens that were never trained) are no words."""
    probe = torch.randn(embedding.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, inverse, counts = (embedding * probe).sum(1).unique(return_inverse=True, return_counts=True)
    own = counts[inverse] == 1  # (V,)
    rows = own.nonzero().squeeze(1)
    if len(rows) == len(own):
        return rows, []
    return rows, [f"left out: {len(own) - len(rows)} of {len(own)} tokens, whose embeddings are one and the same"]


# ------------------------------------------------------------------------------------------------- where prompts are


def read_prompt(path: PathLike, epoch: int | None = None) -> LearnedPrompt:
    """The text prompt in a run folder, a checkpoint or a meta-checkpoint; see `interpret`."""
    path = Path(path)
    if path.is_dir():
        if (path / META).is_file():
            return _from_meta(path / META)
        return _from_checkpoint(_checkpoint_in(path, epoch), path)
    if path.suffix == ".safetensors":
        return _from_meta(path)
    if not path.is_file():
        raise GramError(f"{path}: expected a run's folder, a checkpoint or a meta-checkpoint, found nothing there")
    return _from_checkpoint(path, path.parent.parent)  # RUN/prompt_learner/model.pth.tar-10


def _from_meta(path: Path) -> LearnedPrompt:
    meta = load_meta_checkpoint(path)
    if "text" not in meta.prompts:
        raise _no_words(path)
    remarks = []
    if "visual" in meta.prompts:
        remarks.append(_visual_remark(len(meta.prompts["visual"])))
    if meta.extras:
        remarks.append(_CONDITIONAL)
    return LearnedPrompt(
        path, meta.prompts["text"], "", meta.backbone_name, meta.backbone_fingerprint, remarks=tuple(remarks)
    )


_CONDITIONAL = "the words are of the context before its meta-net shifts it, for each image in another way"


def _from_checkpoint(path: Path, run: Path) -> LearnedPrompt:
    state = read_checkpoint(path)
    tensors = state.get("state_dict", state)
    tensors = {str(key).removeprefix("module."): value for key, value in tensors.items() if isinstance(value, Tensor)}
    context = next((tensors[key] for key in _CONTEXT if key in tensors), None)
    visual = next((tensors[key] for key in _VISUAL if key in tensors), None)
    if context is None:
        if visual is not None:
            raise _no_words(path)
        some = ", ".join(list(tensors)[:4]) or "no tensors"
        raise GramError(f"{path}: expected a learned context ({' or '.join(_CONTEXT)}), found {some}")
    if context.dim() not in (2, 3):
        raise GramError(f"{path}: expected a context of shape (M, d) or (N, M, d), found {tuple(context.shape)}")
    remarks = []
    if visual is not None:
        remarks.append(_visual_remark(visual.shape[-2]))
    if any("meta_net." in key for key in tensors):
        remarks.append(_CONDITIONAL)
    if any("compound_prompts" in key or "VPT_shallow" in key for key in tensors):
        remarks.append("prompts of deeper layers are no word embeddings and are left out")
    facts = _facts_of(run) | _own_facts(state)
    names = state.get("classnames")
    return LearnedPrompt(
        path,
        context.detach().float(),
        str(state.get("trainer") or facts.get("trainer", "")),
        facts.get("backbone", ""),
        facts.get("fingerprint", ""),
        int(state["epoch"]) if isinstance(state.get("epoch"), int) else 0,
        tuple(map(str, names)) if isinstance(names, list) else (),
        tuple(remarks),
    )


def _own_facts(state: dict[str, Any]) -> dict[str, str]:
    """What a checkpoint of ours says of its backbone itself."""
    backbone = state.get("backbone")
    if not isinstance(backbone, dict):
        return {}
    return {"backbone": str(backbone.get("name", "")), "fingerprint": str(backbone.get("fingerprint", ""))}


def _no_words(path: Path) -> GramError:
    return GramError(
        f"{path}: holds a visual prompt alone; visual prompts stand beside patches of images and have no words"
    )


def _visual_remark(tokens: int) -> str:
    return f"{tokens} visual tokens beside them have no words"


def _facts_of(run: Path) -> dict[str, str]:
    """Trainer and backbone of a run, from the first of results.json, run.json and log.txt that is there."""
    if (run / "results.json").is_file():
        it = read_json(run / "results.json")
        return {
            "trainer": it.get("trainer", ""),
            "backbone": it.get("backbone", ""),
            "fingerprint": it.get("backbone_fingerprint", ""),
        }
    if (run / "run.json").is_file():
        told = read_json(run / "run.json").get("run", {})
        if told.get("MODEL.BACKBONE.NAME"):
            return {"trainer": told.get("TRAINER.NAME", ""), "backbone": told["MODEL.BACKBONE.NAME"]}
    log = read_log(run / LOG) if (run / LOG).is_file() else None
    if log is None:
        return {}
    config: dict[str, Any] = log.config
    backbone = ((config.get("MODEL") or {}).get("BACKBONE") or {}).get("NAME", "")
    return {"trainer": str((config.get("TRAINER") or {}).get("NAME", "")), "backbone": str(backbone)}


def _checkpoint_in(run: Path, epoch: int | None) -> Path:
    """The checkpoint in a run's folder, or in that of the run it evaluates."""
    folders = sorted({file.parent for file in run.glob("*/model*.pth.tar*")})
    tested = _model_dir(run)
    if not folders and tested is not None:
        return _checkpoint_in(tested, epoch)
    if len(folders) != 1:
        found = ", ".join(sorted(it.name for it in run.iterdir())[:8]) or "nothing"
        named = ", ".join(folder.name for folder in folders)
        raise GramError(
            f"{run}: expected a run with one folder of checkpoints, such as prompt_learner/, found {named or found}"
        )
    folder = folders[0]
    best = folder / "model-best.pth.tar"
    epochs = sorted(
        int(suffix) for it in folder.glob("model.pth.tar-*") if (suffix := it.name.rpartition("-")[2]).isdigit()
    )
    ends_with = options_of(run).get("TEST.FINAL_MODEL", "")
    if epoch is None and best.is_file() and (not epochs or ends_with in ("best_val", "")):
        return best
    if not epochs or (epoch is not None and epoch not in epochs):
        asked = "any epoch" if epoch is None else f"epoch {epoch}"
        raise GramError(f"{folder}: expected {asked}, found {', '.join(map(str, epochs)) or 'none'}")
    return folder / f"model.pth.tar-{epochs[-1] if epoch is None else epoch}"


def _model_dir(run: Path) -> Path | None:
    if (run / "results.json").is_file():
        named = read_json(run / "results.json").get("model_dir")
    else:
        log = read_log(run / LOG) if (run / LOG).is_file() else None
        named = log.arguments.get("model_dir") if log else None
    return Path(named) if named and Path(named).is_dir() and Path(named).resolve() != run.resolve() else None
