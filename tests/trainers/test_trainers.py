"""The trainers on a tiny dataset and a tiny CLIP: CoOp is CoOp, CoOpGRAM is CoOp through R, and runs go on exactly."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.training import train_flags
from PIL import Image
from torch import nn

import gram_meta.plugin  # noqa: F401, fills the registries
from gram_meta import cli
from gram_meta.config import merge_opts
from gram_meta.coop import launch
from gram_meta.engine import build_trainer, set_random_seed
from gram_meta.errors import GramError
from gram_meta.method.apply import Regulation
from gram_meta.method.checkpoint import MetaCheckpoint, load_meta_checkpoint, save_meta_checkpoint
from gram_meta.method.prompts import context_from_words
from gram_meta.method.regulator import GradientRegulator, RegulatorConfig
from gram_meta.runs.folder import open_folder
from gram_meta.tools.interpret import interpret
from gram_meta.tools.predict import Predictor

CONFIG = "gram_small_c4_ep10_batch32_ctxv1"
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "sky_blue": (80, 180, 255),
    "grey": (128,) * 3,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A root with EmojiFood: noisy squares of five colours, 8 / 2 / 4 images each; 3 base and 2 new classes."""
    root = tmp_path_factory.mktemp("world")
    folder = root / "emoji_food"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    split = {"train": [], "val": [], "test": []}
    for label, (name, colour) in enumerate(COLOURS.items()):
        for part, count in (("train", 8), ("val", 2), ("test", 4)):
            for index in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 60, (40, 36, 3)), 0, 255)
                file = f"{name}_{part}_{index}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / file)
                split[part].append([file, label, name])
    (folder / "split_zhou_EmojiFood.json").write_text(json.dumps(split))
    return root


def save_meta(path, backbone, prompt=None, regulator=None, norms=(0.01, 1000.0)):
    """A meta-checkpoint; by default theta* = "a photo of a" and the constant gate of 0.9."""
    prompt = context_from_words(backbone, "a photo of a") if prompt is None else prompt
    regulator = GradientRegulator({"text": backbone.text_width}) if regulator is None else regulator
    quantiles = {"text": {"q05": norms[0], "q50": sum(norms) / 2, "q95": norms[1]}}
    facts = (backbone.name, backbone.fingerprint)
    checkpoint = MetaCheckpoint({"text": prompt}, regulator or None, *facts, gradient_norms=quantiles)
    save_meta_checkpoint(path, checkpoint)
    return str(path)


def constant_gate(backbone, gamma):
    """R(g) = gamma * g exactly; 1 is the identity."""
    regulator = GradientRegulator({"text": backbone.text_width})
    with torch.no_grad():
        regulator.gates["text"].bias_gamma.fill_(40.0 if gamma == 1 else math.atanh(gamma))
    return regulator


def flags(world, out, trainer, *opts, seed=1):
    options = ("--backbone", "random-tiny", "INPUT.SIZE", "(32,32)", "DATASET.NUM_SHOTS", 4, "OPTIM.MAX_EPOCH", 3)
    options += ("DATALOADER.TRAIN_X.BATCH_SIZE", 4, "DATASET.SUBSAMPLE_CLASSES", "base", *opts)
    config = "gram_small" if trainer == "ZeroshotCLIP" else CONFIG
    return train_flags(world, out, trainer, *options, config=config, seed=seed)


def train(world, out, trainer, *opts, seed=1):
    before = [a for a in opts if str(a).startswith("--")]
    assert not before, "options only"
    return launch.train(flags(world, out, trainer, *opts, seed=seed), quiet=True)


def context(out, epoch):
    path = Path(out, "prompt_learner", f"model.pth.tar-{epoch}")
    return torch.load(path, weights_only=True)["state_dict"]["ctx"]


def build(world, trainer, *opts):
    """A trainer without a run around it."""
    args = launch.build_parser().parse_args(flags(world, "unused", trainer, *opts))
    cfg = launch.setup_cfg(args)
    set_random_seed(cfg.SEED)
    return build_trainer(cfg)


# ----------------------------------------------------------------------------------------------------- CoOp is CoOp


def openai_logits(clip, images, ctx, tokens, n_ctx):
    """CoOp's forward pass through CLIP's own modules, at all 77 positions; nothing of this project in it."""
    with torch.no_grad():
        embedding = clip.token_embedding(tokens)  # (N, 77, d)
        image = clip.visual(images)  # (B, D)
    x = torch.cat([embedding[:, :1], ctx.expand(len(tokens), -1, -1), embedding[:, 1 + n_ctx :]], dim=1)
    x = (x + clip.positional_embedding).permute(1, 0, 2)
    x = clip.ln_final(clip.transformer(x).permute(1, 0, 2))
    text = x[torch.arange(len(tokens)), tokens.argmax(-1)] @ clip.text_projection  # (N, D)
    image, text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
    return clip.logit_scale.exp() * image @ text.t()


