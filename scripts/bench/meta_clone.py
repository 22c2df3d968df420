"""The meta-step as it is written with learn2learn: clone the prompted model, adapt the clone, backward, next task.

In our own words after its `MAML.clone` and `MAML.adapt` (learn2learn 0.2): a clone is a module of the same structure
whose parameters are `torch.clone`s, frozen ones too, so that gradients of the clone reach the original. Adapting
replaces each learned parameter by itself minus alpha times its regulated gradient (Eq. 7), with the gradient's graph.
The model has clip's own modules around prompts, and only the towers that its family of prompts runs.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gram_meta.backbone.clip import Backbone
from gram_meta.backbone.second_order import twice_differentiable
from gram_meta.method.bilevel import InnerLoop
from gram_meta.method.episodes import Episode, TaskSet
from gram_meta.method.prompts import logits

Classes = common.PlainClassText | Tensor  # of one task: class sentences, or features (K, D)


class PromptedModel(nn.Module):
    """clip's modules with a text prompt, a visual prompt, or both, as its parameters; all others are frozen."""

    def __init__(self, backbone: Backbone, theta: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        clip = backbone.model
        self.scale, self.normalise = backbone.logit_scale, backbone.normalise
        self.prompts = nn.ParameterDict(theta)
        if "text" in theta:
            self.transformer, self.ln_final = clip.transformer, clip.ln_final
            self.positional_embedding, self.text_projection = clip.positional_embedding, clip.text_projection
        if "visual" in theta:
            self.visual = clip.visual

    def forward(self, images: Tensor, classes: Classes) -> Tensor:
        """Return logits (n, K) of features (n, D) or bytes (n, 3, H, W)."""
        features = images if images.dim() == 2 else self.image_features(images)
        text = classes if isinstance(classes, Tensor) else classes.features(self.prompts["text"], self)
        return logits(features, text, self.scale)

    def image_features(self, images: Tensor) -> Tensor:
        """Return (n, D), L2-normalised."""
        tower = self.visual
        x = tower.conv1(self.normalise(images).to(tower.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([tower.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = x + tower.positional_embedding.to(x.dtype)
        x = torch.cat([x, self.prompts["visual"].expand(len(x), -1, -1)], dim=1)  # (n, 1 + patches + M, d)
        x = tower.transformer(tower.ln_pre(x).transpose(0, 1)).transpose(0, 1)
        return F.normalize(tower.ln_post(x[:, 0]) @ tower.proj, dim=-1)


def clone_and_adapt(model: PromptedModel, episode: Episode, classes: Sequence[Classes], inner: InnerLoop) -> Tensor:
    """Return the mean query loss (Algorithm 1, lines 4 to 9); add its gradients to `.grad` of the prompts and of phi.

    Only what is differentiated twice runs on attention that can be; the query pass keeps the fused kernel.
    """
    losses = []
    for task, texts in enumerate(classes):
        learner = cloned(model)
        with nullcontext() if inner.first_order else twice_differentiable():
            adapt(learner, loss_of(learner, episode.support, task, texts), inner)
        loss = loss_of(learner, episode.query, task, texts) / len(classes)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def loss_of(model: nn.Module, side: TaskSet, task: int, classes: Classes) -> Tensor:
    """Return the cross-entropy of one task's support or query set."""
    return F.cross_entropy(model(side.images[task], classes), side.labels[task])


def cloned(module: nn.Module) -> nn.Module:
    """Return a module of the same structure whose parameters are clones, still connected to the original's."""
    twin = copy.copy(module)
    twin._parameters = {name: None if value is None else value.clone() for name, value in module._parameters.items()}
    twin._modules = {name: None if child is None else cloned(child) for name, child in module._modules.items()}
    return twin


def adapt(model: nn.Module, loss: Tensor, inner: InnerLoop) -> None:
    """Take one inner step of a cloned model, in place of its own prompts; differentiable."""
    prompts = model.prompts._parameters
    gradients = torch.autograd.grad(loss, list(prompts.values()), create_graph=not inner.first_order)
    regulated = inner.regulate({kind: g[None] for kind, g in zip(prompts, gradients, strict=True)})
    for kind, value in prompts.items():
        prompts[kind] = value - inner.alpha * regulated[kind][0]
