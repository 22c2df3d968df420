"""The paper's Figures 1(a), 1(b), 3(a) and 3(b) from logged runs: a PNG each, and its numbers as CSV.

Needs matplotlib (the extra `figures`). The colours are Okabe and Ito's, which colour-blind readers can tell apart; line
styles and markers repeat the distinction for print in grey. Bands and bars are 95 % intervals over seeds (Student's t).
"""

import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gram_meta.errors import GramError
from gram_meta.files import atomic_write
from gram_meta.intervals import Estimate, estimate
from gram_meta.report.evidence import MetaTraining
from gram_meta.report.numbered import base_to_new_runs
from gram_meta.report.runs import Run
from gram_meta.report.tables import BASE_NEW, Values, cell_of, series_of
from gram_meta.report.text import write_csv

BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#595959"
# name in the legend, and colour, line, marker: the baseline dashed, its GRAM version solid
LINES = {
    "CoOp": ("CoOp", (BLUE, "--", "o")),
    "CoOpGRAM": ("CoOp + GRAM", (BLUE, "-", "o")),
    "VPT": ("VPT", (VERMILLION, "--", "s")),
    "VPTGRAM": ("VPT + GRAM", (VERMILLION, "-", "s")),
}
GRADIENTS = {  # key in log.jsonl -> name, and colour, line, marker
    "alignment": ("regulated", (GREEN, "-", "o")),
    "alignment_raw": ("raw", (GREY, "--", "s")),
}

Point = tuple[int, Estimate]
Line = tuple[str, tuple[str, str, str], list[Point]]  # name; colour, line, marker; mean and interval at each x


@dataclass(frozen=True)
class Drawing:
    """A figure as PNG and CSV, for a file or for the page."""

    stem: str  # file name without ending
    title: str
    caption: str
    png: bytes
    csv: str


def draw(runs: Sequence[Run], metas: Sequence[MetaTraining]) -> tuple[list[Drawing], list[str]]:
    """Return every figure that the runs have data for, and a sentence for each figure that lacks data."""
    if find_spec("matplotlib") is None:
        raise GramError("figures: expected matplotlib, found none; run pip install 'gram-meta[figures]'")
    figures = [_starts(runs), *_epochs(runs), _alignments(metas)]
    return [it for it in figures if isinstance(it, Drawing)], [it for it in figures if isinstance(it, str)]


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


# -------------------------------------------------------------------- Figure 1(a): accuracy over prompt initialisations


def start_of(run: Run) -> str | None:
    """Return a run's line in Figure 1(a); None for a run that differs from CoOp in more than its initialisation."""
    if run.label == "CoOpGRAM":
        return "CoOp + GRAM (meta-learned)"
    if run.trainer != "CoOp" or run.start is None:
        return None
    forms = ("CoOp", "CoOp, random start", f'CoOp, start "{run.start}"')
    return None if run.label not in forms else f"“{run.start}”" if run.start else "random"


def _starts(runs: Sequence[Run]) -> Drawing | str:
    values: dict[tuple[str, str, str, int], float] = {}
    for run in base_to_new_runs(runs):
        if not run.untrained and (line := start_of(run)):
            values[line, run.dataset, run.subsample, run.seed] = run.value
    lines = list(dict.fromkeys(line for line, *_ in values))
    if sum("GRAM" not in line for line in lines) < 2:
        return "Figure 1(a) needs CoOp from two starts or more (TRAINER.COOP.CTX_INIT), base and new at 16 shots"
    datasets = _shared(values)
    if not datasets:
        return "Figure 1(a) needs a dataset on which CoOp ran from every start"
    seeds = sorted({seed for *_, seed in values})
    series = {line: series_of(values, line, datasets, BASE_NEW, seeds) for line in lines}
    if not all(it["H"] for it in series.values()):
        return "Figure 1(a) needs base and new runs of one seed on every dataset, for every start"
    found = {line: _cells(series[line]) for line in lines}
    lines.sort(key=lambda line: ("GRAM" in line, found[line]["H"].mean))
    table = [["start", "column", "mean", "half_width", "seeds", "datasets"]]
    for line in lines:
        table += [[line, column, *_numbers(it), " ".join(datasets)] for column, it in found[line].items()]
    caption = (
        f"CoOp at 16 shots from different starts, and CoOp + GRAM. {_over(datasets)} Bars: 95 % intervals over seeds; "
        "small dots: single seeds."
    )
    title = "Accuracy over prompt initialisations (as Figure 1a)"
    return Drawing("figure_1a", title, caption, _draw_starts(lines, found, series), write_csv(table))


