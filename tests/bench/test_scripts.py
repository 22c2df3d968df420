"""Every script of scripts/bench and scripts/experiments, once, with its smallest settings."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gram_meta as gram
from gram_meta.clustering.hierarchy import Hierarchy
from gram_meta.demo.emoji import missing_packages
from gram_meta.demo.world import SPECS, write_dataset
from gram_meta.method.checkpoint import MetaCheckpoint, save_meta_checkpoint
from gram_meta.method.prompts import context_from_words
from gram_meta.method.regulator import GradientRegulator, RegulatorConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--backbone", "random-tiny", "--threads", "1", "--clock", "cpu", "--repeats", "1")


@pytest.fixture
def run(bench_script, monkeypatch, capsys):
    """Run a script with these words, and return what it prints."""

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts" / "bench" / f"{name}.py"), *map(str, words)])
        assert not bench_script(name).main()
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Class folders: six classes of eight noisy images, with captions."""
    folder, random = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for number, name in enumerate(("cat", "dog", "house", "tree", "boat", "lamp")):
        (folder / name).mkdir()
        for index in range(8):
            pixels = random.integers(0, 256, (40, 32, 3), dtype=np.uint8) // 2 + 20 * number
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
            (folder / name / f"{index}.txt").write_text(f"a picture of a {name}, number {index}")
    return folder


@pytest.fixture(scope="module")
def store(classes, tmp_path_factory):
    """The store of the class folders, by gram-small."""
    out = tmp_path_factory.mktemp("store") / "store"
    gram.embed(classes, out, backbone="gram-small", sentence_model="hash:16")
    return out


def columns(table):
    """The head of the last Markdown table."""
    lines = table.splitlines()
    return [
        cell.strip() for cell in lines[max(i for i, line in enumerate(lines) if "|:--" in line) - 1].split("|")[1:-1]
    ]


def test_meta_precision(run):
    printed = run("meta_precision", "--backbone", "random-tiny", "--prompts", "text", "--scales", "8")
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| fp32, lean")]
    assert len(rows) == 1 and all(0 < float(cell) < 1e-4 for cell in rows[0][1:])
    assert "fp16, lean, scale 2^8" in printed and "not finite" not in printed


@pytest.mark.parametrize("mode", [(), ("--test",), ("--precision", "fp16")], ids=["step", "test", "fp16"])
def test_coop_step(run, tmp_path, mode):
    out = tmp_path / "out.json"
    printed = run("coop_step", *TINY, "--classes", "6", "--batch", "3", "-o", out, *mode)
    assert "| whole step, this project |" in printed and "Ceiling" in printed
    report = json.loads(out.read_text())
    largest, half = max(report["deviation"].values()), "fp16" in mode
    assert largest < 1e-4 or (half and largest < 0.05)
    assert len(report["deviation"]) == 2 - ("--test" in mode)
    assert len(report["measured"]) == 7


def test_startup(run, tmp_path):
    from gram_meta.backbone.clip import clip_module
    from gram_meta.backbone.weights import empty_clip

    torch.save(empty_clip(clip_module(), 64, 224, 2, 64, 32, 77, 49408, 64, 1, 2).state_dict(), tmp_path / "clip.pt")
    words = ("--backbone", tmp_path / "clip.pt", "--precision", "fp32", "--repeats", "2", "--threads", "1")
    words += ("-o", tmp_path / "out.json")
    rows = run("startup", *words, "--classes", "3", "--batch", "2").splitlines()[4:-1]
    cells = {part.strip(): float(wall.split()[0]) for _, part, wall, *_ in (row.split("|") for row in rows)}
    assert list(cells)[:3] == ["imports", "data set", "CLIP"] and list(cells)[-2:] == ["first step", "all"]
    assert min(cells.values()) >= 0 and cells["imports"] < cells["all"]
    assert [list(one)[-1] for one in json.loads((tmp_path / "out.json").read_text())["rounds"]] == ["first step"] * 2


def test_classes(run, tmp_path):
    few = ("--classes", "30", "--batch", "2", "--settings", "plain", "128 at a time", "--output", tmp_path / "out")
    printed = run("classes", *TINY, *few)
    assert columns(printed) == ["classes", "plain", "128 at a time"]
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [(row["part"], row["size"], row["setting"]) for row in rows] == [("text", 30, few[5]), ("text", 30, few[6])]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"]) and not rows[0]["layers"]
    assert (tmp_path / "out.svg").is_file()
    (tmp_path / "out.json").write_text(json.dumps([row | {"peak_mb": 7777} for row in rows]))
    assert run("classes", *TINY, *few).count("7,777 MB") == 2  # nothing is measured twice
    with pytest.raises(SystemExit, match="out.json: expected measurements of .*'precision': 'fp64'.*, found .*'fp32'"):
        run("classes", *TINY, *few, "--precision", "fp64")  # they would stand in one table as those of one CLIP
    layers = ("--settings", "layers", "--classes", "2", "--images", "2", "--parts", "images", "whole")
    run("classes", *TINY, *layers, "--output", tmp_path / "layers")
    rows = json.loads((tmp_path / "layers.json").read_text())
    assert [row["part"] for row in rows] == ["images", "whole"]
    assert all(row["layers"] and row["seconds"] > 0 for row in rows)


