"""The paper's numbers (Tables 1 to 7), and where they may be shown beside measured ones.

`paper.json` was transcribed from the paper. Trainers and datasets have the names they are registered under; its key
"names" gives the paper's. Accuracies are percent, as printed.
"""

import json
from collections.abc import Collection, Mapping
from importlib import resources
from typing import Any

COLUMNS = ("base", "new", "H")
_PAPER = json.loads(resources.files("gram_meta.report").joinpath("paper.json").read_text(encoding="utf-8"))
BACKBONE: str = _PAPER["backbone"]  # the only one
TRAINERS: Mapping[str, str] = _PAPER["trainers"]  # registered name -> the paper's, in the order of its rows
DATASETS: tuple[str, ...] = tuple(_PAPER["tables"]["1"]["datasets"])  # the eleven of Table 1, in its order


def table(number: int) -> Mapping[str, Any]:
    """Return one table of `paper.json`."""
    return _PAPER["tables"][str(number)]


def name(dataset: str) -> str:
    """Return the paper's name of a dataset or a trainer; a name that the paper does not have is returned unchanged."""
    return _PAPER["names"].get(dataset) or TRAINERS.get(dataset, dataset)


def base_to_new(members: Collection[str], trainer: str) -> dict[str, float]:
    """Return base, new and H of Table 1: of one dataset, or of the average if `members` are exactly its eleven."""
    found = table(1)
    if set(members) == set(found["datasets"]) and len(members) > 1:
        values = found["average"].get(trainer)
    elif len(members) == 1:
        values = found["datasets"].get(next(iter(members)), {}).get(trainer)
    else:
        values = None
    return dict(zip(COLUMNS, values, strict=True)) if values else {}


def transfer(number: int, source: str, targets: Collection[str], trainer: str) -> dict[str, float]:
    """Return a trainer's accuracies by dataset in Table 2 to 5, with "average" if `targets` are exactly the table's."""
    found = table(number)
    row = found["rows"].get(trainer)
    if source != found["source"] or not row:
        return {}
    values = {source: row["source"], **dict(zip(found["targets"], row["targets"], strict=True))}
    if set(targets) == set(found["targets"]):
        values["average"] = row["average"]
    return values


def ablation(row: int) -> dict[str, float]:
    """Return base, new and H of row 0 to 5 of Table 6."""
    return dict(zip(COLUMNS, table(6)["rows"][row]["values"], strict=True))


def tokens(total: int) -> dict[str, float]:
    """Return base, new and H of UNIGRAM with `total` prompt tokens in Table 7; {} for other totals."""
    for row in table(7)["rows"]:
        if row["tokens"] == total:
            return dict(zip(COLUMNS, row["values"], strict=True))
    return {}
