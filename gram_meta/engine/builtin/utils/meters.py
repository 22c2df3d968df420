"""Running values for the log."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

__all__ = ["AverageMeter", "MetricMeter"]


class AverageMeter:
    """Keeps the latest value (`val`) and the mean so far (`avg`)."""

    def __init__(self) -> None:
        self.val = self.avg = self.sum = 0.0
        self.count = 0

    def update(self, val: Any, n: int = 1) -> None:
        self.val = val.item() if isinstance(val, torch.Tensor) else val
        self.sum += self.val * n
        self.count += n
        self.avg = self.sum / self.count


def as_floats(summaries: list[Any]) -> list[Any]:
    """Return what some steps gave for the log with floats for tensors of one number each, which are read at once."""
    given = [summary for summary in summaries if isinstance(summary, dict)]
    tensors = [v.detach().reshape(()) for summary in given for v in summary.values() if isinstance(v, torch.Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else ())

    def read(summary: Any) -> Any:
        if not isinstance(summary, dict):
            return summary
        return {name: next(numbers) if isinstance(v, torch.Tensor) else v for name, v in summary.items()}

    return [read(summary) for summary in summaries]


class MetricMeter:
    """Keeps an `AverageMeter` for each name; its text is `name val (avg)` for each."""

    def __init__(self) -> None:
        self.meters: dict[str, AverageMeter] = defaultdict(AverageMeter)

    def update(self, input_dict: dict[str, Any] | None) -> None:
        if input_dict is None:
            return
        if not isinstance(input_dict, dict):
            raise TypeError("Input to MetricMeter.update() must be a dictionary")
        for name, value in input_dict.items():
            self.meters[name].update(value)

    def __str__(self) -> str:
        return " ".join(f"{name} {m.val:.4f} ({m.avg:.4f})" for name, m in self.meters.items())
