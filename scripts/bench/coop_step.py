"""Measure a CoOp training step, or a test pass, beside the official computation.

    python scripts/bench/coop_step.py                # ViT-B/16 shapes, random weights, 100 classes, batch 32, CPU
    python scripts/bench/coop_step.py --test --classes 1000 --batch 100

The official way: all 77 positions of every class through clip's own modules, and clip's own image tower. A test pass is
one batch: the official way encodes all classes anew for it, this project once for all batches. In fp16 the official way
has a copy of the towers, in the number types that clip itself converts them to.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from functools import partial

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from gram_meta.backbone.clip import Backbone, clip_module
from gram_meta.method.prompts import PromptedCLIP, initial_prompts, logits

TEXT, WHOLE, IMAGES = "text part", "whole step", "image tower alone"
TEST_IMAGES = 50_000  # ImageNet's
COMPARED = ("logits", "the context's gradient")
PLAIN, OURS, CUT = "official way", "this project", "official way, cut at the longest class"
RECORDED = f"{OURS}, as CUDA graphs"


class Bench:
    """A batch, a context, and both ways from them to logits and the context's gradient."""

    def __init__(self, backbone: Backbone, names: list[str], batch: int, test: bool) -> None:
        size = backbone.image_size
        self.backbone, self.names, self.test = backbone, names, test
        self.official = backbone.model
        if backbone.dtype == torch.float16:
            self.official = copy.deepcopy(backbone.model)
            clip_module().model.convert_weights(self.official)
        self.prompts = initial_prompts(backbone, 4, 0, "a photo of a")
        self.model = PromptedCLIP(backbone, names, self.prompts)
        self.context = self.model.prompt_learner.ctx
        self.recorded = (
            PromptedCLIP(backbone, names, self.prompts) if backbone.device.type == "cuda" and not test else None
        )
        self.plain, self.cut = (common.PlainClassText(backbone, names, 4, cut) for cut in (False, True))
        self.images = torch.randn(batch, 3, size, size, device=backbone.device)
        self.labels = torch.arange(batch, device=backbone.device) % len(names)
        if self.recorded is not None:
            self.recorded.prompt_learner = self.model.prompt_learner
            self.recorded.record(self.images)

    def plain_images(self) -> Tensor:
        return F.normalize(self.official.visual(self.images.to(self.backbone.dtype)), dim=-1).to(self.images.dtype)

    def plain_classes(self, text: common.PlainClassText) -> Tensor:
        return text.features(self.context.to(self.backbone.dtype), self.official).to(self.images.dtype)

    def our_classes(self) -> Tensor:
        """Return class features; a test pass begins with tokenising the classes."""
        model = PromptedCLIP(self.backbone, self.names, self.prompts) if self.test else self.model
        return model.class_features()

    def variants(self) -> dict[str, Callable[[], Tensor]]:
        """Return name -> forward pass to logits (B, N), or to image features."""
        scale, fixed = self.backbone.logit_scale, self.plain_images().detach()  # the text part alone has images at hand
        plain, cut = partial(self.plain_classes, self.plain), partial(self.plain_classes, self.cut)
        graphs = {f"{WHOLE}, {RECORDED}": lambda: self.recorded(self.images)} if self.recorded is not None else {}
        return {
            f"{TEXT}, {PLAIN}": lambda: logits(fixed, plain(), scale),
            f"{TEXT}, {CUT}": lambda: logits(fixed, cut(), scale),
            f"{TEXT}, {OURS}": lambda: logits(fixed, self.our_classes(), scale),
            f"{WHOLE}, {PLAIN}": lambda: logits(self.plain_images(), plain(), scale),
            f"{WHOLE}, {OURS}": lambda: logits(self.model.image_features(self.images), self.our_classes(), scale),
            f"{IMAGES}, {PLAIN}": self.plain_images,
            f"{IMAGES}, {OURS}": lambda: self.model.image_features(self.images),
            **graphs,
        }

    def step(self, forward: Callable[[], Tensor]) -> list[Tensor]:
        """Run forward and, in a training step with a context, backward; return logits and the context's gradient."""
        self.context.grad = None
        with torch.set_grad_enabled(not self.test):
            scores = forward()
        if not scores.requires_grad:
            return [scores]
        F.cross_entropy(scores, self.labels).backward()
        return [scores.detach(), self.context.grad]


def main() -> None:
    options = common.parser(__doc__, ("fp32", "fp16", "fp64"))
    options.add_argument("--classes", type=int, default=100)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--test", action="store_true", help="a test pass in place of a training step")
    args = options.parse_args()
    backbone = common.begin(args)
    names = common.class_names(args.classes)
    bench = Bench(backbone, names, args.batch, args.test)
    print(common.environment(args))
    tokens = (backbone.tokenize(names).argmax(dim=-1) - 1).double()
    lengths = f"{tokens.min():g} to {tokens.max():g} tokens, {tokens.mean():.2f} on average"
    print(f"batch {args.batch}; {len(names)} names of {lengths}\n")
    report = common.report(args)
    measured = common.measure({name: partial(bench.step, run) for name, run in bench.variants().items()}, args)
    for part in (TEXT, WHOLE, IMAGES):
        common.print_comparison(measured, [name for name in measured if name.startswith(part)])
    ours, plain = (measured[f"{WHOLE}, {way}"].result for way in (OURS, PLAIN))
    apart = {what: common.deviation(*pair) for what, *pair in zip(COMPARED, ours, plain, strict=False)}
    largest = ", ".join(f"{what} {x:.1e}" for what, x in apart.items())
    print(f"Largest deviation, relative to the largest entry: {largest}")
    print_limits(bench, {name: one.seconds for name, one in measured.items()}, args)
    common.write_report(args, report | {"measured": common.numbers(measured), "deviation": apart})


def print_limits(bench: Bench, seconds: Mapping[str, float], args: argparse.Namespace) -> None:
    """Print what no way around the image tower can beat, and the matrix products of the text part."""
    whole, images = seconds[f"{WHOLE}, {PLAIN}"], seconds[f"{IMAGES}, {PLAIN}"]
    least, classes = min(images, seconds[f"{IMAGES}, {OURS}"]), seconds[f"{TEXT}, {OURS}"]
    print(
        f"Ceiling: {1000 * whole:.0f} ms / {1000 * least:.0f} ms of image tower = {whole / least:.2f}, "
        f"with a text part that costs nothing ({whole / images:.2f} with clip's own image tower)."
    )
    text, passes = bench.model.class_text, 1 if args.test else 2
    positions = 1 + text.tokens + int((text.ends + 1).sum())
    each, rate = common.text_flops(bench.backbone, 1), common.product_rate(args, positions, bench.backbone.text_width)
    flops = passes * positions * each
    print(
        f"Floor of the text part: {positions} positions up to each class's end token x {each / 1e6:.1f} MFLOP x "
        f"{passes} = {flops / 1e9:.0f} GFLOP; at the measured {rate / 1e9:.0f} GFLOP/s {1000 * flops / rate:.0f} ms. "
        f"This project takes {classes * rate / flops:.2f} times as long."
    )
    if args.test:
        batches, each = TEST_IMAGES // args.batch, seconds[f"{WHOLE}, {OURS}"] - classes
        ours = classes + batches * each
        print(
            f"{batches} batches: {PLAIN} {batches} x {whole:.2f} s = {batches * whole:.0f} s; {OURS} {classes:.2f} s + "
            f"{batches} x {each:.2f} s = {ours:.0f} s; speed-up {batches * whole / ours:.2f}."
        )


if __name__ == "__main__":
    main()
