"""gram report --against and --tidy: pairs, differences and the test against scipy and numbers by hand."""

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy import stats

from gram_meta.cli import main
from gram_meta.errors import GramError
from gram_meta.report import compare, read_runs, tidy_rows, write_tidy
from gram_meta.report.against import sign_flip_test

OWN = {("Pets", 1): (70.0, 60.0), ("Pets", 2): (72.0, 61.0), ("Cars", 1): (50.0, 48.0), ("Cars", 3): (51.0, 40.0)}
OURS = {("Pets", 1): (69.0, 62.0), ("Pets", 2): (69.0, 60.0), ("Cars", 1): (49.0, 45.0), ("Cars", 2): (40.0, 40.0)}


def write(folder, trainer, values, **more):
    for (dataset, seed), pair in values.items():
        for subsample, accuracy in zip(("base", "new"), pair, strict=True):
            path = folder / f"{trainer}-{dataset}-{seed}-{subsample}" / "results.json"
            path.parent.mkdir(parents=True)
            result = {
                "format": 1,
                "trainer": trainer,
                "dataset": dataset,
                "subsample": subsample,
                "shots": 16,
                "seed": seed,
                "backbone": "gram-small",
                "split": "test",
                "metrics": {
                    "accuracy": accuracy,
                    "error_rate": 100 - accuracy,
                    "macro_f1": 1.0,
                    "total": 8,
                    "correct": 4,
                },
                "few_shot": {"path": "", "sha256": f"{dataset}-{seed}"},
                **more,
            }
            path.write_text(json.dumps(result))
    return folder


@pytest.fixture
def folders(tmp_path):
    return write(tmp_path / "own", "MyTrainer", OWN), write(tmp_path / "ours", "CoOpGRAM", OURS)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_the_sign_flip_test_is_exact(count):
    values = np.random.default_rng(count).normal(0.5, 1, count)
    expected = np.mean(
        [
            abs(sum(s * v for s, v in zip(signs, values, strict=True))) >= abs(values.sum()) - 1e-9
            for signs in np.array(np.meshgrid(*[[-1, 1]] * count)).reshape(count, -1).T
        ]
    )
    assert sign_flip_test(values) == expected
    if count > 2:
        theirs = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
        assert sign_flip_test(values) == pytest.approx(theirs.pvalue)


def test_of_many_pairs_the_test_is_close_to_scipys():
    values = np.random.default_rng(0).normal(0.25, 1, 40)
    theirs = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=100_000, rng=1)
    assert sign_flip_test(values) == pytest.approx(theirs.pvalue, abs=0.01)
    assert sign_flip_test([0.0] * 40) == 1.0


def test_pairs_are_those_that_both_have(folders):
    own, ours = (read_runs([folder]) for folder in folders)
    found = {it.column: it for it in compare(own, ours)}
    assert list(found) == ["base", "new", "H"]
    differences = {"base": [1.0, 1.0, 3.0], "new": [3.0, -2.0, 1.0]}  # Cars 1, Pets 1, Pets 2
    h = lambda base, new: 2 * base * new / (base + new)  # noqa: E731
    pairs = (("Cars", 1), ("Pets", 1), ("Pets", 2))
    differences["H"] = [h(*OWN[pair]) - h(*OURS[pair]) for pair in pairs]
    for column, values in differences.items():
        it = found[column]
        assert (it.method, it.other, it.pairs, it.datasets) == ("MyTrainer", "CoOpGRAM", 3, 2)
        assert it.difference == pytest.approx(np.mean(values)) and it.wins == sum(v > 0 for v in values)
        assert it.half_width == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem(values))
    assert found["base"].p == 0.25  # 2 of 8 signs: all plus, all minus


