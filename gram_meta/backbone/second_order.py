"""Layer pieces with hand-written first and second derivatives for frozen weights, and the switch that selects them.

Meta-training differentiates the towers twice. Autograd can do that alone, but makes many passes over large tensors and
keeps many of them. Here each derivative is a function of its own. The layer norm and the MLP's activation take fewer
passes. Attention keeps only queries, keys and values, neither its weights nor their derivatives, so its forward pass
may be a fused kernel although torch's fused kernels have no second derivative. Gradients go to the activations only; a
third derivative raises an error. Checked against autograd and finite differences in float64
(tests/backbone/test_second_order.py).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ACTIVATION = 1.702  # a of CLIP's h sigmoid(a h)
_norm_backward = torch.ops.aten.native_layer_norm_backward
_silu_backward = torch.ops.aten.silu_backward
_softmax_backward = torch.ops.aten._softmax_backward_data
FORWARD_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_enabled: ContextVar[bool] = ContextVar("second_order", default=False)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Give the towers' passes inside a second derivative.

    The image tower then uses `self_attention`. Where torch's own attention runs, it uses the MATH kernels.
    """
    with second_order(True), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def second_order(enabled: bool) -> Iterator[None]:
    """Set what `second_order_enabled` returns inside, and leave torch's kernels as they are.

    Autograd may run a backward pass in a thread of its own, which does not inherit the value: whoever runs a layer
    there (`recompute`) has to set it again.
    """
    token = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(token)


def second_order_enabled() -> bool:
    """Return whether the caller runs inside `twice_differentiable()`."""
    return _enabled.get()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Apply `F.layer_norm` over the last axis of x (..., d)."""
    return _Norm.apply(x, weight, bias, eps)


def activate_and_project(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return silu(hidden) W^T / a + b, the second half of CLIP's MLP: (n, k) -> (n, d); `hidden` is already times a."""
    return _Activation.apply(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype))


def self_attention(qkv: Tensor, heads: int) -> Tensor:
    """Attend from all tokens to all: queries, keys, values side by side (B, L, 3 d) -> (B, L, d).

    The derivatives' matrix products are computed in bf16 for bf16 values, and at least in float32 for all others (fp16
    would lose small ones); everything between them is at least float32.
    """
    return _Attention.apply(qkv, heads)


def _last(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a backward function raise for a third derivative; `once_differentiable` would leave its share out."""

    @wraps(backward)
    def checked(*args: Any) -> Any:
        if torch.is_grad_enabled():  # in a backward pass: exactly under `create_graph=True`
            raise RuntimeError("a third derivative was asked for; the towers' layers are differentiable twice")
        return backward(*args)

    return checked


def _as_given(device: str) -> AbstractContextManager[Any]:
    """Return a context in which operations take number types as they are.

    CUDA's autocast returns a layer norm of 16-bit values in float32. Its derivative would not fit the values kept.
    """
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        with _as_given(x.device.type):
            y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, None, None, None]:
        return _NormGradient.apply(dy[0], *ctx.saved_tensors), None, None, None


class _NormGradient(torch.autograd.Function):
    """dx = r P g with g = w dy, r = 1 / std, and the projection P = I - 1 1^T / d - n n^T / d, n = r (x - mean)."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        ctx.save_for_backward(dy, x, weight, mean, rstd)
        return _norm_backward(dy, x, x.shape[-1:], mean, rstd, weight, None, [True, False, False])[0]

    @staticmethod
    @_last
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        dy, x, weight, mean, rstd = ctx.saved_tensors
        d, low = x.shape[-1], x.dtype
        # P is symmetric, so the gradient of g is r P u
        to_dy = _norm_backward(u, x, x.shape[-1:], mean, rstd, None, None, [True, False, False])[0]
        u, dy = u.to(mean.dtype), dy.to(mean.dtype)  # statistics are float32 where values have 16 bits
        # the gradient of <u, r P g> with respect to x, with u and g centred:
        # -r^2 / d ((<u, g> - 3 <u, n> <g, n> / d) n + <g, n> u + <u, n> g)
        n = (x - mean).mul_(rstd)
        g = dy * weight
        g.sub_(g.mean(-1, keepdim=True))
        u = u - u.mean(-1, keepdim=True)
        un, gn, ug = ((a * b).sum(-1, keepdim=True) for a, b in ((u, n), (g, n), (u, g)))  # (..., 1)
        scale = rstd.square().div_(-d)
        to_x = n.mul_((ug - 3 / d * un * gn) * scale).addcmul_(u, gn * scale).addcmul_(g, un * scale)
        return to_dy.mul_(weight), to_x.to(low), None, None, None


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return torch.addmm(bias, F.silu(hidden), weight.T, alpha=1 / ACTIVATION)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, None, None]:
        return _ActivationGradient.apply(dy[0], *ctx.saved_tensors), None, None


