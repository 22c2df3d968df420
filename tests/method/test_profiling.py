"""Where a step's time goes: forward, backward and second backward are booked where they belong, and change no
number."""

import time

import pytest
import torch

from gram_meta.backbone.clip import load_backbone
from gram_meta.method import profiling
from gram_meta.method.bilevel import InnerLoop, meta_losses
from gram_meta.method.episodes import TaskSet
from gram_meta.method.profiling import EVALUATION, IMAGE_TOWER, OPTIMISER, OTHER, REGULATOR, TEXT_TOWER, Profile
from gram_meta.method.prompts import ClassText
from gram_meta.method.regulator import GradientRegulator


class Slow(torch.autograd.Function):
    """x^2, taking a known time in each direction."""

    @staticmethod
    def forward(ctx, x, clock, seconds):
        ctx.save_for_backward(x)
        ctx.clock, ctx.seconds = clock, seconds
        clock.now += seconds
        return x * x

    @staticmethod
    def backward(ctx, grad):
        ctx.clock.now += ctx.seconds
        (x,) = ctx.saved_tensors
        return grad * 2 * Wait.apply(x, ctx.clock, ctx.seconds), None, None


class Wait(torch.autograd.Function):
    """The identity, whose backward pass (within a second backward pass) takes a known time."""

    @staticmethod
    def forward(ctx, x, clock, seconds):
        ctx.clock, ctx.seconds = clock, seconds
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.clock.now += ctx.seconds
        return grad, None, None


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Towers:
    """Two towers: one second and ten seconds in each direction."""

    def __init__(self, clock):
        self.clock = clock

    def encode_text(self, own, ends, shared=None):
        return Slow.apply(shared, self.clock, 1.0)

    def encode_images(self, images, prompt=None):
        return Slow.apply(prompt, self.clock, 10.0)


def test_each_direction_is_booked_where_it_belongs():
    clock = Clock()
    towers, profile = Towers(clock), Profile(clock=clock)
    theta = torch.full((3,), 0.5, requires_grad=True)

    def loss(prompt):
        seen = towers.encode_images(None, prompt * 1.0) + towers.encode_text(None, None, shared=prompt)
        return Slow.apply(seen, clock, 100.0).sum()

    with profile.watching(towers), profile.step():
        (gradient,) = torch.autograd.grad(loss(theta), theta, create_graph=True)
        loss(theta - 0.1 * gradient).backward()
        with profile.region(OPTIMISER):
            clock.now += 1000.0
            towers.encode_text(None, None, shared=theta)  # what is in a region belongs to it, whoever does it
    # Inner pass forward and backward, query forward and backward, then back through the inner backward and forward:
    # six times each (the second backward runs Slow's backward once more, and Wait's), but the loss, whose value the
    # inner gradient does not depend on, five times.
    assert profile.seconds[TEXT_TOWER] == pytest.approx(6.0)
    assert profile.seconds[IMAGE_TOWER] == pytest.approx(60.0)
    assert profile.seconds[OTHER] == pytest.approx(500.0)
    assert profile.seconds[OPTIMISER] == pytest.approx(1001.0)
    assert sum(profile.seconds.values()) == pytest.approx(clock.now)
    assert profile.share_outside_towers() == pytest.approx(1501 / 1567)
    assert "encode_text" not in vars(towers)


@pytest.mark.slow
def test_numbers_stay_the_same_and_held_out_tasks_stay_out_of_the_step():
    backbone = load_backbone("random-tiny")
    text = ClassText(backbone, ["cat", "dog", "tree", "house"], 2).select(torch.tensor([[0, 1], [2, 3]]))
    random = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 255, (2, 2, n, 3, 32, 32), dtype=torch.uint8, generator=random) for n in (1, 2)]
    sides = [TaskSet(backbone, text, side) for side in images]
    theta = {kind: (0.02 * torch.randn(2, 64, generator=random)).requires_grad_() for kind in ("text", "visual")}
    regulator = GradientRegulator({"text": 64, "visual": 64})

    def gradients():
        losses = meta_losses(*sides, theta, 2, InnerLoop(0.01, regulate=regulator.regulate_known)).losses
        return torch.autograd.grad(losses.sum(), [*theta.values(), *regulator.parameters()])

    expected = gradients()
    profile = Profile(clock=time.process_time)
    with profile.watching(backbone, regulator):
        with profile.step():
            found = gradients()
        with profile.region(EVALUATION):
            gradients()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert set(profile.seconds) == {IMAGE_TOWER, TEXT_TOWER, REGULATOR, OTHER, EVALUATION}
    assert sum(share for _, _, share in profile.rows()) == pytest.approx(1.0)
    assert EVALUATION not in [name for name, _, _ in profile.rows()] and EVALUATION in profile.table()
    assert backbone.encode_text.__func__ is type(backbone).encode_text
    assert set(profiling.TOWERS) <= set(profile.as_dict()["seconds"])
