"""results.json: the unrounded results of a run, with its settings, versions and inputs."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gram_meta
from gram_meta import engine
from gram_meta.config import as_dict
from gram_meta.files import write_arrays, write_json
from gram_meta.runs import layout

FORMAT = 1


@dataclass(frozen=True)
class Loaded:
    """The prompts that were loaded for an evaluation; empty if none were."""

    model_dir: str = ""
    epoch: int = 0
    learned_by: str = ""  # name of a trainer


@dataclass
class RunRecord:
    """Facts that a trainer records for results.json."""

    # of the last evaluation: percentages, and the counts "total" and "correct"
    metrics: dict[str, float] = field(default_factory=dict)
    predictions: dict[str, Any] = field(default_factory=dict)  # arrays of label, prediction and confidence, by image
    curve: list[dict[str, Any]] = field(default_factory=list)  # accuracy on base and new classes along the way
    trained: bool = False  # whether this trainer has trained, and not only evaluated
    loaded: Loaded = field(default_factory=Loaded)  # prompts that it evaluates instead of those of its last epoch
    # of training, with the parts before a resume, and of the test
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "test": 0.0})


def write_results(trainer: Any) -> Path:
    """Write `<OUTPUT_DIR>/results.json` for a trainer that has just evaluated, and return its path.

    Args:
        trainer: offers cfg, record (a `RunRecord`), epoch, backbone, classnames and facts(); see trainers/base.py.
    """
    cfg, record = trainer.cfg, trainer.record
    results = {
        "format": FORMAT,
        "trainer": cfg.TRAINER.NAME,
        "dataset": cfg.DATASET.NAME,
        "subsample": cfg.DATASET.get("SUBSAMPLE_CLASSES", "all"),
        "shots": cfg.DATASET.NUM_SHOTS,
        "seed": cfg.SEED,
        "backbone": cfg.MODEL.BACKBONE.NAME,
        "split": "val" if cfg.TEST.SPLIT == "val" and trainer.val_loader is not None else "test",
        "eval_only": not record.trained,
        "model_dir": record.loaded.model_dir if not record.trained else "",
        "epoch": record.loaded.epoch or trainer.epoch + 1 if record.trained else record.loaded.epoch,
        # the trainer that learned the prompts, where `trainer` only evaluates them; "": initial prompts
        "learned_by": cfg.TRAINER.NAME if record.trained else record.loaded.learned_by,
        "classes": len(trainer.classnames),
        "classnames": list(trainer.classnames),  # in the order of the labels
        "metrics": record.metrics,
        "curve": record.curve,
        "regulator": {},
        "raw_parameters": [],  # learned, but not known to the regulator
        "meta_checkpoint": {"path": "", "sha256": "", "settings": {}},
        "few_shot": getattr(trainer.dm.dataset, "few_shot", {"path": "", "sha256": ""}),
        "backbone_fingerprint": trainer.backbone.fingerprint,
        **trainer.facts(),
        "config": as_dict(cfg),
        "versions": versions(),
        "seconds": record.seconds,
    }
    _write_predictions(trainer, results["split"])
    path = Path(cfg.OUTPUT_DIR, layout.RESULTS)
    write_json(path, results)
    print(f"Results: {os.fspath(path)}")
    return path


def _write_predictions(trainer: Any, split: str) -> None:
    """Write predictions.npz: image (path relative to DATASET.ROOT), label, prediction, confidence."""
    from torch.utils.data import SequentialSampler

    loader = trainer.val_loader if split == "val" else trainer.test_loader
    root = os.path.abspath(trainer.cfg.DATASET.ROOT)
    images = [os.path.relpath(item.impath, root) for item in loader.dataset.data_source]
    names = [image.encode("utf-8", "backslashreplace").decode() for image in images]
    if isinstance(loader.sampler, SequentialSampler):  # else the order of the predictions is another
        arrays = {"image": names, **trainer.record.predictions}
        write_arrays(Path(trainer.cfg.OUTPUT_DIR, layout.PREDICTIONS), arrays, compress=True)


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on; "" for a package that is not installed."""
    found = {"python": platform.python_version(), "gram-meta": gram_meta.__version__, "dassl": engine.backend()}
    for package in ("torch", "torchvision", "numpy", "pillow", "clip-anytorch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    return found
