"""Prompts, checkpoints and logs between this project and checkouts of CoOp and MaPLe.

Those tests that need a checkout look for it under GRAM_CHECKOUTS (a folder that holds CoOp and MaPLe); nothing in it is
changed.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from gram_meta.backbone.clip import load_backbone
from gram_meta.cli import main
from gram_meta.errors import GramError
from gram_meta.method.checkpoint import MetaCheckpoint, save_meta_checkpoint
from gram_meta.method.prompts import initial_meta_net
from gram_meta.method.regulator import GradientRegulator, RegulatorConfig
from gram_meta.tools.export import TARGETS, export

pytestmark = pytest.mark.slow

D = 64  # of random-tiny's towers


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """random-tiny as a file, its values such as half precision has: the checkouts' builders go through it."""
    path = tmp_path_factory.mktemp("clip") / "tiny.pt"
    state = load_backbone("random-tiny").model.state_dict()
    torch.save({key: value.half().float() for key, value in state.items()}, path)
    return path


@pytest.fixture(scope="module")
def backbone(weights):
    return load_backbone(str(weights))


@pytest.fixture(scope="module")
def metas(tmp_path_factory, backbone):
    """Meta-checkpoints by what they hold; prompts of values that half precision has."""
    folder = tmp_path_factory.mktemp("meta")
    torch.manual_seed(3)
    text = (torch.randn(4, D) * 0.02).half().float()
    visual = (torch.randn(2, D) * 0.02).half().float()
    net = {f"meta_net.{name}": value + 0.01 for name, value in initial_meta_net(backbone, seed=5).items()}
    held = {
        "text": ({"text": text}, {}),
        "visual": ({"visual": visual}, {}),
        "both": ({"text": text, "visual": visual}, {}),
        "conditional": ({"text": text}, net),
    }
    for name, (prompts, extras) in held.items():
        regulator = GradientRegulator({kind: D for kind in prompts}, RegulatorConfig())
        meta = MetaCheckpoint(prompts, regulator, backbone.name, backbone.fingerprint, extras=extras)
        save_meta_checkpoint(folder / f"{name}.safetensors", meta)
    return folder, held


# --- gram export ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "held, trainer, names",
    [
        ("text", "", {"ctx"}),
        ("visual", "", {"visual_ctx"}),
        ("both", "", {"ctx", "visual_ctx"}),
        ("conditional", "", {"ctx", *(f"meta_net.linear{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias"))}),
        ("conditional", "CoOp", {"ctx"}),
        ("both", "CoOp", {"ctx"}),
        ("visual", "MaPLe/VPT", {"image_encoder.VPT"}),
        ("both", "MaPLe/IVLP", {"prompt_learner.ctx", "image_encoder.VPT"}),
        ("both", "PromptSRC", {"prompt_learner.ctx", "image_encoder.VPT"}),
        ("text", "MaPLe", {"prompt_learner.ctx"}),
    ],
)
def test_names_are_the_trainers(tmp_path, metas, held, trainer, names):
    folder, prompts = metas
    done = export(folder / f"{held}.safetensors", tmp_path / "theta.pth.tar", trainer)
    state = torch.load(tmp_path / "theta.pth.tar", weights_only=True)  # nothing but tensors and plain values
    assert set(state["state_dict"]) == names and state["epoch"] == 0
    kinds, extras = prompts[held]
    expected = {"ctx": "text", "visual_ctx": "visual", "prompt_learner.ctx": "text", "image_encoder.VPT": "visual"}
    for name, value in state["state_dict"].items():
        torch.testing.assert_close(value, extras[name] if name in extras else kinds[expected[name]], rtol=0, atol=0)
    assert "the regulator" in done.left_out
    assert ("the visual prompt" in done.left_out) == (held == "both" and trainer == "CoOp")
    assert ("the meta-net" in done.left_out) == (held == "conditional" and trainer == "CoOp")


