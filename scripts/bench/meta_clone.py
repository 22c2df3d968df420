"""The meta-step as it is written with learn2learn: clone the prompted model, adapt the clone, backward, next task.

In our own words after its `MAML.clone` and `MAML.adapt` (learn2learn 0.2): a clone is a module of the same structure whose
parameters are `torch.clone`s, so that gradients of the clone reach the original; frozen weights are cloned with the rest.
Adapting replaces each learnable parameter by itself minus alpha times its gradient (here the regulated one, Eq. 7), with
the gradient's own graph kept. The model is clip's own modules around prompts: 77 positions through its text transformer,
images through its image tower with the prompt tokens behind the patches. It has the towers alone that its family runs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gram_meta.backbone.clip import Backbone
from gram_meta.method.bilevel import Regulate, twice_differentiable
from gram_meta.method.prompts import logits


@dataclass(frozen=True)
class PlainTask:
    """One task: images (K n, D) or bytes (K n, 3, H, W) of both sides, class by class; class sentences or features (K, D)."""

    support: Tensor
    query: Tensor
    classes: common.PlainClassText | Tensor


class PromptedModel(nn.Module):
    """clip's modules with a text prompt, a visual prompt, or both, as its parameters; all others are frozen."""

    def __init__(self, backbone: Backbone, theta: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        clip = backbone.model
        self.scale, self.normalise = backbone.logit_scale, backbone.normalise
        self.text_prompt, self.visual_prompt = theta.get("text"), theta.get("visual")
        if self.text_prompt is not None:
            self.transformer, self.ln_final = clip.transformer, clip.ln_final
            self.positional_embedding, self.text_projection = (clip.positional_embedding, clip.text_projection)
        if self.visual_prompt is not None:
            self.visual = clip.visual

    def forward(self, images: Tensor, classes: common.PlainClassText | Tensor) -> Tensor:
        """Logits (n, K)."""
        features = images if images.dim() == 2 else self.image_features(images)
        text = classes if isinstance(classes, Tensor) else classes.features(self.text_prompt, self)
        return logits(features, text, self.scale)

    def image_features(self, images: Tensor) -> Tensor:
        """(n, D), L2-normalised."""
        tower = self.visual
        x = tower.conv1(self.normalise(images).to(tower.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([tower.class_embedding.expand(len(x), 1, -1), x], dim=1) + tower.positional_embedding
        x = torch.cat([x, self.visual_prompt.to(x.dtype).expand(len(x), -1, -1)], dim=1)  # (n, 1 + patches + M, d)
        x = tower.transformer(tower.ln_pre(x).transpose(0, 1)).transpose(0, 1)
        x = tower.ln_post(x[:, 0]) @ tower.proj
        return x / x.norm(dim=-1, keepdim=True)


def clone_and_adapt(
    model: PromptedModel, tasks: Sequence[PlainTask], alpha: float, regulate: Regulate, first_order: bool = False
) -> Tensor:
    """Algorithm 1, lines 4 to 9: the mean query loss; gradients gather in the model's prompts and in phi's parameters.

    Only what is differentiated twice runs on attention that can be; the query pass keeps the fused kernel.
    """
    total = tasks[0].support.new_zeros((), dtype=model.scale.dtype)
    for task in tasks:
        learner = cloned(model)
        with nullcontext() if first_order else twice_differentiable():
            loss = cross_entropy(learner(task.support, task.classes))
            adapt(learner, loss, alpha, regulate, first_order)
        loss = cross_entropy(learner(task.query, task.classes)) / len(tasks)
        loss.backward()
        total += loss.detach()
    return total


def cross_entropy(scores: Tensor) -> Tensor:
    """Of logits (K n, K) whose rows come class by class."""
    ways = scores.shape[1]
    labels = torch.arange(ways, device=scores.device).repeat_interleave(len(scores) // ways)
    return F.cross_entropy(scores, labels)


def cloned(module: nn.Module) -> nn.Module:
    """A module of the same structure whose parameters are clones, still connected to the original's."""
    twin = copy.copy(module)
    twin._parameters = {name: None if value is None else value.clone() for name, value in module._parameters.items()}
    twin._modules = {name: None if child is None else cloned(child) for name, child in module._modules.items()}
    return twin


def adapt(model: PromptedModel, loss: Tensor, alpha: float, regulate: Regulate, first_order: bool) -> None:
    """One inner step of a cloned model, in place of its own parameters; differentiable."""
    learned = {name: value for name, value in model.named_parameters() if value.requires_grad}
    gradients = torch.autograd.grad(loss, list(learned.values()), create_graph=not first_order)
    kinds = {name.removesuffix("_prompt"): gradient[None] for name, gradient in zip(learned, gradients, strict=True)}
    regulated = regulate(kinds)
    for name, value in learned.items():
        model._parameters[name] = value - alpha * regulated[name.removesuffix("_prompt")][0]


def in_double(backbone: Backbone) -> None:
    """OpenAI's layer norm casts to float32; in float64 it is torch's."""
    for module in backbone.model.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = nn.LayerNorm
