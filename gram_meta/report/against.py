"""A method beside others: differences paired by dataset, classes and seed, with an interval and an exact test."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gram_meta.errors import GramError
from gram_meta.intervals import half_width, harmonic
from gram_meta.report.runs import Run
from gram_meta.report.tables import fixed_labels, ordered, refuse_conflicts, refuse_duplicates, refuse_mixtures
from gram_meta.report.text import render_curve

EXACT = 16  # pairs up to which all 2^n signs are tried; of more pairs, `DRAWS` random signs
DRAWS = 100_000
HEADERS = ("method", "against", "column", "pairs", "datasets", "difference", "half_width", "p", "wins")
NOTE = f"""difference: the method minus the other one, in percentage points, mean over pairs of dataset and seed.
half_width: of the 95 % interval over pairs (Student's t). p: two-sided sign-flip test, exact for up to {EXACT} pairs.
Seeds of one dataset share its test images: pairs are not quite independent."""

Place = tuple[str, str | None, int | None]  # dataset; source and seed of the training, None: of every training
Series = Mapping[Place, float]  # percent


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
    wins: int  # pairs in which the method is ahead: with the lower error rate, or the higher value of another metric

    @property
    def row(self) -> list[object]:
        """The values in the order of `HEADERS`."""
        found = (self.pairs, self.datasets, self.difference, self.half_width, self.p, self.wins)
        return [self.method, self.other, self.column, *found]


def compare(mine: Sequence[Run], others: Sequence[Run]) -> list[Comparison]:
    """Return the difference of each method in `mine` to each in `others`, for each column that both have.

    A pair is one dataset with one seed, trained on the same dataset; H is that of the pair's own base and new accuracy.
    A run without training has one value for all seeds and trainings. Beside another such run it is one pair.

    Raises:
        GramError: no dataset, classes and seed that a method shares with another one; two runs of one thing; other
            settings in one method's runs; other backbones or shots on a dataset.
    """
    for runs in (mine, others):
        refuse_duplicates(runs, lambda run: (*run.key, run.source))
        refuse_conflicts(runs, _column_of)
    refuse_mixtures([*mine, *others], _column_of)
    found = [
        _compared((method, other, column), pairs, mine[0].metric)
        for method, a in _series(mine).items()
        for other, b in _series(others).items()
        for column in ("base", "new", "H", "all")
        if (pairs := _pairs(a.get(column, {}), b.get(column, {})))
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
        sums = (1 - 2 * (np.arange(2 ** len(values))[:, None] >> np.arange(len(values)) & 1)) @ values
    else:
        signs = np.random.default_rng(0)
        sums = np.concatenate([signs.choice([-1, 1], (1000, len(values))) @ values for _ in range(DRAWS // 1000)])
        sums[0] = values.sum()
    return float(np.mean(np.abs(sums) >= abs(values.sum()) - 1e-9))


def _column_of(run: Run) -> tuple[str, str, str]:
    return run.dataset, run.subsample, run.source


def _compared(names: tuple[str, str, str], pairs: Sequence[tuple[Place, float, float]], metric: str) -> Comparison:
    differences = [one - two for _, one, two in pairs]
    wins = sum(it < 0 if metric == "error_rate" else it > 0 for it in differences)
    datasets = len({place[:2] for place, _, _ in pairs})
    measured = float(np.mean(differences)), half_width(differences), sign_flip_test(differences)
    return Comparison(*names, len(pairs), datasets, *measured, wins)


def _pairs(one: Series, two: Series) -> list[tuple[Place, float, float]]:
    """Return the places with a value on both sides, and the values."""
    found = []
    for place in sorted({*one, *two}, key=str):
        a, b = (side.get(place, side.get((place[0], None, None))) for side in (one, two))
        if a is not None and b is not None:
            found.append((place, a, b))
    return found


def _series(runs: Sequence[Run]) -> dict[str, dict[str, dict[Place, float]]]:
    """Return label -> column -> place -> percent."""
    series: dict[str, dict[str, dict[Place, float]]] = defaultdict(lambda: defaultdict(dict))
    fixed = fixed_labels(runs)
    for run in ordered(runs):
        is_fixed = run.label in fixed
        place = (run.dataset, None if is_fixed else run.source, None if is_fixed else run.seed)
        series[run.label][run.subsample][place] = run.value
    for columns in series.values():
        base, new = columns["base"], columns["new"]
        columns["H"] = {place: harmonic(base[place], new[place]) for place in base if place in new}
    return series
