"""Inner adaptation and the meta-objective (Eq. 4, 7 and 10), for a batch of tasks at once.

Prompts are dicts of tensors; a leading axis B gives each task its own. A loss function maps such prompts to one loss per
task, (B,). As the prompts of different tasks are separate leaves, the gradient of the summed loss is each task's own
gradient, so a batch of tasks is one forward and one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gram_meta.backbone.second_order import twice_differentiable

Prompts = Mapping[str, Tensor]  # kind -> (B, M, d)
Losses = Callable[[Prompts], Tensor]  # prompts -> (B,)
Regulate = Callable[[Prompts], Prompts]  # gradients -> gradients of the same shapes

_PROMPT_SIZE = 2.0**-5  # about what an entry of a prompt has


def for_each_task(theta: Prompts, tasks: int) -> dict[str, Tensor]:
    """theta (M, d) by kind -> (tasks, M, d), one copy a task, still connected to theta."""
    return {kind: value.expand(tasks, *value.shape) for kind, value in theta.items()}


def task_gradients(
    losses: Losses, prompts: Prompts, create_graph: bool = False, scale: float = 1.0
) -> dict[str, Tensor]:
    """Each task's gradient of its own loss at its own prompts, (B, M, d) by kind.

    `scale`: a power of two that the loss is multiplied by and the gradients are divided by, so that small gradients survive
    towers in fp16.
    """
    kinds = list(prompts)
    total = losses(prompts).sum()
    if scale != 1:
        total = total * scale
    gradients = torch.autograd.grad(total, [prompts[k] for k in kinds], create_graph=create_graph)
    if scale != 1:
        gradients = tuple(gradient / scale for gradient in gradients)
    return dict(zip(kinds, gradients, strict=True))


def adapt(
    support_losses: Losses,
    prompts: Prompts,
    alpha: float,
    steps: int = 1,
    regulate: Regulate | None = None,
    first_order: bool = False,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Adapt each task's prompts: `steps` times theta <- theta - alpha R(grad L(theta, support)), Eq. 7.

    Args:
        support_losses: prompts (B, M, d) -> support loss of each task (B,).
        prompts: where to start, (B, M, d) by kind; must require gradients.
        alpha: inner learning rate.
        steps: inner steps.
        regulate: R^phi; None is plain MAML, Eq. 4.
        first_order: treat the raw gradients as constants; R^phi still learns through its own output.
        scale: of the loss, as in `task_gradients`.

    Returns:
        Adapted prompts (B, M, d), differentiable with respect to `prompts` and to the parameters of `regulate`.
    """
    for _ in range(steps):
        if first_order:
            gradients = task_gradients(support_losses, prompts, scale=scale)
        else:
            with twice_differentiable():
                gradients = task_gradients(support_losses, prompts, create_graph=True, scale=scale)
        prompts = descend(prompts, gradients, alpha, regulate)
    return dict(prompts)


def descend(prompts: Prompts, gradients: Prompts, alpha: float, regulate: Regulate | None = None) -> dict[str, Tensor]:
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
    scale: float = 1.0,
) -> Tensor:
    """Query loss of each task after its adaptation, (tasks,): the summands of Eq. 10.

    `.sum().backward()` (or `.mean()`) gives the meta-gradients of Eq. 8 and 9.
    """
    adapted = adapt(support_losses, for_each_task(theta, tasks), alpha, steps, regulate, first_order, scale)
    return query_losses(adapted)


