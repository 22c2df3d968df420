"""What is kept for the backward pass: activations computed again instead, class sentences in chunks; equal results."""

import weakref
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gram_meta.backbone import load_backbone
from gram_meta.bilevel import meta_losses, twice_differentiable
from gram_meta.prompts import ClassText, initial_prompts
from gram_meta.recompute import recomputed

NAMES = ["cat", "a very big and friendly dog", "house boat", "tree", "an old red fire truck"]


@pytest.fixture(scope="module")
def exact():
    """Layer norms in float64: OpenAI's own cast to float32."""
    return load_backbone("random-tiny", precision="fp64")


class Box:
    """What autograd keeps of a saved tensor, as long as the graph needs it."""

    def __init__(self, tensor):
        self.tensor = tensor


@contextmanager
def kept_bytes():
    """Counts the bytes that graphs made inside hold now for backward passes; parameters left out, a storage once."""
    boxes = weakref.WeakSet()

    def pack(tensor):
        box = Box(tensor)
        boxes.add(box)
        return box

    def count():
        tensors = [box.tensor for box in boxes if not isinstance(box.tensor, nn.Parameter)]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        yield count


@contextmanager
def checkpointing(backbone):
    backbone.checkpointing = True
    try:
        yield
    finally:
        backbone.checkpointing = False


def both_ways(backbone, run):
    """The same computation with activations kept and computed again."""
    plain = run()
    with checkpointing(backbone):
        return plain, run()


# --------------------------------------------------------------------------------------------------- recomputed calls


def test_recomputed_gradients_of_three_orders():
    x, y = (torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def plain(x, y):
        return (x * y).sin() + x @ y.T @ x, y.exp()

    def again(*inputs):
        return recomputed(plain, *inputs)

    assert torch.autograd.gradcheck(again, (x, y))
    assert torch.autograd.gradgradcheck(again, (x, y))

    def third(function):
        result = sum(out.pow(2).sum() for out in function(x, y))
        first = torch.autograd.grad(result, (x, y), create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), (x, y), create_graph=True)
        return torch.autograd.grad(sum(g.sum() for g in second), (x, y))

    for ours, expected in zip(third(again), third(plain), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_recomputed_takes_inputs_without_gradient_twice_and_unused_outputs():
    x = torch.randn(3, requires_grad=True)
    fixed = torch.randn(3)

    def plain(a, b, c):
        return a * b + c * c, fixed * c, a - c

    expected = torch.autograd.grad(plain(x, x, fixed)[0].sum(), x)
    torch.testing.assert_close(torch.autograd.grad(recomputed(plain, x, x, fixed)[0].sum(), x), expected)
    product, constant, _ = recomputed(plain, fixed, fixed, fixed)  # nothing to keep
    assert not product.requires_grad and not constant.requires_grad
    with torch.no_grad():
        assert recomputed(plain, x, x, x)[0].grad_fn is None


def test_recomputation_runs_under_the_kernels_and_the_autocast_of_the_forward_pass():
    seen = []

    def plain(x):
        flags = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
        seen.append((*flags, torch.is_autocast_enabled("cpu")))
        return x @ x

    x = torch.randn(2, 2, requires_grad=True)
    with twice_differentiable(), torch.autocast("cpu"):
        y = recomputed(plain, x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert seen == [(False, True, True)] * 2
    assert torch.backends.cuda.flash_sdp_enabled() and not torch.is_autocast_enabled("cpu")


# ------------------------------------------------------------------------------------------------------- both towers


def test_checkpointed_text_is_equal_bit_by_bit():
    backbone = load_backbone("random-tiny")
    text = ClassText(backbone, NAMES, 4)
    prompt = torch.randn(4, 64).mul(0.02).requires_grad_()

    def run():
        features = text.features(prompt)
        return features, *torch.autograd.grad(features.sin().sum(), prompt)

    for plain, again in zip(*both_ways(backbone, run), strict=True):
        assert torch.equal(plain, again)


def test_checkpointed_images_are_equal_bit_by_bit():
    backbone = load_backbone("random-tiny")
    images, prompt = torch.randn(3, 3, 32, 32), torch.randn(2, 64, requires_grad=True)

    def run():
        features = backbone.encode_images(images, prompt)
        return features, *torch.autograd.grad(features.sin().sum(), prompt)

    for plain, again in zip(*both_ways(backbone, run), strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kinds", [("text",), ("visual",), ("text", "visual")])
def test_checkpointed_meta_gradients_are_exact(exact, kinds, steps):
    start = initial_prompts(exact, 2, 2, seed=1)
    theta = {kind: start[kind].double().requires_grad_() for kind in kinds}
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 2, 3, 3, 32, 32, generator=generator)  # support and query, tasks, images, ...
    text = ClassText(exact, NAMES, 2).select(torch.tensor([[0, 1, 2], [3, 1, 4]]))
    fixed = F.normalize(torch.randn(2, 3, 64, generator=generator, dtype=torch.float64), dim=-1)

    def losses(of):
        def loss(prompts):
            classes = text.features(prompts["text"]) if "text" in prompts else fixed  # (2, 3, D)
            pixels = images[of].flatten(0, 1)
            each = prompts["visual"].repeat_interleave(3, 0) if "visual" in prompts else None
            seen = exact.encode_images(pixels, each).unflatten(0, (2, 3))
            scores = 20 * seen @ classes.transpose(1, 2)  # (2, 3 images, 3 classes)
            labels = torch.arange(3).expand(2, 3)
            return F.cross_entropy(scores.transpose(1, 2), labels, reduction="none").mean(1)

        return loss

    def run(**options):
        result = meta_losses(losses(0), losses(1), theta, 2, 5.0, steps, **options).sum()
        return result, *torch.autograd.grad(result, list(theta.values()))

    plain, again = both_ways(exact, run)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * b.abs().max().item())
    lost = run(first_order=True)[1] - plain[1]
    assert lost.abs().max() > 1e-3 * plain[1].abs().max()  # there is a second order to lose


def test_checkpointing_keeps_the_layers_inputs_alone(exact):
    text = ClassText(exact, NAMES, 2)
    prompt = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
    images = torch.randn(4, 3, 32, 32)
    visual = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)

    def kept(run, second_order=False):
        with kept_bytes() as count, twice_differentiable():
            result = run().sum()
            wanted = prompt if run is of_text else visual
            graph = torch.autograd.grad(result, wanted, create_graph=True) if second_order else result
            return count() if graph is not None else 0

    def of_text():
        return text.features(prompt)

    def of_images():
        return exact.encode_images(images, visual)

    for run, share in ((of_text, 0.1), (of_images, 0.15)):
        for second_order in (False, True):
            plain, again = both_ways(exact, partial(kept, run, second_order))
            assert again < share * plain, (run.__name__, second_order)
