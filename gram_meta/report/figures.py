"""The paper's Figures 1(a), 1(b), 3(a) and 3(b) from logged runs: a PNG each, and its numbers as CSV.

Needs matplotlib (the extra `figures`). The colours are Okabe and Ito's, which colour-blind readers can tell apart; line
styles and markers repeat the distinction for print in grey. Bands and bars are 95 % intervals over seeds (Student's t).
"""

from __future__ import annotations

import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gram_meta.errors import GramError
from gram_meta.files import atomic_write
from gram_meta.intervals import Estimate, estimate, harmonic_estimate, mean
from gram_meta.report.evidence import MetaTraining
from gram_meta.report.numbered import base_to_new_runs
from gram_meta.report.runs import Run
from gram_meta.report.text import write_csv

BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#595959"
NAMES = {"CoOp": "CoOp", "CoOpGRAM": "CoOp + GRAM", "VPT": "VPT", "VPTGRAM": "VPT + GRAM"}
# colour, line, marker: the baseline dashed, its GRAM version solid
STYLES = {
    "CoOp": (BLUE, "--", "o"),
    "CoOpGRAM": (BLUE, "-", "o"),
    "VPT": (VERMILLION, "--", "s"),
    "VPTGRAM": (VERMILLION, "-", "s"),
}


@dataclass(frozen=True)
class Drawing:
    """A figure as PNG and CSV, for a file or for the page."""

    stem: str  # file name without ending
    title: str
    caption: str
    png: bytes
    csv: str


def draw(runs: Sequence[Run], metas: Sequence[MetaTraining]) -> tuple[list[Drawing], list[str]]:
    """Return every figure that the runs have data for, and a sentence for each figure that lacks data.

    Raises:
        GramError: matplotlib is not installed.
    """
    need_matplotlib()
    drawings, lacking = [], []
    for figure in (_starts(runs), *_epochs(runs), _alignments(metas)):
        if isinstance(figure, str):
            lacking.append(figure)
        else:
            drawings.append(figure)
    return drawings, lacking


def write_figures(drawings: Iterable[Drawing], folder: str | Path) -> list[Path]:
    """Write `<stem>.png` and `<stem>.csv` of each drawing; return the paths."""
    written = []
    for drawing in drawings:
        for ending, content in ((".png", drawing.png), (".csv", (drawing.csv + "\n").encode())):
            path = Path(folder, drawing.stem + ending)
            with atomic_write(path) as file:
                file.write(content)
            written.append(path)
    return written


def need_matplotlib() -> None:
    """Raise `GramError` if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise GramError(
            "figures: expected matplotlib, found none; pip install 'gram-meta[figures]' brings it"
        ) from None


# ----------------------------------------------------------------------------------------------------------------------
# Averages over datasets, for each seed


def _over_datasets(found: dict[tuple[str, int], float], datasets: Sequence[str]) -> dict[int, float]:
    """Average (dataset, seed) -> percent over the datasets; return seed -> mean, for seeds with all datasets."""
    seeds = sorted({seed for _, seed in found})
    whole = [seed for seed in seeds if all((name, seed) in found for name in datasets)]
    return {seed: mean(found[name, seed] for name in datasets) for seed in whole}


def _three(base: dict[int, float], new: dict[int, float]) -> dict[str, Estimate | None]:
    """Return the estimates of base, new and H over seeds."""
    seeds = len(set(base) | set(new))
    return {
        "base": estimate(list(base.values()), seeds),
        "new": estimate(list(new.values()), seeds),
        "H": harmonic_estimate(base, new, seeds),
    }


def _numbers(found: Estimate | None) -> list[Any]:
    return [found.mean, found.half_width, found.seeds] if found else [None, None, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Figure 1(a): accuracy over prompt initialisations


def start_of(run: Run) -> str | None:
    """Return a run's line in Figure 1(a); None for a run that differs from CoOp in more than its initialisation."""
    if run.label == "CoOpGRAM":
        return "CoOp + GRAM (meta-learnt)"
    if run.trainer != "CoOp" or run.start is None:
        return None
    forms = ("CoOp", "CoOp, random start", f'CoOp, start "{run.start}"')
    return None if run.label not in forms else f"“{run.start}”" if run.start else "random"


