"""The few-shot run that the experiments here share: 16 shots of the base classes, watched on base and new classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CONFIG = "gram_small_c4_ep10_batch32_ctxv1"


def few_shot(root: str, dataset: str, trainer: str, out: Path, seed: int, opts: Sequence[str]) -> dict:
    """Train, unless the run is already finished; return the contents of its results.json."""
    from gram_meta.coop.launch import train

    return train(
        [
            *("--trainer", trainer, "--root", root, "--seed", str(seed), "--output-dir", str(out)),
            *("--config-file", CONFIG, "--dataset-config-file", dataset, "DATASET.NUM_SHOTS", "16"),
            *("DATASET.SUBSAMPLE_CLASSES", "base", *opts),
        ],
        quiet=True,
    )
