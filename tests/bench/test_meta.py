"""scripts/bench/meta_step.py: all variants of a meta-step compute the same, in float64, for each family of prompts."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend

from gram_meta.backbone import load_backbone, second_order
from gram_meta.backbone.second_order import twice_differentiable

pytestmark = pytest.mark.slow

SMALL = ("--tasks", "2", "--ways", "2", "--support", "1", "--query", "2")
TINY = ("--backbone", "random-tiny", "--repeats", "1", "--clock", "cpu", "--threads", "1", *SMALL)
EXACT = ("--precision", "fp64")


@pytest.fixture(scope="module")
def meta_step(bench_script):
    return bench_script("meta_step")


@pytest.fixture(scope="module")
def args(meta_step):
    return meta_step.build_parser().parse_args([*TINY, *EXACT])


@pytest.fixture(scope="module")
def backbone(meta_step, args):
    return meta_step.common.begin(args)


@pytest.mark.parametrize("family", ["text", "visual", "joint"])
def test_variants_agree(meta_step, args, backbone, family):
    bench = meta_step.Bench(backbone, family, args)
    loss, gradients = bench.step(meta_step.CLONE)
    theta = len(bench.made.theta)
    assert float(loss) > 0 and all(float(g.abs().max()) > 0 for g in gradients[:theta])
    assert meta_step.TOWER in bench.variants() or family != "text"
    for name in bench.variants():
        other, others = bench.step(name)
        apart = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(others, gradients, strict=True)]
        assert float(other) == pytest.approx(float(loss), rel=1e-6), name
        exact = apart[theta:] if "first order" in name else apart
        assert max(exact) < 1e-9, (name, apart)
        if "first order" in name:  # or the inner step would not be in the gradient at all
            assert max(apart[:theta]) > 1e-3, name
    assert not backbone.checkpointing


@pytest.mark.parametrize("family", ["text", "maple"])
def test_tasks_of_equal_shapes_have_other_losses_and_gradients(meta_step, backbone, family):
    """What a graph of one episode has to compute anew for another."""
    from meta_tasks import MetaTasks

    made, found = MetaTasks(backbone, family, 2, 2, (1, 2)), []
    other = made.other_episode()
    assert other.query.images.shape == made.episode.query.images.shape
    assert other.support.classes.ids.shape == made.episode.support.classes.ids.shape
    for episode in (made.episode, other):
        made.optimiser.zero_grad(set_to_none=True)
        losses = made.add_gradients(meta_step.MemoryPlan(False, 2, 0, 0), made.inner(), episode).losses
        found.append([losses, *(parameter.grad for parameter in made.parameters)])
    assert set(made.regulator.widths) == {"text"} and len(made.theta) == (3 if family == "maple" else 1)
    assert all((a - b).abs().max() > 1e-3 * b.abs().max() for a, b in zip(*found, strict=True) if b.abs().max() > 0)


def test_a_clone_is_of_all_parameters_and_leads_back(meta_step, backbone):
    """Frozen weights are copied, as learn2learn does; an adapted prompt is not the original's; gradients reach it."""
    from meta_clone import PromptedModel, cloned

    theta = {"visual": torch.nn.Parameter(torch.zeros(2, backbone.visual_width, dtype=torch.float64))}
    model = PromptedModel(backbone, theta)
    twin = cloned(model)
    pairs = list(zip(model.named_parameters(), twin.named_parameters(), strict=True))
    assert len(pairs) > 20
    for (name, value), (other_name, other) in pairs:
        assert name == other_name and torch.equal(value, other)
        assert value.data_ptr() != other.data_ptr() and other.requires_grad == value.requires_grad
    twin.prompts["visual"].sum().backward()
    assert torch.equal(theta["visual"].grad, torch.ones_like(theta["visual"]))


def test_flops_are_those_of_torch(meta_step, monkeypatch):
    """The forward pass's products as torch counts them, so that the ceiling is one; it counts no fused attention."""
    monkeypatch.setattr(second_order, "FORWARD_KERNELS", [SDPBackend.MATH])
    from torch.utils.flop_counter import FlopCounterMode

    backbone = load_backbone("random-tiny")
    images, prompt = torch.zeros(1, 3, 32, 32), torch.randn(4, backbone.visual_width, requires_grad=True)
    with twice_differentiable(), FlopCounterMode(display=False) as counted:
        features = backbone.encode_images(images, prompt)
    forward = counted.get_total_flops()
    passes = meta_step.common.image_passes(backbone, 4)
    assert passes[0] == pytest.approx(forward, rel=1e-3)
    with twice_differentiable(), FlopCounterMode(display=False) as counted:
        (gradient,) = torch.autograd.grad(backbone.encode_images(images, prompt).cos().sum(), prompt, create_graph=True)
        once = counted.get_total_flops() - forward
        torch.autograd.grad(gradient.square().sum(), prompt)
    twice = counted.get_total_flops() - forward - once
    assert features.shape == (1, 64)
    assert 0.8 * once < passes[1] <= 1.001 * once  # autograd differentiates the untouched patches too
    assert 0.8 * twice < passes[2] <= 1.001 * twice


def test_the_script(meta_step, tmp_path, capsys):
    out = tmp_path / "out.json"
    meta_step.main([*TINY, *EXACT, "--family", "joint", "--variants", "lean", "-o", str(out)])
    printed = capsys.readouterr().out
    assert "joint prompts (2 text tokens, 2 visual tokens)" in printed and "outside the towers" in printed
    assert "estimate (MB)" in printed
    report = json.loads(out.read_text())
    joint = report["families"]["joint"]
    assert set(joint["gflop"]) == {"image tower", "text tower"} and len(joint["ceilings_seconds"]) == 3
    assert list(joint["measured"])[:3] == [meta_step.CLONE, meta_step.OURS, f"{meta_step.OURS}, lean"]
    assert all(len(row["seconds"]) == 1 for row in joint["measured"].values())
    assert 0 < joint["profile"]["share_outside_towers"] < 1
    assert str(tmp_path) not in json.dumps(report)
