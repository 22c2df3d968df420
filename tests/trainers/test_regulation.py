"""GRAM for other people's trainers: deep and half-precision prompts, raw parameters, and what is refused."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import gram_meta.plugin  # noqa: F401, fills the registries
from gram_meta.backbone.clip import load_backbone
from gram_meta.coop import launch
from gram_meta.coop.command_line import CommandLine
from gram_meta.coop.defaults import config_path
from gram_meta.engine import TRAINER_REGISTRY, TrainerX, build_lr_scheduler, build_optimizer
from gram_meta.errors import GramError
from gram_meta.method import apply as module
from gram_meta.method.apply import Regulation, start_from
from gram_meta.method.checkpoint import MetaCheckpoint, save_meta_checkpoint
from gram_meta.method.dassl import WithGRAM
from gram_meta.method.regulator import GradientRegulator, RegulatorConfig
from gram_meta.trainers.checkout import CheckoutGRAM

WIDTH = 64  # of the tiny CLIP's text tower


@pytest.fixture(scope="module")
def regulator():
    """Random, so that gamma and beta depend on the gradient."""
    generator = torch.Generator().manual_seed(0)
    return GradientRegulator({"text": WIDTH}, RegulatorConfig(start="random"), generator)


@pytest.fixture(scope="module")
def meta(backbone, regulator, tmp_path_factory):
    theta = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)) * 0.1
    checkpoint = MetaCheckpoint({"text": theta}, regulator, backbone.name, backbone.fingerprint)
    path = tmp_path_factory.mktemp("meta") / "best.safetensors"
    save_meta_checkpoint(path, checkpoint)
    checkpoint.path = str(path)
    return checkpoint


def by_hand(regulator, gradient):
    """Eq. 5 and 6."""
    gate = regulator.gates["text"]
    gamma = torch.tanh(gradient @ gate.weight_gamma.T + gate.bias_gamma)
    beta = torch.tanh(gradient @ gate.weight_beta.T + gate.bias_beta)
    return gamma * gradient + beta


# ----------------------------------------------- a trainer as others write them: nothing of this project is in its code


class ForeignLearner(nn.Module):
    """Deep text prompts as in MaPLe: one for the input and one for each further layer, in half precision as in CoOp."""

    def __init__(self, dtype):
        super().__init__()
        self.ctx = nn.Parameter(torch.randn(3, WIDTH).mul(0.02).to(dtype))
        self.deep = nn.ParameterList([nn.Parameter(torch.randn(2, WIDTH).mul(0.02).to(dtype))])
        self.scale = nn.Parameter(torch.ones(1))


class ForeignCLIP(nn.Module):
    def __init__(self, clip, tokens, dtype):
        super().__init__()
        self.prompt_learner = ForeignLearner(dtype)
        self.clip, self.tokens = [clip], tokens  # in a list: not part of what is saved

    def forward(self, images):
        (clip,), learner = self.clip, self.prompt_learner
        x = clip.token_embedding(self.tokens)
        context = learner.ctx.float().expand(len(x), -1, -1)
        x = torch.cat([x[:, :1], context, x[:, 4:]], dim=1) + clip.positional_embedding
        x = x.permute(1, 0, 2)
        for layer, block in enumerate(clip.transformer.resblocks):
            if layer:
                deep = learner.deep[layer - 1].float()[:, None].expand(-1, x.shape[1], -1)
                x = torch.cat([x[:1], deep, x[3:]])
            x = block(x)
        x = clip.ln_final(x.permute(1, 0, 2))
        text = x[torch.arange(len(x)), self.tokens.argmax(-1)] @ clip.text_projection
        features = clip.encode_image(images)
        return 10 * learner.scale * F.normalize(features, dim=-1) @ F.normalize(text, dim=-1).T


@TRAINER_REGISTRY.register()
class Foreign(TrainerX):
    dtype = torch.float16

    def build_model(self):
        names = self.dm.dataset.classnames
        frozen = load_backbone("random-tiny")
        self.model = ForeignCLIP(frozen.model, frozen.tokenize([f"X X X {name}." for name in names]), self.dtype)
        self.optim = build_optimizer(self.model.prompt_learner, self.cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, self.cfg.OPTIM)
        self.register_model("prompt_learner", self.model.prompt_learner, self.optim, self.sched)

    def forward_backward(self, batch):
        loss = F.cross_entropy(self.model(batch["img"]), batch["label"])
        self.model_backward_and_update(loss)
        return {"loss": loss.item()}


@TRAINER_REGISTRY.register()
class ForeignGRAM(WithGRAM, Foreign):
    def gram_prompts(self):
        learner = self.model.prompt_learner
        return {"text": [learner.ctx, *learner.deep]}


@TRAINER_REGISTRY.register()
class ForeignOfACheckoutGRAM(CheckoutGRAM):
    trainer, checkout = "Foreign", "example.org/foreign"
    gram_prompts = ForeignGRAM.gram_prompts


def train(data, options, out, *opts, trainer="ForeignGRAM"):
    # the rate of the warm-up, 1e-5, would be lost in half precision
    return launch.train(
        [
            "--root",
            str(data),
            "--seed",
            "1",
            "--trainer",
            trainer,
            "--dataset-config-file",
            "emoji_food",
            "--config-file",
            "trainers/CoOp/gram_small_c4_ep10_batch32_ctxv1",
            "--output-dir",
            str(out),
            *options,
            "DATASET.NUM_SHOTS",
            "2",
            "DATALOADER.TRAIN_X.BATCH_SIZE",
            "2",
            "OPTIM.WARMUP_EPOCH",
            "-1",
            *map(str, opts),
        ],
        quiet=True,
    )


@pytest.mark.slow
def test_a_foreign_trainer_with_deep_half_precision_prompts(
    tiny_data, tiny_options, tmp_path, meta, regulator, monkeypatch
):
    """Every step of a whole run: theta* in the first layer alone, R on all layers in float32, the rest raw."""
    steps, starts = [], {}
    regulate = Regulation.regulate

    def watched(self, optimizer):
        held = [p for group in optimizer.param_groups for p in group["params"]]
        names = {id(p): name for name, p in self.prompts.items()}
        before = {names.get(id(p), "raw"): (p.detach().clone(), p.grad.clone()) for p in held}
        regulate(self, optimizer)
        steps.append((before, {names.get(id(p), "raw"): p.grad.clone() for p in held}))

    build = Foreign.build_model

    def remembering(self):
        build(self)
        starts["own"] = self.model.prompt_learner.deep[0].detach().clone()

    monkeypatch.setattr(Regulation, "regulate", watched)
    monkeypatch.setattr(Foreign, "build_model", remembering)
    train(tiny_data, tiny_options, tmp_path / "out", "TRAINER.GRAM.CHECKPOINT", meta.path)
    assert len(steps) == 4
    first = steps[0][0]
    assert torch.equal(first["text"][0], meta.prompts["text"].half())
    assert torch.equal(first["text.1"][0], starts["own"])
    for before, after in steps:
        assert set(before) == {"text", "text.1", "raw"}
        for name in ("text", "text.1"):
            raw = before[name][1]
            assert raw.dtype == torch.float16 and raw.abs().max() > 0
            assert torch.equal(after[name], by_hand(regulator, raw.float()).half())
        assert torch.equal(after["raw"], before["raw"][1])
    log = (tmp_path / "out/log.txt").read_text()
    assert log.count("prompt is float16") == 1 and "Raw gradients, as the regulator does not know them: scale\n" in log
    assert "regulator: text gradient norm" in log and "regulator: text.1 gradient norm" in log
    assert "* accuracy: " in log
    saved = torch.load(tmp_path / "out/prompt_learner/model.pth.tar-1", weights_only=True)["state_dict"]
    assert set(saved) == {"ctx", "deep.0", "scale"}  # the trainer's own checkpoint, unchanged


def test_a_trainer_of_a_checkout_is_put_together_when_it_is_built(tiny_data, tiny_options, tmp_path, meta):
    """It equals the class that a user writes, and refuses theta* of another depth."""
    learned = {}
    for trainer in ("ForeignGRAM", "ForeignOfACheckoutGRAM"):
        opts = "TRAINER.GRAM.CHECKPOINT", meta.path, "TRAINER.GRAM.INIT", "False"
        train(tiny_data, tiny_options, tmp_path / trainer, *opts, trainer=trainer)
        saved = torch.load(tmp_path / trainer / "prompt_learner/model.pth.tar-1", weights_only=True)
        learned[trainer] = saved["state_dict"]
    assert all(torch.equal(*values) for values in zip(*(state.values() for state in learned.values()), strict=True))
    with pytest.raises(GramError, match=r"a text prompt of 2 layers, found one of 1 layer \(PROMPT.TEXT_DEPTH\)$"):
        train(tiny_data, tiny_options, tmp_path / "no", *opts[:2], trainer="ForeignOfACheckoutGRAM")


@pytest.mark.parametrize("trainer", ["MaPLeGRAM", "PromptSRCGRAM", "KgCoOpGRAM"])
def test_a_trainer_of_a_checkout_outside_of_it_is_one_sentence(tiny_data, tiny_options, tmp_path, trainer):
    says = f"--trainer {trainer}: expected the trainer {trainer[:-4]} of a checkout .github.com/.*, found none$"
    with pytest.raises(GramError, match=says):
        train(tiny_data, tiny_options, tmp_path / "out", trainer=trainer)
    assert not (tmp_path / "out").exists()
    with pytest.raises(GramError, match=says):  # before its config file is looked for, in another checkout
        config_path(f"configs/trainers/{trainer}/some.yaml", CommandLine(trainer=trainer))


@pytest.mark.parametrize(
    ("opts", "says"),
    [
        (["MODEL.BACKBONE.NAME", "ViT-B/16"], "expected the backbone it was made with, random-tiny, found 'ViT-B/16'"),
        (["MODEL.INIT_WEIGHTS", "some.pth"], "MODEL.INIT_WEIGHTS and TRAINER.GRAM.INIT both set the initial prompts"),
        (["TRAINER.GRAM.CHECKPOINT", "''"], "TRAINER.GRAM.CHECKPOINT is empty; ForeignGRAM expects"),
        (["TRAINER.GRAM.STEP_SCALE", 0.5], "STEP_SCALE scales raw gradients"),
    ],
)
def test_a_foreign_trainer_reports_what_does_not_fit(tiny_data, tiny_options, tmp_path, meta, opts, says):
    with pytest.raises(GramError, match=says) as error:
        train(tiny_data, tiny_options, tmp_path / "out", "TRAINER.GRAM.CHECKPOINT", meta.path, *opts)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_config_tree_without_the_options_says_where_they_come_from():
    from gram_meta.engine import get_cfg_default
    from gram_meta.engine.options import extend_cfg

    trainer, cfg = ForeignGRAM.__new__(ForeignGRAM), get_cfg_default()
    cfg.TRAINER.pop("GRAM", None)  # as with a tree that was copied before the plugin was imported
    with pytest.raises(GramError, match=r"TRAINER.GRAM: .*gram_meta.engine.options.extend_cfg\(cfg\)"):
        trainer.check_cfg(cfg)
    extend_cfg(cfg)
    trainer.check_cfg(cfg)


# ------------------------------------------------------------------------------------------------- start and regulation


def prompt(*shape, dtype=torch.float32):
    return nn.Parameter(torch.zeros(*shape, dtype=dtype))


def test_theta_goes_into_the_first_layer(meta):
    theta = meta.prompts["text"]
    whole, deep, several = (prompt(3, WIDTH), prompt(4, 3, WIDTH), nn.ParameterList([prompt(3, WIDTH) for _ in "ab"]))
    for prompts in (whole, deep, several):
        start_from(meta, {"text": prompts})
    assert whole.equal(theta) and deep[0].equal(theta) and not deep[1:].any()
    assert several[0].equal(theta) and not several[1].any()


def test_a_deep_theta_goes_into_every_layer():
    """Into a list or one tensor, and into what was learned beside it; other depths change nothing."""
    theta, weight = torch.randn(2, 3, WIDTH), torch.randn(2, 5, WIDTH)
    meta = MetaCheckpoint({"text": theta}, None, "", "", extras={"coupling.weight": weight})
    several, deep = [prompt(3, WIDTH), prompt(3, WIDTH)], prompt(2, 3, WIDTH)
    net = [prompt(5, WIDTH), prompt(5, WIDTH)]
    start_from(meta, {"text": iter(several)}, {"coupling.weight": iter(net)})
    assert torch.stack(list(several)).equal(theta) and torch.stack(list(net)).equal(weight)
    start_from(meta, {"text": deep}, {"coupling.weight": net})
    assert deep.equal(theta)
    for wrong, found in (
        ([prompt(3, WIDTH)], r"\(1, 3, 64\)"),
        ([prompt(3, WIDTH), prompt(2, WIDTH)], r"\(2,\)"),
        (prompt(3, WIDTH), r"\(3, 64\)"),
        (prompt(4, 3, WIDTH), r"\(4, 3, 64\)"),
    ):
        with pytest.raises(GramError, match=f"expected a text prompt of shape {found}, found .2, 3, 64.$"):
            start_from(meta, {"text": wrong}, {"coupling.weight": net})
        assert not any(parameter.any() for parameter in wrong)


@pytest.mark.parametrize(
    ("prompts", "extras", "says"),
    [
        ({"visual": (3, WIDTH)}, {}, "expected a visual prompt, which the trainer learns, found a text prompt"),
        (
            {"text": (3, WIDTH), "visual": (3, 8)},
            {},
            "expected a text prompt, a visual prompt, .*, found a text prompt",
        ),
        ({"text": (4, WIDTH)}, {}, r"expected a text prompt of shape \(4, 64\), found \(3, 64\)"),
        ({"text": (3, 512)}, {}, r"expected a text prompt of shape \(3, 512\), found \(3, 64\)"),
        ({"text": (2, 4, WIDTH)}, {}, r"expected a text prompt of shape \(4, 64\), found \(3, 64\)"),
        ({"text": (WIDTH,)}, {}, "expected a learned parameter of shape .M, d. or .layers, M, d., found shape .64,."),
        ({"text": (3, WIDTH)}, {"net": (2,)}, "expected a text prompt, net, .*, found a text prompt$"),
    ],
)
def test_a_start_that_does_not_fit_is_one_sentence_and_changes_nothing(meta, prompts, extras, says):
    parameters = {kind: prompt(*shape) for kind, shape in prompts.items()}
    with pytest.raises(GramError, match=says) as error:
        start_from(meta, parameters, {name: prompt(*shape) for name, shape in extras.items()})
    assert "\n" not in str(error.value)
    assert not any(parameter.any() for parameter in parameters.values())


def test_extras_start_too_and_their_shapes_count(meta):
    both = MetaCheckpoint(meta.prompts, None, "", "", extras={"net.weight": torch.ones(2, 3)})
    net, ctx = prompt(2, 3), prompt(3, WIDTH)
    start_from(both, {"text": ctx}, {"net.weight": net})
    assert net.equal(torch.ones(2, 3)) and ctx.equal(meta.prompts["text"])
    with pytest.raises(GramError, match=r"expected net.weight of shape \(3, 3\), found \(2, 3\)"):
        start_from(both, {"text": ctx}, {"net.weight": prompt(3, 3)})


def test_several_layers_and_optimisers_are_regulated_once_each(regulator):
    first, second, other = prompt(3, WIDTH), prompt(2, WIDTH), prompt(5)
    optimizers = torch.optim.SGD([first, other], lr=1.0), torch.optim.SGD([second], lr=1.0)
    regulation = Regulation({"text": [first, second]}, regulator)
    handles = regulation.attach(*optimizers)
    gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(9)) for p in (first, second, other)]
    for parameter, gradient in zip((first, second, other), gradients, strict=True):
        parameter.grad = gradient.clone()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.allclose(-first, by_hand(regulator, gradients[0]), atol=1e-6)
    assert torch.allclose(-second, by_hand(regulator, gradients[1]), atol=1e-6)
    assert torch.equal(-other, gradients[2])
    module = nn.ParameterDict({"a": first, "b": second, "c": other, "frozen": prompt(1)})
    assert regulation.raw_parameters(module, *optimizers) == ["c"]
    assert set(regulation.summary()) == {"text", "text.1"} and regulation.summary()["text.1"]["steps"] == 1
    for handle in handles:
        handle.remove()
    other.grad, first.grad = None, gradients[0].clone()
    before = first.detach().clone()
    optimizers[0].step()
    assert torch.allclose(before - first, gradients[0], atol=1e-6)  # raw again


def test_a_run_whose_gradients_were_all_zero_has_a_line():
    """Two class names that CLIP cannot tell apart: the loss is flat."""
    parameter = torch.nn.Parameter(torch.zeros(2, WIDTH))
    regulation = Regulation({"text": parameter})
    optimizer = torch.optim.SGD([parameter], 0.1)
    regulation.attach(optimizer)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    (line,) = regulation.lines()
    assert "gradient norm 0 / 0 / 0" in line and "|R(g)|" not in line


@pytest.mark.slow
@pytest.mark.parametrize("stops", [False, True])
def test_what_the_regulator_did_over_steps(regulator, stops):
    """Means over parts of three steps: 34 of 100 steps, by hand from R's own parts; also of a resumed run."""
    parameter, random = prompt(3, WIDTH), torch.Generator().manual_seed(3)
    regulation = Regulation({"text": parameter}, regulator)
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    handles, rows = regulation.attach(optimizer), []
    for step in range(100):
        parameter.grad = torch.randn(3, WIDTH, generator=random) * (0.0 if 30 <= step < 33 else step + 1)
        parts = regulator.parts("text", parameter.grad)
        new, norm = parts.regulated.norm(), parameter.grad.norm()
        row = norm, new / norm, parts.gamma.square().mean().sqrt(), parts.beta.norm()
        rows.append([it.item() for it in row])
        optimizer.step()
        if stops and step == 41:
            handles[0].remove()
            regulation, state = Regulation({"text": parameter}, regulator), regulation.state_dict()
            regulation.load_state_dict(state)
            regulation.attach(optimizer)
    found = regulation.summary()["text"]["over_steps"]
    assert found["step"] == [*range(3, 100, 3), 100]
    for column, name in enumerate(("gradient_norm", "ratio", "gamma", "beta")):
        expected = [np.mean([row[column] for row in rows[start : start + 3]]) for start in range(0, 100, 3)]
        if name == "ratio":
            assert found[name].pop(10) is None and not np.isfinite(expected.pop(10))
        assert found[name] == pytest.approx(expected, rel=1e-5)


