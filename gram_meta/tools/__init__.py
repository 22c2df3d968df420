"""Tools for finished runs and meta-checkpoints: predict, interpret, export, check-overlap, doctor."""
