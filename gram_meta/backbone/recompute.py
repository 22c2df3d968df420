"""Activation checkpointing that can be differentiated more than once.

`recomputed(function, *inputs)` returns `function(*inputs)` and keeps only the inputs; the backward pass runs the
function again. Torch's own `torch.utils.checkpoint` does not serve meta-training, which differentiates twice. The graph
of a backward pass under `create_graph=True` would keep every recomputed activation, so nothing would be saved. And the
recomputation would use the attention kernels enabled at that moment instead of those of the forward pass, and fail.
Here a backward pass that is to be differentiated is itself a recomputed function, and a function always runs under the
settings of its first call: number types (autocast), attention kernels, `second_order`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gram_meta.backbone.second_order import second_order, second_order_enabled

Run = Callable[..., Any]  # tensors -> a tensor or several


def recomputed(function: Run, *inputs: Tensor) -> Any:
    """Return `function(*inputs)`; every backward pass recomputes its activations, which are not kept.

    Values and gradients of every order equal those of a plain call if `function` is deterministic.

    Args:
        function: of tensors to a tensor or a tuple of them. Gradients go to `inputs` only: other tensors that it uses
            must not require any.
        inputs: kept for the backward pass.
    """
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs):
        return function(*inputs)
    return _Recomputed.apply(_under_settings_of_now(function, inputs[0].device.type), *inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Run, *inputs: Tensor) -> Any:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)  # without a graph: autograd is off in here

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        pull_back = partial(_pull_back, ctx.function, wanted)
        gradients = iter(recomputed(pull_back, *ctx.saved_tensors, *cotangents))
        return None, *(next(gradients) if wants else None for wants in wanted)


def _pull_back(function: Run, wanted: Sequence[bool], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of `function` by its wanted inputs; `tensors` are all inputs, then cotangents of outputs."""
    further = torch.is_grad_enabled()  # in a backward pass: whether it runs under create_graph=True
    inputs, cotangents = tensors[: len(wanted)], tensors[len(wanted) :]
    with torch.enable_grad():
        own = [
            x.view_as(x) if further and x.requires_grad else x.detach().requires_grad_(wants)
            for x, wants in zip(inputs, wanted, strict=True)
        ]  # separate tensors, even if one is given twice
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


def _under_settings_of_now(function: Run, device: str) -> Run:
    """Bind `function` to the settings in force now, whenever and in whichever thread it is called."""
    autocast = partial(
        torch.autocast,
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )
    kernels, enabled = _attention_kernels(), second_order_enabled()

    def run(*inputs: Tensor) -> Any:
        with autocast(), sdpa_kernel(kernels), second_order(enabled):
            return function(*inputs)

    return run


def _attention_kernels() -> list[SDPBackend]:
    """Return the kernels that `scaled_dot_product_attention` may use now."""
    flags = {
        "MATH": "math",
        "FLASH_ATTENTION": "flash",
        "EFFICIENT_ATTENTION": "mem_efficient",
        "CUDNN_ATTENTION": "cudnn",
        "OVERRIDEABLE": "flash",  # other vendors' kernels have no public flag: treated like the fused ones
    }
    cuda = torch.backends.cuda
    enabled = [kernel for kernel, flag in flags.items() if getattr(cuda, f"{flag}_sdp_enabled", lambda: False)()]
    return [getattr(SDPBackend, kernel) for kernel in enabled if hasattr(SDPBackend, kernel)]