def test_zero_shot_stands_for_every_seed_and_no_pair_is_one_sentence(folders, tmp_path, capsys):
    zero = write(tmp_path / "zero", "ZeroshotCLIP", {("Pets", 1): (60.0, 60.0)}, eval_only=True, model_dir="")
    base = next(it for it in compare(read_runs([folders[0]]), read_runs([zero])) if it.column == "base")
    assert base.pairs == 2 and base.difference == pytest.approx(11.0)
    other = write(tmp_path / "other", "CoOp", {("Food", 1): (60.0, 60.0)})
    with pytest.raises(GramError, match=r"such as Cars \(base, seed 1\), found none, but Food"):
        compare(read_runs([folders[0]]), read_runs([other]))
    assert main(["report", str(folders[0]), "--against", str(other)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_two_runs_without_training_are_one_pair_a_dataset(tmp_path):
    """They have no seeds: three copies of one difference would be no evidence. A random start has seeds."""
    free = {"eval_only": True, "model_dir": ""}
    zero = write(tmp_path / "zero", "ZeroshotCLIP", {("Pets", 1): (60.0, 60.0)}, **free)
    write(zero, "CoOp", {("Pets", seed): (50.0, 50.0) for seed in (1, 2, 3)})
    other = write(tmp_path / "other", "ZeroshotCLIP", {("Pets", seed): (58.0, 58.0) for seed in (1, 2)}, **free)
    found = {(it.method, it.column): it for it in compare(read_runs([zero]), read_runs([other]))}
    it = found["ZeroshotCLIP", "base"]
    assert (it.pairs, it.difference, it.half_width, it.p) == (1, 2.0, None, 1.0)
    assert found["CoOp", "H"].pairs == 3
    drawn = {("Pets", 1): (60.0, 60.0), ("Pets", 2): (61.0, 61.0)}
    start = write(tmp_path / "start", "CoOp", drawn, **free, config={"TRAINER": {"COOP": {"CTX_INIT": ""}}})
    found = {(it.other, it.column): it for it in compare(read_runs([start]), read_runs([zero]))}
    assert [found[name, "base"].pairs for name in ("ZeroshotCLIP", "CoOp")] == [2, 2]
    assert found["CoOp", "base"].difference == pytest.approx(10.5)


def test_a_model_of_another_dataset_is_compared_with_zero_shot(tmp_path):
    for seed in (1, 2):
        source = write(tmp_path / "own", "CoOp", {("ImageNet", seed): (70.0, 70.0)})
        trained = source / f"CoOp-ImageNet-{seed}-base"
        write(source, "CoOp", {("Pets", seed): (50.0 + seed, 50.0)}, eval_only=True, model_dir=str(trained))
    zero = write(tmp_path / "zero", "ZeroshotCLIP", {("Pets", 1): (50.0, 50.0)}, eval_only=True, model_dir="")
    base = next(it for it in compare(read_runs([source]), read_runs([zero])) if it.column == "base")
    assert (base.pairs, base.difference) == (2, 1.5)


def test_the_lower_error_rate_is_ahead(folders):
    own, ours = (read_runs([folder], "error_rate") for folder in folders)
    found = {it.column: it for it in compare(own, ours)}
    assert found["base"].difference == pytest.approx(-5 / 3) and found["base"].wins == 3 and found["new"].wins == 2


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"shots": 4}, "Cars: expected one shots, found 16 in .* and 4 in .*--by shots keeps them apart"),
        ({"backbone": "ViT-B/16"}, "Cars: expected one backbone, found 'gram-small' in"),
    ],
)
def test_other_shots_and_backbones_are_not_compared(folders, tmp_path, more, says):
    other = write(tmp_path / "other", "CoOp", OURS, **more)
    with pytest.raises(GramError, match=says):
        compare(read_runs([folders[0]]), read_runs([other]))
    apart = [read_runs([folder], by=list(more)) for folder in (folders[0], other)]
    assert compare(*apart)[0].pairs == 3


def test_two_runs_of_one_thing_are_refused(folders):
    write(folders[0] / "again", "MyTrainer", {("Pets", 1): (70.0, 60.0)})
    with pytest.raises(
        GramError, match=r"expected one run of MyTrainer on Pets \(base classes, seed 1\), found .* and "
    ):
        compare(*(read_runs([folder]) for folder in folders))


