"""Fill docs/results/emoji-world.md and claims.json from emoji.json and the files of `OTHERS` beside them.

A claim is a difference between two kinds of runs, such as "CoOpGRAM - CoOp, H, base to new". For each meta-seed it is
averaged over few-shot seeds and datasets; mean and 95 % interval (Student's t) are over meta-seeds. A claim is
confirmed if its interval lies above 0. H is the harmonic mean of a dataset's base and new accuracy over few-shot seeds.
controls.json, more_controls.json and true_names.json are grid.json of meta_grid.py; curves.json is of curves.py, with
50 epochs. The script draws docs/assets/results.svg, too.
"""

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import pandas
from jinja2 import Environment, StrictUndefined
from tabulate import tabulate

from gram_meta.files import write_json
from gram_meta.intervals import half_width, harmonic, mean
from gram_meta.report import read_runs
from gram_meta.report.runs import LABELLED, NO_META, NO_REGULATOR, NO_SHIFT, TOKENS, Run

DOCS = Path(__file__).resolve().parents[2] / "docs" / "results"
OTHERS = ("controls", "more_controls", "true_names", "curves")
PICTURE = DOCS.parent / "assets" / "results.svg"
PLACE = re.compile(r"(<!-- (claims|table \d) -->\n).*?(<!-- end -->)", re.DOTALL)
BASE_TO_NEW, CROSS_DATASET, CROSS_DOMAIN = "base to new", "other datasets", "other domains"
ITSELF, SOURCE = "itself", " (source)"  # tests of all classes of the dataset that was trained on
ABLATIONS = {  # Table 6
    NO_SHIFT: "meta-trained without domain shift",
    NO_REGULATOR: "meta-trained without R",
    NO_META: "trained without meta-learning",
    LABELLED: "meta-trained on labelled data",
}
PAPER = "the paper's R"  # raw input, absolute beta
SAME_LENGTH = "R off, same length"
CURVES = {  # in curves.json
    "CoOp": "CoOp",
    "CoOp + GRAM": "CoOpGRAM",
    "CoOp + GRAM, the paper's R": "CoOpGRAM, the paper's R",
    "CoOp + GRAM, meta-trained without R": "CoOpGRAM, meta-trained without R",
}
SPLIT = re.compile(r"(.+ - .+), (base|new|H|accuracy), (.+)")  # the name of a claim
SEED = re.compile(r"seed(\d+)/best")  # in the path of a meta-checkpoint of SEEDS
# ours, what it is compared with
CLAIMS = (
    ("CoOpGRAM", "CoOp"),
    ("CoOpGRAM", "CoOpGRAM, meta-trained without R"),
    ("CoOpGRAM, meta-trained without R", "CoOp"),
    ("CoOpGRAM, R off", "CoOp"),
    ("CoOpGRAM", "CoOpGRAM, R off"),
    ("CoOpGRAM", "CoOpGRAM, R off, same length"),
    ("CoOpGRAM", "CoOpGRAM, R's mean"),
    ("CoOpGRAM", "CoOpGRAM, R without beta"),
    ("CoOpGRAM", "CoOpGRAM, theta* moved"),
    ("CoOpGRAM, R from CoOp's words", "CoOp"),
    ("CoOpGRAM, the paper's R", "CoOp"),
    ("CoOpGRAM", "CoOpGRAM, the paper's R"),
    ("CoOpGRAM, the paper's R", "CoOpGRAM, meta-trained without R"),
    ("CoOpGRAM, true names", "CoOp"),
    ("CoOpGRAM, true names, R off", "CoOp"),
    ("VPTGRAM", "VPT"),
    ("UniGRAM", "JointPrompt"),
    ("UniGRAM", "CoOp"),
    ("UniGRAM", "CoOpGRAM"),
    ("UniGRAM", "VPTGRAM"),
    ("UniGRAM", "UniGRAM, meta-trained without R"),
    ("UniGRAM", "UniGRAM, meta-trained without domain shift"),
    ("UniGRAM", "UniGRAM, trained without meta-learning"),
    ("UniGRAM", "UniGRAM, meta-trained on labelled data"),
    *(("UniGRAM", f"UniGRAM, {half}+{half} tokens") for half in (1, 3, 4)),
    ("UniGRAM", "JointPrompt, from the class token"),
    ("VPTGRAM", "VPT, from the class token"),
    ("CoCoOpGRAM", "CoCoOp"),
)


