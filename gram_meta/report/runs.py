"""Runs: what each `results.json` measured, and how it differs from others of its trainer."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gram_meta.config import flatten
from gram_meta.errors import GramError
from gram_meta.report.evidence import Evidence, dataset_of, gather

# Settings of the place and manner of a run, which do not change what it measures.
_PLACE = tuple(
    """
    OUTPUT_DIR RESUME SEED USE_CUDA VERBOSE ENV_INFO
    DATASET.ROOT DATASET.NAME DATASET.FOLDER DATASET.SUBSAMPLE_CLASSES DATASET.SOURCE_DOMAINS DATASET.TARGET_DOMAINS
    DATALOADER.NUM_WORKERS DATALOADER.TEST
    TEST.EVALUATOR TEST.PER_CLASS_RESULT TEST.COMPUTE_CMAT TEST.NO_TEST TEST.SPLIT TEST.PER_EPOCH TEST.AT_STEPS
    TRAIN.PRINT_FREQ TRAIN.CHECKPOINT_FREQ TRAINER.GRAM.META TRAINER.MEMORY
    """.split()
) + ("TRAINER.GRAM.CHECKPOINT",)  # the meta-checkpoint is compared by its hash instead
# Settings of training, which a run that never trains does not have.
_TRAINING = ("OPTIM", "TRAIN", "DATALOADER", "DATASET.NUM_SHOTS", "INPUT.TRANSFORMS", "INPUT.RRCROP_SCALE")

# The node of a trainer's options: TRAINER.<node>.
_NODES = {"JointPrompt": "JOINT", "UniGRAM": "JOINT", "CoOpGRAM": "COOP", "CoCoOpGRAM": "COCOOP", "VPTGRAM": "VPT"}
WORDS = "a photo of a"  # the usual initialisation; with fewer tokens, its first words
FROM_LOG = ", from a log"  # end of the label of a run that has only a log.txt
EPOCHS = 10  # the schedule of every trainer (Sec. 4.1)
TOKENS = (2, 2)  # text and visual tokens of the joint prompts

# Table 6: what the meta-checkpoint was trained without
NO_SHIFT = "no domain shift"
NO_REGULATOR = "no regulator"
NO_META = "no meta-learning"
LABELLED = "labelled data"
SHIPPED_LABEL = "shipped"  # the name of the folder in the package, too


@dataclass(frozen=True)
class Run:
    """One `results.json`: one trainer on one set of classes of one dataset, with one seed."""

    path: Path
    label: str  # the trainer and its variant, e.g. "CoOpGRAM, R off"
    dataset: str
    subsample: str  # "base", "new" or "all"
    seed: int
    value: float  # the metric, in percent
    untrained: bool
    settings: Mapping[str, Any] = field(repr=False)
    few_shot: str = ""  # SHA-256 of the few-shot subset
    curve: tuple[Mapping[str, float], ...] = field(default=(), repr=False)
    trainer: str = ""
    source: str = ""  # the dataset of the training; the run's own if nothing was trained
    shots: int = 0  # of the training
    backbone: str = ""
    epochs: int = EPOCHS
    ablation: tuple[str, ...] = ()  # what its meta-training lacks (Table 6)
    tokens: tuple[int, int] | None = None  # of a joint prompt: text, visual (Table 7)
    start: str | None = None  # the words of the initialisation; "": random; None: theta*
    metric: str = "accuracy"
    split: str = "test"
    result: Mapping[str, Any] = field(default_factory=dict, repr=False)  # all of results.json

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Label, dataset, classes and seed: a table has one run of each."""
        return self.label, self.dataset, self.subsample, self.seed

    @property
    def transferred(self) -> bool:
        """Whether the model was trained on another dataset."""
        return self.source != self.dataset

    @property
    def plain(self) -> bool:
        """Whether the trainer has its standard form: the label is its name, or that and "from a log"."""
        return self.label in (self.trainer, self.trainer + FROM_LOG)

    @property
    def remark(self) -> str:
        """How the value was read from a log; "" if it is from results.json."""
        if "log" not in self.result:
            return ""
        exact = self.metric in ("accuracy", "error_rate") and not self.result["log"]["rounded"]
        return "from the log's counts" if exact else "as the log prints it, rounded to one decimal"


