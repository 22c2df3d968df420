"""`gram report` against numbers worked out by hand."""

import csv
import io
import json

import pytest

from gram_meta.cli import main
from gram_meta.errors import GramError
from gram_meta.intervals import half_width, harmonic
from gram_meta.report import build_curve, build_reports, read_runs, render
from gram_meta.report.tables import Missing

T2 = 4.302652729911275  # Student's t, two degrees of freedom, 97.5 %: from a printed table (4.3027), more digits
BASE = {"CoOp": (70.0, 72.0, 74.0), "CoOpGRAM": (71.0, 74.0, 75.0)}
NEW = {"CoOp": (60.0, 61.0, 65.0), "CoOpGRAM": (64.0, 62.0, 66.0)}


def write(folder, trainer="CoOp", dataset="Pets", subsample="base", seed=1, accuracy=50.0, config=None, **more):
    result = {
        "format": 1,
        "trainer": trainer,
        "dataset": dataset,
        "subsample": subsample,
        "shots": 16,
        "seed": seed,
        "backbone": "gram-small",
        "split": "test",
        "eval_only": subsample == "new",
        "model_dir": "elsewhere" if subsample == "new" else "",
        "epoch": 10,
        "metrics": {"accuracy": accuracy, "error_rate": 100 - accuracy, "macro_f1": accuracy - 1},
        "curve": [],
        "meta_checkpoint": {"path": "", "sha256": ""},
        "few_shot": {"path": "", "sha256": f"shots-{dataset}-{seed}"},
        "config": config or {"OPTIM": {"LR": 0.002}, "SEED": seed},
    }
    result.update(more)
    path = folder / dataset / f"{trainer}-{subsample}-{seed}-{len(list(folder.rglob('*')))}" / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))
    return path


@pytest.fixture
def three_seeds(tmp_path):
    for trainer in BASE:
        for seed in (1, 2, 3):
            write(tmp_path, trainer, subsample="base", seed=seed, accuracy=BASE[trainer][seed - 1])
            write(tmp_path, trainer, subsample="new", seed=seed, accuracy=NEW[trainer][seed - 1])
    return tmp_path


def rows_of(folder, reference=None):
    (report,) = build_reports(read_runs([folder]), reference)
    return {(row.dataset, row.label): row for row in report.rows}, report


def test_harmonic_mean():
    assert harmonic(60.0, 30.0) == pytest.approx(40.0)
    assert harmonic(0.0, 0.0) == 0.0


def test_half_width_is_students_t():
    assert half_width([70.0, 72.0, 74.0]) == pytest.approx(T2 * 2 / 3**0.5, rel=1e-9)
    assert half_width([1.0, 2.0]) == pytest.approx(12.706204736 * 0.5**0.5 / 2**0.5, rel=1e-8)
    assert half_width([5.0]) is None


def test_mean_interval_and_h_of_the_averages(three_seeds):
    rows, report = rows_of(three_seeds)
    coop = rows["Pets", "CoOp"].cells
    assert coop["base"].mean == pytest.approx(72.0)
    assert coop["base"].half_width == pytest.approx(4.968275, abs=1e-5)
    assert coop["new"].mean == pytest.approx(62.0)
    assert coop["H"].mean == pytest.approx(2 * 72 * 62 / 134)  # not the mean of the seeds' H (66.6179...)
    assert report.missing == [] and report.notes == []


def test_difference_is_paired_by_seed(three_seeds):
    rows, report = rows_of(three_seeds)
    assert report.reference == "CoOp"
    gain = rows["Pets", "CoOpGRAM"].differences
    # 71-70, 74-72, 75-74 = 1, 2, 1: mean 4/3, s = 0.57735; unpaired the interval would be over 4
    assert gain["base"].mean == pytest.approx(4 / 3)
    assert gain["base"].half_width == pytest.approx(T2 * 0.5773502692 / 3**0.5, rel=1e-8)
    assert gain["new"].mean == pytest.approx((4 + 1 + 1) / 3)
    assert rows["Pets", "CoOp"].differences == {}


