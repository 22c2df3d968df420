"""One graph at a time gives the meta-gradient of all in one graph, in parts too; what 16-bit towers make of it."""

import pytest
import torch

from gram_meta.backbone.clip import load_backbone
from gram_meta.config import load_meta_config
from gram_meta.errors import GramError
from gram_meta.method import bilevel
from gram_meta.method.bilevel import InnerLoop, lean_backward, meta_losses, task_gradients
from gram_meta.method.episodes import TaskSet
from gram_meta.method.memory_plan import MemoryConfig, plan
from gram_meta.method.prompts import META_NET, ClassText, initial_meta_net, template_features
from gram_meta.method.regulator import GradientRegulator

NAMES = ["cat", "a big dog", "house", "sea lion"]
CLASSES = torch.tensor([[0, 1], [3, 2]])
FAINT = 1e-3
FORMS = ["text", "visual", "joint", "conditional"]


@pytest.fixture(scope="module", params=["fp64"])
def backbone(request):
    return load_backbone("random-tiny", precision=request.param)


class Step:
    """Two tasks, theta and phi."""

    def __init__(self, form, backbone, curved=0.1):
        random = torch.Generator().manual_seed(5)
        number = backbone.logit_scale.dtype
        theta = {}
        if form != "visual":
            theta["text"] = 0.05 * torch.randn(2, 64, generator=random)
        if form in ("visual", "joint"):
            theta["visual"] = 0.05 * torch.randn(3, 64, generator=random)
        if form == "conditional":
            theta |= {f"{META_NET}{key}": value for key, value in initial_meta_net(backbone, 6).items()}
        self.theta = {name: value.to(number).requires_grad_() for name, value in theta.items()}
        self.regulator = GradientRegulator({name: 64 for name in theta if not name.startswith(META_NET)}).to(number)
        with torch.no_grad():
            for parameter in self.regulator.parameters():
                parameter.add_(curved * torch.randn(parameter.shape, generator=random).to(number))
        if form == "visual":
            classes = template_features(backbone, NAMES)[CLASSES]
        else:
            classes = ClassText(backbone, NAMES, 2).select(CLASSES)
        self.support, self.query = (
            TaskSet(backbone, classes, torch.randint(0, 256, (2, 2, n, 3, 32, 32), generator=random, dtype=torch.uint8))
            for n in (2, 3)
        )
        self.parameters = [*self.theta.values(), *self.regulator.parameters()]

    def whole(self, steps, regulate=None, first_order=False, scale=1.0):
        inner = InnerLoop(0.05, steps, first_order, scale, regulate)
        losses = meta_losses(self.support, self.query, self.theta, 2, inner).losses
        (losses.sum() * scale / 7).backward()
        return [losses.detach(), *(None if value is None else value / scale for value in self.taken())]

    def lean(self, steps, regulate=None, first_order=False, images=0, scale=1.0):
        support, query = self.support.parts(images), self.query.parts(images)
        inner = InnerLoop(0.05, steps, first_order, scale, regulate)
        losses = lean_backward(support, query, self.theta, 2, inner, weight=1 / 7).losses
        return [losses, *self.taken()]

    def taken(self):
        gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return gradients


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [1, 2])
def test_lean_is_exact(form, steps, backbone):
    step = Step(form, backbone)
    for first_order in (False, True):
        inner = (steps, step.regulator.regulate_known, first_order)
        expected = step.whole(*inner)
        for options in ({}, {"images": 3}, {"images": 1, "scale": 64.0}):
            for one, other in zip(step.lean(*inner, **options), expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("lean", [False, True])
def test_the_way_back_passes_over_detached_steps(lean, backbone):
    """The meta-gradient is that of one step from where two detached ones lead, as if theta stood there."""
    step = Step("text", backbone)
    plain, inner = InnerLoop(0.05, 2, regulate=step.regulator), InnerLoop(0.05, 1, regulate=step.regulator, detached=2)
    *_, last = bilevel.inner_path([step.support], bilevel.for_each_task(step.theta, 2), plain)
    there = {kind: value.detach().requires_grad_() for kind, value in last.after.items()}  # (2, M, d)
    losses = bilevel.adapted_losses(step.support, step.query, there, InnerLoop(0.05, 1, regulate=step.regulator)).losses
    losses.sum().backward()
    expected = [there["text"].grad.sum(dim=0), *(p.grad.clone() for p in step.regulator.parameters())]
    step.regulator.zero_grad()
    if lean:
        found = lean_backward([step.support], [step.query], step.theta, 2, inner)
    else:
        found = meta_losses(step.support, step.query, step.theta, 2, inner)
        found.losses.sum().backward()
    assert len(found.norms) == 3
    torch.testing.assert_close(found.losses.detach(), losses.detach(), rtol=1e-12, atol=0)
    for value, reference in zip((p.grad for p in step.parameters), expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-14)


def test_lean_without_a_regulator_adds_to_what_is_there(backbone):
    step = Step("joint", backbone)
    expected = step.whole(1)
    for value in step.theta.values():
        value.grad = torch.ones_like(value)
    found = step.lean(1)[1:3]
    for one, other in zip(found, expected[1:3], strict=True):
        torch.testing.assert_close(one, other + 1, rtol=1e-10, atol=1e-13)


def test_one_graph_stands_at_a_time(backbone):
    """Images in a graph at once: all of them in the whole way, one side of a task in the lean one, or a part of it."""
    step, most = Step("visual", backbone), 0
    alive = {"now": 0}

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            alive["now"] += len(x)
            count = len(x)
            ctx.here = type("Here", (), {"__del__": lambda _: alive.update(now=alive["now"] - count)})()
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad

    plain = step.support.backbone.encode_images

    def encode(images, prompt):
        nonlocal most
        out = Counted.apply(plain(images, prompt)) if torch.is_grad_enabled() else plain(images, prompt)
        most = max(most, alive["now"])
        return out

    step.support.backbone.encode_images = encode
    try:
        for run, expected in (
            (lambda: step.whole(1), 20),  # (2 + 3) images x 2 classes x 2 tasks
            (lambda: step.lean(1), 12),
            (lambda: step.lean(1, images=2), 4),
        ):
            most = 0
            run()
            assert (most, alive["now"]) == (expected, 0)
    finally:
        del step.support.backbone.encode_images


@pytest.mark.slow
def test_scale_changes_nothing_but_rounding(backbone):
    step = Step("joint", backbone)
    plain, scaled = (task_gradients(step.support, for_two(step), scale=scale) for scale in (1.0, 256.0))
    for name, value in plain.items():
        torch.testing.assert_close(scaled[name], value, rtol=1e-12, atol=0)
    inner = (1, step.regulator.regulate_known, False)
    for one, other in zip(step.whole(*inner, scale=256.0), step.whole(*inner), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)


def for_two(step):
    return {name: value.detach().expand(2, *value.shape).requires_grad_() for name, value in step.theta.items()}


def _times(factor, losses, prompts):
    return factor * losses(prompts)


@pytest.mark.slow
def test_a_scale_keeps_the_second_order_of_small_gradients_under_fp16():
    """A support loss so small that half precision has no numbers for the gradients inside the tower."""
    found = {}
    for precision in ("fp32", "fp16"):
        small = load_backbone("gram-small", precision=precision)
        random = torch.Generator().manual_seed(1)
        images = torch.nn.functional.normalize(torch.randn(2, 2, 3, small.embed_dim, generator=random), dim=-1)
        side = TaskSet(small, ClassText(small, NAMES, 2).select(CLASSES), images)
        start = (0.02 * torch.randn(2, 2, small.text_width, generator=random)).requires_grad_()
        u = {"text": 1e-4 * torch.randn(start.shape, generator=random)}
        for scale in (1.0, 256.0):

            def faint(prompts, side=side):
                return FAINT * side(prompts)

            found[precision, scale] = bilevel._hessian_product(faint, {"text": start}, u, scale)["text"]
    true = found["fp32", 1.0]
    errors = {scale: ((found["fp16", scale] - true).norm() / true.norm()).item() for scale in (1.0, 256.0)}
    assert errors[256.0] < 0.05 < errors[1.0], errors


# --- what fits --------------------------------------------------------------------------------------------------------


def planned(backbone, budget, *opts, tasks=4):
    config = load_meta_config([], ["BACKBONE.NAME", "random-tiny", "PROMPT.VISUAL_TOKENS", "2", *opts])
    return plan(MemoryConfig.from_config(config), backbone, tasks, budget)


def test_the_rule_takes_what_fits():
    backbone = load_backbone("random-tiny")
    whole = planned(backbone, 1e12)
    assert (whole.lean, whole.tasks, whole.images) == (False, 4, 0)
    two = planned(backbone, 0.4 * whole.estimate)
    assert two.lean and 1 <= two.tasks < 4 and two.images == 0 and two.estimate <= 0.4 * whole.estimate
    few = planned(backbone, 0.02 * whole.estimate)
    assert few.lean and few.tasks == 1 and 0 < few.images < 20 and few.estimate <= 0.02 * whole.estimate
    assert planned(backbone, 1.0).images == 1
    text = planned(backbone, 1.0, "PROMPT.VISUAL_TOKENS", "0")
    assert (text.lean, text.tasks) == (False, 4)  # features from the store: small in any case
    assert planned(backbone, 1.0, "MEMORY.TASKS", "3", "MEMORY.SECOND_ORDER", "whole").tasks == 3
    assert planned(backbone, 1e12, "MEMORY.CHECKPOINTING", "True").estimate < whole.estimate
    assert "one graph at a time" in str(two)
    plain = planned(backbone, 1e12, "OUTER.META", "False")
    assert not plain.lean and plain.estimate < whole.estimate


def test_the_estimate_of_class_prompts_follows_their_layout():
    """Conditional prompts have class prompts for each image; a rectangle repeats the prompt and pads the names."""
    backbone, conditional = load_backbone("random-tiny"), ("PROMPT.VISUAL_TOKENS", "0", "PROMPT.CONDITIONAL", "True")
    packed = planned(backbone, 1e12, *conditional).estimate
    backbone.packs_texts = False
    positions = [5 * 4 + 1 + 4, 5 * (1 + 4 + 8)]  # of five ways and a prompt of four tokens
    assert planned(backbone, 1e12, *conditional).estimate / packed == pytest.approx(positions[1] / positions[0])


def test_under_fp16_each_graph_has_its_own_scale():
    assert planned(load_backbone("random-tiny", precision="fp16"), 1e12).lean


def test_settings_that_mean_nothing_are_refused():
    backbone = load_backbone("random-tiny")
    for key, value in (("SECOND_ORDER", "half"), ("TASKS", "-1"), ("BUDGET", "-2.0")):
        with pytest.raises(GramError, match=f"MEMORY.{key}: expected"):
            planned(backbone, 1e9, f"MEMORY.{key}", value)
    with pytest.raises(GramError, match="MEMORY.IMAGES: expected 0 with MEMORY.SECOND_ORDER whole"):
        planned(backbone, 1e9, "MEMORY.IMAGES", "2", "MEMORY.SECOND_ORDER", "whole")
