"""Tables: which runs belong to which row, what each cell is, which runs are missing, and which contradict each other.

docs/guide/report.md lists how the numbers are computed.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gram_meta.errors import GramError
from gram_meta.intervals import Estimate, estimate, harmonic, harmonic_estimate, mean, paired_difference
from gram_meta.report.runs import FROM_LOG, Run

AVERAGE = "average"
BASE_NEW = ("base", "new", "H")
ALL = ("all",)

# (label, dataset, subsample, seed) -> percent
Values = Mapping[tuple[str, str, str, int], float]
# (label, the row's dataset or AVERAGE, the datasets that are averaged) -> column -> the paper's number
Printed = Callable[[str, str, Sequence[str]], Mapping[str, float]]


@dataclass(frozen=True)
class Row:
    """One row of a table. A cell without a value is None."""

    dataset: str
    label: str
    cells: dict[str, Estimate | None]
    differences: dict[str, Estimate | None]  # empty for the reference itself, and without a reference
    paper: dict[str, float] = field(default_factory=dict)  # only beside measured cells


@dataclass(frozen=True)
class Missing:
    """A run that a table needs and that does not exist."""

    label: str
    dataset: str
    subsample: str
    seed: int


@dataclass(frozen=True)
class Report:
    """A table with its missing runs and notes."""

    columns: tuple[str, ...]  # ("base", "new", "H"), or ("all",)
    rows: list[Row]
    reference: str  # "" when there is none
    datasets: tuple[str, ...]
    seeds: tuple[int, ...]
    missing: list[Missing]
    notes: list[str]
    title: str = ""
    number: int = 0  # of the paper's table; 0: none of the paper's
    wide: bool = False  # shown with a column per dataset, as Tables 2 to 5
    averages_only: bool = False  # shown without the datasets' own rows, as Tables 6 and 7

    @property
    def labels(self) -> list[str]:
        """The trainers, in the order of their rows."""
        return list(dict.fromkeys(row.label for row in self.rows))


@dataclass(frozen=True)
class Plan:
    """The rows and columns that a table should have, whether or not the runs exist.

    `labels` and `datasets` are in the order of the rows; `average_over` are the datasets of the average ((): none).
    """

    columns: tuple[str, ...]
    labels: Sequence[str]
    datasets: Sequence[str]
    average_over: Sequence[str] = ()
    average_last: bool = False
    reference: str = ""
    paper: Printed = lambda label, name, members: {}
    title: str = ""
    number: int = 0
    wide: bool = False
    averages_only: bool = False


def build_reports(runs: Sequence[Run], reference: str | None = None) -> list[Report]:
    """Return a report of the base-to-new runs and one of the runs on all classes, if there are such runs.

    Args:
        reference: the label that is subtracted in differences; None: "CoOp" if there are such runs.

    Raises:
        GramError: two runs of the same thing, or settings that contradict each other.
    """
    check_reference(runs, reference)
    protocols = {
        BASE_NEW: [run for run in runs if run.subsample in ("base", "new")],
        ALL: [run for run in runs if run.subsample == "all"],
    }
    return [build_plain(part, columns, reference or "CoOp") for columns, part in protocols.items() if part]


def build_plain(runs: Sequence[Run], columns: tuple[str, ...], reference: str, title: str = "") -> Report:
    """Return the table of every label and every dataset that there are runs of; the average comes first."""
    datasets = sorted({run.dataset for run in runs})
    averaged = datasets if len(datasets) > 1 else ()
    return build(runs, Plan(columns, labels_of(runs), datasets, averaged, reference=reference, title=title))


def check_reference(runs: Sequence[Run], reference: str | None) -> None:
    """Raise `GramError` if no run has the label `reference`."""
    labels = labels_of(runs)
    if reference is not None and reference not in labels:
        raise GramError(f"--reference {reference}: expected one of {'; '.join(labels)}, found no such runs")


def labels_of(runs: Sequence[Run]) -> list[str]:
    """Return the labels: zero-shot first, then baselines, then GRAM; standard forms before variants."""
    return list(dict.fromkeys(run.label for run in ordered(runs)))


def ordered(runs: Sequence[Run]) -> list[Run]:
    """Return the runs in the order of `labels_of`."""
    return sorted(
        runs, key=lambda run: (not run.label.startswith("Zeroshot"), "GRAM" in run.label, run.label, str(run.path))
    )


# ------------------------------------------------------------------------------------------------- From runs to a table


def build(runs: Sequence[Run], plan: Plan) -> Report:
    """Return the plan's table, filled from `runs`; raise `GramError` for two runs of one thing and other conflicts."""
    runs = ordered(runs)
    refuse_duplicates(runs)
    refuse_conflicts(runs)
    seeds = tuple(sorted({run.seed for run in runs if not run.untrained} or {run.seed for run in runs}))
    values = {run.key: run.value for run in runs}
    fixed = fixed_labels(runs)
    for run in runs:
        for seed in seeds if run.label in fixed else ():
            values.setdefault((run.label, run.dataset, run.subsample, seed), run.value)
    groups: list[tuple[str, tuple[str, ...]]] = [(name, (name,)) for name in plan.datasets]
    if plan.average_over:
        groups.insert(len(groups) if plan.average_last else 0, (AVERAGE, tuple(plan.average_over)))
    labels = {run.label for run in runs}
    reference = next((label for label in (plan.reference, plan.reference + FROM_LOG) if label in labels), "")
    rows = []
    for name, members in groups:
        series = {label: series_of(values, label, members, plan.columns, seeds) for label in plan.labels}
        for label in plan.labels:
            cells = {column: cell_of(series[label], column, len(seeds), label in fixed) for column in plan.columns}
            differences = {
                column: paired_difference(series[label][column], series[reference][column], len(seeds))
                for column in plan.columns
                if reference not in ("", label)
            }
            printed = plan.paper(label, name, members)
            beside = {column: printed[column] for column in printed if cells.get(column) is not None}
            rows.append(Row(name, label, cells, differences, beside))
    found = rows, reference, tuple(plan.datasets), seeds, _missing(plan, values, seeds), notes(runs, reference)
    return Report(plan.columns, *found, plan.title, plan.number, plan.wide, plan.averages_only)


