"""Accuracy on base and new classes while training, from the curves in results.json (TEST.PER_EPOCH, TEST.AT_STEPS)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from gram_meta.errors import GramError
from gram_meta.intervals import harmonic, mean
from gram_meta.report.runs import Run
from gram_meta.report.tables import ordered


def build_curve(runs: Sequence[Run]) -> tuple[list[str], list[list[Any]]]:
    """Return headers and rows of base, new and H by step, averaged over the datasets and seeds of each label.

    Raises:
        GramError: no run has a curve.
    """
    points: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for run in ordered(runs):
        for point in run.curve:
            if point.get("base") is not None and point.get("new") is not None:
                points[run.label, int(point["step"])].append((point["base"], point["new"]))
    if not points:
        raise GramError("expected runs with a curve (TEST.AT_STEPS or TEST.PER_EPOCH), found none")
    most = {label: max(len(found) for (name, _), found in points.items() if name == label) for label, _ in points}
    rows = []
    for (label, step), found in sorted(points.items(), key=lambda item: (list(most).index(item[0][0]), item[0][1])):
        base, new = mean(one for one, _ in found), mean(two for _, two in found)
        count = f"{len(found)}" if len(found) == most[label] else f"{len(found)} of {most[label]}"
        rows.append([label, step, base, new, harmonic(base, new), count])
    return ["trainer", "step", "base", "new", "H", "runs"], rows
