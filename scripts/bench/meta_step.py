"""Measure a meta-training step for each family of prompts, beside learn2learn's way and beside ProMetaR's own step.

    python scripts/bench/meta_step.py                       # ViT-B/16 shapes, random weights, CPU, all three families
    python scripts/bench/meta_step.py --family visual joint --tasks 1 --ways 2 --support 2 --query 4 --threads 1 --clock cpu
    python scripts/bench/meta_step.py --prometar ProMetaR --learn2learn learn2learn -o numbers.json
    python scripts/bench/meta_step.py --device cuda --names classes

Clone and adapt, the way of learn2learn's MAML, is in meta_clone.py, in our own words. All variants have the same weights,
tasks and start, so the same losses and meta-gradients: how far these are apart is printed. A step is forward, backward,
clipping and the optimiser (its learning rates are zero, so that every step starts at the same point). Text prompts take
image features as images on both sides, as they do not change; visual prompts have fixed class features. ProMetaR's step
is another method's: it stands here for its cost at the same number of images and classes.

Then what the towers set as a ceiling: their matrix products at the rate that this machine multiplies, their bare forward
pass times the passes that exact second order needs, and their bare passes. And where the time of a step goes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import torch
import torch.nn.functional as F
from meta_ceiling import image_passes, text_passes
from meta_clone import PlainTask, PromptedModel, clone_and_adapt, in_double
from torch import Tensor, nn

from gram_meta.backbone.clip import Backbone
from gram_meta.config import get_meta_config
from gram_meta.method.bilevel import (
    InnerLoop,
    for_each_task,
    lean_backward,
    meta_losses,
    task_gradients,
    twice_differentiable,
)
from gram_meta.method.episodes import TaskSet
from gram_meta.method.profiling import OPTIMISER, Profile
from gram_meta.method.prompts import ClassText, initial_prompts, template_features

CLONE, OURS = "clone and adapt (learn2learn's way)", "this project"
LEAN, CHECKPOINTED = "this project, lean", "this project, checkpointing"
SINGLE, LEAST = "this project, one task at a time", "this project, lean, checkpointing, one task at a time"
CUT = "clone and adapt, cut at the longest sentence"
TOWER = "+ this project's text tower (no padding, last layer for end tokens alone), nothing cloned"
SHARED = "+ start token and prompt once for all classes"
CLONE_FIRST, OURS_FIRST = "clone and adapt, first order", "this project, first order"
PROMETAR = "ProMetaR, its checkout (another method)"
FORWARD_SUPPORT, FORWARD_QUERY = "towers forward, support", "towers forward, query"
PASSES = "the towers' passes with nothing around them"
BARE = (FORWARD_SUPPORT, FORWARD_QUERY, PASSES)
TRICKS = (CLONE, CUT, TOWER, SHARED, OURS)


@dataclass(frozen=True)
class Family:
    """How many prompt tokens of each kind, and the text prompt's start."""

    text: int
    visual: int
    words: str = ""


FAMILIES = {"text": Family(4, 0, "a photo of a"), "visual": Family(0, 4), "joint": Family(2, 2, "a photo")}


