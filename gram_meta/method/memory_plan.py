"""How much of a batch of tasks goes through the towers at a time in meta-training: an estimate from shapes, and a rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from yacs.config import CfgNode

from gram_meta.backbone.clip import Backbone
from gram_meta.backbone.footprint import GB, device_bytes, image_positions, pass_bytes
from gram_meta.errors import GramError

FITS = 0.5  # share of the device's memory that an estimate may take


@dataclass(frozen=True)
class Plan:
    """What one pass through the towers holds.

    Attributes:
        lean: one graph at a time (`bilevel.lean_backward`), not all in one.
        tasks: at most so many tasks. images: at most so many images of one side of a task, for tasks of which only one
            fits; 0: all of them.
        estimate: bytes, above weights and inputs.
    """

    lean: bool
    tasks: int
    images: int
    estimate: float

    def __str__(self) -> str:
        if self.lean:
            graphs = "one graph at a time"
        else:
            graphs = "support and query set in one graph"
        images = f", {self.images} images of a side at a time" if self.images else ""
        return f"{self.tasks} task{'s' * (self.tasks != 1)} in one pass, {graphs}{images}; estimated {self.estimate / 1e9:.2g} GB"


def plan(config: CfgNode, backbone: Backbone, tasks: int, budget: float) -> Plan:
    """The MEMORY settings, filled in for `tasks` tasks of a process and `budget` bytes.

    Where both sides of all tasks fit in one graph, so it is; else one graph at a time, with as many tasks as fit; else one
    task, with as many images at a time as fit. Features from the store with a text prompt for all images always count as
    fitting. Under fp16 it is one graph at a time in any case, as each then has a scale of its own.

    Raises:
        GramError: values that mean nothing.
    """
    memory = config.MEMORY
    if memory.SECOND_ORDER not in ("auto", "whole", "lean"):
        raise GramError(f"MEMORY.SECOND_ORDER: expected auto, whole or lean, found {memory.SECOND_ORDER!r}")
    for key in ("TASKS", "IMAGES", "BUDGET"):
        if memory[key] < 0:
            raise GramError(f"MEMORY.{key}: expected 0 or more, found {memory[key]}")
    if memory.IMAGES and memory.SECOND_ORDER == "whole" and config.OUTER.META:
        raise GramError(
            "MEMORY.IMAGES: expected 0 with MEMORY.SECOND_ORDER whole, which has all images of a task in one graph"
        )
    query, support = image_bytes(config, backbone, False), image_bytes(config, backbone, True)
    if not config.OUTER.META:
        support = 0.0
    sides = (
        config.TASKS.WAYS * config.TASKS.SUPPORT_SHOTS * support,
        config.TASKS.WAYS * config.TASKS.QUERY_SHOTS * query,
    )
    small = not config.PROMPT.VISUAL_TOKENS and not config.PROMPT.CONDITIONAL
    lean = memory.SECOND_ORDER == "lean" or bool(memory.IMAGES)
    if memory.SECOND_ORDER == "auto":
        lean = lean or backbone.precision == "fp16" or (not small and tasks * sum(sides) > budget)
    lean = lean and config.OUTER.META
    each = max(sides) if lean else sum(sides)
    count = memory.TASKS or (tasks if small else int(budget // max(each, 1.0)))
    count = min(max(count, 1), tasks)
    images = memory.IMAGES
    may_split = lean or not config.OUTER.META
    if may_split and not images and not memory.TASKS and not small and each > budget:
        images = max(1, int(budget // max(support, query)))
    if may_split and images:
        shots = (config.TASKS.SUPPORT_SHOTS, config.TASKS.QUERY_SHOTS)
        counts = [min(images, config.TASKS.WAYS * each_shots) for each_shots in shots]
        each = max(counts[0] * support, counts[1] * query)
    return Plan(lean, count, images if may_split else 0, count * each)


def image_bytes(config: CfgNode, backbone: Backbone, support: bool) -> float:
    """Return the bytes of activations for one image of a task, for the support set's or the query set's backward passes."""
    prompt, total = config.PROMPT, 0.0
    how = support and not config.INNER.FIRST_ORDER, bool(config.MEMORY.CHECKPOINTING)
    if prompt.VISUAL_TOKENS:
        total += pass_bytes(backbone, "images", image_positions(backbone, prompt.VISUAL_TOKENS), *how)
    if prompt.TEXT_TOKENS:
        positions = config.TASKS.WAYS * 4 + 1 + prompt.TEXT_TOKENS  # a class: its name, full stop, end token
        text = pass_bytes(backbone, "text", positions, *how)
        shots = config.TASKS.SUPPORT_SHOTS if support else config.TASKS.QUERY_SHOTS
        total += text if prompt.CONDITIONAL else text / (config.TASKS.WAYS * shots)
    return total


def budget_of(config: CfgNode, device: torch.device) -> float:
    """Return the bytes that one process may fill: MEMORY.BUDGET, or half of its device's memory."""
    return config.MEMORY.BUDGET * GB if config.MEMORY.BUDGET else FITS * device_bytes(device)
