"""What a training step keeps for its backward pass, and what it computes again instead (TRAINER.MEMORY.*).

The class sentences of a learned text prompt, and the images of a learned visual one, leave activations behind in every
layer of their tower. Their size is known beforehand from shapes alone, so the choice made here is the same in every run:
it does not ask how much memory happens to be free.

- *Text*: where all classes together would take more than TEXT_GB, they are encoded in parts of equal number that do not;
  each part is computed twice, and one part's activations are alive at a time.
- *Images*: where a batch would take more than IMAGE_GB, every layer is computed twice; its inputs alone are kept.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from gram_meta.backbone.clip import Backbone
from gram_meta.errors import GramError
from gram_meta.method.prompts import ClassText, ConditionalCLIP, PromptedCLIP

GB = 10**9
CHOICES = ("auto", "always", "never")


def arrange(model: PromptedCLIP, options: Any, batch: int) -> list[str]:
    """Set what the training steps of a classifier keep.

    Args:
        model: its `class_text.chunk` and `backbone.checkpointing` are set.
        options: the node TRAINER.MEMORY: CHECKPOINT, CLASS_CHUNK, TEXT_GB, IMAGE_GB.
        batch: images in a step.

    Returns:
        A sentence for each tower that computes anything twice, for the log.

    Raises:
        GramError: an option outside its range.
    """
    check(options)
    text, visual = model.class_text, model.prompt_learner.visual_ctx
    said, towers = [], []  # towers whose layers are computed twice, one by one
    if text is not None:
        images = batch if isinstance(model, ConditionalCLIP) else 1
        text.chunk = class_chunk(text, options, images)
        if text.chunk:
            said.append(_of_text(text, images))
        elif options.CHECKPOINT == "always":
            towers.append("text")
    if visual is not None and checkpoints_images(model.backbone, options, batch, len(visual)):
        towers.append("images")
        said.append(
            f"Memory: {batch} images leave about {image_bytes(model.backbone, batch, len(visual)) / GB:.2f} GB behind for "
            "the backward pass; every layer of the image tower is computed twice instead (TRAINER.MEMORY.CHECKPOINT)"
        )
    model.backbone.checkpointing = towers[0] if len(towers) == 1 else bool(towers)
    return said


def check(options: Any) -> None:
    """Refuse what TRAINER.MEMORY cannot be."""
    if options.CHECKPOINT not in CHOICES:
        raise GramError(f"TRAINER.MEMORY.CHECKPOINT is {options.CHECKPOINT!r}; expected one of {', '.join(CHOICES)}")
    if options.CLASS_CHUNK < 0:
        raise GramError(
            f"TRAINER.MEMORY.CLASS_CHUNK is {options.CLASS_CHUNK}; expected a number of class sentences, or 0: chosen "
            "from the classes"
        )
    if options.TEXT_GB <= 0:
        raise GramError(f"TRAINER.MEMORY.TEXT_GB is {options.TEXT_GB}; expected more than 0")
    if options.IMAGE_GB < 0:
        raise GramError(
            f"TRAINER.MEMORY.IMAGE_GB is {options.IMAGE_GB}; expected more than 0, or 0: half of the device's memory"
        )


def class_chunk(text: ClassText, options: Any, images: int = 1) -> int:
    """Class sentences at a time (`ClassText.chunk`): as stated, or as few equal parts as fit; 0: all at once.

    Args:
        images: how often each class is encoded; an image with a prompt of its own has sentences of its own.
    """
    classes, each, most = len(text.ends), text_bytes(text), options.TEXT_GB * GB
    if options.CLASS_CHUNK:
        return options.CLASS_CHUNK if options.CLASS_CHUNK < images * classes else 0
    if options.CHECKPOINT == "never" or images * each <= most:
        return 0
    if each <= most:  # all classes of some images at a time
        return classes * int(most // each)
    pieces = 2
    while pieces < classes and _largest_part(text, -(-classes // pieces)) > most:
        pieces += 1
    return -(-classes // pieces)


def checkpoints_images(backbone: Backbone, options: Any, batch: int, prompt: int) -> bool:
    """Whether the image tower's layers are computed twice."""
    if options.CHECKPOINT != "auto":
        return bool(options.CHECKPOINT == "always")
    most = options.IMAGE_GB * GB or device_bytes(backbone.device) / 2
    return image_bytes(backbone, batch, prompt) > most


def text_bytes(text: ClassText, ends: Tensor | None = None) -> int:
    """What the text tower keeps of class sentences for a backward pass, by arithmetic from shapes.

    In each layer, of a position of a sentence: the inputs of two layer norms (float32), query, key, value, and the hidden
    layer (4 d). Of a place in the rectangle that attention sees: query and result, and key and value, these for the
    shared positions too. Of a shared position, once: two inputs, query, key, value, result, hidden layer.

    Args:
        ends: (N,) of some of the sentences; default: all.
    """
    backbone, item = text.backbone, text.backbone.dtype.itemsize
    norms = 2 * max(4, item)
    ends = text.ends if ends is None else ends
    slots = 1 + text.tokens
    shared, unshared = (0, slots) if text.placed else (slots, 0)  # a placed prompt stands in every sentence anew
    length = int(ends.max()) + 1 + unshared
    bytes_ = int((ends + 1 + unshared).sum()) * (norms + 7 * item)
    bytes_ += len(ends) * (4 * length + 2 * shared) * item
    bytes_ += shared * (norms + 8 * item)
    return bytes_ * backbone.text_width * len(backbone.model.transformer.resblocks)


def image_bytes(backbone: Backbone, images: int, prompt: int) -> int:
    """The same of the image tower, for images with `prompt` tokens beside each one's patches.

    In each layer, of a position: the inputs of two layer norms, query, key, value, what attention makes of them, and the
    hidden layer.
    """
    tower, item = backbone.model.visual, backbone.dtype.itemsize
    tokens = images * (len(tower.positional_embedding) + prompt)
    return tokens * backbone.visual_width * (2 * max(4, item) + 8 * item) * len(tower.transformer.resblocks)


def device_bytes(device: torch.device) -> int:
    """Memory of the device, or of the machine; all of it, as what is free depends on the moment."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 16 * GB


def _largest_part(text: ClassText, size: int) -> int:
    """The most that a part takes, sentences in order of their length."""
    return max(text_bytes(text, ends) for ends in text.ends.sort().values.split(size))


def _of_text(text: ClassText, images: int) -> str:
    return (
        f"Memory: {images * len(text.ends)} class sentences leave about {images * text_bytes(text) / GB:.2f} GB behind for "
        f"the backward pass; they are computed twice instead, {text.chunk} at a time (TRAINER.MEMORY.CLASS_CHUNK)"
    )