@pytest.mark.slow
def test_coop_follows_the_plain_calculation_over_50_steps(world):
    """Loss and context, against OpenAI's modules at 77 tokens and SGD, warm-up and cosine written out."""
    epochs, lr, momentum, decay = 17, 0.02, 0.9, 5e-4  # 17 epochs of 3 batches; ten times CoOp's rate
    trainer = build(world, "CoOp", "OPTIM.MAX_EPOCH", epochs, "OPTIM.LR", lr)
    trainer.num_batches = len(trainer.train_loader_x)
    assert trainer.num_batches == 3
    clip = trainer.backbone.model
    names = [name.replace("_", " ") for name in trainer.dm.dataset.classnames]
    tokens = trainer.backbone.tokenize([f"a photo of a {name}." for name in names])
    ctx = clip.token_embedding(tokens)[0, 1:5].detach().clone().requires_grad_()
    start, velocity = ctx.detach().clone(), torch.zeros_like(ctx)
    trainer.set_model_mode("train")
    worst_loss = worst_ctx = 0.0
    for epoch in range(epochs):
        trainer.epoch = epoch
        rate = 1e-5 if epoch == 0 else lr * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2
        for index, batch in enumerate(trainer.train_loader_x):
            trainer.batch_idx = index
            assert trainer.get_current_lr() == pytest.approx(rate, rel=1e-6)
            ours = trainer.forward_backward(batch)
            loss = F.cross_entropy(openai_logits(clip, batch["img"], ctx, tokens, 4), batch["label"])
            (gradient,) = torch.autograd.grad(loss, ctx)
            velocity = momentum * velocity + gradient + decay * ctx.detach()
            ctx = (ctx.detach() - rate * velocity).requires_grad_()
            worst_loss = max(worst_loss, abs(ours["loss"] - loss.item()))
            worst_ctx = max(worst_ctx, (trainer.model.prompt_learner.ctx - ctx).abs().max().item())
    assert (ctx - start).abs().max() > 0.1  # it went somewhere
    assert worst_loss < 1e-4 and worst_ctx < 1e-4


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("csc", [False, True])
def test_other_class_token_positions(world, position, csc):
    """Class by class: [start, first tokens, name, other tokens, ".", end]."""
    options = ("TRAINER.COOP.CLASS_TOKEN_POSITION", position, "TRAINER.COOP.CSC", csc, "TRAINER.COOP.CTX_INIT", "''")
    trainer = build(world, "CoOp", *options, "TRAINER.COOP.N_CTX", 3)
    backbone, clip = trainer.backbone, trainer.backbone.model
    ctx = trainer.model.prompt_learner.ctx.detach()
    assert ctx.shape == ((3, 3, 64) if csc else (3, 64))
    expected = []
    for label, name in enumerate(trainer.classnames):
        ids = backbone.tokenize([name.replace("_", " ") + "."])
        own = clip.token_embedding(ids)[0]  # start, name, ".", end, ...
        length = int(ids.argmax()) - 2
        context = ctx[label] if csc else ctx
        first = {"end": 3, "middle": 1, "front": 0}[position]
        sentence = torch.cat([own[:1], context[:first], own[1 : 1 + length], context[first:], own[1 + length :]])[:77]
        x = clip.transformer((sentence + clip.positional_embedding)[:, None])  # (77, 1, d)
        feature = clip.ln_final(x)[int(ids.argmax()) + 3, 0] @ clip.text_projection
        expected.append(feature / feature.norm())
    with torch.no_grad():
        assert torch.allclose(trainer.model.class_features(), torch.stack(expected), atol=1e-5)


# --------------------------------------------------------------------------------------------------------- CoOpGRAM


def test_identity_regulator_and_the_same_start_is_coop(world, backbone, tmp_path):
    meta = save_meta(tmp_path / "meta.safetensors", backbone, regulator=constant_gate(backbone, 1))
    train(world, tmp_path / "coop", "CoOp")
    results = train(world, tmp_path / "gram", "CoOpGRAM", "TRAINER.GRAM.CHECKPOINT", meta)
    assert torch.equal(context(tmp_path / "coop", 3), context(tmp_path / "gram", 3))
    assert results["regulator"]["text"]["mean_ratio"] == pytest.approx(1, abs=1e-6)
    assert results["meta_checkpoint"]["path"] == meta and len(results["meta_checkpoint"]["sha256"]) == 64


@pytest.mark.slow
def test_a_constant_gate_is_a_smaller_step(world, backbone, tmp_path):
    """The control: R = 0.5 g equals raw gradients scaled by 0.5, and not CoOp."""
    meta = save_meta(tmp_path / "meta.safetensors", backbone, regulator=constant_gate(backbone, 0.5))
    chosen = ("TRAINER.GRAM.CHECKPOINT", meta)
    half = train(world, tmp_path / "half", "CoOpGRAM", *chosen)
    train(
        world, tmp_path / "control", "CoOpGRAM", *chosen, "TRAINER.GRAM.REGULATE", False, "TRAINER.GRAM.STEP_SCALE", 0.5
    )
    train(world, tmp_path / "raw", "CoOpGRAM", *chosen, "TRAINER.GRAM.REGULATE", False)
    assert torch.allclose(context(tmp_path / "half", 3), context(tmp_path / "control", 3), atol=1e-6)
    assert not torch.allclose(context(tmp_path / "half", 3), context(tmp_path / "raw", 3), atol=1e-4)
    facts = half["regulator"]["text"]
    assert facts["mean_ratio"] == pytest.approx(0.5) and facts["steps"] == 9
    assert facts["gamma_variation"] == pytest.approx(0, abs=1e-6) and facts["path_beta"] == 0
    assert 0 < facts["net_gated"] <= facts["path_gated"]


