"""What a meta-step cannot do without: the towers' matrix products, and the towers' passes with nothing around them."""

from __future__ import annotations

from dataclasses import dataclass

from gram_meta.backbone.clip import Backbone


@dataclass(frozen=True)
class Passes:
    """FLOP of the matrix products that one image (or one list of text positions) costs in exact second order.

    forward, backward: of a first-order pass. tangent: what the second derivative adds to a support image whose forward and
    backward pass are kept: how activations, then gradients, change along the direction that comes back from the query.
    """

    forward: float
    backward: float
    tangent: float

    @property
    def support(self) -> float:
        return self.forward + self.backward + self.tangent

    @property
    def query(self) -> float:
        return self.forward + self.backward


def image_passes(backbone: Backbone, prompt_tokens: int) -> Passes:
    """Of one image, in the cheapest exact form.

    Per layer and position 12 d^2 weights, a multiplication and an addition each; attention's products, 2 L^2 d each: 2
    forwards, 4 backwards, and for the tangents twice that each. The last layer is read at the class token alone. What no
    prompt has touched needs no gradient: the patch embedding, and queries, keys and values of the first layer's patches.
    """
    tower = backbone.model.visual
    d, layers = backbone.visual_width, len(tower.transformer.resblocks)
    patches = tower.positional_embedding.shape[0] - 1
    length = 1 + patches + prompt_tokens
    patch_embedding = 2.0 * patches * tower.conv1.weight.numel()
    whole = 2.0 * length * 12 * d**2
    last = 2.0 * d**2 * (2 * length + 10)  # keys and values of all, the rest of the class token
    untouched = 2.0 * (length - prompt_tokens) * 3 * d**2  # of the first layer
    projection = 2.0 * d * backbone.embed_dim
    linear = (layers - 1) * whole + last + projection
    attention = 2.0 * length * d * ((layers - 1) * length + 1)  # one product in each layer
    return Passes(
        forward=patch_embedding + linear + 2 * attention,
        backward=linear - untouched + 4 * attention,
        tangent=2 * (linear - untouched) + (4 + 8) * attention,
    )


def text_passes(flops: float) -> Passes:
    """Of a text tower's forward pass with so many FLOP; attention's own products are too few to count."""
    return Passes(flops, flops, 2 * flops)
