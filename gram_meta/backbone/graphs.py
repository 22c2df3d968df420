"""CUDA graphs: the kernels of a function are recorded once, and then started together.

A step of prompt learning is hundreds of small kernels. Starting them one by one takes a GPU's processor longer than the
kernels themselves. Two forms, for tensors of fixed shapes:

- `Recorded`: a function inside autograd (a few-shot step's passes through the towers).
- `Replay`: a function without an outer graph, backward passes inside included (a whole meta-step).

A recorded function may depend on tensors alone: whatever else it reads stays as it was when it was recorded.
"""

from collections.abc import Callable, Sequence
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
        self.replay: Any = torch.cuda.make_graphed_callables(function, samples, num_warmup_iters=WARM_UP)

    def __call__(self, *inputs: Tensor) -> Tensor:
        fits = torch.is_grad_enabled() and list(map(_kind, inputs)) == self.kinds
        return self.replay(*inputs) if fits else self.function(*inputs)


class Replay:
    """A recorded call of a function; inputs are copied to where it reads them, results are overwritten by the next.

    Args:
        function: of tensors to any tree of tensors.
        inputs: as in the call.
        pool: memory that several of these share (`torch.cuda.graph_pool_handle`), if their results are used at once.
    """

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor], pool: Any = None) -> None:
        self.inputs = [one.clone() for one in inputs]
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
        for place, value in zip(self.inputs, inputs, strict=True):
            place.copy_(value, non_blocking=True)
        self.graph.replay()
        return self.results


def _kind(value: Tensor) -> tuple[Any, ...]:
    return value.shape, value.dtype, value.requires_grad


def first_line(error: Exception) -> str:
    """Return the first line of an error; those of CUDA have many."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
