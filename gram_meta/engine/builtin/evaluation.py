"""Accuracy, error and macro F1 over a test set, in the log lines that CoOp's tools read."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from yacs.config import CfgNode

from gram_meta.engine.builtin.utils.registry import Registry, build
from gram_meta.errors import GramError

__all__ = ["EVALUATOR_REGISTRY", "Classification", "EvaluatorBase", "build_evaluator"]

EVALUATOR_REGISTRY = Registry("EVALUATOR")


def build_evaluator(cfg: CfgNode, **kwargs: Any) -> Any:
    """Build the evaluator that TEST.EVALUATOR names."""
    return build(EVALUATOR_REGISTRY, "Loading evaluator", cfg.TEST.EVALUATOR, cfg.VERBOSE, cfg, **kwargs)


class EvaluatorBase:
    """Called as reset(), then process() for each batch, then evaluate()."""

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg

    def reset(self) -> None:
        raise NotImplementedError

    def process(self, mo: torch.Tensor, gt: torch.Tensor) -> None:
        raise NotImplementedError

    def evaluate(self) -> OrderedDict[str, float]:
        raise NotImplementedError


@EVALUATOR_REGISTRY.register()
class Classification(EvaluatorBase):
    """Scores single-label classification; all results are percentages."""

    def __init__(self, cfg: CfgNode, lab2cname: dict[int, str] | None = None, **kwargs: Any) -> None:
        super().__init__(cfg)
        self._lab2cname: Any = lab2cname
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
        true, predicted = (torch.cat(column).cpu().numpy() for column in zip(*self._batches, strict=True))
        self._correct, self._total = int((true == predicted).sum()), len(true)
        accuracy = 100.0 * self._correct / self._total
        results = OrderedDict(
            accuracy=accuracy, error_rate=100.0 - accuracy, macro_f1=100.0 * _macro_f1(true, predicted)
        )
        print(f"=> result\n* total: {self._total:,}\n* correct: {self._correct:,}\n* accuracy: {accuracy:.1f}%")
        print(f"* error: {results['error_rate']:.1f}%\n* macro_f1: {results['macro_f1']:.1f}%")
        if self.cfg.TEST.PER_CLASS_RESULT:
            results["perclass_accuracy"] = self._print_classes(true, predicted)
        return results

    def _print_classes(self, true: np.ndarray, predicted: np.ndarray) -> float:
        print("=> per-class result")
        accuracies = []
        for label in np.unique(true):
            hits = predicted[true == label] == label
            accuracies.append(100.0 * float(hits.mean()))
            print(
                f"* class: {label} ({self._lab2cname[int(label)]})\t"
                f"total: {len(hits):,}\t"
                f"correct: {int(hits.sum()):,}\t"
                f"acc: {accuracies[-1]:.1f}%"
            )
        mean = float(np.mean(accuracies))
        print(f"* average: {mean:.1f}%")
        return mean


def _macro_f1(true: np.ndarray, predicted: np.ndarray) -> float:
    """Return the mean over the classes in `true` of 2 TP / (2 TP + FP + FN)."""
    scores = []
    for label in np.unique(true):
        is_true, is_predicted = true == label, predicted == label
        scores.append(2.0 * np.sum(is_true & is_predicted) / (is_true.sum() + is_predicted.sum()))
    return float(np.mean(scores))
