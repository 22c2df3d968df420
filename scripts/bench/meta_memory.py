"""Measure peak memory and time of a meta-training step for each MEMORY setting, beside the estimate of `memory_plan`.

python scripts/bench/meta_memory.py --backbone random-ViT-B/16 --prompts visual --ways 2 --shots 2 6 --threads 1 --clock cpu
python scripts/bench/meta_memory.py --backbone random-ViT-B/32 --prompts joint --threads 1 --clock cpu --repeats 1
"""

from __future__ import annotations

import statistics
from functools import partial

import common
import torch
from torch import Tensor

from gram_meta.config import load_meta_config
from gram_meta.method.bilevel import InnerLoop, lean_backward, meta_losses
from gram_meta.method.episodes import TaskSet
from gram_meta.method.memory_plan import MemoryConfig, plan
from gram_meta.method.prompts import initial_prompts

WAYS = {  # name: SECOND_ORDER, images at a time, checkpointing, first order
    "whole": ("whole", 0, False, False),
    "whole, checkpointing": ("whole", 0, True, False),
    "lean": ("lean", 0, False, False),
    "lean, checkpointing": ("lean", 0, True, False),
    "lean, 4 images at a time": ("lean", 4, False, False),
    "lean, 1 image at a time": ("lean", 1, False, False),
    "first order": ("whole", 0, False, True),
}


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--prompts", choices=("visual", "joint"), default="visual")
    parser.add_argument("--ways", type=int, default=2)
    parser.add_argument("--shots", type=int, nargs=2, default=(2, 6), help="support and query images per class")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    backbone = common.begin(args)
    text = 4 if args.prompts == "joint" else 0
    theta = initial_prompts(backbone, text, 4, "a photo of a")
    theta = {kind: value.requires_grad_() for kind, value in theta.items()}
    regulator = common.regulator_for(theta).to(backbone.device)
    words, topics = common.topic_words(args.ways), torch.arange(args.ways)[None]
    classes = common.class_side(backbone, words, topics, text)
    size = backbone.image_size
    support, query = (
        TaskSet(backbone, classes, torch.randint(0, 256, (1, args.ways, shots, 3, size, size), dtype=torch.uint8))
        for shots in args.shots
    )
    parameters = [*theta.values(), *regulator.parameters()]

    def step(way: str) -> list[Tensor]:
        graphs, images, backbone.checkpointing, first_order = WAYS[way]
        for parameter in parameters:
            parameter.grad = None
        inner = InnerLoop(first_order=first_order, regulate=regulator.regulate_known)
        if graphs == "lean":
            lean_backward(support.parts(images), query.parts(images), theta, 1, inner)
        else:
            meta_losses(support, query, theta, 1, inner).losses.sum().backward()
        return [parameter.grad for parameter in parameters]

    print(common.environment(args))
    print(f"{args.prompts} prompts, one task of {args.ways} classes, {args.shots[0]} + {args.shots[1]} images each\n")
    steps = {way: partial(step, way) for way in args.only}
    for way in steps:  # fills the libraries' own buffers, which no variant should pay for
        if way == "first order" or len(steps) == 1:
            step(way)
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    peaks: dict[str, float] = {}
    results = {}
    for _ in range(args.repeats):
        for way, run in steps.items():
            spent = common.stopwatch(args)
            peak, results[way] = common.with_peak(run, args.device)
            seconds[way].append(spent())
            peaks[way] = min(peak, peaks.get(way, peak))
    rows = []
    for way in steps:
        graphs, images, checkpointing, first_order = WAYS[way]
        options = {
            "TASKS.WAYS": args.ways,
            "TASKS.SUPPORT_SHOTS": args.shots[0],
            "TASKS.QUERY_SHOTS": args.shots[1],
            "PROMPT.TEXT_TOKENS": text,
            "PROMPT.VISUAL_TOKENS": 4,
            "MEMORY.SECOND_ORDER": graphs,
            "MEMORY.TASKS": 1,
            "MEMORY.IMAGES": images,
            "MEMORY.CHECKPOINTING": checkpointing,
            "INNER.FIRST_ORDER": first_order,
        }
        config = load_meta_config([], [str(part) for pair in options.items() for part in pair])
        estimate = plan(MemoryConfig.from_config(config), backbone, 1, 1e15).estimate / 1e6
        apart = common.deviation(results[way][0], results[args.only[0]][0])
        rows.append(
            [way, f"{peaks[way]:.0f}", f"{estimate:.0f}", f"{statistics.median(seconds[way]):.2f}", f"{apart:.0e}"]
        )
    common.print_table(["", "peak memory (MB)", "estimate (MB)", "seconds", f"deviation from {args.only[0]}"], rows)


if __name__ == "__main__":
    main()