@pytest.mark.parametrize("scaled", [False, True])
def test_the_regulator_acts_before_momentum_and_weight_decay_and_after_unscaling(scaled):
    """Three steps by hand: v <- mu v + R(g) + w theta, theta <- theta - lr v."""
    generator = torch.Generator().manual_seed(0)
    regulator = GradientRegulator({"text": 5}, RegulatorConfig(start="random"), generator)
    theta = nn.Parameter(torch.randn(3, 5, generator=generator))
    other = nn.Parameter(torch.randn(4, generator=generator))
    target = torch.randn(3, 5, generator=generator)
    optimizer = torch.optim.SGD([theta, other], lr=0.1, momentum=0.9, weight_decay=0.01)
    regulation = Regulation({"text": theta}, regulator)
    regulation.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
    by_hand, plain = theta.detach().clone(), other.detach().clone()
    velocity, plain_velocity = torch.zeros(3, 5), torch.zeros(4)
    norms = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (theta - target).pow(2).sum() + other.pow(2).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            gradient = 2 * (by_hand - target)
            norms.append(gradient.norm().item())
            gate = regulator.gates["text"]
            gamma = torch.tanh(gradient @ gate.weight_gamma.T + gate.bias_gamma)
            beta = torch.tanh(gradient @ gate.weight_beta.T + gate.bias_beta)
            velocity = 0.9 * velocity + (gamma * gradient + beta) + 0.01 * by_hand
            by_hand = by_hand - 0.1 * velocity
            plain_velocity = 0.9 * plain_velocity + 2 * plain + 0.01 * plain  # not a prompt: raw
            plain = plain - 0.1 * plain_velocity
    assert torch.allclose(theta, by_hand, atol=1e-5) and torch.allclose(other, plain, atol=1e-5)
    assert regulation.counts["text"].norms == pytest.approx(norms, rel=1e-4)


def test_path_lengths_and_variation_by_hand():
    regulator = GradientRegulator({"text": 2})
    with torch.no_grad():
        regulator.gates["text"].bias_beta.fill_(math.atanh(0.25))
    theta = nn.Parameter(torch.zeros(1, 2))
    optimizer = torch.optim.SGD([theta], lr=0.5)
    regulation = Regulation({"text": theta}, regulator)
    regulation.attach(optimizer)
    for gradient in ([[3.0, 4.0]], [[-3.0, -4.0]]):
        theta.grad = torch.tensor(gradient)
        optimizer.step()
    facts = regulation.summary()["text"]
    assert facts["path_gated"] == pytest.approx(2 * 0.5 * 0.9 * 5) and facts["net_gated"] == pytest.approx(0, abs=1e-6)
    assert [facts["path_beta"], facts["net_beta"]] == pytest.approx([2 * 0.5 * 0.25 * 2**0.5] * 2)
    assert facts["gradient_norm"] == {"q05": 5.0, "q50": 5.0, "q95": 5.0}
    assert facts["gamma_mean"] == pytest.approx(0.9) and facts["gamma_variation"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        regulator.gates["text"].weight_gamma.fill_(0.1)
    theta.grad = torch.tensor([[3.0, 4.0]])
    optimizer.step()
    assert regulation.summary()["text"]["gamma_variation"] > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("norms", "warns"), [((1e-3, 1e3), False), ((1e3, 1e4), True), ((1e-6, 1e-5), True)])
def test_one_warning_when_gradients_are_far_from_those_of_meta_training(
    world, backbone, tmp_path, capsys, norms, warns
):
    meta = save_meta(tmp_path / "meta.safetensors", backbone, norms=norms)
    launch.train(flags(world, tmp_path / "out", "CoOpGRAM", "TRAINER.GRAM.CHECKPOINT", meta, "OPTIM.MAX_EPOCH", 5))
    out = capsys.readouterr().out
    assert out.count("Warning: the text gradient's norm is") == int(warns)
    assert "regulator: text gradient norm" in out


@pytest.mark.parametrize(
    ("beta", "steps", "notes"), [("absolute", 1, True), ("absolute", 10, False), ("relative", 1, False)]
)
def test_a_note_if_an_absolute_beta_is_used_in_a_far_longer_training(
    world, backbone, tmp_path, capsys, beta, steps, notes
):
    """A step counts 0.002 / 2 / (1 - 0.9) = 0.01 along a cosine; the inner loop's path is 0.01 times its steps."""
    meta = load_meta_checkpoint(save_meta(tmp_path / "meta.safetensors", backbone))
    meta.config = {"REGULATOR": {"BETA": beta}, "INNER": {"ALPHA": 0.01, "STEPS": steps}}
    save_meta_checkpoint(tmp_path / "meta.safetensors", meta)
    opts = ("TRAINER.GRAM.CHECKPOINT", tmp_path / "meta.safetensors", "OPTIM.MAX_EPOCH", 5, "OUTPUT_DIR", tmp_path)
    trainer = build(world, "CoOpGRAM", *opts)
    trainer.before_train()
    text = (
        "the regulator was learned on steps that sum to 0.01 (INNER.ALPHA x steps), and those of this training sum to"
    )
    taken = 5 * len(trainer.train_loader_x)
    assert trainer.cfg.OPTIM.LR == 0.002 and 3 < taken < 30
    assert (f"{text} about {0.01 * taken:.2g}." in capsys.readouterr().out) == notes


def test_deep_prompts_are_regulated_layer_by_layer():
    regulator = GradientRegulator({"text": 4}, RegulatorConfig(start="random", input="normalised"))
    deep = nn.Parameter(torch.zeros(3, 2, 4))
    optimizer = torch.optim.SGD([deep], lr=1.0)
    Regulation({"text": deep}, regulator).attach(optimizer)
    gradient = torch.randn(3, 2, 4)
    deep.grad = gradient.clone()
    optimizer.step()
    expected = torch.stack([regulator({"text": layer})["text"] for layer in gradient])
    assert torch.allclose(-deep, expected, atol=1e-6)


