"""VPT, JointPrompt and CoCoOp against plain calculations; their GRAM versions; what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.graphs import make_traced_callables
from helpers.training import meta_of

import gram_meta.plugin  # noqa: F401, fills the registries
from gram_meta.backbone.clip import load_backbone
from gram_meta.backbone.graphs import Recorded
from gram_meta.config import as_dict, find_config, get_meta_config, load_meta_config
from gram_meta.coop import launch
from gram_meta.engine import TRAINER_REGISTRY, build_trainer, set_random_seed
from gram_meta.errors import GramError
from gram_meta.method.checkpoint import save_meta_checkpoint
from gram_meta.method.prompts import (
    TEMPLATE,
    CoupledCLIP,
    PromptConfig,
    PromptedCLIP,
    context_from_words,
    deepened,
    initial_meta_net,
    initial_prompts,
)
from gram_meta.trainers.base import PromptTrainer

pytestmark = pytest.mark.usefixtures("one_loading")

CONFIGS = {
    "CoOp": "gram_small_c4_ep10_batch32_ctxv1",
    "CoCoOp": "gram_small_c4_ep10_batch1_ctxv1",
    "VPT": "gram_small_c4_ep10_batch32_ctxv1",
    "JointPrompt": "gram_small_c2+2_ep10_batch32_ctxv1",
}
CONFIGS |= {
    gram: CONFIGS[plain]
    for gram, plain in {"CoOpGRAM": "CoOp", "CoCoOpGRAM": "CoCoOp", "VPTGRAM": "VPT", "UniGRAM": "JointPrompt"}.items()
}
PROMPTS = {"CoOp": (4, 0), "CoCoOp": (4, 0), "VPT": (0, 4), "UniGRAM": (2, 2)}  # tokens of text, of image
WORDS = {1: "a", 2: "a photo", 3: "a photo of", 4: "a photo of a"}


def argv(data, out, trainer, options, *opts, seed=1):
    return [
        "--root",
        str(data),
        "--seed",
        str(seed),
        "--trainer",
        trainer,
        "--dataset-config-file",
        "emoji_food",
        "--config-file",
        CONFIGS[trainer],
        "--output-dir",
        str(out),
        *options,
        "DATASET.NUM_SHOTS",
        "2",
        "DATALOADER.TRAIN_X.BATCH_SIZE",
        "2",
        *map(str, opts),
    ]


@pytest.fixture
def go(tiny_data, tiny_options, tmp_path):
    """go(trainer, *opts): a run of one epoch (4 images of 2 classes) in a folder of its name; its results."""

    def run(trainer, *opts, flags=(), out="", group="base"):
        opts = ("DATASET.SUBSAMPLE_CLASSES", group, *opts)
        arguments = argv(tiny_data, tmp_path / (out or trainer), trainer, tiny_options, *opts)
        return launch.train([*flags, *arguments], quiet=True)

    return run


@pytest.fixture
def build(tiny_data, tiny_options, tmp_path):
    """build(trainer, *opts): a trainer on all four classes, without a run around it."""

    def build(trainer, *opts):
        arguments = argv(tiny_data, tmp_path / "built", trainer, tiny_options, *opts)
        cfg = launch.setup_cfg(launch.build_parser().parse_args(arguments))
        set_random_seed(cfg.SEED)
        return build_trainer(cfg)

    return build


@pytest.fixture
def save(backbone, tmp_path):
    """save(kind): a meta-checkpoint for the trainers of that kind, with a gate of 0.5, which differs clearly from 1."""

    def save(kind, gate=0.5, template=TEMPLATE, name=""):
        text, visual = PROMPTS[kind]
        config = as_dict(get_meta_config())
        config["PROMPT"] |= {"TEXT_TOKENS": text, "VISUAL_TOKENS": visual, "TEMPLATE": template}
        config["PROMPT"]["CONDITIONAL"] = kind == "CoCoOp"
        del config["CHC"]["LABELLED"]  # as in a file that is older than this setting
        words = WORDS.get(text, "")
        checkpoint = meta_of(backbone, text, visual, words, conditional=kind == "CoCoOp", config=config)
        for gates in checkpoint.regulator.gates.values():
            torch.nn.init.constant_(gates.bias_gamma, 40.0 if gate == 1 else math.atanh(gate))
        path = tmp_path / f"{name or kind}.safetensors"
        save_meta_checkpoint(path, checkpoint)
        return str(path)

    return save


# ----------------------------------------------------------------- plain calculations, in OpenAI's order, at 77 tokens


def norm(layer, x):
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)  # OpenAI's casts to float32


def tower(transformer, x, mask):
    """OpenAI's residual attention blocks: x (L, batch, d)."""
    for block in transformer.resblocks:
        y = norm(block.ln_1, x)
        x = x + block.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        hidden = block.mlp.c_fc(norm(block.ln_2, x))
        x = x + block.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))
    return x


