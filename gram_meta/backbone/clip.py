"""The one door to CLIP: loading it, and running its frozen towers around prompts.

CLIP's own code is the `clip` package (OpenAI's, a checkout's `clip/` folder, or PyPI's clip-anytorch). It builds the
modules and the tokenizer; the forward passes are written here, over the modules' parameters, because prompt learning
needs what the original does not offer: text that is cut at its last used position, a prompt shared by all classes of a
task computed once, a batch of tasks with a prompt each, visual prompts, and a second derivative. Nothing in the `clip`
package is edited or patched, and logits equal its own to rounding (tests/test_backbone.py).
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gram_meta.backbone.recompute import recomputed
from gram_meta.backbone.second_order import ACTIVATION, activate_and_project, layer_norm, self_attention
from gram_meta.backbone.weights import PIXEL_MEAN, PIXEL_STD, build_clip, empty_clip, read_clip
from gram_meta.errors import GramError

PACKAGED = "gram-small"  # the small CLIP that travels in this package
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}

# embed_dim, image px, vision layers, vision width, patch, context, vocabulary, text width, text heads, text layers
_SHAPES: dict[str, tuple[Any, ...]] = {
    "tiny": (64, 32, 2, 64, 8, 77, 49408, 64, 1, 2),
    "tiny-RN": (64, 32, (1, 1, 1, 1), 8, None, 77, 49408, 64, 1, 2),
    "ViT-B/32": (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12),
    "ViT-B/16": (512, 224, 12, 768, 16, 77, 49408, 512, 8, 12),
    "ViT-L/14": (768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12),
}


def load_backbone(name: str, device: str | torch.device = "cpu", precision: str = "fp32") -> Backbone:
    """Load a frozen CLIP.

    Args:
        name: an OpenAI name (`"ViT-B/16"`, downloaded by the clip package to ~/.cache/clip), a path to a file or folder
            with weights of OpenAI's, Hugging Face's or open_clip's layout (see `clip_weights`), `"gram-small"` for the
            model in this package, or `"random-SHAPE"` (`random-tiny`, `random-ViT-B/16`) for seeded random weights.
        device: where the towers live.
        precision: `fp32`, `fp16`, `bf16` or `fp64` for the towers; features and logits are float32 (float64 for `fp64`).

    Raises:
        GramError: unknown name, missing or unreadable file, or a file that holds no OpenAI-style CLIP.
    """
    if precision not in PRECISIONS:
        raise GramError(f"precision: expected one of {', '.join(PRECISIONS)}, found {precision!r}")
    if name.startswith("random-"):
        model = _random_model(name.removeprefix("random-"))
    else:
        model = build_clip(clip_module(), _state_dict_for(name), name)
    return Backbone(model, name, device, precision)


class Backbone(nn.Module):
    """Frozen CLIP towers, callable around prompts.

    Attributes:
        name: as given to `load_backbone`.
        fingerprint: SHA-256 of the weights as float32, so the same for every precision and device.
        is_vit: whether the image tower is a transformer (only then are there visual prompts).
        text_width, visual_width, embed_dim: d_text, d_visual (0 for a ResNet) and the width D of the joint space.
        image_size: side of the square input in pixels.
        context_length: positions of the text tower (77).
        logit_scale: 1 / tau of Eq. 1, float32 scalar.
        checkpointing: whether the activations of each transformer layer are computed again in the backward pass instead
            of kept: False (at first), True (both towers), "text" or "images". Values and gradients of every order stay
            the same.
    """

    logit_scale: Tensor
    model: Any  # clip.model.CLIP: its parts are modules that only CLIP's code declares

    def __init__(self, model: Any, name: str, device: str | torch.device, precision: str) -> None:
        super().__init__()
        self.name = name
        self.fingerprint = fingerprint(model.state_dict())
        self.is_vit = hasattr(model.visual, "class_embedding")
        self.text_width = int(model.ln_final.weight.shape[0])
        self.visual_width = int(model.visual.conv1.weight.shape[0]) if self.is_vit else 0
        self.embed_dim = int(model.text_projection.shape[1])
        self.image_size = int(model.visual.input_resolution)
        self.context_length = int(model.positional_embedding.shape[0])
        self.precision = precision
        self.checkpointing: bool | str = False
        self.register_buffer("logit_scale", model.logit_scale.detach().exp().to(_feature_dtype(precision)))
        self.model = _cast(model, PRECISIONS[precision]).requires_grad_(False)
        self.to(device).eval()

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the towers' products."""
        return self.model.visual.conv1.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def train(self, mode: bool = True) -> Backbone:
        """Stays in evaluation mode: the towers are frozen, a ResNet's batch statistics too."""
        return super().train(False)

    # --- text ---------------------------------------------------------------------------------------------------------

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids (n, 77); a text with more tokens than positions is a `GramError`."""
        clip = clip_module()
        try:
            return clip.tokenize(list(texts), context_length=self.context_length)
        except RuntimeError as error:
            raise GramError(f"text for CLIP: expected at most {self.context_length} tokens; {error}") from None

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Token embeddings (..., L, d_text) of ids (..., L), in the towers' number type."""
        return self.model.token_embedding(tokens.to(self.device)).to(self.dtype)

    def encode_text(
        self, own: Tensor, ends: Tensor, shared: Tensor | None = None, packing: Packing | None = None
    ) -> Tensor:
        """Features of texts given as token embeddings, L2-normalised.

        The tower is causal: what stands after the end token changes nothing, so `own` may be cut there; and what stands
        before the first token that differs between texts is the same for all of them, so it is computed once. Shorter
        texts are not padded but in attention, and the last layer runs for the end tokens alone.

        Args:
            own: (..., N, L, d) the texts' own tokens; leading axes are free (a batch of tasks).
            ends: (..., N) or (N,), index into the L positions of each text's end token.
            shared: (..., P, d) tokens that stand before `own` in each of the N texts of a leading index, or None.
            packing: `packing(ends, L, P)`, where it is at hand from an earlier call.

        Returns:
            (..., N, D) float32 (float64 for an fp64 backbone).
        """
        *lead, n, length, width = own.shape
        own = own.reshape(-1, n, length, width).to(self.dtype)  # (G, N, L, d)
        before = 0 if shared is None else shared.shape[-2]
        if before + length > self.context_length:
            raise GramError(f"text for CLIP: expected at most {self.context_length} tokens, found {before + length}")
        positions = self.model.positional_embedding.to(self.dtype)
        own = own + positions[before : before + length]
        if shared is not None:
            shared = shared.reshape(-1, before, width).to(self.dtype) + positions[:before]  # (G, P, d)
        packing = packing or self.packing(ends.expand(*lead, n), length, before)
        tokens = packing.pack(own)  # (T, d)
        *blocks, final = self.model.transformer.resblocks
        for block in blocks:
            tokens, *rest = self._layer("text", partial(_text_block, block, packing), tokens, *_given(shared))
            shared = rest[0] if rest else None
        last = self._layer("text", partial(_final_text_block, final, packing), tokens, *_given(shared))  # (G N, d)
        last = _layer_norm(self.model.ln_final, last)
        features = last @ self.model.text_projection.to(last.dtype)  # (G N, D)
        return self._normalised(features).reshape(*lead, n, self.embed_dim)

    def packing(self, ends: Tensor, length: int, before: int) -> Packing:
        """How texts of these ends (..., N) are packed for `encode_text`; depends on nothing else, and may be kept."""
        return Packing(ends.to(self.device).reshape(-1, ends.shape[-1]), length, before)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Features (n, D) of plain strings, L2-normalised; texts of one batch are cut at its longest."""
        parts = []
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenize(texts[start : start + batch_size])
            ends = end_positions(tokens)
            parts.append(self.encode_text(self.embed_tokens(tokens[:, : int(ends.max()) + 1]), ends))
        return torch.cat(parts) if parts else self.logit_scale.new_zeros(0, self.embed_dim)

    # --- images -------------------------------------------------------------------------------------------------------

    def encode_images(self, images: Tensor, prompt: Tensor | None = None) -> Tensor:
        """Features of images, L2-normalised.

        Args:
            images: (B, 3, H, W), already resized and normalised (see `preprocess`).
            prompt: visual prompt tokens (M, d_visual), or (B, M, d_visual) with a prompt per image; they are appended to
                the patch tokens after the positional embedding and before `ln_pre` (shallow VPT).

        Returns:
            (B, D) float32 (float64 for an fp64 backbone).

        Raises:
            GramError: a prompt for a ResNet, or images of another size.
        """
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise GramError(
                f"images for {self.name}: expected {self.image_size} x {self.image_size} pixels, "
                f"found {images.shape[-2]} x {images.shape[-1]} (INPUT.SIZE)"
            )
        images = images.to(self.device, self.dtype)
        if not self.is_vit:
            if prompt is not None:
                raise GramError(f"visual prompts: expected a ViT image tower, found the ResNet {self.name}")
            return self._normalised(self.model.visual(images))
        tower = self.model.visual
        x = tower.conv1(images).flatten(2).transpose(1, 2)  # (B, patches, d)
        start = tower.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([start, x], dim=1)  # (B, 1 + patches, d)
        x = x + tower.positional_embedding.to(x.dtype)
        if prompt is not None:
            prompt = prompt.to(x.dtype).expand(len(x), -1, -1)
            x = torch.cat([x, prompt], dim=1)  # (B, 1 + patches + M, d)
        x = _layer_norm(tower.ln_pre, x)
        *blocks, final = tower.transformer.resblocks
        for block in blocks:
            x = self._layer("images", partial(_image_block, block), x)
        x = self._layer("images", partial(_final_image_block, final), x)  # (B, d)
        x = _layer_norm(tower.ln_post, x)
        return self._normalised(x @ tower.proj.to(x.dtype))

    def preprocess(self, as_bytes: bool = False) -> Callable[[Any], Tensor]:
        """CLIP's transform for evaluation: PIL image -> (3, H, W), resized (bicubic), centre-cropped, normalised.

        `as_bytes`: stop before the last part, at a quarter of the memory; `normalise` does the rest.
        """
        from torchvision import transforms as T

        resize = T.Resize(self.image_size, interpolation=T.InterpolationMode.BICUBIC)
        crop = T.CenterCrop(self.image_size)
        if as_bytes:
            return T.Compose([resize, crop, T.PILToTensor()])
        return T.Compose([resize, crop, T.ToTensor(), T.Normalize(PIXEL_MEAN, PIXEL_STD)])

    @staticmethod
    def normalise(images: Tensor) -> Tensor:
        """Bytes (..., 3, H, W) -> the tower's float32 input, on the same device."""
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (PIXEL_MEAN, PIXEL_STD))
        return (images.float() / 255 - mean) / std

    def _layer(self, tower: str, layer: Callable[..., Any], *inputs: Tensor) -> Any:
        """One transformer layer; what it computes on the way is kept for the backward pass, or computed again."""
        return recomputed(layer, *inputs) if self.checkpointing in (True, tower) else layer(*inputs)

    def _normalised(self, features: Tensor) -> Tensor:
        return F.normalize(features.to(_feature_dtype(self.precision)), dim=-1)