def test_what_a_trainer_lacks_is_refused(tmp_path, metas):
    folder, _ = metas
    for held, trainer, sentence in (
        ("visual", "CoOp", "expected a text prompt, which CoOp learns, found visual alone"),
        ("text", "UniGRAM", "expected a visual prompt, which UniGRAM learns"),
        ("text", "CoCoOp", "expected CoCoOp's meta-net beside the prompt"),
        ("text", "CoOpp", "--trainer CoOpp: expected one of .*did you mean 'CoOp'"),
    ):
        with pytest.raises(GramError, match=sentence):
            export(folder / f"{held}.safetensors", tmp_path / "no.pth.tar", trainer)
    with pytest.raises(GramError, match="expected a meta-checkpoint"):
        export(tmp_path / "nothing.safetensors", tmp_path / "no.pth.tar")
    with pytest.raises(GramError, match="the name of a file to write, found a folder"):
        export(folder / "text.safetensors", tmp_path)
    assert not (tmp_path / "no.pth.tar").exists()


def test_the_command_says_how_the_file_is_used(tmp_path, metas, capsys):
    folder, _ = metas
    out = tmp_path / "deep" / "theta.pth.tar"
    assert main(["export", str(folder / "both.safetensors"), "-o", str(out), "--trainer", "MaPLe/IVLP"]) == 0
    printed = capsys.readouterr().out
    assert f"MODEL.INIT_WEIGHTS {out} TRAINER.IVLP.N_CTX_TEXT 4 TRAINER.IVLP.N_CTX_VISION 2" in printed
    assert "prompt_learner.ctx (4, 64)" in printed and "Left out: the regulator" in printed
    assert main(["export", str(folder / "visual.safetensors"), "-o", str(out)]) == 0
    assert "TRAINER.VPT.N_CTX_VISION 2 TRAINER.VPT.PROMPT_DEPTH_VISION 1" in capsys.readouterr().out


def test_dassls_loader_takes_it(tmp_path, metas, capsys):
    """By name and size, into whatever precision the learner has."""
    from gram_meta.engine import load_pretrained_weights

    folder, held = metas
    export(folder / "text.safetensors", tmp_path / "theta.pth.tar")
    learner = torch.nn.Module()
    learner.ctx = torch.nn.Parameter(torch.zeros(4, D, dtype=torch.float16))
    learner.register_buffer("token_prefix", torch.ones(2, 1, D))
    load_pretrained_weights(learner, str(tmp_path / "theta.pth.tar"))
    assert "discarded" not in capsys.readouterr().out
    torch.testing.assert_close(learner.ctx.float(), held["text"][0]["text"], rtol=0, atol=0)
    assert (learner.token_prefix == 1).all()


def options(data, weights, trainer, *more):
    config = {"CoOp": "c4_ep10_batch32_ctxv1", "CoCo": "c4_ep10_batch1_ctxv1", "VPT": "c4_ep10_batch32_ctxv1"}
    kind = (
        trainer.removesuffix("GRAM").removesuffix("Op") if trainer.startswith("CoCo") else trainer.removesuffix("GRAM")
    )
    config["Joint"] = config["Uni"] = "c2+2_ep10_batch32_ctxv1"
    name = config[kind.removesuffix("Prompt")]
    return [
        "--root",
        str(data),
        "--seed",
        "1",
        "--trainer",
        trainer,
        "--dataset-config-file",
        "emoji_food",
        "--config-file",
        f"gram_small_{name}",
        "--backbone",
        str(weights),
        "INPUT.SIZE",
        "(32,32)",
        "DATALOADER.NUM_WORKERS",
        "0",
        "OPTIM.MAX_EPOCH",
        "1",
        "DATASET.NUM_SHOTS",
        "2",
        *more,
    ]


def built(arguments):
    import gram_meta.plugin  # noqa: F401
    from gram_meta import engine
    from gram_meta.coop import launch

    engine.set_random_seed(1)
    return engine.build_trainer(launch.setup_cfg(launch.build_parser().parse_args(arguments)))