METRICS = ("base", "new", "H")
BASE_TO_NEW_ROWS = {  # of Tables 1, 6 and 7; the first row is what the others are compared with
    1: (
        *("CoOp", "ZeroshotCLIP", "CoOpGRAM", "CoOpGRAM, meta-trained without R", "CoCoOp", "CoCoOpGRAM", "VPT"),
        *("VPT, from the class token", "VPTGRAM", "JointPrompt", "JointPrompt, from the class token", "UniGRAM"),
    ),
    6: ("UniGRAM", *(f"UniGRAM, {lacks}" for lacks in ABLATIONS.values()), "JointPrompt"),
    7: ("UniGRAM", *(f"UniGRAM, {half}+{half} tokens" for half in (1, 3, 4))),
}
TRANSFERS = {2: (CROSS_DOMAIN, 16), 3: (CROSS_DATASET, 16), 4: (CROSS_DOMAIN, 4), 5: (CROSS_DATASET, 4)}


def kind_of(run: Run) -> tuple[str, int]:
    """Return what kind of run it is, and the seed of its meta-training."""
    gram, words = "TRAINER.GRAM.", [run.trainer]
    seed = SEED.search((run.result.get("meta_checkpoint") or {}).get("path", ""))
    starts = {
        "VPT": run.settings.get("TRAINER.VPT.VISUAL_INIT"),
        "JointPrompt": run.settings.get("TRAINER.JOINT.VISUAL_INIT"),
    }
    if starts.get(run.trainer) == "class_token":
        words.append("from the class token")
    if run.trainer.endswith("GRAM"):
        words += [ABLATIONS[lacks] for lacks in run.ablation]
        if not {NO_REGULATOR, NO_META} & set(run.ablation) and not run.settings.get(f"{gram}REGULATE", True):
            words.append("R off")
        if not run.settings.get(f"{gram}INIT", True):
            words.append("R from CoOp's words")
    if run.tokens not in (None, TOKENS):
        words.append(f"{run.tokens[0]}+{run.tokens[1]} tokens")
    return ", ".join(words), int(seed[1]) if seed else 0


def read(runs: list[Run], protocol: str = BASE_TO_NEW, shots: int = 16) -> pandas.DataFrame:
    """Return the accuracies of a protocol, and the number of few-shot seeds, by kind, meta-seed (0: none) and dataset.

    From base to new the columns are base, new and H; else there is one, `accuracy`.
    """
    rows = [
        (*kind_of(run), run.dataset, run.seed, "accuracy" if run.subsample == "all" else run.subsample, run.value)
        for run in runs
        if protocol_of(run) == protocol and run.shots == shots
    ]
    frame = pandas.DataFrame(rows, columns=["kind", "meta", "dataset", "seed", "side", "value"])
    table = frame.pivot_table("value", ["kind", "meta", "dataset"], "side")  # means over few-shot seeds
    if protocol == BASE_TO_NEW:
        if table.isna().any(axis=None):
            raise ValueError(f"expected base and new of each, found {list(table.index[table.isna().any(axis=1)])}")
        table["H"] = [harmonic(*sides) for sides in zip(table["base"], table["new"], strict=True)]
    return table.assign(seeds=frame.groupby(["kind", "meta", "dataset"]).seed.nunique())


def protocol_of(run: Run) -> str:
    """Return the protocol that a run belongs to."""
    if run.transferred:
        return CROSS_DOMAIN if run.dataset.startswith(run.source) else CROSS_DATASET
    return BASE_TO_NEW if run.subsample in ("base", "new") else ITSELF


def read_transfers(runs: list[Run], protocol: str, shots: int) -> pandas.DataFrame:
    """Return the accuracies on the targets of a protocol, on their source, and of a CLIP without training."""
    table, untrained = read(runs, protocol, shots), read(runs, ITSELF, -1)
    source = read(runs, ITSELF, shots).rename(index=lambda name: f"{name}{SOURCE}", level="dataset")
    known = untrained.index.get_level_values("dataset").isin(table.index.unique("dataset"))
    return pandas.concat([source, table, untrained[known]])


def read_controls(files: Collection[dict], metas: Collection[int]) -> pandas.DataFrame:
    """Return the accuracies in grid.json files of meta_grid.py, of CoOp and of these meta-seeds, as `read` does."""
    rows = {}  # CoOp is in each file, with the same runs
    for found in files:
        for run in found["runs"]:
            if run["meta"] in (0, *metas):
                key = _kind_in_grid(run, found["settings"].get(run["variant"], {})), run["meta"], run["dataset"]
                rows[key] = (*key, run["base"], run["new"], found["seeds"])
    return _table(list(rows.values()))