def _shared(values: Values) -> list[str]:
    """Return the datasets on which every label has base and new runs."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for label, dataset, column, _seed in values:
        found[label, column].add(dataset)
    both = [found[label, column] for label in {label for label, _ in found} for column in ("base", "new")]
    return sorted(set.intersection(*both))


def _cells(series: Mapping[str, Mapping[int, float]]) -> dict[str, Estimate]:
    """Return the estimates of base, new and H, where each has at least one seed."""
    return {column: it for column in BASE_NEW if (it := cell_of(series, column, len(series["base"])))}


def _numbers(found: Estimate) -> list[Any]:
    return [found.mean, found.half_width, found.seeds]


def _over(datasets: Sequence[str]) -> str:
    return f"Average over {', '.join(datasets)}." if len(datasets) > 1 else f"On {datasets[0]}."


def _draw_starts(lines: Sequence[str], found: Mapping, series: Mapping) -> bytes:
    figure = _figure(7.0, 1.6 + 0.55 * len(lines))
    axes = figure.subplots()
    marks = {"base": (BLUE, "o", 0.18), "new": (VERMILLION, "s", 0.0), "H": ("black", "D", -0.18)}
    for place, line in enumerate(lines):
        for column, (colour, marker, shift) in marks.items():
            it: Estimate = found[line][column]
            look = {"color": colour, "markerfacecolor": colour if "GRAM" in line else "white", "markeredgewidth": 1.5}
            label = column if place == 0 else None
            y = place + shift
            axes.errorbar(it.mean, y, xerr=it.half_width, fmt=marker, capsize=3, elinewidth=1.2, label=label, **look)
            if column != "H":
                values = list(series[line][column].values())
                axes.plot(values, [y - 0.1] * len(values), ".", color=colour, markersize=4, alpha=0.7)
    axes.set_yticks(range(len(lines)), lines)
    axes.set_ylim(-0.6, len(lines) - 0.4)
    axes.set_xlabel("accuracy (%)")
    axes.grid(axis="x", color="#d9d9d9", linewidth=0.6)
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return _png(figure)


# --------------------------------------------------------------- Figures 1(b) and 3(a): base and new accuracy per epoch


def _epochs(runs: Sequence[Run]) -> list[Drawing | str]:
    """Return one figure for each number of epochs."""
    mine = [run for run in runs if run.subsample == "base" and run.shots == 16]  # without runs on all classes
    mine = [run for run in mine if run.trainer in LINES and _per_epoch(run)]
    # without runs that differ from their trainer's standard form in more than the number of epochs
    mine = [run for run in mine if run.label in (run.trainer, f"{run.trainer}, {run.epochs} epochs")]
    lengths = sorted({run.epochs for run in mine})
    if not lengths:
        return ["Figures 1(b) and 3(a) need runs of CoOp, VPT or their GRAM versions that logged TEST.PER_EPOCH"]
    return [_epochs_of([run for run in mine if run.epochs == length], length) for length in lengths]


def _per_epoch(run: Run) -> dict[int, tuple[float, float]]:
    """Return epoch -> (base, new) accuracy, from the curve's points at whole epochs."""
    points = {}
    for point in run.curve:
        epoch = point.get("epoch")
        if epoch is not None and math.isclose(epoch, round(epoch), abs_tol=1e-6) and {"base", "new"} <= set(point):
            points[round(epoch)] = (point["base"], point["new"])
    return points if len(points) > 1 else {}


def _epochs_of(runs: Sequence[Run], length: int) -> Drawing | str:
    at: dict[int, dict[tuple[str, str, str, int], float]] = defaultdict(dict)  # epoch -> values
    for run in runs:
        for epoch, pair in _per_epoch(run).items():
            for column, value in zip(("base", "new"), pair, strict=True):
                at[epoch][run.trainer, run.dataset, column, run.seed] = value
    trainers = [name for name in LINES if any(run.trainer == name for run in runs)]
    datasets = _shared({key: value for values in at.values() for key, value in values.items()})
    if not datasets:
        return f"Figures 1(b) and 3(a), {length} epochs: no dataset on which {', '.join(trainers)} all logged curves"
    seeds = sorted({run.seed for run in runs})
    table: list[list[Any]] = [["trainer", "epoch", "column", "mean", "half_width", "seeds", "datasets"]]
    panels: dict[str, list[Line]] = {"base classes": [], "new classes": []}
    for name in trainers:
        cells = {epoch: _cells(series_of(at[epoch], name, datasets, BASE_NEW, seeds)) for epoch in range(length + 1)}
        cells = {epoch: it for epoch, it in cells.items() if it}
        for epoch, it in cells.items():
            table += [[name, epoch, column, *_numbers(found), " ".join(datasets)] for column, found in it.items()]
        for title, lines in panels.items():
            lines.append((*LINES[name], [(epoch, it[title.split()[0]]) for epoch, it in cells.items()]))
    if len(table) == 1:
        return f"Figures 1(b) and 3(a), {length} epochs: no seed has a curve on each of {', '.join(datasets)}"
    is_spread = any(row[4] is not None for row in table[1:])
    bands = "Bands: 95 % intervals over seeds." if is_spread else "One seed: no bands."
    return Drawing(
        f"figure_1b_3a_{length}_epochs",
        f"Base and new accuracy while training, {length} epochs (as Figures 1b and 3a)",
        f"Test accuracy after each epoch; epoch 0 is the start. {_over(datasets)} {bands}",
        draw_panels(panels, 2, (4.0, 3.0), "epoch", "accuracy (%)"),
        write_csv(table),
    )


