"""Train the packaged CLIP as it was trained: the same as `python -m gram_meta.demo.train_clip`, with its options."""

from gram_meta.demo.train_clip import main

if __name__ == "__main__":
    raise SystemExit(main())
