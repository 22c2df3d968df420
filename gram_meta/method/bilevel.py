"""The inner loop and the meta-objective for a batch of tasks (Eq. 4, 7, 8, 9, 10, 12; Sec. 3.3 and 3.4).

Prompts are dicts of tensors; a leading axis B gives each task its own. A loss function maps such prompts to one loss
per task, (B,). The prompts of different tasks are separate leaves, so the gradient of the summed loss is each task's
own gradient, and a batch of tasks needs one forward and one backward pass.

Eq. 7 is `descend`. `inner_path` repeats it; meta-training, `lean_backward` and the evaluation all walk this path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from yacs.config import CfgNode

from gram_meta.backbone.second_order import twice_differentiable

Prompts = Mapping[str, Tensor]  # kind -> (B, M, d)
Losses = Callable[[Prompts], Tensor]  # prompts -> (B,)
Regulate = Callable[[Prompts], Prompts]  # gradients -> gradients of the same shapes

FP16_SCALE = 256.0  # loss scale under fp16; docs/results/meta-training.md has the measurement
_PROMPT_SIZE = 2.0**-5  # the usual size of a prompt's entries


@dataclass(frozen=True)
class InnerLoop:
    """Settings of the inner loop (Eq. 4, 7)."""

    alpha: float = 0.01  # step size
    steps: int = 1  # number of gradient steps
    first_order: bool = False  # treat the raw gradients as constants; R^phi still learns through its own output
    scale: float = 1.0  # loss scale under fp16, as for `task_gradients`
    # R^phi; it may leave out kinds, which then take a plain gradient step. None is plain MAML (Eq. 4)
    regulate: Regulate | None = None
    # Steps before `steps`, which make adaptation as long as few-shot training. The backward pass takes their sum as a
    # constant, so R^phi learns nothing from them
    detached: int = 0

    @classmethod
    def from_config(cls, config: CfgNode, regulate: Regulate | None = None) -> InnerLoop:
        """Read INNER and, for the loss scale, BACKBONE."""
        inner = config.INNER
        scale = config.BACKBONE.LOSS_SCALE or (FP16_SCALE if config.BACKBONE.PRECISION == "fp16" else 1.0)
        return cls(inner.ALPHA, inner.STEPS, inner.FIRST_ORDER, scale, regulate, inner.DETACHED)

    @property
    def length(self) -> int:
        """Number of all steps."""
        return self.detached + self.steps

    @property
    def path(self) -> float:
        """Sum of all steps' sizes."""
        return self.alpha * self.length


class InnerStep(NamedTuple):
    """One step of the inner loop; each field (B, M, d) by kind."""

    prompts: Prompts
    raw: Prompts  # the gradient of the support loss at `prompts`
    regulated: Prompts  # R^phi of it
    after: Prompts  # the prompts after the step


class MetaLosses(NamedTuple):
    """The summands of Eq. 10, and what the inner loop saw."""

    losses: Tensor  # (tasks,): the query losses after adaptation
    # of the raw support gradients, (tasks, layers), for each inner step and each kind; one layer if it is not deep
    norms: list[dict[str, Tensor]]


def for_each_task(theta: Prompts, tasks: int) -> dict[str, Tensor]:
    """Copy theta, (M, d) by kind, to (tasks, M, d), one copy a task, still connected to theta."""
    return {kind: value.expand(tasks, *value.shape) for kind, value in theta.items()}


def task_gradients(
    losses: Losses, prompts: Prompts, create_graph: bool = False, scale: float = 1.0
) -> dict[str, Tensor]:
    """Return each task's gradient of its own loss at its own prompts, (B, M, d) by kind.

    `scale` is a power of two: the loss is multiplied by it and the gradients are divided by it, so that small gradients
    survive towers in fp16.
    """
    kinds = list(prompts)
    total = losses(prompts).sum()
    if scale != 1:
        total = total * scale
    gradients = torch.autograd.grad(total, [prompts[k] for k in kinds], create_graph=create_graph)
    if scale != 1:
        gradients = tuple(gradient / scale for gradient in gradients)
    return dict(zip(kinds, gradients, strict=True))


