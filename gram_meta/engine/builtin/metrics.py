"""Accuracy of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["compute_accuracy"]


def compute_accuracy(output: torch.Tensor, target: torch.Tensor, topk: Sequence[int] = (1,)) -> list[torch.Tensor]:
    """Return the percentage of rows of `output` (B, N) whose `target` (B,) is among the k highest, (1,) for each k."""
    if isinstance(output, list | tuple):
        output = output[0]
    best = output.topk(max(topk), dim=1).indices  # (B, max k)
    hits = best == target.view(-1, 1)
    return [hits[:, :k].any(1).float().mean().mul(100.0).view(1) for k in topk]
