"""Memory of the towers, by arithmetic from shapes, and the memory of a device.

Estimates do not ask how much memory happens to be free, so what is chosen from them is the same in every run. Two kinds
of estimate say what backward passes need:

- `text_bytes`, `image_bytes`: what a first-order forward pass keeps, tensor by tensor (within 20 %,
  tests/backbone/test_memory.py).
- `pass_bytes`: the peak of a first- or second-order pass, from constants measured on a CPU
  (docs/guide/meta-training.md). In units of d numbers, for one position of one layer of width d: FIRST or SECOND; with
  activation checkpointing KEPT for every layer (three times that for second order), and one layer in full.
"""

import os

import torch
from torch import Tensor

from gram_meta.backbone.clip import Backbone

GB = 10**9
FIRST, SECOND, KEPT = 15.0, 36.0, 6.0


def device_bytes(device: torch.device) -> float:
    """Return the memory that one process may count on, used or not.

    The processes of a launcher (LOCAL_WORLD_SIZE) share the machine's memory; each is taken to have its own GPU. Where
    the system does not tell (Windows), 16 GB are assumed.
    """
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 16 * GB
    return whole / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def image_positions(backbone: Backbone, prompt: int = 0) -> int:
    """Return the positions of one image in a ViT: class token, patches, and `prompt` tokens."""
    return len(backbone.model.visual.positional_embedding) + prompt


def image_bytes(backbone: Backbone, images: int, prompt: int) -> int:
    """Return what the image tower keeps for the backward pass of images with `prompt` tokens each.

    In each layer, of a position: the inputs of two layer norms (float32), query, key, value, attention's result, and
    the hidden layer (4 d).
    """
    item, layers = backbone.dtype.itemsize, len(backbone.model.visual.transformer.resblocks)
    each = (2 * max(4, item) + 8 * item) * backbone.visual_width
    return images * image_positions(backbone, prompt) * each * layers


def text_bytes(backbone: Backbone, ends: Tensor, shared: int, unshared: int) -> int:
    """Return what the text tower keeps for the backward pass of N texts, in the layout of `backbone.packs_texts`.

    In each layer, of a position that is computed: the inputs of two layer norms (float32), query, key, value, and the
    hidden layer (4 d). A rectangle has all positions up to the longest text's end token, the shared ones too, for every
    text, and keeps attention's result of each. Packed texts have each text's own positions, and the shared ones once.
    They also keep copies for the rectangle that attention works on: of each place query and result, and key and value,
    these for the shared positions too.

    Args:
        ends: (N,) index of each text's end token, not counting the positions below.
        shared: positions that precede all texts; packed texts compute them once.
        unshared: positions that every text has in addition.
    """
    item = backbone.dtype.itemsize
    norms = 2 * max(4, item)
    length = int(ends.max()) + 1 + unshared
    if backbone.packs_texts:
        bytes_ = int((ends + 1 + unshared).sum()) * (norms + 7 * item)
        bytes_ += len(ends) * (4 * length + 2 * shared) * item
        bytes_ += shared * (norms + 8 * item)
    else:
        bytes_ = len(ends) * (length + shared) * (norms + 8 * item)
    return bytes_ * backbone.text_width * len(backbone.model.transformer.resblocks)


def pass_bytes(backbone: Backbone, tower: str, positions: int, second_order: bool, checkpointing: bool) -> float:
    """Return the peak of a forward and backward pass over `positions` positions of a tower, "text" or "images".

    `second_order`: for a gradient of the gradient. `checkpointing`: for layers that backward passes compute again.
    """
    text, model = tower == "text", backbone.model
    layers = len((model if text else model.visual).transformer.resblocks)
    whole, kept = (SECOND, 3 * KEPT) if second_order else (FIRST, KEPT)
    units = layers * kept + whole if checkpointing else layers * whole
    number = {2: 3.0}.get(backbone.dtype.itemsize, float(backbone.dtype.itemsize))  # layer norms keep float32
    return number * positions * (backbone.text_width if text else backbone.visual_width) * units


def forward_bytes(backbone: Backbone) -> int:
    """Return the most that one image takes in a forward pass without gradients: its pixels and one layer's tensors."""
    size, item = backbone.image_size, backbone.dtype.itemsize
    pixels = 3 * size * size * (4 + item)
    if not backbone.is_vit:
        return pixels + 64 * size * size * item  # the stem: 32 to 64 channels at a half and a quarter of the size
    tokens, width = image_positions(backbone), backbone.visual_width
    # residual, normed, three for attention, four for the hidden layer twice, attention's weights; float32 layer norms
    return pixels + tokens * width * (14 * item + 8) + width // 64 * tokens * tokens * item
