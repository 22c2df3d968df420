"""CLIP from a model object of transformers, open_clip or the clip package: weights under OpenAI's names, and a design.

No library is imported: whoever has a model has imported its library. The model stays as it is. Its tensors are shared,
but for queries, keys and values of transformers, which become one matrix here.

- transformers: `CLIPModel`.
- open_clip: `CLIP` and `CustomTextCLIP` with open_clip's own text tower, causal and read at the end token. An image
  tower of another architecture (EVA, ConvNeXt, any of timm's) is called as it is, for text prompts alone.
- the clip package: `CLIP`.

SigLIP's text tower attends in both directions, has no start token and is read at its last position; CoCa's has a class
token; Chinese-CLIP's and AltCLIP's have other tokenizers. Those are refused.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from torch import Tensor, nn

from gram_meta.backbone.weights import (
    ACTIVATIONS,
    END,
    HEAD,
    OPENAI,
    Design,
    ForeignTower,
    Tower,
    from_hugging_face,
    from_open_clip,
    hugging_face_design,
    pixel_statistics,
    tower_of,
)
from gram_meta.errors import GramError


class Found(NamedTuple):
    """What `build_clip` needs of a model."""

    name: str
    state: Mapping[str, Tensor]  # under OpenAI's names
    design: Design
    tower: ForeignTower | None = None  # the image tower, if it is of another architecture


def read_model(model: nn.Module) -> Found:
    """Return the weights and the design of a model; raise `GramError` for one of another architecture."""
    kinds = [f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(model).__mro__]
    if "transformers.CLIPModel" in kinds:
        return _of_transformers(model)
    if {"open_clip.CLIP", "open_clip.CustomTextCLIP"} & set(kinds):
        return _of_open_clip(model, kinds[0])
    if "clip.CLIP" in kinds:
        return Found("clip.CLIP", model.state_dict(), OPENAI)
    _refuse(kinds[0])


def _refuse(name: str) -> NoReturn:
    expected = "a transformers.CLIPModel, or a CLIP of open_clip or of the clip package"
    reasons = {"siglip": ", whose text tower is not causal", "coca": ", whose text tower is read at a class token"}
    reason = next((reason for kind, reason in reasons.items() if kind in name.lower()), "")
    raise GramError(f"backbone: expected {expected}, found {name}{reason}")


def _of_transformers(model: Any) -> Found:
    name = model.name_or_path or "transformers.CLIPModel"
    folder = Path(name) if Path(name).is_dir() else None
    design = hugging_face_design(model.config.to_dict(), name, folder)
    return Found(name, from_hugging_face(model.state_dict(), name), design)


def _of_open_clip(model: Any, name: str) -> Found:
    text, visual = getattr(model, "text", model), model.visual
    state = from_open_clip(model.state_dict())
    state.pop("logit_bias", None)  # adds the same to the logits of all classes
    if found := _fault_of_text(text, model, state):
        raise GramError(f"{name}: expected a text tower as OpenAI's CLIP has it, found {found}")
    tower, image = None, Tower()
    if _is_openais(visual):
        image = _design_of(visual.transformer.resblocks, visual.ln_post, name)
    elif not _is_openais_resnet(visual):
        tower = ForeignTower(visual, _side(visual, name))
        state = {key: value for key, value in state.items() if not key.startswith("visual.")}
    pixels = pixel_statistics(getattr(visual, "image_mean", None), getattr(visual, "image_std", None), name)
    design = Design(_design_of(text.transformer.resblocks, text.ln_final, name), image, *pixels)
    return Found(name, state, design, tower)


def _fault_of_text(text: Any, model: Any, state: Mapping[str, Tensor]) -> str:
    """Return why the towers' passes do not compute a text tower of open_clip; "" if they do."""
    if text is not model and type(text).__name__ != "TextTransformer":
        return f"a {type(text).__name__}"
    if text.attn_mask is None:
        return "one that is not causal, such as SigLIP's"
    pool, end = (getattr(text, f"text_{key}", getattr(text, key, None)) for key in ("pool_type", "eos_id"))
    if pool != "argmax" and (pool, end) != ("eos", END):
        return f"one that is read at {pool!r}, not at the end token"
    if "text_projection" not in state:
        return "one whose projection has a bias, or none"
    if not all(map(_is_plain, text.transformer.resblocks)):
        return "layers with scales, norms or activations of their own"
    return ""


def _is_openais(visual: Any) -> bool:
    """Return whether `towers.image_features` computes an image tower of open_clip."""
    if type(visual).__name__ != "VisionTransformer" or visual.attn_pool is not None or visual.proj is None:
        return False
    usual = visual.pool_type == "tok" and not visual.final_ln_after_pool and isinstance(visual.ln_pre, nn.LayerNorm)
    return usual and all(map(_is_plain, visual.transformer.resblocks))


def _is_openais_resnet(visual: Any) -> bool:
    if type(visual).__name__ != "ModifiedResNet":
        return False
    pool = visual.attnpool
    return bool(pool.num_heads * HEAD == pool.q_proj.in_features)


def _is_plain(block: Any) -> bool:
    plain = type(block).__name__ == "ResidualAttentionBlock" and isinstance(block.ls_1, nn.Identity)
    return plain and _activation(block) in ACTIVATIONS


def _activation(block: Any) -> str:
    act = block.mlp.gelu
    return {"QuickGELU()": "quick_gelu", "GELU(approximate='none')": "gelu"}.get(repr(act), repr(act))


def _design_of(blocks: Sequence[Any], norm: nn.LayerNorm, name: str) -> Tower:
    """Return how a transformer of open_clip with this last norm computes; its layers are built alike."""
    attn = blocks[0].attn
    return tower_of(name, "the towers", _activation(blocks[0]), attn.embed_dim, attn.num_heads, norm.eps)


def _side(visual: Any, name: str) -> int:
    """Return the side in pixels of an image tower's square input."""
    size = getattr(visual, "image_size", None)
    height, width = size if isinstance(size, tuple) else (size, size)
    if not isinstance(height, int) or height != width:
        raise GramError(f"{name}.visual: expected square images, found {size}")
    return height
