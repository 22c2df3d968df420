"""CLIP's two transformer towers as functions of the modules' parameters, and how texts are packed for the text tower.

The text tower has two layouts with equal results (`Packing`, `Rectangle`). `image_features` and `text_features` take a
`run` callable for the layers: it calls a layer, and either keeps its activations for the backward pass or lets them be
recomputed (`gram_meta.backbone.recompute`). Deep prompts (`deeper`) replace the prompt tokens at the input of a layer,
one prompt for each layer after the first, as in VPT-deep, MaPLe and PromptSRC. Shapes: B images, G groups (tasks) of N
texts, L positions, P shared positions, T packed tokens, width d.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gram_meta.backbone.second_order import (
    ACTIVATION,
    activate_and_project,
    layer_norm,
    second_order_enabled,
    self_attention,
)

Run = Callable[..., Any]  # (layer, *tensors) -> what the layer returns


def image_features(tower: Any, images: Tensor, prompt: Tensor | None, run: Run, deeper: Tensor | None = None) -> Tensor:
    """Return the features (B, D) of images (B, 3, H, W).

    `prompt` is (M, d), (B, M, d) or None; `deeper` has an axis of layers more, (layers - 1, M, d) or with B before it.
    """
    x = tower.conv1(images).flatten(2).transpose(1, 2)  # (B, patches, d)
    start = tower.class_embedding.to(x.dtype).expand(len(x), 1, -1)
    x = torch.cat([start, x], dim=1)  # (B, 1 + patches, d)
    x = x + tower.positional_embedding.to(x.dtype)
    patches = x.shape[1]
    if prompt is not None:
        prompt = prompt.to(x.dtype).expand(len(x), -1, -1)
        x = torch.cat([x, prompt], dim=1)  # (B, 1 + patches + M, d)
    x = _layer_norm(tower.ln_pre, x)
    *blocks, final = tower.transformer.resblocks
    for layer, block in enumerate(blocks):
        x = run(partial(_block, block), _with_prompt(x, deeper, layer, patches))
    x = run(partial(_final_image_block, final), _with_prompt(x, deeper, len(blocks), patches))
    x = _layer_norm(tower.ln_post, x)  # (B, d)
    return x @ tower.proj.to(x.dtype)


def text_features(
    model: Any,
    tokens: Tensor,
    shared: Tensor | None,
    layout: Packing | Rectangle,
    run: Run,
    deeper: Tensor | None = None,
) -> Tensor:
    """Return the features (G N, D) of texts with own tokens (G, N, L, d) behind shared ones (G, P, d) or None.

    `deeper` (G, layers - 1, M, d) replaces the shared tokens behind the start token in further layers.
    """
    encode: Any = _packed_texts if isinstance(layout, Packing) else _dense_texts
    last = encode(model.transformer.resblocks, tokens, shared, layout, run, deeper)  # (G N, d)
    last = _layer_norm(model.ln_final, last)
    return last @ model.text_projection.to(last.dtype)


def _packed_texts(
    layers: Any, tokens: Tensor, shared: Tensor | None, packing: Packing, run: Run, deeper: Tensor | None
) -> Tensor:
    """Return what the text tower's layers make of the end tokens, (G N, d)."""
    tokens = packing.pack(tokens)  # (T, d)
    *blocks, final = layers
    for layer, block in enumerate(blocks):
        shared = _with_prompt(shared, deeper, layer)
        tokens, *rest = run(partial(_text_block, block, packing), tokens, *_present(shared))
        shared = rest[0] if rest else None
    shared = _with_prompt(shared, deeper, len(blocks))
    return run(partial(_final_text_block, final, packing), tokens, *_present(shared))


def _dense_texts(
    layers: Any, tokens: Tensor, shared: Tensor | None, layout: Rectangle, run: Run, deeper: Tensor | None
) -> Tensor:
    """Return the same, with every text as a row of its own that holds the shared tokens too."""
    if shared is not None:
        tokens = torch.cat([shared[:, None].expand(-1, tokens.shape[1], -1, -1), tokens], dim=2)
    if deeper is not None:
        deeper = deeper.repeat_interleave(tokens.shape[1], dim=0)  # (G N, layers - 1, M, d)
    x = tokens.flatten(0, 1)  # (G N, P + L, d)
    *blocks, final = layers
    for layer, block in enumerate(blocks):
        x = run(partial(_block, block, causal=True), _with_prompt(x, deeper, layer))
    return run(partial(_final_dense_block, final, layout), _with_prompt(x, deeper, len(blocks)))


def _with_prompt(x: Any, deeper: Tensor | None, layer: int, start: int = 1) -> Any:
    """Replace the prompt tokens of x (B, L, d), from `start` on, by the prompt of this layer, if it has one."""
    if deeper is None or not 0 < layer <= deeper.shape[-3]:
        return x
    prompt = deeper[..., layer - 1, :, :].to(x.dtype).expand(len(x), -1, -1)
    return torch.cat([x[:, :start], prompt, x[:, start + prompt.shape[1] :]], dim=1)


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Apply a layer norm with statistics in at least float32, whatever the towers' number type."""
    # a GPU's kernels take 16-bit values and compute in float32; casts around them would take as long again
    high = x.dtype if x.is_cuda else torch.promote_types(x.dtype, torch.float32)
    return layer_norm(x.to(high), norm.weight.to(high), norm.bias.to(high), norm.eps).to(x.dtype)


