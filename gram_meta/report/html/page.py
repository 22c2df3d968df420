"""One HTML page with tables, figures and the settings of every run: a single file that loads nothing from outside."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from gram_meta.report.evidence import Evidence, MetaTraining, block_hash, without_own
from gram_meta.report.figures import Drawing
from gram_meta.report.html.base import render
from gram_meta.report.runs import Run
from gram_meta.report.tables import AVERAGE, Report
from gram_meta.report.text import Grid, grid_of, name_columns, remarks


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
    titles = [report.title or "Runs" for report in reports]
    return render(
        "page.html",
        title="Gradient-Regulated Meta-Prompt Learning: report",
        style="page.css",
        contents={
            "tables": list(zip(anchors, titles, strict=True)),
            "figures": [(drawing.stem, drawing.title) for drawing in drawings],
        },
        missing_runs=sum(len(report.missing) for report in reports),
        tables=[
            {"anchor": anchor, "title": title, "remarks": remarks(report), **_table(grid_of(report, digits))}
            for anchor, title, report in zip(anchors, titles, reports, strict=True)
        ],
        drawings=drawings,
        not_drawn=not_drawn,
        metas=_metas(runs, evidence),
        runs=runs,
        seconds=sum(sum((run.result.get("seconds") or {}).values()) for run in runs),
        config_hash=_config_hash,
        meta_hash=_meta_hash,
        versions_hash=_versions_hash,
        configs=[(key, group, _yaml(_own_config(group[0]))) for key, group in _grouped(runs, _config_hash).items()],
        splits=[group[0] for group in _grouped(runs, lambda run: run.few_shot).values()],
        versions=_grouped(runs, _versions_hash),
    )


# --------------------------------------------------------------------------------------------------------------- Tables


def _table(grid: Grid) -> dict[str, Any]:
    rows = [_table_row(grid, i) for i in range(len(grid.rows))]
    return {"headers": grid.headers, "names": name_columns(grid.headers), "rows": rows}


def _table_row(grid: Grid, place: int) -> dict[str, Any]:
    row, in_blocks, names = grid.rows[place], grid.headers[0] == "dataset", name_columns(grid.headers)
    dataset = next((grid.rows[i][0] for i in range(place, -1, -1) if grid.rows[i][0]), "")
    classes = {
        "sub": grid.kinds[place] != "measured",
        "block": in_blocks and row[0] and place,
        "average": in_blocks and dataset == AVERAGE,
    }
    cells = [{"kind": "words", "text": text, "below": ""} for text in row[: names - 1]]
    cells.append({"kind": "head", "text": row[names - 1].strip()})
    for header, text in zip(grid.headers[names:], row[names:], strict=True):
        paper = "(paper)" in header or grid.kinds[place] == "paper"
        cells.append(_number(text) | {"kind": "paper" if paper else "gone" if text == "missing" else ""})
    return {"css": " ".join(name for name, holds in classes.items() if holds), "cells": cells}


def _number(text: str) -> dict[str, str]:
    """Return a cell with a true minus sign, and "2 of 3 seeds" as a line below the number."""
    value, _, seeds = text.partition(" (")
    value = "\N{MINUS SIGN}" + value[1:] if value.startswith("-") else value
    return {"text": value, "below": seeds.removesuffix(")")}


# ----------------------------------------------------------------------------------------------------- Meta-checkpoints


def _metas(runs: Sequence[Run], evidence: Evidence) -> list[dict[str, Any]]:
    """Return every meta-checkpoint that a run used or that left a log."""
    used = _grouped(runs, _meta_hash)
    logged = {meta.sha256 or meta.path: meta for meta in evidence.metas}
    return [_meta(key, used.get(key, []), logged.get(key)) for key in dict.fromkeys([*used, *logged])]


def _meta(key: str, runs: Sequence[Run], meta: MetaTraining | None) -> dict[str, Any]:
    """Return what is known of one meta-checkpoint: from the runs that used it, and from its meta-training's log."""
    recorded = runs[0].result["meta_checkpoint"] if runs else {}
    settings = recorded.get("settings") or {}
    path = meta.path if meta else str(recorded.get("path", ""))
    facts: list[tuple[str, Any]] = [("SHA-256", key), ("file", path)]
    if runs:
        trainers = ", ".join(dict.fromkeys(run.trainer for run in runs))
        facts.append(("used by", f"{len(runs)} runs of {trainers}"))
    facts += sorted(settings.items())
    if meta:
        facts += [(it, meta.facts[it]) for it in ("version", "topics", "store", "hierarchy") if it in meta.facts]
    tokens = [settings.get(f"PROMPT.{kind}_TOKENS") for kind in ("TEXT", "VISUAL")]
    return {
        "key": key,
        "name": Path(path).parent.name or key[:12],
        "without": ", ".join(word.removeprefix("no ") for word in runs[0].ablation) if runs else "",
        "numbers": ["" if None in tokens else f"{tokens[0]} + {tokens[1]}", len(runs)],
        "facts": facts,
        "config": _yaml(meta.facts.get("config", {})) if meta else None,
    }


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
