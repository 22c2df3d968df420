"""The number of tasks in one pass through the towers in meta-training: an estimate from shapes, and a rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from yacs.config import CfgNode

from gram_meta.backbone.clip import Backbone
from gram_meta.backbone.footprint import GB, device_bytes, image_positions, pass_bytes
from gram_meta.errors import GramError
from gram_meta.method.prompts import PromptConfig
from gram_meta.method.tasks import TaskConfig

FITS = 0.5  # share of the device's memory that an estimate may take
NAME = 4  # tokens of a class on average: its name, full stop, end token
LONGEST = 8  # the same of the longest name in a step, rounded up to a multiple of 4, as steps on a GPU are (`BUCKET`)


@dataclass(frozen=True)
class MemoryConfig:
    """How a step may be divided, and what determines its size; `GramError` for values that contradict each other."""

    second_order: str = "auto"  # `whole` (all in one graph), `lean` (one graph at a time) or `auto` (whole if it fits)
    tasks: int = 0  # tasks in one pass; 0: as many as fit
    images: int = 0  # images of one side of a task in one pass; 0: as many as fit
    checkpointing: bool = False  # whether layers keep only their inputs and are recomputed in backward passes
    budget: float = 0.0  # GB that one process may fill; 0: half of the device's memory
    task: TaskConfig = TaskConfig()  # the size of a task
    prompt: PromptConfig = PromptConfig()
    first_order: bool = False  # whether support gradients are constants
    meta: bool = True  # whether there is an inner loop

    def __post_init__(self) -> None:
        if self.images and self.second_order == "whole" and self.meta:
            raise GramError("MEMORY.IMAGES: expected 0 with MEMORY.SECOND_ORDER whole, one graph for a whole task")

    @classmethod
    def from_config(cls, config: CfgNode) -> MemoryConfig:
        """Read MEMORY, TASKS, PROMPT, INNER.FIRST_ORDER and OUTER.META."""
        m = config.MEMORY
        sizes = TaskConfig.from_config(config), PromptConfig.from_config(config)
        settings = m.SECOND_ORDER, m.TASKS, m.IMAGES, bool(m.CHECKPOINTING), m.BUDGET
        return cls(*settings, *sizes, config.INNER.FIRST_ORDER, config.OUTER.META)

    def bytes_on(self, device: torch.device) -> float:
        """Return the bytes that one process may fill."""
        return self.budget * GB if self.budget else FITS * device_bytes(device)


@dataclass(frozen=True)
class MemoryPlan:
    """The content of one pass through the towers."""

    lean: bool  # one graph at a time (`bilevel.lean_backward`), not all in one
    tasks: int  # most tasks in one pass
    images: int  # most images of one side of a task, if not even one task fits; 0: all
    estimate: float  # bytes, without weights and inputs

    def __str__(self) -> str:
        graphs = "one graph at a time" if self.lean else "support and query set in one graph"
        images = f", {self.images} images of a side at a time" if self.images else ""
        tasks = f"{self.tasks} task{'s' * (self.tasks != 1)} in one pass"
        return f"{tasks}, {graphs}{images}; estimated {self.estimate / 1e9:.2g} GB"


def plan(memory: MemoryConfig, backbone: Backbone, tasks: int, budget: float) -> MemoryPlan:
    """Choose the content of one pass through the towers, for `tasks` tasks of a process and `budget` bytes.

    The first of these that fits is taken: both sides of all tasks in one graph; one graph at a time, with as many tasks
    as fit; one task, with as many images at a time as fit. Features from the store with one text prompt for all images
    always count as fitting. Under fp16 there is always one graph at a time, so that each has a scale of its own.
    """
    task = memory.task
    query = _image_bytes(memory, backbone, support=False)
    support = _image_bytes(memory, backbone, support=True) if memory.meta else 0.0
    sides = (task.ways * task.support_shots * support, task.ways * task.query_shots * query)
    small = not memory.prompt.visual_tokens and not memory.prompt.conditional
    lean = memory.second_order == "lean" or bool(memory.images)
    if memory.second_order == "auto":
        lean = lean or backbone.precision == "fp16" or (not small and tasks * sum(sides) > budget)
    lean = lean and memory.meta
    each = max(sides) if lean else sum(sides)
    count = memory.tasks or (tasks if small else int(budget // max(each, 1.0)))
    count = min(max(count, 1), tasks)
    if not lean and memory.meta:
        return MemoryPlan(lean, count, 0, count * each)
    images = memory.images
    if not images and not memory.tasks and not small and each > budget:
        images = max(1, int(budget // max(support, query)))
    if images:
        counts = [min(images, task.ways * shots) for shots in (task.support_shots, task.query_shots)]
        each = max(counts[0] * support, counts[1] * query)
    return MemoryPlan(lean, count, images, count * each)


def _image_bytes(memory: MemoryConfig, backbone: Backbone, support: bool) -> float:
    """Return the bytes of activations for one image of a task, for backward passes of its support or query set."""
    prompt, task, total = memory.prompt, memory.task, 0.0
    how = support and not memory.first_order, memory.checkpointing
    if prompt.visual_tokens:
        total += pass_bytes(backbone, "images", image_positions(backbone, prompt.visual_tokens), *how)
    if prompt.text_tokens:
        text = pass_bytes(backbone, "text", _text_positions(backbone, task.ways, prompt.text_tokens), *how)
        shots = task.support_shots if support else task.query_shots
        total += text if prompt.conditional else text / (task.ways * shots)
    return total


def _text_positions(backbone: Backbone, ways: int, tokens: int) -> int:
    """Return the positions that the text tower computes for the class prompts of a task, of topic words.

    Packed texts have the start token and the prompt once, in a rectangle each class prompt has them.
    """
    return ways * NAME + 1 + tokens if backbone.packs_texts else ways * (1 + tokens + LONGEST)
