"""Tables from output folders: base, new and their harmonic mean, with intervals, and paired differences.

Every test of a trainer leaves an unrounded `results.json` in its output folder. This module collects them, refuses what
cannot be put into one table, and says what is missing.

How the numbers are made
- per dataset: the mean over seeds, with the 95 % interval of Student's t over the seeds;
- H: the harmonic mean of the *averaged* base and new accuracy, as in the paper; its interval is that of the seeds' own H;
- average: over datasets first, inside each seed, then over seeds as above;
- difference to the reference trainer: paired by seed (mean of the per-seed differences and its own t interval);
- a run without training and without randomness (zero-shot, a start prompt with no step) has one value for all seeds.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gram_meta.errors import GramError
from gram_meta.files import read_json

FORMATS = ("table", "markdown", "csv", "latex", "json")
METRICS = ("accuracy", "error_rate", "macro_f1")
AVERAGE = "average"

# Settings that say where and how a run was made, and nothing about what was measured.
_PLACE = (
    "OUTPUT_DIR", "RESUME", "SEED", "USE_CUDA", "VERBOSE", "ENV_INFO", "DATASET.ROOT", "DATASET.NAME",
    "DATASET.SUBSAMPLE_CLASSES", "DATASET.SOURCE_DOMAINS", "DATASET.TARGET_DOMAINS", "DATALOADER.NUM_WORKERS",
    "DATALOADER.TEST", "TEST.EVALUATOR", "TEST.PER_CLASS_RESULT", "TEST.COMPUTE_CMAT", "TEST.NO_TEST", "TEST.SPLIT",
    "TEST.PER_EPOCH", "TEST.AT_STEPS", "TRAIN.PRINT_FREQ", "TRAIN.CHECKPOINT_FREQ",
    "TRAINER.GRAM.CHECKPOINT",  # compared by its hash instead
)  # fmt: skip
# Settings of training, which a run that never trains does not have.
_TRAINING = ("OPTIM", "TRAIN", "DATALOADER", "DATASET.NUM_SHOTS", "INPUT.TRANSFORMS", "INPUT.RRCROP_SCALE")


# ----------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class Run:
    """One `results.json`: one trainer on one set of classes of one dataset, with one seed."""

    path: Path
    label: str  # the trainer and what is special about it, e.g. "CoOpGRAM, R off"
    dataset: str
    subsample: str  # "base", "new" or "all"
    seed: int
    value: float  # the metric, in percent
    untrained: bool
    settings: Mapping[str, Any] = field(repr=False)
    few_shot: str = ""  # SHA-256 of the few-shot subset
    curve: tuple[Mapping[str, float], ...] = field(default=(), repr=False)


def read_runs(
    folders: Iterable[str | Path], metric: str = "accuracy", by: Sequence[str] = (), split: str = "test"
) -> list[Run]:
    """Every run below `folders` that was tested on `split`, sorted by path.

    `by` names settings ("OPTIM.MAX_EPOCH") whose values become part of the label. Raises `GramError` for a folder
    without results, and for a file that is not a result.
    """
    paths: set[Path] = set()
    for folder in folders:
        found = {path.resolve() for path in Path(folder).rglob("results.json")}
        if not found:
            raise GramError(f"{folder}: expected results.json files in or below this folder, found none")
        paths |= found
    runs = [_read_run(path, metric, by, split) for path in sorted(paths)]
    kept = [run for run in runs if run is not None]
    if not kept:
        raise GramError(f"expected runs tested on the {split} split, found {len(runs)} on others")
    return kept


def _read_run(path: Path, metric: str, by: Sequence[str], split: str) -> Run | None:
    result = _read_result(path)
    if result["split"] != split:
        return None
    if metric not in result["metrics"]:
        raise GramError(f"{path}: expected the metric {metric}, found {', '.join(result['metrics'])}")
    trained_here = _training_of(result, path)
    settings = flatten(trained_here.get("config", {}))
    settings["backbone"] = result["backbone"]
    settings["meta-checkpoint"] = (trained_here.get("meta_checkpoint") or {}).get("sha256", "")
    settings["shots"] = result["shots"]
    untrained = _untrained(result)
    return Run(
        path=path,
        label=_label(trained_here, result, settings, by),
        dataset=result["dataset"],
        subsample=result["subsample"],
        seed=int(result["seed"]),
        value=float(result["metrics"][metric]),
        untrained=untrained,
        settings={key: value for key, value in settings.items() if _compared(key, untrained)},
        few_shot="" if untrained else (trained_here.get("few_shot") or {}).get("sha256", ""),
        curve=tuple(result.get("curve") or ()),
    )


def _read_result(path: Path) -> dict[str, Any]:
    result = read_json(path)
    needed = ("trainer", "dataset", "subsample", "shots", "seed", "backbone", "split", "metrics")
    if not isinstance(result, dict) or result.get("format") != 1:
        found = result.get("format", "none") if isinstance(result, dict) else type(result).__name__
        raise GramError(f"{path}: expected a result of format 1, found format {found}")
    lacking = [key for key in needed if key not in result]
    if lacking:
        raise GramError(f"{path}: expected the keys of a result, found no {', '.join(lacking)}")
    return result


def _untrained(result: Mapping[str, Any]) -> bool:
    """No step was taken: zero-shot, or a start prompt tested as it is."""
    return bool(result.get("eval_only")) and not result.get("model_dir")


def _training_of(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """The result of the training run whose model was tested: what was trained is what that run was told, not this one."""
    model_dir = result.get("model_dir")
    if not model_dir:
        return result
    beside = Path(model_dir) / "results.json"
    return _read_result(beside) if beside.is_file() and beside.resolve() != path else result


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"OPTIM": {"LR": 0.002}} -> {"OPTIM.LR": 0.002}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _label(
    training: Mapping[str, Any], result: Mapping[str, Any], settings: Mapping[str, Any], by: Sequence[str]
) -> str:
    """The trainer's name and, after commas, what sets this run apart from its plain form."""
    trainer = training["trainer"]
    words = [trainer]
    zero_shot = trainer.startswith("Zeroshot")
    if trainer.endswith("GRAM"):
        if not settings.get("TRAINER.GRAM.INIT", True):
            words.append("start from words")
        if not settings.get("TRAINER.GRAM.REGULATE", True) and not _untrained(result):
            scale = settings.get("TRAINER.GRAM.STEP_SCALE", 1.0)
            words.append("R off" if scale == 1 else f"R off and step x {scale:.3g}")
    elif not zero_shot and settings.get(f"TRAINER.{trainer.upper()}.CTX_INIT", None) == "":
        words.append("random start")
    if _untrained(result) and not zero_shot:
        words.append("no step")
    for key in by:
        if key not in settings:
            known = ", ".join(sorted(settings)[:5])
            raise GramError(
                f"--by {key}: expected a setting of the runs (such as {known}), found no such setting"
            )
        words.append(f"{key} {settings[key]}")
    return ", ".join(words)


