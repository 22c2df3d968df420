"""The paper's Tables 1 to 7 from runs: the runs of each table, its rows in the paper's order, the paper's numbers.

Table 1: base-to-new, 16 shots. Tables 2 and 4: trained on a source, tested on its domain variants (16 and 4 shots);
Tables 3 and 5: on other datasets. Tables 6 and 7: UniGRAM's ablations and token counts, averages over the datasets.
docs/guide/report.md lists where a number of the paper is shown.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gram_meta.report.paper as paper
from gram_meta.errors import GramError
from gram_meta.report.runs import EPOCHS, FROM_LOG, LABELLED, NO_META, NO_REGULATOR, NO_SHIFT, TOKENS, Run
from gram_meta.report.tables import ALL, BASE_NEW, Plan, Printed, Report, build, build_plain, check_reference, labels_of

NUMBERS = (1, 2, 3, 4, 5, 6, 7)
TITLES = {
    1: "base-to-new generalisation, 16 shots",
    2: "cross-domain generalisation, 16 shots",
    3: "cross-dataset generalisation, 16 shots",
    4: "cross-domain generalisation, 4 shots",
    5: "cross-dataset generalisation, 4 shots",
    6: "ablations of UniGRAM, base-to-new, 16 shots",
    7: "UniGRAM by number of prompt tokens, base-to-new, 16 shots",
}
SOURCES = ("ImageNet", "EmojiTravel")  # trained for transfer, even if no test on a target exists
_TRANSFER = {(True, 16): 2, (False, 16): 3, (True, 4): 4, (False, 4): 5}  # (domain variants, shots) -> number
_WANTED = 16  # shots of Tables 1, 6 and 7

# Table 6: the row's trainer, and what its meta-training lacks
_LACKS: tuple[tuple[str, ...], ...] = ((), (NO_SHIFT,), (NO_REGULATOR,), (NO_META,), (LABELLED,))
ABLATIONS = (*(("UniGRAM", lacks) for lacks in _LACKS), ("JointPrompt", ()))
ROWS_6 = tuple(f"{row} {', '.join((trainer, *lacks))}" for row, (trainer, lacks) in enumerate(ABLATIONS))
ROWS_7 = tuple(f"{2 * half} tokens ({half}+{half})" for half in (1, 2, 3, 4))


def paper_tables(runs: Sequence[Run], numbers: Iterable[int], reference: str | None = None) -> list[Report]:
    """Return the tables with these numbers, with every row of the paper, even one without runs.

    Raises:
        GramError: there are no runs of any of these tables; runs that cannot share a table (see `tables.build`).
    """
    numbers = list(numbers)
    check_reference(runs, reference)
    reports = [it for number in numbers for it in _table(number, runs, reference or "CoOp", explicit=True)]
    if not reports:
        asked = " or ".join(f"Table {number} ({TITLES[number]})" for number in numbers)
        raise GramError(f"expected runs of {asked}, found none")
    return reports


def all_tables(runs: Sequence[Run], reference: str | None = None) -> list[Report]:
    """Return every table of the paper that there are runs of, then tables of the other runs."""
    check_reference(runs, reference)
    reference = reference or "CoOp"
    reports = [it for number in NUMBERS for it in _table(number, runs, reference, explicit=False)]
    for rest in (_variants, _other_shots, _all_classes):
        reports += rest(runs, reference)
    return reports


def _table(number: int, runs: Sequence[Run], reference: str, explicit: bool) -> list[Report]:
    if number == 1:
        return _table_1(runs, reference, explicit)
    if number in (6, 7):
        return _averages(number, runs, explicit)
    return _transfer(number, runs, reference, explicit)


# ------------------------------------------------------------------------------------------ Tables 1, 6, 7: base to new


def base_to_new_runs(runs: Sequence[Run], shots: int = _WANTED) -> list[Run]:
    """Return the base and new runs with this number of shots, and those without training, once each."""
    wanted = [run for run in runs if run.subsample in ("base", "new") and (run.untrained or run.shots == shots)]
    return _once(wanted, shots)


def _once(runs: Sequence[Run], shots: int) -> list[Run]:
    """Keep one of several equal runs without training, which do not depend on the shots: the one with these shots.

    Two with the same number of shots and other results are both kept, and `build` raises for them.
    """
    kept: dict[tuple, Run] = {}
    for run in sorted((run for run in runs if run.untrained), key=lambda run: run.shots != shots):
        kept.setdefault(run.key, run)

    def is_shown(run: Run) -> bool:
        chosen = kept.get(run.key, run)
        return not run.untrained or run is chosen or (run.shots == chosen.shots and run.value != chosen.value)

    return [run for run in runs if is_shown(run)]


def _table_1(runs: Sequence[Run], reference: str, explicit: bool) -> list[Report]:
    mine = [run for run in base_to_new_runs(runs) if run.plain]
    if not _worth_showing(mine, runs):
        return []
    datasets = _in_order({run.dataset for run in mine}, paper.DATASETS)
    plan = Plan(
        BASE_NEW,
        labels=_rows(mine, paper.TRAINERS, explicit),
        datasets=datasets,
        average_over=datasets if len(datasets) > 1 else (),
        reference=reference,
        paper=_beside(mine, lambda label, _, members: paper.base_to_new(members, label)),
        title=_title(f"Table 1: {TITLES[1]}", mine),
        number=1,
    )
    return [_with_absent(build(mine, plan), mine, paper.DATASETS)]


def _worth_showing(mine: Sequence[Run], runs: Sequence[Run]) -> bool:
    """Return whether Table 1 has a trained run; zero-shot alone is shown only if no base-to-new run was trained."""
    trained = [run for run in runs if run.subsample in ("base", "new") and not run.untrained]
    return bool(mine) and (not trained or any(not run.untrained for run in mine))


def _averages(number: int, runs: Sequence[Run], explicit: bool) -> list[Report]:
    """Return Table 6 or 7, over the datasets that have runs of more rows than the full UniGRAM."""
    rows, row_of = (ROWS_6, _ablation_row) if number == 6 else (ROWS_7, _tokens_row)
    full = ROWS_6[0] if number == 6 else ROWS_7[1]
    mine = [replace(run, label=row) for run in base_to_new_runs(runs) if (row := row_of(run))]
    own = {run.dataset for run in mine if run.label != full and run.label != ROWS_6[5]}
    if any(run.label == full for run in mine):
        own = own or {run.dataset for run in mine if run.label != full}
    if not mine or not (own or explicit):
        return []
    left_out = {run.dataset for run in mine} - own if own else set()
    mine = [run for run in mine if run.dataset not in left_out]
    datasets = _in_order({run.dataset for run in mine}, paper.DATASETS)
    there = {run.label for run in mine}
    plan = Plan(
        BASE_NEW,
        labels=[row for row in rows if explicit or row in there],
        datasets=datasets,
        average_over=datasets,
        reference=full,
        paper=_beside(mine, lambda label, _, members: _average_number(number, label, members)),
        title=_title(f"Table {number}: {TITLES[number]}", mine),
        number=number,
        averages_only=True,
    )
    report = _with_absent(build(mine, plan), mine, paper.DATASETS)
    if left_out:
        named = ", ".join(_in_order(left_out, paper.DATASETS))
        report.notes.append(f"without {named}, where no row but the full UniGRAM or JointPrompt has runs")
    return [report]


def _ablation_row(run: Run) -> str:
    """Return a run's row of Table 6; "" if it belongs to none."""
    if run.tokens != TOKENS or run.label != ", ".join((run.trainer, *run.ablation)):
        return ""  # other tokens, or a control
    wanted = (run.trainer, run.ablation)
    return ROWS_6[ABLATIONS.index(wanted)] if wanted in ABLATIONS else ""


