"""docs/results/emoji-world.md and claims.json say what docs/results/emoji.json says."""

import copy
import importlib.util
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest

from gram_meta.backbone.packaged import weights_path
from gram_meta.method.checkpoint import shipped
from gram_meta.report import paper_tables, read_runs, render

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"


@pytest.fixture(scope="module")
def claims():
    """scripts/experiments/claims.py, as a module."""
    spec = importlib.util.spec_from_file_location("claims", ROOT / "scripts/experiments/claims.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs():
    return read_runs([RESULTS / "emoji.json"])


@pytest.fixture(scope="module")
def others(claims):
    """The files of `OTHERS`."""
    return [json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in claims.OTHERS]


def test_page_and_claims_are_those_of_the_committed_results(claims, runs, others):
    page = (RESULTS / "emoji-world.md").read_text(encoding="utf-8")
    assert [place[1] for place in claims.PLACE.findall(page)] == ["claims", *(f"table {n}" for n in range(1, 7))]
    listed = claims.all_claims(runs, *others)
    assert listed == json.loads((RESULTS / "claims.json").read_text())
    assert claims.filled(page, runs, listed) == page


@pytest.mark.parametrize("weights", [weights_path(), *shipped().values()], ids=lambda path: path.stem)
def test_cards_have_the_accuracies_of_seed_1(claims, runs, weights):
    """Each dataset's accuracies in a card are those that `gram report` makes of the runs with SEED 1."""
    first = [run for run in runs if claims.kind_of(run) in ((run.trainer, 0), (run.trainer, 1))]
    (table,) = paper_tables(first, [1])
    lines = [line.split("|")[3:6] for line in render(table, "markdown").splitlines() if line.startswith("|")]
    published = {tuple(cell.strip() for cell in cells) for cells in lines}
    card = weights.with_suffix(".md").read_text(encoding="utf-8")
    rows = card.split("|---|---|")[2].split("\n\n")[0].splitlines()[1:]
    assert len(rows) == 6
    for row in rows:
        cells = [cell.strip() for part in row.split("|")[2:-1] for cell in part.split(",")]
        assert all(tuple(cells[first : first + 3]) in published for first in range(0, len(cells), 3))


def test_the_picture_shows_the_committed_claims(claims):
    listed = json.loads((RESULTS / "claims.json").read_text())
    picture = claims.PICTURE.read_text(encoding="utf-8")
    assert claims.drawn(listed) == picture
    next(each for each in listed if each["name"] == "VPTGRAM - VPT, new, base to new")["mean"] += 0.1
    assert claims.drawn(listed) != picture


def test_a_changed_number_would_be_seen(claims, runs, others):
    page, listed = (RESULTS / "emoji-world.md").read_text(encoding="utf-8"), claims.all_claims(runs, *others)
    for place in claims.PLACE.finditer(page):
        digits = place.start() + next(i for i, c in enumerate(place[0]) if c == "." and place[0][i + 1].isdigit()) + 1
        forged = page[:digits] + str((int(page[digits]) + 1) % 10) + page[digits + 1 :]
        assert claims.filled(forged, runs, listed) == page
    *grids, curves = others = copy.deepcopy(others)
    seen = [listed]
    for change in [next(run for run in grid["runs"] if run["control"] == "R on") for grid in grids]:
        change["base"] += 1
        seen.append(claims.all_claims(runs, *others))
    curves["accuracy"]["new classes"]["CoOp"][0][-1] += 1
    seen.append(claims.all_claims(runs, *others))
    assert all(before != after for before, after in itertools.pairwise(seen))


def test_missing_runs_are_no_zeros(claims):
    """A dataset without its new classes, or one that the other kind lacks, is refused and not left out of a mean."""
    with pytest.raises(ValueError, match="expected base and new of each"):
        claims.read([run("a", 1, "base", 60.0), run("b", 1, "base", 60.0), run("b", 1, "new", 60.0)])
    index = [("ours", 1, "a"), ("ours", 1, "b"), ("theirs", 0, "a")]
    names = pandas.MultiIndex.from_tuples(index, names=["kind", "meta", "dataset"])
    table = pandas.DataFrame({"new": [1.0, 2.0, 3.0], "seeds": 1}, names)
    with pytest.raises(ValueError, match="expected the same datasets"):
        claims.claim("ours", "theirs", "new", table)


def test_a_claim_by_hand(claims):
    """Two datasets, two meta-seeds; the reference has no meta-training, so its seed 0 serves for both."""
    rows = [("theirs", 0, "a", 60.0, 40.0), ("theirs", 0, "b", 50.0, 50.0)]
    rows += [("ours", 1, "a", 62.0, 44.0), ("ours", 1, "b", 50.0, 50.0)]
    rows += [("ours", 2, "a", 60.0, 40.0), ("ours", 2, "b", 50.0, 60.0)]
    table = pandas.DataFrame(rows, columns=["kind", "meta", "dataset", "base", "new"])
    table["H"], table["seeds"] = 2 * table.base * table.new / (table.base + table.new), 1
    table = table.set_index(["kind", "meta", "dataset"])
    found = claims.claim("ours", "theirs", "new", table)
    assert found["each_meta_seed"] == [2.0, 5.0] and found["mean"] == 3.5
    assert found["high"] == pytest.approx(3.5 + 12.7062 * 1.5, abs=0.01) and not found["confirmed"]
    assert found["meta_seeds"] == 2 and found["seeds"] == 1 and found["datasets"] == ["a", "b"]
    h = claims.claim("ours", "theirs", "H", table)
    expected = [(2 * 62 * 44 / 106 - 48) / 2, (2 * 50 * 60 / 110 - 50) / 2]
    assert h["each_meta_seed"] == [round(value, 2) for value in expected]


def run(dataset, seed, subsample, value, shots=16, source=None):
    facts = {"dataset": dataset, "seed": seed, "subsample": subsample, "value": value, "shots": shots}
    facts |= {"source": source or dataset, "transferred": source not in (None, dataset)}
    return SimpleNamespace(**facts, trainer="CoOp", result={}, settings={}, ablation=(), tokens=None)


def test_the_table_has_means_over_few_shot_seeds(claims):
    """H is that of the averaged base and new; a transferred run and one on all classes do not count."""

    runs = [run("a", 1, "base", 60.0), run("a", 2, "base", 62.0), run("a", 1, "new", 40.0), run("a", 2, "new", 44.0)]
    table = claims.read(
        [*runs, run("a", 1, "all", 1.0), run("a", 1, "new", 1.0, source="b"), run("a", 3, "base", 1.0, 4)]
    )
    (row,) = table.reset_index().to_dict("records")
    assert row == {
        **{"kind": "CoOp", "meta": 0, "dataset": "a", "base": 61.0, "new": 42.0},
        **{"H": pytest.approx(2 * 61 * 42 / 103), "seeds": 2},
    }


def test_transfers_differ_by_target_and_shots(claims):
    """A target whose name begins with the source's is a domain of it."""
    runs = [run("aSketch", 1, "all", 50.0, source="a"), run("aSketch", 2, "all", 52.0, source="a")]
    runs += [run("b", 1, "all", 70.0, source="a"), run("b", 1, "all", 30.0, 4, source="a"), run("a", 1, "all", 1.0)]
    found = {
        (to, shots): claims.read(runs, to, shots).reset_index().to_dict("records")
        for to, shots in [("other datasets", 16), ("other datasets", 4), ("other domains", 16), ("other domains", 4)]
    }
    common = {"kind": "CoOp", "meta": 0}
    assert found == {
        ("other datasets", 16): [{**common, "dataset": "b", "accuracy": 70.0, "seeds": 1}],
        ("other datasets", 4): [{**common, "dataset": "b", "accuracy": 30.0, "seeds": 1}],
        ("other domains", 16): [{**common, "dataset": "aSketch", "accuracy": 51.0, "seeds": 2}],
        ("other domains", 4): [],
    }