def test_embedding(run, classes, tmp_path):
    words = ("--sentence-model", "hash:16", "--images", "6", "--batch-size", "4", "--part-size", "4", "--shards", "2")
    printed = run("embedding", classes, *TINY, *words, "--workers", "0", "1", "-o", tmp_path / "out.json")
    assert "6 pairs, batches of 4" in printed and columns(printed)[-1] == "of the bound"
    (one,) = json.loads((tmp_path / "out.json").read_text())["rounds"]
    assert len(one) == 1 + 2 * 2 * 2 and all(spent["wall"] > 0 for spent in one.values())


def test_near_duplicates(run, store):
    words = ("--images", "5")
    printed = run("near_duplicates", store, *words)
    (line,) = (line for line in printed.splitlines() if line.startswith("| mirrored  "))
    assert [float(cell) for cell in line.split("|")[2:5]] == [100, 100, 0]  # by CLIP, by pixels, the distance
    assert columns(printed)[0] == "distance up to"
    assert "false alarms" in run("near_duplicates", store, *words, "--against", ROOT / "tests" / "pins" / "golden")


def test_clustering(run, tmp_path):
    """PCA stands in for UMAP, whose compilation takes minutes."""
    pca = ("CHC.TOPICS.REDUCTION", "pca", "CHC.TOPICS.COMPONENTS", "20", "CHC.TOPICS.MIN_CLUSTER_SIZE", "5")
    folder = tmp_path / "stores"
    run("clustering", "make", "3000", folder / "small")
    run("clustering", "gram", folder / "small", *pca)
    run("clustering", "topics", folder / "small", "umap+hdbscan", *pca)
    run("clustering", "rules", folder / "small", "2000", *pca)
    assert columns(run("clustering", "table", folder))[:3] == ["what", "store", "rule"]
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [row["what"].split()[0] for row in rows] == ["gram", "topics"] + ["rules"] * 7
    found, topics, unsampled = rows[:3]
    assert 0 < found["domains: AMI"] <= 1
    for row in (found, topics):
        assert row["topics"] >= 2 and 0 < row["AMI"] <= 1 and row["processor time (s)"] > 0
        assert row["peak memory (GB)"] > row["of that its own (GB)"] > 0.05
    agreement = [
        unsampled[name] for name in ("AMI with un-sampled", "the same, noise a topic", "same verdict on noise")
    ]
    assert agreement == [1.0, 1.0, "100.0%"]
    assert all(0 < row["AMI with truth"] <= 1 for row in rows[2:])
    run("clustering", "rules", folder / "small", "2000", *pca[:-1], "40")
    again = json.loads((folder / "results.jsonl").read_text().splitlines()[len(rows)])
    assert again["noise"] != unsampled["noise"]  # of other settings, not of what was kept for these


@pytest.fixture(scope="module")
def labelled(classes, tmp_path_factory):
    """Store and hierarchy of the class folders; the classes are the topics."""
    import gram_meta as gram

    folder = tmp_path_factory.mktemp("labelled")
    words = {"backbone": "gram-small", "sentence_model": "hash:16", "format": "classes"}
    gram.embed(classes, folder / "store", **words)
    shots = ("TASKS.SUPPORT_SHOTS", "1", "TASKS.QUERY_SHOTS", "2", "CHC.LABELLED", "True")
    gram.cluster(folder / "store", folder / "hierarchy", opts=shots)
    return folder


def test_agreement(labelled, tmp_path):
    """Class folders as topics agree with themselves, apart from one picture whose row names another concept."""
    hierarchy = Hierarchy.open(labelled / "hierarchy")
    words = [topic.word for topic in hierarchy.topics]
    concepts = [words[0]] * len(hierarchy.fates)
    for pair, topic in zip(hierarchy.pair, hierarchy.topic, strict=True):
        concepts[pair] = words[topic]
    first, count = hierarchy.pair[0], len(hierarchy.pair)
    concepts[first] = next(word for word in words if word != concepts[first])
    lines = ["concept\tcaption_is_wrong", *(f"{concept}\t{int(row == first)}" for row, concept in enumerate(concepts))]
    (tmp_path / "truth.tsv").write_text("\n".join(lines) + "\n")
    places = ("--hierarchy", labelled / "hierarchy", "--truth", tmp_path / "truth.tsv")
    found = dict(re.findall(r"\| (.*?) +\| (.*?) +\|", experiment("agreement", *places)))
    assert (
        found["topics"] == found["concepts"] == found["concepts that are the commonest of a topic"] == str(len(words))
    )
    assert found["wrong captions, of all and in topics"] == f"{1 / len(concepts):.1%}, {1 / count:.1%}"
    assert found["pairs that show the commonest concept of their topic"] == f"{1 - 1 / count:.1%}"
    assert 0.8 < float(found["AMI"]) < 1 and 0.8 < float(found["ARI"]) < 1


