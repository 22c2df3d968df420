"""Activation checkpointing that can be differentiated more than once.

`recomputed(function, *inputs)` is `function(*inputs)` of which only the inputs are kept: the backward pass computes it
again. Meta-training differentiates twice, and torch's own `torch.utils.checkpoint` does not serve it: the graph that a
backward pass under `create_graph=True` leaves behind keeps every activation that was recomputed for it, so nothing is
saved; and the recomputation runs under the attention kernels of the moment, not of the forward pass, and then stops.
Here a backward pass that is to be differentiated is itself a recomputed function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Run = Callable[..., Any]  # tensors -> a tensor or several


def recomputed(function: Run, *inputs: Tensor) -> Any:
    """`function(*inputs)`, its activations computed again in every backward pass instead of kept.

    Values and gradients of every order are those of a plain call, as long as `function` is deterministic.

    Args:
        function: of tensors to a tensor or a tuple of them. Gradients go to `inputs` alone: what else it uses must not
            require any.
        inputs: kept for the backward pass.
    """
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs):
        return function(*inputs)
    return _Recomputed.apply(_as_now(function, inputs[0].device.type), *inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Run, *inputs: Tensor) -> Any:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)  # autograd sees nothing of it

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        pull_back = partial(_pull_back, ctx.function, wanted)
        gradients = iter(recomputed(pull_back, *ctx.saved_tensors, *cotangents))
        return None, *(next(gradients) if wants else None for wants in wanted)


def _pull_back(function: Run, wanted: Sequence[bool], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `function` at the first tensors, for the cotangents that follow; of the wanted inputs alone.

    Differentiable where gradients are on.
    """
    further = torch.is_grad_enabled()
    inputs, cotangents = tensors[: len(wanted)], tensors[len(wanted) :]
    with torch.enable_grad():
        own = [
            x.view_as(x) if further and x.requires_grad else x.detach().requires_grad_(wants)
            for x, wants in zip(inputs, wanted, strict=True)
        ]  # tensors of their own, also where one is given twice
        outputs = function(*own)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        pairs = [pair for pair in zip(outputs, cotangents, strict=True) if pair[0].requires_grad]
    return torch.autograd.grad(
        [output for output, _ in pairs],
        [x for x, wants in zip(own, wanted, strict=True) if wants],
        [cotangent for _, cotangent in pairs],
        create_graph=further,
        materialize_grads=True,
    )


def _as_now(function: Run, device: str) -> Run:
    """`function` under the number types (autocast) and attention kernels of now, whenever it is called."""
    autocast = partial(
        torch.autocast,
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )
    kernels = _attention_kernels()

    def run(*inputs: Tensor) -> Any:
        with autocast(), sdpa_kernel(kernels):
            return function(*inputs)

    return run


def _attention_kernels() -> list[SDPBackend]:
    """Kernels that `scaled_dot_product_attention` may use now."""
    flags = {
        "MATH": "math",
        "FLASH_ATTENTION": "flash",
        "EFFICIENT_ATTENTION": "mem_efficient",
        "CUDNN_ATTENTION": "cudnn",
        "OVERRIDEABLE": "flash",  # other vendors' own: it has no public flag, and goes with the fused ones
    }
    enabled = {
        kernel: getattr(torch.backends.cuda, f"{flag}_sdp_enabled", lambda: False)() for kernel, flag in flags.items()
    }
    return [getattr(SDPBackend, kernel) for kernel in flags if enabled[kernel] and hasattr(SDPBackend, kernel)]