@pytest.mark.parametrize(
    "held, plain, gram, node",
    [
        ("text", "CoOp", "CoOpGRAM", "COOP"),
        ("conditional", "CoCoOp", "CoCoOpGRAM", "COCOOP"),
        ("visual", "VPT", "VPTGRAM", "VPT"),
        ("both", "JointPrompt", "UniGRAM", "JOINT"),
    ],
)
def test_plain_trainers_here_start_where_gram_starts(
    tmp_path, tiny_data, weights, metas, monkeypatch, held, plain, gram, node
):
    monkeypatch.chdir(tmp_path)
    folder, _ = metas
    meta, theta = folder / f"{held}.safetensors", tmp_path / "theta.pth.tar"
    done = export(meta, theta)
    assert done.trainer == plain
    precision = (f"TRAINER.{node}.PREC", "fp32")
    counts = [str(word) for pair in done.options.items() for word in pair]
    if held == "both":
        counts += [f"TRAINER.{node}.CTX_INIT", "a photo of a"]
    ours = built(options(tiny_data, weights, plain, *precision, "MODEL.INIT_WEIGHTS", str(theta), *counts))
    regulated = ("TRAINER.GRAM.CHECKPOINT", str(meta), "TRAINER.GRAM.REGULATE", "False")
    theirs = built(options(tiny_data, weights, gram, *precision, *regulated, *counts))
    images = torch.cat([batch["img"] for batch in ours.test_loader])
    with torch.no_grad():
        expected = theirs.model_inference(images)
        torch.testing.assert_close(ours.model_inference(images), expected, rtol=0, atol=0)
        assert expected.std() > 0
    batches = list(ours.train_loader_x)
    assert steps(ours, batches) == pytest.approx(steps(theirs, batches), abs=1e-6)


def steps(trainer, batches, count=3):
    """Losses of a few steps on given batches."""
    trainer.num_batches, trainer.epoch = 100, 0
    trainer.set_model_mode("train")
    losses = []
    for trainer.batch_idx in range(count):
        losses.append(trainer.forward_backward(batches[trainer.batch_idx % len(batches)])["loss"].item())
    return losses


# --- with checkouts ---------------------------------------------------------------------------------------------------


def checkout(name):
    folder = os.path.join(os.environ.get("GRAM_CHECKOUTS") or "", name)
    if not os.path.isfile(os.path.join(folder, "train.py")):
        pytest.skip(f"GRAM_CHECKOUTS names no folder with a checkout of {name}")
    return folder


PRELUDE = """
import os, runpy, sys
checkout, weights, *sys.argv = sys.argv[1:]
sys.path.insert(0, checkout)
from gram_meta import engine
engine.backend()
import clip.clip
assert clip.clip.__file__.startswith(checkout)
clip.clip._download = lambda url, root=None: weights
"""
SCRIPT = PRELUDE + 'runpy.run_path(os.path.join(checkout, sys.argv[0]), run_name="__main__")\n'


def python(code, place, weights, *words):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, place, str(weights), *map(str, words)],
        capture_output=True,
        text=True,
        cwd=place,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def eurosat(tiny_data, tmp_path_factory):
    """The same pictures as EuroSAT, a dataset that CoOp knows."""
    root = tmp_path_factory.mktemp("data")
    shutil.copytree(tiny_data / "emoji_food" / "images", root / "eurosat" / "2750")
    shutil.copy(tiny_data / "emoji_food" / "split_zhou_EmojiFood.json", root / "eurosat" / "split_zhou_EuroSAT.json")
    return root


