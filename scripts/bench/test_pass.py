"""Measure a test pass over many classes beside CoOp's way, which encodes all classes anew for every batch.

Both sides run without gradients. Some batches are timed in full; a whole test set is put together from them by the
arithmetic that is printed.

    python scripts/bench/test_pass.py                # ViT-B/16 shapes, random weights, 1,000 classes, batch 100, CPU
    python scripts/bench/test_pass.py --device cuda --batches 20
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import common
import torch
from torch import Tensor

from gram_meta.backbone.clip import Backbone
from gram_meta.method.prompts import PromptedCLIP, initial_prompts, logits

PLAIN, OURS = "CoOp's way", "this project"
CLASSES, TOWER, PLAIN_TOWER = "class features, once", "image tower alone", "clip's image tower alone"


class Bench:
    """Test batches, a context, and both ways from them to logits."""

    def __init__(self, backbone: Backbone, names: list[str], batch: int, batches: int) -> None:
        size = backbone.image_size
        self.backbone, self.names = backbone, names
        self.prompts = initial_prompts(backbone, 4, 0, "a photo of a")
        self.plain_text = common.PlainClassText(backbone, names, len(self.prompts["text"]))
        self.batches = [torch.randn(batch, 3, size, size, device=backbone.device) for _ in range(batches)]

    def variants(self) -> dict[str, Callable[[], list[Tensor]]]:
        return {
            PLAIN: lambda: [self.plain_logits(images) for images in self.batches],
            OURS: self.ours,
            CLASSES: lambda: [PromptedCLIP(self.backbone, self.names, self.prompts).class_features()],
            TOWER: lambda: [self.backbone.encode_images(images) for images in self.batches],
            PLAIN_TOWER: lambda: [self.backbone.model.visual(images) for images in self.batches],
        }

    @torch.no_grad()
    def step(self, name: str) -> list[Tensor]:
        return self.variants()[name]()

    def plain_logits(self, images: Tensor) -> Tensor:
        x = self.backbone.model.visual(images)
        x = x / x.norm(dim=-1, keepdim=True)
        return logits(x, self.plain_text.features(self.prompts["text"]), self.backbone.logit_scale)

    def ours(self) -> list[Tensor]:
        """With a model of its own, so that tokenising and encoding the classes is part of every pass."""
        model = PromptedCLIP(self.backbone, self.names, self.prompts)
        return [model(images) for images in self.batches]


def main() -> None:
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("--classes", type=int, default=1000)
    options.add_argument("--batch", type=int, default=100)
    options.add_argument("--batches", type=int, default=3, help="timed; %(default)s")
    options.add_argument("--images", type=int, default=50_000, help="of the whole test set (ImageNet's)")
    args = options.parse_args()
    backbone = common.begin(args)
    names = common.class_names(args.classes)
    bench = Bench(backbone, names, args.batch, args.batches)
    steps = {name: partial(bench.step, name) for name in bench.variants()}
    print(common.environment(args))
    print(f"{args.batches} batches of {args.batch}; {common.length_facts(backbone, names)}\n")
    measured = common.measure(steps, args)
    common.print_comparison(measured, list(steps))
    plain, ours = (torch.cat(measured[way].result) for way in (PLAIN, OURS))
    print(f"Largest deviation of the logits, relative to the largest: {common.deviation(ours, plain):.1e}\n")
    seconds = {name: one.seconds for name, one in measured.items()}
    print_whole_set(seconds, args.batches, args.images // args.batch)


def print_whole_set(seconds: dict[str, float], timed: int, batches: int) -> None:
    """A pass over the whole test set: per-batch times as measured, class features once or for every batch."""
    plain, tower, classes = seconds[PLAIN] / timed, seconds[TOWER] / timed, seconds[CLASSES]
    ours = (seconds[OURS] - classes) / timed
    print(
        f"{batches} batches: {PLAIN} {batches} x {plain:.2f} s = {batches * plain:.0f} s; {OURS} {classes:.2f} s + "
        f"{batches} x {ours:.2f} s = {classes + batches * ours:.0f} s; "
        f"speed-up {batches * plain / (classes + batches * ours):.2f}.\n"
        f"Ceiling, this image tower alone: {plain:.2f} / {tower:.2f} = {plain / tower:.2f}; "
        f"clip's own image tower alone: {timed * plain / seconds[PLAIN_TOWER]:.2f}."
    )


if __name__ == "__main__":
    main()