class Bench:
    """Made-up tasks, theta and phi of one family, and its step in every variant."""

    def __init__(self, backbone: Backbone, family: Family, words: list[str], args: argparse.Namespace) -> None:
        self.backbone, self.config, self.family = backbone, get_meta_config(), family
        self.batch, self.ways = args.tasks, args.ways
        generator = torch.Generator().manual_seed(0)
        self.topics = torch.stack(
            [torch.randperm(len(words), generator=generator)[: self.ways] for _ in range(self.batch)]
        )  # (B, K)
        self.support, self.query = (self._images(shots, generator) for shots in (args.support, args.query))
        prompts = initial_prompts(backbone, family.text, family.visual, family.words)
        high = torch.float64 if backbone.precision == "fp64" else torch.float32
        self.theta = nn.ParameterDict({kind: nn.Parameter(value.to(high)) for kind, value in prompts.items()})
        self.regulator = common.regulator_for(prompts).to(backbone.device, high)
        self.optimiser = torch.optim.Adam(self.parameters(), lr=0.0)
        self.text = ClassText(backbone, words, family.text) if family.text else None
        self.fixed = None if family.text else template_features(backbone, words)  # (L, D)
        self.model = PromptedModel(backbone, dict(self.theta))
        self.tasks, self.cut_tasks = (self._plain_tasks(words, cut) for cut in (False, True))
        self.kept: list[Tensor] = []

    # --- tasks --------------------------------------------------------------------------------------------------------

    def _images(self, shots: int, generator: torch.Generator) -> Tensor:
        """Features (B, K, n, D), or bytes (B, K, n, 3, H, W) where the image tower has to run."""
        lead, side = (self.batch, self.ways, shots), self.backbone.image_size
        if self.family.visual:
            pixels = torch.randint(256, (*lead, 3, side, side), generator=generator, dtype=torch.uint8)
            return pixels.to(self.backbone.device)
        features = torch.randn(*lead, self.backbone.embed_dim, generator=generator)
        return F.normalize(features, dim=-1).to(self.backbone.device, self.backbone.logit_scale.dtype)

    def _plain_tasks(self, words: list[str], cut: bool) -> list[PlainTask]:
        tasks = []
        for index, topics in enumerate(self.topics.tolist()):
            if self.fixed is None:
                names = [words[topic] for topic in topics]
                classes: Any = common.PlainClassText(self.backbone, names, self.family.text, cut)
            else:
                classes = self.fixed[topics]
            sides = (side[index].flatten(0, 1) for side in (self.support, self.query))
            tasks.append(PlainTask(*sides, classes))
        return tasks

    def sets(self, tasks: slice = slice(None), classes: Any = None) -> tuple[TaskSet, TaskSet]:
        """Support and query of some of the tasks, as meta-training makes them."""
        if classes is None:
            topics = self.topics[tasks].to(self.backbone.device)
            classes = self.fixed[topics] if self.text is None else self.text.select(topics)
        support, query = (TaskSet(self.backbone, classes, side[tasks]) for side in (self.support, self.query))
        return support, query

    def parameters(self) -> list[Tensor]:
        return [*self.theta.values(), *self.regulator.parameters()]

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self, name: str, keep: bool = False) -> tuple[Tensor, list[Tensor]]:
        """One step of a variant: mean query loss; with `keep`, the meta-gradients of theta and of phi's parameters too."""
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.variants()[name]()
        kept = [parameter.grad.clone() for parameter in self.parameters()] if keep else []
        self.update()
        return loss, kept

    def update(self) -> None:
        for group in (list(self.theta.values()), list(self.regulator.parameters())):
            torch.nn.utils.clip_grad_norm_(group, self.config.OUTER.CLIP_NORM)
        self.optimiser.step()

    def variants(self) -> dict[str, Callable[[], Tensor]]:
        alpha = self.config.INNER.ALPHA
        theirs = partial(clone_and_adapt, self.model, self.tasks, alpha, self.regulator)
        variants: dict[str, Callable[[], Tensor]] = {CLONE: theirs}
        if self.text is not None and not self.family.visual:
            variants[CUT] = partial(clone_and_adapt, self.model, self.cut_tasks, alpha, self.regulator)
            variants[TOWER] = partial(self.one_after_another, self.ours, self._whole_sentences)
            variants[SHARED] = partial(self.one_after_another, self.ours)
        variants[OURS] = self.ours
        if self.batch > 1 and SHARED not in variants:
            variants[SINGLE] = partial(self.one_after_another, self.ours)
        variants[LEAN] = self.lean
        variants[CHECKPOINTED] = partial(self.checkpointed, self.ours)
        least = partial(self.one_after_another, self.lean) if self.batch > 1 else self.lean
        name = LEAST if self.batch > 1 else LEAST.removesuffix(", one task at a time")
        variants[name] = partial(self.checkpointed, least)
        variants[CLONE_FIRST] = partial(theirs, first_order=True)
        variants[OURS_FIRST] = partial(self.ours, first_order=True)
        return variants

    def ours(
        self, tasks: slice = slice(None), classes: Any = None, first_order: bool = False, regulate: Any = None
    ) -> Tensor:
        """The summands of some of the tasks: their mean over the whole batch."""
        support, query = self.sets(tasks, classes)
        c = self.config.INNER
        inner = InnerLoop(c.ALPHA, c.STEPS, first_order, regulate=regulate or self.regulator)
        losses = meta_losses(support, query, dict(self.theta), len(self.topics[tasks]), inner).losses
        loss = losses.sum() / self.batch
        loss.backward()
        return loss.detach()

    def lean(self, tasks: slice = slice(None), classes: Any = None) -> Tensor:
        """The same by one Hessian-vector product."""
        support, query = self.sets(tasks, classes)
        inner = InnerLoop(self.config.INNER.ALPHA, self.config.INNER.STEPS, regulate=self.regulator)
        result = lean_backward(
            support.parts(), query.parts(), dict(self.theta), len(self.topics[tasks]), inner, 1 / self.batch
        )
        return result.losses.sum() / self.batch

    def one_after_another(self, step: Callable[..., Tensor], classes_of: Callable[[int], Any] | None = None) -> Tensor:
        total = torch.zeros_like(self.backbone.logit_scale)
        for task in range(self.batch):
            total += step(slice(task, task + 1), classes_of(task) if classes_of else None)
        return total

    def checkpointed(self, step: Callable[[], Tensor]) -> Tensor:
        self.backbone.checkpointing = True
        try:
            return step()
        finally:
            self.backbone.checkpointing = False

    def _whole_sentences(self, task: int) -> WholeSentences:
        return WholeSentences(self.backbone, self.cut_tasks[task].classes)

    # --- the towers alone ---------------------------------------------------------------------------------------------

    def bare(self) -> dict[str, Callable[[], object]]:
        return {
            FORWARD_SUPPORT: partial(self._forward, 0),
            FORWARD_QUERY: partial(self._forward, 1),
            PASSES: self._passes,
        }

    def _features(self, side: TaskSet, prompts: Mapping[str, Tensor]) -> list[Tensor]:
        """What the towers make of one side: images where they are pixels, class sentences where they have a prompt."""
        features = []
        if "visual" in prompts:
            pixels = self.backbone.normalise(side.images.flatten(0, 1))
            prompt = prompts["visual"].repeat_interleave(side.images.shape[1], dim=0)
            features = [self.backbone.encode_images(pixels, prompt)]
        return features + ([side.classes.features(prompts["text"])] if "text" in prompts else [])

    @torch.no_grad()
    def _forward(self, side: int) -> None:
        self._features(self.sets()[side], for_each_task(dict(self.theta), self.batch))

    def _passes(self) -> None:
        """Forward, backward and both again for the second derivative, over support and query: no loss, no R, no update."""
        support, query = self.sets()
        prompts = for_each_task(dict(self.theta), self.batch)

        def along(side: TaskSet, prompts: Mapping[str, Tensor]) -> Tensor:
            return torch.stack([features.cos().sum() for features in self._features(side, prompts)])

        with twice_differentiable():
            gradients = task_gradients(partial(along, support), prompts, create_graph=True)
        moved = {kind: value - 0.01 * gradients[kind] for kind, value in prompts.items()}
        torch.autograd.grad(along(query, moved).sum(), list(self.theta.values()))

    # --- FLOP ---------------------------------------------------------------------------------------------------------

    def flops(self) -> dict[str, float]:
        """GFLOP of the matrix products that an exact step needs, by tower."""
        result = {}
        if self.family.visual:
            each = image_passes(self.backbone, self.family.visual)
            images = [side.shape[:3].numel() for side in (self.support, self.query)]
            result["image tower"] = images[0] * each.support + images[1] * each.query
        if self.text is not None:
            passes = text_passes(common.text_flops(self.backbone, self.positions()))
            result["text tower"] = passes.support + passes.query
        return {name: flops / 1e9 for name, flops in result.items()}

    def positions(self) -> int:
        """Positions that the text tower has to compute for one side: the sentences' own, and the shared ones of each task."""
        assert self.text is not None
        own = self.text.ends[self.topics.to(self.text.ends.device)] + 1  # (B, K)
        return int(own.sum()) + self.batch * (1 + self.text.tokens)

    def rate(self, args: argparse.Namespace) -> float:
        """GFLOP/s of the product that is largest in the step: as many rows as the query set has positions."""
        if self.family.visual:
            length = self.backbone.model.visual.positional_embedding.shape[0] + self.family.visual
            rows, width = self.query.shape[:3].numel() * length, self.backbone.visual_width
        else:
            rows, width = self.positions(), self.backbone.text_width
        return common.product_rate(args, rows, width) / 1e9

    # --- where a step's time goes -------------------------------------------------------------------------------------

    def profile(self, args: argparse.Namespace) -> Profile:
        clock = time.process_time if args.clock == "cpu" else time.perf_counter
        profile = Profile(args.device, clock)
        with profile.watching(self.backbone, self.regulator):
            for _ in range(max(args.repeats, 2)):
                with profile.step():
                    with profile.region(OPTIMISER):
                        self.optimiser.zero_grad(set_to_none=True)
                    self.ours().item()
                    with profile.region(OPTIMISER):
                        self.update()
        return profile