def test_starts(world, backbone, tmp_path):
    """--eval-only without --model-dir evaluates theta* with no step; INIT False starts from CTX_INIT."""
    prompt = torch.randn(4, 64, generator=torch.Generator().manual_seed(3)) * 0.1
    meta = save_meta(tmp_path / "meta.safetensors", backbone, prompt=prompt)
    trainer = build(world, "CoOpGRAM", "TRAINER.GRAM.CHECKPOINT", meta)
    assert torch.equal(trainer.model.prompt_learner.ctx, prompt)
    words = build(world, "CoOpGRAM", "TRAINER.GRAM.CHECKPOINT", meta, "TRAINER.GRAM.INIT", False)
    assert torch.equal(words.model.prompt_learner.ctx, context_from_words(backbone, "a photo of a"))
    argv = flags(world, tmp_path / "start", "CoOpGRAM", "TRAINER.GRAM.CHECKPOINT", meta)
    results = launch.train(["--eval-only", *argv], quiet=True)
    assert results["eval_only"] and results["epoch"] == 0 and results["model_dir"] == ""
    correct = total = 0
    with torch.no_grad():
        for batch in trainer.test_loader:
            trainer.set_model_mode("eval")
            correct += (trainer.model(batch["img"]).argmax(1) == batch["label"]).sum().item()
            total += len(batch["label"])
    assert results["metrics"]["accuracy"] == 100 * correct / total and results["metrics"]["total"] == total == 12


@pytest.mark.parametrize(
    ("opts", "says"),
    [
        (["TRAINER.COOP.CSC", True], "TRAINER.COOP.CSC"),
        (["TRAINER.COOP.CLASS_TOKEN_POSITION", "front"], "CLASS_TOKEN_POSITION: GRAM defines 'end' alone"),
        (["TRAINER.COOP.CTX_INIT", "''", "TRAINER.COOP.N_CTX", 8], "of shape .8, 64., found .4, 64."),
        (["TRAINER.GRAM.CHECKPOINT", "''"], "TRAINER.GRAM.CHECKPOINT is empty"),
        (["TRAINER.GRAM.CHECKPOINT", "no.safetensors"], "no.safetensors"),
        (["TRAINER.GRAM.STEP_SCALE", 0.5], "STEP_SCALE"),
        (["TRAINER.COOP.PREC", "fp8"], "TRAINER.COOP.PREC: expected fp32, tf32, fp16, bf16 or amp, found 'fp8'"),
        (["INPUT.SIZE", "(64,64)"], "INPUT.SIZE is"),
        (["TEST.AT_STEPS", "(0,-1)"], "TEST.AT_STEPS"),
    ],
)
def test_refusals_are_one_sentence_and_leave_no_folder(world, backbone, tmp_path, opts, says):
    meta = save_meta(tmp_path / "meta.safetensors", backbone)
    with pytest.raises(GramError, match=says.replace("(", r"\(")) as error:
        train(world, tmp_path / "out", "CoOpGRAM", "TRAINER.GRAM.CHECKPOINT", meta, *opts)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_backbone_or_without_a_regulator_is_refused(world, backbone, tmp_path):
    meta = tmp_path / "meta.safetensors"
    prompts = {"text": torch.zeros(4, 64)}
    save_meta_checkpoint(meta, MetaCheckpoint(prompts, None, backbone.name, backbone.fingerprint))
    with pytest.raises(GramError, match="holds no regulator"):
        train(world, tmp_path / "out", "CoOpGRAM", "TRAINER.GRAM.CHECKPOINT", meta)
    build(world, "CoOpGRAM", "TRAINER.GRAM.CHECKPOINT", meta, "TRAINER.GRAM.REGULATE", False)
    save_meta_checkpoint(meta, MetaCheckpoint(prompts, None, "ViT-B/16", "0" * 64))
    with pytest.raises(GramError, match="expected the backbone it was made with, ViT-B/16"):
        build(world, "CoOpGRAM", "TRAINER.GRAM.CHECKPOINT", meta, "TRAINER.GRAM.REGULATE", False)


# ------------------------------------------------------------------------------------------------ runs and resuming


@pytest.mark.slow
def test_a_run_leaves_coops_files_and_lines_and_results(world, tmp_path):
    out = tmp_path / "coop" / "seed1"
    results = train(world, out, "CoOp", "TEST.PER_EPOCH", True, "TEST.AT_STEPS", "(0,2)")
    assert results == json.loads((out / "results.json").read_text())
    lines = (out / "log.txt").read_text().splitlines()
    end = lines.index("Finish training")
    accuracy = next(line for line in lines[end:] if line.startswith("* accuracy: "))
    assert accuracy == f"* accuracy: {results['metrics']['accuracy']:.1f}%"
    assert "=> result" in lines[end:] and "Deploy the last-epoch model" in lines
    assert (out / "prompt_learner/checkpoint").read_text() == "model.pth.tar-3\n"
    checkpoint = torch.load(out / "prompt_learner/model.pth.tar-3", weights_only=True)
    assert set(checkpoint["state_dict"]) == {"ctx"} and checkpoint["epoch"] == 3
    assert {"optimizer", "scheduler", "val_result"} <= set(checkpoint)
    facts = {key: results[key] for key in ("trainer", "dataset", "subsample", "shots", "seed", "backbone", "split")}
    assert facts == {
        "trainer": "CoOp",
        "dataset": "EmojiFood",
        "subsample": "base",
        "shots": 4,
        "seed": 1,
        "backbone": "random-tiny",
        "split": "test",
    }
    assert results["epoch"] == 3 and results["config"]["OPTIM"]["LR"] == 0.002
    assert results["few_shot"]["path"].endswith("split_fewshot/shot_4-seed_1.json")
    assert results["metrics"]["correct"] * 100 / results["metrics"]["total"] == results["metrics"]["accuracy"]
    assert [(point["step"], point["epoch"]) for point in results["curve"]] == [
        (0, 0.0),
        (2, pytest.approx(2 / 3)),
        (3, 1.0),
        (6, 2.0),
        (9, 3.0),
    ]
    assert results["curve"][-1]["base"] == results["metrics"]["accuracy"]
    # new classes, asked for in a run of their own, score what the curve says
    argv = flags(world, tmp_path / "new", "CoOp", "DATASET.SUBSAMPLE_CLASSES", "new")
    new = launch.train(["--eval-only", "--model-dir", str(out), *argv], quiet=True)
    assert new["metrics"]["accuracy"] == results["curve"][-1]["new"] and new["epoch"] == 3
    # watching changes nothing: the run without a curve ends at the same context
    train(world, tmp_path / "unwatched", "CoOp")
    assert torch.equal(context(out, 3), context(tmp_path / "unwatched", 3))