def descend(prompts: Prompts, raw: Prompts, inner: InnerLoop) -> InnerStep:
    """Take one step of Eq. 7, theta <- theta - alpha R(g), with the raw gradients g at `prompts`.

    Parameters without a regulator take a plain gradient step (Eq. 4).
    """
    regulated = {**raw, **inner.regulate(raw)} if inner.regulate is not None else raw
    after = {kind: value - inner.alpha * regulated[kind] for kind, value in prompts.items()}
    return InnerStep(prompts, raw, regulated, after)


def inner_path(
    support: Sequence[Losses], prompts: Prompts, inner: InnerLoop, keep_graph: bool = False
) -> Iterator[InnerStep]:
    """Yield the steps of the inner loop from `prompts` on: `inner.detached`, and then `inner.steps` of them.

    Args:
        support: functions whose sum is the support loss of each task, prompts (B, M, d) -> (B,).
        prompts: the initialisation, (B, M, d) by kind.
        inner: settings of the loop.
        keep_graph: False: each step starts from leaves, and no graph outlives it. True: `after` is differentiable with
            respect to `prompts`, which must require gradients, and, except in the detached steps, to the parameters of
            R^phi.
    """
    for number in range(inner.length):
        connected = keep_graph and number >= inner.detached
        second_order = connected and not inner.first_order
        at = prompts if connected else as_leaves(prompts)
        with twice_differentiable() if second_order else nullcontext():
            raw = total_of(task_gradients(part, at, second_order, inner.scale) for part in support)
        with torch.set_grad_enabled(connected):
            step = descend(at, raw, inner)
        yield step
        prompts = step.after if connected or not keep_graph else _moved(prompts, at, step.after)


def _moved(prompts: Prompts, before: Prompts, after: Prompts) -> dict[str, Tensor]:
    """Return the values of `after`, with the gradient of `prompts`."""
    return {kind: value + (after[kind] - before[kind]).detach() for kind, value in prompts.items()}


def meta_losses(support: Losses, query: Losses, theta: Prompts, tasks: int, inner: InnerLoop) -> MetaLosses:
    """Return the query loss of each task after its adaptation, the summands of Eq. 10, in one graph.

    `.losses.sum().backward()` (or `.mean()`) gives the meta-gradients of Eq. 8 and 9.

    Args:
        support, query: prompts (tasks, M, d) -> loss of each task (tasks,).
        theta: the initialisation, (M, d) by kind; must require gradients.
        tasks: number of tasks.
        inner: settings of the adaptation.
    """
    return adapted_losses(support, query, for_each_task(theta, tasks), inner)


def adapted_losses(support: Losses, query: Losses, prompts: Prompts, inner: InnerLoop) -> MetaLosses:
    """Return the same from each task's own initialisation, (tasks, M, d) by kind."""
    norms = []
    for step in inner_path([support], prompts, inner, keep_graph=True):
        norms.append(_norms(step.raw))
        prompts = step.after
    return MetaLosses(query(prompts), norms)


def lean_backward(
    support: Sequence[Losses],
    query: Sequence[Losses],
    theta: Prompts,
    tasks: int,
    inner: InnerLoop,
    weight: float = 1.0,
) -> MetaLosses:
    """Compute the losses of `meta_losses` and add their meta-gradients to `.grad` of theta and phi, in less memory.

    The added gradient is `weight` times that of the losses' sum. The chain rule of Eq. 8 is applied in parts. First
    the inner loop runs without a graph. Then the gradient v of the query loss is taken, and its graph is freed.
    Then each inner step that is not detached, from the last to the first, replaces v by v + H u: u is v after its
    way back through R^phi to the raw support gradient, and H is the Hessian of the support loss. The product H u is
    exact (a second backward pass over the support set). So the largest graph is that of the query set or that of
    one second derivative, not their sum. Each of them is a sum over images, so it can be computed for some images
    at a time. Only the passes of H u need attention with a second derivative. The price is one more first-order
    pass over the support set.

    Under fp16 each of these passes has values of its own size: u is scaled to the size of a prompt for the product with
    H, which is linear in u, and scaled back afterwards.

    Args:
        support, query: functions whose sum over the sequence is a side's loss for each task.
        theta, tasks, inner: as for `meta_losses`.
        weight: factor of the sum; 1 / B makes it the mean over a batch.
    """
    prompts: Prompts = for_each_task(theta, tasks)
    path = list(inner_path(support, prompts, inner))
    if path:
        prompts = path[-1].after

    losses: list[Tensor] = []

    def recorded(part: Losses) -> Losses:
        def of(at: Prompts) -> Tensor:
            value = part(at)
            losses.append(value.detach())
            return value

        return of

    adapted = as_leaves(prompts)
    v = total_of(task_gradients(recorded(part), adapted, scale=inner.scale) for part in query)
    v = {kind: weight * value for kind, value in v.items()}
    for step in reversed(path[inner.detached :]):
        u = _back_through_update(step, v, inner)
        if not inner.first_order:
            v = total_of([v, *(_hessian_product(part, step.prompts, u, inner.scale) for part in support)])
    for kind, value in theta.items():
        summed = v[kind].sum(dim=0)
        value.grad = summed if value.grad is None else value.grad + summed
    return MetaLosses(torch.stack(losses).sum(dim=0), [_norms(step.raw) for step in path])


