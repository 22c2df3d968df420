"""A meta-step as a CUDA graph: both loops, second derivative included, are recorded once and then replayed.

A step is recorded for each shape of its tasks. Class prompts are cut at a multiple of some tokens (`Episodes.bucket`),
so that few shapes occur. Tokens behind an end token change nothing.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gram_meta.backbone.graphs import Replay, first_line
from gram_meta.method.episodes import Episode
from gram_meta.method.outer import BatchResult
from gram_meta.method.prompts import ClassText

logger = logging.getLogger("gram")


class RecordedSteps:
    """Calls `add_gradients(episode)`, which adds to `.grad` of the parameters, by replaying a graph of it.

    Args:
        add_gradients: must read nothing but the parameters and the tensors of the episode.
        parameters: theta and phi. Their `.grad` are replaced.
        record: `record(function, inputs, pool)` returns the replay.
    """

    def __init__(
        self,
        add_gradients: Callable[[Episode], BatchResult],
        parameters: Sequence[Tensor],
        record: Callable[..., Callable[..., Any]] = Replay,
    ) -> None:
        self.add_gradients, self.parameters, self.record = add_gradients, parameters, record
        self.replays: dict[Any, Callable[..., Any]] = {}  # by the shapes of an episode
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self.works = True

    def __call__(self, episode: Episode) -> BatchResult:
        """Set `.grad` of the parameters to the meta-gradients of an episode, and return its losses and norms."""
        inputs, key = [episode.topics, episode.support.images, episode.query.images], _shapes(episode)
        if self.works and key not in self.replays:
            try:
                self.replays[key] = self.record(self._function(episode), inputs, self.pool)
            except RuntimeError as error:  # of a driver, or for want of memory
                self.works = False
                self.replays.clear()
                logger.info(f"CUDA graphs: not used ({first_line(error)})")
        if not self.works:
            for parameter in self.parameters:
                parameter.grad = None
            return self.add_gradients(episode)
        losses, norms, gradients = self.replays[key](*inputs)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return BatchResult(losses.clone(), norms.clone())  # they are read later, and the next replay overwrites them

    def _function(self, like: Episode) -> Callable[..., Any]:
        """Return the step as a function of topics (B, K), and images of the support and of the query set."""

        def run(topics: Tensor, *images: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
            for parameter in self.parameters:
                parameter.grad = None
            classes = like.classes_of(topics)
            sides = zip((like.support, like.query), images, strict=True)
            support, query = (it.select(pixels, it.labels, classes) for it, pixels in sides)
            losses, norms = self.add_gradients(replace(like, topics=topics, support=support, query=query))
            return losses, norms, [parameter.grad for parameter in self.parameters]

        return run


def _shapes(episode: Episode) -> tuple[Any, ...]:
    classes = episode.support.classes
    text = classes.ids.shape if isinstance(classes, ClassText) else classes.shape
    return text, episode.support.images.shape, episode.query.images.shape