class Stop(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["CoOp", "CoOpGRAM"])
def test_a_run_that_was_stopped_goes_on_to_the_same_end(world, backbone, tmp_path, monkeypatch, trainer):
    from gram_meta.trainers.base import PromptTrainer

    meta = save_meta(tmp_path / "meta.safetensors", backbone)
    opts = ["OPTIM.MAX_EPOCH", 5, "TRAIN.CHECKPOINT_FREQ", 1, "TEST.PER_EPOCH", True]
    opts += ["TRAINER.GRAM.CHECKPOINT", meta] if trainer == "CoOpGRAM" else []
    whole = train(world, tmp_path / "whole", trainer, *opts)
    step = PromptTrainer.forward_backward

    def stopping(self, batch):
        if self.epoch == 2 and self.batch_idx == 1:
            raise Stop
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(PromptTrainer, "forward_backward", stopping)
        with pytest.raises(Stop):
            train(world, tmp_path / "parts", trainer, *opts)
    half = tmp_path / "parts" / "prompt_learner" / ".checkpoint.9qtdisnj.part"
    half.write_text("model.pth")  # as SIGKILL leaves it
    parts = train(world, tmp_path / "parts", trainer, *opts)
    assert not half.exists()
    assert torch.equal(context(tmp_path / "whole", 5), context(tmp_path / "parts", 5))
    assert parts["metrics"] == whole["metrics"] and parts["curve"] == whole["curve"]
    assert parts["regulator"] == whole["regulator"]

    def rates(out):  # of the last three epochs
        log = (tmp_path / out / "log.txt").read_text()
        return [
            line.split(" lr ")[1].split()[0] for line in log.splitlines() if line.startswith(("epoch [4", "epoch [5"))
        ]

    assert rates("parts") == rates("whole") and len(set(rates("whole"))) > 1
    assert not list((tmp_path / "parts").glob("log.txt-*"))  # one log, which CoOp's parser reads
    assert (tmp_path / "parts/log.txt").read_text().count("Finish training") == 1


def test_a_finished_run_is_not_repeated_and_another_is_refused(world, tmp_path, capsys):
    out = tmp_path / "out"
    first = train(world, out, "CoOp")
    log = (out / "log.txt").read_text()
    again = launch.train(flags(world, out, "CoOp"))
    assert again == first and (out / "log.txt").read_text() == log and len(list(out.glob("log.txt*"))) == 1
    assert "This run is finished" in capsys.readouterr().out
    files = sorted(out.rglob("*"))
    for name in (".gram-lock", ".run.json.a1b2c3d4.part"):  # as SIGKILL leaves them, after run.json was finished
        (out / name).write_text("{")
    assert launch.train(flags(world, out, "CoOp"), quiet=True) == first and sorted(out.rglob("*")) == files
    with pytest.raises(GramError, match="holds another run \\(OPTIM.LR is 0.002 there and 0.1 here\\)"):
        train(world, out, "CoOp", "OPTIM.LR", 0.1)
    with pytest.raises(GramError, match="holds another run \\(SEED is 1 there and 0 here\\)"):
        train(world, out, "CoOp", seed=0)  # a seed of 0 counts
    with pytest.raises(GramError, match="holds another run"):
        launch.train(["--eval-only", *flags(world, out, "CoOp")], quiet=True)
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "log.txt").write_text("of another program\n")
    with pytest.raises(GramError, match="found the log.txt of a run without run.json"):
        train(world, strange, "CoOp")


def test_an_evaluation_is_not_taken_for_finished_when_the_model_was_trained_anew(world, tmp_path):
    train(world, tmp_path / "run", "CoOp")
    argv = ["--eval-only", "--model-dir", str(tmp_path / "run"), *flags(world, tmp_path / "new", "CoOp")]
    first = launch.train(argv, quiet=True)
    assert launch.train(argv, quiet=True) == first  # finished: not repeated
    path = tmp_path / "run/prompt_learner/model.pth.tar-3"
    state = torch.load(path, weights_only=True)
    state["state_dict"]["ctx"] += 1
    torch.save(state, path)
    with pytest.raises(GramError, match="holds another run"):
        launch.train(argv, quiet=True)


def folder_of(out, *words):
    """The output folder of a run that these flags describe, as `gram train` finds it."""
    args = launch.build_parser().parse_args(["--trainer", "CoOp", "--output-dir", str(out), *map(str, words)])
    return open_folder(launch.setup_cfg(args), args)


