"""Random meta-training tasks with theta and phi: the set-up of every benchmark of a meta-training step."""

from collections.abc import Callable, Sequence

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gram_meta.backbone.clip import Backbone
from gram_meta.method.bilevel import InnerLoop
from gram_meta.method.episodes import Episode, TaskSet, initial_theta
from gram_meta.method.memory_plan import MemoryPlan
from gram_meta.method.outer import BatchResult, OuterLoop, add_meta_gradients, parameters_of
from gram_meta.method.prompts import KINDS, ClassText, PromptConfig, template_features
from gram_meta.method.recorded import RecordedSteps
from gram_meta.method.regulator import GradientRegulator

FAMILIES = {
    "text": PromptConfig(4, 0, "a photo of a"),
    "visual": PromptConfig(0, 4),
    "joint": PromptConfig(2, 2, "a photo"),
    "maple": PromptConfig(2, 2, "a photo", family="maple", text_depth=2, visual_depth=2),
}
Classes = ClassText | Tensor


class MetaTasks:
    """B tasks (`ways` classes, `shots`: support and query images of a class), theta and phi, and a step of Algorithm 1.

    Images are random. Text prompts take image features, as they do not change; visual prompts take pixels. Learning
    rates are zero, so that every step starts at the same point.
    """

    def __init__(self, backbone: Backbone, family: str, tasks: int, ways: int, shots: tuple[int, int]) -> None:
        self.backbone, self.prompt, self.tasks = backbone, FAMILIES[family], tasks
        self.draw = draw = torch.Generator().manual_seed(0)
        words = common.topic_words(100)
        topics = torch.stack([torch.randperm(100, generator=draw)[:ways] for _ in range(tasks)])  # (B, K)
        self.topics = topics.to(backbone.device)
        self.words = [[words[topic] for topic in row] for row in topics.tolist()]  # (B, K)
        if self.prompt.text_tokens:
            text = ClassText(backbone, words, self.prompt.text_tokens)
            length = int(text.ends[self.topics].max()) + 1
            self.classes_of: Callable[[Tensor], Classes] = lambda topics: text.select(topics, length)
        else:
            fixed = template_features(backbone, words)  # (100, D)
            self.classes_of = lambda topics: fixed[topics]
        self.images = [self._images((tasks, ways, count)) for count in shots]  # (B, K, n, ...) of both sides
        self.episode = self.episode_of(self.classes_of)
        self.theta = {kind: nn.Parameter(value) for kind, value in initial_theta(backbone, self.prompt, 0).items()}
        self.kinds = sorted(set(self.theta) & set(KINDS))  # without coupling functions, which R^phi does not regulate
        widths = {kind: self.theta[kind].shape[-1] for kind in self.kinds}
        self.regulator = GradientRegulator(widths).to(backbone.device, backbone.logit_scale.dtype)
        self.outer = OuterLoop(batch=tasks, lr_prompt=0.0, lr_regulator=0.0, cosine=False)
        self.optimiser = self.outer.build_optimiser(self.theta, self.regulator)
        self.parameters = parameters_of(self.optimiser)

    def _images(self, shape: tuple[int, int, int]) -> Tensor:
        """Return features (B, K, n, D), or bytes (B, K, n, 3, H, W) where the image tower has to run."""
        side, device = self.backbone.image_size, self.backbone.device
        if self.prompt.visual_tokens:
            return torch.randint(256, (*shape, 3, side, side), generator=self.draw, dtype=torch.uint8).to(device)
        features = torch.randn(*shape, self.backbone.embed_dim, generator=self.draw)
        return F.normalize(features, dim=-1).to(device, self.backbone.logit_scale.dtype)

    def episode_of(self, classes_of: Callable[[Tensor], Classes]) -> Episode:
        """Return the tasks with these class prompts, or class features."""
        return self._episode(classes_of, self.topics, self.images)

    def other_episode(self) -> Episode:
        """Return tasks of equal shapes with new images; classes have other places in other tasks."""
        images = [self._images(side.shape[:3]) for side in self.images]  # type: ignore[arg-type]
        return self._episode(self.classes_of, self.topics.flip(0, 1), images)

    def _episode(self, classes_of: Callable[[Tensor], Classes], topics: Tensor, images: Sequence[Tensor]) -> Episode:
        classes = classes_of(topics)
        support, query = (TaskSet(self.backbone, classes, side) for side in images)
        return Episode(range(self.tasks), topics, support, query, classes_of)  # type: ignore[arg-type]

    def inner(self, **changes: object) -> InnerLoop:
        """Return the settings of the inner loop: the defaults, with R^phi."""
        return InnerLoop(**{"regulate": self.regulator.regulate_known, **changes})  # type: ignore[arg-type]

    def add_gradients(self, plan: MemoryPlan, inner: InnerLoop, episode: Episode | None = None) -> BatchResult:
        """Add the meta-gradients of the mean query loss to `.grad`, as meta-training does."""
        episode = episode or self.episode
        return add_meta_gradients(episode, self.theta, self.kinds, self.parameters, inner, self.outer, plan)

    def recorded(self, plan: MemoryPlan, inner: InnerLoop) -> RecordedSteps:
        """Return the same as a function of an episode, as a CUDA graph."""
        return RecordedSteps(lambda episode: self.add_gradients(plan, inner, episode), self.parameters)