# ------------------------------------------------ Figure 3(b): the normalised gradient inner product over meta-training


def _alignments(metas: Sequence[MetaTraining]) -> Drawing | str:
    if not metas:
        return "Figure 3(b) needs the log.jsonl of a meta-training beside its best.safetensors"
    named = _by_settings(metas)
    table: list[list[Any]] = [["meta_training", "step", "gradient", "mean", "half_width", "meta_trainings"]]
    panels: dict[str, list[Line]] = {}
    for name, group in named.items():
        logs = [{int(row["step"]): row for row in meta.log} for meta in group]
        steps = sorted(set.intersection(*map(set, logs)))
        panels[name] = []
        for key, (gradient, style) in GRADIENTS.items():
            points = [(step, estimate([log[step][key] for log in logs], len(logs))) for step in steps]
            shown = [(step, it) for step, it in points if it]
            panels[name].append((f"{gradient} support gradient", style, shown))
            table += [[name, step, gradient, *_numbers(it)] for step, it in shown]
    caption = (
        "On held-out tasks: the inner product, divided by both norms, of the query gradient with the support gradient, "
        "regulated and raw."
    )
    if any(len(group) > 1 for group in named.values()):
        caption += " Bands: 95 % intervals over meta-training seeds."
    across = 2 if len(panels) in (2, 4) else min(len(panels), 3)
    labels = ("meta-training step (updates)", "normalised inner\nproduct (cosine)")
    return Drawing(
        "figure_3b",
        "Normalised gradient inner product over meta-training (as Figure 3b)",
        caption,
        draw_panels(panels, across, (3.1, 2.5), *labels, share=True),
        write_csv(table),
    )


def _by_settings(metas: Sequence[MetaTraining]) -> dict[str, list[MetaTraining]]:
    """Group meta-trainings that differ in the seed alone; name a group by its folder, or by its path if names clash."""
    groups: dict[str, list[MetaTraining]] = defaultdict(list)
    for meta in metas:
        config = {key: value for key, value in meta.facts.get("config", {}).items() if key != "SEED"}
        key = [config, meta.facts.get("hierarchy", "")] if config else [meta.path]
        groups[json.dumps(key, sort_keys=True)].append(meta)
    names = [group[0].name or group[0].path for group in groups.values()]
    named = {}
    for name, group in zip(names, groups.values(), strict=True):
        name = name if names.count(name) == 1 else str(Path(group[0].path).parent)[-40:]
        named[name] = sorted(group, key=lambda meta: meta.path)
    first = {"coop": 0, "vpt": 1, "unigram": 2, "cocoop": 3}
    return dict(sorted(named.items(), key=lambda it: (first.get(it[0].split("_")[0], 9), len(it[0]), it[0])))


# --------------------------------------------------------------------------------------------------------------- Canvas


def _figure(width: float, height: float) -> Any:
    """Return an empty figure, in inches, that needs no window system."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def draw_panels(
    panels: Mapping[str, Sequence[Line]], across: int, size: tuple[float, float], x: str, y: str, share: bool = False
) -> bytes:
    """Draw a panel of lines for each title, `across` in a row, with one legend; `size` of a panel in inches."""
    down = -(-len(panels) // across)
    figure = _figure(size[0] * across + 1.0, size[1] * down + 0.9)
    grid = figure.subplots(down, across, squeeze=False, sharey=share)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        for line in lines:
            _draw_line(axes, *line)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(x, fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelsize=8)
        axes.grid(color="#e0e0e0", linewidth=0.6)
    for axes in grid[:, 0]:
        axes.set_ylabel(y, fontsize=8)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=8)
    return _png(figure)


def _draw_line(axes: Any, label: str, style: tuple[str, str, str], points: Sequence[Point]) -> None:
    """Draw means as a line with about ten markers, and their intervals as a band."""
    colour, line, marker = style
    steps = [step for step, _ in points]
    face = "white" if line == "--" else colour
    look = {"color": colour, "marker": marker, "markersize": 4, "markerfacecolor": face, "linewidth": 1.5}
    axes.plot(steps, [it.mean for _, it in points], line, markevery=max(1, len(points) // 10), label=label, **look)
    low = [it.mean - (it.half_width or 0.0) for _, it in points]
    high = [it.mean + (it.half_width or 0.0) for _, it in points]
    axes.fill_between(steps, low, high, color=colour, alpha=0.14, linewidth=0)


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, metadata={"Software": None})  # the same bytes every time
    return out.getvalue()
