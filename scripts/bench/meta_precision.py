"""Measure how far the meta-gradient under bf16 and fp16 towers is from float32, with and without a loss scale.

    python scripts/bench/meta_precision.py --backbone gram-small --prompts text visual
    python scripts/bench/meta_precision.py --backbone random-ViT-B/16 --prompts visual --image-layers 2

Errors are relative L2 norms on two tasks of random images: of the whole meta-gradient of theta and of phi, and of
theta's second-order term alone (what goes through the support gradient). docs/results/meta-training.md has the runs.
"""

import argparse

import common
import torch
from meta_tasks import FAMILIES, MetaTasks
from torch import Tensor

from gram_meta.backbone.clip import load_backbone
from gram_meta.backbone.second_order import twice_differentiable
from gram_meta.method.bilevel import as_leaves, descend, for_each_task, task_gradients
from gram_meta.method.memory_plan import MemoryPlan


def tasks_of(args: argparse.Namespace, prompts: str, precision: str) -> MetaTasks:
    """Return two tasks, theta and phi, the same for every precision; phi is not at its start, where W is zero."""
    backbone = load_backbone(args.backbone, precision=precision)
    if args.image_layers and prompts != "text":
        tower = backbone.model.visual.transformer
        tower.resblocks = tower.resblocks[-args.image_layers :]
    made = MetaTasks(backbone, prompts, 2, args.ways, (4, 12) if prompts == "text" else (1, 2))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.regulator.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=draw))
    return made


def gradients(made: MetaTasks, lean: bool, scale: float) -> list[Tensor]:
    """Return the meta-gradients of theta and of phi, each as one vector, and theta's second-order term."""

    def taken(first_order: bool = False) -> tuple[Tensor, Tensor]:
        made.optimiser.zero_grad()
        made.add_gradients(MemoryPlan(lean, 2, 0, 0), made.inner(scale=scale, first_order=first_order))
        return vector(made.theta.values()), vector(made.regulator.parameters())

    theta, phi = taken()
    if lean:  # the same passes without the product with H
        return [theta, phi, theta - taken(first_order=True)[0]]
    start = for_each_task(made.theta, 2)
    with twice_differentiable():
        raw = task_gradients(made.episode.support, start, create_graph=True, scale=scale)
    made.optimiser.zero_grad()
    after = descend(as_leaves(start), raw, made.inner()).after  # without the direct way from theta to the query loss
    (made.episode.query(after).sum() * 0.5 * scale).backward()
    return [theta, phi, vector(made.theta.values()) / scale]


def vector(parameters: object) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in parameters])  # type: ignore[attr-defined]


def error(found: Tensor, true: Tensor) -> str:
    return f"{((found - true).norm() / true.norm()).item():.1e}" if bool(found.isfinite().all()) else "not finite"


def main() -> None:
    options = common.plain_parser(__doc__)
    options.add_argument("--backbone", default="gram-small", help="as for load_backbone (%(default)s)")
    options.add_argument("--prompts", nargs="+", default=["text", "visual"], choices=FAMILIES)
    options.add_argument("--image-layers", type=int, default=0, help="keep only the last so many; 0: all")
    options.add_argument("--ways", type=int, default=2)
    options.add_argument("--scales", type=int, nargs="+", default=[0, 4, 8, 12, 14, 16], help="exponents of two, fp16")
    args = options.parse_args()
    torch.set_num_threads(1)
    for prompts in args.prompts:
        true = gradients(tasks_of(args, prompts, "fp32"), False, 1.0)
        norms = [value.norm().item() for value in true]
        print(
            f"{args.backbone}, {prompts} prompts: |gradient of theta| {norms[0]:.2e}, of phi {norms[1]:.2e}; "
            f"the second-order term is {100 * norms[2] / norms[0]:.2g} % of the first\n"
        )
        rows = []
        for precision in ("fp32", "bf16", "fp16"):
            made = tasks_of(args, prompts, precision)
            for lean in (False, True):
                for exponent in args.scales if precision == "fp16" else [0]:
                    name = f"{precision}, {'lean' if lean else 'whole'}" + f", scale 2^{exponent}" * bool(exponent)
                    theta, phi, second = map(error, gradients(made, lean, 2.0**exponent), true)
                    rows.append({"towers": name, "theta": theta, "of it, second order": second, "phi": phi})
        common.print_table(rows)


if __name__ == "__main__":
    main()