def _back_through_update(step: InnerStep, v: Prompts, inner: InnerLoop) -> dict[str, Tensor]:
    """Return u, the gradient at the step's raw gradients, given v at its result; add phi's share to phi's `.grad`."""
    raw = as_leaves(step.raw)
    after = descend({kind: value.detach() for kind, value in step.prompts.items()}, raw, inner).after
    torch.autograd.backward([after[kind] for kind in v], [v[kind] for kind in v])
    return {kind: torch.zeros_like(value) if value.grad is None else value.grad for kind, value in raw.items()}


def _hessian_product(losses: Losses, prompts: Prompts, u: Prompts, scale: float) -> dict[str, Tensor]:
    """Return H u by kind, for each task its own, with H the second derivative of `losses` at `prompts`."""
    kinds = list(prompts)
    sizes: Tensor | float = 1.0
    if scale != 1:  # a power of two for each task, so that it rounds nothing
        largest = torch.stack([each.flatten(1).abs().amax(dim=1) for each in u.values()]).amax(dim=0)  # (B,)
        sizes = torch.exp2(torch.floor(torch.log2(largest.clamp_min(1e-30)))) / _PROMPT_SIZE
    at = [prompts[kind] for kind in kinds]
    with twice_differentiable():
        gradients = torch.autograd.grad(losses(prompts).sum() * scale, at, create_graph=True)
    products = torch.autograd.grad(gradients, at, [_over(u[kind], sizes) for kind in kinds], materialize_grads=True)
    return {kind: _over(product, scale / sizes) for kind, product in zip(kinds, products, strict=True)}


def as_leaves(values: Prompts) -> dict[str, Tensor]:
    """Return the same values as leaves that require gradients."""
    return {kind: value.detach().requires_grad_() for kind, value in values.items()}


def total_of(parts: Iterable[Prompts]) -> dict[str, Tensor]:
    """Return the sum, kind by kind. It takes one part after the other, so that one part's graph exists at a time."""
    total: dict[str, Tensor] = {}
    for part in parts:
        total = {kind: total[kind] + value if total else value for kind, value in part.items()}
    return total


def norms_by_task(gradient: Tensor) -> Tensor:
    """Return the norm of each task's gradient, (B,) of (B, M, d) or (B, layers, M, d)."""
    return gradient.flatten(1).norm(dim=1)


def _norms(gradients: Prompts) -> dict[str, Tensor]:
    """Return the norm of each task's gradient by layer, (B, layers) of (B, layers, M, d) and (B, 1) of the others."""
    layers = {kind: value.shape[1] if value.dim() == 4 else 1 for kind, value in gradients.items()}
    return {kind: value.detach().reshape(len(value), layers[kind], -1).norm(dim=2) for kind, value in gradients.items()}


def _over(value: Tensor, sizes: Tensor | float) -> Tensor:
    """Divide each task's values (B, ...) by its own number."""
    return value / (sizes.view(-1, *(1,) * (value.dim() - 1)) if isinstance(sizes, Tensor) else sizes)


def inner_products(a: Prompts, b: Prompts) -> Tensor:
    """Return the normalised inner product of two gradients over all kinds, for each task (B,): Eq. 12 and Fig. 3b."""
    flat_a, flat_b = (torch.cat([g[k].flatten(1) for k in sorted(g)], dim=1) for g in (a, b))
    return torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=1)
