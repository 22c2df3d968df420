"""`gram report` on the logs of CoOp-style checkouts, which have no results.json."""

import json

import pytest

from gram_meta.cli import main
from gram_meta.config import as_dict
from gram_meta.errors import GramError
from gram_meta.report import all_tables, build_reports, gather, read_runs, runs_of, write_collection
from gram_meta.runs.coop_log import read_log

PAPER = {"dataset": "EuroSAT", "backbone": "ViT-B/16", "shots": 16, "epochs": 10, "start": "a photo of a"}


def config_of(
    trainer="CoOp", dataset="Pets", subsample="base", seed=1, shots=16, backbone="gram-small", epochs=10, start=""
):
    from gram_meta import engine
    from gram_meta.engine.options import extend_cfg

    cfg = engine.get_cfg_default()
    extend_cfg(cfg)
    cfg.TRAINER.NAME, cfg.DATASET.NAME, cfg.SEED = trainer, dataset, seed
    cfg.DATASET.SUBSAMPLE_CLASSES, cfg.DATASET.NUM_SHOTS = subsample, shots
    cfg.MODEL.BACKBONE.NAME, cfg.OPTIM.MAX_EPOCH = backbone, epochs
    cfg.TRAINER.COOP.CTX_INIT = cfg.TRAINER.COCOOP.CTX_INIT = start or "a photo of a"
    return cfg


def head(cfg, eval_only=False, model_dir=""):
    """What CoOp's train.py prints before it begins."""
    flags = {"backbone": "", "eval_only": eval_only, "load_epoch": None, "model_dir": model_dir, "seed": cfg.SEED}
    arguments = "\n".join(f"{key}: {value}" for key, value in flags.items())
    return (
        f"***************\n** Arguments **\n***************\n{arguments}\n"
        f"************\n** Config **\n************\n{cfg}\nCollecting env info ...\n"
        "** System info **\nPyTorch version: 2.15.0\nIs debug build: False\n        Pillow (13.0)\n\n"
        f'Loading trainer: {cfg.TRAINER.NAME}\nInitial context: "a photo of a"\n'
    )


def result(correct, total=1008, split="test", f1=50.0, per_class=False):
    """What Dassl's evaluator prints."""
    accuracy = 100 * correct / total
    text = (
        f"Evaluate on the *{split}* set\n=> result\n* total: {total:,}\n* correct: {correct:,}\n"
        f"* accuracy: {accuracy:.1f}%\n* error: {100 - accuracy:.1f}%\n* macro_f1: {f1:.1f}%\n"
    )
    if per_class:
        text += "=> per-class result\n* class: 0 (cat)\ttotal: 10\tcorrect: 3\tacc: 30.0%\n* average: 41.5%\n"
    return text


STEP = "epoch [{0}/10] batch [1/1] time 0.1 (0.1) data 0.0 (0.0) loss 1.0 (1.0) acc 5.0 (5.0) lr 1e-3 eta 0:00:00\n"


