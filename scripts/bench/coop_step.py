"""Measure a CoOp training step beside the official trainer's computation: the text part alone, and the whole step.

The official way: all 77 positions of every class through clip's own modules, and clip's own image tower under gradient
mode (its weights are frozen, so no graph comes of it). Both sides end in the gradient of the context; the SGD update of
4 x 512 numbers is left out.

    python scripts/bench/coop_step.py                # ViT-B/16 shapes, random weights, 100 classes, batch 32, CPU
    python scripts/bench/coop_step.py --device cuda
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from gram_meta.backbone.clip import Backbone
from gram_meta.method.prompts import PromptedCLIP, initial_prompts, logits

TEXT, WHOLE, IMAGES = "text part", "whole step", "image tower alone"
PLAIN, OURS, CUT = "official way", "this project", "official way, cut at the longest class"


class Bench:
    """A batch, a context, and both ways from them to logits and the context's gradient."""

    def __init__(self, backbone: Backbone, names: list[str], batch: int) -> None:
        device, size = backbone.device, backbone.image_size
        self.backbone = backbone
        self.model = PromptedCLIP(backbone, names, initial_prompts(backbone, 4, 0, "a photo of a"))
        self.context = self.model.prompt_learner.ctx
        self.plain_text = common.PlainClassText(backbone, names, len(self.context))
        self.cut_text = common.PlainClassText(backbone, names, len(self.context), cut=True)
        self.images = torch.randn(batch, 3, size, size, device=device)
        self.labels = torch.arange(batch, device=device) % len(names)
        self.image_features = self.plain_images()  # what the text part alone is trained against

    def plain_images(self) -> Tensor:
        x = self.backbone.model.visual(self.images)
        return x / x.norm(dim=-1, keepdim=True)

    def variants(self) -> dict[str, Callable[[], Tensor]]:
        """Name -> forward pass to logits (B, N), or to image features."""
        fixed = self.image_features
        model = self.model
        return {
            f"{TEXT}, {PLAIN}": lambda: self._logits(fixed, self.plain_text.features(self.context)),
            f"{TEXT}, {CUT}": lambda: self._logits(fixed, self.cut_text.features(self.context)),
            f"{TEXT}, {OURS}": lambda: self._logits(fixed, model.class_features()),
            f"{WHOLE}, {PLAIN}": lambda: self._logits(self.plain_images(), self.plain_text.features(self.context)),
            f"{WHOLE}, {OURS}": lambda: model(self.images),
            f"{IMAGES}, {PLAIN}": self.plain_images,
            f"{IMAGES}, {OURS}": lambda: model.image_features(self.images),
        }

    def step(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Forward pass and, where there is a context in it, backward pass; returns logits and the context's gradient."""
        self.context.grad = None
        scores = self.variants()[name]()
        if scores.requires_grad:
            F.cross_entropy(scores, self.labels).backward()
        return scores.detach(), self.context.grad

    def _logits(self, images: Tensor, classes: Tensor) -> Tensor:
        return logits(images, classes, self.backbone.logit_scale)


def main() -> None:
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("--classes", type=int, default=100)
    options.add_argument("--batch", type=int, default=32)
    args = options.parse_args()
    backbone = common.begin(args)
    names = common.class_names(args.classes)
    bench = Bench(backbone, names, args.batch)
    steps = {name: partial(bench.step, name) for name in bench.variants()}
    print(common.environment(args))
    print(f"batch {args.batch}; {common.length_facts(backbone, names)}\n")
    measured = common.measure(steps, args)
    for part in (TEXT, WHOLE, IMAGES):
        common.print_comparison(measured, [name for name in steps if name.startswith(part)])
    print_equality(measured)
    print_ceilings(bench, {name: one.seconds for name, one in measured.items()}, args)


def print_equality(measured: dict[str, common.Measured]) -> None:
    """Logits and the context's gradient of the whole step, both ways."""
    apart = [
        common.deviation(ours, plain)
        for ours, plain in zip(measured[f"{WHOLE}, {OURS}"].result, measured[f"{WHOLE}, {PLAIN}"].result, strict=True)
    ]
    print(
        f"Largest deviation of the logits {apart[0]:.1e}, of the context's gradient {apart[1]:.1e}, "
        "relative to the largest entry.\n"
    )


def print_ceilings(bench: Bench, seconds: dict[str, float], args: argparse.Namespace) -> None:
    """What no way around the image tower can beat, and the matrix products of the text part."""
    whole, images = seconds[f"{WHOLE}, {PLAIN}"], seconds[f"{IMAGES}, {PLAIN}"]
    least = min(images, seconds[f"{IMAGES}, {OURS}"])
    print(
        f"Ceiling of the whole step: {1000 * whole:.0f} ms / {1000 * least:.0f} ms of image tower = "
        f"{whole / least:.2f}, with a text part that costs nothing ({whole / images:.2f} with clip's own image tower)."
    )
    text = bench.model.class_text
    tokens = 1 + text.tokens + int((text.ends + 1).sum())
    flops = 2 * common.text_flops(bench.backbone, tokens)
    rate = common.product_rate(args, tokens, bench.backbone.text_width)
    print(
        f"Floor of the text part: {tokens} positions up to each class's end token x "
        f"{common.text_flops(bench.backbone, 1) / 1e6:.1f} MFLOP x 2 (forward, backward) = {flops / 1e9:.0f} GFLOP; at the "
        f"measured {rate / 1e9:.0f} GFLOP/s {1000 * flops / rate:.0f} ms. "
        f"This project's text part takes {seconds[f'{TEXT}, {OURS}'] * rate / flops:.2f} times as long."
    )


if __name__ == "__main__":
    main()
