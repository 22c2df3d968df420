"""Reports as text: for a terminal, Markdown, LaTeX, CSV and JSON."""

import csv
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gram_meta.files import to_json
from gram_meta.intervals import Estimate
from gram_meta.report.tables import AVERAGE, Missing, Report, Row


def render(report: Report, form: str = "table", digits: int = 1) -> str:
    """Return the report as "table", "markdown", "latex", "csv" or "json"; the last two are unrounded."""
    if form == "json":
        return to_json(asdict(report), "--format json", indent=2)
    if form == "csv":
        return _csv(report)
    grid = grid_of(report, digits)
    if form == "latex":
        comments = [f"% {_one_line(line)}" for line in remarks(report)]
        return "\n".join([_latex(grid.headers, grid.rows, report.title), *comments])
    title, below = _one_line(report.title), [_one_line(line) for line in remarks(report)]
    if form == "markdown":
        title, below = f"**{_escape_markdown(title)}**", [f"- {_escape_markdown(line)}" for line in below]
    above = [title, ""] if report.title else []
    return "\n".join([*above, _grid(grid.headers, grid.rows, form), "", *below])


def render_all(reports: Sequence[Report], form: str = "table", digits: int = 1) -> str:
    """Return several reports as text: JSON as one list, the other formats one below the other."""
    texts = [render(report, form, digits) for report in reports]
    return "[" + ",\n".join(texts) + "]" if form == "json" else "\n\n".join(texts)


