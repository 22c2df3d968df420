"""results.json: what a run measured, unrounded, and everything it was measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import gram_meta
from gram_meta import engine
from gram_meta.config import as_dict
from gram_meta.files import write_json
from gram_meta.runs import layout

FORMAT = 1


def write_results(trainer: Any) -> Path:
    """Write `<OUTPUT_DIR>/results.json` from a trainer that has just evaluated; returns its path.

    `trainer` offers metrics, curve, loaded, trained, seconds, backbone, classnames and facts() (see trainers/base.py).
    """
    cfg = trainer.cfg
    results = {
        "format": FORMAT,
        "trainer": cfg.TRAINER.NAME,
        "dataset": cfg.DATASET.NAME,
        "subsample": cfg.DATASET.get("SUBSAMPLE_CLASSES", "all"),
        "shots": cfg.DATASET.NUM_SHOTS,
        "seed": cfg.SEED,
        "backbone": cfg.MODEL.BACKBONE.NAME,
        "split": "val" if cfg.TEST.SPLIT == "val" and trainer.val_loader is not None else "test",
        "eval_only": not trainer.trained,
        "model_dir": trainer.loaded["model_dir"] if not trainer.trained else "",
        "epoch": trainer.epoch + 1 if trainer.trained else trainer.loaded["epoch"],
        # whose prompts these are; another than `trainer` where that one only evaluates them; "": nobody's, a start
        "learned_by": cfg.TRAINER.NAME if trainer.trained else trainer.loaded["learned_by"],
        "classes": len(trainer.classnames),
        "classnames": list(trainer.classnames),  # in the order of the labels
        "metrics": trainer.metrics,
        "curve": trainer.curve,
        "regulator": {},
        "raw_parameters": [],  # learned, but not known to the regulator
        "meta_checkpoint": {"path": "", "sha256": "", "settings": {}},
        "few_shot": getattr(trainer.dm.dataset, "few_shot", {"path": "", "sha256": ""}),
        "backbone_fingerprint": trainer.backbone.fingerprint,
        **trainer.facts(),
        "config": as_dict(cfg),
        "versions": versions(),
        "seconds": trainer.seconds,
    }
    path = Path(cfg.OUTPUT_DIR, layout.RESULTS)
    write_json(path, results)
    print(f"Results: {os.fspath(path)}")
    return path


def versions() -> dict[str, str]:
    """Versions of what a result depends on; "" for what is not installed as a package."""
    found = {"python": platform.python_version(), "gram-meta": gram_meta.__version__, "dassl": engine.room()}
    for package in ("torch", "torchvision", "numpy", "pillow", "clip-anytorch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    return found