def _compared(key: str, untrained: bool) -> bool:
    hidden = _PLACE + (_TRAINING + ("shots",) if untrained else ())
    return not any(key == name or key.startswith(name + ".") for name in hidden)


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with the half width of its 95 % interval (None: one seed, or nothing was drawn)."""

    mean: float
    half_width: float | None
    seeds: int  # how many went in
    expected: int  # how many there should be


def harmonic(base: float, new: float) -> float:
    """H = 2 base new / (base + new); 0 where both are 0."""
    return 2 * base * new / (base + new) if base + new > 0 else 0.0


def half_width(values: Sequence[float], confidence: float = 0.95) -> float | None:
    """Half the interval of the mean: t(n-1) * s / sqrt(n); None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    from scipy.special import stdtrit  # Student's t quantile; scipy.stats takes a second to import

    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return float(stdtrit(n - 1, 0.5 + confidence / 2)) * deviation / math.sqrt(n)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


# ----------------------------------------------------------------------------------------------------------------------
# The report


@dataclass(frozen=True)
class Row:
    """One line of the table. A cell that could not be filled is None."""

    dataset: str
    label: str
    cells: dict[str, Estimate | None]
    differences: dict[str, Estimate | None]  # empty for the reference itself and where there is none


@dataclass(frozen=True)
class Report:
    """A table and what has to be said about it."""

    columns: tuple[str, ...]  # ("base", "new", "H"), or ("all",)
    rows: list[Row]
    reference: str  # "" when there is none
    datasets: tuple[str, ...]
    seeds: tuple[int, ...]
    missing: list[str]
    notes: list[str]