def _projected(attn: nn.MultiheadAttention, x: Tensor, which: str = "qkv") -> Tensor:
    """Return queries, keys, values of tokens (..., d) side by side, (..., 3 d), or only those that `which` names."""
    first, last = "qkv".index(which[0]), "qkv".index(which[-1])
    rows = slice(first * attn.embed_dim, (last + 1) * attn.embed_dim)
    return F.linear(x, attn.in_proj_weight[rows], attn.in_proj_bias[rows])


def _heads(attn: nn.MultiheadAttention, x: Tensor, which: str = "qkv") -> tuple[Tensor, ...]:
    """Return the same, each as (..., heads, L, d / heads), of tokens (..., L, d)."""
    return _split_heads(attn, _projected(attn, x, which))


def _split_heads(attn: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, ...]:
    """Split (..., L, k d) into k tensors (..., heads, L, d / heads)."""
    x = x.unflatten(-1, (-1, attn.num_heads, attn.head_dim))  # (..., L, k, heads, d / heads)
    return x.movedim(-3, 0).transpose(-3, -2).unbind()


def _merge_heads(attn: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Join (..., heads, L, d / heads) to (..., L, d) and apply the output projection."""
    return F.linear(x.transpose(-3, -2).flatten(-2), attn.out_proj.weight, attn.out_proj.bias)


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    """Apply CLIP's MLP to (..., d)."""
    if isinstance(mlp.gelu, nn.GELU):
        hidden = F.gelu(F.linear(x, mlp.c_fc.weight, mlp.c_fc.bias))
        return F.linear(hidden, mlp.c_proj.weight, mlp.c_proj.bias)
    # QuickGELU is h sigmoid(a h) = silu(a h) / a; with `a` in both matrix products, one elementwise pass is left
    flat, a = x.flatten(0, -2), ACTIVATION
    hidden = torch.addmm(mlp.c_fc.bias, flat, mlp.c_fc.weight.T, beta=a, alpha=a)
    return activate_and_project(hidden, mlp.c_proj.weight, mlp.c_proj.bias).view_as(x)


def _block(block: Any, x: Tensor, causal: bool = False) -> Tensor:
    """Apply one layer of a tower: (B, L, d) -> (B, L, d)."""
    attn = block.attn
    qkv = _projected(attn, _layer_norm(block.ln_1, x))  # (B, L, 3 d)
    if second_order_enabled() and not causal and not torch.is_autocast_enabled(qkv.device.type):
        seen = self_attention(qkv, attn.num_heads)  # (B, L, d)
        x = x + F.linear(seen, attn.out_proj.weight, attn.out_proj.bias)
    else:
        query, key, value = _split_heads(attn, qkv)
        x = x + _merge_heads(attn, F.scaled_dot_product_attention(query, key, value, is_causal=causal))
    return x + _mlp(block.mlp, _layer_norm(block.ln_2, x))


def _final_image_block(block: Any, x: Tensor) -> Tensor:
    """Apply the image tower's last layer for the class token only, the one that is read: (B, L, d) -> (B, d)."""
    normed = _layer_norm(block.ln_1, x)
    (query,) = _heads(block.attn, normed[:, :1], "q")  # (B, h, 1, d / h)
    key, value = _heads(block.attn, normed, "kv")
    start = x[:, :1] + _merge_heads(block.attn, F.scaled_dot_product_attention(query, key, value))
    return (start + _mlp(block.mlp, _layer_norm(block.ln_2, start))).squeeze(1)


class Packing:
    """Texts of different lengths as one list of tokens; only attention works on the padded rectangle (G, N, L).

    No padding is computed and shared tokens are computed once: the least arithmetic, for CPUs.

    Args:
        ends: (G, N) index of each text's end token.
        length: L, positions of the rectangle.
        before: P, positions that precede the texts of a group and are shared by them.
    """

    def __init__(self, ends: Tensor, length: int, before: int) -> None:
        places = torch.arange(length, device=ends.device)
        used = places <= ends[..., None]  # (G, N, L)
        self.shape = used.shape
        self.rows = used.flatten().nonzero().squeeze(1)  # (T,), positions of the rectangle that are in the list
        self.ends = (ends.flatten() + 1).cumsum(0) - 1  # (G N,), in the list
        # A text's position attends to all shared positions and to its own positions up to itself: (L, P + L).
        self.visible = torch.ones(length, before + length, dtype=torch.bool, device=ends.device).tril(before)
        # So an end token attends to every used position and to no padding: (G N, 1, 1, P + L).
        self.visible_to_end = F.pad(used.flatten(0, 1), (before, 0), value=True)[:, None, None]

    def pack(self, x: Tensor) -> Tensor:
        """Turn (G, N, L, d) into (T, d)."""
        return x.flatten(0, 2).index_select(0, self.rows)

    def unpack(self, x: Tensor) -> Tensor:
        """Turn (T, d) into (G, N, L, d), zero where there is no token."""
        empty = x.new_zeros(self.shape.numel(), x.shape[-1])
        return empty.index_copy(0, self.rows, x).unflatten(0, self.shape)


class Rectangle:
    """Texts of different lengths as one padded rectangle (G N, P + L): more arithmetic, but fewer operations, for GPUs.

    The tower is causal, so padding behind an end token changes nothing. The arguments are those of `Packing`.
    """

    def __init__(self, ends: Tensor, length: int, before: int) -> None:
        places = torch.arange(before + length, device=ends.device)
        ends = before + ends.flatten()  # (G N,)
        self.ends = ends + torch.arange(len(ends), device=ends.device) * len(places)  # rows of the flat rectangle
        self.visible_to_end = (places <= ends[:, None])[:, None, None]  # (G N, 1, 1, P + L)


def _text_block(block: Any, packing: Packing, tokens: Tensor, shared: Tensor | None = None) -> tuple[Tensor, ...]:
    """Apply one layer of the text tower to the texts' own tokens (T, d) and to the shared ones (G, P, d), if any."""
    attn, width = block.attn, tokens.shape[-1]
    q, kv = _projected(attn, _layer_norm(block.ln_1, tokens)).split([width, 2 * width], -1)  # (T, 3 d)
    (query,) = _split_heads(attn, packing.unpack(q))  # (G, N, h, L, d / h)
    key, value = _split_heads(attn, packing.unpack(kv))
    if shared is not None:
        q, k, v = _heads(attn, _layer_norm(block.ln_1, shared))  # (G, h, P, d / h)
        key, value = _behind(k, key), _behind(v, value)  # (G, N, h, P + L, d / h)
        shared = shared + _merge_heads(attn, F.scaled_dot_product_attention(q, k, v, is_causal=True))
        shared = shared + _mlp(block.mlp, _layer_norm(block.ln_2, shared))
    seen = F.scaled_dot_product_attention(
        query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), attn_mask=packing.visible
    )  # (G N, h, L, d / h)
    seen = packing.pack(seen.transpose(1, 2).flatten(2).unflatten(0, packing.shape[:2]))  # (T, d)
    tokens = tokens + F.linear(seen, attn.out_proj.weight, attn.out_proj.bias)
    return tokens + _mlp(block.mlp, _layer_norm(block.ln_2, tokens)), *_present(shared)


