"""One HTML page with tables, figures and what every run was made with: a single file that needs nothing from outside."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from gram_meta import __version__
from gram_meta.files import atomic_write
from gram_meta.report.evidence import Evidence, MetaTraining, without_own
from gram_meta.report.figures import Drawing
from gram_meta.report.runs import Run
from gram_meta.report.tables import Report
from gram_meta.report.text import Grid, grid_of, missing_lines, remarks

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1b1b1b; --faint: #5c5c5c; --line: #d4d4d4; --band: #f4f5f7;
  --accent: #0b5cad; --gone: #a02c00; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181c; --ink: #e6e6e6; --faint: #a3a7ad; --line: #3a3e45;
  --band: #20242a; --accent: #7fb8f0; --gone: #ff9c73; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 3vw, 3rem) 4rem; max-width: 90rem; background: var(--ground);
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .8rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p, ul { max-width: 75ch; }
a { color: var(--accent); }
nav { margin-top: 1.2rem; padding: .4rem 1rem; background: var(--band); border-radius: 6px; }
nav ul { padding-left: 1.2rem; margin: .3rem 0; max-width: none; }
nav > ul > li > ul { columns: 26rem; column-gap: 2.5rem; }
nav li { break-inside: avoid; margin-bottom: .1rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
.tall { max-height: 34rem; overflow-y: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; width: max-content; min-width: 100%; }
caption { text-align: left; font-weight: 600; padding: .6rem .7rem; }
th, td { padding: .28rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { background: var(--band); position: sticky; top: 0; font-weight: 600; }
tbody th, .words { text-align: left; font-weight: 400; }
thead th.words { font-weight: 600; }
tbody tr:last-child > * { border-bottom: 0; }
tr.block > * { border-top: 2px solid var(--line); }
tr.average > * { background: var(--band); }
tr.sub > * { color: var(--faint); font-size: .8125rem; border-bottom-style: dotted; }
tr.sub > th { padding-left: 1.7rem; }
td small { display: block; color: var(--gone); line-height: 1.1; }
td.paper { color: var(--accent); }
td.gone { color: var(--gone); font-weight: 400; }
.remarks { color: var(--faint); font-size: .875rem; margin: .5rem 0 0; padding-left: 1.2rem; }
.remarks .gone { color: var(--gone); }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0; }
.facts dt { color: var(--faint); } .facts dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1rem 0 2rem; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; padding: .4rem; }
figcaption { max-width: 75ch; font-size: .9rem; color: var(--faint); margin-top: .5rem; }
details { margin: .4rem 0; } details > dl { margin: .4rem 0 .8rem 1.2rem; } summary { cursor: pointer; }
pre { overflow: auto; max-height: 30rem; background: var(--band); padding: .8rem; border-radius: 6px; font-size: .8rem;
  line-height: 1.4; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .92em; }
footer { margin-top: 3rem; color: var(--faint); font-size: .875rem; }
""".strip()


def write_page(
    path: str | Path,
    reports: Sequence[Report],
    drawings: Sequence[Drawing],
    lacking: Sequence[str],
    runs: Sequence[Run],
    evidence: Evidence,
    digits: int = 1,
) -> None:
    """Write the page; see `page`."""
    with atomic_write(path, "w") as file:
        file.write(page(reports, drawings, lacking, runs, evidence, digits))