def build_reports(runs: Sequence[Run], reference: str | None = None) -> list[Report]:
    """One report for the base-to-new runs and one for those on all classes, where there are any.

    `reference`: the label to which differences are taken; None: "CoOp" if it is there. Raises `GramError` for two runs of
    the same thing and for settings that contradict each other.
    """
    labels = list(dict.fromkeys(run.label for run in _ordered(runs)))
    if reference is not None and reference not in labels:
        raise GramError(f"--reference {reference}: expected one of {'; '.join(labels)}, found no such runs")
    protocols = {
        ("base", "new", "H"): [run for run in runs if run.subsample in ("base", "new")],
        ("all",): [run for run in runs if run.subsample == "all"],
    }
    return [_build(part, columns, reference or "CoOp") for columns, part in protocols.items() if part]


def _ordered(runs: Sequence[Run]) -> list[Run]:
    """Zero-shot first, then baselines, then GRAM; plain forms before special ones."""
    return sorted(
        runs,
        key=lambda run: (not run.label.startswith("Zeroshot"), "GRAM" in run.label, run.label, str(run.path)),
    )


def _build(runs: Sequence[Run], columns: tuple[str, ...], reference: str) -> Report:
    runs = _ordered(runs)
    _refuse_duplicates(runs)
    _refuse_conflicts(runs)
    labels = list(dict.fromkeys(run.label for run in runs))
    datasets = tuple(sorted({run.dataset for run in runs}))
    seeds = tuple(sorted({run.seed for run in runs if not run.untrained} or {run.seed for run in runs}))
    subsamples = [column for column in columns if column != "H"]
    values = {(run.label, run.dataset, run.subsample, run.seed): run.value for run in runs}
    fixed = _spread_fixed(runs, values, seeds)
    missing = [
        f"{label}: {dataset}, {subsample}, seed {seed}"
        for label in labels
        for dataset in datasets
        for subsample in subsamples
        for seed in seeds
        if (label, dataset, subsample, seed) not in values
    ]
    groups = ([(AVERAGE, datasets)] if len(datasets) > 1 else []) + [(name, (name,)) for name in datasets]
    reference = reference if reference in labels else ""
    rows = []
    for name, members in groups:
        series = {label: _series(values, label, members, columns, seeds) for label in labels}
        for label in labels:
            cells = {column: _estimate(series[label], column, seeds, label in fixed) for column in columns}
            differences = {}
            if reference and label != reference:
                differences = {
                    column: _difference(series[label], series[reference], column, seeds) for column in columns
                }
            rows.append(Row(name, label, cells, differences))
    return Report(columns, rows, reference, datasets, seeds, missing, _notes(runs, reference))


def _refuse_duplicates(runs: Sequence[Run]) -> None:
    seen: dict[tuple, Run] = {}
    for run in runs:
        key = (run.label, run.dataset, run.subsample, run.seed)
        if key in seen:
            raise GramError(
                f"expected one run of {run.label} on {run.dataset} ({run.subsample} classes, seed {run.seed}), "
                f"found {seen[key].path} and {run.path}{_hint(seen[key], run)}"
            )
        seen[key] = run


def _hint(one: Run, other: Run) -> str:
    apart = _first_difference(one, other)
    return f" (they differ in {apart}: --by {apart} keeps them apart)" if apart else ""


def _first_difference(one: Run, other: Run) -> str:
    keys = sorted(set(one.settings) | set(other.settings))
    return next((key for key in keys if one.settings.get(key) != other.settings.get(key)), "")


def _refuse_conflicts(runs: Sequence[Run]) -> None:
    """Runs that are averaged or subtracted must have been made in the same way."""
    first: dict[tuple[str, str], Run] = {}
    for run in runs:
        other = first.setdefault((run.label, run.dataset), run)
        key = _first_difference(other, run)
        if key:
            raise GramError(
                f"{run.label} on {run.dataset}: expected equal settings in all runs, found {key} "
                f"{other.settings.get(key)!r} in {other.path} and {run.settings.get(key)!r} in {run.path} "
                f"(--by {key} keeps them apart)"
            )
    for key in ("backbone", "shots"):
        for dataset in {run.dataset for run in runs}:
            holders: dict[Any, Run] = {}
            for run in runs:
                if run.dataset == dataset and key in run.settings and f"{key} " not in run.label:
                    holders.setdefault(run.settings[key], run)
            if len(holders) > 1:
                (one, first_run), (two, second_run) = list(holders.items())[:2]
                raise GramError(
                    f"{dataset}: expected one {key} in a table, found {one!r} in {first_run.path} and {two!r} in "
                    f"{second_run.path} (--by {key} keeps them apart)"
                )