def end_positions(tokens: Tensor) -> Tensor:
    """Index (n,) of the end token in each row of ids (n, L): it has the highest id of the vocabulary."""
    return tokens.argmax(dim=-1)


def clip_module() -> ModuleType:
    """The `clip` package: a checkout's own folder where it stands first on the path, else clip-anytorch."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pkg_resources announces its end on every import
            import clip
    except ImportError as error:
        raise GramError(
            f"CLIP's code: expected an importable package `clip` with `clip.tokenize`, found none ({error}); "
            'install it with `pip install clip-anytorch "setuptools<82"`'
        ) from None
    if not hasattr(clip, "tokenize"):
        raise GramError(
            f"CLIP's code: expected OpenAI's package `clip`, found another of that name at {clip.__file__}; "
            'install it with `pip uninstall clip && pip install clip-anytorch "setuptools<82"`'
        )
    return clip


def fingerprint(state_dict: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values of a state dict, in the order of the names."""
    digest = hashlib.sha256()
    for key in sorted(state_dict):
        value = state_dict[key].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()


# --- loading ----------------------------------------------------------------------------------------------------------


def _state_dict_for(name: str) -> dict[str, Tensor]:
    if name == PACKAGED:
        from gram_meta.backbone.packaged import load_packaged_state_dict

        return load_packaged_state_dict()
    known = getattr(clip_module().clip, "_MODELS", {})
    if name in known:
        root = os.path.expanduser("~/.cache/clip")
        try:
            return read_clip(Path(clip_module().clip._download(known[name], root)))
        except OSError as error:
            raise GramError(f"{name}: expected to download {known[name]} to {root}, found {error}") from None
    if Path(name).exists():
        return read_clip(Path(name))
    raise GramError(
        f"backbone {name!r}: expected {PACKAGED}, a file or folder, or one of {', '.join(known)}; found none of these"
    )


