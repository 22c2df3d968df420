"""Files of version 0.1, in tests/pins/version_0.1: later versions read them, and know their runs again.

They were written by the fixture `made` and are never written anew: a store, a hierarchy, a meta-training and a run.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

OLD = Path(__file__).parent / "version_0.1"
TOLERANCE = 1e-3
COOP = ("CoOp", "gram_small_c4_ep10_batch32_ctxv1", "2", ("DATASET.SUBSAMPLE_CLASSES", "base"))


@pytest.fixture(scope="module")
def old(made, tmp_path_factory):
    """A copy of the files; `random-tiny` is another CLIP on processors whose random numbers round another way."""
    from gram_meta.backbone import load_backbone

    known = json.loads((OLD / "runs/CoOp/results.json").read_text(encoding="utf-8"))["backbone_fingerprint"]
    if load_backbone("random-tiny").fingerprint != known:
        pytest.skip("random-tiny is another CLIP on this processor than in the files of version 0.1")
    return Path(shutil.copytree(OLD, tmp_path_factory.mktemp("old") / "version_0.1"))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(folder):
    lines = (folder / "log.txt").read_text(encoding="utf-8").splitlines()
    return [float(line.split(" loss ")[1].split()[0]) for line in lines if line.startswith("epoch [")]


def test_store_and_hierarchy_are_read(old, made):
    printed = made.run("inspect", str(old / "hierarchy"), "--store", str(old / "store"), "--json")
    assert sorted(topic["word"] for topic in json.loads(printed)["topics"]) == [
        *("boat", "cat", "dog", "house", "lamp", "tree")
    ]


def test_a_meta_checkpoint_gives_the_same_scores(old, made, golden):
    where = ("--store", str(old / "store"), "--hierarchy", str(old / "hierarchy"), "--device", "cpu")
    steps = ("--tasks", "4", "--steps", "0", "1", "3", "--json")
    found = json.loads(made.run("eval-meta", str(old / "meta/last.safetensors"), *where, *steps))
    pinned = json.loads((golden.folder / "numbers_eval_meta_0.1.json").read_text(encoding="utf-8"))
    assert found["alignment"] == pytest.approx(pinned["alignment"], rel=TOLERANCE)
    for line, expected in zip(found["lines"], pinned["lines"], strict=True):
        for cell, other in zip(line["cells"], expected["cells"], strict=True):
            assert cell == pytest.approx(other, rel=TOLERANCE)


def test_a_trainer_starts_from_a_meta_checkpoint(old, made, golden):
    opts = ("TRAINER.GRAM.CHECKPOINT", str(old / "meta/last.safetensors"), "TEST.FINAL_MODEL", "best_val")
    made.train("CoOpGRAM", old / "new", COOP[1], "2", (*COOP[3], *opts))
    pinned = json.loads((golden.folder / "numbers_coopgram_0.1.json").read_text(encoding="utf-8"))
    assert losses(old / "new") == pytest.approx(pinned["losses"], abs=2e-3)


def test_a_meta_training_is_resumed(old, made):
    """It was at its end; its settings are compared, not its version, its state is read, and nothing changes."""
    facts = json.loads((old / "meta/run.json").read_text(encoding="utf-8"))
    before = contents(old / "meta")
    where = ("--store", str(old / "store"), "--hierarchy", str(old / "hierarchy"), "--device", "cpu")
    opts = [word for key, value in changed_settings(facts["config"]).items() for word in (key, str(value))]
    made.run("pretrain", *where, "-o", str(old / "meta"), "--resume", *opts)
    after = contents(old / "meta")
    assert {path: after[path] for path in before} == before


def changed_settings(config):
    """Settings of a run that differ from the defaults, by their full keys."""
    from gram_meta.config import as_dict, get_meta_config

    def flat(tree, prefix=""):
        for key, value in tree.items():
            yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]

    defaults = dict(flat(as_dict(get_meta_config())))
    return {key: value for key, value in flat(config) if defaults[key] != value}


def test_a_finished_run_is_known_again(old, made):
    """The same command finds run.json, prints that the run is finished, and changes nothing."""
    before = contents(old / "runs/CoOp")
    trainer, config, shots, opts = COOP
    printed = made.train(trainer, old / "runs/CoOp", config, shots, opts)
    assert "This run is finished" in printed and contents(old / "runs/CoOp") == before


def test_a_run_is_evaluated(old, made, golden):
    flags = ("--eval-only", "--model-dir", os.fspath(old / "runs/CoOp"))
    made.train("CoOp", old / "evaluated", COOP[1], "2", ("DATASET.SUBSAMPLE_CLASSES", "new"), flags)
    found = json.loads((old / "evaluated/results.json").read_text(encoding="utf-8"))
    pinned = json.loads((golden.folder / "numbers_runs.json").read_text(encoding="utf-8"))
    assert found["metrics"] == pytest.approx(pinned["CoOp_new"]["metrics"])
    assert found["epoch"] == 2 and found["learned_by"] == "CoOp"


def test_a_run_predicts_the_same(old, made, golden):
    pictures = f"{made.root}/data/emoji_food/images"
    rows = json.loads(
        made.run("predict", pictures, "--model-dir", str(old / "runs/CoOp"), "--topk", "2", "--format", "json")
    )
    pinned = json.loads((golden.folder / "numbers_predict.json").read_text(encoding="utf-8"))
    for row in rows:
        found = {entry["class"]: entry["probability"] for entry in row["classes"]}
        assert found == pytest.approx(pinned[Path(row["image"]).name], rel=TOLERANCE)


def test_a_run_is_reported(old, made):
    (table, *_) = json.loads(made.run("report", str(old / "runs"), "--format", "json"))
    assert table["rows"][0]["label"] == "CoOp" and table["rows"][0]["cells"]["base"]["mean"] == 50.0


def test_options_of_version_0_1_are_accepted(old, made, golden, tmp_path):
    """All of them, as KEY VALUE and in a YAML file: TRAINER.* and the meta-training's, with values that change no
    number."""
    memory = ("TRAINER.MEMORY.CHECKPOINT", "always", "TRAINER.MEMORY.CLASS_CHUNK", "1")
    memory += ("TRAINER.MEMORY.TEXT_GB", "0.5", "TRAINER.MEMORY.IMAGE_GB", "0.5")
    pinned = json.loads((golden.folder / "numbers_runs.json").read_text(encoding="utf-8"))["CoOp"]["losses"]
    trainer, config, shots, opts = COOP
    made.train(trainer, old / "options", config, shots, (*opts, *memory))
    assert losses(old / "options") == pytest.approx(pinned, abs=2e-3)
    packaged = Path(__file__).parents[2] / f"configs/trainers/CoOp/{config}.yaml"
    text = packaged.read_text(encoding="utf-8") + "  MEMORY:\n    CHECKPOINT: always\n    CLASS_CHUNK: 1\n"
    (tmp_path / "old.yaml").write_text(text + "    TEXT_GB: 0.5\n    IMAGE_GB: 0.5\n", encoding="utf-8")
    made.train(trainer, old / "yaml", str(tmp_path / "old.yaml"), shots, opts)
    assert losses(old / "yaml") == pytest.approx(pinned, abs=2e-3)