def plain_image(clip, images, prompt=None):
    """Image features (B, D); a prompt (M, d) stands behind the patches."""
    v = clip.visual
    x = v.conv1(images).flatten(2).permute(0, 2, 1)
    x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], dim=1) + v.positional_embedding
    if prompt is not None:
        x = torch.cat([x, prompt.expand(len(x), -1, -1)], dim=1)
    x = tower(v.transformer, norm(v.ln_pre, x).permute(1, 0, 2), None).permute(1, 0, 2)
    x = norm(v.ln_post, x[:, 0]) @ v.proj
    return x / x.norm(dim=-1, keepdim=True)


def plain_text(clip, tokens, ctx=None):
    """Class features (N, D) of ids (N, 77); a context (M, d) stands in the places from 1 on."""
    x = clip.token_embedding(tokens)
    if ctx is not None:
        x = torch.cat([x[:, :1], ctx.expand(len(x), -1, -1), x[:, 1 + len(ctx) :]], dim=1)
    mask = torch.full((77, 77), -math.inf, dtype=x.dtype).triu(1)
    x = tower(clip.transformer, (x + clip.positional_embedding).permute(1, 0, 2), mask).permute(1, 0, 2)
    x = norm(clip.ln_final, x)[torch.arange(len(x)), tokens.argmax(-1)] @ clip.text_projection
    return x / x.norm(dim=-1, keepdim=True)


def plain_logits(trainer, clip, images, names, p, tokenize):
    """By trainer, from its learned parameters by name."""
    words = {"VPT": "a photo of a", "CoCoOp": "X X X X", "JointPrompt": "X X"}[trainer]
    tokens = tokenize([f"{words} {name}." for name in names])
    features = plain_image(clip, images, p.get("visual_ctx"))
    scale = clip.logit_scale.float().exp()  # the scale is a number of float32 in every precision
    if trainer != "CoCoOp":
        return scale * features @ plain_text(clip, tokens, p.get("ctx")).T
    rows = []
    for feature in features:
        hidden = torch.relu(p["meta_net.linear1.weight"] @ feature + p["meta_net.linear1.bias"])
        shift = p["meta_net.linear2.weight"] @ hidden + p["meta_net.linear2.bias"]
        rows.append(scale * plain_text(clip, tokens, p["ctx"] + shift) @ feature)
    return torch.stack(rows)


@pytest.fixture(scope="module")
def precise():
    return load_backbone("random-tiny", precision="fp64")


NAMES = ["red", "sky blue", "a long name of five words"]


def exact_model(build, precise, trainer):
    """The trainer's classifier in float64, its prompts moved away from their start."""
    trainer = build(trainer)
    trainer.backbone = precise
    model = trainer.build_classifier([n.replace(" ", "_") for n in NAMES], trainer.initial_prompts()).double()
    for index, parameter in enumerate(model.prompt_learner.parameters()):
        draw = torch.Generator().manual_seed(index)
        parameter.data += 0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=draw)
    return model


@pytest.mark.parametrize("trainer", ["VPT", "JointPrompt", "CoCoOp"])
def test_logits_and_gradients_are_those_of_the_plain_calculation(build, precise, trainer):
    model = exact_model(build, precise, trainer)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    labels = torch.tensor([2, 0, 1])
    learner = model.prompt_learner
    copies = {name: p.detach().clone().double().requires_grad_() for name, p in learner.named_parameters()}
    expected = plain_logits(trainer, precise.model, images, NAMES, copies, precise.tokenize)
    found = model(images)
    assert found.shape == (3, 3) and torch.allclose(found, expected, rtol=0, atol=1e-9)
    ours = torch.autograd.grad(F.cross_entropy(found, labels), list(learner.parameters()))
    plain = torch.autograd.grad(F.cross_entropy(expected, labels), list(copies.values()))
    for a, b in zip(ours, plain, strict=True):
        assert b.norm() > 1e-3 and torch.allclose(a, b, rtol=0, atol=1e-9 * max(1, b.abs().max().item()))