def _random_model(shape: str) -> nn.Module:
    if shape not in _SHAPES:
        raise GramError(f"backbone 'random-{shape}': expected random- and one of {', '.join(_SHAPES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return empty_clip(clip_module(), *_SHAPES[shape])


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """Give the matrix products their number type; under 16 bits everything else stays float32, as OpenAI has it."""
    if dtype in (torch.float32, torch.float64):
        return model.to(dtype)
    if not hasattr(model.visual, "class_embedding"):
        model.visual.to(dtype)  # a ResNet runs its own forward, all in one number type
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.MultiheadAttention):
            module.to(dtype)
    return model


def _feature_dtype(precision: str) -> torch.dtype:
    return torch.float64 if precision == "fp64" else torch.float32


# --- transformer ------------------------------------------------------------------------------------------------------


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Layer norm computed in at least float32, whatever the towers' number type."""
    high = torch.promote_types(x.dtype, torch.float32)
    return layer_norm(x.to(high), norm.weight.to(high), norm.bias.to(high), norm.eps).to(x.dtype)


def _projected(attn: nn.MultiheadAttention, x: Tensor, which: str = "qkv") -> Tensor:
    """What attention makes of tokens (..., d): queries, keys, values side by side, (..., 3 d), or only some of them."""
    first, last = "qkv".index(which[0]), "qkv".index(which[-1])
    rows = slice(first * attn.embed_dim, (last + 1) * attn.embed_dim)
    return F.linear(x, attn.in_proj_weight[rows], attn.in_proj_bias[rows])