COMPARE = (
    PRELUDE
    + """
import importlib, json, torch
root, theta, meta, name, config = sys.argv
official = getattr(importlib.import_module(f"trainers.{name.lower()}"), name)
import datasets.eurosat
import gram_meta.plugin
from gram_meta.coop import launch
ours = getattr(importlib.import_module(f"gram_meta.trainers.{name.lower()}gram"), name + "GRAM")
assert official.__module__ == f"trainers.{name.lower()}"

def build(cls, *more):
    node = name.upper()
    words = ["--root", root, "--seed", "1", "--trainer", name, "--dataset-config-file", "eurosat", "--config-file",
        os.path.join(checkout, "configs", "trainers", name, config), "INPUT.SIZE", "(32,32)", "DATASET.NUM_SHOTS", "2",
        "DATALOADER.NUM_WORKERS", "0", f"TRAINER.{node}.PREC", "fp32", f"TRAINER.{node}.N_CTX", "4",
        f"TRAINER.{node}.CTX_INIT", "", "OPTIM.WARMUP_EPOCH", "-1", "OPTIM.LR", "0.1", *more]
    engine.set_random_seed(1)
    trainer = cls(launch.setup_cfg(launch.build_parser().parse_args(words)))
    trainer.num_batches, trainer.epoch = 100, 0
    return trainer

theirs = build(official, "MODEL.INIT_WEIGHTS", theta)
gram = build(ours, "TRAINER.GRAM.CHECKPOINT", meta, "TRAINER.GRAM.REGULATE", "False")
images = torch.cat([batch["img"] for batch in theirs.test_loader])
batches = list(theirs.train_loader_x) * 4
facts = {"same class": type(theirs) is type(gram)}
with torch.no_grad():
    one, other = [(t.set_model_mode("eval"), t.model_inference(images))[1] for t in (theirs, gram)]
facts["logits"], facts["size"] = (one - other).abs().max().item(), other.abs().max().item()
losses = []
for trainer in (theirs, gram):
    trainer.set_model_mode("train")
    losses.append([])
    for trainer.batch_idx, batch in enumerate(batches[:4]):
        losses[-1].append(trainer.forward_backward(batch)["loss"])
facts["losses"] = losses
print("FACTS", json.dumps(facts))
"""
)


@pytest.mark.parametrize(
    "name, held, config", [("CoOp", "text", "vit_b16.yaml"), ("CoCoOp", "conditional", "vit_b16_c4_ep10_batch1.yaml")]
)
def test_an_official_trainer_starts_from_an_exported_prompt(tmp_path, eurosat, weights, metas, name, held, config):
    place = checkout("CoOp")
    meta = metas[0] / f"{held}.safetensors"
    export(meta, tmp_path / "theta.pth.tar", name)
    printed = python(COMPARE, place, weights, eurosat, tmp_path / "theta.pth.tar", meta, name, config)
    assert "discarded" not in printed  # what Dassl prints if a name or size does not agree
    facts = json.loads(printed.rpartition("FACTS ")[2])
    assert not facts["same class"] and facts["size"] > 1
    assert facts["logits"] < 1e-4, facts
    assert facts["losses"][0] == pytest.approx(facts["losses"][1], abs=1e-4)
    assert abs(facts["losses"][0][0] - facts["losses"][0][-1]) > 1e-3  # steps were made


FAMILY = (
    PRELUDE
    + """
import importlib, json, torch
from types import SimpleNamespace as Node
from dassl.utils import load_pretrained_weights
module, theta, node, images = sys.argv
trainer = importlib.import_module(f"trainers.{module}")
options = Node(PROMPT_DEPTH_VISION=1, PROMPT_DEPTH_TEXT=1, N_CTX_VISION=2, N_CTX_TEXT=4, CTX_INIT="", PREC="fp32")
cfg = Node(MODEL=Node(BACKBONE=Node(NAME="ViT-B/16")), INPUT=Node(SIZE=(32, 32)), TRAINER=Node(**{node: options}))
model = trainer.CustomCLIP(cfg, ["cat", "big dog", "house"], trainer.load_clip_to_cpu(cfg).float()).float()
load_pretrained_weights(model, theta)
torch.Tensor.cuda = lambda self, *args, **more: self  # VPT's forward asks for a GPU
with torch.no_grad():
    print("FACTS", json.dumps(model.eval()(torch.load(images)).tolist()))
"""
)