def page(
    reports: Sequence[Report],
    drawings: Sequence[Drawing],
    lacking: Sequence[str],
    runs: Sequence[Run],
    evidence: Evidence,
    digits: int = 1,
) -> str:
    """The page's HTML.

    Args:
        reports: the tables.
        drawings: the figures; `lacking` says of each that could not be drawn why.
        runs: whose manifests are listed.
        evidence: where they come from; its meta-trainings are listed.
    """
    anchors = _anchors(reports)
    sections = [
        ("tables", "Tables", "".join(_table(*it, digits) for it in zip(reports, anchors, strict=True))),
        ("figures", "Figures", _figures(drawings, lacking)),
        ("missing", "Missing runs", _missing(reports)),
        ("meta", "Meta-checkpoints", _metas(runs, evidence)),
        ("runs", "Runs", _manifests(runs)),
        ("configs", "Configs", _configs(runs)),
        ("splits", "Few-shot splits", _splits(runs)),
        ("versions", "Versions", _versions(runs)),
    ]
    inner = {
        "tables": [(anchor, it.title or "Runs") for it, anchor in zip(reports, anchors, strict=True)],
        "figures": [(drawing.stem, drawing.title) for drawing in drawings],
    }
    body = "".join(f'<section id="{key}"><h2>{_(title)}</h2>{content}</section>\n' for key, title, content in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Gradient-Regulated Meta-Prompt Learning: report</title>
<style>
{STYLE}
</style>
</head>
<body>
<header>
<h1>Gradient-Regulated Meta-Prompt Learning: report</h1>
{_summary(reports, runs)}
</header>
{_contents(sections, inner)}
<main>
{body}</main>
<footer>
<p>Made by <code>gram report</code> of gram-meta {_(__version__)}, an independent implementation of GRAM (ICCV 2023), not the
authors' code. Accuracies are percent; ± is the 95 % interval over seeds (Student's t); differences are paired by seed. The
paper's numbers stand only where dataset, backbone and number of shots are the paper's.</p>
</footer>
</body>
</html>
"""


def _(value: Any) -> str:
    """Text that the page cannot mistake for markup."""
    return escape(str(value), quote=True)


# ----------------------------------------------------------------------------------------------------------------------
# Head


def _summary(reports: Sequence[Report], runs: Sequence[Run]) -> str:
    missing = sum(len(report.missing) for report in reports)
    seconds = sum(sum((run.result.get("seconds") or {}).values()) for run in runs)
    facts = [
        ("runs", f"{len(runs)}, {seconds / 3600:.2f} hours of training and testing"),
        ("backbones", ", ".join(sorted({run.backbone for run in runs}))),
        ("trainers", ", ".join(dict.fromkeys(sorted(run.trainer for run in runs)))),
        ("datasets", ", ".join(sorted({run.dataset for run in runs}))),
        ("seeds", ", ".join(map(str, sorted({run.seed for run in runs})))),
        ("missing runs", f'<a href="#missing">{missing}</a>' if missing else "none"),
    ]
    rows = "".join(f"<dt>{_(name)}</dt><dd>{value if '<a' in value else _(value)}</dd>" for name, value in facts)
    return f'<dl class="facts">{rows}</dl>'


def _contents(sections: Iterable[tuple[str, str, str]], inner: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    items = []
    for key, title, _content in sections:
        below = "".join(f'<li><a href="#{_(anchor)}">{_(name)}</a></li>' for anchor, name in inner.get(key, ()))
        items.append(f'<li><a href="#{key}">{_(title)}</a>{f"<ul>{below}</ul>" if below else ""}</li>')
    return f'<nav aria-label="Contents"><ul>{"".join(items)}</ul></nav>'


def _anchors(reports: Sequence[Report]) -> list[str]:
    anchors: list[str] = []
    for i, report in enumerate(reports):
        anchor = f"table-{report.number}" if report.number else f"other-{i}"
        anchors.append(anchor if anchor not in anchors else f"{anchor}-{i}")
    return anchors


# ----------------------------------------------------------------------------------------------------------------------
# Tables and figures


def _table(report: Report, anchor: str, digits: int) -> str:
    grid = grid_of(report, digits)
    names = sum(header in ("dataset", "trainer", "row") for header in grid.headers)
    head = "".join(
        f'<th scope="col"{_class("words" if i < names else "")}>{_(header)}</th>'
        for i, header in enumerate(grid.headers)
    )
    rows = "".join(_table_row(grid, i, names) for i in range(len(grid.rows)))
    said = "".join(
        f"<li{_class('gone' if line.startswith('missing') else '')}>{_(line)}</li>" for line in remarks(report)
    )
    return (
        f'<article id="{anchor}"><h3>{_(report.title or "Runs")}</h3><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        f'<ul class="remarks">{said}</ul></article>\n'
    )


def _table_row(grid: Grid, place: int, names: int) -> str:
    row, kind = grid.rows[place], grid.kinds[place]
    in_blocks = grid.headers[0] == "dataset"
    classes = []
    if kind != "measured":
        classes.append("sub")
    if in_blocks and row[0] and place:
        classes.append("block")
    if in_blocks and _block_of(grid, place) == "average":
        classes.append("average")
    cells = []
    for i, (header, text) in enumerate(zip(grid.headers, row, strict=True)):
        if i < names:
            cells.append(
                f'<th scope="row">{_(text.strip())}</th>' if i == names - 1 else f'<td class="words">{_(text)}</td>'
            )
        else:
            marked = "paper" if "(paper)" in header or kind == "paper" else "gone" if text == "missing" else ""
            cells.append(f"<td{_class(marked)}>{_number(text)}</td>")
    return f"<tr{_class(' '.join(classes))}>{''.join(cells)}</tr>"


def _number(text: str) -> str:
    """A cell with a typographer's minus; "(2 of 3 seeds)" goes below, where it widens no column."""
    value, bracket, seeds = text.partition(" (")
    value = "\N{MINUS SIGN}" + value[1:] if value.startswith("-") else value
    return _(value) + (f"<small>{_(seeds.rstrip(')'))}</small>" if bracket else "")