def write(folder, text, name="log.txt"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder


def trained(folder, correct, **config):
    """A training as CoOp's scripts name its folder, and its test at the end."""
    cfg = config_of(**config)
    done = "Finish training\nDeploy the last-epoch model\n"
    return write(folder, head(cfg) + STEP.format(cfg.OPTIM.MAX_EPOCH) + done + result(correct) + "Elapsed: 0:00:14\n")


def evaluated(folder, correct, model_dir, **config):
    load = f'Loading weights to prompt_learner from "{model_dir}/model.pth.tar-10" (epoch = 10)\n'
    return write(folder, head(config_of(**config), True, model_dir) + load + result(correct))


def base_and_new(root, trainer="CoOp", seeds=(1, 2), correct=(700, 500), **config):
    for seed in seeds:
        tail = f"{config.get('dataset', 'Pets')}/shots_16/{trainer}/cfg/seed{seed}"
        where = root / "base2new" / "train_base" / tail
        trained(where, correct[0] + seed, trainer=trainer, seed=seed, **config)
        new = root / "base2new" / "test_new" / tail
        evaluated(new, correct[1] + seed, where, trainer=trainer, seed=seed, subsample="new", **config)


def rows_of(folder):
    (report,) = build_reports(read_runs([folder]))
    return {row.label: row for row in report.rows if row.dataset != "average"}, report


def test_a_printed_config_is_read_back_whole(tmp_path):
    cfg = config_of(start="a photo of a", backbone="ViT-B/16")
    cfg.INPUT.TRANSFORMS = ("random_resized_crop", "normalize")
    log = read_log(write(tmp_path, head(cfg)) / "log.txt")
    assert log.config == as_dict(cfg)
    assert log.arguments["eval_only"] is False and log.arguments["load_epoch"] is None and log.final is None
    stripped = "\n".join(line.rstrip() for line in head(cfg).splitlines())  # as editors and mails leave it
    assert read_log(write(tmp_path / "2", stripped) / "log.txt").config == log.config


def test_accuracies_are_exact_and_rows_say_where_they_come_from(tmp_path):
    base_and_new(tmp_path)
    rows, report = rows_of(tmp_path)
    cells = rows["CoOp, from a log"].cells
    assert cells["base"].mean == pytest.approx(100 * 701.5 / 1008) and cells["base"].seeds == 2
    assert cells["new"].mean == pytest.approx(100 * 501.5 / 1008)
    assert report.seeds == (1, 2) and report.missing == []
    assert report.notes == ["CoOp, from a log: accuracy from the log's counts"]
    runs = read_runs([tmp_path], metric="macro_f1")
    assert {run.value for run in runs} == {50.0}
    assert build_reports(runs)[0].notes == ["CoOp, from a log: macro_f1 as the log prints it, rounded to one decimal"]
    assert {(run.source, run.shots, run.epochs, run.backbone) for run in runs} == {("Pets", 16, 10, "gram-small")}


def test_without_counts_the_printed_number_counts_and_is_noted_as_rounded(tmp_path):
    text = (
        head(config_of(subsample="all"), eval_only=True, model_dir="")
        + "=> result\n* accuracy: 61.2%\n* error: 38.8%\n"
    )
    write(tmp_path / "seed1", text)
    (run,) = read_runs([tmp_path])
    assert run.value == 61.2 and run.remark == "as the log prints it, rounded to one decimal"
    assert run.label == "CoOp, no step, from a log" and run.untrained


def test_the_papers_numbers_stand_beside_equal_conditions_only(tmp_path):
    base_and_new(tmp_path / "same", **PAPER)
    (table,) = all_tables(read_runs([tmp_path / "same"]))
    (row,) = [row for row in table.rows if row.label == "CoOp, from a log"]
    assert table.number == 1 and set(row.paper) == {"base", "new", "H"}
    base_and_new(tmp_path / "longer", **{**PAPER, "epochs": 50})
    base_and_new(tmp_path / "random", **{**PAPER, "start": " "})
    for other in ("longer", "random"):
        for table in all_tables(read_runs([tmp_path / other])):
            assert not any(row.paper for row in table.rows)


def test_logs_and_results_of_ours_stand_in_one_table(tmp_path):
    base_and_new(tmp_path)
    ours = {
        "format": 1,
        "trainer": "CoOpGRAM",
        "dataset": "Pets",
        "shots": 16,
        "seed": 1,
        "backbone": "gram-small",
        "split": "test",
        "metrics": {"accuracy": 80.0},
        "model_dir": "",
        "eval_only": False,
        "config": {},
    }
    for trainer in ("CoOp", "CoOpGRAM"):
        for subsample in ("base", "new"):
            for seed in (1, 2):
                where = write(tmp_path / f"{trainer}-{subsample}-{seed}", head(config_of()) + result(1))
                (where / "results.json").write_text(
                    json.dumps({**ours, "trainer": trainer, "subsample": subsample, "seed": seed})
                )  # beside a log: the log is not looked at
    rows, report = rows_of(tmp_path)
    assert set(rows) == {"CoOp", "CoOpGRAM", "CoOp, from a log"} and report.reference == "CoOp"
    assert rows["CoOp"].cells["base"].mean == 80.0
    assert rows["CoOp, from a log"].differences["base"].mean == pytest.approx(100 * 701.5 / 1008 - 80)
    logs_only = [run for run in read_runs([tmp_path]) if "log" in run.label or run.trainer != "CoOp"]
    assert build_reports(logs_only)[0].reference == "CoOp, from a log"  # where there is no other CoOp


def test_unfinished_runs_are_left_out_and_named(tmp_path, capsys):
    base_and_new(tmp_path, seeds=(1,))
    cut = head(config_of(seed=2)) + STEP.format(3) + result(9, split="val")
    write(tmp_path / "seed2", cut)
    write(
        tmp_path / "seed3",
        head(config_of(seed=3)) + "Finish training\nEvaluate on the *test* set\n=> result\n* total: 9\n",
    )
    assert main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("the log of a run that has not finished") == 2 and "seed2/log.txt" in printed.err
    assert "seed 2" not in printed.out
    with pytest.raises(GramError, match="found none; 1 logs of runs that have not finished"):
        gather([tmp_path / "seed2"])
    (tmp_path / "nothing").mkdir()
    write(tmp_path / "nothing", "just a log of something else\n* accuracy: 9.0%\n")
    with pytest.raises(GramError, match="log.txt, in or below this folder, found none$"):
        gather([tmp_path / "nothing"])


def test_a_run_that_went_on_in_a_second_log_is_one_run(tmp_path):
    where = tmp_path / "seed1"
    write(where, head(config_of()) + STEP.format(4))
    done = head(config_of()) + STEP.format(10) + "Finish training\n" + result(600)
    write(where, done, "log.txt-2026-01-02-03-04-05")
    (run,) = read_runs([tmp_path])
    assert run.value == pytest.approx(100 * 600 / 1008) and run.result["log"]["file"].startswith("log.txt-2026")


def test_a_log_that_was_added_to_counts_its_last_run(tmp_path):
    first = head(config_of()) + STEP.format(4) + result(3, split="val")
    write(tmp_path, first + head(config_of()) + STEP.format(10) + "Finish training\n" + result(600))
    (run,) = read_runs([tmp_path])
    assert run.value == pytest.approx(100 * 600 / 1008)
    write(tmp_path, head(config_of()) + "Finish training\n" + result(600) + first)  # begun anew, not finished
    with pytest.raises(GramError, match="1 logs of runs that have not finished"):
        read_runs([tmp_path])


def test_several_results_and_per_class_ones(tmp_path):
    text = head(config_of()) + result(900, split="val") + STEP.format(10) + "Finish training\n"
    write(tmp_path, text + result(500, per_class=True))
    (run,) = read_runs([tmp_path])
    assert run.value == pytest.approx(100 * 500 / 1008)
    assert run.result["metrics"]["perclass_accuracy"] == 41.5 and run.result["epoch"] == 10
    only_val = head(config_of(seed=2)) + "Finished training\n" + result(400, split="val")
    write(tmp_path / "val", only_val)
    assert [run.seed for run in read_runs([tmp_path], split="val")] == [2]


def test_a_test_elsewhere_is_labelled_by_what_was_trained(tmp_path):
    for shots in (16, -1):  # cross-dataset scripts of CoOp name no shots at test
        root = tmp_path / str(shots)
        source = root / "imagenet" / "CoCoOp" / "cfg_16shots" / "seed1"
        trained(source, 700, trainer="CoCoOp", dataset="ImageNet", subsample="all")
        target = root / "evaluation" / "CoCoOp" / "cfg_16shots" / "dtd" / "seed1"
        evaluated(target, 450, source, trainer="CoCoOp", dataset="DescribableTextures", subsample="all", shots=shots)
        (test,) = [run for run in read_runs([root]) if run.dataset != "ImageNet"]
        assert (test.source, test.shots, test.transferred) == ("ImageNet", 16, True)
        (alone,) = read_runs([root / "evaluation"])  # the training is not asked for, but found beside the model
        assert (alone.source, alone.shots) == ("ImageNet", 16)


def test_maples_family(tmp_path):
    for seed, trainer in enumerate(("MaPLe", "PromptSRC", "VPT"), 1):
        cfg = config_of(trainer, seed=seed)
        if trainer == "VPT":
            cfg.TRAINER.VPT.PROMPT_DEPTH_VISION = 12  # MaPLe's: not the one here
        write(tmp_path / trainer, head(cfg) + STEP.format(5) + "Finish training\n" + result(600))
    labels = {run.label for run in read_runs([tmp_path])}
    assert labels == {"MaPLe, from a log", "PromptSRC, from a log", "VPT, prompts in 12 layers, from a log"}


def test_zero_shot_logs_stand_for_every_seed(tmp_path):
    base_and_new(tmp_path)
    for subsample, correct in (("base", 600), ("new", 550)):
        text = head(config_of("ZeroshotCLIP", subsample=subsample, shots=-1), eval_only=True) + result(correct)
        write(tmp_path / "zs" / subsample, text)
    rows, report = rows_of(tmp_path)
    zero_shot = rows["ZeroshotCLIP, from a log"].cells
    assert zero_shot["base"].mean == pytest.approx(100 * 600 / 1008) and zero_shot["base"].seeds == 2
    assert report.missing == [] and report.reference == "CoOp, from a log"


def test_logs_go_into_collections_and_pages(tmp_path):
    base_and_new(tmp_path / "out")
    evidence = gather([tmp_path / "out"])
    write_collection(evidence, tmp_path / "all.json")
    again = runs_of(gather([tmp_path / "all.json"]))
    assert [(run.label, run.value, run.source) for run in again] == [
        (run.label, run.value, run.source) for run in runs_of(evidence)
    ]
    assert main(["report", str(tmp_path / "out"), "--html", str(tmp_path / "page.html")]) == 0
    assert "CoOp, from a log" in (tmp_path / "page.html").read_text()