def _tokens_row(run: Run) -> str:
    """Return a run's row of Table 7; "" if it belongs to none."""
    if run.trainer != "UniGRAM" or run.tokens is None or run.tokens[0] != run.tokens[1]:
        return ""
    half = run.tokens[0]
    row = f"{2 * half} tokens ({half}+{half})"
    usual = "UniGRAM" if run.tokens == TOKENS else f"UniGRAM, {half}+{half} tokens"
    return row if row in ROWS_7 and run.label == usual else ""


def _average_number(number: int, label: str, members: Sequence[str]) -> dict[str, float]:
    if set(members) != set(paper.DATASETS):
        return {}
    return paper.ablation(int(label[0])) if number == 6 else paper.tokens(int(label.split()[0]))


# ----------------------------------------------------------------- Tables 2 to 5: trained on a source, tested elsewhere


def _transfer(number: int, runs: Sequence[Run], reference: str, explicit: bool) -> list[Report]:
    variants, shots = next(key for key, value in _TRANSFER.items() if value == number)
    sources = _sources(runs, shots, explicit)
    tables = (_transfer_table(runs, source, shots, variants, reference, explicit) for source in sources)
    return [table for table in tables if table]


def _sources(runs: Sequence[Run], shots: int, explicit: bool) -> list[str]:
    whole = [run for run in runs if run.subsample == "all" and not run.untrained and run.shots == shots]
    tested = {run.source for run in whole if run.transferred}
    return sorted(tested | ({run.source for run in whole if run.source in SOURCES} if explicit else set()))


