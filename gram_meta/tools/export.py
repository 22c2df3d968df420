"""Export of a meta-checkpoint's prompt as a checkpoint for MODEL.INIT_WEIGHTS, for trainers without GRAM.

Dassl's `load_pretrained_weights` copies the tensors that agree in name and size, and only prints the names of the
others. So the export uses the names of the target trainer, and returns the options that set the same numbers of tokens.
The regulator is not exported: it acts in the GRAM trainers only.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gram_meta.config import did_you_mean
from gram_meta.errors import GramError
from gram_meta.files import PathLike, atomic_write
from gram_meta.method.checkpoint import MetaCheckpoint, load_meta_checkpoint
from gram_meta.method.prompts import KINDS, META_NET, STATE_NAMES

FORMAT = 1


@dataclass(frozen=True)
class Target:
    """A trainer that can start from a prompt."""

    names: dict[str, str]  # its name for each kind of prompt
    options: dict[str, str]  # keys of the numbers of tokens, by kind
    meta_net: bool = False  # whether it learns CoCoOp's meta-net too


_TEXT, _VISUAL = ({kind: STATE_NAMES[kind]} for kind in KINDS)
_FAMILY = {"text": "prompt_learner.ctx", "visual": "image_encoder.VPT"}  # MaPLe's family loads the whole model


def _target(names: dict[str, str], node: str, text: str = "N_CTX_TEXT", meta_net: bool = False) -> Target:
    """Return a trainer with these names, whose numbers of tokens are options in TRAINER.<node>."""
    keys = {"text": f"TRAINER.{node}.{text}", "visual": f"TRAINER.{node}.N_CTX_VISION"}
    return Target(names, {kind: keys[kind] for kind in names}, meta_net)


# Names in CoOp and CoCoOp are the same in a CoOp checkout and here; MaPLe's trainer VPT is another one than ours
TARGETS = {
    **dict.fromkeys(("CoOp", "CoOpGRAM"), _target(_TEXT, "COOP", "N_CTX")),
    **dict.fromkeys(("CoCoOp", "CoCoOpGRAM"), _target(_TEXT, "COCOOP", "N_CTX", meta_net=True)),
    **dict.fromkeys(("VPT", "VPTGRAM"), _target(_VISUAL, "VPT")),
    **dict.fromkeys(("JointPrompt", "UniGRAM"), _target(STATE_NAMES, "JOINT")),
    "MaPLe/VPT": _target({"visual": _FAMILY["visual"]}, "VPT"),
    "MaPLe/IVLP": _target(_FAMILY, "IVLP"),
    "MaPLe": _target({"text": _FAMILY["text"]}, "MAPLE", "N_CTX"),
    "PromptSRC": _target(_FAMILY, "PROMPTSRC"),
    "ProMetaR": _target(_FAMILY, "PROMETAR"),
}


@dataclass(frozen=True)
class Exported:
    """A file that was written."""

    path: Path  # the file
    trainer: str  # the key of `TARGETS` that it is for
    backbone: str  # the CLIP of the prompts
    shapes: dict[str, tuple[int, ...]]  # of the tensors by name
    options: dict[str, int]  # options that the trainer needs, by key
    left_out: tuple[str, ...]  # the parts of the meta-checkpoint that are not in the file


def export(meta: PathLike, path: PathLike, trainer: str = "") -> Exported:
    """Write the prompt of a meta-checkpoint as a checkpoint that `MODEL.INIT_WEIGHTS` names.

    Args:
        meta: the meta-checkpoint (.safetensors).
        path: the checkpoint to write; an existing file is replaced.
        trainer: a key of `TARGETS`; "": the trainer without GRAM that has the same prompts.

    Raises:
        GramError: no such trainer, or one that learns more than the meta-checkpoint holds.
    """
    if Path(path).is_dir():
        raise GramError(f"{path}: expected the name of a file to write, found a folder")
    checkpoint = load_meta_checkpoint(meta)
    checkpoint.check_shallow()
    trainer = trainer or _plain_trainer(checkpoint)
    if trainer not in TARGETS:
        raise GramError(f"--trainer {trainer}: expected one of {', '.join(TARGETS)}{did_you_mean(trainer, TARGETS)}")
    target = TARGETS[trainer]
    tensors = _tensors(checkpoint, trainer, target)
    source = {"meta_checkpoint": Path(checkpoint.path).name, "sha256": checkpoint.sha256}
    state = {
        "state_dict": tensors,
        "epoch": 0,
        **dict.fromkeys(("optimizer", "scheduler", "val_result")),
        "backbone": {"name": checkpoint.backbone_name, "fingerprint": checkpoint.backbone_fingerprint},
        "exported": {"format": FORMAT, "trainer": trainer, **source},
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
    """Return the learned tensors, float32, under the trainer's names."""
    if lacking := [kind for kind in target.names if kind not in checkpoint.prompts]:
        expected, found = " and a ".join(lacking), " and ".join(sorted(checkpoint.prompts))
        raise GramError(f"{checkpoint.path}: expected a {expected} prompt, which {trainer} learns, found {found} alone")
    tensors = {name: checkpoint.prompts[kind] for kind, name in target.names.items()}
    if target.meta_net:
        net = {name: value for name, value in checkpoint.extras.items() if name.startswith(META_NET)}
        if not net:
            found = f"which {trainer} learns, found none (PROMPT.CONDITIONAL)"
            raise GramError(f"{checkpoint.path}: expected CoCoOp's meta-net beside the prompt, {found}")
        tensors |= net
    return {name: value.detach().to("cpu", torch.float32).clone() for name, value in tensors.items()}