def test_the_visual_prompts_gradient_by_finite_differences(build, precise):
    model = exact_model(build, precise, "VPT")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    prompt = model.prompt_learner.visual_ctx

    def loss():
        return F.cross_entropy(model(images), torch.tensor([1, 2]))

    (gradient,) = torch.autograd.grad(loss(), prompt)
    start = prompt.detach().clone()
    with torch.no_grad():
        for seed in range(3):
            way = torch.randn(start.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            ends = []
            for sign in (1, -1):
                prompt.copy_(start + sign * 1e-5 * way)
                ends.append(loss().item())
            slope = (ends[0] - ends[1]) / 2e-5
            assert slope == pytest.approx((gradient * way).sum().item(), rel=1e-5) and abs(slope) > 1e-3


def test_a_visual_prompt_may_start_as_copies_of_the_class_token(build, backbone):
    """Their noise has a tenth of its size."""
    tower = backbone.model.visual
    token = tower.class_embedding + tower.positional_embedding[0]  # what joins the patches in front of `ln_pre`
    prompt = initial_prompts(backbone, 0, 4, seed=3, visual_start="class_token")["visual"]
    noise = (prompt - token).square().mean().sqrt() / token.square().mean().sqrt()
    assert prompt.shape == (4, 64) and noise.item() == pytest.approx(0.1, rel=0.2)
    assert not torch.equal(prompt[0], prompt[1])
    for trainer, node in (("VPT", "VPT"), ("JointPrompt", "JOINT")):
        ctx = build(trainer, f"TRAINER.{node}.VISUAL_INIT", "class_token").model.prompt_learner.visual_ctx
        assert (ctx - token).square().mean().sqrt() / token.square().mean().sqrt() < 0.15
    with pytest.raises(GramError, match="TRAINER.VPT.VISUAL_INIT: expected random or class_token, found 'class'"):
        build("VPT", "TRAINER.VPT.VISUAL_INIT", "class")


def test_cocoop_steps_as_plain_sgd_does(build):
    """Batches of one, momentum and weight decay written out; context and meta-net."""
    trainer = build("CoCoOp", "DATALOADER.TRAIN_X.BATCH_SIZE", 1, "OPTIM.WARMUP_EPOCH", -1, "OPTIM.LR", 0.02)
    trainer.num_batches, trainer.epoch = len(trainer.train_loader_x), 0
    clip, tokenize = trainer.backbone.model, trainer.backbone.tokenize
    learner = trainer.model.prompt_learner
    start = {name: p.detach().clone() for name, p in learner.named_parameters()}
    plain = {name: p.clone().requires_grad_() for name, p in start.items()}
    speed = {name: torch.zeros_like(p) for name, p in plain.items()}
    trainer.set_model_mode("train")
    assert trainer.num_batches == 8
    for index, batch in enumerate(trainer.train_loader_x):
        trainer.batch_idx = index
        ours = trainer.forward_backward(batch)
        output = plain_logits("CoCoOp", clip, batch["img"], trainer.classnames, plain, tokenize)
        loss = F.cross_entropy(output, batch["label"])
        assert ours["loss"] == pytest.approx(loss.item(), abs=1e-4)
        for name, gradient in zip(plain, torch.autograd.grad(loss, list(plain.values())), strict=True):
            speed[name] = 0.9 * speed[name] + gradient + 5e-4 * plain[name].detach()
            plain[name] = (plain[name].detach() - 0.02 * speed[name]).requires_grad_()
    for name, parameter in learner.named_parameters():
        assert torch.allclose(parameter, plain[name], atol=1e-4), name
        assert (parameter - start[name]).abs().max() > 1e-3, name


# -------------------------------------------------------------------------------------------------- starts and features


def test_starts(build, backbone):
    vpt = build("VPT")
    prompt = vpt.model.prompt_learner.visual_ctx
    assert prompt.shape == (4, 64) and prompt.std().item() == pytest.approx(0.02, rel=0.2)
    assert set(vpt.model.prompt_learner.state_dict()) == {"visual_ctx"}
    assert torch.equal(build("VPT").model.prompt_learner.visual_ctx, prompt)
    assert not torch.equal(build("VPT", "SEED", 2).model.prompt_learner.visual_ctx, prompt)
    sentences = ["a photo of a red.", "a photo of a green.", "a photo of a blue.", "a photo of a grey."]
    assert torch.allclose(vpt.model.class_features(), backbone.encode_texts(sentences), atol=1e-6)
    other = build("VPT", "TRAINER.VPT.CTX_INIT", "an_icon_of")
    assert torch.allclose(
        other.model.class_features(),
        backbone.encode_texts([s.replace("a photo of a", "an icon of") for s in sentences]),
        atol=1e-6,
    )
    joint = build("JointPrompt").model.prompt_learner
    assert torch.equal(joint.ctx, context_from_words(backbone, "a photo"))
    assert joint.visual_ctx.shape == (2, 64) and joint.visual_ctx.std().item() == pytest.approx(0.02, rel=0.2)
    names = ["ctx", *(f"meta_net.linear{i}.{part}" for i in (1, 2) for part in ("weight", "bias"))]
    assert list(build("CoCoOp").model.prompt_learner.state_dict()) == names  # CoCoOp's own


def test_cocoop_draws_its_meta_net_as_its_authors_do(build):
    """Two linear layers from the run's seed, and nothing else: what is drawn afterwards (the order of images)
    agrees."""
    net = build("CoCoOp").model.prompt_learner.meta_net
    after = torch.rand(3)
    set_random_seed(1)
    first, second = torch.nn.Linear(64, 4), torch.nn.Linear(4, 64)
    assert torch.equal(net.linear1.weight, first.weight) and torch.equal(net.linear2.bias, second.bias)
    assert torch.equal(after, torch.rand(3))


def test_nothing_is_computed_that_does_not_change(build, backbone, monkeypatch):
    """Class features of a visual prompt are those of the build; image features without one carry no graph."""
    calls = []
    encode = type(backbone).encode_text
    monkeypatch.setattr(type(backbone), "encode_text", lambda *a, **k: calls.append(1) or encode(*a, **k))
    vpt = build("VPT")
    assert calls == [1]
    vpt.num_batches, vpt.epoch, vpt.batch_idx = 5, 0, 0
    batch = next(iter(vpt.train_loader_x))
    vpt.forward_backward(batch)
    vpt.test()
    assert calls == [1]
    for name in ("CoOp", "CoCoOp"):
        assert not build(name).model.image_features(batch["img"]).requires_grad


@pytest.mark.parametrize("trainer", ["VPT", "JointPrompt", "CoCoOp"])
def test_curves_follow_the_prompt_and_test_as_a_run_does(go, build, monkeypatch, tmp_path, trainer):
    """Images go through the tower anew where the prompt is in it: a changed prompt gives other answers."""
    results = go(trainer, "TEST.AT_STEPS", "(0,2)")
    assert [point["step"] for point in results["curve"]] == [0, 2]
    assert results["curve"][-1]["base"] == results["metrics"]["accuracy"]
    flags = ["--eval-only", "--model-dir", str(tmp_path / trainer)]
    new = go(trainer, flags=flags, out="new", group="new")
    assert new["metrics"]["accuracy"] == results["curve"][-1]["new"] and new["epoch"] == 1
    built = build(trainer, "DATASET.SUBSAMPLE_CLASSES", "base")
    group, seen = built._group("base"), []
    scores = type(built).scores
    monkeypatch.setattr(type(built), "scores", lambda *a: seen.append(scores(*a)) or seen[-1])
    with torch.no_grad():
        group.accuracy(built)
        before = built.model(next(iter(built.test_loader))["img"])
        for parameter in built.model.prompt_learner.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        group.accuracy(built)
        after = built.model(next(iter(built.test_loader))["img"])
    assert torch.allclose(seen[0], before, atol=1e-5) and torch.allclose(seen[1], after, atol=1e-5)
    assert not torch.allclose(before, after, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["CoOp", "CoOpGRAM", "CoCoOp", "VPT", "UniGRAM"])
def test_a_run_with_recorded_passes_ends_as_without(go, save, monkeypatch, tmp_path, trainer):
    """Traces stand in for CUDA graphs. The curve's evaluations between steps have batches of the same size."""
    start = ["TRAINER.GRAM.CHECKPOINT", save("CoOp" if trainer == "CoOpGRAM" else trainer)] if "GRAM" in trainer else []
    opts = [*start, "TEST.PER_EPOCH", True, "OPTIM.MAX_EPOCH", 2, "DATALOADER.TEST.BATCH_SIZE", 2]
    plain = go(trainer, *opts, out="plain")
    recorded = []

    def record(self):
        self.model.record(torch.zeros(2, 3, 32, 32))
        recorded.append(set(self.model._recorded))

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_traced_callables)
    monkeypatch.setattr(PromptTrainer, "record_step", record)
    replayed = go(trainer, *opts, out="recorded")
    assert recorded == [{"images", "classes"} if trainer != "VPT" else {"images"}]
    states = [
        torch.load(tmp_path / out / "prompt_learner" / "model.pth.tar-2", weights_only=True)["state_dict"]
        for out in ("plain", "recorded")
    ]
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-6)
    assert replayed["curve"] == plain["curve"] and replayed["metrics"] == plain["metrics"]