def _block_of(grid: Grid, place: int) -> str:
    return next((grid.rows[i][0] for i in range(place, -1, -1) if grid.rows[i][0]), "")


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _figures(drawings: Sequence[Drawing], lacking: Sequence[str]) -> str:
    parts = []
    for drawing in drawings:
        data = base64.b64encode(drawing.png).decode("ascii")
        parts.append(
            f'<article id="{_(drawing.stem)}"><h3>{_(drawing.title)}</h3><figure>'
            f'<img alt="{_(drawing.title)}. {_(drawing.caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{_(drawing.caption)}</figcaption></figure>"
            f"<details><summary>The numbers behind it (CSV)</summary><pre>{_(drawing.csv)}</pre></details></article>\n"
        )
    said = "".join(f"<li>{_(line)}</li>" for line in lacking)
    return "".join(parts) + (f'<p>Not drawn:</p><ul class="remarks">{said}</ul>' if said else "")


def _missing(reports: Sequence[Report]) -> str:
    items = [
        f"<li>{_(report.title or 'Runs')}<ul>" + "".join(f"<li>{_(line)}</li>" for line in lines) + "</ul></li>"
        for report in reports
        if (lines := missing_lines(report.missing))
    ]
    return f"<ul>{''.join(items)}</ul>" if items else "<p>None: every row has every dataset and every seed.</p>"


# ----------------------------------------------------------------------------------------------------------------------
# What runs were made with


def _metas(runs: Sequence[Run], evidence: Evidence) -> str:
    """Every meta-checkpoint that a run used or that left a log."""
    used: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        sha256 = (run.result.get("meta_checkpoint") or {}).get("sha256")
        if sha256:
            used[sha256].append(run)
    logged = {meta.sha256 or meta.path: meta for meta in evidence.metas}
    keys = list(dict.fromkeys([*used, *logged]))
    if not keys:
        return "<p>No run used a meta-checkpoint.</p>"
    rows = "".join(_meta_row(key, used.get(key, []), logged.get(key)) for key in keys)
    head = "".join(
        f'<th scope="col"{_class("words" if i in (0, 1, 9) else "")}>{name}</th>'
        for i, name in enumerate(_META_HEADERS)
    )
    folded = "".join(_meta(key, used.get(key, []), logged.get(key)) for key in keys)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        '<ul class="remarks"><li>Loss, accuracy and inner product (cosine) are those of the held-out tasks, before and after '
        "adaptation, at the best step.</li></ul>" + folded
    )


