"""The plugin in the real checkouts of CoOp, MaPLe, PromptSRC, ProMetaR and KgCoOp.

Set GRAM_CHECKOUTS to a folder that holds them as `CoOp`, `MaPLe`, `PromptSRC`, `ProMetaR` and `KgCoOp` (the whole
repository); each test works in a copy. Where no `dassl` is importable, the built-in engine stands in for it. CLIP's
weights come from this package, or are random: the test replaces the download from outside, and, where it runs a
trainer that calls `.cuda()` and `.half()`, these two.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACE = os.environ.get("GRAM_CHECKOUTS", "")
NAMES = ("CoOp", "MaPLe", "PromptSRC", "ProMetaR")
PARTS = ("train.py", "trainers", "datasets", "clip", "configs", "scripts", "parse_test_res.py", "meta_learning")

pytestmark = pytest.mark.skipif(
    not PLACE, reason="GRAM_CHECKOUTS does not name a folder with checkouts of CoOp, MaPLe, PromptSRC, ProMetaR, KgCoOp"
)

# Python imports a module of this name at its start; this one lets any `clip._download` answer with a file, and, where
# it is asked to, CLIP be in float32: CoOp's ZeroshotCLIP keeps the 16 bits that OpenAI's code makes of it, whatever
# PREC says. NEITHER makes nothing of `.cuda()` and `.half()`
NO_DOWNLOAD = """
import importlib.abc
import importlib.machinery
import os
import sys


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in ("clip.clip", "gram_meta.backbone.clip"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        fill = spec.loader.exec_module

        def exec_module(module):
            fill(module)
            if name == "gram_meta.backbone.clip":
                del module._SHAPES["ViT-B/16"]  # the file under this name is of another size
                return
            module._download = lambda url, root=None: os.environ.get("CLIP_FILE", {weights!r})
            if os.environ.get("NEITHER"):
                for kind in (module.torch.Tensor, module.torch.nn.Module):
                    kind.cuda = kind.half = lambda self, *args, **kwargs: self
            if os.environ.get("CLIP_IN_FLOAT32"):
                build = module.build_model
                module.build_model = lambda *given: build(*given).float()

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
"""


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with EuroSAT in CoOp's layout, four classes of noise under names that the packaged CLIP knows, and one
    for PYTHONPATH."""
    import numpy as np
    import torch
    from PIL import Image

    from gram_meta.backbone.packaged import load_packaged_state_dict

    world = tmp_path_factory.mktemp("world")
    images = world / "data" / "eurosat" / "2750"
    images.mkdir(parents=True)
    rng, split = np.random.default_rng(0), {"train": [], "val": [], "test": []}
    for label, name in enumerate(("apple", "bread", "cheese", "lemon")):
        for part, count in (("train", 4), ("val", 2), ("test", 4)):
            for index in range(count):
                file = f"{name}_{part}_{index}.png"
                pixels = rng.integers(0, 200, (64, 64, 3)) + 40 * (label == np.arange(3))
                Image.fromarray(pixels.astype(np.uint8)).save(images / file)
                split[part].append([file, label, name])
    (world / "data/eurosat/split_zhou_EuroSAT.json").write_text(json.dumps(split))
    # OpenAI's own code goes through 16 bits: values that survive it
    weights = {key: value.half().float() for key, value in load_packaged_state_dict().items()}
    torch.save(weights, world / "clip.pt")
    (world / "path").mkdir()
    (world / "path/sitecustomize.py").write_text(NO_DOWNLOAD.format(weights=str(world / "clip.pt")))
    return world


@pytest.fixture
def checkout(tmp_path):
    """A copy of a checkout, with or without the line in its train.py."""

    def copy(name, line=True):
        source, target = Path(PLACE, name), tmp_path / name
        if not (source / "train.py").is_file():
            pytest.skip(f"{source} holds no checkout of {name}")
        target.mkdir(parents=True)
        for part in PARTS:
            if (source / part).is_dir():
                shutil.copytree(source / part, target / part)
            elif (source / part).is_file():
                shutil.copy(source / part, target / part)
        if line:
            train = target / "train.py"
            train.write_text("import gram_meta.plugin\n" + train.read_text())
        return target

    return copy


def run(folder, world, *command, **environment):
    """Run a command there; the finished process, whose output is in the message where it fails."""
    real = [entry for entry in sys.path if entry and Path(entry, "dassl", "__init__.py").is_file()]
    path = os.pathsep.join([str(world / "path"), *real, str(ROOT)])
    binaries = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": path, "PATH": binaries, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def flags(world, trainer, config, output, *options):
    return (
        *("--root", world / "data", "--seed", "1", "--trainer", trainer, "--output-dir", output),
        *("--dataset-config-file", "configs/datasets/eurosat.yaml", "--config-file", config),
        *("INPUT.SIZE", "(64, 64)", "DATALOADER.NUM_WORKERS", "0", "DATASET.NUM_SHOTS", "2"),
        *("OPTIM.MAX_EPOCH", "2", "TRAIN.PRINT_FREQ", "1", *options),
    )


OURS = {
    "CoOpGRAM": "configs/trainers/CoOpGRAM/gram_small_c4_ep10_batch32_ctxv1.yaml",
    "VPTGRAM": "configs/trainers/VPTGRAM/gram_small_c4_ep10_batch32_ctxv1.yaml",
    "UniGRAM": "configs/trainers/UniGRAM/gram_small_c2+2_ep10_batch32_ctxv1.yaml",
    "CoCoOpGRAM": "configs/trainers/CoCoOpGRAM/gram_small_c4_ep10_batch1_ctxv1.yaml",
}
OFF = ("TRAINER.GRAM.REGULATE", "False", "TRAINER.GRAM.INIT", "False")


@pytest.mark.parametrize(
    ("name", "trainer"), [*(("CoOp", trainer) for trainer in OURS), *((name, "VPTGRAM") for name in NAMES[1:])]
)
def test_ours_by_one_line(checkout, world, name, trainer):
    folder = checkout(name)
    printed = run(folder, world, "python", "train.py", *flags(world, trainer, OURS[trainer], "out", *OFF))
    assert "taken from the package" in printed
    results = json.loads((folder / "out/results.json").read_text())
    assert results["trainer"] == trainer and results["metrics"]["total"] == 16
    assert "trainers" not in results["config"]


@pytest.mark.parametrize("name", NAMES)
def test_gram_train_without_an_edit(checkout, world, name):
    folder = checkout(name, line=False)
    run(folder, world, "gram", "train", *flags(world, "CoOpGRAM", OURS["CoOpGRAM"], "out", *OFF))
    assert json.loads((folder / "out/results.json").read_text())["trainer"] == "CoOpGRAM"
    assert "gram_meta" not in (folder / "train.py").read_text()


PROBE = """
import json
import clip
from dassl.data.datasets import DATASET_REGISTRY
from dassl.engine import TRAINER_REGISTRY
print(json.dumps([clip.__file__, [r.get(n).__module__ for r, n in
    [(TRAINER_REGISTRY, n) for n in {trainers}] + [(DATASET_REGISTRY, "EuroSAT"), (DATASET_REGISTRY, "ImageNet")]]]))
raise SystemExit
"""
WINNERS = {
    "CoOp": {"CoOp": "trainers.coop", "ZeroshotCLIP": "trainers.zsclip", "VPT": "gram_meta.trainers.vpt"},
    "MaPLe": {"VPT": "trainers.vpt", "MaPLe": "trainers.maple", "CoCoOp": "trainers.cocoop"},
    "PromptSRC": {"PromptSRC": "trainers.promptsrc", "CoOp": "trainers.coop"},
    "ProMetaR": {"CoOp": "gram_meta.trainers.coop"},  # its own needs learn2learn
}


@pytest.mark.parametrize("name", NAMES)
def test_what_the_checkout_has_wins(checkout, world, name):
    folder = checkout(name)
    text = (folder / "train.py").read_text()
    probe = PROBE.format(trainers=list(WINNERS[name]))
    (folder / "train.py").write_text(text.replace("\ndef print_args", f"{probe}\ndef print_args", 1))
    clip, modules = json.loads(run(folder, world, "python", "train.py", "--trainer", "CoOp").splitlines()[-1])
    assert clip == str(folder / "clip/__init__.py")
    assert modules == [*WINNERS[name].values(), "datasets.eurosat", "datasets.imagenet"]


# ------------------------------------------------------------------------------------------------------ equal numbers


def losses(printed):
    return [float(loss) for loss in re.findall(r"epoch \[.*? loss ([\d.]+) ", printed)]


def accuracy(printed):
    return re.findall(r"\* accuracy: ([\d.]+)%", printed)


def prompts(output):
    from gram_meta.engine.checkpoints import read_checkpoint

    state = read_checkpoint(next(output.glob("prompt_learner/model.pth.tar-*")))["state_dict"]
    return {key: value.float() for key, value in state.items() if not key.startswith("token_")}


EQUAL = {
    "CoOp": ("CoOp", "configs/trainers/CoOp/vit_b16_ep50_ctxv1.yaml", "COOP", ()),
    "CoOpGRAM": ("CoOp", "configs/trainers/CoOp/vit_b16_ep50_ctxv1.yaml", "COOP", OFF),
    "CoCoOp": ("CoCoOp", "configs/trainers/CoCoOp/vit_b16_c4_ep10_batch1_ctxv1.yaml", "COCOOP", ()),
}


@pytest.mark.parametrize("ours", EQUAL)
def test_equal_seeds_give_equal_numbers(checkout, world, tmp_path, ours):
    """In float32: the same losses, accuracy and prompts from the checkout's trainer and from ours, outside of it."""
    theirs, config, node, more = EQUAL[ours]
    options = (f"TRAINER.{node}.PREC", "fp32", f"TRAINER.{node}.N_CTX", "4", "OPTIM.LR", "0.02", *more)
    options = ("OPTIM.WARMUP_EPOCH", "-1", *options)
    folder, outside = checkout("CoOp"), tmp_path / "outside"
    outside.mkdir()
    official = run(folder, world, "python", "train.py", *flags(world, theirs, config, "out", *options))
    assert not (folder / "out/results.json").exists()  # it was theirs
    own = run(outside, world, "gram", "train", *flags(world, ours, folder / config, "out", *options))
    assert len(losses(official)) == (16 if ours == "CoCoOp" else 2)
    assert losses(official)[0] != losses(official)[-1]
    assert losses(official) == pytest.approx(losses(own), abs=2e-4)
    assert accuracy(official) == accuracy(own) != []
    there, here = prompts(folder / "out"), prompts(outside / "out")
    assert set(there) == set(here)
    assert max(float((there[key] - here[key]).abs().max()) for key in there) < 1e-5


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_equal_numbers_without_training(checkout, world, tmp_path, precision):
    config = "configs/trainers/CoOp/vit_b16_ep50_ctxv1.yaml"
    folder, outside = checkout("CoOp"), tmp_path / "outside"
    outside.mkdir()
    command = flags(world, "ZeroshotCLIP", config, "out")
    facts = {"CLIP_IN_FLOAT32": "1"} if precision == "fp32" else {}
    official = run(folder, world, "python", "train.py", "--eval-only", *command, **facts)
    command = flags(world, "ZeroshotCLIP", folder / config, "out", "TRAINER.COOP.PREC", precision)
    own = run(outside, world, "gram", "train", "--eval-only", *command)
    assert accuracy(official) == accuracy(own) != []


# ------------------------------------------------------------- GRAM on a checkout's trainer: its class, options, files

WIDE = (64, 32, 3, 768, 16, 77, 49408, 512, 8, 3)  # MaPLe has the widths of ViT-B/16 in its code; here 3 layers
OF_CHECKOUTS = {  # folder, config, options, shapes of what is learned
    "MaPLe": (
        "MaPLe",
        "vit_b16_c2_ep5_batch4_2ctx",
        ("TRAINER.MAPLE.PREC", "fp32", "TRAINER.MAPLE.PROMPT_DEPTH", "3", "INPUT.SIZE", "(32, 32)"),
        {"text": [3, 2, 512], "coupling.weight": [3, 768, 512], "coupling.bias": [3, 768]},
    ),
    "PromptSRC": (
        "PromptSRC",
        "vit_b16_c2_ep20_batch4_4+4ctx",
        (
            *("TRAINER.PROMPTSRC.PREC", "fp32", "TRAINER.PROMPTSRC.N_CTX_VISION", "3"),
            *("TRAINER.PROMPTSRC.PROMPT_DEPTH_TEXT", "2", "TRAINER.PROMPTSRC.PROMPT_DEPTH_VISION", "4"),
        ),
        {"text": [2, 4, 128], "visual": [4, 3, 128]},
    ),
    "KgCoOp": (
        "KgCoOp/KgCoOp",
        "vit_b16_ep100_ctxv1",
        ("TRAINER.COOP.PREC", "fp32", "TRAINER.COCOOP.PREC", "fp32", "TRAINER.COOP.W", "8.0"),
        {"text": [4, 128]},
    ),
}


@pytest.fixture(scope="session")
def wide_clip(tmp_path_factory):
    import torch

    from gram_meta.backbone.clip import clip_module
    from gram_meta.backbone.weights import empty_clip

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("wide") / "clip.pt"
    state = empty_clip(clip_module(), *WIDE).state_dict()
    torch.save({key: value.half() for key, value in state.items()}, path)
    return path


@pytest.mark.parametrize("trainer", OF_CHECKOUTS)
def test_gram_on_a_checkouts_trainer(checkout, world, wide_clip, trainer):
    """Without a checkpoint it equals the checkout's own trainer; with one it starts at theta*, in every layer."""
    place, config, options, shapes = OF_CHECKOUTS[trainer]
    folder, config = checkout(place, line=False), f"configs/trainers/{trainer}GRAM/{config}.yaml"
    options = (*options, "DATALOADER.TRAIN_X.BATCH_SIZE", "4", "OPTIM.WARMUP_EPOCH", "-1")
    command = flags(world, f"{trainer}GRAM", config, "out", *options)
    facts = {"NEITHER": "1", **({"CLIP_FILE": str(wide_clip)} if trainer == "MaPLe" else {})}
    printed = run(folder, world, "python", ROOT / "tests/helpers/gram_on_a_checkout.py", *command, **facts)
    assert f"taken from this checkout: {config.replace('GRAM/', '/')}" in printed
    found = json.loads(printed.splitlines()[-1])
    assert found["shapes"] == shapes
    assert len(found["losses"]) == 4 and found["losses"][0] != found["losses"][-1]
    assert found["equal losses"] and found["equal parameters"] and found["accuracy"][0] == found["accuracy"][1]
    assert found["theta*"] == 0  # apart from it, at the start
    depths = {kind: shape[0] if len(shape) == 3 else 1 for kind, shape in shapes.items() if "." not in kind}
    layers = [f"{kind}.{layer}" if layer else kind for kind, depth in depths.items() for layer in range(depth)]
    assert found["ratios"] == pytest.approx(dict.fromkeys(layers, 0.9), rel=1e-5)  # of an untrained R
    assert bool(found["raw"]) == (trainer == "MaPLe") and all("proj" in name for name in found["raw"])
    what = "2 layers, found one of 1 layer" if trainer == "PromptSRC" else "shape"
    assert f"other.safetensors: expected a text prompt of {what}" in found["refused"]
    if trainer != "KgCoOp":
        assert found["logits apart"] < 1e-5 and found["logits spread"] > 0.1


# ------------------------------------------------------------------------------------------------------------ scripts


def change(script, **values):
    """Set variables of a shell script, as an editor would."""
    text = script.read_text()
    for name, value in values.items():
        text, count = re.subn(rf"^{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
        assert count == 1, (script, name)
    script.write_text(text)


def test_its_own_scripts(checkout, world, tmp_path):
    """TRAINER and CFG changed, from the folder they expect; its own parser reads the logs."""
    folder = checkout("CoOp")
    scripts = folder / "scripts/cocoop"
    own = folder / "configs/trainers/CoOpGRAM/mine.yaml"
    own.parent.mkdir()
    packaged = (ROOT / OURS["CoOpGRAM"]).read_text()
    own.write_text(f"{packaged}    REGULATE: False\n    INIT: False\n".replace("META:", "META:", 1))
    for name in ("base2new_train.sh", "base2new_test.sh"):
        change(scripts / name, DATA=world / "data", TRAINER="CoOpGRAM", CFG="mine")
    run(scripts, world, "bash", "base2new_train.sh", "eurosat", "1")
    run(scripts, world, "bash", "base2new_test.sh", "eurosat", "1")
    tail = "eurosat/shots_16/CoOpGRAM/mine"
    for kind, more in (("train_base", ()), ("test_new", ("--test-log",))):
        output = folder / "output/base2new" / kind / tail
        results = json.loads((output / "seed1/results.json").read_text())
        command = ("python", "-m", "gram_meta.plugin", "parse_test_res.py", output, *more)  # it imports Dassl
        assert f"* accuracy: {results['metrics']['accuracy']:.1f}0% +- 0.00%" in run(folder, world, *command)
