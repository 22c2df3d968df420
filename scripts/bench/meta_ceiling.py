"""What exact second order cannot do without: the FLOP of the image tower's matrix products for one image."""

from __future__ import annotations

from typing import NamedTuple

from gram_meta.backbone.clip import Backbone


class Passes(NamedTuple):
    """FLOP of one image: `forward` and `backward` of a first-order pass, and `tangent`.

    `tangent` is what the second derivative adds to a support image whose forward and backward pass are kept: how
    activations, then gradients, change along the direction that comes back from the query set.
    """

    forward: float
    backward: float
    tangent: float


def image_passes(backbone: Backbone, prompt_tokens: int) -> Passes:
    """Return the FLOP of one image in the cheapest exact form.

    A layer has 12 d^2 weights, with a multiplication and an addition each for every position. Attention's products have
    2 L^2 d each: 2 forwards, 4 backwards, and twice that for the tangents of each. The last layer is read at the class
    token alone. What no prompt has touched needs no gradient: the patch embedding, and the queries, keys and values of
    the first layer's patches.
    """
    tower = backbone.model.visual
    d, layers = backbone.visual_width, len(tower.transformer.resblocks)
    patches = tower.positional_embedding.shape[0] - 1
    length = 1 + patches + prompt_tokens
    patch_embedding = 2.0 * patches * tower.conv1.weight.numel()
    last = 2.0 * d**2 * (2 * length + 10)  # keys and values of all, the rest for the class token
    linear = (layers - 1) * 2.0 * length * 12 * d**2 + last + 2.0 * d * backbone.embed_dim
    learned = linear - 2.0 * (length - prompt_tokens) * 3 * d**2
    attention = 2.0 * length * d * ((layers - 1) * length + 1)  # one product in each layer
    return Passes(patch_embedding + linear + 2 * attention, learned + 4 * attention, 2 * learned + 12 * attention)
