"""What stands in for CUDA graphs on a CPU: the tensor operations of a call, traced once and then repeated.

Like a graph, a trace takes over nothing that Python decides later, and writes its results to the same memory each time.
"""

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map


class Traced:
    """Takes the place of `gram_meta.backbone.graphs.Replay`."""

    def __init__(self, function, inputs, pool=None):
        self.inputs = [one.clone() for one in inputs]
        function(*self.inputs)
        self.graph = make_fx(function)(*self.inputs)
        self.results = None

    def __call__(self, *inputs):
        for place, value in zip(self.inputs, inputs, strict=True):
            place.copy_(value)
        with torch.no_grad():
            found = self.graph(*self.inputs)
        if self.results is None:
            self.results = tree_map(lambda one: one.clone() if isinstance(one, torch.Tensor) else one, found)
        for place, value in zip(_tensors(self.results), _tensors(found), strict=True):
            place.copy_(value)
        return self.results


def make_traced_callables(function, samples, num_warmup_iters):
    """Take the place of `torch.cuda.make_graphed_callables`."""
    places = [one if one.is_leaf and one.requires_grad else one.clone() for one in samples]
    wanted = [index for index, one in enumerate(places) if one.requires_grad]

    def gradients(*tensors):
        inputs, cotangent = [one.detach().requires_grad_(one.requires_grad) for one in tensors[:-1]], tensors[-1]
        return torch.autograd.grad(function(*inputs), [inputs[index] for index in wanted], cotangent)

    with torch.no_grad():
        forward = make_fx(lambda *inputs: function(*inputs))(*places)
        result = forward(*places).clone()
    slope = torch.ones_like(result)  # where the backward pass reads the cotangent
    backward = make_fx(gradients)(*places, slope) if wanted else None

    class Graphed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            for place, value in zip(places, inputs, strict=True):
                if place.data_ptr() != value.data_ptr():
                    place.copy_(value)
            result.copy_(forward(*places))
            return result.detach()

        @staticmethod
        def backward(ctx, cotangent):
            found = iter(backward(*places, slope.copy_(cotangent)))
            return tuple(next(found) if one.requires_grad else None for one in places)

    return Graphed.apply


def _tensors(tree):
    return [one for one in torch.utils._pytree.tree_leaves(tree) if isinstance(one, torch.Tensor)]
