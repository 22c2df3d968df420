"""From tasks to losses: the support and query sets of meta-training, as functions of the prompts.

Without visual prompts the feature of an image never changes, so it is read from the store. With visual prompts the
image tower runs, so worker processes decode the images ahead of their step and send them as bytes; the towers' device
normalises them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode

from gram_meta.backbone.clip import Backbone
from gram_meta.corpus.loading import run_ahead, to_device
from gram_meta.corpus.places import Places
from gram_meta.corpus.store import PairStore
from gram_meta.errors import GramError
from gram_meta.images import BadImage
from gram_meta.method.prompts import (
    META_NET,
    ClassText,
    PromptConfig,
    by_layer,
    conditional_shift,
    coupled,
    deepened,
    initial_meta_net,
    initial_prompts,
    logits,
    template_features,
)
from gram_meta.method.tasks import Task
from gram_meta.processes import worker_count


class Batches(Protocol):
    """Batches of tasks by number: a list of lists, or an object that draws them on access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sequence[Task]: ...


@dataclass(frozen=True)
class LoaderConfig:
    """How images are read."""

    workers: int = -1  # processes that decode ahead; 0: none; -1: one for each core, up to 8
    prefetch: int = 2  # batches of tasks that each of them keeps ready
    image_root: str = ""  # folder that the images' locations are relative to; "": where `gram embed` read them

    @classmethod
    def from_config(cls, config: CfgNode) -> LoaderConfig:
        """Read the LOADER node."""
        return cls(config.LOADER.WORKERS, config.LOADER.PREFETCH, config.LOADER.IMAGE_ROOT)


@dataclass(frozen=True)
class Episode:
    """B tasks with the losses of both their sides."""

    tasks: Sequence[Task]
    topics: Tensor  # (B, K)
    support: TaskSet
    query: TaskSet
    classes_of: Callable[[Tensor], ClassText | Tensor]  # topics -> their class prompts, or class features (B, K, D)

    def parts(self, tasks: int) -> list[Episode]:
        """Return episodes of at most `tasks` of the tasks each."""
        if tasks >= len(self.tasks):
            return [self]
        return [self._of(slice(start, start + tasks)) for start in range(0, len(self.tasks), tasks)]

    def _of(self, part: slice) -> Episode:
        topics = self.topics[part]
        classes, sides = self.classes_of(topics), (self.support, self.query)
        support, query = (it.select(it.images[part], it.labels[part], classes) for it in sides)
        return Episode(self.tasks[part], topics, support, query, self.classes_of)