def test_a_model_folder_is_the_same_under_each_of_its_names(tmp_path, monkeypatch):
    model = tmp_path / "trained/prompt_learner/model.pth.tar-3"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"learned")
    monkeypatch.chdir(tmp_path)
    folder_of("tested", "--eval-only", "--model-dir", "trained").finish()
    for name in ("trained", "./trained/", tmp_path / "trained"):
        assert folder_of("tested", "--eval-only", "--model-dir", name).finished
    (tmp_path / "trained").rename(tmp_path / "moved")
    assert folder_of("tested", "--eval-only", "--model-dir", "moved").finished
    (tmp_path / "moved/prompt_learner/model.pth.tar-3").write_bytes(b"learned anew")
    with pytest.raises(GramError, match="holds another run \\(--model-dir is "):
        folder_of("tested", "--eval-only", "--model-dir", "moved")
    with pytest.raises(GramError, match="holds another run \\(--model-dir is "):
        folder_of("tested", "--eval-only")  # the start instead of what was learned


def test_options_newer_than_a_run_were_at_their_defaults_in_it(tmp_path):
    folder_of(tmp_path).finish()
    stored = json.loads((tmp_path / "run.json").read_text())
    newer = [key for key in stored["run"] if key.startswith("TRAINER.VPT.") or key == "TEST.AT_STEPS"]
    assert len(newer) == 6
    for key in newer:
        del stored["run"][key]
    (tmp_path / "run.json").write_text(json.dumps(stored))
    assert folder_of(tmp_path).finished
    with pytest.raises(GramError, match="\\(TRAINER.VPT.N_CTX_VISION is 4 there and 8 here\\)"):
        folder_of(tmp_path, "TRAINER.VPT.N_CTX_VISION", 8)
    with pytest.raises(GramError, match="\\(TEST.AT_STEPS is \\[\\] there and \\[0, 5\\] here\\)"):
        folder_of(tmp_path, "TEST.AT_STEPS", "(0,5)")


def test_a_changed_meta_checkpoint_is_another_run(world, backbone, tmp_path):
    meta = save_meta(tmp_path / "meta.safetensors", backbone)
    train(world, tmp_path / "out", "CoOpGRAM", "TRAINER.GRAM.CHECKPOINT", meta)
    save_meta(meta, backbone, regulator=constant_gate(backbone, 0.3))
    with pytest.raises(GramError, match="TRAINER.GRAM.CHECKPOINT is 'SHA-256"):
        train(world, tmp_path / "out", "CoOpGRAM", "TRAINER.GRAM.CHECKPOINT", meta)


def test_loading_says_what_is_there(world, tmp_path):
    out = tmp_path / "out"
    train(world, out, "CoOp", "TRAIN.CHECKPOINT_FREQ", 2)  # epochs 2 and 3
    trainer = build(world, "CoOp")
    trainer.load_model(str(out), epoch=2)
    assert torch.equal(trainer.model.prompt_learner.ctx, context(out, 2))
    trainer.load_model(str(out))
    assert torch.equal(trainer.model.prompt_learner.ctx, context(out, 3))
    with pytest.raises(GramError, match=r"epoch 7 \(--load-epoch\), found epochs 2, 3"):
        trainer.load_model(str(out), epoch=7)
    with pytest.raises(GramError, match=r"found no such folder, but runs with checkpoints below .*: out$"):
        trainer.load_model(str(tmp_path / "none"))
    with pytest.raises(GramError, match=r"expected ctx of shape \(6, 64\), found \(4, 64\)"):
        build(world, "CoOp", "TRAINER.COOP.CTX_INIT", "''", "TRAINER.COOP.N_CTX", 6).load_model(str(out))
    state = torch.load(out / "prompt_learner/model.pth.tar-3", weights_only=True)
    state["state_dict"] = {"token_prefix": torch.zeros(9, 1, 64), **state["state_dict"], "token_suffix": torch.zeros(9)}
    torch.save(state, out / "prompt_learner/model.pth.tar-8")  # as CoOp writes them
    trainer.load_model(str(out), epoch=8)
    state["state_dict"]["ctxx"] = state["state_dict"].pop("ctx")
    torch.save(state, out / "prompt_learner/model.pth.tar-9")
    with pytest.raises(GramError, match="expected ctx, which the trainer learns, found ctxx"):
        trainer.load_model(str(out), epoch=9)
    with pytest.raises(GramError, match="--resume"):
        launch.train(["--resume", str(tmp_path / "none"), *flags(world, tmp_path / "r", "CoOp")], quiet=True)


def test_init_weights_start_a_run(world, tmp_path):
    value = torch.full((4, 64), 0.125)
    torch.save({"state_dict": {"ctx": value.half()}}, tmp_path / "ctx.pth")
    trainer = build(world, "CoOp", "MODEL.INIT_WEIGHTS", tmp_path / "ctx.pth")
    assert torch.equal(trainer.model.prompt_learner.ctx, value)


def test_best_validation(world, tmp_path):
    results = train(world, tmp_path / "out", "CoOp", "TEST.FINAL_MODEL", "best_val", "TRAIN.CHECKPOINT_FREQ", 1)
    best = torch.load(tmp_path / "out/prompt_learner/model-best.pth.tar", weights_only=True)
    assert best["val_result"] is not None and results["metrics"]["total"] == 12
    trainer = build(world, "CoOp")
    trainer.load_model(str(tmp_path / "out"))  # CoOp's default
    assert torch.equal(trainer.model.prompt_learner.ctx, best["state_dict"]["ctx"])


def test_random_starts_differ_by_seed_and_repeat(world, tmp_path):
    def start(seed):
        opts = ("TRAINER.COOP.CTX_INIT", "''", "SEED", seed)
        return build(world, "CoOp", *opts).model.prompt_learner.ctx.detach()

    assert torch.equal(start(1), start(1)) and not torch.equal(start(1), start(2))
    assert start(1).std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "amp"])
