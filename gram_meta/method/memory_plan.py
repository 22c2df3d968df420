"""How much of a batch of tasks goes through the towers at a time in meta-training: an estimate from shapes, and a rule.

Bytes that backward passes need, for one position of one transformer layer of width d, in units of d numbers: FIRST for
first order, SECOND for second order; with activation checkpointing KEPT for every layer (three times that for second
order), and one layer in full. The constants were measured on a CPU (docs/results/meta-training.md); a number of 16 bits
counts 3 bytes, as layer norms keep float32.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from yacs.config import CfgNode

from gram_meta.backbone.clip import Backbone
from gram_meta.errors import GramError

FIRST, SECOND, KEPT = 15.0, 36.0, 6.0
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
    """Bytes of activations for one image of a task, kept for the support set's or the query set's backward passes."""
    second = support and not config.INNER.FIRST_ORDER
    each = 3.0 if backbone.precision in ("bf16", "fp16") else 8.0 if backbone.precision == "fp64" else 4.0
    total = 0.0
    prompt = config.PROMPT
    if prompt.VISUAL_TOKENS:
        tower = backbone.model.visual
        positions = tower.positional_embedding.shape[0] + prompt.VISUAL_TOKENS
        total += _tower(tower.transformer, backbone.visual_width, positions, second, config, each)
    if prompt.TEXT_TOKENS:
        positions = config.TASKS.WAYS * 4 + 1 + prompt.TEXT_TOKENS  # a class: its name, full stop, end token
        text = _tower(backbone.model.transformer, backbone.text_width, positions, second, config, each)
        shots = config.TASKS.SUPPORT_SHOTS if support else config.TASKS.QUERY_SHOTS
        total += text if prompt.CONDITIONAL else text / (config.TASKS.WAYS * shots)
    return total


def _tower(tower: Any, width: int, positions: int, second: bool, config: CfgNode, each: float) -> float:
    layers = len(tower.resblocks)
    whole, kept = (SECOND, 3 * KEPT) if second else (FIRST, KEPT)
    units = layers * kept + whole if config.MEMORY.CHECKPOINTING else layers * whole
    return each * positions * width * units


def budget_of(config: CfgNode, device: torch.device) -> float:
    """Bytes that one process may fill: MEMORY.BUDGET, or half of its device's memory."""
    if config.MEMORY.BUDGET:
        return config.MEMORY.BUDGET * 1e9
    if device.type == "cuda":
        return FITS * torch.cuda.get_device_properties(device).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return FITS * whole / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