def lean_backward(
    support: Sequence[Losses],
    query: Sequence[Losses],
    theta: Prompts,
    tasks: int,
    alpha: float,
    steps: int = 1,
    regulate: Regulate | None = None,
    first_order: bool = False,
    scale: float = 1.0,
    weight: float = 1.0,
) -> Tensor:
    """The same query losses as `meta_losses`, (tasks,), and the same meta-gradients, in less memory.

    It adds `weight` times the gradient of the losses' sum to `.grad` of theta and of phi. The chain rule of Eq. 8 is walked
    by hand: support gradients without a graph, adaptation, the query gradient v, whose graph is gone before the next
    one stands, and from the last inner step back to the first v <- v + H u, with u what v becomes on its way back through
    R^phi to the support gradient, and H the Hessian of the support loss, whose product with u is exact (a second
    backward pass over the support set). So the largest graph is that of the query set or that of a support set's second
    derivative, not their sum; and as each of them is a sum over images, it can be had some images at a time. All passes
    but the last kind may use fused attention. The price is one more first-order pass over the support set.

    Under fp16 each of these passes has numbers of a size of its own: u is brought to the size of a prompt for the product
    with H, which is linear in u, and taken back afterwards.

    Args:
        support, query: functions whose sum over the sequence is a side's loss for each task.
        theta, tasks, alpha, steps, regulate, first_order, scale: as for `meta_losses`.
        weight: of the sum; 1 / B makes it the mean over a batch.
    """
    kinds = list(theta)
    path: list[dict[str, Tensor]] = []  # each inner step's prompts and raw gradients
    raws: list[dict[str, Tensor]] = []
    prompts = {kind: value.detach().clone() for kind, value in for_each_task(theta, tasks).items()}
    for _ in range(steps):
        path.append({kind: value.requires_grad_() for kind, value in prompts.items()})
        raws.append(total_of(task_gradients(part, path[-1], scale=scale) for part in support))
        with torch.no_grad():
            prompts = descend(path[-1], raws[-1], alpha, regulate)

    adapted = {kind: value.detach().requires_grad_() for kind, value in prompts.items()}
    losses: list[Tensor] = []

    def remembered(part: Losses) -> Losses:
        def of(at: Prompts) -> Tensor:
            value = part(at)
            losses.append(value.detach())
            return value

        return of

    v = total_of(task_gradients(remembered(part), adapted, scale=scale) for part in query)
    v = {kind: weight * value for kind, value in v.items()}
    for at, raw in zip(reversed(path), reversed(raws), strict=True):
        u = _back_through_update(at, raw, v, alpha, regulate)
        if not first_order:
            v = total_of([v, *(_hessian_product(part, at, u, scale) for part in support)])
    for kind in kinds:
        summed, have = v[kind].sum(dim=0), theta[kind].grad
        theta[kind].grad = summed if have is None else have + summed
    return torch.stack(losses).sum(dim=0)


def _back_through_update(
    prompts: Prompts, raw: Prompts, v: Prompts, alpha: float, regulate: Regulate | None
) -> dict[str, Tensor]:
    """The gradient u of an inner step's raw gradients, from the one behind it, v; phi's share is added to its `.grad`."""
    kinds = list(prompts)
    raw = {kind: value.detach().requires_grad_() for kind, value in raw.items()}
    moved = descend({kind: prompts[kind].detach() for kind in kinds}, raw, alpha, regulate)
    torch.autograd.backward([moved[kind] for kind in kinds], [v[kind] for kind in kinds])
    return {kind: torch.zeros_like(value) if value.grad is None else value.grad for kind, value in raw.items()}


def _hessian_product(losses: Losses, prompts: Prompts, u: Prompts, scale: float) -> dict[str, Tensor]:
    """H u by kind, for each task its own, with H the second derivative of `losses` at `prompts`."""
    kinds = list(prompts)
    sizes: Tensor | float = 1.0
    if scale != 1:  # a power of two for each task, so that nothing is rounded by it
        largest = torch.stack([each.flatten(1).abs().amax(dim=1) for each in u.values()]).amax(dim=0)  # (B,)
        sizes = torch.exp2(torch.floor(torch.log2(largest.clamp_min(1e-30)))) / _PROMPT_SIZE
    with twice_differentiable():
        gradients = torch.autograd.grad(
            losses(prompts).sum() * scale, [prompts[kind] for kind in kinds], create_graph=True
        )
    products = torch.autograd.grad(
        gradients, [prompts[kind] for kind in kinds], [_over(u[kind], sizes) for kind in kinds], materialize_grads=True
    )
    return {kind: _over(product, scale / sizes) for kind, product in zip(kinds, products, strict=True)}


def total_of(parts: Iterable[Prompts]) -> dict[str, Tensor]:
    """The sum, kind by kind; one after the other, so that only one part's graph stands at a time."""
    total: dict[str, Tensor] = {}
    for part in parts:
        total = {kind: total[kind] + value if total else value for kind, value in part.items()}
    return total


def _over(value: Tensor, sizes: Tensor | float) -> Tensor:
    """Each task's values (B, ...) divided by its own number."""
    return value / (sizes.view(-1, *(1,) * (value.dim() - 1)) if isinstance(sizes, Tensor) else sizes)


def inner_products(a: Prompts, b: Prompts) -> Tensor:
    """Normalised inner product of two gradients, over all kinds, for each task (B,): Eq. 12 and Fig. 3b."""
    flat_a, flat_b = (torch.cat([g[k].flatten(1) for k in sorted(g)], dim=1) for g in (a, b))
    return torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=1)