def test_prompts_stay_float32_in_every_precision(world, tmp_path, precision):
    results = train(world, tmp_path / "out", "CoOp", "TRAINER.COOP.PREC", precision, "OPTIM.MAX_EPOCH", 1)
    assert context(tmp_path / "out", 1).dtype == torch.float32
    assert results["metrics"]["total"] == 12


def test_zeroshot(world, backbone, tmp_path):
    """Training ZeroshotCLIP is a test, in CoOp's lines; the sentence is CoOp's where CoOp has one."""
    from gram_meta.method.prompts import template_features
    from gram_meta.trainers.zsclip import CUSTOM_TEMPLATES

    trained = train(world, tmp_path / "a", "ZeroshotCLIP")
    assert "Finish training" in (tmp_path / "a/log.txt").read_text().splitlines()
    tested = launch.train(["--eval-only", *flags(world, tmp_path / "b", "ZeroshotCLIP")], quiet=True)
    assert trained["metrics"] == tested["metrics"]
    trainer = build(world, "ZeroshotCLIP")
    expected = template_features(backbone, trainer.classnames, "a photo of a {}.")
    assert torch.allclose(trainer.class_features, expected)
    assert CUSTOM_TEMPLATES["DescribableTextures"] == "{} texture."


# ----------------------------------------------------------------------------------------------------- command line


def test_gram_train_is_train_py(world, tmp_path, capsys):
    assert cli.main(["train", *flags(world, tmp_path / "out", "ZeroshotCLIP")]) == 0
    assert "=> result" in capsys.readouterr().out
    assert launch.main(flags(world, tmp_path / "other", "ZeroshotCLIP")) == 0
    capsys.readouterr()
    assert launch.main(flags(world, tmp_path / "x", "CoOpGRMA")) == 2
    error = capsys.readouterr().err
    assert error == "train.py: --trainer is 'CoOpGRMA', which is no known trainer; did you mean 'CoOpGRAM'?\n"
    assert cli.main(["train", *flags(world, tmp_path / "x", "CoOp", "OPTIM.MAX_EPOCHS", 3)]) == 2
    assert "unknown key 'OPTIM.MAX_EPOCHS'; did you mean 'OPTIM.MAX_EPOCH'?" in capsys.readouterr().err
    assert cli.main(["train", *flags(world, tmp_path / "x", "CoOp", "DATASET.NAME", "EmojiFoods")]) == 2
    assert "did you mean 'EmojiFood'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    assert "--dataset-config-file" in text
    for folder in (Path(__file__).parents[2] / "configs" / "trainers").iterdir():
        assert folder.name in text


def test_no_train_builds_and_leaves_nothing(world, tmp_path):
    assert launch.train(["--no-train", *flags(world, tmp_path / "out", "CoOp")], quiet=True) == {}
    assert not (tmp_path / "out").exists()


def test_order_of_merging(tmp_path):
    (tmp_path / "d.yaml").write_text('DATASET:\n  NAME: "A"\nOPTIM:\n  LR: 1.0\nSEED: 7\n')
    (tmp_path / "t.yaml").write_text("OPTIM:\n  LR: 2\n  MAX_EPOCH: 5\nINPUT:\n  SIZE: (32, 32)\nSEED: 8\n")
    files = ["--dataset-config-file", str(tmp_path / "d.yaml"), "--config-file", str(tmp_path / "t.yaml")]

    def cfg(*argv):
        return launch.setup_cfg(launch.build_parser().parse_args([*files, *argv]))

    merged = cfg("--seed", "0", "--transforms", "random_flip", "--trainer", "CoOp", "OPTIM.MAX_EPOCH", "6")
    assert (merged.DATASET.NAME, merged.OPTIM.LR, merged.OPTIM.MAX_EPOCH, merged.SEED) == ("A", 2.0, 6, 0)
    assert merged.INPUT.SIZE == (32, 32) and merged.INPUT.TRANSFORMS == ["random_flip"]
    assert cfg().SEED == 8 and cfg("--seed", "3", "SEED", "4").SEED == 4
    with pytest.raises(AttributeError):
        merged.SEED = 1  # frozen
    (tmp_path / "t.yaml").write_text("OPTIM:\n  LEARNING_RATE: 2\n")
    with pytest.raises(GramError, match="t.yaml: unknown key 'OPTIM.LEARNING_RATE'"):
        cfg()
    with pytest.raises(GramError, match="TEST.AT_STEPS: expected tuple, found 5"):
        merge_opts(launch.setup_cfg(launch.build_parser().parse_args([])).clone(), ["TEST.AT_STEPS", "5"])


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("configs/datasets/emoji_food.yaml", "datasets"),
        ("emoji_food", "datasets"),
        ("configs/trainers/CoOp/vit_b16_c4_ep10_batch32_ctxv1.yaml", "trainers/CoOp"),
        ("vit_b16_c4_ep10_batch32_ctxv1", "trainers/CoOpGRAM"),
    ],
)
def test_config_files_are_found_by_name(tmp_path, monkeypatch, name, folder):
    monkeypatch.chdir(tmp_path)
    assert launch.find_config(name, folder).is_file()


def test_a_missing_config_file_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GramError, match="did you mean 'datasets/emoji_food'"):
        launch.find_config("emoji_fod.yaml", "datasets")


# ------------------------------------------------------------------------------------------ a context for each class

CSC = ("TRAINER.COOP.CSC", True, "TRAINER.COOP.CTX_INIT", "''", "TRAINER.COOP.N_CTX", 2)