_META_HEADERS = (
    "meta-training",
    "made without",
    "text + visual tokens",
    "runs",
    "best step",
    "query loss",
    "query accuracy (%)",
    "inner product, raw",
    "regulated",
    "SHA-256",
)


def _meta_name(runs: Sequence[Run], meta: MetaTraining | None, key: str) -> str:
    path = meta.path if meta else str(runs[0].result["meta_checkpoint"].get("path", ""))
    return Path(path).parent.name or key[:12]


def _best(meta: MetaTraining | None) -> Mapping[str, Any]:
    """What was logged at the step whose weights were kept."""
    rows = [row for row in meta.log if "loss_after" in row] if meta else []
    return min(rows, key=lambda row: row["loss_after"], default={})


def _meta_row(key: str, runs: Sequence[Run], meta: MetaTraining | None) -> str:
    told = (runs[0].result["meta_checkpoint"].get("settings") or {}) if runs else {}
    tokens = [told.get(f"PROMPT.{kind}_TOKENS") for kind in ("TEXT", "VISUAL")]
    best = _best(meta)

    def two(name: str, scale: float, digits: int) -> str:
        pair = [best.get(f"{name}_{when}") for when in ("before", "after")]
        return (
            ""
            if None in pair
            else " \N{RIGHTWARDS ARROW} ".join(f"{scale * it:.{digits}f}" for it in pair if it is not None)
        )

    numbers = [
        "" if None in tokens else f"{tokens[0]} + {tokens[1]}",
        len(runs),
        f"{best['step']} of {meta.log[-1]['step']}" if best and meta else "",
        two("loss", 1, 3),
        two("accuracy", 100, 1),
        *(f"{best[name]:.3f}" if name in best else "" for name in ("alignment_raw", "alignment")),
    ]
    lacks = ", ".join(word.removeprefix("no ") for word in runs[0].ablation) if runs else ""
    return (
        f'<tr><th scope="row">{_(_meta_name(runs, meta, key))}</th><td class="words">{_(lacks)}</td>'
        + "".join(f"<td>{_(number)}</td>" for number in numbers)
        + f'<td class="words">{_link("meta", key[:12])}</td></tr>'
    )


def _meta(key: str, runs: Sequence[Run], meta: MetaTraining | None) -> str:
    """All that is known of one, folded."""
    told = runs[0].result["meta_checkpoint"] if runs else {}
    facts: list[tuple[str, Any]] = [("SHA-256", key), ("file", meta.path if meta else told.get("path", ""))]
    if runs:
        trainers = ", ".join(dict.fromkeys(run.trainer for run in runs))
        facts.append(("used by", f"{len(runs)} runs of {trainers}"))
    facts += sorted((told.get("settings") or {}).items())
    config = ""
    if meta:
        facts += [
            (name, meta.facts[name]) for name in ("version", "topics", "store", "hierarchy") if name in meta.facts
        ]
        config = f"<p>Config of the meta-training:</p><pre>{_(_yaml(meta.facts.get('config', {})))}</pre>"
    rows = "".join(f"<dt>{_(label)}</dt><dd>{_(value)}</dd>" for label, value in facts)
    name = _meta_name(runs, meta, key)
    return (
        f'<details id="meta-{_(key[:12])}"><summary>{_(key[:12])}: {_(name)}</summary>'
        f'<dl class="facts">{rows}</dl>{config}</details>\n'
    )