def _spread_fixed(runs: Sequence[Run], values: dict[tuple, float], seeds: Sequence[int]) -> set[str]:
    """Give a run without training its one value for every seed; returns the labels where nothing was drawn."""
    seen: dict[tuple, set[float]] = defaultdict(set)
    for run in runs:
        if run.untrained and "random start" not in run.label:
            seen[run.label, run.dataset, run.subsample].add(run.value)
    drawn = {label for (label, _, _), found in seen.items() if len(found) > 1}
    for (label, dataset, subsample), found in seen.items():
        if label not in drawn:
            for seed in seeds:
                values.setdefault((label, dataset, subsample, seed), min(found))
    return {label for label, _, _ in seen} - drawn


def _series(
    values: Mapping[tuple, float],
    label: str,
    datasets: Sequence[str],
    columns: Sequence[str],
    seeds: Sequence[int],
) -> dict[str, dict[int, float]]:
    """Per column, seed -> value averaged over datasets. A seed is there only if no dataset lacks it."""
    series: dict[str, dict[int, float]] = {}
    for column in columns:
        if column == "H":
            both = [seed for seed in seeds if seed in series["base"] and seed in series["new"]]
            series["H"] = {seed: harmonic(series["base"][seed], series["new"][seed]) for seed in both}
            continue
        whole = [seed for seed in seeds if all((label, name, column, seed) in values for name in datasets)]
        series[column] = {
            seed: _mean(values[label, name, column, seed] for name in datasets) for seed in whole
        }
    return series


def _estimate(
    series: dict[str, dict[int, float]], column: str, seeds: Sequence[int], fixed: bool
) -> Estimate | None:
    per_seed = list(series[column].values())
    if not per_seed:
        return None
    if column == "H":  # of the averages, over the seeds that have both
        both = list(series["H"])
        mean = harmonic(
            _mean(series["base"][seed] for seed in both), _mean(series["new"][seed] for seed in both)
        )
    else:
        mean = _mean(per_seed)
    return Estimate(mean, None if fixed else half_width(per_seed), len(per_seed), len(seeds))


def _difference(
    series: dict[str, dict[int, float]],
    reference: dict[str, dict[int, float]],
    column: str,
    seeds: Sequence[int],
) -> Estimate | None:
    pairs = [seed for seed in series[column] if seed in reference[column]]
    if not pairs:
        return None
    differences = [series[column][seed] - reference[column][seed] for seed in pairs]
    return Estimate(_mean(differences), half_width(differences), len(pairs), len(seeds))


def _notes(runs: Sequence[Run], reference: str) -> list[str]:
    notes = []
    shots = {(run.dataset, run.seed): run.few_shot for run in runs if run.label == reference and run.few_shot}
    for run in runs:
        if run.few_shot and run.few_shot != shots.get((run.dataset, run.seed), run.few_shot):
            notes.append(
                f"{run.label}: other training images than {reference} on {run.dataset}, seed {run.seed}"
            )
    first: dict[str, Run] = {}
    for run in runs:
        other = first.setdefault(run.label, run)
        key = _first_difference(other, run)
        if key:
            one, two = other.settings.get(key), run.settings.get(key)
            notes.append(f"{run.label}: {key} is {one!r} on {other.dataset}, {two!r} on {run.dataset}")
    return list(dict.fromkeys(notes))


# ----------------------------------------------------------------------------------------------------------------------
# Curves: accuracy after 0, 1, 5, ... steps


def build_curve(runs: Sequence[Run]) -> tuple[list[str], list[list[Any]]]:
    """Headers and rows of base, new and H after each number of steps, averaged over the datasets and seeds of each label.

    Raises `GramError` when no run has a curve.
    """
    points: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for run in _ordered(runs):
        for point in run.curve:
            if point.get("base") is not None and point.get("new") is not None:
                points[run.label, int(point["step"])].append((point["base"], point["new"]))
    if not points:
        raise GramError("expected runs with a curve (TEST.AT_STEPS or TEST.PER_EPOCH), found none")
    most = {
        label: max(len(found) for (name, _), found in points.items() if name == label) for label, _ in points
    }
    rows = []
    for (label, step), found in sorted(
        points.items(), key=lambda item: (list(most).index(item[0][0]), item[0][1])
    ):
        base, new = _mean(one for one, _ in found), _mean(two for _, two in found)
        runs_there = f"{len(found)}" if len(found) == most[label] else f"{len(found)} of {most[label]}"
        rows.append([label, step, base, new, harmonic(base, new), runs_there])
    return ["trainer", "step", "base", "new", "H", "runs"], rows


