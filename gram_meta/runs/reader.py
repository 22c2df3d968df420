"""What a finished run, a checkpoint file or a meta-checkpoint holds for use: prompts, classes, options, backbone.

Facts are taken where a run has left them: the checkpoint itself, results.json, run.json, and, of an official CoOp run,
its log.txt. Nothing here needs a dataset.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gram_meta.errors import GramError
from gram_meta.files import PathLike, read_json
from gram_meta.runs.coop_log import FILE as LOG
from gram_meta.runs.coop_log import read_log
from gram_meta.runs.folder import flat

if TYPE_CHECKING:
    from torch import Tensor

LEARNER = "prompt_learner"  # the folder of a run's checkpoints, CoOp's name for it and ours
META = "best.safetensors"  # what a meta-training leaves
CLASS_TENSORS = ("token_prefix", "token_suffix")  # of the class names of training; CoOp saves them too


@dataclass
class Saved:
    """A classifier, as far as files say what it is.

    Attributes:
        path: of the checkpoint; of the run's folder where nothing was learned.
        trainer: name of the trainer, such as "CoOpGRAM".
        config: options of the run by their full keys ("TRAINER.COOP.PREC"); empty where nothing says them.
        state_dict: learned tensors by the checkpoint's names; empty for ZeroshotCLIP.
        epoch: of the checkpoint; 0 where there is none.
        classnames: of training, in the order of the labels; None where no file says them.
        backbone, fingerprint: of the CLIP that the prompts belong to; "" where no file says it.
        template: the class sentence that visual prompts were learned with; None: as the options say.
    """

    path: Path
    trainer: str
    config: dict[str, Any] = field(default_factory=dict)
    state_dict: dict[str, Tensor] = field(default_factory=dict)
    epoch: int = 0
    classnames: list[str] | None = None
    backbone: str = ""
    fingerprint: str = ""
    template: str | None = None


def read_saved(path: PathLike, epoch: int | None = None) -> Saved:
    """Read what lies at `path`.

    Args:
        path: the output folder of a run (this project's or an official CoOp's), of an evaluation of one, or of a
            meta-training; or a checkpoint (`model.pth.tar-50`, `best.safetensors`).
        epoch: which checkpoint of a run; None: the last, or the best by validation where the run ended with that.

    Raises:
        GramError: nothing usable there; the sentence says what is.
    """
    path = Path(os.path.expanduser(os.fspath(path)))
    if path.suffix == ".safetensors":
        return _of_meta_checkpoint(path)
    if path.is_file():
        return _of_checkpoint(path, path.parent.parent if path.parent.name == LEARNER else None)
    if path.name == LEARNER and not (path / LEARNER).exists():
        path = path.parent
    if not (path / LEARNER).is_dir():
        results, options = _results(path), options_of(path)
        if results.get("model_dir"):
            return _of_evaluation(path, results, epoch)
        if options.get("TRAINER.NAME") == "ZeroshotCLIP":
            return _with_results(Saved(path, "ZeroshotCLIP", options), results)
        if (path / META).is_file():
            return _of_meta_checkpoint(path / META)
    import gram_meta.plugin  # noqa: F401, brings the trainers in
    from gram_meta.runs.saved import choose

    checkpoint, _ = choose(path, epoch)  # says what is there where it finds none
    return _of_checkpoint(checkpoint, path)


# ---------------------------------------------------------------------------------------------- the kinds of places


def _of_checkpoint(path: Path, folder: Path | None) -> Saved:
    from gram_meta.engine.checkpoints import read_checkpoint

    state = read_checkpoint(path)
    tensors = state.get("state_dict", state)
    learned = {
        name.removeprefix("module."): value
        for name, value in tensors.items()
        if name.removeprefix("module.") not in CLASS_TENSORS
    }
    options = (options_of(folder) if folder else {}) | state.get("reads", {})
    saved = Saved(path, state.get("trainer") or options.get("TRAINER.NAME", ""), options, learned)
    saved.trainer = saved.trainer or _trainer_of(path, learned)
    saved.epoch = int(state.get("epoch") or 0)
    saved.classnames = list(state["classnames"]) if state.get("classnames") else None
    saved = _with_results(saved, _results(folder) if folder else {})
    backbone = state.get("backbone") or {}
    saved.backbone = backbone.get("name") or saved.backbone
    saved.fingerprint = backbone.get("fingerprint") or saved.fingerprint
    return saved


def _of_evaluation(folder: Path, results: Mapping[str, Any], epoch: int | None) -> Saved:
    """The prompts that were evaluated there, with the classes that they were evaluated on."""
    source = Path(results["model_dir"])
    if not source.is_dir():
        raise GramError(
            f"--model-dir {folder}: holds an evaluation of the prompts in {source}, which is no folder seen from here; "
            "give the folder of the training run, and --classes"
        )
    saved = read_saved(source, epoch if epoch is not None else results.get("epoch") or None)
    saved.classnames = results.get("classnames")
    return saved


def _of_meta_checkpoint(path: Path) -> Saved:
    from gram_meta.method.checkpoint import load_meta_checkpoint

    meta = load_meta_checkpoint(path)
    names = {"text": "ctx", "visual": "visual_ctx"}
    state = {names[kind]: value for kind, value in meta.prompts.items()} | dict(meta.extras)
    saved = Saved(path, _trainer_of(path, state), {}, state)
    saved.backbone, saved.fingerprint = meta.backbone_name, meta.backbone_fingerprint
    saved.template = meta.config.get("PROMPT", {}).get("TEMPLATE")
    return saved


def _with_results(saved: Saved, results: Mapping[str, Any]) -> Saved:
    saved.backbone = saved.config.get("MODEL.BACKBONE.NAME", "")
    saved.fingerprint = results.get("backbone_fingerprint", "")
    if saved.classnames is None and results.get("classnames"):
        saved.classnames = list(results["classnames"])
    return saved


def _trainer_of(path: Path, learned: Mapping[str, Any]) -> str:
    """Whose tensors these are, where nothing says it: every trainer's have names of their own."""
    kinds = {
        ("ctx",): "CoOp",
        ("ctx", "meta_net"): "CoCoOp",
        ("visual_ctx",): "VPT",
        ("ctx", "visual_ctx"): "JointPrompt",
    }
    found = tuple(sorted({name.partition(".")[0] for name in learned}))
    if found not in kinds:
        expected = "; ".join(" and ".join(names) for names in kinds)
        raise GramError(f"{path}: expected learned prompts ({expected}), found {', '.join(found) or 'nothing'}")
    return kinds[found]


