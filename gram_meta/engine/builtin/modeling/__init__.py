"""Registries for networks. CoOp-style trainers bring CLIP themselves, so the built-in engine has none in them."""

from typing import Any

from gram_meta.engine.builtin.utils.registry import Registry, build

BACKBONE_REGISTRY = Registry("BACKBONE")
HEAD_REGISTRY = Registry("HEAD")
NETWORK_REGISTRY = Registry("NETWORK")

__all__ = ["BACKBONE_REGISTRY", "HEAD_REGISTRY", "NETWORK_REGISTRY", "build_backbone", "build_head", "build_network"]


def build_backbone(name: str, verbose: bool = True, **kwargs: Any) -> Any:
    """Build a registered backbone; its attribute `out_features` is its width."""
    return build(BACKBONE_REGISTRY, "Backbone", name, verbose, **kwargs)


def build_head(name: str, verbose: bool = True, **kwargs: Any) -> Any:
    """Build a registered head; its attribute `out_features` is its width."""
    return build(HEAD_REGISTRY, "Head", name, verbose, **kwargs)


def build_network(name: str, verbose: bool = True, **kwargs: Any) -> Any:
    """Build a registered network."""
    return build(NETWORK_REGISTRY, "Network", name, verbose, **kwargs)