class Episodes:
    """Turns batches of tasks over one store into episodes.

    Args:
        backbone: frozen CLIP.
        store: the images' features, and for visual prompts the places of their files.
        words: label text of each topic.
        prompt: the prompts to meta-train.
        loader: how image files are read.
        batch: B, tasks of a training step.
        temperature: of the query loss.

    Attributes:
        bucket: class prompts are cut at a multiple of so many tokens; 1 makes them shortest.
        at_a_time: tasks in one pass of an evaluation; no more than in a training step if every image goes through the
            tower, or has separate class prompts.

    Raises:
        GramError: visual prompts, but an image file is missing.
    """

    def __init__(
        self,
        backbone: Backbone,
        store: PairStore,
        words: Sequence[str],
        prompt: PromptConfig,
        loader: LoaderConfig,
        batch: int,
        temperature: float = 1.0,
    ) -> None:
        self.backbone, self.store, self.loader, self.temperature = backbone, store, loader, temperature
        self.reads_pixels = prompt.visual_tokens > 0
        self.bucket = 1
        self.at_a_time = batch if self.reads_pixels or prompt.conditional else max(16, batch)
        names = prompt.before_names(words)
        self.text = ClassText(backbone, names, prompt.text_tokens) if prompt.text_tokens else None
        self.lengths = self.text.ends.cpu().numpy() + 1 if self.text else np.empty(0)  # (L,), of the class prompts
        self.fixed = None if self.text else template_features(backbone, words, prompt.template)  # (L, D)
        if self.reads_pixels:
            self.places = store.places(loader.image_root or None)
            self._check_images()

    @classmethod
    def from_config(cls, backbone: Backbone, store: PairStore, words: Sequence[str], config: CfgNode) -> Episodes:
        """Read PROMPT, LOADER, OUTER.BATCH and OUTER.TEMPERATURE."""
        prompt, loader = PromptConfig.from_config(config), LoaderConfig.from_config(config)
        return cls(backbone, store, words, prompt, loader, config.OUTER.BATCH, config.OUTER.TEMPERATURE)

    def of(self, batches: Batches) -> Iterator[Episode]:
        """Yield the episodes of these batches of tasks, in order; LOADER.WORKERS processes decode pixels ahead.

        Raises `GramError` if an image cannot be read any more, or if a worker process died.
        """
        device, workers, pin = self.backbone.device, 0, False
        read: Callable[[int], tuple[Sequence[Task], Tensor, Tensor]] = partial(self._features, batches)
        if self.reads_pixels:
            transform = self.backbone.preprocess(as_bytes=True, on_tensors=self.store.crops_tensors)
            read = partial(read_pixels, batches, self.places, transform)
            workers, pin = min(worker_count(self.loader.workers), len(batches)), device.type == "cuda"
        advice = f"expected enough memory for {workers} of them, try a smaller LOADER.WORKERS"
        for tasks, *images in run_ahead(read, range(len(batches)), workers, advice, self.loader.prefetch, pin):
            numbers = np.stack([task.topics for task in tasks])  # (B, K)
            topics = to_device(torch.from_numpy(numbers), device)
            classes_of = partial(self._classes, self._length(numbers))
            classes = classes_of(topics)
            support, query = (
                TaskSet(self.backbone, classes, side.to(device, non_blocking=True), temperature)
                for side, temperature in zip(images, (1.0, self.temperature), strict=True)
            )
            yield Episode(tasks, topics, support, query, classes_of)

    def _length(self, topics: np.ndarray) -> int:
        """Return the tokens at which the class prompts of these topics are cut."""
        if self.text is None:
            return 0
        longest, most = int(self.lengths[topics].max()), int(self.lengths.max())
        return min(-(-longest // self.bucket) * self.bucket, most)

    def _classes(self, length: int, topics: Tensor) -> ClassText | Tensor:
        """Return the class prompts of topics (B, K), cut at `length` tokens, or their class features (B, K, D)."""
        if self.text is not None:
            return self.text.select(topics, length)
        assert self.fixed is not None  # one of the two, by construction
        return self.fixed[topics]

    def _features(self, batches: Batches, index: int) -> tuple[Sequence[Task], Tensor, Tensor]:
        """Return the tasks of a batch with the stored features (B, K, n, D) of their support and query images."""
        tasks = batches[index]
        sides = []
        for side in ("support", "query"):
            rows = np.stack([getattr(task, side) for task in tasks])  # (B, K, n)
            flat = np.ascontiguousarray(self.store.image_features[rows.reshape(-1)])
            features = to_device(torch.from_numpy(flat), self.backbone.device).to(self.backbone.logit_scale.dtype)
            sides.append(features.unflatten(0, rows.shape))
        return tasks, sides[0], sides[1]

    def _check_images(self) -> None:
        try:
            self.places.reader.content(self.places.place(0))
        except BadImage:
            what = f"an image of {self.store.path} for visual prompts, found no such file"
            raise GramError(f"{self.places.name(0)}: expected {what} (LOADER.IMAGE_ROOT says where they are)") from None


def read_pixels(
    batches: Batches, places: Places, transform: Callable[[Any], Tensor], index: int
) -> tuple[Sequence[Task], Tensor, Tensor]:
    """Return the tasks of a batch with their support and query images, as bytes (B, K, n, 3, H, W).

    Worker processes run this function, so it takes no towers and no features. Raises `GramError` for an image that
    cannot be read any more.
    """
    tasks = batches[index]
    sides = []
    for side in ("support", "query"):
        rows = np.stack([getattr(task, side) for task in tasks])  # (B, K, n)
        images = []
        for row in rows.reshape(-1).tolist():
            try:
                image = places.image(row)
            except BadImage as reason:
                raise GramError(
                    f"{places.name(row)}: expected the image that `gram embed` read, found {reason}"
                ) from None
            images.append(transform(image))  # (3, H, W)
        sides.append(torch.stack(images).unflatten(0, rows.shape))
    return tasks, sides[0], sides[1]


class TimedIterator:
    """Iterates over episodes and measures the share of time that the caller waited for them, after the first one."""

    def __init__(self, items: Iterator[Episode]) -> None:
        self.items = items
        self.begun = self.waited = 0.0

    def __iter__(self) -> Iterator[Episode]:
        asked = 0.0
        for item in self.items:
            now = time.perf_counter()
            if self.begun:
                self.waited += now - asked
            else:
                self.begun = now
            yield item
            asked = time.perf_counter()

    def waiting_share(self) -> float:
        return self.waited / max(time.perf_counter() - self.begun, 1e-9)


class TaskSet:
    """The support or the query side of B tasks: prompts -> one cross-entropy per task.

    Args:
        backbone: frozen CLIP.
        classes: the tasks' class prompts (with leading axes (B, K)), or fixed class features (B, K, D).
        images: features (B, K, n, D), or bytes (B, K, n, 3, H, W); `images[:, k]` belong to class k.
        temperature: what losses divide logits by.
    """

    def __init__(
        self, backbone: Backbone, classes: ClassText | Tensor, images: Tensor, temperature: float = 1.0
    ) -> None:
        batch, ways, shots = images.shape[:3]
        self.backbone, self.classes, self.temperature = backbone, classes, temperature
        self.images = images.flatten(1, 2)  # (B, K n, D) or (B, K n, 3, H, W)
        self.labels = (torch.arange(ways * shots, device=images.device) // shots).expand(batch, -1)  # (B, K n)
        self.count = ways * shots  # of a whole task; the losses of a part are its share of the mean

    def parts(self, images: int = 0) -> list[TaskSet]:
        """Return the tasks in parts of at most `images` images each (0: all); the parts' losses sum to the whole's."""
        if not images or images >= self.labels.shape[1]:
            return [self]
        parts = zip(self.images.split(images, dim=1), self.labels.split(images, dim=1), strict=True)
        return [self.select(some, labels) for some, labels in parts]

    def select(self, images: Tensor, labels: Tensor, classes: ClassText | Tensor | None = None) -> TaskSet:
        """Return the same for some of the images and their labels, or for some of the tasks, with their classes."""
        chosen = copy(self)
        chosen.images, chosen.labels = images, labels
        if classes is not None:
            chosen.classes = classes
        return chosen

    def __call__(self, prompts: Mapping[str, Tensor]) -> Tensor:
        """Return the mean cross-entropy of each task, (B,)."""
        return self.losses_of(self.logits(prompts))

    def logits(self, prompts: Mapping[str, Tensor]) -> Tensor:
        """Return the logits (B, K n, K) for prompts (B, M, d) or (B, layers, M, d) by kind.

        Parameters beside the prompts, of a meta-net or of coupling functions, have an axis B too.
        """
        features, visual = self.images, coupled(prompts)
        if features.dim() > 3:  # bytes
            batch, count = features.shape[:2]
            tokens = () if visual is None else by_layer(visual.repeat_interleave(count, dim=0), 3)  # (B K n, M, d)
            pixels = self.backbone.normalise(features.flatten(0, 1))  # (B K n, 3, H, W)
            features = self.backbone.encode_images(pixels, *tokens).unflatten(0, (batch, count))  # (B, K n, D)
        scale = self.backbone.logit_scale
        if isinstance(self.classes, Tensor):
            return logits(features, self.classes, scale)
        net = {name.removeprefix(META_NET): p for name, p in prompts.items() if name.startswith(META_NET)}
        if not net:
            return logits(features, self.classes.features(*by_layer(prompts["text"], 3)), scale)
        shift = conditional_shift(net, features)  # (B, K n, d)
        context = prompts["text"][:, None] + shift[:, :, None]  # (B, K n, M, d)
        classes = self.classes.features(context)  # (B, K n, K, D)
        return logits(features[:, :, None], classes, scale).squeeze(2)

    def losses_of(self, scores: Tensor) -> Tensor:
        """Return the loss of each task, (B,), of logits (B, K n, K)."""
        if self.temperature != 1:
            scores = scores / self.temperature
        losses = F.cross_entropy(scores.transpose(1, 2), self.labels, reduction="none")  # (B, K n)
        return losses.mean(dim=1) if losses.shape[1] == self.count else losses.sum(dim=1) / self.count

    def accuracies_of(self, scores: Tensor) -> Tensor:
        """Return the accuracy of each task, (B,), between 0 and 1, of logits (B, K n, K)."""
        return (scores.argmax(dim=2) == self.labels).float().mean(dim=1)


def initial_theta(backbone: Backbone, config: PromptConfig, seed: int) -> dict[str, Tensor]:
    """Return the initial theta of meta-training as leaves with gradients: prompts, and what is learned beside them.

    It is float32 for every number type of the towers but fp64, which is for checks and has a float64 theta.
    """
    sizes = config.text_tokens, config.visual_tokens
    theta = initial_prompts(backbone, *sizes, config.words, seed, config.visual_start)
    theta = deepened(backbone, theta, config, seed)
    if config.conditional:
        net = initial_meta_net(backbone, seed)
        theta |= {f"{META_NET}{name}": value for name, value in net.items()}
    return {name: value.to(backbone.logit_scale.dtype).requires_grad_() for name, value in theta.items()}