def _transfer_table(
    runs: Sequence[Run], source: str, shots: int, variants: bool, reference: str, explicit: bool = False
) -> Report | None:
    """Return the table of one source, tested on its domain variants or on other datasets; None without tests."""
    number = _TRANSFER.get((variants, shots), 0)
    printed: Mapping[str, Any] = paper.table(number) if number else {"source": "", "targets": (), "rows": {}}
    whole = [run for run in runs if run.subsample == "all"]
    trained = [run for run in whole if not run.untrained and run.source == source and run.shots == shots]
    # the name of a domain variant begins with that of its source: ImageNetV2
    tests = [run for run in trained if run.transferred and run.dataset.startswith(source) == variants]
    targets = _in_order({run.dataset for run in tests}, printed["targets"])
    if explicit and not targets and source == printed["source"]:
        targets = list(printed["targets"])
    if not targets:
        return None
    at_source = [run for run in trained if not run.transferred]
    untrained = [run for run in whole if run.untrained and run.dataset in (source, *targets)]
    mine = [*tests, *at_source, *_once(untrained, shots)]
    kind = "cross-domain" if variants else "cross-dataset"
    title = f"Table {number}: {TITLES[number]}" if number else f"{kind} generalisation, {shots} shots"
    plan = Plan(
        ALL,
        labels=_rows(mine, list(printed["rows"]) if explicit else paper.TRAINERS, explicit),
        datasets=[source, *targets],
        average_over=targets,
        average_last=True,
        reference=reference,
        paper=_beside(mine, lambda *line: _transfer_number(number, source, *line)),
        title=_title(f"{title}, trained on {source}", mine),
        number=number,
        wide=True,
    )
    return _with_absent(build(mine, plan), mine, printed["targets"])


def _transfer_number(number: int, source: str, label: str, name: str, members: Sequence[str]) -> dict[str, float]:
    """Return the paper's number of one dataset, or of the average (`name`) over `members`."""
    row = paper.transfer(number, source, members, label) if number else {}
    return {"all": row[name]} if name in row else {}


# ---------------------------------------------------------------------------- Runs that belong to no table of the paper


def _variants(runs: Sequence[Run], reference: str) -> list[Report]:
    """Return controls and variants of trainers at 16 shots, with the reference for comparison."""
    # an initial prompt tested without a number of shots belongs here; one with other shots, to the runs of those shots
    mine = [run for run in base_to_new_runs(runs) if run.shots == _WANTED or run.shots < 1]
    special = [run for run in mine if not (run.plain or _ablation_row(run) or _tokens_row(run))]
    if not special:
        return []
    datasets = {run.dataset for run in special}
    beside = (reference, reference + FROM_LOG)
    shown = [*special, *(run for run in mine if run.label in beside and run.dataset in datasets)]
    title = _title("Controls and variants, base-to-new, 16 shots", shown)
    return [build_plain(shown, BASE_NEW, reference, title)]