class _ActivationGradient(torch.autograd.Function):
    """silu'(h) s with s = dy W / a."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
        s = _product(dy, weight)  # (n, k)
        ctx.save_for_backward(hidden, weight, s)
        return _silu_backward(s, hidden)

    @staticmethod
    @_last
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, s = ctx.saved_tensors
        to_dy = _product(_silu_backward(u, hidden), weight.T)
        # silu''(h) s u, with silu''(h) = 2 q (1 - q) (1 + h (1/2 - q)) and q = sigmoid(h)
        q = torch.sigmoid(hidden)
        curved = torch.rsub(q, 0.5).mul_(hidden).add_(1)
        curved.mul_(q.addcmul_(q, q, value=-1)).mul_(s).mul_(u).mul_(2)
        return to_dy, curved, None


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W / a, with the factor inside the matrix product."""
    return torch.addmm(x.new_empty(1, 1), x, weight, beta=0, alpha=1 / ACTIVATION)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(qkv)
        ctx.heads = heads
        with sdpa_kernel(FORWARD_KERNELS):  # no derivative is taken of this call
            return _merged(F.scaled_dot_product_attention(*_views(qkv, heads)))

    @staticmethod
    def backward(ctx: Any, *do: Tensor) -> tuple[Tensor, None]:
        return _AttentionGradient.apply(do[0], *ctx.saved_tensors, ctx.heads), None


class _AttentionGradient(torch.autograd.Function):
    """With S = c Q K^T, P = softmax(S), O = P V: dV = P^T dO, dS = P (dP - r), dP = dO V^T, r = sum(dP P) over keys."""

    @staticmethod
    def forward(ctx: Any, do: Tensor, qkv: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(do, qkv)
        ctx.heads = heads
        q, k, v = _split(qkv, heads)
        (do,) = _split(do, heads, 1)
        p, c = _weights(q, k, qkv.shape[1])
        ds = _softmax_backward((do @ v.mT).to(p.dtype), p, -1, p.dtype).mul_(c).to(q.dtype)
        return _joined((ds @ k, ds.mT @ q, p.to(q.dtype).mT @ do), qkv)

    @staticmethod
    @_last
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, Tensor, None]:
        """Differentiate dQ, dK, dV along u: S', P' and so on are the changes; the gradient of dO is O'."""
        given, qkv = ctx.saved_tensors
        q, k, v = _split(qkv, ctx.heads)
        uq, uk, uv = _split(u, ctx.heads)
        (do,) = _split(given, ctx.heads, 1)
        low = q.dtype  # of the products
        p, c = _weights(q, k, qkv.shape[1])
        high = p.dtype
        s_turned = (uq @ k.mT).add_(q @ uk.mT).to(high).mul_(c)
        p_turned = _softmax_backward(s_turned, p, -1, high)  # P' = P (S' - sum(P S'))
        turned = p_turned.to(low)
        to_do = (turned @ v).add_(p.to(low) @ uv)
        to_v = turned.mT @ do
        dp = (do @ v.mT).to(high)
        dp.sub_((dp * p).sum(-1, keepdim=True))  # dP - r
        ds = (p * dp).mul_(c).to(low)
        to_q, to_k = ds @ uk, ds.mT @ uq
        p_turned.mul_(dp)  # P' (dP - r), whose sum is that of P' dP, as that of P' is zero
        dp_turned = (do @ uv.mT).to(high)
        dp_turned.sub_((dp_turned * p).sum(-1, keepdim=True).add_(p_turned.sum(-1, keepdim=True)))  # dP' - r'
        ds_turned = p_turned.addcmul_(p, dp_turned).mul_(c).to(low)
        to_q.add_(ds_turned @ k)
        to_k.add_(ds_turned.mT @ q)
        return _merged(to_do[:, :, : given.shape[1]]).to(given.dtype), _joined((to_q, to_k, to_v), qkv), None


def _views(x: Tensor, heads: int, parts: int = 3) -> Tensor:
    """View (B, L, parts d) as (parts, B, heads, L, d / heads)."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


def _split(x: Tensor, heads: int, parts: int = 3) -> tuple[Tensor, ...]:
    """Copy queries, keys and values (B, L, 3 d), or one part (B, L, d), in the number type of products.

    Each is (B, heads, L', d / heads). On a GPU, zeros stand behind the L tokens up to a multiple of 8, which its
    products of 16-bit numbers need to be fast.
    """
    low = x.dtype if x.dtype == torch.bfloat16 else torch.promote_types(x.dtype, torch.float32)
    views, padding = _views(x, heads, parts).to(low), _padding(x)
    return (F.pad(views, (0, 0, 0, padding)) if padding else views).contiguous().unbind()


def _padding(x: Tensor) -> int:
    return -x.shape[1] % 8 if x.is_cuda else 0


def _merged(x: Tensor) -> Tensor:
    """Turn (B, heads, L, d / heads) into (B, L, d)."""
    return x.transpose(1, 2).flatten(2)


def _joined(parts: tuple[Tensor, ...], like: Tensor) -> Tensor:
    """Put the (B, heads, L, d / heads) of queries, keys and values side by side: (B, L, 3 d)."""
    out = torch.empty_like(like)
    for place, part in zip(_views(out, parts[0].shape[1]), parts, strict=True):
        place.copy_(part[:, :, : like.shape[1]])
    return out


def _weights(q: Tensor, k: Tensor, length: int) -> tuple[Tensor, float]:
    """Return P (B, heads, L', L'), at least float32 and zero for keys from `length` on, and c."""
    c, high = q.shape[-1] ** -0.5, torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.mT).to(high).mul_(c)
    if scores.shape[-1] > length:
        scores[..., length:] = -torch.inf
    return torch.softmax(scores, dim=-1), c