class WholeSentences:
    """Start token and prompt in each of a task's sentences, through this project's text tower."""

    def __init__(self, backbone: Backbone, text: common.PlainClassText) -> None:
        self.backbone, self.text = backbone, text

    def features(self, prompts: Tensor) -> Tensor:
        """(1, K, D) for one task's prompt (1, M, d)."""
        return self.backbone.encode_text(self.text.sentences(prompts[0])[None], self.text.ends)


class ProMetaR:
    """ProMetaR's own `forward_backward` in a process of its own, on a batch of made-up images of these classes."""

    def __init__(self, args: argparse.Namespace, folder: Path, images: int) -> None:
        import checkouts

        group = replace(checkouts.GROUPS["prometar"], batch=images)
        checkouts.GROUPS["prometar"] = group
        settings = SimpleNamespace(
            model=args.backbone,
            coop=None,
            prometar=args.prometar,
            learn2learn=args.learn2learn,
            dassl=None,
            data=None,
            dataset="caltech101",
            classes=args.ways,
            groups=["prometar"],
            test_images=2,
            device=args.device,
            threads=torch.get_num_threads(),
        )
        bench = checkouts.Bench(settings, folder)
        entry, self.clock, self.images = group.entries[0], args.clock, images
        (folder / "prometar").mkdir()
        spec = bench.spec(group, entry, "fp32", folder / "prometar")
        self.process = checkouts.Process(entry, spec, bench.environment())
        self.built = self.process.ask("build")

    def seconds(self) -> float:
        return self.process.ask("timed", measure="step", count=1)[self.clock]

    def with_peak(self) -> tuple[float, Any]:
        return self.process.ask("peak", measure="step", count=1)["peak_mb"], None

    def close(self) -> None:
        self.process.close()