def _kind_in_grid(run: dict, settings: dict) -> str:
    if not run["meta"]:
        return "CoOp"
    if settings.get("REGULATOR.ENABLED") is False:
        return "CoOpGRAM, meta-trained without R"
    words = ["CoOpGRAM"] + [PAPER] * (settings["REGULATOR.BETA"] == "absolute")
    words += ["true names"] * settings.get("CHC.LABELLED", False)
    return ", ".join(words + [run["control"]] * (run["control"] != "R on"))


def read_curves(found: dict) -> pandas.DataFrame:
    """Return the accuracies at the end of the curves of curves.json, means over datasets, as `read` does."""
    rows = []
    for kind in found["accuracy"]["base classes"]:
        name, sides = CURVES[kind], (found["accuracy"][f"{side} classes"][kind] for side in ("base", "new"))
        for meta, (base, new) in enumerate(zip(*sides, strict=True), start=int(name != "CoOp")):
            rows.append((name, meta, "all", base[-1], new[-1], found["seeds"]))
    return _table(rows)


def _table(rows: list[tuple]) -> pandas.DataFrame:
    table = pandas.DataFrame(rows, columns=["kind", "meta", "dataset", "base", "new", "seeds"])
    table["H"] = [harmonic(*sides) for sides in zip(table["base"], table["new"], strict=True)]
    return table.set_index(["kind", "meta", "dataset"]).sort_index()


def claim(ours: str, theirs: str, metric: str, table: pandas.DataFrame, protocol: str = BASE_TO_NEW) -> dict:
    """Return one entry: the differences of each meta-seed, their mean and interval."""
    found, others, gains = table.loc[ours], table.loc[theirs], []
    for meta in found.index.unique("meta"):
        reference = of_meta_seed(others, meta)
        if set(reference.index) != set(found.loc[meta].index):
            raise ValueError(f"{ours} - {theirs}: expected the same datasets, found others with meta-seed {meta}")
        gains.append(float((found.loc[meta][metric] - reference[metric]).mean()))
    middle, half = mean(gains), half_width(gains)
    low, high = (None, None) if half is None else (round(middle - half, 2), round(middle + half, 2))
    return {
        "name": f"{ours} - {theirs}, {metric}, {protocol}",
        "mean": round(middle, 2),
        "low": low,
        "high": high,
        "each_meta_seed": [round(gain, 2) for gain in gains],
        "meta_seeds": len(gains),
        "seeds": int(found["seeds"].max()),
        "datasets": sorted(found.index.unique("dataset")),
        "confirmed": half is not None and middle > half,
    }


def of_meta_seed(table: pandas.DataFrame, meta: int) -> pandas.DataFrame:
    """Return the rows of a meta-seed; those without meta-training (0) stand for all."""
    return table.loc[meta if meta in table.index else 0]


def as_markdown(claims: list[dict]) -> str:
    """Return a table with a row for all metrics of a difference; confirmed ones are bold."""
    rows: dict[str, dict[str, str]] = {}
    for each in claims:
        pair, metric, protocol = SPLIT.fullmatch(each["name"]).groups()
        row = rows.setdefault(f"{pair}, {protocol}", {"difference": pair, "protocol": protocol})
        interval = "" if each["low"] is None else f" ({each['low']:+.1f} to {each['high']:+.1f})"
        mark = "**" * each["confirmed"]
        row[metric] = f"{mark}{each['mean']:+.2f}{mark}{interval}"
        row["meta-seeds"] = f"{each['meta_seeds']}"
    columns = ["difference", "protocol", "base", "new", "H", "accuracy", "meta-seeds"]
    table = [[row.get(column, "") for column in columns] for row in rows.values()]
    return tabulate(table, columns, "pipe", disable_numparse=True)


def all_claims(runs: list[Run], controls: dict, more_controls: dict, true_names: dict, curves: dict) -> list[dict]:
    """Return every claim; arguments after `runs` are the files of `OTHERS`."""
    found = []
    for protocol, shots in ((BASE_TO_NEW, 16), *((to, k) for to in (CROSS_DATASET, CROSS_DOMAIN) for k in (16, 4))):
        table = read(runs, protocol, shots)
        name = protocol if protocol == BASE_TO_NEW else f"{protocol}, {shots} shots"
        found += claims_of(table, name)
    found += claims_of(read_controls([true_names], range(1, 6)), BASE_TO_NEW)
    for first, last in ((6, 20), (1, 20)):
        table = read_controls([controls], range(first, last + 1))
        found += claims_of(table, f"{BASE_TO_NEW}, meta-seeds {first} to {last}")
    table = read_controls([controls, more_controls], range(1, 6))
    listed = claims_of(table, f"{BASE_TO_NEW}, meta-seeds 1 to 5")
    found += [each for each in listed if PAPER in each["name"] or SAME_LENGTH in each["name"]]
    long = claims_of(read_curves(curves), f"{BASE_TO_NEW}, {curves['epochs']} epochs")
    return found + [{**each, "datasets": curves["datasets"]} for each in long]