def _missing(plan: Plan, values: Values, seeds: Sequence[int]) -> list[Missing]:
    return [
        Missing(label, dataset, subsample, seed)
        for label in plan.labels
        for dataset in plan.datasets
        for subsample in plan.columns
        if subsample != "H"
        for seed in seeds
        if (label, dataset, subsample, seed) not in values
    ]


def _with_first(runs: Sequence[Run], group_of: Callable[[Run], Hashable]) -> Iterator[tuple[Run, Run]]:
    """Yield the first run of a run's group, and the run."""
    first: dict[Hashable, Run] = {}
    for run in runs:
        yield first.setdefault(group_of(run), run), run


def refuse_duplicates(runs: Sequence[Run], key_of: Callable[[Run], Hashable] = lambda run: run.key) -> None:
    """Raise `GramError` for two runs of one thing."""
    for other, run in _with_first(runs, key_of):
        if other is not run:
            apart = _first_difference(other, run)
            hint = f" (they differ in {apart}: --by {apart} keeps them apart)" if apart else ""
            raise GramError(
                f"expected one run of {run.label} on {run.dataset} ({run.subsample} classes, seed {run.seed}), "
                f"found {other.path} and {run.path}{hint}"
            )


def _first_difference(one: Run, other: Run) -> str:
    keys = sorted(set(one.settings) | set(other.settings))
    return next((key for key in keys if one.settings.get(key) != other.settings.get(key)), "")


def refuse_conflicts(runs: Sequence[Run], place_of: Callable[[Run], Hashable] = lambda run: run.dataset) -> None:
    """Raise `GramError` if runs that are averaged or subtracted at one place have different settings."""
    for other, run in _with_first(runs, lambda run: (run.label, place_of(run))):
        if key := _first_difference(other, run):
            raise GramError(
                f"{run.label} on {run.dataset}: expected equal settings in all runs, found {key} "
                f"{other.settings.get(key)!r} in {other.path} and {run.settings.get(key)!r} in {run.path} "
                f"(--by {key} keeps them apart)"
            )
    refuse_mixtures(runs, place_of)


def refuse_mixtures(runs: Sequence[Run], place_of: Callable[[Run], Hashable]) -> None:
    """Raise `GramError` if runs at one place have different backbones or numbers of shots."""
    for key in ("backbone", "shots"):
        having = [run for run in runs if key in run.settings and f"{key} " not in run.label]
        for other, run in _with_first(having, place_of):
            if other.settings[key] != run.settings[key]:
                raise GramError(
                    f"{run.dataset}: expected one {key}, found {other.settings[key]!r} in {other.path} "
                    f"and {run.settings[key]!r} in {run.path} (--by {key} keeps them apart)"
                )


def fixed_labels(runs: Sequence[Run]) -> set[str]:
    """Return the labels of the runs without training whose values no randomness changes: one counts for every seed."""
    seen: dict[tuple[str, str, str], set[float]] = defaultdict(set)
    for run in runs:
        if run.untrained:
            seen[run.label, run.dataset, run.subsample].add(run.value)
    drawn = {label for (label, _, _), found in seen.items() if len(found) > 1 or "random start" in label}
    return {label for label, _, _ in seen} - drawn


def series_of(
    values: Values, label: str, datasets: Sequence[str], columns: Sequence[str], seeds: Sequence[int]
) -> dict[str, dict[int, float]]:
    """Return, per column, seed -> value averaged over datasets, for the seeds that every dataset has."""
    series: dict[str, dict[int, float]] = {}
    for column in columns:
        if column == "H":
            both = [seed for seed in series["base"] if seed in series["new"]]
            series["H"] = {seed: harmonic(series["base"][seed], series["new"][seed]) for seed in both}
            continue
        whole = [seed for seed in seeds if all((label, name, column, seed) in values for name in datasets)]
        series[column] = {seed: mean(values[label, name, column, seed] for name in datasets) for seed in whole}
    return series


def cell_of(
    series: Mapping[str, Mapping[int, float]], column: str, expected: int, fixed: bool = False
) -> Estimate | None:
    """Return the mean and interval of one column over seeds; None without a seed."""
    if column == "H":
        return harmonic_estimate(series["base"], series["new"], expected, fixed)
    return estimate(list(series[column].values()), expected, fixed)


def notes(runs: Sequence[Run], reference: str) -> list[str]:
    """Return notes for readers of the averages: other training images, settings that vary over datasets."""
    found = [f"{run.label}: {run.metric} {run.remark}" for run in runs if run.remark]
    shots = {(run.source, run.seed): run.few_shot for run in runs if run.label == reference and run.few_shot}
    for run in runs:
        if run.few_shot and run.few_shot != shots.get((run.source, run.seed), run.few_shot):
            found.append(f"{run.label}: other training images than {reference} on {run.source}, seed {run.seed}")
    for other, run in _with_first(runs, lambda run: run.label):
        if key := _first_difference(other, run):
            one, two = other.settings.get(key), run.settings.get(key)
            found.append(f"{run.label}: {key} is {one!r} on {other.dataset}, {two!r} on {run.dataset}")
    return list(dict.fromkeys(found))


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
