"""The old path of scripts/train_packaged_clip.py, the recipe of the packaged CLIP; the message goes in version 0.3."""

raise SystemExit(
    "python -m gram_meta.demo.train_clip: expected scripts/train_packaged_clip.py of a clone of the repository, which "
    "holds the recipe since version 0.2; run python scripts/train_packaged_clip.py"
)