def test_other_inputs_and_evaluations_are_not_replayed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_traced_callables)
    prompt, calls = torch.ones(2, 3, requires_grad=True), []
    double = Recorded(lambda x: 2 * x, prompt)
    double.function = lambda x: calls.append(x) or 2 * x
    assert torch.equal(double(prompt), 2 * prompt) and not calls
    for other in (torch.ones(4, 3, requires_grad=True), torch.ones(2, 3), prompt.double().detach().requires_grad_()):
        assert torch.equal(double(other), 2 * other) and calls.pop() is other
    with torch.no_grad():
        assert torch.equal(double(prompt), 2 * prompt) and calls.pop() is prompt


def deep_classifier(coupled):
    """A classifier with prompts in both layers of random-tiny, the visual ones made of the text ones or not."""
    clip, config = load_backbone("random-tiny"), {"text_tokens": 2, "visual_tokens": 2, "text_depth": 2}
    config = PromptConfig(**config, visual_depth=2, words="", family="maple" if coupled else "independent")
    theta = deepened(clip, initial_prompts(clip, 2, 2, seed=3), config, 3)
    names = ["cat", "house boat", "tree"]
    if coupled:
        return CoupledCLIP(clip, names, {"text": theta["text"]}, theta)
    return PromptedCLIP(clip, names, theta)


