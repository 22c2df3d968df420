"""Accuracy of a batch; accuracy, error and macro F1 over a test set, in the log lines that CoOp's tools read."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from yacs.config import CfgNode

from gram_meta.engine.builtin.utils import Registry, build
from gram_meta.errors import GramError

EVALUATOR_REGISTRY = Registry("EVALUATOR")


def build_evaluator(cfg: CfgNode, **kwargs: Any) -> Any:
    """Build the evaluator that TEST.EVALUATOR names."""
    return build(EVALUATOR_REGISTRY, "Loading evaluator", cfg.TEST.EVALUATOR, cfg.VERBOSE, cfg, **kwargs)


def compute_accuracy(output: torch.Tensor, target: torch.Tensor, topk: Sequence[int] = (1,)) -> list[torch.Tensor]:
    """Return the percentage of rows of `output` (B, N) whose `target` (B,) is among the k highest, (1,) for each k."""
    if isinstance(output, list | tuple):
        output = output[0]
    best = output.topk(max(topk), dim=1).indices  # (B, max k)
    hits = best == target.view(-1, 1)
    return [hits[:, :k].any(1).float().mean().mul(100.0).view(1) for k in topk]


@EVALUATOR_REGISTRY.register()
class Classification:
    """Scores single-label classification, in percent: reset(), then process() for each batch, then evaluate()."""

    def __init__(self, cfg: CfgNode, lab2cname: dict[int, str] | None = None, **kwargs: Any) -> None:
        self.cfg, self._lab2cname = cfg, lab2cname or {}
        self.reset()
        if cfg.TEST.PER_CLASS_RESULT and lab2cname is None:
            raise GramError("TEST.PER_CLASS_RESULT needs the names of the classes, and the evaluator got none")

    def reset(self) -> None:
        self._correct = 0
        self._total = 0
        self._batches: list[tuple[torch.Tensor, torch.Tensor]] = []  # labels and predictions, read by `evaluate`

    def process(self, mo: torch.Tensor, gt: torch.Tensor) -> None:
        """Keep a batch of scores `mo` (B, N) with labels `gt` (B,)."""
        self._batches.append((gt, mo.max(1)[1]))

    def evaluate(self) -> OrderedDict[str, float]:
        """Print and return accuracy, error_rate, macro_f1 (over the classes that occur) [, perclass_accuracy]."""
        from sklearn.metrics import f1_score

        true, predicted = (torch.cat(column).cpu().numpy() for column in zip(*self._batches, strict=True))
        self._correct, self._total = int((true == predicted).sum()), len(true)
        accuracy = 100.0 * self._correct / self._total
        macro_f1 = 100.0 * float(f1_score(true, predicted, average="macro", labels=np.unique(true)))
        results = OrderedDict(accuracy=accuracy, error_rate=100.0 - accuracy, macro_f1=macro_f1)
        print(f"=> result\n* total: {self._total:,}\n* correct: {self._correct:,}\n* accuracy: {accuracy:.1f}%")
        print(f"* error: {results['error_rate']:.1f}%\n* macro_f1: {macro_f1:.1f}%")
        if self.cfg.TEST.PER_CLASS_RESULT:
            results["perclass_accuracy"] = self._print_classes(true, predicted)
        return results

    def _print_classes(self, true: np.ndarray, predicted: np.ndarray) -> float:
        print("=> per-class result")
        accuracies = []
        for label in np.unique(true):
            hits = predicted[true == label] == label
            accuracies.append(100.0 * float(hits.mean()))
            counts = f"total: {len(hits):,}\tcorrect: {int(hits.sum()):,}\tacc: {accuracies[-1]:.1f}%"
            print(f"* class: {label} ({self._lab2cname[int(label)]})\t{counts}")
        mean = float(np.mean(accuracies))
        print(f"* average: {mean:.1f}%")
        return mean
