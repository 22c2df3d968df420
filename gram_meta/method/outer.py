"""The outer loop (Eq. 8 and 9): meta-gradients of a batch of tasks, and the step of theta and phi along them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from yacs.config import CfgNode

from gram_meta.method.bilevel import InnerLoop, MetaLosses, Prompts, for_each_task, lean_backward, meta_losses
from gram_meta.method.episodes import Episode
from gram_meta.method.memory_plan import MemoryPlan
from gram_meta.method.regulator import GradientRegulator
from gram_meta.processes import ProcessGroup

OPTIMISERS: dict[str, Callable[..., Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


@dataclass(frozen=True)
class OuterLoop:
    """Settings of the outer loop."""

    meta: bool = True  # False leaves out the inner loop: prompt pre-training on the topics (Table 6, row 3)
    optimiser: str = "adam"  # `adam` or `sgd`
    lr_prompt: float = 1e-3  # lambda_1
    lr_visual: float = 0.0  # lambda_1 of the visual prompt; 0: lr_prompt
    lr_regulator: float = 1e-4  # lambda_2
    batch: int = 4  # B, tasks of a step
    steps: int = 2000  # number of steps
    clip_norm: float = 1.0  # largest norm of the meta-gradient of each group of parameters; 0: not clipped
    cosine: bool = True  # whether learning rates fall to zero along a cosine

    @classmethod
    def from_config(cls, config: CfgNode) -> OuterLoop:
        """Read the OUTER node."""
        o = config.OUTER
        rates = o.LR_PROMPT, o.LR_VISUAL, o.LR_REGULATOR
        return cls(o.META, o.OPTIMIZER, *rates, o.BATCH, o.STEPS, o.CLIP_NORM, o.COSINE)

    def build_optimiser(self, theta: Mapping[str, Tensor], regulator: GradientRegulator | None) -> Optimizer:
        """Return the optimiser, with groups for theta, for its visual prompt if that has its own rate, and for phi."""
        apart = ["visual"] if self.lr_visual and "visual" in theta else []
        rest = [name for name in theta if name not in apart]
        groups: list[dict[str, Any]] = [
            {"params": [theta[name] for name in names], "full_lr": rate}
            for names, rate in ((rest, self.lr_prompt), (apart, self.lr_visual))
            if names
        ]
        if regulator is not None:
            learned = [p for p in regulator.parameters() if p.requires_grad]
            groups.append({"params": learned, "full_lr": self.lr_regulator})
        return OPTIMISERS[self.optimiser](groups, lr=self.lr_prompt)

    def update(self, optimiser: Optimizer, step: int) -> None:
        """Take step number `step` along the gradients in `.grad`.

        The learning rates depend on the step's number alone, so a resumed run has the same.
        """
        share = 0.5 * (1 + math.cos(math.pi * (step - 1) / self.steps)) if self.cosine else 1.0
        for group in optimiser.param_groups:
            group["lr"] = share * group["full_lr"]
            if self.clip_norm:
                torch.nn.utils.clip_grad_norm_(group["params"], self.clip_norm)
        optimiser.step()


class BatchResult(NamedTuple):
    """Results of a step's tasks."""

    losses: Tensor  # (b,): query losses after adaptation
    norms: Tensor  # (inner steps, b, layers): norms of the raw support gradients, layers of all kinds side by side

    @classmethod
    def of(cls, seen: MetaLosses, kinds: Sequence[str]) -> BatchResult:
        """Return the losses, detached, and the norms of these kinds as one tensor."""
        losses = seen.losses.detach()
        norms = [torch.cat([of_step[kind] for kind in kinds], dim=1) for of_step in seen.norms]  # (b, layers) each
        return cls(losses, torch.stack(norms) if norms else losses.new_zeros(0, len(losses), len(kinds)))

    @classmethod
    def zeros(cls, tasks: int, layers: int, device: torch.device) -> BatchResult:
        return cls(torch.zeros(tasks, device=device), torch.zeros(0, tasks, layers, device=device))


def parameters_of(optimiser: Optimizer) -> list[Tensor]:
    """Return all parameters that the optimiser steps."""
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def unscale(parameters: Sequence[Tensor], scale: float) -> None:
    """Divide the gradients in `.grad` by the factor of the losses that they were taken of."""
    if scale != 1:
        torch._foreach_div_([parameter.grad for parameter in parameters if parameter.grad is not None], scale)


def add_meta_gradients(
    episode: Episode,
    theta: Prompts,
    kinds: Sequence[str],
    parameters: Sequence[Tensor],
    inner: InnerLoop,
    outer: OuterLoop,
    plan: MemoryPlan,
) -> BatchResult:
    """Add the meta-gradients of the mean loss over B tasks to `.grad`, for the tasks of this episode.

    Args:
        episode: this process's tasks of a step.
        theta: the initialisation, (M, d) by kind.
        kinds: those of theta that R^phi regulates.
        parameters: theta and phi, without gradients.
        inner, outer: settings of both loops.
        plan: what goes through the towers at a time.
    """

    def add_gradients(losses: Tensor) -> Tensor:
        total = losses.sum() / outer.batch
        (total if inner.scale == 1 else total * inner.scale).backward()
        return losses.detach()

    done: list[MetaLosses] = []
    for part in episode.parts(plan.tasks):
        tasks = len(part.tasks)
        if not outer.meta:  # the query sets hold all domains
            pieces = [add_gradients(some(for_each_task(theta, tasks))) for some in part.query.parts(plan.images)]
            done.append(MetaLosses(torch.stack(pieces).sum(dim=0) if len(pieces) > 1 else pieces[0], []))
        elif plan.lean:
            support, query = part.support.parts(plan.images), part.query.parts(plan.images)
            done.append(lean_backward(support, query, theta, tasks, inner, 1 / outer.batch))
        else:
            result = meta_losses(part.support, part.query, theta, tasks, inner)
            done.append(result._replace(losses=add_gradients(result.losses)))
    if not plan.lean:
        unscale(parameters, inner.scale)
    results = [BatchResult.of(each, kinds) for each in done]
    return BatchResult(*(torch.cat(values, dim=dim) for dim, values in enumerate(zip(*results, strict=True))))


def exchange(
    group: ProcessGroup,
    parameters: Sequence[Tensor],
    result: BatchResult,
    shape: tuple[int, int, int],
    own: range,
    flags: Sequence[bool],
) -> tuple[BatchResult, list[bool]]:
    """Sum the gradients over all processes, and collect results and flags, in one exchange.

    Args:
        parameters: their `.grad` are summed in place.
        result: of this process's tasks; without norms if the process cannot take the step.
        shape: of all norms: inner steps, B, layers.
        own: this process's tasks, of 0 to B - 1.
        flags: this process's.

    Returns:
        The result of all B tasks, and for each flag whether any process has set it.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    sizes = [len(flags), shape[1], math.prod(shape)]
    whole = gradients[0].new_zeros(sum(sizes))
    raised, losses, norms = whole.split(sizes)
    norms = norms.view(shape)
    mine = slice(own.start, own.stop)
    losses[mine] = result.losses
    if len(result.norms):
        norms[:, mine] = result.norms
    raised += torch.tensor(flags).to(raised)
    group.add([*gradients, whole])
    return BatchResult(losses, norms), (raised > 0).tolist()
