"""CUDA graphs: the kernels of a function are recorded once, and then started together.

A step of prompt learning is hundreds of small kernels. Starting them one by one takes a GPU's processor longer than the
kernels themselves. Two forms, for tensors of fixed shapes:

- `Recorded`: a function inside autograd (a few-shot step's passes through the towers).
- `Replay`: a function without an outer graph, backward passes inside included (a whole meta-step).

A recorded function may depend on tensors alone: whatever else it reads stays as it was when it was recorded.
A graph records what starts on a stream of its own. Both forms make it on the GPU of their inputs, whichever GPU is
CUDA's current one.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # plain calls before a function is recorded, in which libraries choose their kernels


class Recorded:
    """A function of tensors; a CUDA graph replays it for inputs like those it was recorded with, in training.

    Results are overwritten by the next call. For other inputs, and without gradients, the function runs as usual.

    Args:
        function: of tensors to a tensor.
        samples: inputs of the shapes to record. A parameter that will always be the input may be given itself.
    """

    def __init__(self, function: Callable[..., Tensor], *samples: Tensor) -> None:
        self.function = function
        self.kinds = list(map(_kind, samples))
        with on_device_of(samples):
            self.replay: Any = torch.cuda.make_graphed_callables(function, samples, num_warmup_iters=WARM_UP)

    def __call__(self, *inputs: Tensor) -> Tensor:
        fits = torch.is_grad_enabled() and list(map(_kind, inputs)) == self.kinds
        if not fits:
            return self.function(*inputs)
        with on_device_of(inputs):
            return self.replay(*inputs)


class Replay:
    """A recorded call of a function; inputs are copied to where it reads them, results are overwritten by the next.

    Args:
        function: of tensors to any tree of tensors.
        inputs: as in the call.
        pool: memory that several of these share (`torch.cuda.graph_pool_handle`), if their results are used at once.
    """

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor], pool: Any = None) -> None:
        self.inputs = [one.clone() for one in inputs]
        with on_device_of(self.inputs):
            self._record(function, pool)

    def _record(self, function: Callable[..., Any], pool: Any) -> None:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        # other threads pin memory for the next images meanwhile, which "global" would forbid
        with torch.cuda.graph(self.graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
            self.results = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        with on_device_of(self.inputs):
            for place, value in zip(self.inputs, inputs, strict=True):
                place.copy_(value, non_blocking=True)
            self.graph.replay()
        return self.results


def on_device_of(tensors: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Return a context in which CUDA's current device is that of the first tensor; elsewhere it changes nothing."""
    device = tensors[0].device
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _kind(value: Tensor) -> tuple[Any, ...]:
    return value.shape, value.dtype, value.requires_grad


def first_line(error: Exception) -> str:
    """Return the first line of an error; those of CUDA have many."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