def read_runs(
    folders: Iterable[str | Path], metric: str = "accuracy", by: Sequence[str] = (), split: str = "test"
) -> list[Run]:
    """Return every run in `folders` (or collections) that was tested on `split`, sorted by path.

    Args:
        by: settings ("OPTIM.MAX_EPOCH") whose values become part of the label.

    Raises:
        GramError: a folder without results, or a file that is not a result.
    """
    return runs_of(gather(folders), metric, by, split)


def runs_of(evidence: Evidence, metric: str = "accuracy", by: Sequence[str] = (), split: str = "test") -> list[Run]:
    """Return the runs in `evidence`; see `read_runs`."""
    runs = [_run(path, evidence, metric, by) for path, it in evidence.results.items() if it["split"] == split]
    if not runs:
        raise GramError(f"expected runs tested on the {split} split, found {len(evidence.results) or 'none'} on others")
    runs = _label_shipped(runs)
    return runs if "OPTIM.MAX_EPOCH" in by else _label_epochs(runs)


def _run(path: Path, evidence: Evidence, metric: str, by: Sequence[str]) -> Run:
    result = evidence.results[path]
    if metric not in result["metrics"]:
        raise GramError(f"{path}: expected the metric {metric}, found {', '.join(result['metrics'])}")
    training = evidence.training_of(path)
    settings = flatten(training.get("config", {}))
    settings["backbone"] = result["backbone"]
    settings["meta-checkpoint"] = (training.get("meta_checkpoint") or {}).get("sha256", "")
    settings["shots"] = training["shots"]
    untrained = is_untrained(result)
    ablation, tokens, start = _ablation(training), _tokens(training, settings), _start(training, settings)
    words = [training["trainer"], *ablation, *_words(training, result, settings)]
    if tokens and tokens != TOKENS:
        words.append(f"{tokens[0]}+{tokens[1]} tokens")
    return Run(
        path=path,
        label=", ".join(words + _by(by, settings)) + (FROM_LOG if "log" in result else ""),
        dataset=dataset_of(result),
        subsample=result["subsample"],
        seed=int(result["seed"]),
        value=float(result["metrics"][metric]),
        untrained=untrained,
        settings={key: value for key, value in settings.items() if _compared(key, untrained)},
        few_shot="" if untrained else (training.get("few_shot") or {}).get("sha256", ""),
        curve=tuple(result.get("curve") or ()),
        trainer=training["trainer"],
        source=dataset_of(result) if untrained else evidence.source_of(path),
        shots=int(training["shots"]),
        backbone=result["backbone"],
        epochs=int(settings.get("OPTIM.MAX_EPOCH", EPOCHS)),
        ablation=ablation,
        tokens=tokens,
        start=start,
        metric=metric,
        split=result["split"],
        result=result,
    )


def is_untrained(result: Mapping[str, Any]) -> bool:
    """Return whether no step was taken: zero-shot, or a test of an initial prompt."""
    return bool(result.get("eval_only")) and not result.get("model_dir")


# ------------------------------------------------------------------- How a run differs from its trainer's standard form


def _meta_settings(training: Mapping[str, Any]) -> Mapping[str, Any]:
    return (training.get("meta_checkpoint") or {}).get("settings") or {}