# ----------------------------------------------------------------------------------------------------------------- run


def build_parser() -> argparse.ArgumentParser:
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("--family", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), help="(all)")
    options.add_argument("--tasks", type=int, default=4, help="B (%(default)s)")
    options.add_argument("--ways", type=int, default=5, help="K (%(default)s)")
    options.add_argument("--support", type=int, default=4, help="images per class (%(default)s)")
    options.add_argument("--query", type=int, default=12, help="images per class (%(default)s)")
    options.add_argument("--variants", nargs="+", help="parts of the variants' names to keep (all)")
    options.add_argument(
        "--names",
        choices=("topics", "classes"),
        default="topics",
        help="topics: single words, as clustering labels topics; classes: longer names, as ImageNet's",
    )
    options.add_argument("--prometar", type=Path, help="a checkout of mlvlab/ProMetaR")
    options.add_argument("--learn2learn", type=Path, help="sources of learn2learn, where it is not installed")
    options.add_argument("--precision", choices=("fp32", "fp64"), default="fp32", help="(%(default)s)")
    options.add_argument("-o", "--output", type=Path, help="JSON with all numbers, round by round")
    return options


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    backbone = common.begin(args)
    if args.precision == "fp64":
        in_double(backbone)
    words = common.topic_words(100) if args.names == "topics" else common.class_names(100)
    print(common.environment(args))
    report: dict[str, Any] = {"facts": facts(args), "families": {}}
    with theirs(args) as prometar:
        for name in args.family:
            if prometar is not None and prometar.process.process.poll() is not None:
                print("\nProMetaR: left out from here on, because its process has ended (perhaps for lack of memory)")
                prometar = None
            report["families"][name] = run(name, backbone, words, prometar, args)
            report["facts"]["load_average_after"] = os.getloadavg()
            common.write_report(args.output, report)
    print(f"load average before {report['facts']['load_average_before']}, after {os.getloadavg()}")


def facts(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": common.now(),
        "environment": common.environment(args),
        "settings": common.settings(args),
        "load_average_before": os.getloadavg(),
    }


@contextlib.contextmanager
def theirs(args: argparse.Namespace) -> Iterator[ProMetaR | None]:
    """Start ProMetaR's process if its checkout is given; close it at the end."""
    if not args.prometar:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="meta-step-") as folder:
        prometar = ProMetaR(args, Path(folder), args.tasks * args.ways * (args.support + args.query))
        try:
            yield prometar
        finally:
            prometar.close()