@pytest.mark.parametrize(
    "held, trainer, module, node",
    [("visual", "MaPLe/VPT", "vpt", "VPT"), ("both", "MaPLe/IVLP", "independentVL", "IVLP")],
)
def test_maples_vpt_and_ivlp_compute_the_same_from_it(tmp_path, weights, metas, backbone, held, trainer, module, node):
    from gram_meta.method.prompts import PromptedCLIP

    place = checkout("MaPLe")
    export(metas[0] / f"{held}.safetensors", tmp_path / "theta.pth.tar", trainer)
    torch.manual_seed(0)
    images = torch.randn(3, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    printed = python(FAMILY, place, weights, module, tmp_path / "theta.pth.tar", node, tmp_path / "images.pt")
    assert "discarded" not in printed and "Successfully loaded" in printed
    theirs = torch.tensor(json.loads(printed.rpartition("FACTS ")[2]))
    model = PromptedCLIP(backbone, ["cat", "big dog", "house"], metas[1][held][0])
    with torch.no_grad():
        ours = model(images)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-3)  # of logits of size 10


@pytest.fixture(scope="module")
def runs(tmp_path_factory, eurosat, weights, metas):
    """Three runs: CoOp's own, ours of two seeds; each evaluated by the other side."""
    place = checkout("CoOp")
    out = tmp_path_factory.mktemp("runs")
    common = ["--root", eurosat, "--dataset-config-file", "configs/datasets/eurosat.yaml"]
    opts = ["INPUT.SIZE", "(32,32)", "DATASET.NUM_SHOTS", "2", "DATALOADER.NUM_WORKERS", "0", "OPTIM.MAX_EPOCH", "2"]
    opts += ["TRAINER.COOP.PREC", "fp32"]

    def theirs(folder, *words, more=()):
        flags = ["--trainer", "CoOp", "--config-file", "configs/trainers/CoOp/vit_b16_ctxv1.yaml", "--seed", "1"]
        python(SCRIPT, place, weights, "train.py", *common, *flags, "--output-dir", out / folder, *words, *opts, *more)

    def ours(folder, seed, *words, trainer="CoOpGRAM", more=(), status=0):
        flags = ["--trainer", trainer, "--seed", str(seed), "--config-file", "gram_small_c4_ep10_batch32_ctxv1"]
        gram = ["TRAINER.GRAM.CHECKPOINT", str(metas[0] / "text.safetensors")] if trainer == "CoOpGRAM" else []
        words = [
            *map(str, common),
            *flags,
            "--backbone",
            str(weights),
            "--output-dir",
            str(out / folder),
            *map(str, words),
        ]
        assert main(["train", *words, *opts, *gram, *more]) == status

    base, new = ("DATASET.SUBSAMPLE_CLASSES", "base"), ("DATASET.SUBSAMPLE_CLASSES", "new")
    here = os.getcwd()
    os.chdir(out)  # not in a checkout
    try:
        theirs("theirs/train_base/seed1", more=base)
        theirs(
            "theirs/test_new/seed1",
            "--eval-only",
            "--model-dir",
            out / "theirs/train_base/seed1",
            "--load-epoch",
            "2",
            more=new,
        )
        for seed in (1, 2):
            tail = f"seed{seed}"
            ours(f"ours/train_base/{tail}", seed, more=base)
            ours(f"ours/test_new/{tail}", seed, "--eval-only", "--model-dir", out / "ours/train_base" / tail, more=new)
        parts = [*base, "TRAIN.CHECKPOINT_FREQ", "1"]
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch)
            ours("parts/seed1", 1, more=parts, status=130)
        assert not (out / "parts/seed1/results.json").exists()
        ours("parts/seed1", 1, more=parts)  # goes on with the second epoch, in the same log
        # across
        theirs(
            "across/coop_on_ours/seed1",
            "--eval-only",
            "--model-dir",
            out / "ours/train_base/seed1",
            "--load-epoch",
            "2",
            more=new,
        )
        ours("across/coopgram_on_theirs", 1, "--eval-only", "--model-dir", out / "theirs/train_base/seed1", more=new)
        ours(
            "across/coop_on_theirs",
            1,
            "--eval-only",
            "--model-dir",
            out / "theirs/train_base/seed1",
            trainer="CoOp",
            more=new,
        )
    finally:
        os.chdir(here)
    return out, place