def _ablation(training: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the meta-training lacked (Table 6, rows 1 to 4)."""
    meta, words = _meta_settings(training), []
    if meta.get("TASKS.DOMAIN_SHIFT") is False:
        words.append(NO_SHIFT)
    if meta.get("OUTER.META") is False:  # without it a regulator cannot learn
        words.append(NO_META)
    elif meta.get("REGULATOR.ENABLED") is False:
        words.append(NO_REGULATOR)
    if meta.get("CHC.LABELLED") is True:
        words.append(LABELLED)
    return tuple(words)


def _words(training: Mapping[str, Any], result: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Return words for an initialisation, a regulator or a lack of training that is not the trainer's usual."""
    trainer, words = training["trainer"], []
    zero_shot = trainer.startswith("Zeroshot")
    start = None if zero_shot else _start(training, settings)
    if trainer.endswith("GRAM") and start is not None:
        words.append("random start" if start == "" else "start from words")
    elif start == "":
        words.append("random start")
    elif start is not None and not _is_usual(start, trainer, settings):
        words.append(f'start "{start}"')
    if start is not None and settings.get(f"TRAINER.{_NODES.get(trainer, trainer)}.VISUAL_INIT") == "class_token":
        words.append("start from the class token")
    if trainer == "VPT" and (depth := settings.get("TRAINER.VPT.PROMPT_DEPTH_VISION", 1)) != 1:
        words.append(f"prompts in {depth} layers")  # MaPLe's: a trainer of the same name
    meta = _meta_settings(training)
    has_regulator = meta.get("REGULATOR.ENABLED") is not False and meta.get("OUTER.META") is not False
    off = trainer.endswith("GRAM") and not settings.get("TRAINER.GRAM.REGULATE", True)
    scale = settings.get("TRAINER.GRAM.STEP_SCALE", 1.0)
    if off and not is_untrained(result) and (has_regulator or scale != 1):
        words.append("R off" if scale == 1 else f"R off and step x {scale:.3g}")
    if is_untrained(result) and not zero_shot:
        words.append("no step")
    return words


def _start(training: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """Return the words of the initialisation; "" for a random one; None for theta*, and if the config lacks it."""
    trainer = training["trainer"]
    if trainer.endswith("GRAM") and settings.get("TRAINER.GRAM.INIT", True):
        return None
    words = settings.get(f"TRAINER.{_NODES.get(trainer, trainer.upper())}.CTX_INIT")
    if words is None and trainer.endswith("GRAM"):
        return WORDS
    return None if words is None else str(words).replace("_", " ").strip()


def _is_usual(start: str, trainer: str, settings: Mapping[str, Any]) -> bool:
    """Return whether the initialisation is "a photo of a" or, for a joint prompt of M tokens, its first M words."""
    count = settings.get("TRAINER.JOINT.N_CTX_TEXT", 4) if _NODES.get(trainer) == "JOINT" else 4
    return start == " ".join(WORDS.split()[:count])


def _tokens(training: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return text and visual tokens of a joint prompt; None for other prompts."""
    if _NODES.get(training["trainer"]) != "JOINT":
        return None
    meta = _meta_settings(training)
    text = meta.get("PROMPT.TEXT_TOKENS", settings.get("TRAINER.JOINT.N_CTX_TEXT"))
    visual = meta.get("PROMPT.VISUAL_TOKENS", settings.get("TRAINER.JOINT.N_CTX_VISION"))
    return None if text is None or visual is None else (int(text), int(visual))


def _by(by: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    for key in by:
        if key not in settings:
            known = ", ".join(sorted(settings)[:5])
            raise GramError(f"--by {key}: expected a setting of the runs (such as {known}), found no such setting")
    return [f"{key} {'none' if settings[key] == '' else settings[key]}" for key in by]


def _compared(key: str, untrained: bool) -> bool:
    hidden = _PLACE + (_TRAINING + ("shots",) if untrained else ())
    return not any(key == name or key.startswith(name + ".") for name in hidden)


def _label_shipped(runs: Sequence[Run]) -> list[Run]:
    """Add a word to the labels of runs from a meta-checkpoint of the package, beside runs from others."""
    own = {run.label for run in runs if run.settings["meta-checkpoint"] and not _is_shipped(run)}
    return [
        replace(run, label=f"{run.label}, {SHIPPED_LABEL}") if run.label in own and _is_shipped(run) else run
        for run in runs
    ]


def _is_shipped(run: Run) -> bool:
    made = run.result.get("meta_checkpoint") or {}
    return Path(made.get("path", "")).parent.name == SHIPPED_LABEL


def _label_epochs(runs: Sequence[Run]) -> list[Run]:
    """Add the number of epochs to the labels of trainings that are longer than others of the same label."""
    seen: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    every: dict[str, set[int]] = defaultdict(set)
    for run in runs:
        if not run.untrained:
            seen[run.label, run.source, run.subsample].add(run.epochs)
            every[run.label].add(run.epochs)
    mixed = {label for (label, _, _), epochs in seen.items() if len(epochs) > 1}
    usual = {label: EPOCHS if EPOCHS in every[label] else min(every[label]) for label in mixed}

    def relabel(run: Run) -> Run:
        if run.untrained or run.epochs == usual.get(run.label, run.epochs):
            return run
        return replace(run, label=f"{run.label}, {run.epochs} epochs")

    return list(map(relabel, runs))