def run(
    name: str, backbone: Backbone, words: list[str], prometar: ProMetaR | None, args: argparse.Namespace
) -> dict[str, Any]:
    """Measure one family in turns, print its tables and return the numbers for the report."""
    bench = Bench(backbone, FAMILIES[name], words, args)
    steps: dict[str, Any] = {each: First(partial(bench.step, each)) for each in bench.variants()}
    if args.variants:
        kept = (CLONE, OURS, *(each for each in steps if any(part in each for part in args.variants)))
        steps = {each: step for each, step in steps.items() if each in kept}
    if prometar is not None:
        steps[PROMETAR] = prometar
    print_tasks(name, bench, args)
    measured = common.measure({**steps, **bench.bare()}, args)
    rates = sorted(bench.rate(args) for _ in range(3))
    apart = deviations(measured, bench)
    print_steps(measured, [each for each in measured if each not in BARE])
    print_deviations(apart)
    ceilings = ceiling_rows(bench, measured, rates[1])
    print_ceilings(ceilings, measured[OURS].seconds)
    profile = bench.profile(args)
    print(profile.table() + "\n")
    if prometar is not None:
        for patch in prometar.built["patches"]:
            print(f"ProMetaR, patched: {patch}")
    return {
        "measured": {each: {"seconds": row.rounds, "peak_mb": row.peak_mb} for each, row in measured.items()},
        "deviations": apart,
        "gflop": bench.flops(),
        "product_rate_gflops": rates,
        "ceilings_seconds": ceilings,
        "profile": profile.as_dict(),
    }


class First:
    """A step that keeps its gradients when it runs for the first time."""

    def __init__(self, step: Callable[..., Any]) -> None:
        self.step, self.keep = step, True

    def __call__(self) -> Any:
        keep, self.keep = self.keep, False
        return self.step(keep=keep)


def print_tasks(name: str, bench: Bench, args: argparse.Namespace) -> None:
    images = [side.shape[:3].numel() for side in (bench.support, bench.query)]
    print(f"\n## {name} prompts ({bench.family.text} text tokens, {bench.family.visual} visual tokens)\n")
    print(
        f"{args.tasks} tasks, {args.ways}-way, {args.support} support and {args.query} query shots: {images[0]} + "
        f"{images[1]} {'images' if bench.family.visual else 'image features'}"
        + (f"; {bench.positions()} text positions a side" if bench.text is not None else "")
        + "\n"
    )


def print_steps(measured: Mapping[str, common.Measured], names: list[str]) -> None:
    """Print median time and range, speed-up over clone and adapt (paired by round) and peak memory."""
    rows = []
    for name in names:
        one = measured[name]
        ratios = sorted(a / b for a, b in zip(measured[CLONE].rounds, one.rounds, strict=True))
        times = [1000 * value for value in (one.seconds, min(one.rounds), max(one.rounds))]
        time_cell = f"{times[0]:.0f} ({times[1]:.0f} to {times[2]:.0f})"
        ratio_cell = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        rows.append([name, time_cell, ratio_cell, f"{one.peak_mb:.0f}"])
    common.print_table(["", "time (ms)", "speed-up", "peak memory (MB)"], rows)


def deviations(measured: Mapping[str, common.Measured], bench: Bench) -> dict[str, dict[str, float]]:
    """Return how far each variant's loss and meta-gradients are from clone and adapt's, relative to the largest entry."""
    loss, gradients = measured[CLONE].result
    count = len(bench.theta)
    rows = {}
    for name, one in measured.items():
        if name in (CLONE, PROMETAR, *BARE):
            continue
        other_loss, others = one.result
        apart = [common.deviation(a, b) for a, b in zip(others, gradients, strict=True)]
        rows[name] = {
            "query loss": abs(float(other_loss / loss) - 1),
            "gradient of theta": max(apart[:count]),
            "gradient of phi": max(apart[count:]),
        }
    return rows


def print_deviations(rows: Mapping[str, Mapping[str, float]]) -> None:
    print("Largest deviation from clone and adapt, relative to the largest entry:\n")
    header = ["", "query loss", "gradient of theta", "gradient of phi"]
    common.print_table(header, [[name, *(f"{value:.1e}" for value in row.values())] for name, row in rows.items()])


def ceiling_rows(bench: Bench, measured: Mapping[str, common.Measured], rate: float) -> dict[str, float]:
    """Return the seconds that a step cannot fall below, computed in three ways."""
    flops = bench.flops()
    forwards = 4 * measured[FORWARD_SUPPORT].seconds + 2 * measured[FORWARD_QUERY].seconds
    products = " + ".join(f"{value:.1f} GFLOP ({name})" for name, value in flops.items())
    return {
        f"products: {products} at {rate:.0f} GFLOP/s": sum(flops.values()) / rate,
        "bare forward passes: 4 of the support set, 2 of the query set": forwards,
        PASSES: measured[PASSES].seconds,
    }


def print_ceilings(ceilings: Mapping[str, float], seconds: float) -> None:
    print("What the towers set as a ceiling:\n")
    rows = [[name, f"{1000 * value:.0f}", f"{value / seconds:.2f}"] for name, value in ceilings.items()]
    common.print_table(["", "time (ms)", "of this project's step"], rows)


if __name__ == "__main__":
    sys.exit(main())
