"""Fixtures of the method's tests."""

import pytest


@pytest.fixture
def clip_layer_norm_in_float64(monkeypatch):
    """OpenAI's LayerNorm casts to float32; plain calculations in these tests need float64."""
    import torch

    from gram_meta.backbone.clip import clip_module

    monkeypatch.setattr(clip_module().model.LayerNorm, "forward", torch.nn.LayerNorm.forward)
