"""scripts/bench/meta_step.py: all variants of a meta-step compute the same, in float64, for each family of prompts."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from gram_meta.backbone import load_backbone
from gram_meta.backbone.second_order import twice_differentiable

pytestmark = pytest.mark.slow

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
CHECKOUTS = os.environ.get("GRAM_CHECKOUTS", "")
SMALL = ("--tasks", "2", "--ways", "2", "--support", "1", "--query", "2")
TINY = (
    "--backbone",
    "random-tiny",
    "--precision",
    "fp64",
    "--repeats",
    "1",
    "--clock",
    "cpu",
    "--threads",
    "1",
    *SMALL,
)


@pytest.fixture(scope="module")
def meta_step():
    """The script as a module; its neighbours are importable while it is in use."""
    threads = torch.get_num_threads()
    sys.path.insert(0, str(BENCH))
    spec = importlib.util.spec_from_file_location("bench_meta_step", BENCH / "meta_step.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)
    sys.path.remove(str(BENCH))
    for name in ("bench_meta_step", "common", "meta_clone", "meta_ceiling", "checkouts"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def backbone(meta_step):
    loaded = load_backbone("random-tiny", precision="fp64")
    meta_step.in_double(loaded)
    return loaded


@pytest.mark.parametrize("family", ["text", "visual", "joint"])
def test_variants_agree(meta_step, backbone, family):
    args = meta_step.build_parser().parse_args(TINY)
    bench = meta_step.Bench(backbone, meta_step.FAMILIES[family], ["owl", "lamp", "red fox", "snail"], args)
    loss, gradients = bench.step(meta_step.CLONE, keep=True)
    assert float(loss) > 0 and all(float(g.abs().max()) > 0 for g in gradients[: len(bench.theta)])
    for name in bench.variants():
        other, others = bench.step(name, keep=True)
        apart = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(others, gradients, strict=True)]
        assert float(other) == pytest.approx(float(loss), rel=1e-6), name
        exact = apart[len(bench.theta) :] if "first order" in name else apart
        assert max(exact) < 1e-9, (name, apart)
        if "first order" in name:  # or the inner step would not be in the gradient at all
            assert max(apart[: len(bench.theta)]) > 1e-3, name
    assert not backbone.checkpointing


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
    twin.visual_prompt.sum().backward()
    assert torch.equal(model.visual_prompt.grad, torch.ones_like(theta["visual"]))


def test_flops_are_those_of_torch(meta_step):
    """The forward pass's products as torch counts them, so that the ceiling is one."""
    from meta_ceiling import image_passes
    from torch.utils.flop_counter import FlopCounterMode

    backbone = load_backbone("random-tiny")
    images, prompt = torch.zeros(1, 3, 32, 32), torch.randn(4, backbone.visual_width, requires_grad=True)
    with twice_differentiable(), FlopCounterMode(display=False) as counted:
        features = backbone.encode_images(images, prompt)
    forward = counted.get_total_flops()
    passes = image_passes(backbone, 4)
    assert passes.forward == pytest.approx(forward, rel=1e-3)
    with twice_differentiable(), FlopCounterMode(display=False) as counted:
        (gradient,) = torch.autograd.grad(backbone.encode_images(images, prompt).cos().sum(), prompt, create_graph=True)
        once = counted.get_total_flops() - forward
        torch.autograd.grad(gradient.square().sum(), prompt)
    twice = counted.get_total_flops() - forward - once
    assert features.shape == (1, 64)
    assert 0.8 * once < passes.backward <= 1.001 * once  # autograd differentiates the untouched patches too
    assert 0.8 * twice < passes.tangent <= 1.001 * twice


def test_the_script(meta_step, tmp_path, capsys):
    meta_step.main([*TINY, "--family", "joint", "--variants", "lean", "-o", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    assert "joint prompts (2 text tokens, 2 visual tokens)" in printed and "outside the towers" in printed
    report = json.loads((tmp_path / "out.json").read_text())
    joint = report["families"]["joint"]
    assert set(joint["gflop"]) == {"image tower", "text tower"} and len(joint["ceilings_seconds"]) == 3
    assert list(joint["measured"])[:3] == [meta_step.CLONE, meta_step.OURS, meta_step.LEAN]
    assert all(len(row["seconds"]) == 1 for row in joint["measured"].values())
    assert 0 < joint["profile"]["share_outside_towers"] < 1
    assert str(tmp_path) not in json.dumps(report)


@pytest.mark.skipif(not CHECKOUTS, reason="GRAM_CHECKOUTS names no folder of checkouts (ProMetaR, learn2learn)")
def test_beside_prometar(meta_step, tmp_path):
    places = Path(CHECKOUTS)
    if not (places / "ProMetaR").is_dir() or not (
        importlib.util.find_spec("learn2learn") or (places / "learn2learn").is_dir()
    ):
        pytest.skip("GRAM_CHECKOUTS holds no ProMetaR, or learn2learn is neither installed nor there")
    words = ["--prometar", str(places / "ProMetaR"), "--family", "text", "--variants", "none"]
    words += ["--learn2learn", str(places / "learn2learn")] if (places / "learn2learn").is_dir() else []
    tiny = [word if word != "fp64" else "fp32" for word in TINY]
    meta_step.main([*tiny, *words, "-o", str(tmp_path / "out.json")])
    measured = json.loads((tmp_path / "out.json").read_text())["families"]["text"]["measured"]
    assert measured[meta_step.PROMETAR]["seconds"][0] > 0