def test_a_run_of_an_earlier_version_goes_on_without_its_first_steps(regulator):
    parameter = prompt(3, WIDTH)
    regulations = [Regulation({"text": parameter}, regulator) for _ in range(2)]
    for regulation in regulations:
        optimizer = torch.optim.SGD([parameter], lr=0.0)
        (handle,) = regulation.attach(optimizer)
        parameter.grad = torch.ones(3, WIDTH)
        optimizer.step()
        handle.remove()
        if regulation is regulations[0]:
            state = regulation.state_dict()
            del state["text"]["gammas"], state["text"]["betas"]
            regulations[1].load_state_dict(state)
    found = regulations[1].summary()["text"]["over_steps"]
    assert found["step"] == [1, 2] and found["gradient_norm"] == pytest.approx([(3 * WIDTH) ** 0.5] * 2)
    assert found["gamma"][0] is None and found["gamma"][1] > 0


@pytest.mark.slow
def test_far_gradients_are_reported_once_and_checked_ever_more_rarely(regulator, capsys, monkeypatch):
    looked = []
    quantile = module._quantile
    monkeypatch.setattr(module, "_quantile", lambda values, q: looked.append(len(values)) or quantile(values, q))
    parameter = prompt(3, WIDTH)
    regulation = Regulation({"text": parameter}, regulator, gradient_norms={"text": {"q05": 1.0, "q95": 1.0}})
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    regulation.attach(optimizer)
    for step in range(100):
        parameter.grad = torch.full((3, WIDTH), (1.0 if step < 30 else 100.0) / (3 * WIDTH) ** 0.5)
        optimizer.step()
    assert looked == [10, 20, 40, 80]  # at 40 most of them were near
    assert capsys.readouterr().out.count("gradient's norm is 100 here (median of 80 steps)") == 1
    layers = [prompt(3, WIDTH), prompt(3, WIDTH)]  # each has quantiles of its own
    norms = {"text": {"q05": 1.0, "q95": 1.0}, "text.1": {"q05": 100.0, "q95": 100.0}}
    regulation = Regulation({"text": layers}, regulator, gradient_norms=norms)
    optimizer = torch.optim.SGD(layers, lr=0.0)
    regulation.attach(optimizer)
    for _ in range(10):
        for parameter, size in zip(layers, (1.0, 100.0), strict=True):
            parameter.grad = torch.full((3, WIDTH), size / (3 * WIDTH) ** 0.5)
        optimizer.step()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sixteen_bits_are_regulated_in_float32_and_named_once(regulator, dtype, capsys):
    parameter, second = prompt(3, WIDTH, dtype=dtype), prompt(3, WIDTH, dtype=dtype)
    parameter.data += 0.02
    regulation = Regulation({"text": [parameter, second]}, regulator)
    optimizer = torch.optim.SGD([parameter, second], lr=0.0)
    regulation.attach(optimizer)
    gradient = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)
    for _ in range(2):
        parameter.grad = gradient.clone()
        optimizer.step()
    assert torch.equal(parameter.grad, by_hand(regulator, gradient.float()).to(dtype))
    assert parameter.grad.dtype == dtype
    lines = [line for line in capsys.readouterr().out.splitlines() if "prompt is" in line]
    assert len(lines) == (1 if dtype.itemsize == 2 else 0)
    if dtype == torch.float16:
        assert "the text prompt is float16: at its size of 0.02 it loses steps below about 1e-05" in lines[0]


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ({"visual": (3, WIDTH)}, "learned for text prompts, but is to regulate 'visual'"),
        ({"text": (3, 512)}, "prompts of width 64, but the text prompt has width 512"),
        ({"text": (WIDTH,)}, "the text prompt: expected a learned parameter of shape"),
        ({}, "expected parameters by kind, each of them once, found none or one twice"),
    ],
)
def test_prompts_that_the_regulator_does_not_know(regulator, prompts, says):
    with pytest.raises(GramError, match=says) as error:
        Regulation({kind: prompt(*shape) for kind, shape in prompts.items()}, regulator)
    assert "\n" not in str(error.value)
    twice = prompt(3, WIDTH)
    with pytest.raises(GramError, match="one twice"):
        Regulation({"text": [twice, twice]}, regulator)
    with pytest.raises(GramError, match=r"found shape \(3, 64\), frozen"):
        Regulation({"text": twice.requires_grad_(False)}, regulator)
    with pytest.raises(GramError, match="the text.1 prompt: expected a parameter, found str"):
        Regulation({"text": [prompt(3, WIDTH), "ctx"]}, regulator)