@pytest.mark.parametrize("coupled", [False, True])
def test_deep_and_coupled_prompts_are_recorded_as_they_are_used(monkeypatch, coupled):
    """Both towers replay in a training step, also after the prompts changed; gradients equal those of a plain one."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_traced_callables)
    model, images = deep_classifier(coupled), torch.randn(2, 3, 32, 32)
    parameters = model.parameters_to_learn()

    def step():
        loss = F.cross_entropy(model(images), torch.tensor([0, 2]))
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    model.record(torch.zeros_like(images))
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))
    recorded, model._recorded = model._recorded, {}
    plain = step()
    model._recorded = recorded
    for one in recorded.values():
        one.function = None  # a pass that is not replayed fails
    torch.testing.assert_close(step(), plain)
    assert set(recorded) == {"images", "classes"}


def test_if_one_tower_cannot_be_recorded_none_is(monkeypatch):
    """The log then has a line that graphs are not used."""
    made = []

    def fails(function, samples, num_warmup_iters):
        if made:
            raise RuntimeError("out of memory")
        return made.append(function) or make_traced_callables(function, samples, num_warmup_iters)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fails)
    model = deep_classifier(False)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.record(torch.zeros(2, 3, 32, 32))
    assert made and not model._recorded


def test_passes_that_are_computed_twice_are_not_recorded(build, monkeypatch):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_traced_callables)
    for options, expected in ((("CLASSES", 2), {"images"}), (("CHECKPOINTING", "always"), set())):
        model = build("JointPrompt", f"TRAINER.MEMORY.{options[0]}", options[1]).model
        model.record(torch.zeros(2, 3, 32, 32))
        assert set(model._recorded) == expected


def test_cocoop_scores_in_parts(build, monkeypatch):
    from gram_meta.trainers import cocoop

    trainer = build("CoCoOp")
    images = next(iter(trainer.test_loader))["img"]
    whole = trainer.model_inference(images)
    monkeypatch.setattr(cocoop, "SENTENCES", 9)  # two images of four classes at a time
    assert torch.allclose(trainer.model_inference(images), whole, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- GRAM


@pytest.mark.parametrize(
    ("plain", "gram", "kind"),
    [("VPT", "VPTGRAM", "VPT"), ("JointPrompt", "UniGRAM", "UniGRAM"), ("CoCoOp", "CoCoOpGRAM", "CoCoOp")],
)
def test_a_step_with_a_constant_gate(build, save, plain, gram, kind):
    """From theta*, a step of SGD is half of the plain one in the prompts, and the whole one in the meta-net."""
    options = ("OPTIM.WARMUP_EPOCH", -1, "OPTIM.WEIGHT_DECAY", 0.0)
    trainers = [build(plain, *options), build(gram, *options, "TRAINER.GRAM.CHECKPOINT", save(kind))]
    learners = [trainer.model.prompt_learner for trainer in trainers]
    assert [name for name, _ in learners[0].named_parameters()] == [n for n, _ in learners[1].named_parameters()]
    learners[0].load_state_dict(learners[1].state_dict())
    start = {name: p.detach().clone() for name, p in learners[0].named_parameters()}
    prompts = initial_prompts(trainers[1].backbone, *PROMPTS[kind], WORDS.get(PROMPTS[kind][0], ""), seed=7)
    assert all(torch.equal(start[{"text": "ctx", "visual": "visual_ctx"}[k]], p) for k, p in prompts.items())
    if kind == "CoCoOp":
        for name, value in initial_meta_net(trainers[1].backbone, seed=7).items():
            assert torch.equal(start[f"meta_net.{name}"], value)
    batch = next(iter(trainers[0].train_loader_x))
    moves = []
    for trainer, learner in zip(trainers, learners, strict=True):
        trainer.num_batches, trainer.epoch, trainer.batch_idx = 5, 0, 0
        trainer.set_model_mode("train")
        trainer.forward_backward(batch)
        moves.append({name: p.detach() - start[name] for name, p in learner.named_parameters()})
    for name, move in moves[0].items():
        share = 0.5 if name in ("ctx", "visual_ctx") else 1.0
        assert move.abs().max() > 1e-7
        assert torch.allclose(moves[1][name], share * move, rtol=1e-2, atol=1e-8), name
    raw = [name for name in start if name.startswith("meta_net.")]
    assert trainers[1].raw_parameters == raw and (len(raw) == 4) == (kind == "CoCoOp")
    assert set(trainers[1].regulation.prompts) == set(prompts)


@pytest.mark.parametrize(("trainer", "kind"), [("CoCoOpGRAM", "CoCoOp"), ("UniGRAM", "UniGRAM")])
def test_a_run_and_its_evaluation_without_the_meta_checkpoint(go, save, tmp_path, trainer, kind):
    """results.json says what the meta-training was, also where the run's prompts are all that is left."""
    meta = save(kind)
    results = go(trainer, "TRAINER.GRAM.CHECKPOINT", meta)
    assert go(trainer, "TRAINER.GRAM.CHECKPOINT", meta, "TRAINER.GRAM.META", "x") == results  # the same run
    text, visual = PROMPTS[kind]
    assert results["meta_checkpoint"]["path"] == meta and results["meta_checkpoint"]["settings"] == {
        "TASKS.DOMAIN_SHIFT": True,
        "REGULATOR.ENABLED": True,
        "OUTER.META": True,
        "CHC.LABELLED": False,
        "PROMPT.TEXT_TOKENS": text,
        "PROMPT.VISUAL_TOKENS": visual,
        "PROMPT.VISUAL_START": "random",
        "PROMPT.CONDITIONAL": kind == "CoCoOp",
    }
    log = (tmp_path / trainer / "log.txt").read_text()
    raw = [f"meta_net.linear{i}.{part}" for i in (1, 2) for part in ("weight", "bias")]
    raw = raw if kind == "CoCoOp" else []
    visual_too = ", a visual prompt of shape (2, 64)" if visual else ""
    learned = [f"Learning a text prompt of shape ({text}, 64){visual_too}", *raw]
    assert ", ".join(learned) in log.splitlines()
    assert results["raw_parameters"] == raw
    assert ("Raw gradients, as the regulator does not know them: meta_net.linear1" in log) == bool(raw)
    assert set(results["regulator"]) == ({"text", "visual"} if visual else {"text"})
    Path(meta).unlink()
    flags = ["--eval-only", "--model-dir", str(tmp_path / trainer)]
    for group in ("base", "new"):
        tested = go(trainer, flags=flags, out=group, group=group)
        assert tested["meta_checkpoint"] == results["meta_checkpoint"]
    assert tested["raw_parameters"] == raw
    repeated = json.loads((tmp_path / "base" / "results.json").read_text())
    assert repeated["metrics"]["accuracy"] == results["metrics"]["accuracy"]


def test_what_needs_the_meta_checkpoint_says_so_and_leaves_no_folder(go, tmp_path):
    for flags in ([], ["--eval-only"], ["--no-train"]):
        with pytest.raises(GramError, match="TRAINER.GRAM.CHECKPOINT is empty; UniGRAM expects") as error:
            go("UniGRAM", flags=flags)
        assert "\n" not in str(error.value)
    with pytest.raises(GramError, match="expected prompt_learner/ in it, found no such folder"):
        go("UniGRAM", flags=["--eval-only", "--model-dir", str(tmp_path / "none")])
    assert not (tmp_path / "UniGRAM").exists()


@pytest.mark.parametrize(
    ("trainer", "kind", "says"),
    [
        ("CoCoOpGRAM", "CoOp", "expected a text prompt, meta_net.*, which the trainer learns, found a text prompt$"),
        ("CoOpGRAM", "CoCoOp", "expected a text prompt, which the trainer learns, found a text prompt, meta_net.lin"),
        ("UniGRAM", "CoOp", "expected a text prompt, a visual prompt, which the trainer learns, found a text prompt$"),
        ("VPTGRAM", "UniGRAM", "expected a visual prompt, which the trainer learns, found a text prompt, a visual"),
        ("VPTGRAM", "VPT", r"expected a visual prompt of shape \(3, 64\), found \(4, 64\)"),
    ],
)
def test_a_meta_checkpoint_of_another_kind_is_one_sentence(build, save, trainer, kind, says):
    options = ["TRAINER.VPT.N_CTX_VISION", 3] if kind == "VPT" else []
    with pytest.raises(GramError, match=says) as error:
        build(trainer, "TRAINER.GRAM.CHECKPOINT", save(kind), *options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("trainer", "opts", "says"),
    [
        ("VPT", ["TRAINER.VPT.PROMPT_DEPTH_VISION", 9], "PROMPT_DEPTH_VISION is 9; expected 1"),
        ("VPT", ["TRAINER.VPT.N_CTX_VISION", 0], "TRAINER.VPT.N_CTX_VISION: expected at least 1 .* found 0"),
        (
            "JointPrompt",
            ["TRAINER.JOINT.N_CTX_VISION", 0],
            "TRAINER.JOINT.N_CTX_VISION: expected at least 1 .* found 0",
        ),
        ("JointPrompt", ["TRAINER.JOINT.N_CTX_TEXT", 3], "CTX_INIT is 'a photo', 2 tokens; expected 3, as"),
        ("VPT", ["MODEL.BACKBONE.NAME", "random-tiny-RN"], "expect a ViT image tower, found the ResNet"),
        ("JointPrompt", ["MODEL.BACKBONE.NAME", "random-tiny-RN"], "expect a ViT image tower"),
        (
            "CoCoOp",
            ["TRAINER.COCOOP.CTX_INIT", "''", "TRAINER.COCOOP.N_CTX", 0],
            "TRAINER.COCOOP.N_CTX: expected at least 1 .* found 0",
        ),
    ],
)
def test_refusals_are_one_sentence(build, trainer, opts, says):
    with pytest.raises(GramError, match=says) as error:
        build(trainer, *opts)
    assert "\n" not in str(error.value)


