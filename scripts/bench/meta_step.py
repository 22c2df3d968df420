"""Measure a meta-training step for each family of prompts, beside learn2learn's way.

    python scripts/bench/meta_step.py                       # ViT-B/16 shapes, random weights, CPU, all three families
    python scripts/bench/meta_step.py --family visual joint --tasks 1 --ways 2 --support 2 --query 4 --clock cpu

All variants have the same weights, tasks and start: how far their losses and meta-gradients are apart is printed, and
the memory that `memory_plan` estimates. A step is forward, backward, clipping and the optimiser. meta_clone.py has
learn2learn's way. The script also prints what the towers set as a ceiling, and where the time of a step goes.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import common
import torch
from meta_clone import PromptedModel, clone_and_adapt
from meta_tasks import FAMILIES, MetaTasks
from torch import Tensor

from gram_meta.backbone.clip import Backbone, load_backbone
from gram_meta.backbone.graphs import Replay
from gram_meta.backbone.second_order import twice_differentiable
from gram_meta.method.bilevel import for_each_task, task_gradients
from gram_meta.method.episodes import TaskSet
from gram_meta.method.memory_plan import MemoryConfig, MemoryPlan, plan
from gram_meta.method.profiling import OPTIMISER, Profile
from gram_meta.method.recorded import RecordedSteps
from gram_meta.method.tasks import TaskConfig

CLONE, CLONE_FIRST = "clone and adapt (learn2learn's way)", "clone and adapt, first order"
CUT = "clone and adapt, cut at the longest sentence"
TOWER = "+ this project's text tower (no padding, last layer for end tokens alone), nothing cloned"
OURS = "this project"
RECORDED = f"{OURS}, as a CUDA graph"
PASSES = "the towers' passes with nothing around them"
CLONED = [name for name, prompt in FAMILIES.items() if not prompt.coupled]  # families that meta_clone.py has
WAYS: dict[str, dict[str, Any]] = {  # how this project takes a step: options of MemoryConfig
    OURS: {},
    f"{OURS}, one task at a time": {"tasks": 1},
    f"{OURS}, lean": {"second_order": "lean"},
    f"{OURS}, checkpointing": {"checkpointing": True},
    f"{OURS}, lean, checkpointing": {"second_order": "lean", "checkpointing": True},
    f"{OURS}, lean, checkpointing, one task at a time": {"second_order": "lean", "checkpointing": True, "tasks": 1},
    f"{OURS}, lean, 4 images at a time": {"second_order": "lean", "tasks": 1, "images": 4},
    f"{OURS}, lean, 1 image at a time": {"second_order": "lean", "tasks": 1, "images": 1},
    f"{OURS}, first order": {"first_order": True},
}


class Bench:
    """The tasks of one family, and its step in every variant."""

    def __init__(self, backbone: Backbone, family: str, args: argparse.Namespace) -> None:
        self.backbone, self.args = backbone, args
        sizes = args.tasks, args.ways, (args.support, args.query)
        self.made = made = MetaTasks(backbone, family, *sizes)
        self.passes = {PASSES: partial(self.towers, made)}
        self.others: dict[str, tuple[MetaTasks, RecordedSteps | None]] = {}  # on a GPU: as CUDA graphs, and in bf16
        if backbone.device.type == "cuda":
            half = MetaTasks(load_backbone(args.backbone, args.device, "bf16"), family, *sizes)
            for its, precision in ((made, ""), (half, ", bf16")):
                recorded = its.recorded(self.plan({}), its.inner())
                self.others |= {f"{OURS}{precision}": (its, None), f"{RECORDED}{precision}": (its, recorded)}
                self.passes[f"{PASSES}, recorded{precision}"] = Replay(partial(self.towers, its), [])
            del self.others[OURS]
        text = made.prompt.text_tokens
        self.model = PromptedModel(backbone, made.theta)
        self.cut = [common.PlainClassText(backbone, words, text, cut=True) for words in made.words] if text else []
        fixed = [made.classes_of(made.topics)[task] for task in range(made.tasks)] if not text else []
        self.classes = [common.PlainClassText(backbone, words, text) for words in made.words] if text else fixed

    def step(self, name: str) -> tuple[Tensor, list[Tensor]]:
        """Take one step of a variant; return the mean query loss, and the meta-gradients of theta and of phi."""
        made, recorded = self.others.get(name, (self.made, None))
        made.optimiser.zero_grad(set_to_none=True)
        if name not in self.others:
            loss = self.variants()[name]()
        elif recorded is None:
            loss = made.add_gradients(self.plan({}), made.inner()).losses.mean()
        else:
            loss = recorded(made.episode).losses.mean()
        gradients = [parameter.grad.clone() for parameter in made.parameters]
        made.outer.update(made.optimiser, 1)
        return loss, gradients

    def variants(self) -> dict[str, Callable[[], Tensor]]:
        clone = partial(clone_and_adapt, self.model, self.made.episode)
        inner, first_order = self.made.inner(), self.made.inner(first_order=True)
        variants: dict[str, Callable[[], Tensor]] = {CLONE: partial(clone, self.classes, inner)}
        if not self.made.prompt.visual_tokens:
            place = {tuple(row): number for number, row in enumerate(self.made.topics.tolist())}
            whole = self.made.episode_of(
                lambda rows: WholeSentences(self.backbone, self.cut[place[tuple(rows[0].tolist())]])
            )
            variants[CUT] = partial(clone, self.cut, inner)
            variants[TOWER] = partial(self.ours, {"tasks": 1}, whole)
        images = bool(self.made.prompt.visual_tokens)
        for name, way in WAYS.items():
            if (images or "images" not in way) and (self.made.tasks > 1 or "one task" not in name):
                variants[name] = partial(self.ours, way)
        return variants | {CLONE_FIRST: partial(clone, self.classes, first_order)}

    def ours(self, way: dict[str, Any], episode: Any = None) -> Tensor:
        """Add this project's meta-gradients, and return the mean query loss."""
        inner = self.made.inner(first_order=way.get("first_order", False))
        self.backbone.checkpointing = way.get("checkpointing", False)
        try:
            return self.made.add_gradients(self.plan(way), inner, episode).losses.mean()
        finally:
            self.backbone.checkpointing = False

    def plan(self, way: dict[str, Any]) -> MemoryPlan:
        """Return the content of a pass; its estimate is in bytes."""
        task = TaskConfig(self.args.ways, self.args.support, self.args.query)
        options = {"second_order": "whole", "tasks": self.made.tasks, "task": task, "prompt": self.made.prompt} | way
        return plan(MemoryConfig(**options), self.backbone, self.made.tasks, 1e15)

    def _features(self, side: TaskSet, prompts: Mapping[str, Tensor]) -> list[Tensor]:
        """Return what the towers compute of one side: images if they are pixels, class prompts if they are learned."""
        features = []
        if "visual" in prompts:
            pixels = side.backbone.normalise(side.images.flatten(0, 1))
            prompt = prompts["visual"].repeat_interleave(side.images.shape[1], dim=0)
            features = [side.backbone.encode_images(pixels, prompt)]
        return features + ([side.classes.features(prompts["text"])] if "text" in prompts else [])

    @torch.no_grad()
    def forward(self, side: str) -> None:
        """Run the towers' bare forward pass over the support or the query set."""
        self._features(getattr(self.made.episode, side), for_each_task(self.made.theta, self.made.tasks))

    def towers(self, made: MetaTasks) -> None:
        """Run forward, backward and both again for the second derivative: no loss, no R, no update."""
        prompts = for_each_task(made.theta, made.tasks)

        def along(side: TaskSet, prompts: Mapping[str, Tensor]) -> Tensor:
            return torch.stack([features.cos().sum() for features in self._features(side, prompts)])

        with twice_differentiable():
            gradients = task_gradients(partial(along, made.episode.support), prompts, create_graph=True)
        moved = {kind: value - 0.01 * gradients[kind] for kind, value in prompts.items()}
        torch.autograd.grad(along(made.episode.query, moved).sum(), list(made.theta.values()))

    def positions(self) -> int:
        """Return the text positions of one side: the sentences' own, and the start and prompt of each task."""
        if not self.made.prompt.text_tokens:
            return 0
        text = self.made.classes_of(self.made.topics)
        return int((text.ends + 1).sum()) + self.made.tasks * (1 + text.tokens)

    def gflop(self) -> dict[str, float]:
        """Return the GFLOP of the matrix products that an exact step needs, by tower."""
        result = {}
        if self.made.prompt.visual_tokens:
            each = common.image_passes(self.backbone, self.made.prompt.visual_tokens)
            support, query = (images.shape[:3].numel() for images in self.made.images)
            result["image tower"] = (support * sum(each) + query * sum(each[:2])) / 1e9
        if self.made.prompt.text_tokens:  # 4 passes of the support set, 2 of the query set
            result["text tower"] = 6 * common.text_flops(self.backbone, self.positions()) / 1e9
        return result

    def rate(self) -> float:
        """Return the GFLOP/s of the step's largest product, which has a row for each position of the query set."""
        rows, width = self.positions(), self.backbone.text_width
        if prompt := self.made.prompt.visual_tokens:
            length = self.backbone.model.visual.positional_embedding.shape[0] + prompt
            rows, width = self.made.images[1].shape[:3].numel() * length, self.backbone.visual_width
        return common.product_rate(self.args, rows, width) / 1e9

    def profile(self) -> Profile:
        profile = Profile(self.args.device, time.process_time if self.args.clock == "cpu" else time.perf_counter)
        with profile.watching(self.backbone, self.made.regulator):
            for _ in range(max(self.args.repeats, 2)):
                with profile.step():
                    with profile.region(OPTIMISER):
                        self.made.optimiser.zero_grad(set_to_none=True)
                    self.ours(WAYS[OURS]).item()
                    with profile.region(OPTIMISER):
                        self.made.outer.update(self.made.optimiser, 1)
        return profile