def test_gradients_that_would_slip_by_are_refused(regulator):
    parameter = prompt(3, WIDTH)
    regulation = Regulation({"text": parameter}, regulator)
    with pytest.raises(GramError, match="the text prompt: expected an optimiser that holds it"):
        regulation.attach(torch.optim.SGD([prompt(2, WIDTH)], lr=1.0))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    regulation.attach(optimizer)
    for call in (lambda: optimizer.step(lambda: 0.0), lambda: optimizer.step(closure=lambda: 0.0)):
        with pytest.raises(GramError, match=r"optimizer.step\(closure\)"):
            call()
    optimizer.grad_scale = torch.ones(())  # as a grad scaler sets it for a fused optimiser
    with pytest.raises(GramError, match="a fused optimiser unscales gradients inside its step"):
        optimizer.step()
    assert not parameter.any()


# -------------------------------------------------------------------------------------------------------- the example


@pytest.mark.slow
def test_the_example_without_dassl(meta, tmp_path, capsys):
    path = Path(__file__).resolve().parents[2] / "examples/without_dassl.py"
    spec = importlib.util.spec_from_file_location("without_dassl", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(2):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / name / f"{index}.png")
    regulation = example.main(meta.path, str(tmp_path), epochs=2)
    assert not torch.equal(regulation.prompts["text"], meta.prompts["text"])
    assert regulation.summary()["text"]["steps"] == 2 and "path_beta" in regulation.summary()["text"]
    assert "epoch 2: loss" in capsys.readouterr().out
    code = [line for line in path.read_text().split("def main")[1].splitlines() if line.strip()]
    assert len(code) <= 26  # it promises to be short