def test_another_class_sentence_than_in_meta_training_is_a_note(build, save, capsys):
    build("VPTGRAM", "TRAINER.GRAM.CHECKPOINT", save("VPT"))
    assert "Note:" not in capsys.readouterr().out
    build("VPTGRAM", "TRAINER.GRAM.CHECKPOINT", save("VPT", template="{}."))
    assert 'is "a photo of a {}." here' in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_knows_its_trainer_and_its_classes(go, tiny_data, tmp_path):
    go("VPT")
    flags = ["--eval-only", "--model-dir", str(tmp_path / "VPT")]
    with pytest.raises(GramError, match="expected prompts of CoOp or CoOpGRAM .*, found those of VPT") as error:
        go("CoOp", flags=flags)
    assert "\n" not in str(error.value) and not (tmp_path / "CoOp").exists()
    path = tmp_path / "VPT/prompt_learner/model.pth.tar-1"
    state = torch.load(path, weights_only=True)
    facts = {key: state[key] for key in ("trainer", "dataset", "folder", "subsample", "classnames")}
    where = {"dataset": "EmojiFood", "folder": "", "subsample": "base"}
    assert facts == {"trainer": "VPT", **where, "classnames": ["red", "green"]}
    for changed, says in (
        (["green", "red"], "other classes of this dataset than are here now: class 0 is 'green' there and 'red'"),
        (["red"], "1 there, 2 here"),
    ):
        torch.save({**state, "classnames": changed}, path)
        with pytest.raises(GramError, match=says) as error:
            go("VPT", flags=flags, out="other")
        assert "\n" not in str(error.value)
        go("VPT", flags=flags, out=f"new{len(changed)}", group="new")  # other classes are what prompts are for
    for key in facts:
        del state[key]
    torch.save(state, path)  # as CoOp writes it
    assert go("VPT", flags=flags, out="old")["metrics"]["total"] == 4


def test_a_checkpoint_of_coops_own_cocoop(build, tmp_path):
    """Half precision, with the class names' tokens in it."""
    trainer = build("CoCoOp")
    state = {name: value.half() + 1 for name, value in trainer.model.prompt_learner.state_dict().items()}
    folder = tmp_path / "run/prompt_learner"
    folder.mkdir(parents=True)
    tokens = {"token_prefix": torch.zeros(4, 1, 64), "token_suffix": torch.zeros(4, 72, 64)}
    torch.save({"state_dict": {**state, **tokens}, "epoch": 10}, folder / "model.pth.tar-10")
    trainer.load_model(str(tmp_path / "run"), epoch=10)
    for name, value in trainer.model.prompt_learner.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[name].float())


