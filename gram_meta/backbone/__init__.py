"""CLIP: the only package that knows its code, its weights and its towers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gram_meta.backbone.clip import Backbone as Backbone
    from gram_meta.backbone.clip import load_backbone as load_backbone

__all__ = ["Backbone", "load_backbone"]


def __getattr__(name: str) -> Any:
    """Import torch and CLIP only when a name is asked for: `packaged` and `weights` are read without them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gram_meta.backbone import clip

    return getattr(clip, name)
