"""Read runs of CoOp-style checkouts, which leave a log.txt and no results.json.

The log has the arguments and the config. Dassl prints percentages with one decimal, and the counts of the accuracy:
accuracy and error rate are therefore exact, and the other metrics rounded. Facts that a log lacks stay empty: few-shot
images, versions, seconds.
"""

from pathlib import Path
from typing import Any

from gram_meta.runs.coop_log import Log, is_rounded, read_log
from gram_meta.runs.layout import LOG, RESULTS
from gram_meta.runs.schemas import check_results


def find_logs(folder: Path) -> tuple[dict[Path, dict[str, Any]], list[Path]]:
    """Return the results of every log.txt in or below `folder` without a results.json, and unfinished logs."""
    results: dict[Path, dict[str, Any]] = {}
    unfinished = []
    for path in sorted({it.with_name(LOG) for it in folder.rglob(f"{LOG}*") if _is_log(it)}):
        if (path.parent / RESULTS).is_file():
            continue
        logs = _logs_in(path.parent)
        if logs and (found := _result(logs)):
            results[path.resolve()] = found
        elif logs:
            unfinished.append(path)
    return results, unfinished


def result_of_log(path: Path) -> dict[str, Any] | None:
    """Return the result of the run with this log.txt; None if it is unfinished, or another kind of file."""
    return _result(_logs_in(path.parent))


def _is_log(path: Path) -> bool:
    """Return whether a file is log.txt or log.txt-<date>, which Dassl writes beside an older log."""
    return path.is_file() and (path.name == LOG or path.name.startswith(f"{LOG}-"))


def _logs_in(folder: Path) -> list[Log]:
    """Return the logs of one folder, oldest first by their names."""
    paths = sorted(it for it in folder.glob(f"{LOG}*") if _is_log(it))
    logs = [log for path in paths if (log := read_log(path))]
    return [log for log in logs if log.options.get("TRAINER.NAME") and log.options.get("DATASET.NAME")]


def _result(logs: list[Log]) -> dict[str, Any] | None:
    """Return the result of the last log that has one; an interrupted run continues in the next log."""
    ended = [log for log in logs if log.final]
    if not ended:
        return None
    log = ended[-1]
    final, options = log.final, log.options
    assert final is not None  # by the choice above
    result: dict[str, Any] = {
        "format": 1,
        "trainer": str(options["TRAINER.NAME"]),
        "dataset": str(options["DATASET.NAME"]),
        "subsample": str(options.get("DATASET.SUBSAMPLE_CLASSES") or "all"),
        "shots": options.get("DATASET.NUM_SHOTS") or -1,
        "seed": options.get("SEED") or 0,
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
    return check_results(result, str(log.path))