def test_meta_grid(labelled, tiny_data, tmp_path):
    """meta_grid.py twice, the second time from finished runs."""
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "base: {BACKBONE.NAME: gram-small, OUTER.STEPS: 2, EVAL.EVERY: 2, CHECKPOINT.EVERY: 2, EVAL.TASKS: 2,"
        " TASKS.WAYS: 2, TASKS.SUPPORT_SHOTS: 1, TASKS.QUERY_SHOTS: 2, CHC.LABELLED: true}\n"
        "paper:\nplain: {REGULATOR.ENABLED: false}\nrelative: {REGULATOR.BETA: relative}\n"
    )
    few = ("--seeds", "1", "--meta-seeds", "1", "2", "--sets", "animals")
    given = ("--store", labelled / "store", "--hierarchy", labelled / "hierarchy", "--grid", grid)
    words = (*given, *few, "--out", tmp_path / "out", "--only", "paper", "plain")
    first = experiment("meta_grid", *words)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in first.splitlines()]
    controls = ["R on", "R off", "R off, same length", "R's mean", "R without beta", "theta* moved"]
    controls.append("R from CoOp's words")
    assert [row[:2] for row in cells[2:]] == [
        ["CoOp", "CoOp"],
        *(["paper", control] for control in controls),
        ["plain", "R off"],
    ]
    log = tmp_path / "out" / "paper" / "meta" / "seed2" / "log.jsonl"
    before = log.read_text()
    assert experiment("meta_grid", *words) == first
    assert log.read_text() == before and '"step": 2' in before
    lines = experiment("meta_grid", *words, "--controls", "R off").splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["CoOp", "R off", "R off"]

    (tmp_path / "docs/results").mkdir(parents=True)
    (tmp_path / "docs/assets").mkdir()
    experiment("curves", *words, "relative", "--epochs", "1", "--docs", tmp_path / "docs")
    curves = json.loads((tmp_path / "docs/results/curves.json").read_text())
    shape = {kind: (len(of), len(of[0])) for kind, of in curves["accuracy"]["new classes"].items()}
    variants = ("CoOp + GRAM, the paper's R", "CoOp + GRAM, meta-trained without R", "CoOp + GRAM")
    assert shape == {"CoOp": (1, 2), **dict.fromkeys(variants, (2, 2))}
    assert curves["inner product"]["steps"] == [0, 2]
    ends = curves["initialisation"]["base classes"]
    assert [len(of) for of in ends.values()] == [10, 6, 2] and all(of == sorted(of) for of in ends.values())
    for name in ("epochs", "initialisation", "inner-product"):
        assert Image.open(tmp_path / f"docs/assets/emoji-{name}.webp").width > 500


@pytest.mark.skipif(bool(missing_packages()), reason="the demo packages are not installed")
def test_few_shot_batch(tmp_path, monkeypatch):
    """Many runs at once end where the trainers end: CoOp from its words, CoOpGRAM from a meta-checkpoint."""
    monkeypatch.syspath_prepend(ROOT / "scripts" / "experiments")
    import few_shot_batch as batch

    write_dataset(tmp_path / "emoji_animals", SPECS["animals"], progress=False)
    backbone, random = gram.load_backbone("gram-small"), torch.Generator().manual_seed(1)
    words = context_from_words(backbone, "a photo of a")
    regulator = GradientRegulator({"text": 128}, RegulatorConfig(input="normalised", beta="relative"))
    regulator.requires_grad_(False)
    for parameter in regulator.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=random)
    theta = words + 0.01 * torch.randn(4, 128, generator=random)
    facts = {"backbone_name": backbone.name, "backbone_fingerprint": backbone.fingerprint}
    meta = MetaCheckpoint({"text": theta}, regulator, **facts, config={}, provenance={}, gradient_norms={})
    save_meta_checkpoint(tmp_path / "meta.safetensors", meta)
    opts = ["TEST.AT_STEPS", "(0,90)", "TRAINER.GRAM.CHECKPOINT", str(tmp_path / "meta.safetensors")]
    recording = batch.record(str(tmp_path), "emoji_animals", 1)
    trainers = {
        "CoOp": recording.curve,
        "CoOpGRAM": batch.few_shot(str(tmp_path), "emoji_animals", "CoOpGRAM", tmp_path / "run", 1, opts),
    }
    starts = {"CoOp": (words, None), "CoOpGRAM": (theta, lambda raw: regulator.parts("text", raw).regulated)}
    found = batch.adapt(recording, batch.test_set(str(tmp_path), "emoji_animals"), starts)
    for name, curve in trainers.items():
        for step, point in zip((0, 90), curve, strict=True):
            assert found[name][step] == pytest.approx((point["base"], point["new"]), abs=0.15), (name, step)


def experiment(name, *words):
    """Run a script of scripts/experiments in a process of its own; return what it prints."""
    command = [sys.executable, str(ROOT / "scripts" / "experiments" / f"{name}.py"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout
