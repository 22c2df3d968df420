"""The public Python API: its names, its cost at import, and every example of docs/reference/python.md as a user runs
it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.corpora import write_pairs
from PIL import Image

import gram_meta as gram
from gram_meta.cli import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "python.md"
NAMES = [
    "GradientRegulator", "GramClassifier", "GramError", "Hierarchy", "MetaCheckpoint", "PairStore", "Prediction",
    "Predictor", "PromptedCLIP", "Regulation", "RegulatorConfig", "WithGRAM", "__version__", "cluster", "embed",
    "evaluate", "load", "load_backbone", "pretrain", "regulate", "save", "start_from",
]  # fmt: skip
SETTINGS = """
BACKBONE: {NAME: random-tiny}
CHC: {TOPICS: {REDUCTION: pca, MIN_CLUSTER_SIZE: 8}, DOMAINS: {K: 2}}
TASKS: {WAYS: 2, SUPPORT_SHOTS: 2, QUERY_SHOTS: 4, HELD_OUT: 0.4}
OUTER: {BATCH: 2}
EVAL: {EVERY: 2, TASKS: 4}
"""


def examples(page):
    return re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def adapted(code, replaced):
    """Return an example with other files and devices; each text to replace must be in it."""
    for old, new in replaced:
        assert old in code, f"{old} is not in the example any more"
        code = code.replace(old, new)
    return code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the examples run: 96 pairs of six words, and small settings."""
    folder = tmp_path_factory.mktemp("api")
    write_pairs(folder)
    (folder / "tiny.yaml").write_text(SETTINGS)
    return folder


@pytest.fixture(scope="module")
def meta_checkpoint(folder):
    """What the second example makes; its output is kept for a test."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.chdir(folder)
    code = adapted(examples(PAGE)[1], [
        ('"cc3m/{00000..00331}.tar"', '"pairs.tsv"'), ('"ViT-B/16"', '"random-tiny", sentence_model="hash:64"'),
        ('"coop_vit_b16"', '"tiny.yaml"'), ("5000", "4"), ("print(", "shown = str("),
    ])  # fmt: skip
    names = {}
    exec(compile(code, "python.md", "exec"), names)
    monkeypatch.undo()
    shutil.copy(folder / "meta" / "best.safetensors", folder / "best.safetensors")
    return names


def test_the_public_names():
    assert sorted(gram.__all__) == sorted(NAMES)
    assert all(getattr(gram, name) is not None for name in NAMES) and set(NAMES) <= set(dir(gram))
    with pytest.raises(AttributeError, match="no attribute 'prompt'"):
        _ = gram.prompt
    documented = {word for row in re.findall(r"^\|(.*?)\|", PAGE.read_text("utf-8"), re.MULTILINE)
                  for word in re.findall(r"`(\w+)`", row)}  # fmt: skip
    assert documented | {"__version__"} == set(NAMES)


def test_the_import_is_quick_and_brings_no_torch():
    code = "import time; t = time.perf_counter(); import gram_meta; s = time.perf_counter() - t; import sys"
    code += "\nprint(s, *sorted({'torch', 'numpy', 'dassl', 'clip'} & set(sys.modules)))"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(run.stdout.split()[0]) for run in runs) < 0.1
    assert all(len(run.stdout.split()) == 1 for run in runs), runs[0].stdout


def test_pairs_to_a_meta_checkpoint(meta_checkpoint, folder):
    assert isinstance(meta_checkpoint["store"], gram.PairStore) and len(meta_checkpoint["store"]) == 96
    assert isinstance(meta_checkpoint["hierarchy"], gram.Hierarchy) and meta_checkpoint["hierarchy"].topics
    assert meta_checkpoint["meta"].config["OUTER"]["STEPS"] == 4
    assert "R off, same length" in meta_checkpoint["shown"] and "2-way tasks" in meta_checkpoint["shown"]
    again = gram.evaluate(folder / "best.safetensors", folder / "store", folder / "hierarchy", tasks=2, steps=[0, 1])
    assert [cell.steps for cell in again.lines[0].cells] == [0, 1]


def test_the_command_trains_several_seeds_and_profiles_one(meta_checkpoint, folder, tmp_path, capsys):
    inputs = ["--store", str(folder / "store"), "--hierarchy", str(folder / "hierarchy"), "-o", str(tmp_path)]
    command = ["pretrain", *inputs, "--config", str(folder / "tiny.yaml"), "--device", "cpu"]
    assert main([*command, "OUTER.STEPS", "2", "SEEDS", "(1, 2)"]) == 0
    best = [tmp_path / f"seed{seed}" / "best.safetensors" for seed in (1, 2)]
    assert capsys.readouterr().out.splitlines() == [f"meta-checkpoint: {path}" for path in best]
    assert [gram.load(path).config["SEED"] for path in best] == [1, 2]
    assert main([*command, "--profile", "1", "SEEDS", "(1, 2)"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"profile: {tmp_path / 'profile.json'}"


@pytest.mark.parametrize("page", [PAGE, ROOT / "README.md"])
def test_any_training_loop(meta_checkpoint, folder, monkeypatch, page, capsys):
    monkeypatch.chdir(folder)
    code = next(code for code in examples(page) if "gram.regulate" in code)
    names = {"loader": [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]))] * 3}
    exec(compile(adapted(code, [('"cuda"', '"cpu"')]), str(page), "exec"), names)
    assert names["regulation"].summary()["text"]["steps"] == 3 and "gradient_norm" in capsys.readouterr().out
    moved = names["model"].prompts()["text"] - names["meta"].prompts["text"]
    assert 0 < moved.abs().max() < 1


def test_a_folder_of_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 2), ("test", 1)):
        for label, colour in (("apple", "red"), ("pear", "green")):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (64, 64), colour).save(tmp_path / split / label / f"{number}.png")
    shutil.copy("train/apple/0.png", "a.jpg")
    shutil.copy("train/pear/0.png", "b.jpg")
    code = next(code for code in examples(PAGE) if "read_folder" in code)
    names = {}
    exec(compile(adapted(code, [("epochs=10", "epochs=1")]), "python.md", "exec"), names)
    assert names["classifier"].classes_.tolist() == ["apple", "pear"]
    assert capsys.readouterr().out.splitlines()[-1] == str(names["classifier"].predict(["a.jpg", "b.jpg"]))


def test_a_model_of_transformers(tmp_path, monkeypatch, capsys):
    import transformers

    monkeypatch.chdir(tmp_path)
    for name, colour in (("a.jpg", "red"), ("b.jpg", "green")):
        Image.new("RGB", (32, 32), colour).save(name)
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    config = transformers.CLIPConfig(text_config=tower, vision_config=vision, projection_dim=32)
    monkeypatch.setattr(
        transformers.CLIPModel, "from_pretrained", lambda name: transformers.CLIPModel._from_config(config)
    )
    exec(compile(next(code for code in examples(PAGE) if "import transformers" in code), "python.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1].startswith("torch.Size([2, 32]) [")


def test_any_dassl_trainer_and_own_images(meta_checkpoint, folder, tiny_data, tiny_options, monkeypatch, capsys):
    import gram_meta.plugin  # noqa: F401, registers
    from gram_meta.engine import TRAINER_REGISTRY

    code = next(code for code in examples(PAGE) if "WithGRAM" in code)
    exec(
        compile(code, "python.md", "exec"),
        {"TRAINER_REGISTRY": TRAINER_REGISTRY, "MaPLe": TRAINER_REGISTRY.get("CoOp")},
    )
    out = folder / "output" / "run"
    command = ["train", "--root", str(tiny_data), "--seed", "1", "--trainer", "MaPLeGRAM", "--output-dir", str(out)]
    command += ["--dataset-config-file", "configs/datasets/emoji_food.yaml"]
    command += ["--config-file", "configs/trainers/CoOpGRAM/gram_small_c4_ep10_batch32_ctxv1.yaml", *tiny_options]
    command += ["DATASET.NUM_SHOTS", "1", "TRAINER.GRAM.CHECKPOINT", str(folder / "best.safetensors")]
    assert main(command) == 0
    assert "Every gradient of a prompt passes through the frozen regulator" in capsys.readouterr().out

    monkeypatch.chdir(folder)
    shutil.copy("0.png", "a.jpg")
    shutil.copy("1.png", "b.jpg")
    code = next(code for code in examples(PAGE) if "Predictor" in code)
    exec(compile(code, "python.md", "exec"), {})
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == ["a.jpg", "b.jpg"]
    assert all(line.split()[1] in ("red", "green", "blue", "grey") for line in shown)
