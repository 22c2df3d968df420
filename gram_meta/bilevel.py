"""Inner adaptation and the meta-objective (Eq. 4, 7 and 10), for a batch of tasks at once.

Prompts are dicts of tensors; a leading axis B gives each task its own. A loss function maps such prompts to one loss per
task, (B,). As the prompts of different tasks are separate leaves, the gradient of the summed loss is each task's own
gradient, so a batch of tasks is one forward and one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Prompts = Mapping[str, Tensor]  # kind -> (B, M, d)
Losses = Callable[[Prompts], Tensor]  # prompts -> (B,)
Regulate = Callable[[Prompts], Prompts]  # gradients -> gradients of the same shapes


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Attention inside has a second derivative; torch's fused kernels have none."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def for_each_task(theta: Prompts, tasks: int) -> dict[str, Tensor]:
    """theta (M, d) by kind -> (tasks, M, d), one copy a task, still connected to theta."""
    return {kind: value.expand(tasks, *value.shape) for kind, value in theta.items()}


def task_gradients(losses: Losses, prompts: Prompts, create_graph: bool = False) -> dict[str, Tensor]:
    """Each task's gradient of its own loss at its own prompts, (B, M, d) by kind."""
    kinds = list(prompts)
    gradients = torch.autograd.grad(
        losses(prompts).sum(), [prompts[k] for k in kinds], create_graph=create_graph
    )
    return dict(zip(kinds, gradients, strict=True))


def adapt(
    support_losses: Losses,
    prompts: Prompts,
    alpha: float,
    steps: int = 1,
    regulate: Regulate | None = None,
    first_order: bool = False,
) -> dict[str, Tensor]:
    """Adapt each task's prompts: `steps` times theta <- theta - alpha R(grad L(theta, support)), Eq. 7.

    Args:
        support_losses: prompts (B, M, d) -> support loss of each task (B,).
        prompts: where to start, (B, M, d) by kind; must require gradients.
        alpha: inner learning rate.
        steps: inner steps.
        regulate: R^phi; None is plain MAML, Eq. 4.
        first_order: treat the raw gradients as constants; R^phi still learns through its own output.

    Returns:
        Adapted prompts (B, M, d), differentiable with respect to `prompts` and to the parameters of `regulate`.
    """
    for _ in range(steps):
        if first_order:
            gradients = task_gradients(support_losses, prompts)
        else:
            with twice_differentiable():
                gradients = task_gradients(support_losses, prompts, create_graph=True)
        prompts = descend(prompts, gradients, alpha, regulate)
    return dict(prompts)


def descend(
    prompts: Prompts, gradients: Prompts, alpha: float, regulate: Regulate | None = None
) -> dict[str, Tensor]:
    """One step of Eq. 7 with the raw gradients at `prompts`; parameters that R^phi does not know go by their raw one."""
    if regulate is not None:
        gradients = {**gradients, **regulate(gradients)}
    return {kind: value - alpha * gradients[kind] for kind, value in prompts.items()}


def meta_losses(
    support_losses: Losses,
    query_losses: Losses,
    theta: Prompts,
    tasks: int,
    alpha: float,
    steps: int = 1,
    regulate: Regulate | None = None,
    first_order: bool = False,
) -> Tensor:
    """Query loss of each task after its adaptation, (tasks,): the summands of Eq. 10.

    `.sum().backward()` (or `.mean()`) gives the meta-gradients of Eq. 8 and 9.
    """
    adapted = adapt(support_losses, for_each_task(theta, tasks), alpha, steps, regulate, first_order)
    return query_losses(adapted)


def inner_products(a: Prompts, b: Prompts) -> Tensor:
    """Normalised inner product of two gradients, over all kinds, for each task (B,): Eq. 12 and Fig. 3b."""
    flat_a, flat_b = (torch.cat([g[k].flatten(1) for k in sorted(g)], dim=1) for g in (a, b))
    return torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=1)