def _starts(runs: Sequence[Run]) -> Drawing | str:
    groups: dict[str, dict[str, dict[tuple[str, int], float]]] = defaultdict(lambda: {"base": {}, "new": {}})
    for run in base_to_new_runs(runs):
        line = None if run.untrained else start_of(run)
        if line:
            groups[line][run.subsample][run.dataset, run.seed] = run.value
    own = [line for line in groups if "GRAM" not in line]
    if len(own) < 2:
        return "Figure 1(a) needs CoOp from two starts or more (TRAINER.COOP.CTX_INIT), base and new at 16 shots"
    datasets = _shared(
        [{name for name, _ in both["base"]} & {name for name, _ in both["new"]} for both in groups.values()]
    )
    if not datasets:
        return "Figure 1(a) needs a dataset on which CoOp ran from every start"
    found, seeds = {}, {}
    for line, both in groups.items():
        base, new = (_over_datasets(both[part], datasets) for part in ("base", "new"))
        found[line] = _three(base, new)
        seeds[line] = {"base": base, "new": new}
    if any(it["H"] is None for it in found.values()):
        return "Figure 1(a) needs base and new runs of one seed on every dataset, for every start"
    lines = sorted(own, key=lambda line: found[line]["H"].mean)  # type: ignore[union-attr]
    lines += [line for line in found if line not in own]
    table = [["start", "column", "mean", "half_width", "seeds", "datasets"]]
    for line in lines:
        table += [[line, column, *_numbers(it), " ".join(datasets)] for column, it in found[line].items()]
    title = "Accuracy over prompt initialisations (as Figure 1a)"
    caption = (
        f"CoOp at 16 shots from different starts, and CoOp + GRAM. {_over(datasets)} Bars: 95 % intervals over seeds; "
        "small dots: single seeds."
    )
    return Drawing("figure_1a", title, caption, _draw_starts(lines, found, seeds), write_csv(table))


def _shared(sets: Sequence[set[str]]) -> list[str]:
    return sorted(set.intersection(*sets)) if sets else []


def _over(datasets: Sequence[str]) -> str:
    return f"Average over {', '.join(datasets)}." if len(datasets) > 1 else f"On {datasets[0]}."


def _draw_starts(lines: Sequence[str], found: dict, seeds: dict) -> bytes:
    figure = _figure(7.0, 1.6 + 0.55 * len(lines))
    axes = figure.subplots()
    marks = {"base": (BLUE, "o", 0.18), "new": (VERMILLION, "s", 0.0), "H": ("black", "D", -0.18)}
    for place, line in enumerate(lines):
        for column, (colour, marker, shift) in marks.items():
            it: Estimate = found[line][column]
            axes.errorbar(
                it.mean,
                place + shift,
                xerr=it.half_width,
                fmt=marker,
                color=colour,
                markersize=6,
                capsize=3,
                elinewidth=1.2,
                label=column if place == 0 else None,
                markerfacecolor=colour if "GRAM" in line else "white",
                markeredgewidth=1.5,
            )
            values = seeds[line].get(column, {}).values()
            axes.plot(list(values), [place + shift - 0.1] * len(values), ".", color=colour, markersize=4, alpha=0.7)
    axes.set_yticks(range(len(lines)), lines)
    axes.set_ylim(-0.6, len(lines) - 0.4)
    axes.set_xlabel("accuracy (%)")
    axes.grid(axis="x", color="#d9d9d9", linewidth=0.6)
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return _png(figure)


# ----------------------------------------------------------------------------------------------------------------------
# Figures 1(b) and 3(a): base and new accuracy per epoch


def _epochs(runs: Sequence[Run]) -> list[Drawing | str]:
    """Return one figure for each number of epochs."""
    mine = [run for run in runs if run.subsample == "base" and run.shots == 16]  # without runs on all classes
    mine = [run for run in mine if run.trainer in NAMES and _only_longer(run) and _per_epoch(run)]
    lengths = sorted({run.epochs for run in mine})
    if not lengths:
        return ["Figures 1(b) and 3(a) need runs of CoOp, VPT or their GRAM versions that logged TEST.PER_EPOCH"]
    return [_epochs_of([run for run in mine if run.epochs == length], length) for length in lengths]


def _only_longer(run: Run) -> bool:
    """Return whether a run differs from its trainer's standard form in the number of epochs at most."""
    return run.label in (run.trainer, f"{run.trainer}, {run.epochs} epochs")