def evaluate(world, out, model, *opts):
    return launch.train(["--eval-only", "--model-dir", str(model), *flags(world, out, "CoOp", *CSC, *opts)], quiet=True)


def test_contexts_of_each_class_know_no_other_classes(world, tmp_path, capsys):
    """CoOp#69. The names are in the checkpoint, or in results.json beside it; without them the number is compared."""
    trained = train(world, tmp_path / "csc", "CoOp", *CSC)
    names = trained["classnames"]
    assert evaluate(world, tmp_path / "same", tmp_path / "csc")["metrics"] == trained["metrics"]
    words = r"a context for each class of training \(CSC\), .* classes: class 0 is '.+' there and '.+' here"
    path = tmp_path / "csc" / "prompt_learner" / "model.pth.tar-3"
    state = torch.load(path, weights_only=True)

    def saved_as(**changes):
        torch.save({key: value for key, value in {**state, **changes}.items() if value is not None}, path)

    saved_as(dataset="another", classnames=names[::-1])  # as if learned on another dataset
    with pytest.raises(GramError, match=words):
        evaluate(world, tmp_path / "other", tmp_path / "csc")
    with pytest.raises(GramError, match=words):
        train(world, tmp_path / "other", "CoOp", *CSC, "MODEL.INIT_WEIGHTS", path)
    assert not (tmp_path / "other").exists()
    coop = {key: None for key in ("classnames", "dataset", "folder", "subsample", "reads", "backbone", "trainer")}
    saved_as(**coop)
    results = tmp_path / "csc" / "results.json"
    facts = json.loads(results.read_text())
    results.write_text(json.dumps({**facts, "classnames": names[::-1]}))
    with pytest.raises(GramError, match=words):
        evaluate(world, tmp_path / "other", tmp_path / "csc")
    results.unlink()
    capsys.readouterr()
    assert evaluate(world, tmp_path / "coops", tmp_path / "csc")["metrics"] == trained["metrics"]
    log = (tmp_path / "coops" / "log.txt").read_text()
    assert f"Note: {path} does not name the classes of its contexts (CSC)" in log


def test_csc_beside_words_is_a_note(world, tmp_path):
    train(world, tmp_path / "note", "CoOp", "TRAINER.COOP.CSC", True)
    assert context(tmp_path / "note", 3).dim() == 2
    assert "Note: TRAINER.COOP.CSC has no effect beside CTX_INIT" in (tmp_path / "note" / "log.txt").read_text()


@pytest.mark.parametrize(("key", "value"), [("classnames", 3), ("backbone", "ViT"), ("reads", [1]), ("epoch", "x")])
def test_a_checkpoint_with_facts_of_other_types_is_one_sentence(world, tmp_path, key, value):
    train(world, tmp_path / "run", "CoOp")
    path = tmp_path / "run" / "prompt_learner" / "model.pth.tar-3"
    torch.save({**torch.load(path, weights_only=True), key: value}, path)
    for use in (lambda: Predictor.load(tmp_path / "run"), lambda: build_and_load(world, tmp_path)):
        with pytest.raises(GramError, match=f"{path}: {key}: expected "):
            use()


def build_and_load(world, tmp_path):
    build(world, "CoOp").load_model(str(tmp_path / "run"))


def test_prompts_with_nan_are_refused(world, tmp_path):
    train(world, tmp_path / "run", "CoOp")
    path = tmp_path / "run" / "prompt_learner" / "model.pth.tar-3"
    state = torch.load(path, weights_only=True)
    state["state_dict"]["ctx"][0, 0] = torch.nan
    torch.save(state, path)
    uses = [
        lambda: build_and_load(world, tmp_path),
        lambda: Predictor.load(tmp_path / "run"),
        lambda: interpret(tmp_path / "run"),
        lambda: build(world, "CoOp", "MODEL.INIT_WEIGHTS", path),
    ]
    for use in uses:
        with pytest.raises(GramError, match=f"{path}: expected finite numbers in ctx, found 1 of 256 that are not"):
            use()


@pytest.mark.parametrize(("part", "value"), [("optimizer", {}), ("random", {}), ("scheduler", 5), ("curve", None)])
def test_a_state_with_a_broken_part_is_one_sentence(world, tmp_path, part, value):
    train(world, tmp_path / "run", "CoOp")
    path = tmp_path / "run" / "prompt_learner" / "model.pth.tar-3"
    torch.save({**torch.load(path, weights_only=True), part: value}, path)
    with pytest.raises(
        GramError, match=f"^{path}: (expected a whole state that training can|{part}: expected object|cur)"
    ):
        build(world, "CoOp").resume_model_if_exist(str(tmp_path / "run"))


def test_a_loss_that_is_not_finite_ends_the_run_at_the_next_printed_line(world, tmp_path, one_loading, monkeypatch):
    """Losses are checked once a printed line; a later finite one does not hide it, and no epoch is saved with it."""
    seen, entropy = [], F.cross_entropy

    def spoilt(scores, labels):
        seen.append(len(seen))
        return entropy(scores, labels) * (math.inf if len(seen) == 2 else 1.0)

    monkeypatch.setattr("gram_meta.trainers.base.F.cross_entropy", spoilt)
    monkeypatch.setattr(torch.amp.GradScaler, "step", lambda scaler, optimiser: None)  # prompts stay finite
    with pytest.raises(GramError, match="expected a finite loss, found inf in epoch 1, by batch 3"):
        train(world, tmp_path / "out", "CoOp", "TRAIN.PRINT_FREQ", 10)
    assert len(seen) == 3  # the end of the epoch
    assert not list((tmp_path / "out").rglob("model.pth.tar*"))
