"""What meta_grid.py tried and the package does not have: key TRY of a variant in emoji_grid.yaml.

momentum: the inner loop keeps a velocity, as few-shot training does. fresh batches: each inner step sees other support
images, an equal part of each class. accuracy: the kept checkpoint has the highest accuracy on held-out tasks, not the
lowest loss. Meta-training takes these; the evaluation of held-out tasks keeps the plain inner loop.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import torch

from gram_meta.backbone.second_order import twice_differentiable
from gram_meta.method import together
from gram_meta.method.bilevel import InnerLoop, MetaLosses, Prompts, task_gradients
from gram_meta.method.episodes import TaskSet
from gram_meta.method.meta_trainer import MetaTrainer

MOMENTUM = 0.9  # of few-shot training


def trying(name: str | None) -> AbstractContextManager[object]:
    """Return a context in which meta-trainings of several seeds do what `name` says; None: as they are."""
    if name is None:
        return nullcontext()
    if name == "accuracy":
        return mock.patch.object(MetaTrainer, "scores", _with_accuracy(MetaTrainer.scores))
    return mock.patch.object(together, "adapted_losses", {"momentum": with_momentum, "fresh batches": with_fresh}[name])


def with_momentum(support: TaskSet, query: TaskSet, prompts: Prompts, inner: InnerLoop) -> MetaLosses:
    """Adapt with v <- 0.9 v + R(g), theta <- theta - alpha v, and return the query losses."""
    velocity: Prompts = {kind: torch.zeros_like(value) for kind, value in prompts.items()}
    norms = []
    for _ in range(inner.steps):
        raw = _gradients(support, prompts)
        velocity = {kind: MOMENTUM * velocity[kind] + value for kind, value in _regulated(raw, inner).items()}
        prompts = {kind: value - inner.alpha * velocity[kind] for kind, value in prompts.items()}
        norms.append(_norms(raw))
    return MetaLosses(query(prompts), norms)


def with_fresh(support: TaskSet, query: TaskSet, prompts: Prompts, inner: InnerLoop) -> MetaLosses:
    """Adapt with another part of the support set in each step, and return the query losses."""
    norms = []
    for part in parts_by_class(support, inner.steps):
        raw = {kind: inner.steps * value for kind, value in _gradients(part, prompts).items()}  # of the part's mean
        regulated = _regulated(raw, inner)
        prompts = {kind: value - inner.alpha * regulated[kind] for kind, value in prompts.items()}
        norms.append(_norms(raw))
    return MetaLosses(query(prompts), norms)


def parts_by_class(support: TaskSet, parts: int) -> Iterator[TaskSet]:
    """Yield `parts` parts with equally many images of each class; their losses sum to the whole's."""
    places = torch.arange(support.labels.shape[1])
    shots = int((support.labels[0] == 0).sum())  # images of a class, side by side
    if shots % parts:
        raise ValueError(f"TASKS.SUPPORT_SHOTS: expected a multiple of {parts} inner steps, found {shots}")
    for number in range(parts):
        own = places[places % shots // (shots // parts) == number]
        yield support.select(support.images[:, own], support.labels[:, own])


def _gradients(losses: TaskSet, prompts: Prompts) -> dict[str, torch.Tensor]:
    with twice_differentiable():
        return task_gradients(losses, prompts, create_graph=True)


def _regulated(raw: Prompts, inner: InnerLoop) -> Prompts:
    return raw if inner.regulate is None else {**raw, **inner.regulate(raw)}


def _norms(raw: Prompts) -> dict[str, torch.Tensor]:
    return {kind: value.detach().flatten(1).norm(dim=1, keepdim=True) for kind, value in raw.items()}


def _with_accuracy(scores: Callable[[MetaTrainer], dict[str, float]]) -> Callable[[MetaTrainer], dict[str, float]]:
    def chosen(trainer: MetaTrainer) -> dict[str, float]:
        found = scores(trainer)
        return found | {"loss_after": -found["accuracy_after"]}

    return chosen
