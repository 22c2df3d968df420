"""Derivatives written by hand against autograd's and against finite differences, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from gram_meta.backbone import second_order
from gram_meta.backbone.clip import load_backbone
from gram_meta.backbone.second_order import (
    ACTIVATION,
    activate_and_project,
    layer_norm,
    self_attention,
    twice_differentiable,
)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


WEIGHT, BIAS, PROJECTION = 1 + 0.3 * drawn(8), drawn(8), drawn(4, 8)


def plain_attention(qkv: Tensor) -> Tensor:
    q, k, v = qkv.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind()
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


CASES = {
    "layer norm": (
        (3, 5, 8),
        lambda x: layer_norm(x, WEIGHT, BIAS, 1e-5),
        lambda x: F.layer_norm(x, (8,), WEIGHT, BIAS, 1e-5),
    ),
    "MLP": (
        (5, 8),
        lambda h: activate_and_project(h, PROJECTION, BIAS[:4]),
        lambda h: F.linear(F.silu(h) / ACTIVATION, PROJECTION, BIAS[:4]),
    ),
    "attention": ((2, 5, 12), lambda x: self_attention(x, 2), plain_attention),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, "padded attention"])
def test_values_and_derivatives(name, monkeypatch):
    if name == "padded attention":  # 5 tokens as 8, as on a GPU
        monkeypatch.setattr(second_order, "_padding", lambda x: -x.shape[1] % 8)
    shape, ours, plain = CASES[name.removeprefix("padded ")]
    x, u = drawn(*shape).requires_grad_(), drawn(*shape)

    def all_of(function):
        """Value, gradient, and the gradient of the gradient's product with a direction."""
        y = function(x)
        (gradient,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((gradient * u).sum(), x)
        return y, gradient, second

    with sdpa_kernel(SDPBackend.MATH):
        for a, b in zip(all_of(ours), all_of(plain), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(ours, (x,)) and torch.autograd.gradgradcheck(ours, (x,))


def test_no_third_derivative():
    x = drawn(2, 8).requires_grad_()
    (first,) = torch.autograd.grad(layer_norm(x, WEIGHT, BIAS, 1e-5).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a third derivative was asked for"):
        torch.autograd.grad(first.sin().sum(), x, create_graph=True)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("bf16", 0.1)])
def test_image_tower_keeps_no_attention_weights(precision, bound):
    """Second derivatives of the whole tower, in 32 and 16 bits, against float64; and what a forward pass keeps."""
    images, prompt = torch.randn(2, 3, 32, 32), 0.02 * torch.randn(4, 64)
    along = torch.randn(4, 64)

    def second(which):
        backbone = load_backbone("random-tiny", precision=which)
        if which == "fp64":
            for module in backbone.model.modules():
                if isinstance(module, torch.nn.LayerNorm):
                    module.__class__ = torch.nn.LayerNorm
        theta = prompt.double().requires_grad_() if which == "fp64" else prompt.clone().requires_grad_()
        sizes = []

        def keep(x):
            sizes.append(tuple(x.shape))
            return x

        with twice_differentiable(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            features = backbone.encode_images(images, theta)
            (gradient,) = torch.autograd.grad(features.cos().sum(), theta, create_graph=True)
        (product,) = torch.autograd.grad((gradient * along).sum(), theta)
        tokens = 1 + (32 // 8) ** 2 + 4
        assert sizes and not [size for size in sizes if size[-2:] == (tokens, tokens)]
        return product.double()

    exact, found = second("fp64"), second(precision)
    assert (found - exact).abs().max() < bound * exact.abs().max()


def test_a_layer_norm_under_cudas_autocast_keeps_the_number_type_of_its_input():
    """The derivative expects what the layer norm kept and what comes back to it in one number type."""
    torch.set_autocast_enabled("cuda", True)  # `torch.autocast` itself refuses without a GPU
    try:
        with FakeTensorMode():
            x, weight, bias = (torch.zeros(shape, dtype=torch.float16, device="cuda") for shape in ((3, 8), 8, 8))
            assert torch.native_layer_norm(x, (8,), weight, bias, 1e-5)[0].dtype == torch.float32
            y = layer_norm(x.requires_grad_(), weight, bias, 1e-5)
            kept = y.grad_fn.saved_tensors  # of the input, the weight, the mean and 1 / deviation
        assert y.dtype == kept[0].dtype == kept[1].dtype == torch.float16
        assert torch.is_autocast_enabled("cuda")
    finally:
        torch.set_autocast_enabled("cuda", False)