# ------------------------------------------------------------------------------------------------- a run's options


def _results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def options_of(folder: Path) -> dict[str, Any]:
    """Every option of a run by its full key: from results.json, run.json or, last, from the log."""
    results = _results(folder)
    if results.get("config"):
        return dict(flat(results["config"]))
    if (folder / "run.json").is_file():
        return dict(read_json(folder / "run.json").get("run", {}))
    log = read_log(folder / LOG) if (folder / LOG).is_file() else None
    return dict(flat(log.config)) if log else {}


# ------------------------------------------------------------------------------------------------------ class names


def read_classes(words: str) -> list[str]:
    """Class names from "cat, dog, sea lion", or from a file: a name a line, or JSON.

    A file's lines may be those of ImageNet's classnames.txt ("n01440764 tench"); JSON is a list of names, or a split
    file in CoOp's format, whose classes are taken in the order of their labels.

    Raises:
        GramError: fewer than two names, a name twice, or a file of something else.
    """
    path = Path(os.path.expanduser(words))
    try:
        is_file = path.is_file()
    except OSError:  # a list of names may be longer than a file's name can be
        is_file = False
    if is_file:
        names = _classes_of_json(path) if path.suffix == ".json" else _classes_of_lines(path)
    else:
        names = [" ".join(name.split()) for name in words.split(",") if name.strip()]
        if len(names) == 1 and (path.suffix or os.sep in words):
            raise GramError(f"--classes {words}: expected class names, or a file of them, found no such file")
    if len(names) < 2:
        raise GramError(f"--classes {words}: expected at least two class names, found {len(names)}")
    return names


def _classes_of_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise GramError(f"{path}: expected UTF-8 text, a class name a line, found something else ({error})") from None
    names = [" ".join(line.split()) for line in lines if line.strip()]
    if names and all(re.match(r"n\d{8}\s", name) for name in names):  # ImageNet's folders stand before the names
        names = [name.partition(" ")[2] for name in names]
    return names


def _classes_of_json(path: Path) -> list[str]:
    values = read_json(path)
    if isinstance(values, list) and all(isinstance(value, str) for value in values):
        return values
    try:
        named = {int(label): str(name) for part in values.values() for _, label, name in part}
    except (AttributeError, TypeError, ValueError):
        raise GramError(
            f"{path}: expected a list of class names or a split file in CoOp's format, found something else"
        ) from None
    return [named[label] for label in sorted(named)]
