"""One HTML page with tables, figures and the settings of every run: a single file that loads nothing from outside."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gram_meta.config import flatten
from gram_meta.images import BadImage, read_image
from gram_meta.report.evidence import Evidence, MetaTraining, block_hash, without_own
from gram_meta.report.figures import Drawing
from gram_meta.report.html.base import render
from gram_meta.report.html.hierarchy import thumbnail
from gram_meta.report.predictions import read_predictions
from gram_meta.report.runs import Run
from gram_meta.report.tables import AVERAGE, Report
from gram_meta.report.text import grid_of, name_columns, remarks
from gram_meta.runs.layout import PREDICTIONS

# What bounds the page to 10 MB
DETAILED = 400  # runs with details
WRONG = 24  # images that a run gets wrong
IMAGES = 5_000_000  # bytes of these images, of all runs, as the next two
IMAGE_HTML = 500  # bytes around an image
ROWS = 20_000  # classes in tables
CELLS = 80_000  # of confusion matrices


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
        metas=_metas(runs, evidence),
        runs=runs,
        places={run.path: place for place, run in enumerate(runs)},
        trained_path=evidence.trained_path,
        detailed=runs[:DETAILED],
        test_of=lambda run: _test(run, IMAGES // recorded),
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


def _metas(runs: Sequence[Run], evidence: Evidence) -> list[tuple[str, Sequence[Run], MetaTraining | None]]:
    """Return every meta-checkpoint that a run used or that left a log: its hash, its runs, its meta-training."""
    used = _grouped(runs, _meta_hash)
    logged = {meta.sha256 or meta.path: meta for meta in evidence.metas}
    return [(key, used.get(key, []), logged.get(key)) for key in dict.fromkeys([*used, *logged])]


def _test(run: Run, room: int) -> tuple[np.ndarray, list[dict[str, Any]]] | None:
    """Return a run's confusion matrix, and images that it gets wrong, small, as many as `room` bytes hold."""
    found = read_predictions(run.path.parent, len(run.result.get("classnames") or ()), WRONG)
    if found is None:
        return None
    root, shown = flatten(run.result.get("config", {})).get("DATASET.ROOT", ""), []
    for facts in found[1]:
        try:
            size_and_src = thumbnail(read_image(Path(root, facts["image"]))[0])
        except BadImage as error:
            size_and_src, facts["reason"] = (0, 0, ""), str(error)
        room -= len(size_and_src[-1]) + IMAGE_HTML
        if room >= 0:
            shown.append(facts | dict(zip(("width", "height", "src"), size_and_src, strict=True)))
    return found[0], shown


# ------------------------------------------------------------------------- Hashes, by which runs are grouped and linked


def _meta_hash(run: Run) -> str:
    return (run.result.get("meta_checkpoint") or {}).get("sha256", "")


def _versions_hash(run: Run) -> str:
    versions = run.result.get("versions")
    return block_hash(versions) if versions else ""


def _own_config(run: Run) -> dict[str, Any]:
    return without_own(run.result.get("config") or {})


def _config_hash(run: Run) -> str:
    """Return the hash of a run's config without what differs from run to run (seed, dataset, shots, folders)."""
    return block_hash(_own_config(run))


def _grouped(runs: Sequence[Run], key_of: Callable[[Run], str]) -> dict[str, list[Run]]:
    """Return runs by key, in order, without the runs whose key is ""."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[key_of(run)].append(run)
    return {key: group for key, group in groups.items() if key}