def _manifests(runs: Sequence[Run]) -> str:
    headers = (
        "trainer",
        "dataset",
        "classes",
        "trained on",
        "shots",
        "seed",
        "epoch",
        "accuracy (%)",
        "config",
        "meta-checkpoint",
        "few-shot split",
        "versions",
        "train (s)",
        "test (s)",
        "folder",
    )
    head = "".join(f'<th scope="col"{_class("" if 3 < i < 8 else "words")}>{h}</th>' for i, h in enumerate(headers))
    rows = "".join(
        _manifest(run) for run in sorted(runs, key=lambda run: (run.label, run.dataset, run.subsample, run.seed))
    )
    return (
        "<p>Hashes are the first digits of SHA-256; they lead to the whole ones, and to the configs.</p>"
        f'<div class="scroll tall"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _manifest(run: Run) -> str:
    result, seconds = run.result, run.result.get("seconds") or {}
    meta = (result.get("meta_checkpoint") or {}).get("sha256", "")
    shots = run.few_shot
    words = [run.label, run.dataset, run.subsample, "" if run.untrained else run.source]
    numbers = ["" if run.untrained else run.shots, run.seed, result.get("epoch", ""), f"{run.value:.2f}"]
    links = [
        _link("config", config_hash(result)),
        _link("meta", meta[:12]) if meta else "",
        _link("split", shots[:12]) if shots else "",
        _link("versions", _hash(result.get("versions"))) if result.get("versions") else "",
    ]
    times = [f"{seconds[part]:.1f}" if seconds.get(part) else "" for part in ("train", "test")]
    cells = [f'<th scope="row">{_(words[0])}</th>', *(f'<td class="words">{_(word)}</td>' for word in words[1:])]
    cells += [f"<td>{_(number)}</td>" for number in numbers]
    cells += [f'<td class="words">{link}</td>' for link in links]
    cells += [f"<td>{_(time)}</td>" for time in times]
    cells.append(f'<td class="words"><code>{_(run.path.parent)}</code></td>')
    return f"<tr>{''.join(cells)}</tr>"


def _link(kind: str, key: str) -> str:
    return f'<a href="#{kind}-{_(key)}"><code>{_(key[:8])}</code></a>'


def _hash(block: Any) -> str:
    return hashlib.sha256(json.dumps(block, sort_keys=True).encode()).hexdigest()[:12]


def config_hash(result: Mapping[str, Any]) -> str:
    """Of a run's config without what differs from run to run (seed, dataset, shots, folders)."""
    return _hash(without_own(result.get("config") or {}))


def _configs(runs: Sequence[Run]) -> str:
    """Each config once, folded."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[config_hash(run.result)].append(run)
    parts = [
        _folded(
            f"{key}: {', '.join(dict.fromkeys(run.label for run in group))} ({len(group)} runs)",
            _yaml(without_own(group[0].result.get("config") or {})),
            f"config-{key}",
        )
        for key, group in groups.items()
    ]
    return "<p>Without seed, dataset, classes, shots and folders, which stand with each run.</p>" + "".join(parts)


def _splits(runs: Sequence[Run]) -> str:
    found: dict[str, Run] = {}
    for run in runs:
        if run.few_shot:
            found.setdefault(run.few_shot, run)
    rows = "".join(
        f'<tr id="split-{_(key[:12])}"><th scope="row">{_(run.source)}</th><td>{_(run.shots)}</td><td>{_(run.seed)}</td>'
        f'<td class="words"><code>{_(key)}</code></td></tr>'
        for key, run in sorted(found.items(), key=lambda it: (it[1].source, it[1].shots, it[1].seed))
    )
    if not rows:
        return "<p>No run was trained on few-shot images.</p>"
    head = (
        '<th scope="col" class="words">trained on</th><th scope="col">shots</th><th scope="col">seed</th>'
        '<th scope="col" class="words">SHA-256</th>'
    )
    return f'<div class="scroll tall"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _versions(runs: Sequence[Run]) -> str:
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run.result.get("versions"):
            groups[_hash(run.result["versions"])].append(run)
    parts = []
    for key, group in groups.items():
        rows = "".join(f"<dt>{_(name)}</dt><dd>{_(value)}</dd>" for name, value in group[0].result["versions"].items())
        parts.append(
            f'<article id="versions-{key}"><h3>{key}: {len(group)} runs</h3><dl class="facts">{rows}</dl></article>'
        )
    return "".join(parts) or "<p>No run says.</p>"


def _yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, allow_unicode=True, width=100)


def _folded(summary: str, text: str, anchor: str = "") -> str:
    identity = f' id="{_(anchor)}"' if anchor else ""
    return f"<details{identity}><summary>{_(summary)}</summary><pre>{_(text)}</pre></details>\n"
