"""Checkpoints of tensors and plain values."""

from __future__ import annotations

import os
import shutil
import warnings
from typing import Any

import torch
from torch import nn

from gram_meta.engine.checkpoints import read_checkpoint
from gram_meta.files import atomic_write

__all__ = ["load_checkpoint", "load_pretrained_weights", "resume_from_checkpoint", "save_checkpoint"]


def save_checkpoint(
    state: dict[str, Any],
    save_dir: str,
    is_best: bool = False,
    remove_module_from_keys: bool = True,
    model_name: str = "",
) -> None:
    """Write `state` to `<save_dir>/model.pth.tar-<epoch>` (or `model_name`) and its name to `<save_dir>/checkpoint`.

    With `is_best` a copy goes to `model-best.pth.tar`. `state` needs "state_dict" and "epoch" (counted from 1).
    """
    if remove_module_from_keys:
        state["state_dict"] = {key.removeprefix("module."): value for key, value in state["state_dict"].items()}
    name = model_name or f"model.pth.tar-{state['epoch']}"
    path = os.path.join(save_dir, name)
    with atomic_write(path) as file:
        torch.save(state, file)
    print(f"Checkpoint saved to {path}")
    with atomic_write(os.path.join(save_dir, "checkpoint"), "w") as file:
        file.write(f"{name}\n")
    if is_best:
        best = os.path.join(save_dir, "model-best.pth.tar")
        with atomic_write(best) as file, open(path, "rb") as source:
            shutil.copyfileobj(source, file)
        print(f'Best checkpoint saved to "{best}"')


def load_checkpoint(fpath: str) -> dict[str, Any]:
    """Read a checkpoint without running code from it; see `gram_meta.engine.checkpoints`."""
    if fpath is None:
        raise ValueError("File path is None")
    if not os.path.exists(fpath):
        raise FileNotFoundError(f'File is not found at "{fpath}"')
    return read_checkpoint(fpath, map_location=None if torch.cuda.is_available() else "cpu")


def resume_from_checkpoint(fdir: str, model: nn.Module, optimizer: Any = None, scheduler: Any = None) -> int:
    """Load the checkpoint that `<fdir>/checkpoint` names into model, optimiser and scheduler; return its epoch."""
    with open(os.path.join(fdir, "checkpoint"), encoding="utf-8") as file:
        path = os.path.join(fdir, file.readline().strip())
    print(f'Loading checkpoint from "{path}"')
    checkpoint = load_checkpoint(path)
    model.load_state_dict(checkpoint["state_dict"])
    print("Loaded model weights")
    if optimizer is not None and checkpoint.get("optimizer") is not None:
        optimizer.load_state_dict(checkpoint["optimizer"])
        print("Loaded optimizer")
    if scheduler is not None and checkpoint.get("scheduler") is not None:
        scheduler.load_state_dict(checkpoint["scheduler"])
        print("Loaded scheduler")
    print(f"Previous epoch: {checkpoint['epoch']}")
    return checkpoint["epoch"]


def load_pretrained_weights(model: nn.Module, weight_path: str) -> None:
    """Copy into `model` the tensors of a checkpoint that agree in name and size; print the names of the others."""
    checkpoint = load_checkpoint(weight_path)
    own = model.state_dict()
    matched, discarded = {}, []
    for key, value in checkpoint.get("state_dict", checkpoint).items():
        key = key.removeprefix("module.")
        if key in own and own[key].size() == value.size():
            matched[key] = value
        else:
            discarded.append(key)
    if not matched:
        warnings.warn(f"Cannot load {weight_path} (check the key names manually)", stacklevel=2)
        return
    model.load_state_dict({**own, **matched})
    print(f"Successfully loaded pretrained weights from {weight_path}")
    if discarded:
        print(f"Layers discarded due to unmatched keys or size: {discarded}")
