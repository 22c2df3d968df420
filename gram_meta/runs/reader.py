"""Reader of finished runs, checkpoint files and meta-checkpoints: prompts, classes, options, backbone.

Facts come from the checkpoint itself, from results.json, from run.json and, for a run of an official CoOp checkout,
from its log.txt. No dataset is needed.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gram_meta.errors import GramError
from gram_meta.files import PathLike, read_json
from gram_meta.method import meta_files
from gram_meta.runs import layout
from gram_meta.runs.layout import LEARNER

if TYPE_CHECKING:
    from torch import Tensor

    from gram_meta.backbone.clip import Backbone

CLASS_TENSORS = ("token_prefix", "token_suffix")  # the class names of training; CoOp saves them too


@dataclass
class Saved:
    """A classifier, as its files describe it."""

    path: Path  # the checkpoint; the folder of the run if nothing was learned
    trainer: str = ""  # name of the trainer, such as "CoOpGRAM"; "" if no file names it
    # options of the run by their full keys ("TRAINER.COOP.PREC"); empty if no file has them
    config: dict[str, Any] = field(default_factory=dict)
    # learned tensors by the checkpoint's names; empty for ZeroshotCLIP
    state_dict: dict[str, Tensor] = field(default_factory=dict)
    epoch: int = 0  # of the checkpoint; 0 if there is none
    classnames: list[str] | None = None  # of training, in the order of the labels; None if no file lists them
    backbone: str = ""  # of the CLIP that the prompts belong to; "" if no file names it
    fingerprint: str = ""
    template: str | None = None  # the class prompt that visual prompts were learned with; None: as the options say


def read_saved(path: PathLike, epoch: int | None = None) -> Saved:
    """Read a classifier from its files.

    Args:
        path: the output folder of a run (of this project, of CoOp or of one of its descendants), of an evaluation of
            one, or of a meta-training; or a checkpoint file (`model.pth.tar-50`, `best.safetensors`).
        epoch: which checkpoint of a run; None: see `layout.choose_checkpoint`.

    Raises:
        GramError: no classifier at `path`; the message lists the files there.
    """
    path = Path(os.path.expanduser(os.fspath(path)))
    if path.suffix == ".safetensors":
        return _read_meta_checkpoint(path)
    if path.is_file():
        return _read_checkpoint(path, path.parent.parent if path.name.startswith("model") else None)
    if path.name == LEARNER and not (path / LEARNER).exists():
        path = path.parent
    learner = layout.learner_in(path)
    if not learner:
        tested, tested_epoch = layout.tested_run(path)
        if tested and Path(tested).resolve() != path.resolve():
            return _read_evaluation(path, Path(tested), epoch if epoch is not None else tested_epoch)
        options = layout.options_of(path)
        if options.get("TRAINER.NAME") == "ZeroshotCLIP":
            return _add_results(Saved(path, "ZeroshotCLIP", options), path)
        if (path / meta_files.BEST).is_file():
            return _read_meta_checkpoint(path / meta_files.BEST)
    checkpoint, _ = layout.choose_checkpoint(path, epoch, learner or LEARNER)
    return _read_checkpoint(checkpoint, path)


def load_clip_of(
    saved: Saved, name: str, widths: Mapping[str, int], device: str = "cpu", precision: str = "fp32"
) -> Backbone:
    """Return the CLIP that prompts were learned with, which is compared with what the files say of it.

    Args:
        name: a name or file; "": as the files say.
        widths, device, precision: as for `check_name` and `load_backbone`.

    Raises:
        GramError: no file names the CLIP, or it is another one.
    """
    from gram_meta.backbone.clip import check_name, load_backbone

    name = name or saved.backbone
    if not name:
        what = "a results.json or log.txt of its run, which names its CLIP"
        raise GramError(f"{saved.path}: expected {what}, found none; name it with --backbone")
    if saved.fingerprint:
        check_name(saved.path, saved.backbone, name, widths)
    clip = load_backbone(name, device, precision)
    if saved.fingerprint:
        clip.check_weights(saved.path, saved.backbone, saved.fingerprint)
    return clip


def infer_trainer(saved: Saved) -> str:
    """Return the trainer that learns tensors of these names, for a checkpoint that names none; refuse other names."""
    kinds = {
        ("ctx",): "CoOp",
        ("ctx", "meta_net"): "CoCoOp",
        ("visual_ctx",): "VPT",
        ("ctx", "visual_ctx"): "JointPrompt",
    }
    found = tuple(sorted({name.partition(".")[0] for name in saved.state_dict}))
    if found not in kinds:
        expected = "; ".join(" and ".join(names) for names in kinds)
        raise GramError(f"{saved.path}: expected learned prompts ({expected}), found {', '.join(found) or 'nothing'}")
    return kinds[found]


def _read_checkpoint(path: Path, run: Path | None) -> Saved:
    """Read a checkpoint, and what the folder of its run adds (None: a file that lies in no run's folder)."""
    from torch import Tensor

    from gram_meta.engine.checkpoints import check_finite
    from gram_meta.runs.saved import read_facts

    state = read_facts(path)
    tensors = {str(name).removeprefix("module."): value for name, value in state.get("state_dict", state).items()}
    learned = {key: value for key, value in tensors.items() if isinstance(value, Tensor) and key not in CLASS_TENSORS}
    check_finite(path, learned)
    options = (layout.options_of(run) if run else {}) | state.get("reads", {})
    saved = Saved(path, state.get("trainer") or "", options, learned)
    epoch, backbone = state.get("epoch"), state.get("backbone") or {}
    saved.epoch = epoch if isinstance(epoch, int) else 0
    saved.classnames = list(state["classnames"]) if state.get("classnames") else None
    saved = _add_results(saved, run)
    saved.backbone = backbone.get("name") or saved.backbone
    saved.fingerprint = backbone.get("fingerprint") or saved.fingerprint
    return saved


def _read_evaluation(folder: Path, source: Path, epoch: int | None) -> Saved:
    """Read the prompts that were evaluated, with the classes that they were evaluated on."""
    if not source.is_dir():
        advice = "expected the folder of the training run, and --classes"
        raise GramError(f"{folder}: evaluates the prompts in {source}, found no such folder from here; {advice}")
    saved = read_saved(source, epoch)
    saved.classnames = layout.read_results(folder).get("classnames")
    return saved


def _read_meta_checkpoint(path: Path) -> Saved:
    from gram_meta.method.checkpoint import load_meta_checkpoint
    from gram_meta.method.prompts import STATE_NAMES

    meta = load_meta_checkpoint(path)
    meta.check_shallow()
    return Saved(
        path,
        state_dict={STATE_NAMES[kind]: value for kind, value in meta.prompts.items()} | dict(meta.extras),
        backbone=meta.backbone_name,
        fingerprint=meta.backbone_fingerprint,
        template=meta.config.get("PROMPT", {}).get("TEMPLATE"),
    )


def _add_results(saved: Saved, run: Path | None) -> Saved:
    """Fill in facts that the checkpoint does not hold, from results.json and from the options."""
    results = layout.read_results(run) if run else {}
    saved.trainer = saved.trainer or saved.config.get("TRAINER.NAME") or results.get("trainer") or ""
    saved.backbone = saved.config.get("MODEL.BACKBONE.NAME") or results.get("backbone") or ""
    saved.fingerprint = results.get("backbone_fingerprint", "")
    if saved.classnames is None and results.get("classnames"):
        saved.classnames = list(results["classnames"])
    return saved


def read_classes(words: str) -> list[str]:
    """Return class names from "cat, dog, sea lion", or from a file: a name a line, or JSON.

    The lines may be those of ImageNet's classnames.txt ("n01440764 tench"); JSON is a list of names, or a split file in
    CoOp's format, whose classes are taken in the order of their labels. Raises `GramError` for fewer than two names,
    and for a name that is typed twice, as equal classes share their probability; the files of datasets may have some.
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
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise GramError(f"--classes {words}: expected each class name once, found {twice[0]!r} again")
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
        raise GramError(f"{path}: expected class names or a split file in CoOp's form, found something else") from None
    return [named[label] for label in sorted(named)]
