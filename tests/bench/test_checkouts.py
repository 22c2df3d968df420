"""scripts/bench/checkouts.py: a small round over this project's trainers, and over checkouts where they are at hand."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CHECKOUTS = os.environ.get("GRAM_CHECKOUTS", "")
TINY = ("--backbone", "random-tiny", "--classes", "4", "--test-images", "6", "--repeats", "2", "--steps", "1")


@pytest.fixture(scope="module")
def checkouts(bench_script):
    return bench_script("checkouts")


def rows(path):
    """The tables of a report by group."""
    report = json.loads(path.read_text())
    return report, {table["group"]: table for table in report["tables"]}


def test_help_says_how_to_start_it(checkouts, capsys):
    with pytest.raises(SystemExit) as end:
        checkouts.main(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "--prometar" in printed and "git clone" in printed


def test_a_round_over_our_own(checkouts, tmp_path, capsys, monkeypatch):
    """A contestant that cannot be built is left out, with the reason, and the exit status is 1."""
    theirs, _, gram = checkouts.GROUPS["cocoop"]
    broken = checkouts.Entry("CoCoOp", "COCOOP", "no_such_config")
    monkeypatch.setitem(checkouts.GROUPS, "cocoop", (theirs, broken, gram))
    measures = ("--measures", "step", "test", "tower", "loader", "loader_of_test")
    assert checkouts.main([*TINY, *measures, "--groups", "cocoop", "-o", str(tmp_path / "out.json")]) == 1
    report, tables = rows(tmp_path / "out.json")
    table = tables["cocoop"]
    assert list(table["contestants"]) == ["CoCoOpGRAM, this project"]
    assert "no_such_config" in table["left_out"]["CoCoOp, this project"]
    row = table["contestants"]["CoCoOpGRAM, this project"]
    assert row["built"]["classes"] == 4 and row["built"]["test_images"] == 6 and row["built"]["batch"] == 1
    assert row["built"]["engine"] == "builtin"
    assert len(row["rounds"]["step"]) == 2 and row["rounds"]["step"][0]["cpu"] > 0
    assert all(row["peak_mb"][measure] >= 0 for measure in ("step", "test"))
    assert set(row["rounds"]) == {"step", "test", "tower", "loader", "loader_of_test"}
    assert report["facts"]["versions"]["torch"] and str(tmp_path) not in json.dumps(report)
    printed = capsys.readouterr().out
    assert "CoCoOp, its checkout: left out, as there is no --coop" in printed
    assert "| training step " in printed and "4 classes, 32 x 32 pixels" in printed
    assert printed.count("1.00 (1.00 to 1.00)") == 5  # it is the first one


def test_ratios_are_paired_by_round(checkouts):
    """The first contestant's time over another's, in the same round."""
    first, other = (
        {"rounds": {"step": [{"cpu": time, "wall": time} for time in times]}, "peak_mb": {"step": 1.0}}
        for times in ([4.0, 12.0], [2.0, 3.0])
    )
    args = checkouts.build_parser().parse_args(["--steps", "2"])
    found = checkouts.cells(other, first, "step", args)
    assert found["ratio"] == "3.00 (2.00 to 4.00)"
    assert found["processor time (ms)"] == "1,250 (1,000 to 1,500)"  # of one step of two


def test_other_batches_are_refused(checkouts, tmp_path):
    same = {"classnames_sha256": "a", "sha256": "b"}
    checkouts.same_batches({"one": same, "two": dict(same)})
    with pytest.raises(checkouts.GramError, match="two: its batches are not those of one"):
        checkouts.same_batches({"one": same, "two": {**same, "sha256": "c"}})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--coop", "nowhere"), "--coop nowhere: expected a checkout with a train.py"),
        (("--data", "nowhere"), "--data nowhere: expected the folder"),
    ],
)
def test_bad_input_is_one_sentence(checkouts, capsys, words, message):
    assert checkouts.main([*TINY, *words]) == 2
    assert message in capsys.readouterr().err


def test_data_of_the_user_is_linked_not_written_to(checkouts, tmp_path):
    (tmp_path / "mine" / "dtd" / "split_fewshot").mkdir(parents=True)
    (tmp_path / "mine" / "dtd" / "images").mkdir()
    root = checkouts.mirrored(tmp_path / "mine", tmp_path / "work")
    assert [item.name for item in (root / "dtd").iterdir()] == ["images"]
    (root / "dtd" / "split_fewshot").mkdir()
    assert not list((tmp_path / "mine" / "dtd" / "split_fewshot").iterdir())


@pytest.mark.skipif(not CHECKOUTS, reason="GRAM_CHECKOUTS names no folder of checkouts (CoOp, ProMetaR)")
def test_checkouts_do_the_same_work(checkouts, tmp_path):
    places = Path(CHECKOUTS)
    words = ["--coop", str(places / "CoOp"), "--groups", "coop", "cocoop"]
    if (places / "ProMetaR").is_dir() and (
        importlib.util.find_spec("learn2learn") or (places / "learn2learn").is_dir()
    ):
        words += ["prometar", "--prometar", str(places / "ProMetaR")]
        words += ["--learn2learn", str(places / "learn2learn")] if (places / "learn2learn").is_dir() else []
    out = tmp_path / "out.json"
    assert checkouts.main([*TINY, *words, "--measures", "step", "test", "-o", str(out)]) == 0
    _, tables = rows(out)
    assert all(not table["left_out"] for table in tables.values()), tables
    for group in ("coop", "cocoop"):
        for apart in tables[group]["equal"].values():
            assert apart and max(apart.values()) < 1e-4, apart
