"""The paper's tables, figures and page from trees of results that these tests write, against numpy and scipy."""

import base64
import copy
import csv
import hashlib
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.html import Page
from scipy import stats

from gram_meta.cli import main
from gram_meta.errors import GramError
from gram_meta.intervals import Estimate
from gram_meta.report import all_tables, gather, paper, paper_tables, read_runs, runs_of
from gram_meta.report.figures import draw
from gram_meta.report.html.page import page
from gram_meta.report.tables import Report, Row
from gram_meta.report.text import escape_latex, render

SEEDS = (1, 2, 3)
NODES = {"CoOp": "COOP", "CoOpGRAM": "COOP", "VPT": "VPT", "VPTGRAM": "VPT", "JointPrompt": "JOINT", "UniGRAM": "JOINT"}
META = {
    "TASKS.DOMAIN_SHIFT": True,
    "REGULATOR.ENABLED": True,
    "OUTER.META": True,
    "CHC.LABELLED": False,
    "PROMPT.TEXT_TOKENS": 2,
    "PROMPT.VISUAL_TOKENS": 2,
    "PROMPT.CONDITIONAL": False,
}
ABLATIONS = {
    "1": {"TASKS.DOMAIN_SHIFT": False},
    "2": {"REGULATOR.ENABLED": False},
    "3": {"OUTER.META": False},
    "4": {"CHC.LABELLED": True},
}


class Tree:
    """Writes results.json files in CoOp's folders, and remembers the accuracies."""

    def __init__(self, root, backbone="gram-small"):
        self.root, self.backbone = root, backbone
        self.random = np.random.default_rng(0)
        self.values = {}  # (name of the row, dataset, subsample, shots, seed) -> accuracy

    def write(self, folder, trainer, dataset, subsample, seed, shots=16, model="", name="", meta=None, **change):
        accuracy = float(self.random.uniform(40, 90))
        config_shots = change.pop("config_shots", shots)
        config = {
            "OUTPUT_DIR": str(self.root / folder),
            "SEED": seed,
            "DATASET": {
                "NAME": dataset,
                "ROOT": "/elsewhere/data",
                "NUM_SHOTS": config_shots,
                "SUBSAMPLE_CLASSES": subsample,
            },
            "OPTIM": {"MAX_EPOCH": change.pop("epochs", 10), "LR": change.pop("lr", 0.002)},
            "TRAINER": {
                "COOP": {"CTX_INIT": change.pop("start", "a photo of a"), "N_CTX": 4},
                "VPT": {"CTX_INIT": "a photo of a", "VISUAL_INIT": change.get("visual", "random")},
                "JOINT": {
                    "N_CTX_TEXT": 2,
                    "N_CTX_VISION": 2,
                    "CTX_INIT": "a photo",
                    "VISUAL_INIT": change.pop("visual", "random"),
                },
                "GRAM": {"INIT": True, "REGULATE": change.pop("regulate", True), "META": name},
            },
        }
        result = {
            "format": 1,
            "trainer": trainer,
            "dataset": dataset,
            "subsample": subsample,
            "shots": config_shots,
            "seed": seed,
            "backbone": self.backbone,
            "split": "test",
            "eval_only": bool(model) or trainer == "ZeroshotCLIP",
            "model_dir": str(self.root / model) if model else "",
            "epoch": 10,
            "metrics": {"accuracy": accuracy, "error_rate": 100 - accuracy, "macro_f1": accuracy / 2},
            "curve": change.pop("curve", []),
            "meta_checkpoint": meta or {"path": "", "sha256": ""},
            "few_shot": {
                "path": f"/elsewhere/{dataset}.json",
                "sha256": hashlib.sha256(f"{seed}".encode()).hexdigest(),
            },
            "config": config,
            "versions": {"python": "3.11", "torch": "2.15"},
            "seconds": {"train": 1.5, "test": 0.25},
        }
        result.update(change)
        path = self.root / folder / "results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(result))
        self.values[name or trainer, dataset, subsample, shots, seed] = accuracy
        return path

    def base_to_new(self, trainer, datasets, seeds=SEEDS, shots=16, cfg="cfg", **more):
        for dataset in datasets:
            for seed in seeds:
                tail = f"{dataset.lower()}/shots_{shots}/{trainer}/{cfg}/seed{seed}"
                base, new = f"base2new/train_base/{tail}", f"base2new/test_new/{tail}"
                zero_shot = trainer == "ZeroshotCLIP"
                self.write(base, trainer, dataset, "base", seed, shots, **copy.deepcopy(more))
                more_new = {key: value for key, value in more.items() if key != "curve"}
                self.write(new, trainer, dataset, "new", seed, shots, "" if zero_shot else base, **more_new)

    def transfer(self, trainer, source, targets, shots, seeds=SEEDS, **more):
        for seed in seeds:
            trained = f"{source.lower()}/{trainer}/cfg_{shots}shots/seed{seed}"
            self.write(trained, trainer, source, "all", seed, shots, **more)
            for target in targets:
                folder = f"evaluation/{trainer}/cfg_{shots}shots/{target.lower()}/seed{seed}"
                self.write(folder, trainer, target, "all", seed, shots, trained, config_shots=-1, **more)

    def of(self, name, dataset, subsample, shots=16, seeds=SEEDS):
        return np.array([self.values[name, dataset, subsample, shots, seed] for seed in seeds])