def _final_text_block(block: Any, packing: Packing, tokens: Tensor, shared: Tensor | None = None) -> Tensor:
    """Apply the text tower's last layer for the end tokens only, the ones that are read: (T, d) -> (G N, d)."""
    attn = block.attn
    normed = _layer_norm(block.ln_1, tokens)
    (query,) = _heads(attn, normed.index_select(0, packing.ends)[:, None], "q")  # (G N, h, 1, d / h)
    kv = _projected(attn, normed, "kv")  # (T, 2 d)
    key, value = _split_heads(attn, packing.unpack(kv))  # (G, N, h, L, d / h)
    if shared is not None:
        k, v = _heads(attn, _layer_norm(block.ln_1, shared), "kv")
        key, value = _behind(k, key), _behind(v, value)  # (G, N, h, P + L, d / h)
    seen = F.scaled_dot_product_attention(
        query, key.flatten(0, 1), value.flatten(0, 1), attn_mask=packing.visible_to_end
    )  # (G N, h, 1, d / h)
    last = tokens.index_select(0, packing.ends) + _merge_heads(attn, seen).squeeze(1)
    return last + _mlp(block.mlp, _layer_norm(block.ln_2, last))


def _final_dense_block(block: Any, layout: Rectangle, x: Tensor) -> Tensor:
    """Apply the text tower's last layer for the end tokens only: (G N, P + L, d) -> (G N, d)."""
    attn = block.attn
    normed = _layer_norm(block.ln_1, x)
    (query,) = _heads(attn, normed.flatten(0, 1).index_select(0, layout.ends)[:, None], "q")  # (G N, h, 1, d / h)
    key, value = _heads(attn, normed, "kv")
    seen = F.scaled_dot_product_attention(query, key, value, attn_mask=layout.visible_to_end)
    last = x.flatten(0, 1).index_select(0, layout.ends) + _merge_heads(attn, seen).squeeze(1)
    return last + _mlp(block.mlp, _layer_norm(block.ln_2, last))


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def _behind(shared: Tensor, own: Tensor) -> Tensor:
    """Append each text's keys or values to the shared ones: (G, h, P, _), (G, N, h, L, _) -> (G, N, h, P + L, _)."""
    return torch.cat([shared[:, None].expand(-1, own.shape[1], -1, -1, -1), own], dim=-2)
