"""Optimisers from OPTIM.*."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from gram_meta.errors import GramError

AVAI_OPTIMS = ["adam", "amsgrad", "sgd", "rmsprop", "radam", "adamw"]


def build_optimizer(
    model: nn.Module | Iterable[Any], optim_cfg: CfgNode, param_groups: Any = None
) -> torch.optim.Optimizer:
    """Build the optimiser OPTIM.NAME over `param_groups`, else over `model` (a module or its parameters)."""
    c = optim_cfg
    if c.NAME not in AVAI_OPTIMS:
        raise GramError(f"OPTIM.NAME is {c.NAME!r}; expected one of {', '.join(AVAI_OPTIMS)}")
    if param_groups is not None and c.STAGED_LR:
        warnings.warn("staged_lr will be ignored, bind it with param_groups yourself", stacklevel=2)
    if param_groups is None:
        param_groups = _staged(model, c) if c.STAGED_LR else _parameters(model)
    shared = {"lr": c.LR, "weight_decay": c.WEIGHT_DECAY}
    betas = (c.ADAM_BETA1, c.ADAM_BETA2)
    if c.NAME == "sgd":
        return torch.optim.SGD(
            param_groups, momentum=c.MOMENTUM, dampening=c.SGD_DAMPNING, nesterov=c.SGD_NESTEROV, **shared
        )
    if c.NAME == "rmsprop":
        return torch.optim.RMSprop(param_groups, momentum=c.MOMENTUM, alpha=c.RMSPROP_ALPHA, **shared)
    if c.NAME == "adamw":
        return torch.optim.AdamW(param_groups, betas=betas, **shared)
    if c.NAME == "radam":
        return torch.optim.RAdam(param_groups, betas=betas, decoupled_weight_decay=True, **shared)
    return torch.optim.Adam(param_groups, betas=betas, amsgrad=c.NAME == "amsgrad", **shared)


def _parameters(model: nn.Module | Iterable[Any]) -> Iterable[Any]:
    return model.parameters() if isinstance(model, nn.Module) else model


def _staged(model: Any, c: CfgNode) -> list[dict[str, Any]]:
    """Return two groups: the layers of OPTIM.NEW_LAYERS at the full rate, all others at BASE_LR_MULT of it."""
    if not isinstance(model, nn.Module):
        raise TypeError("OPTIM.STAGED_LR needs an nn.Module")
    model = model.module if isinstance(model, nn.DataParallel) else model
    new_layers = [c.NEW_LAYERS] if isinstance(c.NEW_LAYERS, str) else c.NEW_LAYERS
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, child in model.named_children():
        groups[name in new_layers].extend(child.parameters())
    return [{"params": groups[False], "lr": c.LR * c.BASE_LR_MULT}, {"params": groups[True]}]
