"""The two layouts of the text tower give equal results; the one for GPUs dispatches few operations."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gram_meta.backbone.clip import Backbone, clip_module, load_backbone
from gram_meta.backbone.second_order import twice_differentiable
from gram_meta.backbone.weights import empty_clip
from gram_meta.method.prompts import ClassText

NAMES = ["cat", "a very big and friendly dog", "house boat", "lamp", "two old red tin cans"]


class Launches(TorchDispatchMode):
    """Counts operations that are no views; an operation that makes a GPU wait is an error."""

    WAITS = ("nonzero", "_local_scalar_dense", "equal", "is_nonzero", "item")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, f"{name} makes a GPU wait"
        views = func._schema.name in ("aten::detach", "aten::_unsafe_view") or func.is_view
        self.count += not views
        return func(*args, **(kwargs or {}))


def features(backbone, packs, prompt):
    backbone.packs_texts = packs
    return ClassText(backbone, NAMES, 4).features(prompt)


@pytest.mark.parametrize("lead", [(), (3,)], ids=["one prompt", "a prompt for each task"])
def test_both_layouts_give_equal_features_and_gradients_of_both_orders(lead):
    backbone = load_backbone("random-tiny", precision="fp64")
    prompt = (0.02 * torch.randn(*lead, 4, 64, generator=torch.Generator().manual_seed(0))).double().requires_grad_()
    found = []
    for packs in (True, False):
        with twice_differentiable():
            value = features(backbone, packs, prompt)
            (first,) = torch.autograd.grad(value.square().flatten(0, -2)[:, 0].sum(), prompt, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), prompt)
        found.append((value.detach(), first.detach(), second))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_layouts_of_texts_without_a_prompt_are_equal_too():
    backbone = load_backbone("random-tiny")
    packed = backbone.encode_texts(NAMES)
    backbone.packs_texts = False
    torch.testing.assert_close(backbone.encode_texts(NAMES), packed)


def test_the_text_part_of_a_step_dispatches_at_most_400_operations_and_never_waits():
    """CoOp's text part in twelve layers: forward, loss, backward. In its own checkout it dispatches 526 operations."""
    backbone = Backbone(
        empty_clip(clip_module(), 64, 32, 2, 64, 8, 77, 49408, 64, 1, 12), "twelve layers", "cpu", "fp32"
    )
    counts = {}
    for packs in (True, False):
        backbone.packs_texts = packs
        text, prompt = ClassText(backbone, NAMES, 4), torch.zeros(4, 64, requires_grad=True)
        text.features(prompt)  # lays the texts out once, before the first step
        with Launches() as launches:
            text.features(prompt)[:, 0].sum().backward()
        counts[packs] = launches.count
    print(counts)
    assert counts[False] <= 400 < counts[True]