def claims_of(table: pandas.DataFrame, protocol: str) -> list[dict]:
    kinds, metrics = table.index.unique("kind"), [column for column in table.columns if column != "seeds"]
    pairs = [(ours, theirs) for ours, theirs in CLAIMS if ours in kinds and theirs in kinds]
    return [claim(ours, theirs, metric, table, protocol) for ours, theirs in pairs for metric in metrics]


def filled(page: str, runs: list[Run], claims: list[dict]) -> str:
    """Return the page with its claims and tables as the runs give them."""

    def fill(place: re.Match) -> str:
        text = as_markdown(claims) if place[2] == "claims" else paper_table(runs, int(place[2].split()[1]))
        return f"{place[1]}\n{text}\n\n{place[3]}"

    return PLACE.sub(fill, page)


def paper_table(runs: list[Run], number: int) -> str:
    """Return a table of the paper: means over few-shot and meta-seeds, and differences to its reference."""
    if number in TRANSFERS:
        return transfer_table(read_transfers(runs, *TRANSFERS[number]))
    kinds, table = BASE_TO_NEW_ROWS[number], read(runs)
    scores = {kind: table.loc[kind] for kind in kinds if kind in table.index.unique("kind")}
    datasets = list(table.index.unique("dataset"))
    shown = {"average": datasets} | ({name: [name] for name in datasets} if number == 1 else {})
    rows = [
        (name * (place == 0), kind, *_cells(scores, kind, kinds[0], of, METRICS))
        for name, of in shown.items()
        for place, kind in enumerate(scores)
    ]
    columns = ["dataset", "trainer", *METRICS, *(f"{metric} - {kinds[0]}" for metric in METRICS)]
    return tabulate(rows, columns, "pipe", disable_numparse=True)


def transfer_table(table: pandas.DataFrame) -> str:
    """Return accuracies and differences to CoOp; columns are the source, the targets and their average."""
    names = list(table.index.unique("dataset"))
    shown = {name: [name] for name in names} | {"average": [name for name in names if not name.endswith(SOURCE)]}
    scores = {kind: table.loc[kind] for kind in BASE_TO_NEW_ROWS[1] if kind in table.index.unique("kind")}
    rows = [
        (kind, *(", ".join(filter(None, _cells(scores, kind, "CoOp", of, ["accuracy"]))) for of in shown.values()))
        for kind in scores
    ]
    return tabulate(rows, ["trainer", *shown], "pipe", disable_numparse=True)


def _cells(
    scores: dict[str, pandas.DataFrame], kind: str, reference: str, datasets: list[str], metrics: Sequence[str]
) -> list[str]:
    """Return means over these datasets, and differences to the reference with intervals over meta-seeds."""
    found, plain = (_of_meta_seeds(scores[name], datasets, metrics) for name in (kind, reference))
    values = [f"{value:.1f}" for value in found.mean()]
    if kind == reference:
        return [*values, *("" for _ in metrics)]
    metas = (set(found.index) | set(plain.index)) - {0} or {0}
    gains = [of_meta_seed(found, meta) - of_meta_seed(plain, meta) for meta in metas]
    return [*values, *map(_difference, zip(*gains, strict=True))]


def _of_meta_seeds(scores: pandas.DataFrame, datasets: list[str], metrics: Sequence[str]) -> pandas.DataFrame:
    """Return the means over datasets, a row for each meta-seed."""
    chosen = scores[scores.index.get_level_values("dataset").isin(datasets)]
    return chosen.groupby("meta")[list(metrics)].mean()


def _difference(gains: tuple[float, ...]) -> str:
    half = half_width(gains)
    return f"{mean(gains):+.1f}" + ("" if half is None else f" ± {half:.1f}")


def drawn(claims: list[dict]) -> str:
    """Return the picture of README.md: differences with their intervals."""
    template = Path(__file__).with_name("results.svg.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    return environment.from_string(template).render(claims={claim["name"]: claim for claim in claims}) + "\n"


if __name__ == "__main__":
    runs, page = read_runs([DOCS / "emoji.json"]), DOCS / "emoji-world.md"
    others = (json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8")) for name in OTHERS)
    claims = all_claims(runs, *others)
    page.write_text(filled(page.read_text(encoding="utf-8"), runs, claims), encoding="utf-8")
    write_json(DOCS / "claims.json", claims)
    PICTURE.write_text(drawn(claims), encoding="utf-8")