def _heads(attn: nn.MultiheadAttention, x: Tensor, which: str = "qkv") -> tuple[Tensor, ...]:
    """Queries, keys, values, or only some, each (..., heads, L, d / heads), of tokens (..., L, d)."""
    return _split_heads(attn, _projected(attn, x, which))


def _split_heads(attn: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, ...]:
    """(..., L, k d) -> k times (..., heads, L, d / heads)."""
    x = x.unflatten(-1, (-1, attn.num_heads, attn.head_dim))  # (..., L, k, heads, d / heads)
    return x.movedim(-3, 0).transpose(-3, -2).unbind()


def _merge_heads(attn: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """(..., heads, L, d / heads) -> (..., L, d), through the output projection."""
    return F.linear(x.transpose(-3, -2).flatten(-2), attn.out_proj.weight, attn.out_proj.bias)


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    """CLIP's MLP. Its activation h sigmoid(a h) is silu(a h) / a: the factors go into the products, one pass is left."""
    flat, a = x.flatten(0, -2), ACTIVATION
    hidden = torch.addmm(mlp.c_fc.bias, flat, mlp.c_fc.weight.T, beta=a, alpha=a)
    return activate_and_project(hidden, mlp.c_proj.weight, mlp.c_proj.bias).view_as(x)


def _image_block(block: Any, x: Tensor) -> Tensor:
    """One layer of the image tower: (B, L, d) -> (B, L, d)."""
    attn = block.attn
    qkv = _projected(attn, _layer_norm(block.ln_1, x))  # (B, L, 3 d)
    if _needs_second_derivative(qkv):
        seen = self_attention(qkv, attn.num_heads)  # (B, L, d)
        x = x + F.linear(seen, attn.out_proj.weight, attn.out_proj.bias)
    else:
        query, key, value = _split_heads(attn, qkv)
        x = x + _merge_heads(attn, F.scaled_dot_product_attention(query, key, value))
    return x + _mlp(block.mlp, _layer_norm(block.ln_2, x))


def _needs_second_derivative(x: Tensor) -> bool:
    """Whether attention that can be differentiated twice was asked for, by `sdpa_kernel(SDPBackend.MATH)`."""
    fused = torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled()
    return not fused and not torch.is_autocast_enabled(x.device.type)


def _final_image_block(block: Any, x: Tensor) -> Tensor:
    """The last layer of the image tower, for the class token alone, as nothing else is read: (B, L, d) -> (B, d)."""
    normed = _layer_norm(block.ln_1, x)
    (query,) = _heads(block.attn, normed[:, :1], "q")  # (B, h, 1, d / h)
    key, value = _heads(block.attn, normed, "kv")
    start = x[:, :1] + _merge_heads(block.attn, F.scaled_dot_product_attention(query, key, value))
    return (start + _mlp(block.mlp, _layer_norm(block.ln_2, start))).squeeze(1)


class Packing:
    """Texts of different lengths as one list of tokens, so that only attention sees what pads them to a rectangle.

    Args:
        ends: (G, N) index of each text's end token.
        length: L, of the rectangle (G, N, L).
        before: P, positions that all texts of a group share and see.
    """

    def __init__(self, ends: Tensor, length: int, before: int) -> None:
        places = torch.arange(length, device=ends.device)
        used = places <= ends[..., None]  # (G, N, L)
        self.shape = used.shape
        self.rows = used.flatten().nonzero().squeeze(1)  # (T,), what the list takes from the rectangle
        self.ends = (ends.flatten() + 1).cumsum(0) - 1  # (G N,), in the list
        # May text position i see position j? All of the shared part, and its own part up to itself ...
        self.visible = torch.ones(length, before + length, dtype=torch.bool, device=ends.device).tril(before)
        # ... so an end token sees all that is used, and no padding: (G N, 1, 1, P + L).
        self.visible_to_end = F.pad(used.flatten(0, 1), (before, 0), value=True)[:, None, None]

    def pack(self, x: Tensor) -> Tensor:
        """(G, N, L, d) -> (T, d)."""
        return x.flatten(0, 2).index_select(0, self.rows)

    def unpack(self, x: Tensor) -> Tensor:
        """(T, d) -> (G, N, L, d), zero where there is no token."""
        empty = x.new_zeros(self.shape.numel(), x.shape[-1])
        return empty.index_copy(0, self.rows, x).unflatten(0, self.shape)


def _text_block(block: Any, packing: Packing, tokens: Tensor, shared: Tensor | None = None) -> tuple[Tensor, ...]:
    """One layer of the text tower over the texts' own tokens (T, d) and, where there are any, the shared ones (G, P, d)."""
    attn, width = block.attn, tokens.shape[-1]
    q, kv = _projected(attn, _layer_norm(block.ln_1, tokens)).split([width, 2 * width], -1)  # (T, 3 d)
    (query,) = _split_heads(attn, packing.unpack(q))  # (G, N, h, L, d / h); apart, as keys and values are copied below
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
    return tokens + _mlp(block.mlp, _layer_norm(block.ln_2, tokens)), *_given(shared)


def _final_text_block(block: Any, packing: Packing, tokens: Tensor, shared: Tensor | None = None) -> Tensor:
    """The last layer, for the end tokens alone, as nothing else is read: (T, d) -> (G N, d)."""
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


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def _behind(shared: Tensor, own: Tensor) -> Tensor:
    """Keys or values of each text behind those of the shared tokens: (G, h, P, _), (G, N, h, L, _) -> (G, N, h, P + L, _)."""
    return torch.cat([shared[:, None].expand(-1, own.shape[1], -1, -1, -1), own], dim=-2)
