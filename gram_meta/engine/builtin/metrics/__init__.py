"""Measures of a batch."""

from gram_meta.engine.builtin.metrics.accuracy import compute_accuracy

__all__ = ["compute_accuracy"]
