"""Measure how far the meta-gradient under bf16 and fp16 towers is from float32, with and without a loss scale.

    python scripts/bench/meta_precision.py --backbone gram-small --prompts text visual
    python scripts/bench/meta_precision.py --backbone random-ViT-B/16 --prompts text
    python scripts/bench/meta_precision.py --backbone random-ViT-B/16 --prompts visual --image-layers 2

Prompts, regulator and gradients are float32 everywhere. Errors are relative L2 norms: of the whole meta-gradient of theta
and of phi, and of the second-order term of theta's alone (what goes through the support gradient).
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
import torch.nn.functional as F
from common import class_side, print_table, regulator_for, topic_words
from torch import Tensor

from gram_meta.backbone.clip import Backbone, load_backbone
from gram_meta.method.bilevel import (
    InnerLoop,
    descend,
    for_each_task,
    lean_backward,
    task_gradients,
    twice_differentiable,
)
from gram_meta.method.episodes import TaskSet
from gram_meta.method.prompts import initial_prompts

ALPHA = 0.01


class Setting:
    """Two tasks, theta and phi, the same for every precision."""

    def __init__(self, backbone: Backbone, prompts: str, shots: tuple[int, int], ways: int) -> None:
        words = topic_words(2 * ways)
        topics = torch.arange(2 * ways).view(2, ways)
        visual, text = 4 if prompts != "text" else 0, 4 if prompts != "visual" else 0
        theta = initial_prompts(backbone, text, visual, "a photo of a")
        self.theta = {kind: value.requires_grad_() for kind, value in theta.items()}
        generator = torch.Generator().manual_seed(1)
        self.regulator = regulator_for(theta)
        with torch.no_grad():
            for parameter in self.regulator.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        classes = class_side(backbone, words, topics, text)

        def side(count: int) -> TaskSet:
            if visual:
                size = backbone.image_size
                images = torch.randint(0, 256, (2, ways, count, 3, size, size), dtype=torch.uint8, generator=generator)
            else:
                images = F.normalize(torch.randn(2, ways, count, backbone.embed_dim, generator=generator), dim=-1)
            return TaskSet(backbone, classes, images)

        self.support, self.query = (side(count) for count in shots)
        self.parameters = [*self.theta.values(), *self.regulator.parameters()]

    def gradients(self, lean: bool, scale: float, terms: str) -> list[Tensor]:
        """Return the gradients of theta and of phi, each as one vector; `terms`: "both", or "second" without the direct term."""
        for parameter in self.parameters:
            parameter.grad = None
        inner = InnerLoop(ALPHA, scale=scale, regulate=self.regulator.regulate_known)
        if lean:
            lean_backward([self.support], [self.query], self.theta, 2, inner, 0.5)
            if terms == "second":  # the same passes without the product with H: what is left is the rest
                both = [value.grad for value in self.theta.values()]
                for parameter in self.parameters:
                    parameter.grad = None
                lean_backward([self.support], [self.query], self.theta, 2, replace(inner, first_order=True), 0.5)
                for value, whole in zip(self.theta.values(), both, strict=True):
                    value.grad = whole - value.grad
        else:
            start = for_each_task(self.theta, 2)
            with twice_differentiable():
                raw = task_gradients(self.support, start, create_graph=True, scale=scale)
            if terms == "second":
                start = {kind: value.detach() for kind, value in start.items()}
            losses = self.query(descend(start, raw, inner).after)
            (losses.sum() * 0.5 * scale).backward()
            for parameter in self.parameters:
                parameter.grad /= scale
        phi = torch.cat([parameter.grad.flatten() for parameter in self.regulator.parameters()])
        return [torch.cat([value.grad.flatten() for value in self.theta.values()]), phi]


def setting(args: argparse.Namespace, prompts: str, precision: str) -> Setting:
    backbone = load_backbone(args.backbone, precision=precision)
    if args.image_layers and prompts != "text":
        tower = backbone.model.visual.transformer
        tower.resblocks = tower.resblocks[-args.image_layers :]
    return Setting(backbone, prompts, (1, 2) if prompts != "text" else (4, 12), args.ways)


def error(found: Tensor, true: Tensor) -> str:
    if not bool(found.isfinite().all()):
        return "not finite"
    return f"{((found - true).norm() / true.norm()).item():.1e}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--backbone", default="gram-small")
    options.add_argument("--prompts", nargs="+", default=["text", "visual"], choices=("text", "visual", "joint"))
    options.add_argument("--image-layers", type=int, default=0, help="keep only the last so many; 0: all")
    options.add_argument("--ways", type=int, default=2)
    options.add_argument("--scales", type=int, nargs="+", default=[0, 4, 8, 12, 14, 16], help="exponents of two, fp16")
    args = options.parse_args()
    torch.set_num_threads(1)
    for prompts in args.prompts:
        one = setting(args, prompts, "fp32")
        true, second = (one.gradients(False, 1.0, terms) for terms in ("both", "second"))
        share = (second[0].norm() / true[0].norm()).item()
        print(
            f"{args.backbone}, {prompts} prompts: |gradient of theta| {true[0].norm().item():.2e}, of phi "
            f"{true[1].norm().item():.2e}; the second-order term is {100 * share:.2g} % of the first\n"
        )
        rows = []
        for precision in ("fp32", "bf16", "fp16"):
            here = setting(args, prompts, precision)
            for lean in (False, True):
                for exponent in args.scales if precision == "fp16" else (0,):
                    scale = 2.0**exponent
                    both, alone = (here.gradients(lean, scale, terms) for terms in ("both", "second"))
                    name = f"{precision}, {'lean' if lean else 'whole'}"
                    name += f", scale 2^{exponent}" if exponent else ""
                    errors = error(both[0], true[0]), error(alone[0], second[0]), error(both[1], true[1])
                    rows.append([name, *errors])
        print_table(["towers", "theta", "of it, second order", "phi"], rows)


if __name__ == "__main__":
    main()