def test_datasets_may_be_left_out_of_one_side(folders, tmp_path, capsys):
    write(folders[1], "CoOpGRAM", {("Tuned", 1): (60.0, 60.0)})
    argv = ["report", str(folders[0]), "--against", str(folders[1]), "--format", "csv"]
    assert main([*argv, "--without", "Tuned,Cars"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("MyTrainer,CoOpGRAM,base,2,1,2.0,")
    assert main([*argv, "--datasets", "Tuned"]) == 2
    assert "expected runs on other datasets than those left out, found none" in capsys.readouterr().err
    assert main([*argv, "--tidy", str(tmp_path / "runs.csv")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4 and (tmp_path / "runs.csv").exists()


@pytest.mark.parametrize("option", ["--tidy", "--against"])
def test_a_folder_without_results_is_one_sentence(folders, tmp_path, capsys, option):
    meta = tmp_path / "meta"
    meta.mkdir()
    (meta / "log.jsonl").write_text('{"step": 0, "alignment": 0.5}\n')
    given = {"--tidy": tmp_path / "runs.csv", "--against": folders[1]}[option]
    assert main(["report", str(meta), option, str(given)]) == 2
    assert "expected runs tested on the test split, found none" in capsys.readouterr().err
    assert not (tmp_path / "runs.csv").exists()


def test_the_command_prints_text_csv_and_json(folders, capsys):
    argv = ["report", str(folders[0]), "--against", str(folders[1])]
    assert main([*argv]) == 0
    text = capsys.readouterr().out
    assert "MyTrainer  CoOpGRAM  base    3      2         1.7" in text and "sign-flip test" in text
    assert main([*argv, "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["column"] for row in rows] == ["base", "new", "H"] and float(rows[0]["difference"]) == pytest.approx(
        5 / 3
    )
    assert main([*argv, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["p"] == 0.25


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_tidy_tables(folders, tmp_path, ending):
    path = tmp_path / f"runs{ending}"
    assert main(["report", *map(str, folders), "--tidy", str(path)]) == 0
    expected = tidy_rows(read_runs(folders))
    assert len(expected) == 16 * 3
    if ending == ".parquet":
        assert pq.read_table(path).to_pylist() == expected
    else:
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
        assert rows == [{k: "" if v is None else str(v) for k, v in row.items()} for row in expected]
    one = next(
        row for row in expected if row["folder"].endswith("MyTrainer-Cars-3-new") and row["metric"] == "accuracy"
    )
    assert (one["value"], one["method"], one["seed"], one["few_shot"]) == (40.0, "MyTrainer", 3, "Cars-3")


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_tidy_table_of_hostile_names(tmp_path, ending):
    """A folder whose name is no UTF-8, and a trainer that is a formula with a comma and a line break."""
    folder = Path(os.fsdecode(bytes(tmp_path / "own") + b"\xff"))
    write(folder, "T", {("Pets", 1): (70.0, 60.0)})
    for path in folder.glob("*/results.json"):
        path.write_text(path.read_text().replace('"T"', json.dumps('=HYPERLINK("x"),\n1')))
    path = tmp_path / f"runs{ending}"
    assert write_tidy(read_runs([folder]), path) == 6
    rows = pd.read_csv(path) if ending == ".csv" else pd.read_parquet(path)
    assert len(rows) == 6 and rows["folder"][0].startswith(f"{tmp_path}/own\\xff/T-Pets-1-")
    assert rows["trainer"][0] == {".csv": '\'=HYPERLINK("x"), 1', ".parquet": '=HYPERLINK("x"),\n1'}[ending]


def test_a_tidy_table_of_another_kind_is_one_sentence(folders, tmp_path, capsys):
    assert main(["report", str(folders[0]), "--tidy", str(tmp_path / "runs.xlsx")]) == 2
    assert "expected a file that ends in .csv or .parquet, found .xlsx" in capsys.readouterr().err
