"""Transforms by name."""

from gram_meta.engine.builtin.data.transforms.transforms import INTERPOLATION_MODES, build_transform

__all__ = ["INTERPOLATION_MODES", "build_transform"]
