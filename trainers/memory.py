"""The activations that a training step keeps for its backward pass or computes twice (TRAINER.MEMORY.*).

The class prompts of a learned text prompt, and the images of a learned visual one, leave activations in every layer
of their tower. Their size follows from shapes (`backbone.footprint`), so the choice made here is the same in every run.

- *Text*: if all classes together would take more than TEXT_BUDGET (0: a quarter of a GPU's memory, 1 GB on a CPU), they
  are encoded in equal parts that take less. Each part is computed twice, and one part's activations exist at a time.
- *Images*: if a batch would take more than IMAGE_BUDGET, each layer keeps only its inputs and is computed twice.
"""

from typing import Any

from torch import Tensor

from gram_meta.backbone import footprint
from gram_meta.backbone.clip import Backbone
from gram_meta.backbone.footprint import GB, device_bytes, image_bytes
from gram_meta.method.prompts import ClassText, ConditionalCLIP, PromptedCLIP


def arrange(model: PromptedCLIP, options: Any, batch: int) -> list[str]:
    """Choose the activations that the training steps of a classifier keep.

    Args:
        model: its `class_text.chunk` and `backbone.checkpointing` are set.
        options: the node TRAINER.MEMORY: CHECKPOINTING, CLASSES, TEXT_BUDGET, IMAGE_BUDGET.
        batch: images in a step.

    Returns:
        Lines for the log, one for each tower that computes anything twice.
    """
    text, visual = model.class_text, model.prompt_learner.visual_ctx
    lines: list[str] = []
    towers = []  # whose layers are computed twice
    if text is not None:
        images = batch if isinstance(model, ConditionalCLIP) else 1
        text.chunk = class_chunk(text, options, images)
        if text.chunk:
            size = f"{images * len(text.ends)} class sentences leave about {images * text_bytes(text) / GB:.2f} GB"
            done = f"they are computed twice instead, {text.chunk} at a time (TRAINER.MEMORY.CLASSES)"
            lines.append(f"Memory: {size} behind for the backward pass; {done}")
        elif options.CHECKPOINTING == "always":
            towers.append("text")
    if visual is not None and checkpoints_images(model.backbone, options, batch, len(visual)):
        towers.append("images")
        lines.append(
            f"Memory: {batch} images leave about {image_bytes(model.backbone, batch, len(visual)) / GB:.2f} GB behind "
            "for the backward pass; every layer of the image tower is computed twice instead "
            "(TRAINER.MEMORY.CHECKPOINTING)"
        )
    model.backbone.checkpointing = towers[0] if len(towers) == 1 else bool(towers)
    return lines


def class_chunk(text: ClassText, options: Any, images: int = 1) -> int:
    """Return the class prompts at a time (`ClassText.chunk`): CLASSES, or as few equal parts as fit; 0: all at once.

    With a prompt per image, each of `images` has its own class prompts.
    """
    classes, each, device = len(text.ends), text_bytes(text), text.backbone.device
    most = options.TEXT_BUDGET * GB or (device_bytes(device) / 4 if device.type == "cuda" else GB)
    if options.CLASSES:
        return options.CLASSES if options.CLASSES < images * classes else 0
    if options.CHECKPOINTING == "never" or images * each <= most:
        return 0
    if each <= most:  # all classes of some images at a time
        return classes * int(most // each)
    pieces = 2
    while pieces < classes and _largest_part(text, -(-classes // pieces)) > most:
        pieces += 1
    return -(-classes // pieces)


def checkpoints_images(backbone: Backbone, options: Any, batch: int, prompt: int) -> bool:
    """Return whether the image tower's layers are computed twice."""
    if options.CHECKPOINTING != "auto":
        return bool(options.CHECKPOINTING == "always")
    most = options.IMAGE_BUDGET * GB or device_bytes(backbone.device) / 2
    return image_bytes(backbone, batch, prompt) > most


def text_bytes(text: ClassText, ends: Tensor | None = None) -> int:
    """Return what the text tower keeps for a backward pass of class prompts: all, or those of `ends` (N,)."""
    slots = 1 + text.tokens  # the start token and the prompt
    shared, unshared = (0, slots) if text.placed else (slots, 0)  # a placed prompt is repeated in every class prompt
    return footprint.text_bytes(text.backbone, text.ends if ends is None else ends, shared, unshared)


def _largest_part(text: ClassText, size: int) -> int:
    """Return the most that a part takes if the class prompts are sorted by length."""
    return max(text_bytes(text, ends) for ends in text.ends.sort().values.split(size))
