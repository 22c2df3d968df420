"""Image-text pairs: their sources (`sources`), `gram embed` (`embedding`), and the store that it writes (`store`)."""
