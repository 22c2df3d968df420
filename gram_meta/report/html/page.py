"""One HTML page with tables, figures and the settings of every run: a single file that loads nothing from outside."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gram_meta.config import flatten
from gram_meta.errors import GramError, in_one_line
from gram_meta.files import read_arrays
from gram_meta.images import BadImage, read_image
from gram_meta.report.evidence import Evidence, block_hash, without_own
from gram_meta.report.figures import Drawing
from gram_meta.report.html.base import render
from gram_meta.report.html.hierarchy import thumbnail
from gram_meta.report.runs import Run
from gram_meta.report.tables import AVERAGE, Report
from gram_meta.report.text import grid_of, name_columns, remarks
from gram_meta.runs.layout import PREDICTIONS

# What bounds the page to 10 MB
DETAILED = 300  # runs with details
WRONG = 24  # images that a run gets wrong
IMAGES = 3_500_000  # bytes of these images, of all runs, as the next two
IMAGE_HTML = 500  # bytes around an image
ROWS = 12_000  # classes in tables
CELLS = 60_000  # of confusion matrices


def page(
    reports: Sequence[Report],
    drawings: Sequence[Drawing],
    not_drawn: Sequence[str],
    runs: Sequence[Run],
    evidence: Evidence,
    digits: int = 1,
) -> str:
    """Return the page's HTML, with the reason for each figure that is `not_drawn`, and numbers of so many `digits`."""
    runs = sorted(runs, key=lambda run: (run.label, run.dataset, run.subsample, run.seed))
    recorded = max(1, sum(run.path.with_name(PREDICTIONS).is_file() for run in runs[:DETAILED]))
    return render(
        "page.html",
        title="Gradient-Regulated Meta-Prompt Learning: report",
        style="page.css",
        script="page.js",
        tables=[(report, grid_of(report, digits)) for report in reports],
        remarks_of=remarks,
        name_columns=name_columns,
        average=AVERAGE,
        drawings=drawings,
        not_drawn=not_drawn,
        used=_grouped(runs, _meta_hash),
        logged={meta.sha256 or meta.path: meta for meta in evidence.metas},
        runs=runs,
        places={run.path: place for place, run in enumerate(runs)},
        trained_path=evidence.trained_path,
        detailed=runs[:DETAILED],
        read_predictions=read_predictions,
        pictures=lambda run, wrong: _pictures(run, wrong, IMAGES // recorded),
        listed=ROWS // recorded,
        cells=CELLS // recorded,
        seconds=sum(sum((run.result.get("seconds") or {}).values()) for run in runs),
        config_hash=_config_hash,
        meta_hash=_meta_hash,
        versions_hash=_versions_hash,
        configs=_grouped(runs, _config_hash),
        own_config=_own_config,
        splits=[group[0] for group in _grouped(runs, lambda run: run.few_shot).values()],
        versions=_grouped(runs, _versions_hash),
    )


def read_predictions(run: Run) -> tuple[np.ndarray, list[dict[str, Any]]] | None:
    """Read predictions.npz of a run on K classes; raise `GramError` for a damaged one.

    Returns:
        The confusion matrix (K, K), numbers of images: row = label, column = prediction; and image, label, prediction
        and confidence of the `WRONG` wrong predictions with the highest confidence. None without the file.
    """
    path, classes = run.path.with_name(PREDICTIONS), len(run.result.get("classnames") or ())
    if not path.is_file():
        return None
    arrays, confusion = read_arrays(path), np.zeros((classes, classes), np.int64)
    try:
        columns = [arrays[name] for name in ("image", "label", "prediction", "confidence")]
        np.add.at(confusion, (columns[1], columns[2]), 1)
        wrong = np.flatnonzero(columns[1] != columns[2])
        wrong = wrong[np.argsort(-columns[3][wrong], kind="stable")][:WRONG]
        rows = zip(*(column[wrong].tolist() for column in columns), strict=True)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        found = in_one_line(error)
        raise GramError(f"{path}: expected predictions of {classes} classes, found another file ({found})") from None
    return confusion, [dict(zip(("image", "label", "prediction", "confidence"), row, strict=True)) for row in rows]


def _pictures(run: Run, wrong: Sequence[dict[str, Any]], room: int) -> list[dict[str, Any]]:
    """Return small images of wrong predictions, as many as `room` bytes hold, or why an image cannot be read."""
    root, shown = flatten(run.result.get("config", {})).get("DATASET.ROOT", ""), []
    for facts in wrong:
        try:
            facts |= zip(("width", "height", "src"), thumbnail(read_image(Path(root, facts["image"]))[0]), strict=True)
        except BadImage as error:
            facts |= {"src": "", "reason": str(error)}
        room -= len(facts["src"]) + IMAGE_HTML
        if room < 0:  # the other images need not be read
            break
        shown.append(facts)
    return shown


# ------------------------------------------------------------------------- Hashes, by which runs are grouped and linked


def _meta_hash(run: Run) -> str:
    return (run.result.get("meta_checkpoint") or {}).get("sha256", "")


def _versions_hash(run: Run) -> str:
    return block_hash(run.result["versions"]) if run.result.get("versions") else ""


def _own_config(run: Run) -> dict[str, Any]:
    return without_own(run.result.get("config") or {})


def _config_hash(run: Run) -> str:
    """Return the hash of a run's config without what differs from run to run (seed, dataset, shots, folders)."""
    return block_hash(_own_config(run))


def _grouped(runs: Sequence[Run], key_of: Callable[[Run], str]) -> dict[str, list[Run]]:
    """Return runs by key, in order, without the runs whose key is ""."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(key_of(run), []).append(run)
    groups.pop("", None)
    return groups
