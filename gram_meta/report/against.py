"""A method beside others: differences paired by dataset, classes and seed, with an interval and an exact test."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gram_meta.errors import GramError
from gram_meta.intervals import half_width, harmonic
from gram_meta.report.runs import Run
from gram_meta.report.tables import labels_of
from gram_meta.report.text import render_curve

EXACT = 16  # pairs up to which all 2^n signs are tried; of more pairs, `DRAWS` random signs
DRAWS = 100_000
HEADERS = ("method", "against", "column", "pairs", "datasets", "difference", "half_width", "p", "wins")
NOTE = f"""difference: the method minus the other one, in percentage points, mean over pairs of dataset and seed.
half_width: of the 95 % interval over pairs (Student's t). p: two-sided sign-flip test, exact for up to {EXACT} pairs.
Seeds of one dataset share its test images: pairs are not quite independent."""

Series = Mapping[tuple[str, int], float]  # (dataset, seed) -> percent


@dataclass(frozen=True)
class Comparison:
    """A method minus another one, over the pairs that both have."""

    method: str
    other: str
    column: str  # "base", "new", "H" or "all"
    pairs: int
    datasets: int
    difference: float  # mean over pairs, in percentage points
    half_width: float | None  # of the 95 % interval over pairs (Student's t); None for one pair
    p: float  # two-sided, of `sign_flip_test`
    wins: int  # pairs in which the method is ahead

    @property
    def row(self) -> list[object]:
        """The values in the order of `HEADERS`."""
        found = (self.pairs, self.datasets, self.difference, self.half_width, self.p, self.wins)
        return [self.method, self.other, self.column, *found]


def compare(mine: Sequence[Run], others: Sequence[Run]) -> list[Comparison]:
    """Return the difference of each method in `mine` to each in `others`, for each column that both have.

    A pair is one dataset with one seed; H is that of the pair's own base and new accuracy. A run without training has
    one value for all seeds.

    Raises:
        GramError: no dataset, classes and seed that a method shares with another one.
    """
    seeds = {run.seed for run in (*mine, *others) if not run.untrained} or {run.seed for run in (*mine, *others)}
    found = [
        _compared(method, other, column, a[column], b[column])
        for method, a in _series(mine, seeds).items()
        for other, b in _series(others, seeds).items()
        for column in ("base", "new", "H", "all")
        if a.get(column, {}).keys() & b.get(column, {}).keys()
    ]
    if not found:
        here, there = (f"{runs[0].dataset} ({runs[0].subsample}, seed {runs[0].seed})" for runs in (mine, others))
        expected = "expected runs on the same dataset, classes and seed as those here"
        raise GramError(f"--against: {expected}, such as {here}, found none, but {there}")
    return found


def render_comparisons(found: Sequence[Comparison], form: str = "table", digits: int = 1) -> str:
    """Return the comparisons in one of the formats of `text.render`, with a line that explains them."""
    if form in ("csv", "json"):
        return render_curve(HEADERS, [it.row for it in found], form)
    rows = [it.row for it in found]
    shown = [
        ["-" if it is None else f"{it:.3g}" if i == HEADERS.index("p") else it for i, it in enumerate(row)]
        for row in rows
    ]
    text = render_curve(HEADERS, shown, form, digits)
    if form == "latex":
        return text
    return f"{text}\n\n{NOTE}"


def sign_flip_test(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of a mean difference of zero, if each pair's sign is as likely as its opposite.

    It is exact for at most `EXACT` pairs: the share of all 2^n signs whose mean is at least as far from zero. For more
    pairs it is estimated from `DRAWS` random signs, the observed ones among them.
    """
    values = np.asarray(differences, np.float64)
    if len(values) <= EXACT:
        signs = 1 - 2 * (np.arange(2 ** len(values))[:, None] >> np.arange(len(values)) & 1)
    else:
        signs = np.random.default_rng(0).choice([-1, 1], (DRAWS, len(values)))
        signs[0] = 1
    sums = np.abs(signs @ values)
    return float(np.mean(sums >= abs(values.sum()) - 1e-9))


def _compared(method: str, other: str, column: str, one: Series, two: Series) -> Comparison:
    pairs = sorted(one.keys() & two.keys())
    differences = [one[pair] - two[pair] for pair in pairs]
    wins, datasets = sum(it > 0 for it in differences), len({dataset for dataset, _ in pairs})
    measured = float(np.mean(differences)), half_width(differences), sign_flip_test(differences)
    return Comparison(method, other, column, len(pairs), datasets, *measured, wins)


def _series(runs: Sequence[Run], seeds: Collection[int]) -> dict[str, dict[str, dict[tuple[str, int], float]]]:
    """Return label -> column -> (dataset, seed) -> percent; a run without training counts for all `seeds`."""
    series: dict[str, dict[str, dict[tuple[str, int], float]]] = {}
    for label in labels_of(runs):
        columns: dict[str, dict[tuple[str, int], float]] = {}
        for run in (run for run in runs if run.label == label):
            for seed in seeds if run.untrained else (run.seed,):
                column = columns.setdefault(run.subsample, {})
                dataset = f"{run.dataset}, trained on {run.source}" if run.transferred else run.dataset
                if column.setdefault((dataset, seed), run.value) != run.value:
                    found = "found two that differ (--by KEY keeps other settings apart)"
                    raise GramError(f"{run.path}: expected one run of {label} on {dataset}, seed {seed}, {found}")
        if {"base", "new"} <= set(columns):
            both = columns["base"].keys() & columns["new"].keys()
            columns["H"] = {pair: harmonic(columns["base"][pair], columns["new"][pair]) for pair in both}
        series[label] = columns
    return series