class WholeSentences:
    """Start token and prompt in each of a task's sentences, through this project's text tower."""

    def __init__(self, backbone: Backbone, text: common.PlainClassText) -> None:
        self.backbone, self.text = backbone, text

    def features(self, prompts: Tensor) -> Tensor:
        """Return (1, K, D) for one task's prompt (1, M, d)."""
        return self.backbone.encode_text(self.text.sentences(prompts[0])[None], self.text.ends)


def build_parser() -> argparse.ArgumentParser:
    options = common.parser(__doc__)
    options.add_argument("--family", nargs="+", choices=CLONED, default=CLONED, help="(all)")
    options.add_argument("--tasks", type=int, default=4, help="B (%(default)s)")
    options.add_argument("--ways", type=int, default=5, help="K (%(default)s)")
    options.add_argument("--support", type=int, default=4, help="images of a class (%(default)s)")
    options.add_argument("--query", type=int, default=12, help="images of a class (%(default)s)")
    options.add_argument("--variants", nargs="+", default=[""], help="parts of the names of those measured (all)")
    return options


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    backbone = common.begin(args)
    print(common.environment(args))
    report = common.report(args) | {"families": {}}
    for family in args.family:
        report["families"][family] = run(family, backbone, args)
        common.write_report(args, report)
    print("load average before and after:", *(report["facts"][f"load_average_{when}"] for when in ("before", "after")))


