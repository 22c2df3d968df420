"""A CoOpGRAM meta-step beside the same step written plainly.

Plainly: 77 positions through clip's own transformer, one task after another, inner forward pass on attention that has a
second derivative. Image features stand in for images on both sides. What is measured: time, peak memory, and how far the
meta-gradients of theta and phi differ; then the same for first order, and what each trick brings.

    python scripts/bench/meta_step.py                # ViT-B/16 shapes, random weights, CPU
    python scripts/bench/meta_step.py --device cuda --names classes
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from gram_meta.backbone import Backbone
from gram_meta.bilevel import meta_losses, twice_differentiable
from gram_meta.config import get_meta_config
from gram_meta.episodes import TaskSet
from gram_meta.prompts import ClassText, initial_prompts, logits
from gram_meta.regulator import GradientRegulator

PLAIN, OURS = "plainly", "+ all tasks at once = this project"
CUT = "+ cut at the longest sentence, on clip's modules"
TOWER = "+ this project's text tower (no padding, last layer for end tokens alone)"
SHARED = "+ start token and prompt once for all classes"
PLAIN_FIRST, OURS_FIRST = "plainly, first order", "this project, first order"
TRICKS = (PLAIN, CUT, TOWER, SHARED, OURS)


class Bench:
    """Tasks with random features, theta and phi, and the step in every variant."""

    def __init__(self, backbone: Backbone, words: list[str], ways: int, tasks: int) -> None:
        config = get_meta_config()
        self.backbone, self.config = backbone, config
        device = backbone.device
        generator = torch.Generator().manual_seed(0)
        self.topics = torch.stack(
            [torch.randperm(len(words), generator=generator)[:ways] for _ in range(tasks)]
        )
        self.support, self.query = (
            F.normalize(torch.randn(tasks, ways, shots, backbone.embed_dim, generator=generator), dim=-1).to(
                device
            )
            for shots in (config.TASKS.SUPPORT_SHOTS, config.TASKS.QUERY_SHOTS)
        )
        prompts = initial_prompts(backbone, config.PROMPT.TEXT_TOKENS, 0, config.PROMPT.WORDS)
        self.theta = prompts["text"].requires_grad_()  # (M, d)
        self.regulator = GradientRegulator({"text": backbone.text_width}).to(device)
        self.text = ClassText(backbone, words, len(self.theta))
        names = [[words[topic] for topic in task] for task in self.topics.tolist()]
        self.plain_texts, self.cut_texts = (
            [common.PlainClassText(backbone, each, len(self.theta), cut) for each in names]
            for cut in (False, True)
        )

    def parameters(self) -> list[Tensor]:
        return [self.theta, *self.regulator.parameters()]

    def step(self, name: str) -> tuple[Tensor, list[Tensor]]:
        """One step of a variant: mean query loss, and the meta-gradients of theta and of phi's parameters."""
        for parameter in self.parameters():
            parameter.grad = None
        loss = self.variants()[name]()
        return loss, [parameter.grad for parameter in self.parameters()]

    def variants(self) -> dict[str, Callable[[], Tensor]]:
        return {
            PLAIN: lambda: self.plain(self.plain_texts),
            CUT: lambda: self.plain(self.cut_texts),
            TOWER: lambda: self.one_after_another(
                lambda task: WholeSentences(self.backbone, self.cut_texts[task])
            ),
            SHARED: lambda: self.one_after_another(
                lambda task: self.text.select(self.topics[task : task + 1])
            ),
            OURS: lambda: self.ours(),
            PLAIN_FIRST: lambda: self.plain(self.plain_texts, first_order=True),
            OURS_FIRST: lambda: self.ours(first_order=True),
        }

    def ours(self, first_order: bool = False) -> Tensor:
        text = self.text.select(self.topics)
        losses = self._losses(text, slice(None), first_order)
        losses.mean().backward()
        return losses.detach().mean()

    def one_after_another(self, text_of: Callable[[int], object]) -> Tensor:
        """This project's functions, for a batch of one task at a time."""
        total = torch.zeros(())
        for task in range(len(self.topics)):
            loss = self._losses(text_of(task), slice(task, task + 1)).mean() / len(self.topics)
            loss.backward()
            total += loss.detach().cpu()
        return total

    def _losses(self, text: object, tasks: slice, first_order: bool = False) -> Tensor:
        support, query = (TaskSet(self.backbone, text, side[tasks]) for side in (self.support, self.query))
        alpha, steps = self.config.INNER.ALPHA, self.config.INNER.STEPS
        count = len(self.support[tasks])
        theta = {"text": self.theta}
        return meta_losses(support, query, theta, count, alpha, steps, self.regulator, first_order)

    def plain(self, texts: list[common.PlainClassText], first_order: bool = False) -> Tensor:
        """Algorithm 1, lines 4 to 9, as one would write them down."""
        total = torch.zeros(())
        for text, support, query in zip(texts, self.support, self.query, strict=True):
            with nullcontext() if first_order else twice_differentiable():
                loss = self._plain_loss(text, self.theta, support)
                (gradient,) = torch.autograd.grad(loss, self.theta, create_graph=not first_order)
            adapted = self.theta - self.config.INNER.ALPHA * self.regulator({"text": gradient})["text"]
            loss = self._plain_loss(text, adapted, query) / len(texts)
            loss.backward()
            total += loss.detach().cpu()
        return total

    def _plain_loss(self, text: common.PlainClassText, prompt: Tensor, images: Tensor) -> Tensor:
        ways, shots = images.shape[:2]
        labels = torch.arange(ways, device=images.device).repeat_interleave(shots)
        return F.cross_entropy(
            logits(images.flatten(0, 1), text.features(prompt), self.backbone.logit_scale), labels
        )