def _per_epoch(run: Run) -> dict[int, tuple[float, float]]:
    """Return epoch -> (base, new) accuracy, from the curve's points at whole epochs."""
    points = {}
    for point in run.curve:
        epoch = point.get("epoch")
        if epoch is not None and math.isclose(epoch, round(epoch), abs_tol=1e-6) and {"base", "new"} <= set(point):
            points[round(epoch)] = (point["base"], point["new"])
    return points if len(points) > 1 else {}


def _epochs_of(runs: Sequence[Run], length: int) -> Drawing | str:
    stem = f"figure_1b_3a_{length}_epochs"
    trainers = [name for name in NAMES if any(run.trainer == name for run in runs)]
    datasets = _shared([{run.dataset for run in runs if run.trainer == name} for name in trainers])
    if not datasets:
        return f"Figures 1(b) and 3(a), {length} epochs: no dataset on which {', '.join(trainers)} all logged curves"
    table: list[list[Any]] = [["trainer", "epoch", "column", "mean", "half_width", "seeds", "datasets"]]
    series: dict[str, list[tuple[int, dict[str, Estimate | None]]]] = {}
    for name in trainers:
        curves = {(run.dataset, run.seed): _per_epoch(run) for run in runs if run.trainer == name}
        series[name] = []
        for epoch in range(length + 1):
            at = {key: points[epoch] for key, points in curves.items() if epoch in points}
            base, new = (_over_datasets({key: pair[part] for key, pair in at.items()}, datasets) for part in (0, 1))
            if base:
                it = _three(base, new)
                series[name].append((epoch, it))
                table += [[name, epoch, column, *_numbers(found), " ".join(datasets)] for column, found in it.items()]
    if not any(series.values()):
        return f"Figures 1(b) and 3(a), {length} epochs: no seed has a curve on each of {', '.join(datasets)}"
    title = f"Base and new accuracy while training, {length} epochs (as Figures 1b and 3a)"
    bands = "Bands: 95 % intervals over seeds." if _has_bands(series) else "One seed: no bands."
    caption = f"Test accuracy after each epoch; epoch 0 is the start. {_over(datasets)} {bands}"
    return Drawing(stem, title, caption, _draw_epochs(series), write_csv(table))


def _has_bands(series: dict) -> bool:
    return any(it["base"].half_width is not None for points in series.values() for _, it in points)


