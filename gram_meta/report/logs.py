"""Runs of CoOp-style checkouts as results: all that is left of them is a log.txt.

The log's arguments and config say what was run. Dassl prints percentages with one decimal, and the counts behind the
accuracy: so accuracy and error rate are exact, and the other metrics rounded. What a log does not say is left empty: the
few-shot images, versions, seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gram_meta.runs.coop_log import Log, is_rounded, read_log
from gram_meta.runs.layout import LOG, RESULTS


def find_logs(folder: Path) -> tuple[dict[Path, dict[str, Any]], list[Path]]:
    """Results by path of every log.txt in or below a folder without a results.json beside it, and logs without a result."""
    told: dict[Path, dict[str, Any]] = {}
    silent = []
    for path in sorted({it.with_name(LOG) for it in folder.rglob(f"{LOG}*") if _is_log(it)}):
        if (path.parent / RESULTS).is_file():
            continue
        logs = _logs_in(path.parent)
        if logs and (found := _result(logs)):
            told[path.resolve()] = found
        elif logs:
            silent.append(path)
    return told, silent


def result_of_log(path: Path) -> dict[str, Any] | None:
    """What stands for the results.json of the run whose log.txt this is; None for an unfinished one, or another file."""
    return _result(_logs_in(path.parent))


def _is_log(path: Path) -> bool:
    """log.txt, or log.txt-<date>: Dassl leaves the older log of a folder as it is."""
    return path.is_file() and (path.name == LOG or path.name.startswith(f"{LOG}-"))


def _logs_in(folder: Path) -> list[Log]:
    """The logs of one folder, oldest first, as their names say."""
    paths = sorted(it for it in folder.glob(f"{LOG}*") if _is_log(it))
    return [log for path in paths if (log := read_log(path)) and _named(log)]


def _named(log: Log) -> bool:
    """Whether the config says at least what was run on what."""
    return bool(log.options.get("TRAINER.NAME") and log.options.get("DATASET.NAME"))


def _result(logs: list[Log]) -> dict[str, Any] | None:
    """The last log with a result, as a result; a run that was interrupted has gone on in the next one."""
    ended = [log for log in logs if log.final]
    if not ended:
        return None
    log = ended[-1]
    final, options = log.final, log.options
    assert final is not None  # by the choice above
    return {
        "format": 1,
        "trainer": str(options["TRAINER.NAME"]),
        "dataset": str(options["DATASET.NAME"]),
        "subsample": str(options.get("DATASET.SUBSAMPLE_CLASSES") or "all"),
        "shots": int(options.get("DATASET.NUM_SHOTS") or -1),
        "seed": int(options.get("SEED") or 0),
        "backbone": str(options.get("MODEL.BACKBONE.NAME") or ""),
        "split": final.split,
        "eval_only": log.eval_only,
        "model_dir": str(log.arguments.get("model_dir") or "") if log.eval_only else "",
        "epoch": log.epoch,
        "metrics": final.metrics,
        "curve": [],
        "meta_checkpoint": {"path": "", "sha256": "", "settings": {}},
        "few_shot": {"path": "", "sha256": ""},
        "config": log.config,
        "log": {"file": log.path.name, "rounded": is_rounded(final.metrics)},
    }