def _other_shots(runs: Sequence[Run], reference: str) -> list[Report]:
    """Return base-to-new runs with other numbers of shots than the paper's."""
    pairs = [run for run in runs if run.subsample in ("base", "new")]
    shots = {run.shots for run in pairs if not run.untrained} - {_WANTED}
    if not shots:
        return []
    shown = [run for run in pairs if not run.untrained and run.shots != _WANTED]
    shown += _once([run for run in pairs if run.untrained], min(shots))
    numbers = ", ".join(map(str, sorted(shots)))
    return [build_plain(shown, BASE_NEW, reference, _title(f"Base-to-new, {numbers} shots", shown))]


def _all_classes(runs: Sequence[Run], reference: str) -> list[Report]:
    """Return transfers with other numbers of shots, then runs trained and tested on all classes of one dataset."""
    whole = [run for run in runs if run.subsample == "all"]
    transfers = sorted({(run.source, run.shots) for run in whole if not run.untrained and run.transferred})
    tables = [
        _transfer_table(runs, source, shots, variants, reference)
        for source, shots in transfers
        for variants in (True, False)
        if (variants, shots) not in _TRANSFER
    ]
    reports = [table for table in tables if table]
    reached = {run.dataset for run in whole if run.transferred} | {source for source, _ in transfers}
    alone = [run for run in whole if not run.untrained and not run.transferred]
    alone = [run for run in alone if (run.source, run.shots) not in transfers]
    untrained = [run for run in whole if run.untrained]
    there = {run.dataset for run in alone}
    shown = [*alone, *(run for run in untrained if run.dataset in there or run.dataset not in reached)]
    if not shown:
        return reports
    shown = _once(shown, min((run.shots for run in alone), default=_WANTED))
    return [*reports, build_plain(shown, ALL, reference, _title("All classes", shown))]


# ----------------------------------------------------------------- Rows, order, and where the paper's numbers are shown


def _rows(runs: Sequence[Run], order: Iterable[str], explicit: bool) -> list[str]:
    """Return the paper's trainers in its order (all of them if `explicit`), then the others."""
    there = labels_of(runs)
    first = []
    for label in order:
        both = [one for one in (label, label + FROM_LOG) if one in there]
        first += both or ([label] if explicit else [])
    return first + [label for label in there if label not in first]


def _in_order(names: Collection[str], order: Sequence[str]) -> list[str]:
    """Return the names that the paper has in its order, then the others in alphabetical order."""
    return [name for name in order if name in names] + sorted(name for name in names if name not in order)


def _beside(runs: Sequence[Run], lookup: Printed) -> Printed:
    """Return `lookup`, restricted to the rows whose runs all have the paper's backbone, schedule and metric."""
    unlike = {run.label for run in runs if not _as_in_the_paper(run)}
    return lambda label, *line: {} if label in unlike else lookup(label.removesuffix(FROM_LOG), *line)


def _as_in_the_paper(run: Run) -> bool:
    """Return whether backbone, schedule and metric are the paper's; the table decides on datasets and shots."""
    measured = (run.backbone, run.metric, run.split)
    return measured == (paper.BACKBONE, "accuracy", "test") and (run.untrained or run.epochs == EPOCHS)


def _title(text: str, runs: Sequence[Run]) -> str:
    return f"{text} ({', '.join(sorted({run.backbone for run in runs}))})"


def _with_absent(report: Report, runs: Sequence[Run], datasets: Sequence[str]) -> Report:
    """Add a note that lists the paper's datasets without any run, if other datasets of the paper have runs."""
    there = set(report.datasets) & set(datasets)
    absent = [paper.name(name) for name in datasets if name not in there]
    if there and absent and {run.backbone for run in runs} == {paper.BACKBONE}:
        report.notes.append(f"of the paper's {len(datasets)} datasets, no run on {', '.join(absent)}")
    return report