def interrupt(patch):
    """Ctrl-C in the second epoch."""
    from gram_meta.trainers.coopgram import CoOpGRAM

    step = CoOpGRAM.forward_backward

    def stopping(self, batch):
        if self.epoch == 1:
            raise KeyboardInterrupt
        return step(self, batch)

    patch.setattr(CoOpGRAM, "forward_backward", stopping)


def correct(folder):
    """What the log says was classified correctly, last."""
    lines = (folder / "log.txt").read_text().splitlines()
    return [int(line.split()[-1].replace(",", "")) for line in lines if line.startswith("* correct")][-1]


def test_prompts_go_both_ways(runs):
    out, _ = runs
    assert correct(out / "across/coop_on_ours/seed1") == correct(out / "ours/test_new/seed1")
    assert correct(out / "across/coopgram_on_theirs") == correct(out / "theirs/test_new/seed1")
    assert correct(out / "across/coop_on_theirs") == correct(out / "theirs/test_new/seed1")
    assert "does not say who learned these prompts" in (out / "across/coop_on_theirs/log.txt").read_text()


def test_its_parser_reads_our_logs(runs, weights):
    out, place = runs
    for folder, words in (
        ("ours/train_base", []),
        ("ours/test_new", ["--test-log"]),
        ("parts", []),  # interrupted, and gone on in the same log
        ("theirs/train_base", []),
    ):
        printed = python(SCRIPT, place, weights, "parse_test_res.py", out / folder, *words)
        seeds = sorted(path.name for path in (out / folder).iterdir())
        accuracies = []
        for seed in seeds:
            where = out / folder / seed
            if (where / "results.json").is_file():
                accuracies.append(json.loads((where / "results.json").read_text())["metrics"]["accuracy"])
                assert f"{where}/log.txt. accuracy: {accuracies[-1]:.1f}0%" in printed
        assert printed.count("accuracy: ") == len(seeds) + 1
        if accuracies:
            mean = sum(round(value, 1) for value in accuracies) / len(accuracies)
            assert f"* accuracy: {mean:.2f}% +- " in printed


def test_our_report_reads_its_logs(runs, capsys):
    out, _ = runs
    assert main(["report", str(out / "theirs"), "--format", "json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    rows = {row["label"]: row for report in reports for row in report["rows"]}
    total = 4  # test images of two classes
    for column, folder in (("base", "train_base"), ("new", "test_new")):
        cell = rows["CoOp, from a log"]["cells"][column]
        assert cell["mean"] == pytest.approx(100 * correct(out / "theirs" / folder / "seed1") / total)
    # the backbone's name separates theirs from ours: here the download was replaced
    assert main(["report", str(out / "theirs"), str(out / "ours")]) == 2
    assert "expected one backbone, found 'ViT-B/16'" in capsys.readouterr().err


def test_words_of_its_runs(runs, weights, capsys):
    out, _ = runs
    assert (
        main(["interpret", str(out / "theirs/train_base/seed1"), "--backbone", str(weights), "--format", "json"]) == 0
    )
    facts = json.loads(capsys.readouterr().out)
    assert facts["trainer"] == "CoOp" and facts["epoch"] == 2 and facts["shape"] == [4, D]
    assert main(["interpret", str(out / "ours/test_new/seed1")]) == 0  # the run that it evaluates
    assert f"words of {weights}" in capsys.readouterr().out


def test_every_target_names_its_options():
    for name, target in TARGETS.items():
        assert set(target.names) == set(target.options), name