def test_average_is_over_datasets_inside_each_seed(three_seeds):
    for seed, accuracy in ((1, 90.0), (2, 80.0), (3, 85.0)):
        write(three_seeds, dataset="Cars", subsample="base", seed=seed, accuracy=accuracy)
        write(three_seeds, dataset="Cars", subsample="new", seed=seed, accuracy=accuracy - 10)
    rows, report = rows_of(three_seeds)
    average = rows["average", "CoOp"].cells
    # base per seed: (70+90)/2, (72+80)/2, (74+85)/2 = 80, 76, 79.5: mean 78.5, s = 2.1794495
    assert average["base"].mean == pytest.approx(78.5)
    assert average["base"].half_width == pytest.approx(T2 * 2.179449472 / 3**0.5, rel=1e-8)
    assert average["H"].mean == pytest.approx(harmonic(78.5, (62.0 + 75.0) / 2))
    assert rows["average", "CoOpGRAM"].cells["base"] is None  # it never ran on Cars
    assert len(report.missing) == 6 and Missing("CoOpGRAM", "Cars", "base", 1) in report.missing


def test_missing_runs_are_shown(three_seeds, capsys):
    lost = next(path for path in three_seeds.rglob("results.json") if "CoOpGRAM-new-2" in str(path))
    lost.unlink()
    assert main(["report", str(three_seeds)]) == 0
    out = capsys.readouterr().out
    assert "missing: CoOpGRAM: Pets, new, seed 2" in out
    assert "65.0 ± 12.7 (2 of 3 seeds)" in out  # of 64 and 66
    rows, _ = rows_of(three_seeds)
    assert rows["Pets", "CoOpGRAM"].cells["H"].mean == pytest.approx(harmonic(73.0, 65.0))  # seeds 1 and 3 of both
    assert rows["Pets", "CoOpGRAM"].differences["new"].mean == pytest.approx((4 + 1) / 2)


def test_runs_without_a_step_stand_for_every_seed(three_seeds):
    start = {"trainer": "CoOpGRAM", "eval_only": True, "model_dir": "", "seed": 1}
    write(three_seeds, subsample="base", accuracy=70.0, **start)
    write(three_seeds, subsample="new", accuracy=66.0, **start)
    zero_shot = {"eval_only": True, "model_dir": "", "config": {"OPTIM": {"LR": 0.1}}}
    write(three_seeds, "ZeroshotCLIP", subsample="base", accuracy=65.0, **zero_shot)
    rows, report = rows_of(three_seeds)
    assert [row.label for row in report.rows] == ["ZeroshotCLIP", "CoOp", "CoOpGRAM", "CoOpGRAM, no step"]
    none = rows["Pets", "CoOpGRAM, no step"]
    assert none.cells["base"].mean == 70.0 and none.cells["base"].half_width is None
    assert none.differences["new"].mean == pytest.approx((6 + 5 + 1) / 3)  # 66 against 60, 61, 65
    assert none.differences["new"].half_width == pytest.approx(T2 * 2.645751311 / 3**0.5, rel=1e-8)
    assert Missing("ZeroshotCLIP", "Pets", "new", 2) in report.missing


def test_variants_are_labelled_by_what_was_trained(tmp_path):
    off = {"TRAINER": {"GRAM": {"INIT": True, "REGULATE": False, "STEP_SCALE": 0.25}}}
    trained = write(tmp_path, "CoOpGRAM", subsample="base", config=off)
    # the evaluation on new classes has default settings; those of the training count
    plain = {"TRAINER": {"GRAM": {"INIT": True, "REGULATE": True, "STEP_SCALE": 1.0}}}
    write(tmp_path, "CoOpGRAM", subsample="new", config=plain, model_dir=str(trained.parent))
    assert {run.label for run in read_runs([tmp_path])} == {"CoOpGRAM, R off and step x 0.25"}


def test_duplicates_are_refused(tmp_path):
    one, two = write(tmp_path, accuracy=1.0), write(tmp_path, accuracy=2.0)
    with pytest.raises(GramError, match="expected one run of CoOp on Pets") as error:
        build_reports(read_runs([tmp_path]))
    assert str(one) in str(error.value) and str(two) in str(error.value)


def test_overlapping_folders_are_no_duplicates(three_seeds):
    assert len(read_runs([three_seeds, three_seeds / "Pets"])) == 12


def test_settings_that_contradict_each_other_are_refused(tmp_path):
    write(tmp_path, seed=1)
    write(tmp_path, seed=2, config={"OPTIM": {"LR": 0.01}})
    with pytest.raises(GramError, match=r"found OPTIM.LR 0.002 in .* and 0.01 in .*--by OPTIM.LR"):
        build_reports(read_runs([tmp_path]))
    labels = {run.label for run in read_runs([tmp_path], by=["OPTIM.LR", "meta-checkpoint"])}
    assert labels == {f"CoOp, OPTIM.LR {rate}, meta-checkpoint none" for rate in (0.002, 0.01)}