def run(family: str, backbone: Backbone, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one family in turns, print its tables and return the numbers for the report."""
    bench = Bench(backbone, family, args)
    prompt, images = bench.made.prompt, [side.shape[:3].numel() for side in bench.made.images]
    print(
        f"\n## {family} prompts ({prompt.text_tokens} text tokens, {prompt.visual_tokens} visual tokens)\n\n"
        f"{args.tasks} tasks, {args.ways}-way, {args.support} support and {args.query} query shots: {images[0]} + "
        f"{images[1]} {'images' if prompt.visual_tokens else 'image features'}; "
        f"{bench.positions()} text positions a side\n"
    )
    names = [name for name in bench.variants() if name in (CLONE, OURS) or any(part in name for part in args.variants)]
    names += bench.others
    steps = {name: partial(bench.step, name) for name in names}
    bare: dict[str, Any] = {side: partial(bench.forward, side) for side in ("support", "query")}
    measured = common.measure(steps | bare | bench.passes, args)
    estimates = {name: f"{bench.plan(WAYS[name]).estimate / 1e6:,.0f}" for name in names if name in WAYS}
    common.print_comparison(measured, list(steps), **{"estimate (MB)": estimates})
    apart = {name: deviations(measured, name, len(bench.made.theta)) for name in names[1:]}
    print("Largest deviation from clone and adapt, relative to the largest entry:\n")
    common.print_table([{"": name} | {what: f"{x:.1e}" for what, x in row.items()} for name, row in apart.items()])

    rates, gflop = sorted(bench.rate() for _ in range(3)), bench.gflop()
    products = " + ".join(f"{value:.1f} GFLOP ({name})" for name, value in gflop.items())
    forwards = 4 * measured["support"].seconds + 2 * measured["query"].seconds
    ceilings = {
        f"products: {products} at {rates[1]:.0f} GFLOP/s": sum(gflop.values()) / rates[1],
        "bare forward passes: 4 of the support set, 2 of the query set": forwards,
        **{name: measured[name].seconds for name in bench.passes},
    }
    print("What the towers set as a ceiling:\n")
    columns, whole = ("", "time (ms)", "of this project's step"), measured[OURS].seconds
    lines = [(name, f"{1000 * took:.0f}", f"{took / whole:.2f}") for name, took in ceilings.items()]
    common.print_table([dict(zip(columns, line, strict=True)) for line in lines])
    profile = bench.profile()
    print(profile.table() + "\n")
    return {
        "measured": common.numbers(measured),
        "deviations": apart,
        "gflop": gflop,
        "product_rate_gflops": rates,
        "ceilings_seconds": ceilings,
        "profile": profile.as_dict(),
    }


def deviations(measured: Mapping[str, common.Measured], name: str, kinds: int) -> dict[str, float]:
    """Return how far a variant's loss and meta-gradients are from clone and adapt's, relative to the largest entry."""
    (loss, gradients), (true_loss, true) = measured[name].result, measured[CLONE].result
    apart = [common.deviation(a, b) for a, b in zip(gradients, true, strict=True)]
    largest = {"gradient of theta": max(apart[:kinds]), "gradient of phi": max(apart[kinds:])}
    return {"query loss": abs(float(loss / true_loss) - 1)} | largest


if __name__ == "__main__":
    main()
