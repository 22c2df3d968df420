"""The types of the JSON files in a run folder, which `files.read_json` checks. Keys that are not named here stay."""

from typing import Any, Literal, TypedDict

from gram_meta.config import flatten
from gram_meta.errors import GramError
from gram_meta.files import Count, ModelFacts, Number, Percent, check_type


class Metrics(TypedDict, total=False):
    accuracy: Percent
    error_rate: Percent
    macro_f1: Percent
    perclass_accuracy: Percent
    total: Number  # a whole number; a float where a log was read
    correct: Number


class Point(TypedDict, total=False):
    """Accuracy after a number of steps."""

    step: Count
    epoch: Number
    base: Percent | None
    new: Percent | None


NEEDED = ("trainer", "dataset", "subsample", "shots", "seed", "backbone", "split", "metrics")  # by a report

# The options that readers ask for, by their full keys
Settings = TypedDict(
    "Settings",
    {
        "DATASET.FOLDER": str,
        "MODEL.BACKBONE.NAME": str,
        "OPTIM.MAX_EPOCH": Count,
        "TEST.FINAL_MODEL": str,
        "TRAINER.NAME": str,
        "TRAINER.GRAM.INIT": bool,
        "TRAINER.GRAM.REGULATE": bool,
        "TRAINER.GRAM.STEP_SCALE": Number,
        "TRAINER.JOINT.N_CTX_TEXT": Count,
        "TRAINER.JOINT.N_CTX_VISION": Count,
        "TRAINER.VPT.PROMPT_DEPTH_VISION": Count,
        # of a meta-training
        "CHC.LABELLED": bool,
        "OUTER.META": bool,
        "PROMPT.TEXT_TOKENS": Count,
        "PROMPT.VISUAL_TOKENS": Count,
        "REGULATOR.ENABLED": bool,
        "TASKS.DOMAIN_SHIFT": bool,
    },
    total=False,
)


class Source(TypedDict, total=False):
    """A file that a run started from."""

    path: str
    sha256: str
    settings: Settings | None  # of a meta-checkpoint


class Results(TypedDict, total=False):
    """results.json: see `runs.results.write_results`."""

    format: Literal[1]
    trainer: str
    dataset: str
    subsample: Literal["all", "base", "new"]
    shots: int
    seed: int
    backbone: str
    split: str
    metrics: Metrics
    eval_only: bool
    model_dir: str
    epoch: Count
    learned_by: str
    classnames: list[str] | None
    curve: list[Point]
    regulator: dict[str, Any]
    meta_checkpoint: Source | None
    few_shot: Source | None
    backbone_fingerprint: str
    config: dict[str, Any]
    versions: dict[str, str] | None
    seconds: dict[str, Number] | None


class CheckpointFacts(TypedDict, total=False):
    """What this project adds to Dassl's checkpoints: see trainers/checkpointing.py."""

    epoch: Count
    trainer: str
    backbone: ModelFacts
    reads: dict[str, Literal["end", "middle", "front"]]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any]
    random: dict[str, Any]
    dataset: str
    folder: str
    subsample: str
    classnames: list[str]
    curve: list[Point]
    seconds: Number
    meta_checkpoint: Source | None


class RunFile(TypedDict, total=False):
    """run.json, of `gram train`."""

    finished: bool
    results: bool
    run: Settings


class MetaRunFile(TypedDict, total=False):
    """run.json, of `gram pretrain`."""

    config: dict[str, Any]
    version: str
    store: str
    hierarchy: str


def check_results(results: Any, where: str, whole: bool = True) -> dict[str, Any]:
    """Return the contents of results.json if they have the type `Results`, with a config of the types in `Settings`.

    Args:
        whole: whether to expect every key that a report needs.

    Raises:
        GramError: another format, another type, or a missing key.
    """
    if not isinstance(results, dict) or results.get("format", 0 if whole else 1) != 1:
        found = results.get("format", "none") if isinstance(results, dict) else type(results).__name__
        raise GramError(f"{where}: expected a result of format 1, found format {found}")
    lacking = [key for key in NEEDED if key not in results]
    if lacking and whole:
        raise GramError(f"{where}: expected the keys of a result, found no {', '.join(lacking)}")
    check_type(results, Results, where)
    check_type(flatten(results.get("config", {})), Settings, f"{where}: config")
    return results
