"""Embedding of image-text pairs: `run.embed_pairs` is what `gram embed` runs."""