class WholeSentences:
    """Start token and prompt in each of a task's sentences, through this project's text tower."""

    def __init__(self, backbone: Backbone, text: common.PlainClassText) -> None:
        self.backbone, self.text = backbone, text

    def features(self, prompts: Tensor) -> Tensor:
        """(1, K, D) for one task's prompt (1, M, d)."""
        return self.backbone.encode_text(self.text.sentences(prompts[0])[None], self.text.ends)


def main() -> None:
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("--ways", type=int, default=5)
    options.add_argument("--tasks", type=int, default=4)
    options.add_argument(
        "--names", choices=("topics", "classes"), default="topics",
        help="topics: single words, as clustering labels topics; classes: longer names, as ImageNet's",
    )  # fmt: skip
    args = options.parse_args()
    backbone = common.begin(args)
    words = common.topic_words(100) if args.names == "topics" else common.class_names(100)
    bench = Bench(backbone, words, args.ways, args.tasks)
    steps = {name: partial(bench.step, name) for name in bench.variants()}
    print(common.environment(args))
    print(
        f"{args.ways}-way, {args.tasks} tasks, {bench.support.shape[2]} support and {bench.query.shape[2]} query shots; "
        f"{common.length_facts(backbone, words)}; longest drawn: {int(bench.text.ends[bench.topics].max()) - 1}\n"
    )
    measured = common.measure(steps, args)
    common.print_comparison(measured, TRICKS)
    common.print_comparison(measured, (PLAIN_FIRST, OURS_FIRST))
    for name, exact, first in (("plainly", PLAIN, PLAIN_FIRST), ("this project", OURS, OURS_FIRST)):
        ratio = measured[exact].seconds / measured[first].seconds
        print(f"second order / first order, {name}: {ratio:.2f}")
    print_gradients(measured)
    print_floor(bench, measured[OURS].seconds, args)


def print_gradients(measured: dict[str, common.Measured]) -> None:
    """How far the meta-gradients of each variant are from the plain ones, and first order from exact."""
    loss, gradients = measured[PLAIN].result
    rows = []
    for name in (*TRICKS[1:], PLAIN_FIRST, OURS_FIRST):
        other_loss, others = measured[name].result
        apart = [common.deviation(a, b) for a, b in zip(others, gradients, strict=True)]
        rows.append([name, f"{abs(other_loss / loss - 1):.1e}", f"{apart[0]:.1e}", f"{max(apart[1:]):.1e}"])
    print("\nLargest deviation from the plain step, relative to the largest entry:\n")
    common.print_table(["", "query loss", "gradient of theta", "gradient of phi"], rows)


def print_floor(bench: Bench, seconds: float, args: argparse.Namespace) -> None:
    """The matrix products that second order cannot do without, at the rate this machine multiplies."""
    lengths = bench.text.ends[bench.topics] + 1  # (B, K)
    tokens = int(lengths.sum()) + lengths.shape[0] * (1 + bench.text.tokens)
    flops = 6 * common.text_flops(bench.backbone, tokens)
    rate = common.product_rate(args, tokens, bench.backbone.text_width)
    print(
        f"Floor: {tokens} text positions x {common.text_flops(bench.backbone, 1) / 1e6:.1f} MFLOP x 6 (support and query "
        f"forward and backward, and backward through the support gradient's own two passes) = {flops / 1e9:.1f} GFLOP; "
        f"at the measured {rate / 1e9:.0f} GFLOP/s {1000 * flops / rate:.0f} ms. "
        f"This project's step takes {seconds * rate / flops:.2f} times as long."
    )


if __name__ == "__main__":
    main()