def _draw_epochs(series: dict[str, list[tuple[int, dict[str, Estimate | None]]]]) -> bytes:
    figure = _figure(9.0, 3.9)
    panels = figure.subplots(1, 2)
    for axes, column in zip(panels, ("base", "new"), strict=True):
        ends = []
        for name, points in series.items():
            shown = [(epoch, found) for epoch, it in points if (found := it[column])]
            if shown:
                _draw_line(axes, shown, STYLES[name], NAMES[name], size=4, width=1.6, marks=11, opacity=0.12)
                ends.append((shown[-1][1].mean, NAMES[name], STYLES[name][0], shown[-1][0]))
        axes.set_title(f"{column} classes", fontsize=10)
        axes.set_xlabel("epoch")
        axes.set_ylabel("accuracy (%)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="#e0e0e0", linewidth=0.6)
        axes.margins(x=0.02)
        _label_ends(axes, ends)
    panels[0].legend(fontsize=8, frameon=False, loc="best")
    return _png(figure)


def _label_ends(axes: Any, ends: list[tuple[float, str, str, int]]) -> None:
    """Write names beside the lines' ends, and move them apart where they would overlap."""
    low, high = axes.get_ylim()
    gap, last = (high - low) * 0.055, -math.inf
    for value, name, colour, x in sorted(ends):
        y = max(value, last + gap)
        axes.annotate(
            name,
            (x, value),
            xytext=(1.02, y),
            textcoords=("axes fraction", "data"),
            color=colour,
            fontsize=8,
            va="center",
            annotation_clip=False,
        )
        last = y


# ----------------------------------------------------------------------------------------------------------------------
# Figure 3(b): the normalised gradient inner product over meta-training


def _alignments(metas: Sequence[MetaTraining]) -> Drawing | str:
    groups: dict[str, list[MetaTraining]] = defaultdict(list)
    for meta in metas:
        groups[_settings_but_seed(meta)].append(meta)
    if not groups:
        return "Figure 3(b) needs the log.jsonl of a meta-training beside its best.safetensors"
    named = _named([group for group in groups.values()])
    table: list[list[Any]] = [["meta_training", "step", "gradient", "mean", "half_width", "meta_trainings"]]
    series: dict[str, dict[str, list[tuple[int, Estimate]]]] = {}
    for name, group in named.items():
        series[name] = {}
        for gradient, key in (("regulated", "alignment"), ("raw", "alignment_raw")):
            steps = _shared_steps(group)
            points = [(step, estimate([_at(meta, step)[key] for meta in group], len(group))) for step in steps]
            series[name][gradient] = [(step, it) for step, it in points if it]
            table += [[name, step, gradient, *_numbers(it)] for step, it in points]
    title = "Normalised gradient inner product over meta-training (as Figure 3b)"
    caption = (
        "On held-out tasks: the inner product, divided by both norms, of the query gradient with the support gradient, "
        "regulated and raw. "
        + ("Bands: 95 % intervals over meta-training seeds." if any(len(g) > 1 for g in named.values()) else "")
    )
    return Drawing("figure_3b", title, caption.strip(), _draw_alignments(series), write_csv(table))


def _settings_but_seed(meta: MetaTraining) -> str:
    config = {key: value for key, value in meta.facts.get("config", {}).items() if key != "SEED"}
    return json.dumps([config, meta.facts.get("hierarchy", "")] if config else [meta.path], sort_keys=True)


def _named(groups: Sequence[list[MetaTraining]]) -> dict[str, list[MetaTraining]]:
    """Return the groups by the names of their folders; by the end of the path where two groups share a name."""
    names: dict[str, list[MetaTraining]] = {}
    for group in groups:
        name = group[0].name or group[0].path
        if name in names or sum(it[0].name == name for it in groups) > 1:
            name = str(Path(group[0].path).parent)[-40:]
        names[name] = sorted(group, key=lambda meta: meta.path)
    first = {"coop": 0, "vpt": 1, "unigram": 2, "cocoop": 3}
    return dict(sorted(names.items(), key=lambda it: (first.get(it[0].split("_")[0], 9), len(it[0]), it[0])))


def _shared_steps(group: Sequence[MetaTraining]) -> list[int]:
    return sorted(set.intersection(*({int(row["step"]) for row in meta.log} for meta in group)))


def _at(meta: MetaTraining, step: int) -> Any:
    return next(row for row in meta.log if int(row["step"]) == step)


def _draw_alignments(series: dict[str, dict[str, list[tuple[int, Estimate]]]]) -> bytes:
    across = 2 if len(series) in (2, 4) else min(len(series), 3)
    down = -(-len(series) // across)
    figure = _figure(3.1 * across + 1.0, 2.5 * down + 0.9)
    panels = figure.subplots(down, across, squeeze=False, sharey=True)
    for axes in panels.flat[len(series) :]:
        axes.set_visible(False)
    styles = {"regulated": (GREEN, "-", "o"), "raw": (GREY, "--", "s")}
    for i, (axes, (name, lines)) in enumerate(zip(panels.flat, series.items(), strict=False)):
        for gradient, points in lines.items():
            label = f"{gradient} support gradient"
            _draw_line(axes, points, styles[gradient], label, size=3.5, width=1.5, marks=10, opacity=0.15)
        axes.set_title(name, fontsize=9)
        axes.grid(color="#e0e0e0", linewidth=0.6)
        axes.set_xlabel("meta-training step (updates)", fontsize=8)
        axes.tick_params(labelsize=8)
        if i % across == 0:
            axes.set_ylabel("normalised inner\nproduct (cosine)", fontsize=8)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return _png(figure)


# ----------------------------------------------------------------------------------------------------------------------
# Canvas


def _figure(width: float, height: float) -> Any:
    """Return an empty figure, in inches, that needs no window system."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _draw_line(
    axes: Any,
    points: Sequence[tuple[int, Estimate]],
    style: tuple[str, str, str],
    label: str,
    size: float,
    width: float,
    marks: int,
    opacity: float,
) -> None:
    """Draw means as a line with about `marks` markers, and their intervals as a band."""
    colour, line, marker = style
    steps = [step for step, _ in points]
    axes.plot(
        steps,
        [it.mean for _, it in points],
        line,
        color=colour,
        marker=marker,
        markersize=size,
        markerfacecolor="white" if line == "--" else colour,
        markevery=max(1, len(points) // marks),
        linewidth=width,
        label=label,
    )
    low = [it.mean - (it.half_width or 0.0) for _, it in points]
    high = [it.mean + (it.half_width or 0.0) for _, it in points]
    axes.fill_between(steps, low, high, color=colour, alpha=opacity, linewidth=0)


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, metadata={"Software": None})  # the same bytes every time
    return out.getvalue()
