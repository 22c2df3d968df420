"""One HTML page with tables, figures and the settings of every run: a single file that loads nothing from outside."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from gram_meta.config import flatten
from gram_meta.images import BadImage, read_image
from gram_meta.report.evidence import Evidence, MetaTraining, block_hash, without_own
from gram_meta.report.figures import Drawing
from gram_meta.report.html.base import render
from gram_meta.report.html.hierarchy import thumbnail
from gram_meta.report.predictions import Predictions, read_predictions
from gram_meta.report.runs import Run
from gram_meta.report.tables import AVERAGE, Report
from gram_meta.report.text import grid_of, name_columns, remarks

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
    numbers = [report.number for report in reports]
    anchors = [f"table-{n}" if n and numbers.index(n) == i else f"other-{i}" for i, n in enumerate(numbers)]
    tests = [read_predictions(run.path.parent, run.result.get("classnames") or []) for run in runs[:DETAILED]]
    recorded = max(1, sum(test is not None for test in tests))
    return render(
        "page.html",
        title="Gradient-Regulated Meta-Prompt Learning: report",
        style="page.css",
        script="page.js",
        tables=[(anchor, report, grid_of(report, digits)) for anchor, report in zip(anchors, reports, strict=True)],
        remarks_of=remarks,
        name_columns=name_columns,
        average=AVERAGE,
        drawings=drawings,
        not_drawn=not_drawn,
        metas=_metas(runs, evidence),
        runs=runs,
        places={run.path: place for place, run in enumerate(runs)},
        trained_path=evidence.trained_path,
        details=[(run, test, _wrong(run, test, IMAGES // recorded)) for run, test in zip(runs, tests, strict=False)],
        listed=ROWS // recorded,
        cells=CELLS // recorded,
        seconds=sum(sum((run.result.get("seconds") or {}).values()) for run in runs),
        config_hash=_config_hash,
        meta_hash=_meta_hash,
        versions_hash=_versions_hash,
        configs=[(key, group, _own_config(group[0])) for key, group in _grouped(runs, _config_hash).items()],
        splits=[group[0] for group in _grouped(runs, lambda run: run.few_shot).values()],
        versions=_grouped(runs, _versions_hash),
        yaml=_yaml,
    )


def _metas(runs: Sequence[Run], evidence: Evidence) -> list[tuple[str, Sequence[Run], MetaTraining | None]]:
    """Return every meta-checkpoint that a run used or that left a log: its hash, its runs, its meta-training."""
    used = _grouped(runs, _meta_hash)
    logged = {meta.sha256 or meta.path: meta for meta in evidence.metas}
    return [(key, used.get(key, []), logged.get(key)) for key in dict.fromkeys([*used, *logged])]


def _wrong(run: Run, test: Predictions | None, room: int) -> list[dict[str, Any]]:
    """Return images that a run gets wrong, small, the most confident first, as many as `room` bytes hold."""
    root, shown = flatten(run.result.get("config", {})).get("DATASET.ROOT", ""), []
    for image, label, prediction, confidence in test.wrong[:WRONG] if test else ():
        facts = {"image": image, "label": label, "prediction": prediction, "confidence": confidence}
        try:
            facts |= zip(("width", "height", "src"), thumbnail(read_image(Path(root, image))[0]), strict=True)
        except BadImage as error:
            facts |= {"src": "", "reason": str(error)}
        room -= len(facts["src"]) + IMAGE_HTML
        if room < 0:
            break
        shown.append(facts)
    return shown


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


def _yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, allow_unicode=True, width=100)