def render_curve(headers: Sequence[str], rows: Sequence[Sequence[Any]], form: str = "table", digits: int = 1) -> str:
    """Return a curve in one of the formats of `render`."""
    if form == "json":
        return to_json([dict(zip(headers, row, strict=True)) for row in rows], "--format json", indent=2)
    if form == "csv":
        return write_csv([headers, *rows])
    shown = [[_rounded(cell, digits) if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return _latex(headers, shown) if form == "latex" else _grid(headers, shown, form)


# ---------------------------------------------------------------------------------------------------- Headers and cells


@dataclass(frozen=True)
class Grid:
    """A table of text. `kinds` has the kind of each row: "measured", "difference" or "paper"."""

    headers: list[str]
    rows: list[list[str]]
    kinds: list[str]


def grid_of(report: Report, digits: int = 1) -> Grid:
    """Return the cells as shown: a row per trainer in blocks of datasets or, if wide, a column per dataset."""
    return _wide(report, digits) if report.wide else _long(report, digits)


def name_columns(headers: Sequence[str]) -> int:
    """Return how many columns at the left hold names, not numbers."""
    return sum(header in ("dataset", "trainer", "row", "method", "against", "column") for header in headers)


def _long(report: Report, digits: int) -> Grid:
    shown = [row for row in report.rows if not report.averages_only or row.dataset == AVERAGE]
    datasets = [row.dataset for row in shown]
    grid: dict[str, list[str]] = {}  # header -> column
    if not report.averages_only:  # a dataset's name is in its first row only
        grid["dataset"] = ["" if i and name == datasets[i - 1] else name for i, name in enumerate(datasets)]
    grid["row" if report.averages_only else "trainer"] = [row.label for row in shown]
    for column in report.columns:
        grid[column] = [cell(row.cells[column], digits) for row in shown]
        if any(row.paper for row in report.rows):
            printed = [row.paper.get(column) for row in shown]
            grid[f"{column} (paper)"] = ["" if number is None else f"{number:.2f}" for number in printed]
    for column in report.columns if report.reference else ():
        signed = [cell(row.differences.get(column), digits, sign=True) for row in shown]
        own = [row.label == report.reference for row in shown]
        grid[f"{column} - {_short(report)}"] = ["" if same else text for same, text in zip(own, signed, strict=True)]
    return Grid(list(grid), [list(row) for row in zip(*grid.values(), strict=True)], ["measured"] * len(shown))


def _wide(report: Report, digits: int) -> Grid:
    """Return Tables 2 to 5: below a trainer's accuracies, its differences to the reference and the paper's numbers."""
    column = report.columns[0]
    by_place = {(row.label, row.dataset): row for row in report.rows}
    places = list(dict.fromkeys(row.dataset for row in report.rows))
    headers = ["trainer", *(f"{name} (source)" if i == 0 else name for i, name in enumerate(places))]
    rows, kinds = [], []
    for label in report.labels:
        line: list[Row] = [by_place[label, place] for place in places]
        rows.append([label, *(cell(row.cells[column], digits) for row in line)])
        kinds.append("measured")
        if report.reference and label != report.reference:
            signed = [cell(row.differences.get(column), digits, sign=True) for row in line]
            rows.append([f"  - {report.reference}", *signed])
            kinds.append("difference")
        if any(row.paper for row in line):
            rows.append(["  paper", *(f"{row.paper[column]:.2f}" if row.paper else "" for row in line)])
            kinds.append("paper")
    return Grid(headers, rows, kinds)


def _short(report: Report) -> str:
    """Return a short name of the reference: a trainer's name, or the row of Table 6 or 7."""
    return f"row {report.reference[0]}" if report.number == 6 else report.reference.partition(" (")[0]


def cell(estimate: Estimate | None, digits: int, sign: bool = False) -> str:
    """Return a mean with its interval, and the number of its seeds if some are missing."""
    if estimate is None:
        return "missing"
    text = _rounded(estimate.mean, digits, "+" if sign else "")
    if estimate.half_width is not None:
        text += f" ± {estimate.half_width:.{digits}f}"
    if estimate.seeds < estimate.expected:
        text += f" ({estimate.seeds} of {estimate.expected} seeds)"
    return text


def _rounded(number: float, digits: int, sign: str = "") -> str:
    return f"{round(number, digits) + 0.0:{sign}.{digits}f}"  # no "-0.0"


def remarks(report: Report) -> list[str]:
    """Return the lines below a table: how its numbers were computed, missing runs, notes."""
    datasets = f"{len(report.datasets)} dataset{'s' * (len(report.datasets) != 1)}"
    lines = [f"{datasets}; {_seeds(report.seeds)}; percent; ± is the 95 % interval over seeds (Student's t)."]
    if len(report.seeds) < 2:
        lines.append("One seed: no intervals.")
    if "H" in report.columns:
        lines.append("H: harmonic mean of averaged base and new.")
    if report.wide:
        lines.append("average: over the targets, without the source.")
    if report.averages_only:
        lines.append(f"Averages over {', '.join(report.datasets)}.")
    if report.reference:
        lines.append(f"Differences to {report.reference} are paired by seed.")
    if any(row.paper for row in report.rows):
        lines.append("paper: the number the paper prints for this dataset, backbone and number of shots.")
    lines += [f"missing: {line}" for line in missing_lines(report.missing)]
    lines += [f"note: {line}" for line in report.notes]
    return lines


def missing_lines(missing: Sequence[Missing]) -> list[str]:
    """Return one line for all datasets on which a trainer lacks the same runs."""
    lacking: dict[str, dict[str, dict[str, list[int]]]] = {}  # label -> dataset -> classes -> seeds
    for one in missing:
        by_class = lacking.setdefault(one.label, {}).setdefault(one.dataset, {})
        by_class.setdefault(one.subsample, []).append(one.seed)
    lines = []
    for label, by_dataset in lacking.items():
        datasets: dict[str, list[str]] = {}  # missing runs, in words -> datasets
        for dataset, by_class in by_dataset.items():
            datasets.setdefault(_missing_in_words(by_class), []).append(dataset)
        lines += [f"{label}: {', '.join(names)}, {words}" for words, names in datasets.items()]
    return lines


def _missing_in_words(by_class: Mapping[str, Sequence[int]]) -> str:
    classes: dict[tuple[int, ...], list[str]] = {}
    for subsample, seeds in by_class.items():
        classes.setdefault(tuple(seeds), []).append(subsample)
    parts = (_seeds(s) if names == ["all"] else f"{' and '.join(names)}, {_seeds(s)}" for s, names in classes.items())
    return "; ".join(parts)


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}"


# -------------------------------------------------------------------------------------------------------------- Formats


def _grid(headers: Sequence[str], rows: Sequence[Sequence[Any]], form: str) -> str:
    lines = [[_one_line(cell) for cell in line] for line in (headers, *rows)]
    if form == "markdown":
        lines = [[_escape_markdown(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    padded.insert(1, ["-" * width for width in widths])
    if form == "markdown":
        return "\n".join(f"| {' | '.join(line)} |" for line in padded)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def _one_line(text: Any) -> str:
    """Return text with spaces for line breaks and control characters: a name ends no row, and moves no cursor."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", str(text)).rstrip()


def _escape_markdown(text: Any) -> str:
    """Return text that Markdown shows as it is: no HTML, links, code, emphasis or columns."""
    return html.escape(re.sub(r"([\\`*\[\]|])", r"\\\1", str(text).strip()), quote=False)


_TEXT = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater", "|": "bar"}
_LATEX = str.maketrans(
    {letter: f"\\{letter}" for letter in "&%$#_{}"}
    | {letter: rf"\text{name}{{}}" for letter, name in _TEXT.items()}
    | {"±": r"$\pm$", '"': "''", "[": "{[}", "*": "{*}"}  # the last two would be options behind a row's end
)


def escape_latex(text: str) -> str:
    """Return text escaped for LaTeX; spaces at its beginning become an indent."""
    indent = r"\quad " if text.startswith("  ") else ""
    return indent + _one_line(text).strip().translate(_LATEX)


def _latex(headers: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """Return a table environment, which needs the package booktabs."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(escape_latex(str(one)) for one in cells) + r" \\"

    names = name_columns(headers)
    columns = "l" * names + "r" * (len(headers) - names)
    body = []
    for i, row in enumerate(rows):
        starts_a_block = "dataset" in headers and i and row[0]
        body += ([r"\midrule"] if starts_a_block else []) + [line(row)]
    above = [r"\begin{table}", r"\centering", *([rf"\caption{{{escape_latex(caption)}}}"] if caption else [])]
    head = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(headers), r"\midrule"]
    return "\n".join([*above, *head, *body, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def _csv(report: Report) -> str:
    headers = ["table", "dataset", "trainer"]
    for column in report.columns:
        headers += [column, f"{column}_half_width", f"{column}_seeds"]
        headers += [f"{column}_difference", f"{column}_difference_half_width", f"{column}_paper"]
    rows: list[list[Any]] = [headers]
    for row in report.rows:
        line: list[Any] = [report.number or report.title, row.dataset, row.label]
        for column in report.columns:
            found, difference = row.cells[column], row.differences.get(column)
            line += [found.mean, found.half_width] if found else ["missing", None]
            line.append(f"{found.seeds}/{found.expected}" if found else f"0/{len(report.seeds)}")
            line += [difference.mean, difference.half_width] if difference else [None, None]
            line.append(row.paper.get(column))
        rows.append(line)
    return write_csv(rows)


def write_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as CSV; floats keep all their digits, and a spreadsheet takes no text for a formula."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[_csv_cell(cell) for cell in row] for row in rows])
    return text.getvalue().rstrip("\n")


def _csv_cell(value: Any) -> Any:
    """Return a cell; text that a spreadsheet would take for a formula gets an apostrophe, a number in text does not."""
    if not isinstance(value, str):
        return value
    text = _one_line(value)
    is_formula = text.lstrip()[:1] in tuple("=+-@") and not re.fullmatch(r"\s*[+-]?[\d.]+([eE][+-]?\d+)?\s*", text)
    return f"'{text}" if is_formula else text
