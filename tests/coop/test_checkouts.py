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
    not PLACE, reason="GRAM_CHECKOUTS does not name a folder with checkouts of CoOp, MaPLe, PromptSRC, ProMetaR"
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
DEPTH = 3
NODES = {
    "MaPLe": ("TRAINER.MAPLE.PROMPT_DEPTH", DEPTH),
    "PromptSRC": ("TRAINER.PROMPTSRC.PROMPT_DEPTH_TEXT", DEPTH, "TRAINER.PROMPTSRC.PROMPT_DEPTH_VISION", DEPTH),
    "KgCoOp": ("TRAINER.COOP.W", 8.0, "TRAINER.COCOOP.PREC", "fp32"),
}
FOLDERS = {"MaPLe": "MaPLe", "PromptSRC": "PromptSRC", "KgCoOp": "KgCoOp/KgCoOp"}
CONFIG = {
    "MaPLe": "vit_b16_c2_ep5_batch4_2ctx",
    "PromptSRC": "vit_b16_c2_ep20_batch4_4+4ctx",
    "KgCoOp": "vit_b16_ep100_ctxv1",
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


def meta_checkpoint(path, **changes):
    """A meta-checkpoint of random numbers for the wide CLIP: {name: shape}, prompts before extras."""
    import torch

    from gram_meta.method.checkpoint import MetaCheckpoint, save_meta_checkpoint
    from gram_meta.method.prompts import KINDS
    from gram_meta.method.regulator import GradientRegulator

    tensors = {name: 0.05 * torch.randn(shape) for name, shape in changes.items()}
    kept = {kind: tensors.pop(kind) for kind in KINDS if kind in tensors}
    regulator = GradientRegulator({kind: value.shape[-1] for kind, value in kept.items()})
    save_meta_checkpoint(path, MetaCheckpoint(kept, regulator, "ViT-B/16", "0" * 64, extras=tensors))
    return {**kept, **tensors}


def learned(output):
    from gram_meta.engine.checkpoints import read_checkpoint

    (path,) = output.glob("*/model.pth.tar-2")
    return read_checkpoint(path)["state_dict"]


THETA = {
    "MaPLe": {"text": (DEPTH, 2, 512), "coupling.weight": (DEPTH, 768, 512), "coupling.bias": (DEPTH, 768)},
    "PromptSRC": {"text": (DEPTH, 4, 512), "visual": (DEPTH, 4, 768)},
    "KgCoOp": {"text": (4, 512)},
}


def named(trainer, theta):
    """theta* under the names of the trainer's own checkpoints."""
    if trainer == "KgCoOp":
        return {"ctx": theta["text"]}
    first, *deeper = theta["text"]
    if trainer == "MaPLe":
        names = ["proj", *(f"compound_prompt_projections.{layer}" for layer in range(DEPTH - 1))]
        layers = {f"compound_prompts_text.{layer}": value for layer, value in enumerate(deeper)}
        for part in ("weight", "bias"):
            layers |= {f"{name}.{part}": value for name, value in zip(names, theta[f"coupling.{part}"], strict=True)}
        return {f"prompt_learner.{name}": value for name, value in ({"ctx": first} | layers).items()}
    names = {"text": ("text_encoder", "prompt_learner.ctx"), "visual": ("image_encoder", "image_encoder.VPT")}
    return {
        f"{tower}.transformer.resblocks.{layer}.VPT_shallow" if layer else name: value
        for kind, (tower, name) in names.items()
        for layer, value in enumerate(theta[kind])
    }


@pytest.mark.parametrize("trainer", FOLDERS)
def test_gram_on_a_checkouts_trainer(checkout, world, wide_clip, tmp_path, trainer):
    """Without a checkpoint it equals the checkout's own trainer; with one it starts at theta*, in every layer."""
    folder, config = checkout(FOLDERS[trainer]), f"configs/trainers/{trainer}/{CONFIG[trainer]}.yaml"
    node = NODES[trainer][0].rpartition(".")[0]
    options = (*NODES[trainer], f"{node}.PREC", "fp32", "INPUT.SIZE", "(32, 32)", "OPTIM.WARMUP_EPOCH", "-1")

    def go(name, config, out, *more):
        command = flags(world, name, config, out, *options, *more)
        return run(folder, world, "python", "train.py", *command, NEITHER="1", CLIP_FILE=str(wide_clip))

    official = go(trainer, config, "own")
    config = config.replace(f"/{trainer}/", f"/{trainer}GRAM/")  # as its scripts name it
    printed = go(f"{trainer}GRAM", config, "gram", *OFF)
    assert f"taken from this checkout: configs/trainers/{trainer}/{CONFIG[trainer]}.yaml" in printed
    assert losses(official) == losses(printed) != [] and losses(official)[0] != losses(official)[-1]
    assert accuracy(official) == accuracy(printed) != []
    own, gram = learned(folder / "own"), learned(folder / "gram")
    assert set(own) == set(gram) and all(own[key].equal(gram[key]) for key in own)
    theta = meta_checkpoint(tmp_path / "meta.safetensors", **THETA[trainer])
    meta = ("TRAINER.GRAM.CHECKPOINT", tmp_path / "meta.safetensors")
    printed = go(f"{trainer}GRAM", config, "meta", *meta, "OPTIM.LR", "0.0")
    for name, value in named(trainer, theta).items():
        found = learned(folder / "meta")[name]  # PromptSRC's are averages over epochs
        assert (found - value).abs().max() < 1e-7, name
    for kind in {"text", "visual"} & set(theta):
        for layer in range(1, len(theta[kind]) if theta[kind].dim() == 3 else 1):
            assert f"regulator: {kind}.{layer} gradient norm" in printed
    assert ("Raw gradients, as the regulator does not know them: " in printed) == (trainer == "MaPLe")
    wrong = {"text": (2, *THETA[trainer]["text"][1:])} if trainer != "KgCoOp" else {"text": (3, 512)}
    meta_checkpoint(tmp_path / "meta.safetensors", **(THETA[trainer] | wrong))
    with pytest.raises(
        AssertionError, match=r"train.py: .*meta.safetensors: expected a text prompt of shape .*, found"
    ):
        go(f"{trainer}GRAM", config, "wrong", *meta)


LOGITS = """
import gram_meta.plugin
import torch
from types import SimpleNamespace
from yacs.config import CfgNode as CN
from gram_meta.backbone.clip import load_backbone
from gram_meta.method.prompts import CoupledCLIP, PromptedCLIP
from gram_meta.trainers import maplegram, promptsrcgram
from trainers import {module} as theirs

trainer = {{"maple": maplegram.MaPLeGRAM, "promptsrc": promptsrcgram.PromptSRCGRAM}}["{module}"]
common = {{"CTX_INIT": "a photo of a", "PREC": "fp32"}}
cfg = CN({{
    "TRAINER": {{
        "MAPLE": {{**common, "N_CTX": 2, "PROMPT_DEPTH": 3}},
        "PROMPTSRC": {{
            **common, "N_CTX_TEXT": 4, "N_CTX_VISION": 3, "PROMPT_DEPTH_TEXT": 2, "PROMPT_DEPTH_VISION": 3
        }},
    }},
    "MODEL": {{"BACKBONE": {{"NAME": "ViT-B/16"}}}}, "INPUT": {{"SIZE": (32, 32)}}, "OPTIM": {{"MAX_EPOCH": 2}},
}})
torch.manual_seed(1)
names, images = ["apple", "sea lion", "very big house"], torch.randn(4, 3, 32, 32)
model = theirs.CustomCLIP(cfg, names, theirs.load_clip_to_cpu(cfg).float()).eval()
held = SimpleNamespace(bare_model=model)
prompts = {{kind: torch.stack(list(layers)) for kind, layers in trainer.gram_prompts(held).items()}}
extras = {{name: torch.stack(layers) for name, layers in trainer.gram_extras(held).items()}}
backbone = load_backbone("ViT-B/16")
if extras:
    ours = CoupledCLIP(backbone, ["of a " + name for name in names], prompts, extras)
else:
    ours = PromptedCLIP(backbone, names, prompts)
with torch.no_grad():
    there, here = model(images), ours(images)
print({{kind: tuple(value.shape) for kind, value in prompts.items()}})
print(float((there - here).abs().max() / there.abs().max()), float(there.std()))
"""


@pytest.mark.parametrize("name", ["MaPLe", "PromptSRC"])
def test_logits_of_deep_prompts_equal_the_checkouts_own(checkout, world, wide_clip, name):
    code = LOGITS.format(module=name.lower())
    printed = run(checkout(name), world, "python", "-c", code, NEITHER="1", CLIP_FILE=str(wide_clip))
    shapes, numbers = printed.splitlines()[-2:]
    depths = {"MaPLe": "{'text': (3, 2, 512)}", "PromptSRC": "{'text': (2, 4, 512), 'visual': (3, 3, 768)}"}
    assert shapes == depths[name]
    apart, spread = map(float, numbers.split())
    assert apart < 1e-5 and spread > 0.1


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