# ----------------------------------------------------------------------------------------------------------------------
# Printing


def render(report: Report, form: str = "table", digits: int = 1) -> str:
    """The report as text in one of `FORMATS`. JSON and CSV are unrounded."""
    if form == "json":
        return json.dumps(asdict(report), indent=2, ensure_ascii=False)
    if form == "csv":
        return _csv(report)
    headers = ["dataset", "trainer", *report.columns]
    if report.reference:
        headers += [f"{column} - {report.reference}" for column in report.columns]
    rows: list[list[str]] = []
    above = ""  # a dataset's name stands in its first line only
    for row in report.rows:
        cells = [_cell(row.cells[column], digits) for column in report.columns]
        if report.reference:
            signed = [_cell(row.differences.get(column), digits, sign=True) for column in report.columns]
            cells += [""] * len(report.columns) if row.label == report.reference else signed
        repeated = row.dataset == above
        above = row.dataset
        rows.append(["" if repeated else row.dataset, row.label, *cells])
    return _grid(headers, rows, form) + "\n\n" + "\n".join(_remarks(report))


def render_curve(
    headers: Sequence[str], rows: Sequence[Sequence[Any]], form: str = "table", digits: int = 1
) -> str:
    """A curve as text in one of `FORMATS`."""
    if form == "json":
        return json.dumps(
            [dict(zip(headers, row, strict=True)) for row in rows], indent=2, ensure_ascii=False
        )
    if form == "csv":
        return _write_csv([headers, *rows])
    shown = [[f"{cell:.{digits}f}" if isinstance(cell, float) else cell for cell in row] for row in rows]
    return _grid(headers, shown, form)


def _grid(headers: Sequence[str], rows: Sequence[Sequence[Any]], form: str) -> str:
    from tabulate import tabulate

    style = {"table": "simple", "markdown": "github", "latex": "latex_booktabs"}[form]
    return tabulate(rows, headers, tablefmt=style, disable_numparse=True)


def _cell(estimate: Estimate | None, digits: int, sign: bool = False) -> str:
    if estimate is None:
        return "missing"
    text = f"{estimate.mean:{'+' if sign else ''}.{digits}f}"
    if estimate.half_width is not None:
        text += f" ± {estimate.half_width:.{digits}f}"
    if estimate.seeds < estimate.expected:
        text += f" ({estimate.seeds} of {estimate.expected} seeds)"
    return text


def _remarks(report: Report) -> list[str]:
    datasets = f"{len(report.datasets)} dataset{'s' * (len(report.datasets) != 1)}"
    seeds = f"seed{'s' * (len(report.seeds) != 1)} {', '.join(map(str, report.seeds))}"
    lines = [f"{datasets}; {seeds}; percent; ± is the 95 % interval over seeds (Student's t)."]
    if len(report.seeds) < 2:
        lines.append("One seed: no intervals.")
    if "H" in report.columns:
        lines.append("H: harmonic mean of averaged base and new.")
    if report.reference:
        lines.append(f"Differences to {report.reference} are paired by seed.")
    lines += [f"missing: {line}" for line in report.missing]
    lines += [f"note: {line}" for line in report.notes]
    return lines


def _csv(report: Report) -> str:
    headers = ["dataset", "trainer"]
    for column in report.columns:
        headers += [column, f"{column}_half_width", f"{column}_seeds"]
        headers += [f"{column}_difference", f"{column}_difference_half_width"]
    rows: list[list[Any]] = [headers]
    for row in report.rows:
        line: list[Any] = [row.dataset, row.label]
        for column in report.columns:
            cell, difference = row.cells[column], row.differences.get(column)
            line += (
                [cell.mean, cell.half_width, f"{cell.seeds}/{cell.expected}"]
                if cell
                else ["missing", None, "0"]
            )
            line += [difference.mean, difference.half_width] if difference else [None, None]
        rows.append(line)
    return _write_csv(rows)


def _write_csv(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().rstrip("\n")
