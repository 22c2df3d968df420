"""Runs as a tidy table: a row for each run and metric, as CSV or Parquet."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gram_meta.errors import GramError
from gram_meta.files import atomic_write
from gram_meta.report.runs import Run
from gram_meta.report.text import write_csv

COUNTS = ("total", "correct")  # of the test images: columns of their own


def tidy_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a row for each run and each of its metrics; percentages are unrounded."""
    return [
        {
            "method": run.label,
            "trainer": run.trainer,
            "dataset": run.dataset,
            "classes": run.subsample,
            "trained_on": "" if run.untrained else run.source,
            "shots": None if run.untrained else run.shots,
            "seed": run.seed,
            "epochs": None if run.untrained else run.epochs,
            "backbone": run.backbone,
            "split": run.split,
            "metric": metric,
            "value": float(value),
            "test_images": run.result["metrics"].get("total"),
            "meta_checkpoint": (run.result.get("meta_checkpoint") or {}).get("sha256") or "",
            "few_shot": run.few_shot,
            "train_seconds": (run.result.get("seconds") or {}).get("train"),
            "folder": os.fsencode(run.path.parent).decode("utf-8", "backslashreplace"),
        }
        for run in runs
        for metric, value in run.result["metrics"].items()
        if metric not in COUNTS
    ]


def write_tidy(runs: Sequence[Run], path: str | Path) -> int:
    """Write `tidy_rows` to a .csv or .parquet file, atomically; return the number of rows."""
    rows, kind = tidy_rows(runs), Path(path).suffix
    if kind not in (".csv", ".parquet"):
        raise GramError(f"--tidy {path}: expected a file that ends in .csv or .parquet, found {kind or 'neither'}")
    with atomic_write(path) as file:
        if kind == ".csv":
            file.write((write_csv([list(rows[0]), *(list(row.values()) for row in rows)]) + "\n").encode())
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(rows), file)
    return len(rows)
