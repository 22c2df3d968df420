"""A meta-checkpoint's prompt as a checkpoint for MODEL.INIT_WEIGHTS, for trainers that know nothing of GRAM.

Dassl's `load_pretrained_weights` copies tensors that agree in name and in size, and only prints the names of the others.
The file therefore has the names of the target trainer, and the command prints the numbers of tokens to set. The file
holds only the prompt: the regulator acts in the GRAM trainers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gram_meta.config import nearest
from gram_meta.errors import GramError
from gram_meta.files import PathLike, atomic_write
from gram_meta.method.checkpoint import MetaCheckpoint, load_meta_checkpoint
from gram_meta.method.prompts import KINDS, META_NET, STATE_NAMES

FORMAT = 1


@dataclass(frozen=True)
class Target:
    """A trainer that can start from a prompt.

    Attributes:
        names: what it calls each kind of prompt.
        options: the keys that have to say the numbers of tokens, by kind.
        meta_net: whether it learns CoCoOp's meta-net too.
    """

    names: dict[str, str]
    options: dict[str, str]
    meta_net: bool = False


_TEXT, _VISUAL = ({kind: STATE_NAMES[kind]} for kind in KINDS)
_FAMILY = {"text": "prompt_learner.ctx", "visual": "image_encoder.VPT"}  # the whole model is loaded there


def _of_the_family(node: str, text: bool = True) -> Target:
    names = _FAMILY if text else {"visual": _FAMILY["visual"]}
    keys = {"text": f"TRAINER.{node}.N_CTX_TEXT", "visual": f"TRAINER.{node}.N_CTX_VISION"}
    return Target(names, {kind: keys[kind] for kind in names})


_COOP = Target(_TEXT, {"text": "TRAINER.COOP.N_CTX"})
_COCOOP = Target(_TEXT, {"text": "TRAINER.COCOOP.N_CTX"}, meta_net=True)
_VPT = Target(_VISUAL, {"visual": "TRAINER.VPT.N_CTX_VISION"})
_JOINT = Target(STATE_NAMES, {"text": "TRAINER.JOINT.N_CTX_TEXT", "visual": "TRAINER.JOINT.N_CTX_VISION"})

# CoOp's own CoOp and CoCoOp and ours have the same names; MaPLe's VPT is another trainer than ours of that name
TARGETS = {
    "CoOp": _COOP,
    "CoOpGRAM": _COOP,
    "CoCoOp": _COCOOP,
    "CoCoOpGRAM": _COCOOP,
    "VPT": _VPT,
    "VPTGRAM": _VPT,
    "JointPrompt": _JOINT,
    "UniGRAM": _JOINT,
    "MaPLe/VPT": _of_the_family("VPT", text=False),
    "MaPLe/IVLP": _of_the_family("IVLP"),
    "MaPLe": Target({"text": _FAMILY["text"]}, {"text": "TRAINER.MAPLE.N_CTX"}),
    "PromptSRC": _of_the_family("PROMPTSRC"),
    "ProMetaR": _of_the_family("PROMETAR"),
}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        trainer: the key of `TARGETS` that it is for.
        shapes: of the tensors by name.
        options: KEY VALUE of the trainer that have to be so.
        left_out: what of the meta-checkpoint is not in it.
    """

    path: Path
    trainer: str
    backbone: str
    shapes: dict[str, tuple[int, ...]]
    options: dict[str, int]
    left_out: tuple[str, ...]


def export(meta: PathLike, path: PathLike, trainer: str = "") -> Exported:
    """Write the prompt of a meta-checkpoint as a checkpoint that `MODEL.INIT_WEIGHTS` names.

    Args:
        meta: the meta-checkpoint (.safetensors).
        path: where the checkpoint goes; replaced where it exists.
        trainer: a key of `TARGETS`; "": the plain trainer of the kinds that the meta-checkpoint holds.

    Raises:
        GramError: no such trainer, or one that learns what the meta-checkpoint does not hold.
    """
    if Path(path).is_dir():
        raise GramError(f"{path}: expected the name of a file to write, found a folder")
    checkpoint = load_meta_checkpoint(meta)
    trainer = trainer or _plain_trainer(checkpoint)
    if trainer not in TARGETS:
        guess = nearest(trainer, TARGETS)
        hint = f"; did you mean {guess!r}?" if guess else ""
        raise GramError(f"--trainer {trainer}: expected one of {', '.join(TARGETS)}{hint}")
    target = TARGETS[trainer]
    tensors = _tensors(checkpoint, trainer, target)
    state = {
        "state_dict": tensors,
        "epoch": 0,
        "optimizer": None,
        "scheduler": None,
        "val_result": None,
        "backbone": {"name": checkpoint.backbone_name, "fingerprint": checkpoint.backbone_fingerprint},
        "exported": _origin(checkpoint, trainer),
    }
    with atomic_write(path) as file:
        torch.save(state, file)
    left_out = [f"the {kind} prompt" for kind in checkpoint.prompts if kind not in target.names]
    if checkpoint.extras and not target.meta_net:
        left_out.append("the meta-net")
    if checkpoint.regulator is not None:
        left_out.append("the regulator")
    options = {target.options[kind]: len(checkpoint.prompts[kind]) for kind in target.names}
    if trainer in ("VPT", "VPTGRAM", "MaPLe/VPT"):  # one prompt, at the input
        options["TRAINER.VPT.PROMPT_DEPTH_VISION"] = 1
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    return Exported(Path(path), trainer, checkpoint.backbone_name, shapes, options, tuple(left_out))


def _plain_trainer(checkpoint: MetaCheckpoint) -> str:
    if set(checkpoint.prompts) == {"text", "visual"}:
        return "JointPrompt"
    if "visual" in checkpoint.prompts:
        return "VPT"
    return "CoCoOp" if checkpoint.extras else "CoOp"


def _tensors(checkpoint: MetaCheckpoint, trainer: str, target: Target) -> dict[str, Tensor]:
    """The learned tensors, float32, under the trainer's names."""
    lacking = [kind for kind in target.names if kind not in checkpoint.prompts]
    if lacking:
        raise GramError(
            f"{checkpoint.path}: expected a {' and a '.join(lacking)} prompt, which {trainer} learns, found "
            f"{' and '.join(sorted(checkpoint.prompts))} alone"
        )
    tensors = {name: checkpoint.prompts[kind] for kind, name in target.names.items()}
    if target.meta_net:
        net = {name: value for name, value in checkpoint.extras.items() if name.startswith(META_NET)}
        if not net:
            raise GramError(
                f"{checkpoint.path}: expected CoCoOp's meta-net beside the prompt, which {trainer} learns, found none "
                "(it was meta-trained without PROMPT.CONDITIONAL)"
            )
        tensors |= net
    return {name: value.detach().to("cpu", torch.float32).clone() for name, value in tensors.items()}


def _origin(checkpoint: MetaCheckpoint, trainer: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "trainer": trainer,
        "meta_checkpoint": Path(checkpoint.path).name,
        "sha256": checkpoint.sha256,
    }
