"""Registries for networks. CoOp-style trainers bring CLIP themselves, so the built-in engine has none in them."""

from __future__ import annotations

from typing import Any

from gram_meta.engine.builtin.utils import Registry, check_availability

BACKBONE_REGISTRY = Registry("BACKBONE")
HEAD_REGISTRY = Registry("HEAD")
NETWORK_REGISTRY = Registry("NETWORK")

__all__ = ["BACKBONE_REGISTRY", "HEAD_REGISTRY", "NETWORK_REGISTRY", "build_backbone", "build_head", "build_network"]


def build_backbone(name: str, verbose: bool = True, **kwargs: Any) -> Any:
    """A registered backbone; it tells its width in `out_features`."""
    return _build(BACKBONE_REGISTRY, "Backbone", name, verbose, kwargs)


def build_head(name: str, verbose: bool = True, **kwargs: Any) -> Any:
    """A registered head; it tells its width in `out_features`."""
    return _build(HEAD_REGISTRY, "Head", name, verbose, kwargs)


def build_network(name: str, verbose: bool = True, **kwargs: Any) -> Any:
    """A registered network."""
    return _build(NETWORK_REGISTRY, "Network", name, verbose, kwargs)


def _build(registry: Registry, what: str, name: str, verbose: bool, kwargs: dict[str, Any]) -> Any:
    check_availability(name, registry.registered_names())
    if verbose:
        print(f"{what}: {name}")
    return registry.get(name)(**kwargs)