def test_a_shipped_meta_checkpoint_has_a_row_of_its_own_beside_others(tmp_path):
    shipped = {"path": "/lib/gram_meta/method/shipped/gram-small-text.safetensors", "sha256": "aa"}
    write(tmp_path / "alone", "CoOpGRAM", meta_checkpoint=shipped)
    assert [run.label for run in read_runs([tmp_path / "alone"])] == ["CoOpGRAM"]
    write(tmp_path / "own", "CoOpGRAM", meta_checkpoint={"path": "meta/best.safetensors", "sha256": "bb"})
    assert sorted(run.label for run in read_runs([tmp_path])) == ["CoOpGRAM", "CoOpGRAM, shipped"]


def test_two_meta_checkpoints_in_one_row_are_refused(tmp_path):
    write(tmp_path, "CoOpGRAM", seed=1, meta_checkpoint={"path": "a", "sha256": "aa"})
    write(tmp_path, "CoOpGRAM", seed=2, meta_checkpoint={"path": "b", "sha256": "bb"})
    with pytest.raises(GramError, match="meta-checkpoint"):
        build_reports(read_runs([tmp_path]))


def test_two_backbones_in_one_table_are_refused(tmp_path):
    write(tmp_path, "CoOp")
    write(tmp_path, "CoOpGRAM", backbone="ViT-B/16")
    with pytest.raises(GramError, match="expected one backbone"):
        build_reports(read_runs([tmp_path]))


def test_other_training_images_are_noted(tmp_path):
    write(tmp_path, "CoOp")
    write(tmp_path, "CoOpGRAM", few_shot={"path": "", "sha256": "others"})
    (report,) = build_reports(read_runs([tmp_path]))
    assert report.notes == ["CoOpGRAM: other training images than CoOp on Pets, seed 1"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "expected JSON"),
        ("[]", "format 1"),
        ('{"format": 2}', "found format 2"),
        ('{"format": 1}', "found no trainer"),
    ],
)
def test_broken_results_are_one_sentence(tmp_path, capsys, text, words):
    (tmp_path / "results.json").write_text(text)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert words in error and "results.json" in error and "Traceback" not in error


def test_an_empty_folder_is_an_error(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "found none" in capsys.readouterr().err


def test_unknown_reference_is_an_error(three_seeds, capsys):
    assert main(["report", str(three_seeds), "--reference", "CoCoOp"]) == 2
    assert "CoOp; CoOpGRAM" in capsys.readouterr().err


def test_formats(three_seeds, capsys):
    rendered = {}
    for form in ("table", "markdown", "csv", "latex", "json"):
        assert main(["report", str(three_seeds), "--format", form]) == 0
        rendered[form] = capsys.readouterr().out
    assert "72.0 ± 5.0" in rendered["table"] and "+1.3 ± 1.4" in rendered["table"]
    assert "\n| dataset" in rendered["markdown"]
    assert "\\toprule" in rendered["latex"]
    (report,) = json.loads(rendered["json"])
    assert report["rows"][0]["cells"]["base"]["mean"] == pytest.approx(72.0)
    lines = list(csv.DictReader(io.StringIO(rendered["csv"])))
    assert float(lines[1]["base_difference"]) == pytest.approx(4 / 3)


def test_all_classes_have_their_own_table(three_seeds):
    write(three_seeds, dataset="Cars", subsample="all", accuracy=33.0)
    two, one = build_reports(read_runs([three_seeds]))
    assert two.columns == ("base", "new", "H") and two.datasets == ("Pets",)
    assert one.columns == ("all",) and "33.0" in render(one)


def test_curve_is_averaged_over_runs(tmp_path):
    for seed, base in ((1, 50.0), (2, 60.0)):
        curve = [{"step": 0, "epoch": 0, "base": base, "new": 40.0}, {"step": 5, "epoch": 1, "base": 70.0, "new": 30.0}]
        write(tmp_path, seed=seed, curve=curve)
    headers, rows = build_curve(read_runs([tmp_path]))
    assert headers == ["trainer", "step", "base", "new", "H", "runs"]
    assert rows[0] == ["CoOp", 0, 55.0, 40.0, pytest.approx(harmonic(55.0, 40.0)), "2"]
    assert rows[1][1:4] == [5, 70.0, 30.0]
