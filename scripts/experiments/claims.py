"""Write docs/results/claims.json, and its table in docs/results/emoji-world.md, from the runs of emoji_evidence.sh.

    python scripts/experiments/claims.py docs/results/emoji.json     # or folders of runs

A claim is a difference from base to new between two kinds of runs, such as "CoOpGRAM - CoOp, H". For each meta-seed it
is averaged over few-shot seeds and datasets; mean and 95 % interval (Student's t) are over meta-seeds. A claim is
confirmed if its interval lies above 0. H is the harmonic mean of a dataset's base and new accuracy over few-shot seeds.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from tabulate import tabulate

from gram_meta.config import flatten
from gram_meta.files import write_json
from gram_meta.intervals import half_width, harmonic, mean
from gram_meta.report import read_runs
from gram_meta.report.runs import Run

DOCS = Path(__file__).resolve().parents[2] / "docs" / "results"
BEGIN, END = "<!-- claims -->\n", "\n<!-- end of claims -->"
METRICS = ("base", "new", "H")
# ours, what it is compared with
CLAIMS = (
    ("CoOpGRAM", "CoOp"),
    ("CoOpGRAM", "CoOpGRAM, meta-trained without R"),
    ("CoOpGRAM, meta-trained without R", "CoOp"),
    ("CoOpGRAM, R off", "CoOp"),
    ("CoOpGRAM", "CoOpGRAM, R off"),
    ("CoOpGRAM, R from CoOp's words", "CoOp"),
    ("VPTGRAM", "VPT"),
    ("UniGRAM", "CoOp"),
    ("UniGRAM", "UniGRAM, meta-trained without R"),
    ("CoCoOpGRAM", "CoCoOp"),
)
# by kind, meta-seed (0: none), dataset and few-shot seed: accuracy on base and on new classes
Table = dict[str, dict[int, dict[str, dict[int, dict[str, float]]]]]


def kind_of(run: Run) -> tuple[str, int]:
    """Return what kind of run it is, and the seed of its meta-training."""
    meta, gram = flatten((run.result.get("meta_checkpoint") or {}).get("settings", {})), "TRAINER.GRAM."
    words = [run.trainer]
    if run.trainer.endswith("GRAM"):
        if not meta.get("REGULATOR.ENABLED", True):
            words.append("meta-trained without R")
        elif not run.settings.get(f"{gram}REGULATE", True):
            words.append("R off")
        if not run.settings.get(f"{gram}INIT", True):
            words.append("R from CoOp's words")
    return ", ".join(words), int(meta.get("SEED", 0))


def read(paths: list[Path]) -> Table:
    """Return the accuracies of all base-to-new runs."""
    table: Table = defaultdict(lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(dict))))
    for run in read_runs(paths):
        if run.subsample in ("base", "new") and not run.transferred:
            kind, meta = kind_of(run)
            table[kind][meta][run.dataset][run.seed][run.subsample] = run.value
    return table


def score(of_seeds: dict[int, dict[str, float]], metric: str) -> float:
    """Return base, new or H of one dataset."""
    base, new = (mean(sides[side] for sides in of_seeds.values()) for side in ("base", "new"))
    return {"base": base, "new": new, "H": harmonic(base, new)}[metric]


def claim(ours: str, theirs: str, metric: str, table: Table) -> dict:
    """Return one entry: the differences of each meta-seed, their mean and interval."""
    datasets = sorted(next(iter(table[ours].values())))
    seeds = {number for of in table[ours].values() for of_seeds in of.values() for number in of_seeds}
    gains = []
    for meta, found in sorted(table[ours].items()):
        reference = table[theirs][meta if meta in table[theirs] else 0]
        gains.append(mean(score(found[name], metric) - score(reference[name], metric) for name in datasets))
    half = half_width(gains)
    low, high = (None, None) if half is None else (mean(gains) - half, mean(gains) + half)
    return {
        "name": f"{ours} - {theirs}, {metric}, base to new",
        "mean": round(mean(gains), 2),
        "low": None if low is None else round(low, 2),
        "high": None if high is None else round(high, 2),
        "each_meta_seed": [round(gain, 2) for gain in gains],
        "meta_seeds": len(gains),
        "seeds": len(seeds),
        "datasets": datasets,
        "confirmed": low is not None and low > 0,
    }


def as_markdown(claims: list[dict]) -> str:
    """Return the table for the page of results."""
    rows = [
        {
            "claim": each["name"],
            "mean": f"{each['mean']:+.2f}",
            "95 % interval": "" if each["low"] is None else f"{each['low']:+.2f} to {each['high']:+.2f}",
            "of each meta-seed": ", ".join(f"{gain:+.1f}" for gain in each["each_meta_seed"]),
            "confirmed": "yes" if each["confirmed"] else "no",
        }
        for each in claims
    ]
    return tabulate(rows, "keys", "pipe", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=DOCS / "claims.json")
    args = parser.parse_args()
    table = read(args.runs)
    pairs = [(ours, theirs) for ours, theirs in CLAIMS if ours in table and theirs in table]
    claims = [claim(ours, theirs, metric, table) for ours, theirs in pairs for metric in METRICS]
    write_json(args.out, claims)
    print(as_markdown(claims))
    page = DOCS / "emoji-world.md"
    text = page.read_text(encoding="utf-8")
    if args.out == DOCS / "claims.json" and BEGIN in text:
        before, rest = text.split(BEGIN, 1)
        page.write_text(f"{before}{BEGIN}\n{as_markdown(claims)}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