# ------------------------------------------------------------------------------------------------------- config files


def trainer_configs():
    folder = find_config("trainers/CoOp/vit_b16_c4_ep10_batch32_ctxv1", "").parents[1]
    return sorted(f"{path.parent.name}/{path.stem}" for path in folder.rglob("*.yaml"))


def test_there_is_a_config_file_for_every_trainer_and_backbone():
    found = set(trainer_configs())
    for bb in ("gram_small", "vit_b16", "vit_b32", "vit_l14"):
        plain = {name: config.replace("gram_small", bb) for name, config in CONFIGS.items()}
        assert {f"{name}/{config}" for name, config in plain.items()} | {f"ZeroshotCLIP/{bb}"} <= found
    for bb in ("gram_small", "vit_b16"):
        variants = [f"c{n}+{n}_ep10_batch32_ctxv1" for n in (1, 3, 4)]
        ablations = ("no_domain_shift", "no_regulator", "no_meta_learning", "labelled")
        variants += [f"c2+2_ep10_batch32_ctxv1_{ablation}" for ablation in ablations]
        assert {f"UniGRAM/{bb}_{variant}" for variant in variants} <= found


@pytest.mark.parametrize("config", trainer_configs())
def test_a_config_file_says_what_its_name_says(config, backbone):
    """Backbone, tokens, words, batch and epochs; and its META config meta-trains the same prompts."""
    trainer, _, name = config.partition("/")
    parsed = launch.build_parser().parse_args(["--trainer", trainer, "--config-file", name])
    cfg = launch.setup_cfg(parsed)
    bb = next(bb for bb in ("gram_small", "vit_b16", "vit_b32", "vit_l14") if name.startswith(bb))
    of = {"gram_small": ("gram-small", 64), "vit_b16": ("ViT-B/16", 224), "vit_b32": ("ViT-B/32", 224)}
    backbone_name, size = of.get(bb, ("ViT-L/14", 224))
    assert cfg.MODEL.BACKBONE.NAME == backbone_name and cfg.INPUT.SIZE == (size, size)
    node = cfg.TRAINER[TRAINER_REGISTRY.get(trainer).node]
    assert node.PREC == ("fp32" if bb == "gram_small" else "fp16")
    if trainer == "ZeroshotCLIP":
        return
    batch = 1 if trainer.startswith("CoCoOp") else 32
    assert cfg.DATALOADER.TRAIN_X.BATCH_SIZE == batch and f"_ep10_batch{batch}_ctxv1" in name
    assert (cfg.OPTIM.NAME, cfg.OPTIM.LR, cfg.OPTIM.MAX_EPOCH) == ("sgd", 0.002, 10)
    counts = [int(n) for n in name.removeprefix(f"{bb}_c").partition("_")[0].split("+")]
    text = node.get("N_CTX_TEXT", 0 if "VPT" in trainer else counts[0])
    visual = node.get("N_CTX_VISION", 0)
    assert [n for n in (text, visual) if n] == counts and node.CTX_INIT == WORDS[counts[0]]
    gram = cfg.TRAINER.GRAM
    if not trainer.endswith("GRAM"):
        assert gram.META == ""
        return
    assert gram.META and gram.REGULATE == (not name.endswith(("no_regulator", "no_meta_learning")))
    meta = load_meta_config([gram.META])
    assert meta.BACKBONE.NAME == backbone_name
    assert (meta.PROMPT.TEXT_TOKENS, meta.PROMPT.VISUAL_TOKENS) == (text, visual)
    assert meta.PROMPT.CONDITIONAL == (trainer == "CoCoOpGRAM")
    assert meta.REGULATOR.ENABLED == gram.REGULATE or not meta.OUTER.META
    if visual == 0 or text:
        assert meta.PROMPT.WORDS == node.CTX_INIT
    else:
        assert meta.PROMPT.TEMPLATE == f"{node.CTX_INIT} {{}}."


def test_options_that_a_checkout_has_added_itself_are_completed():
    from yacs.config import CfgNode as CN

    from gram_meta.engine.options import extend_cfg

    cfg = CN({"TRAINER": {"VPT": {"N_CTX_VISION": 8}}, "DATASET": {}, "TEST": {}})
    extend_cfg(cfg)
    assert cfg.TRAINER.VPT.N_CTX_VISION == 8 and cfg.TRAINER.VPT.PROMPT_DEPTH_VISION == 1
    assert cfg.TRAINER.GRAM.META == ""