def half_width(values):
    return stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


def same(cell, values):
    assert cell.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert cell.half_width == pytest.approx(half_width(values), rel=1e-9)


def meta(name, folder="/elsewhere/meta", **settings):
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    return {"path": f"{folder}/{name}/best.safetensors", "sha256": sha256, "settings": META | settings}


def curve(rise, fall, epochs=10, noise=0.0):
    return [
        {"step": 9 * e, "epoch": float(e), "base": 60 + rise * e + noise, "new": 60 - fall * e - noise}
        for e in range(epochs + 1)
    ]


PAIRS = ("EmojiFaces", "EmojiFood")
TARGETS = {"xd": ("EmojiFaces", "EmojiFood"), "dg": ("EmojiTravelHalftone", "EmojiTravelShadow")}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """All seven tables on a small world, and what the figures need."""
    tree = Tree(tmp_path_factory.mktemp("results") / "output")
    for trainer in ("CoOp", "VPT", "JointPrompt"):
        tree.base_to_new(trainer, PAIRS, curve=curve(1.0, 0.5) if trainer == "CoOp" else [])
    tree.base_to_new("CoOp", PAIRS, cfg="random", start="", name="random")
    tree.base_to_new("CoOp", PAIRS[:1], cfg="long", epochs=50, name="long", curve=curve(0.1, 0.2, 50))
    checkpoint = meta("coop", str(tree.root / "meta"))
    tree.base_to_new("CoOpGRAM", PAIRS, meta=checkpoint, curve=curve(1.5, 0.1))
    tree.base_to_new("CoOpGRAM", PAIRS, cfg="off", regulate=False, meta=checkpoint, name="off")
    tree.base_to_new("UniGRAM", PAIRS, meta=meta("unigram"))
    for row, settings in ABLATIONS.items():
        regulate = row not in ("2", "3")
        tree.base_to_new("UniGRAM", PAIRS, cfg=f"a{row}", meta=meta(row, **settings), name=row, regulate=regulate)
    for half in (1, 3, 4):
        counts = {"PROMPT.TEXT_TOKENS": half, "PROMPT.VISUAL_TOKENS": half}
        tree.base_to_new("UniGRAM", PAIRS, cfg=f"c{half}", meta=meta(f"c{half}", **counts), name=f"{2 * half} tokens")
    tree.base_to_new("ZeroshotCLIP", PAIRS, seeds=(1,))
    for shots in (16, 4):
        for trainer in ("CoOp", "UniGRAM"):
            more = {"meta": meta("unigram")} if trainer == "UniGRAM" else {}
            tree.transfer(trainer, "EmojiTravel", [*TARGETS["xd"], *TARGETS["dg"]], shots, **more)
    for dataset in ("EmojiTravel", *TARGETS["xd"], *TARGETS["dg"]):
        tree.write(f"evaluation/ZeroshotCLIP/{dataset.lower()}", "ZeroshotCLIP", dataset, "all", 1)
    folder = tree.root / "meta" / "coop"
    folder.mkdir(parents=True)
    (folder / "best.safetensors").write_bytes(b"coop")
    (folder / "run.json").write_text(json.dumps({"config": {"SEED": 1, "OUTER": {"STEPS": 100}}, "topics": 7}))
    rows = [
        {"step": s, "loss_before": 2.0, "loss_after": 1.9 - s / 1000, "alignment": 0.3 + s / 1000, "alignment_raw": 0.3}
        for s in (0, 50, 100)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tree


def table(tree, number, **more):
    (report,) = paper_tables(read_runs([tree.root]), [number], **more)
    return report, {(row.dataset, row.label): row for row in report.rows}


# ---------------------------------------------------------------------------------------------- which runs, and numbers


@pytest.mark.parametrize("trainer", ["CoOp", "CoOpGRAM", "VPT", "UniGRAM", "JointPrompt"])
def test_table_1_against_numpy(world, trainer):
    _, rows = table(world, 1)
    for members, name in (((PAIRS[0],), PAIRS[0]), ((PAIRS[1],), PAIRS[1]), (PAIRS, "average")):
        of = {
            who: [np.mean([world.of(who, d, part) for d in members], axis=0) for part in ("base", "new")]
            for who in (trainer, "CoOp")
        }
        row = rows[name, trainer]
        base, new = of[trainer]
        same(row.cells["base"], base)
        same(row.cells["new"], new)
        assert row.cells["H"].mean == pytest.approx(stats.hmean([base.mean(), new.mean()]), rel=1e-12)
        assert row.cells["H"].half_width == pytest.approx(half_width(stats.hmean([base, new])), rel=1e-9)
        if trainer != "CoOp":
            same(row.differences["new"], new - of["CoOp"][1])
            same(row.differences["H"], stats.hmean([base, new]) - stats.hmean(of["CoOp"]))


def test_table_1_has_the_papers_rows_in_its_order(world):
    report, rows = table(world, 1)
    assert report.labels == [*paper.TRAINERS, "JointPrompt"]
    assert rows["average", "CoCoOp"].cells == {"base": None, "new": None, "H": None}
    assert not any(row.paper for row in report.rows)  # gram-small
    (first, *_) = all_tables(read_runs([world.root]))
    assert first.number == 1 and "CoCoOp" not in first.labels and "UniGRAM" in first.labels


@pytest.mark.parametrize(("number", "kind", "shots"), [(2, "dg", 16), (3, "xd", 16), (4, "dg", 4), (5, "xd", 4)])
def test_transfer_tables_against_numpy(world, number, kind, shots):
    report, rows = table(world, number)
    targets = TARGETS[kind]
    assert report.datasets == ("EmojiTravel", *targets)
    for trainer in ("CoOp", "UniGRAM"):
        for place in report.datasets:
            same(rows[place, trainer].cells["all"], world.of(trainer, place, "all", shots))
        average = np.mean([world.of(trainer, target, "all", shots) for target in targets], axis=0)
        same(rows["average", trainer].cells["all"], average)  # without the source
    gain = world.of("UniGRAM", targets[0], "all", shots) - world.of("CoOp", targets[0], "all", shots)
    same(rows[targets[0], "UniGRAM"].differences["all"], gain)


def test_zero_shot_has_one_value_for_all_seeds_and_shots(world):
    for number in (2, 4):
        _, rows = table(world, number)
        cell = rows["EmojiTravelShadow", "ZeroshotCLIP"].cells["all"]
        assert cell.mean == world.values["ZeroshotCLIP", "EmojiTravelShadow", "all", 16, 1]
        assert cell.half_width is None and cell.seeds == cell.expected == 3
    _, rows = table(world, 1)
    difference = rows["EmojiFood", "ZeroshotCLIP"].differences["base"]
    zero = world.values["ZeroshotCLIP", "EmojiFood", "base", 16, 1]
    same(difference, zero - world.of("CoOp", "EmojiFood", "base"))


@pytest.mark.parametrize(("number", "reference"), [(6, "0 UniGRAM"), (7, "4 tokens (2+2)")])
def test_ablations_and_tokens(world, number, reference):
    report, rows = table(world, number)
    named = {
        6: {"0": "UniGRAM", "1": "1", "2": "2", "3": "3", "4": "4", "5": "JointPrompt"},
        7: {"2": "2 tokens", "4": "UniGRAM", "6": "6 tokens", "8": "8 tokens"},
    }[number]
    assert report.reference == reference and [label[0] for label in report.labels] == list(named)
    full = np.mean([world.of("UniGRAM", d, "new") for d in PAIRS], axis=0)
    for label in report.labels:
        new = np.mean([world.of(named[label[0]], d, "new") for d in PAIRS], axis=0)
        same(rows["average", label].cells["new"], new)
        if label != reference:
            same(rows["average", label].differences["new"], new - full)
    shown = render(report).splitlines()
    assert len(shown[2:4]) == 2 and "EmojiFood " not in "\n".join(shown[: 4 + len(named)])  # averages alone


def test_ablations_are_averaged_where_they_ran(tmp_path):
    tree = Tree(tmp_path)
    tree.base_to_new("UniGRAM", PAIRS, meta=meta("unigram"))
    tree.base_to_new("UniGRAM", PAIRS[:1], cfg="a1", meta=meta("1", **ABLATIONS["1"]), name="1")
    reports = {report.number: report for report in all_tables(read_runs([tmp_path]))}
    assert reports[6].datasets == PAIRS[:1] and "without EmojiFood" in reports[6].notes[0]
    assert set(reports) == {1, 6} and reports[1].labels == ["UniGRAM"]


def test_uni_gram_without_its_regulator_downstream_is_no_row_of_table_6(tmp_path):
    tree = Tree(tmp_path)
    tree.base_to_new("UniGRAM", PAIRS, meta=meta("unigram"))
    tree.base_to_new("UniGRAM", PAIRS, cfg="off", meta=meta("unigram"), name="off", regulate=False)
    tree.base_to_new("UniGRAM", PAIRS, cfg="a2", meta=meta("2", **ABLATIONS["2"]), name="2", regulate=False)
    for number in (6, 7):
        _, rows = table(tree, number)
        full = rows["average", {6: "0 UniGRAM", 7: "4 tokens (2+2)"}[number]].cells["new"]
        same(full, np.mean([tree.of("UniGRAM", d, "new") for d in PAIRS], axis=0))
    _, rows = table(tree, 6)
    same(
        rows["average", "2 UniGRAM, no regulator"].cells["new"],
        np.mean([tree.of("2", d, "new") for d in PAIRS], axis=0),
    )
    assert "UniGRAM, R off" in all_tables(read_runs([tmp_path]))[-1].labels


def test_joint_prompts_alone_are_no_ablation(tmp_path):
    tree = Tree(tmp_path)
    tree.base_to_new("JointPrompt", PAIRS)
    assert [report.number for report in all_tables(read_runs([tmp_path]))] == [1]
    tree.base_to_new("UniGRAM", PAIRS, meta=meta("unigram"))
    assert [report.number for report in all_tables(read_runs([tmp_path]))] == [1, 6]
    _, rows = table(tree, 6)
    assert rows["average", "1 UniGRAM, no domain shift"].cells["new"] is None


def test_every_run_stands_somewhere(world):
    reports = all_tables(read_runs([world.root]))
    assert [report.number for report in reports] == [1, 2, 3, 4, 5, 6, 7, 0]
    assert reports[-1].labels == ["CoOp", "CoOp, 50 epochs", "CoOp, random start", "CoOpGRAM, R off"]
    assert reports[-1].missing and all(one.label == "CoOp, 50 epochs" for one in reports[-1].missing)


def test_another_start_of_the_visual_prompt_has_a_row_of_its_own(tmp_path):
    tree = Tree(tmp_path)
    for trainer in ("VPT", "JointPrompt"):
        tree.base_to_new(trainer, PAIRS)
        tree.base_to_new(trainer, PAIRS, cfg="class_token", visual="class_token", name=f"{trainer}, class token")
    started = [f"{trainer}, start from the class token" for trainer in ("VPT", "JointPrompt")]
    reports = all_tables(read_runs([tmp_path]))
    assert [list(report.labels) for report in reports] == [["VPT", "JointPrompt"], sorted(started)]


@pytest.mark.parametrize("same", [True, False])
def test_zero_shot_beside_transfers_of_16_and_of_4_shots_is_one_run(tmp_path, same):
    """The bench tests it in the folder of each number of shots; two results that differ are refused."""
    tree, values = Tree(tmp_path), []
    for shots in (16, 4):
        tree.transfer("CoOp", "EmojiTravel", ["EmojiFood"], shots, seeds=(1,))
        for dataset in ("EmojiTravel", "EmojiFood"):
            folder = f"evaluation/ZeroshotCLIP/cfg_{shots}shots/{dataset.lower()}/seed1"
            path = tree.write(folder, "ZeroshotCLIP", dataset, "all", 1, -1)
            result = json.loads(path.read_text())
            values.append(result["metrics"]["accuracy"])
            result["metrics"]["accuracy"] = 50.0 if same else values[-1]
            path.write_text(json.dumps(result))
    if same:
        reports = all_tables(read_runs([tmp_path]))
        assert [report.number for report in reports] == [3, 5]
        for report in reports:
            cells = [row.cells["all"] for row in report.rows if row.label == "ZeroshotCLIP"]
            assert {cell.mean for cell in cells} == {50.0} and len(cells) == 3  # source, target, average
    else:
        with pytest.raises(GramError, match="expected one run of ZeroshotCLIP on Emoji"):
            all_tables(read_runs([tmp_path]))


def test_other_shots_and_plain_datasets_have_tables_of_their_own(tmp_path):
    tree = Tree(tmp_path)
    tree.base_to_new("CoOp", PAIRS, shots=8)
    tree.transfer("CoOp", "EmojiTravel", ["EmojiFood"], 2)
    tree.transfer("CoOp", "EmojiFaces", [], 16)
    tree.base_to_new("ZeroshotCLIP", PAIRS, seeds=(1,))
    titles = [report.title for report in all_tables(read_runs([tmp_path]))]
    assert titles == [
        "Base-to-new, 8 shots (gram-small)",
        "cross-dataset generalisation, 2 shots, trained on EmojiTravel (gram-small)",
        "All classes (gram-small)",
    ]


def test_start_prompts_without_a_step_stand_with_the_runs_of_their_shots(tmp_path):
    more = {"meta": meta("coop"), "few_shot": {}}
    for shots, titles in ((2, ["Base-to-new, 2 shots"]), (16, ["Table 1: base-to-new", "Controls and variants"])):
        tree = Tree(tmp_path / str(shots))
        tree.base_to_new("ZeroshotCLIP", PAIRS[:1], (1,))
        tree.base_to_new("CoOp", PAIRS[:1], (1, 2), shots)
        tree.base_to_new("CoOpGRAM", PAIRS[:1], (1, 2), shots, **more)
        for part in ("base", "new"):
            tree.write(f"start/{part}", "CoOpGRAM", PAIRS[0], part, 1, shots, eval_only=True, name="start", **more)
        reports = all_tables(read_runs([tree.root]))
        assert all(report.title.startswith(title) for report, title in zip(reports, titles, strict=True))
        labels = [label for report in reports for label in report.labels if label != "CoOp"]
        assert labels == ["ZeroshotCLIP", "CoOpGRAM", "CoOpGRAM, no step"]
        assert all(report.missing == [] and report.notes == [] for report in reports)


def test_a_start_tested_without_a_word_on_shots_is_shown(tmp_path):
    tree = Tree(tmp_path)
    for part in ("base", "new"):
        more = {"eval_only": True, "name": "start", "meta": meta("coop"), "few_shot": {}}
        tree.write(f"start/{part}", "CoOpGRAM", PAIRS[0], part, 1, -1, **more)
    (report,) = all_tables(read_runs([tree.root]))
    assert list(report.labels) == ["CoOpGRAM, no step"]


def test_folders_of_own_images_are_different_datasets(tmp_path):
    tree = Tree(tmp_path)
    for folder in ("birds", "boats"):
        for part in ("base", "new"):
            path = tree.write(f"{folder}/{part}", "CoOp", "ImageFolder", part, 1)
            result = json.loads(path.read_text())
            result["config"]["DATASET"]["FOLDER"] = folder
            path.write_text(json.dumps(result))
    report, _ = table(tree, 1)
    assert report.datasets == ("ImageFolder birds", "ImageFolder boats") and report.notes == []


@pytest.mark.slow
def test_a_moved_tree_still_finds_its_trainings(world, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(world.root, moved)
    for path in moved.rglob("results.json"):  # model_dir names folders that are gone
        path.write_text(path.read_text().replace(str(world.root), "/gone/output"))
    for number in (1, 3, 4):
        one, other = table(world, number)[0], paper_tables(read_runs([moved]), [number])[0]
        assert one.rows == other.rows


# ------------------------------------------------------------------------------------------------- missing and mixed up


def test_missing_runs_are_listed(tmp_path, capsys):
    tree = Tree(tmp_path)
    for trainer in ("CoOp", "VPT"):
        tree.transfer(trainer, "EmojiTravel", TARGETS["xd"], 4)
    for seed in SEEDS:
        shutil.rmtree(tmp_path / f"evaluation/VPT/cfg_4shots/emojifood/seed{seed}")
    shutil.rmtree(tmp_path / "evaluation/CoOp/cfg_4shots/emojifaces/seed2")
    report, rows = table(tree, 5)
    assert rows["EmojiFood", "VPT"].cells["all"] is None and rows["average", "VPT"].cells["all"] is None
    assert rows["EmojiFaces", "CoOp"].cells["all"].seeds == 2
    same(
        rows["EmojiFaces", "VPT"].differences["all"],
        (tree.of("VPT", "EmojiFaces", "all", 4, (1, 3)) - tree.of("CoOp", "EmojiFaces", "all", 4, (1, 3))),
    )
    assert main(["report", str(tmp_path), "--table", "5"]) == 0
    out = capsys.readouterr().out
    assert "missing: VPT: EmojiFood, seeds 1, 2, 3\n" in out
    assert "missing: CoOp: EmojiFaces, seed 2\n" in out
    assert "missing: UniGRAM: EmojiTravel, EmojiFaces, EmojiFood, seeds 1, 2, 3\n" in out
    assert main(["report", str(tmp_path)]) == 0
    assert "UniGRAM" not in capsys.readouterr().out  # absent trainers only where the table was asked for


def test_a_table_without_runs_is_one_sentence(world, capsys, tmp_path):
    tree = Tree(tmp_path)
    tree.base_to_new("CoOp", PAIRS, seeds=(1,))
    assert main(["report", str(tmp_path), "--table", "4"]) == 2
    assert "expected runs of Table 4 (cross-domain generalisation, 4 shots), found none" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--table", "all"]) == 0
    assert "no runs of Table 2, 3, 4, 5, 6, 7" in capsys.readouterr().err


def test_mixed_up_transfers_are_refused(tmp_path):
    tree = Tree(tmp_path)
    tree.transfer("CoOp", "EmojiTravel", ["EmojiFood"], 16, seeds=(1,))
    trained = "emojitravel/CoOp/cfg_16shots/seed1"
    tree.write("again", "CoOp", "EmojiFood", "all", 1, 16, trained)
    with pytest.raises(GramError, match="expected one run of CoOp on EmojiFood"):
        all_tables(read_runs([tmp_path]))
    shutil.rmtree(tmp_path / "again")
    tree.write("emojitravel/CoOp/other/seed2", "CoOp", "EmojiTravel", "all", 2, 16, lr=0.1)
    with pytest.raises(GramError, match="found OPTIM.LR 0.002 in"):
        all_tables(read_runs([tmp_path]))


def test_datasets_can_be_chosen(world, capsys):
    assert main(["report", str(world.root), "--without", "EmojiFood", "--table", "1", "--format", "json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["datasets"] == ["EmojiFaces"]
    assert main(["report", str(world.root), "--datasets", "EmojiFod"]) == 2
    assert "--datasets EmojiFod: expected one of EmojiFaces, EmojiFood" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- the paper's


@pytest.fixture(scope="module")
def eleven(tmp_path_factory):
    tree = Tree(tmp_path_factory.mktemp("eleven"), "ViT-B/16")
    for trainer in ("CoOp", "UniGRAM"):
        tree.base_to_new(trainer, paper.DATASETS, (1,), meta=meta("unigram") if trainer == "UniGRAM" else None)
    tree.base_to_new("UniGRAM", paper.DATASETS, (1,), cfg="a1", meta=meta("1", **ABLATIONS["1"]), name="1")
    tree.transfer("CoOp", "ImageNet", [*paper.table(2)["targets"], "Caltech101"], 16, (1,))
    tree.transfer("CoOp", "ImageNet", paper.table(2)["targets"][:2], 4, (1,))
    return tree


def test_the_papers_numbers_stand_beside(eleven):
    _, rows = table(eleven, 1)
    assert rows["average", "CoOp"].paper == {"base": 77.58, "new": 73.11, "H": 75.28}
    assert rows["DescribableTextures", "UniGRAM"].paper == {"base": 73.62, "new": 62.38, "H": 67.56}
    assert rows["average", "VPT"].paper == {}  # nothing measured to stand beside
    _, rows = table(eleven, 6)
    assert rows["average", "1 UniGRAM, no domain shift"].paper["new"] == 75.56
    assert rows["ImageNet", "1 UniGRAM, no domain shift"].paper == {}
    _, rows = table(eleven, 2)
    assert rows["average", "CoOp"].paper == {"all": 60.03} and rows["ImageNetR", "CoOp"].paper == {"all": 76.50}
    report, rows = table(eleven, 3)
    assert rows["Caltech101", "CoOp"].paper == {"all": 93.60} and rows["average", "CoOp"].paper == {}
    assert "no run on OxfordPets, StanfordCars, Flowers102" in report.notes[0]
    report, rows = table(eleven, 4)
    assert rows["ImageNetV2", "CoOp"].paper == {"all": 62.83} and rows["average", "CoOp"].paper == {}
    assert "60.03" in render(table(eleven, 2)[0]) and "base (paper)" in render(table(eleven, 1)[0])


@pytest.mark.parametrize(
    ("backbone", "shots", "more"),
    [("ViT-B/32", 16, {}), ("ViT-B/16", 8, {}), ("ViT-B/16", 16, {"epochs": 200}), ("ViT-B/16", 16, {"start": ""})],
)
def test_no_papers_number_beside_other_settings(tmp_path, backbone, shots, more):
    tree = Tree(tmp_path, backbone)
    tree.base_to_new("CoOp", ["EuroSAT"], (1, 2), shots, **more)
    for report in all_tables(read_runs([tmp_path])):
        assert not any(row.paper for row in report.rows)
        assert "(paper)" not in render(report) and "paper:" not in render(report)


def test_no_papers_number_beside_another_metric(eleven):
    (report, *_) = all_tables(read_runs([eleven.root], "macro_f1"))
    assert report.number == 1 and not any(row.paper for row in report.rows)


def test_an_average_over_other_datasets_has_no_papers_number(tmp_path):
    tree = Tree(tmp_path, "ViT-B/16")
    tree.base_to_new("CoOp", [*paper.DATASETS, "EmojiFood"], (1,))
    _, rows = table(tree, 1)
    assert rows["average", "CoOp"].paper == {} and rows["EuroSAT", "CoOp"].paper["base"] == 74.79


# -------------------------------------------------------------------------------------------------------------- formats


def test_csv_is_unrounded(world, capsys):
    assert main(["report", str(world.root), "--table", "5", "--format", "csv"]) == 0
    rows = {(row["dataset"], row["trainer"]): row for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    found = world.of("UniGRAM", "EmojiFood", "all", 4)
    assert float(rows["EmojiFood", "UniGRAM"]["all"]) == pytest.approx(found.mean(), rel=1e-14)
    assert float(rows["EmojiFood", "UniGRAM"]["all_half_width"]) == pytest.approx(half_width(found), rel=1e-9)
    assert rows["EmojiFood", "UniGRAM"]["table"] == "5" and rows["EmojiFood", "VPT"]["all"] == "missing"


@pytest.mark.parametrize("number", [1, 2, 6])
def test_latex_is_balanced(eleven, world, number):
    for tree in (eleven, world):
        text = render(table(tree, number)[0], "latex")
        lines = [line for line in text.splitlines() if not line.startswith("%")]
        plain = re.sub(r"\\[\\&%$#_{}]", "", "\n".join(lines))  # without escaped letters
        assert plain.count("{") == plain.count("}") and plain.count("$") % 2 == 0
        assert re.findall(r"\\begin\{(\w+)\}", plain) == ["table", "tabular"]
        assert re.findall(r"\\end\{(\w+)\}", plain) == ["tabular", "table"]
        width = len(re.search(r"\\begin\{tabular\}\{([lr]+)\}", plain)[1])
        body = [line for line in lines if line.endswith(r"\\")]
        assert len(body) > 2
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in body} == {width}
        assert "±" not in plain and "%" not in plain


def test_latex_letters():
    assert escape_latex("50%_a & b {c} #1 ±") == r"50\%\_a \& b \{c\} \#1 $\pm$"


def test_the_example_of_the_guide(world, tmp_path, monkeypatch, capsys):
    guide = Path(__file__).resolve().parents[2] / "docs" / "guide" / "report.md"
    (code,) = re.findall(r"```python\n(.*?)```", guide.read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").symlink_to(world.root)
    exec(compile(code, "report.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "| dataset" in printed and re.search(r"^\w+ UniGRAM.* \d+\.\d+$", printed, re.MULTILINE)


NAMES = {  # a name of somebody's choice, and how it is shown in the formats
    "=HYPERLINK(1)": {"csv": "'=HYPERLINK(1)", "latex": "=HYPERLINK(1)", "markdown": "=HYPERLINK(1)"},
    "@cmd": {"csv": "'@cmd", "latex": "@cmd", "markdown": "@cmd"},
    "+1+cmd|' /C'": {"csv": "'+1+cmd|' /C'", "latex": r"+1+cmd\textbar{}' /C'", "markdown": r"+1+cmd\|' /C'"},
    "-2": {"csv": "-2", "latex": "-2", "markdown": "-2"},
    "-a": {"csv": "'-a", "latex": "-a", "markdown": "-a"},
    "one\ntwo\r\nthree": {"csv": "one two three", "latex": "one two three", "markdown": "one two three"},
    "a\x1b[2Jb\x85\u2028c": {"csv": "a [2Jb c", "latex": "a {[}2Jb c", "markdown": r"a \[2Jb c"},  # moves a cursor
    "<img src=x onerror=y>": {
        "csv": "<img src=x onerror=y>",
        "latex": r"\textless{}img src=x onerror=y\textgreater{}",
        "markdown": "&lt;img src=x onerror=y&gt;",
    },
    r"[a](b) \|*": {"csv": r"[a](b) \|*", "markdown": r"\[a\](b) \\\|\*"},
    "[2em]": {"csv": "[2em]", "latex": "{[}2em]", "markdown": r"\[2em\]"},
}


@pytest.mark.parametrize(("name", "form"), [(name, form) for name in NAMES for form in NAMES[name]])
def test_names_of_any_kind(name, form):
    cells = {"all": Estimate(-1.5, None, 1, 1)}
    report = Report(("all",), [Row("a", name, cells, {})], "", ("a",), (1,), [], [name], title=name)
    text, shown = render(report, form), NAMES[name][form]
    if form == "csv":
        (row,) = csv.DictReader(io.StringIO(text))
        assert (row["table"], row["trainer"], row["all"]) == (shown, shown, "-1.5")  # a negative number stays one
    else:
        lines = text.splitlines()
        cells = [line for line in lines if line.startswith(("a & ", "| a"))]
        assert len(cells) == 1 and f" {shown} " in cells[0]
        title = rf"\caption{{{shown}}}" if form == "latex" else f"**{shown}**"
        assert title in lines
        notes = [line for line in lines if line.startswith(("% note: ", "- note: "))]
        plain = re.sub(r"[\x00-\x1f\x85\u2028]+", " ", name)
        assert notes == [f"- note: {shown}" if form == "markdown" else f"% note: {plain}"]
        assert not [line for line in lines if line.strip() in ("two", "three")]


# ---------------------------------------------------------------------------------------------------------- collections


@pytest.mark.slow
def test_a_collection_stands_for_the_folders(world, tmp_path, capsys):
    one_file = tmp_path / "all.json"
    assert main(["report", str(world.root), "--collect", str(one_file)]) == 0
    capsys.readouterr()
    for options in (["--format", "csv"], ["--table", "all"], ["--curve"], ["--format", "json", "--metric", "macro_f1"]):
        outputs = []
        for source in (world.root, one_file):
            assert main(["report", str(source), *options]) == 0
            outputs.append(capsys.readouterr().out)
        assert outputs[0] == outputs[1] and len(outputs[0]) > 500
    figures = [[d.csv for d in draw(runs_of(it), it.metas)[0]] for it in (gather([world.root]), gather([one_file]))]
    assert figures[0] == figures[1] and len(figures[0]) == 4
    text = one_file.read_text()
    assert str(world.root.parent) not in text and '"/' not in text  # no path of this machine
    results = gather([world.root]).results
    assert len(text) < 1400 * len(results)
    before, after = (next(iter(it.results.values())) for it in (gather([world.root]), gather([one_file])))
    assert before["metrics"] == after["metrics"] and before["config"]["OPTIM"] == after["config"]["OPTIM"]


def test_a_collection_can_be_collected_again(world, tmp_path):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    assert main(["report", str(world.root), "--collect", str(one)]) == 0
    assert main(["report", str(one), "--collect", str(two)]) == 0
    assert one.read_text() == two.read_text()


def test_a_collection_of_tests_alone_remembers_the_trainings(tmp_path):
    tree = Tree(tmp_path / "output")
    tree.transfer("CoOp", "EmojiTravel", ["EmojiFood"], 4, start="", name="x")
    tests = tmp_path / "output" / "evaluation"
    assert main(["report", str(tests), "--collect", str(tmp_path / "tests.json")]) == 0
    shutil.rmtree(tmp_path / "output")
    (report,) = paper_tables(read_runs([tmp_path / "tests.json"]), [5])
    assert "CoOp, random start" in report.labels and report.datasets == ("EmojiTravel", "EmojiFood")
    cells = {(row.dataset, row.label): row.cells["all"] for row in report.rows}
    assert cells["EmojiTravel", "CoOp, random start"] is None  # read for its settings only


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "found another file"),
        ('{"format": "gram-report-collection", "version": 9}', "expected a collection of version 1, found 9"),
        ('{"format": "gram-report-collection", "version": 1}', "found a broken one"),
    ],
)
def test_other_files_are_one_sentence(tmp_path, capsys, text, words):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert main(["report", str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error and "x.json" in error and "Traceback" not in error


# -------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.slow
def test_figures_and_the_numbers_behind_them(world, tmp_path, capsys):
    assert main(["report", str(world.root), "--figures", str(tmp_path / "figures")]) == 0
    stems = ("figure_1a", "figure_1b_3a_10_epochs", "figure_1b_3a_50_epochs", "figure_3b")
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(
        stem + ending for stem in stems for ending in (".csv", ".png")
    )
    rows = {}
    for stem in stems:
        assert (tmp_path / "figures" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        rows[stem] = list(csv.DictReader((tmp_path / "figures" / f"{stem}.csv").read_text().splitlines()))
    starts = {(row["start"], row["column"]): row for row in rows["figure_1a"]}
    new = np.mean([world.of("random", d, "new") for d in PAIRS], axis=0)
    assert float(starts["random", "new"]["mean"]) == pytest.approx(new.mean())
    assert float(starts["random", "new"]["half_width"]) == pytest.approx(half_width(new))
    assert {start for start, _ in starts} == {"random", "“a photo of a”", "CoOp + GRAM (meta-learned)"}
    epochs = {(row["trainer"], row["epoch"], row["column"]): row for row in rows["figure_1b_3a_10_epochs"]}
    assert float(epochs["CoOpGRAM", "10", "base"]["mean"]) == pytest.approx(75.0)
    assert float(epochs["CoOp", "10", "new"]["mean"]) == pytest.approx(55.0)
    long = {(row["trainer"], row["epoch"], row["column"]): row for row in rows["figure_1b_3a_50_epochs"]}
    assert float(long["CoOp", "50", "new"]["mean"]) == pytest.approx(50.0)
    inner = {(row["step"], row["gradient"]): float(row["mean"]) for row in rows["figure_3b"]}
    assert inner["100", "regulated"] == pytest.approx(0.4) and inner["100", "raw"] == pytest.approx(0.3)


def test_curves_have_bands_over_seeds(tmp_path):
    tree = Tree(tmp_path)
    for seed, noise in zip(SEEDS, (-1.0, 0.0, 2.0), strict=True):
        tree.base_to_new("VPT", PAIRS, (seed,), curve=curve(1.0, 1.0, noise=noise))
        tree.base_to_new("VPT", PAIRS, (seed,), 4, curve=curve(2.0, 2.0))  # other shots: another figure
    tree.transfer("VPT", PAIRS[0], [], 16, curve=curve(2.0, 2.0))  # all classes
    drawings, lacking = draw(read_runs([tmp_path]), [])
    (drawing,) = drawings
    rows = {(row["epoch"], row["column"]): row for row in csv.DictReader(io.StringIO(drawing.csv))}
    assert float(rows["3", "base"]["half_width"]) == pytest.approx(half_width([-1.0, 0.0, 2.0]))
    assert float(rows["3", "base"]["mean"]) == pytest.approx(63 + 1 / 3)
    assert len(lacking) == 2 and "Figure 1(a) needs" in lacking[0] and "Figure 3(b) needs" in lacking[1]


def test_without_matplotlib_there_is_one_sentence(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(world.root), "--figures", str(tmp_path)]) == 2
    assert "pip install 'gram-meta[figures]'" in capsys.readouterr().err
    assert main(["report", str(world.root), "--html", str(tmp_path / "page.html")]) == 0
    assert "pip install 'gram-meta[figures]'" in capsys.readouterr().err
    assert "gram-meta[figures]" in (tmp_path / "page.html").read_text()


def test_nothing_to_draw_is_one_sentence(tmp_path, capsys):
    Tree(tmp_path).base_to_new("JointPrompt", PAIRS, (1,))
    assert main(["report", str(tmp_path), "--figures", str(tmp_path / "figures")]) == 2
    assert "expected runs that logged what a figure shows" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------- page


@pytest.mark.slow
def test_the_page_needs_nothing_from_outside(world, tmp_path, capsys):
    path = tmp_path / "page.html"
    assert main(["report", str(world.root), "--html", str(path)]) == 0
    text = path.read_text()
    found = Page(text)
    ids, sources = found.values("id"), found.values("src", "srcset", "data", "action", "poster")
    assert all(link.startswith("#") and link[1:] in ids for link in found.values("href"))
    assert len(ids) == len(set(ids))
    assert len(sources) == 4 and all(it.startswith("data:image/png;base64,") for it in sources)
    assert base64.b64decode(sources[0].partition(",")[2]).startswith(b"\x89PNG")
    assert not {"link", "iframe", "object"} & {tag for tag, _ in found.elements}
    assert found.all("script") == [{}]  # the page's own, which its policy names
    assert "url(" not in found.styles and "@import" not in found.styles and "http" not in text.replace("http-equiv", "")
    assert {f"table-{number}" for number in range(1, 8)} <= set(ids)
    runs = len(list(world.root.rglob("results.json")))
    manifests = text[text.index('<section id="runs"') : text.index('<section id="configs"')]
    assert manifests.count("<tr>") == runs + 1
    assert "missing: CoOp, 50 epochs" in text
    assert hashlib.sha256(b"1").hexdigest() in text  # a few-shot split's, whole
    assert hashlib.sha256(b"coop").hexdigest() in text  # a meta-checkpoint's


def test_the_page_escapes_what_it_shows(tmp_path):
    hostile = "</pre></style><script>alert('1')</script>\"&"
    tree = Tree(tmp_path)
    for dataset in ("EmojiFood", hostile):
        path = tree.write(f"run{len(dataset)}", hostile, dataset, "base", 1, meta=meta("m", folder=f"/{hostile}"))
        result = json.loads(path.read_text())
        result["config"]["DATASET"]["ROOT"] = result["config"]["NOTE"] = hostile
        result["versions"] = {hostile: hostile}
        result["few_shot"]["sha256"] = hostile
        path.write_text(json.dumps(result))
    evidence = gather([tmp_path])
    runs = runs_of(evidence)
    text = page(all_tables(runs), [], [hostile], runs, evidence)
    found = Page(text)
    assert found.all("script") == [{}] and text.count("<script") == 1 and text.count("&lt;script&gt;") > 5
    assert all(link[1:] in found.values("id") for link in found.values("href"))
