"""Checkpoints of the prompt trainers: save, check, load and resume."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

from gram_meta.backbone.clip import Backbone, check_name
from gram_meta.engine.checkpoints import restoring
from gram_meta.errors import GramError
from gram_meta.files import atomic_write
from gram_meta.method.prompts import STATE_NAMES, PromptedCLIP
from gram_meta.random_state import random_state, set_random_state
from gram_meta.runs import folder as run_folder
from gram_meta.runs import layout, saved
from gram_meta.runs.folder import RunMode
from gram_meta.runs.layout import LEARNER
from gram_meta.runs.results import Loaded, RunRecord

NO_META = {"path": "", "sha256": "", "settings": {}}  # facts of a meta-checkpoint where there is none


class Checkpointing:
    """Mixin of `PromptTrainer`: save, load and resume, in the format of CoOp's checkpoints.

    Attributes:
        family: names of trainers whose prompts can be evaluated by each other, the one without GRAM first.
        meta_facts: of the meta-checkpoint behind prompts that were loaded; None if none were.
    """

    family: tuple[str, ...] = ()
    meta_facts: dict[str, Any] | None = None

    # What the trainer provides
    cfg: Any
    backbone: Backbone
    classnames: list[str]
    model: PromptedCLIP
    record: RunRecord
    mode: RunMode
    optim: Any
    sched: Any
    scaler: Any
    best_result: float
    time_start: float  # when the present part of the training began
    _models: Any

    def reads(self) -> dict[str, Any]:
        """Return options that change the meaning of the saved tensors but not their shape (CLASS_TOKEN_POSITION)."""
        return {}

    def state_to_save(self) -> dict[str, Any]:
        """Return what a trainer adds to its checkpoints: tensors and plain values."""
        return {}

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Restore what `state_to_save` returned."""

    def save_model(
        self, epoch: int, directory: str, is_best: bool = False, val_result: Any = None, model_name: str = ""
    ) -> None:
        """Write CoOp's checkpoint (learned tensors only), and the state that a resumed run needs to end the same."""
        state = {
            "state_dict": self._models[LEARNER].state_dict(),
            "epoch": epoch + 1,
            "optimizer": self.optim.state_dict(),
            "scheduler": self.sched.state_dict(),
            "val_result": val_result,
            "scaler": self.scaler.state_dict(),
            "random": random_state(),
            "curve": self.record.curve,
            "seconds": self.record.seconds["train"] + time.time() - self.time_start,
            **self._identity(),
            **self.state_to_save(),
        }
        saved.write(state, os.path.join(directory, LEARNER), is_best, model_name)

    def _identity(self) -> dict[str, Any]:
        """Return the trainer, backbone, options and classes (in order) of the prompts."""
        dataset = self.cfg.DATASET
        return {
            "trainer": type(self).__name__,
            "backbone": {"name": self.backbone.name, "fingerprint": self.backbone.fingerprint},
            "reads": self.reads(),
            "dataset": dataset.NAME,
            "folder": dataset.get("FOLDER", ""),  # the images of ImageFolder
            "subsample": dataset.SUBSAMPLE_CLASSES,
            "classnames": list(self.classnames),
        }

    def check_loaded(self, path: Path, state: dict[str, Any]) -> None:
        """Raise for prompts of another backbone, of other options, or of the same classes with other names or order.

        CoOp's own checkpoints hold none of these facts, and are accepted.
        """
        here = self._identity()
        there = {key: state.get(key, value) for key, value in here.items()}
        if there["backbone"]["fingerprint"] != here["backbone"]["fingerprint"]:
            old, new = there["backbone"]["name"], here["backbone"]["name"]
            weights = f"{new}, of other weights" if old == new else new
            found = f"{weights} (MODEL.BACKBONE.NAME); to use it anyway, name it as MODEL.INIT_WEIGHTS"
            raise GramError(f"{path}: was learned for the backbone {old}, found {found}")
        for key, value in here["reads"].items():
            if there["reads"].get(key, value) != value:
                raise GramError(f"{path}: was learned with {key} {there['reads'][key]!r}, found {value!r}")
        same = all(there[key] == here[key] for key in ("dataset", "folder", "subsample"))
        if same and there["classnames"] != here["classnames"]:
            other = saved.difference(there["classnames"], here["classnames"])
            raise GramError(f"{path}: was learned on other classes of this dataset than are here now: {other}")
        self._check_classes(path, state)

    def _check_classes(self, path: Path, state: dict[str, Any]) -> None:
        """Refuse contexts of each class (CSC) for other classes than those that they were learned for."""
        if not any(getattr(value, "ndim", 0) == 3 for name, value in state["state_dict"].items() if name[-3:] == "ctx"):
            return
        there = state.get("classnames") or saved.classnames_beside(path)
        if there is None:
            print(f"Note: {path} does not name the classes of its contexts (CSC); those here are taken, in order")
        elif there != self.classnames:
            what = f"which knows no other classes: {saved.difference(there, self.classnames)}"
            raise GramError(f"{path}: holds a context for each class of training (CSC), {what}")

    def learned_by(self, state: dict[str, Any]) -> str:
        """Return the trainer that learned a checkpoint; if it names none, the trainer without GRAM."""
        return str(state.get("trainer", next(iter(self.family), type(self).__name__)))

    def check_resume(self, directory: str) -> None:
        """Raise unless a folder has a checkpoint of this trainer from which training can continue, as it began."""
        path = layout.checkpoint_to_resume(directory)
        state = saved.read(path)
        learner, own = self.learned_by(state), type(self).__name__
        if learner != own:
            raise GramError(f"{path}: expected a checkpoint of {own} (--trainer) to go on from, found one of {learner}")
        if "random" not in state:
            raise GramError(f"{path}: expected a checkpoint that training can go on from, found learned tensors only")
        self.check_loaded(path, state)
        saved.fit(self._models[LEARNER], state["state_dict"], path)
        run_folder.check_resumed(self.cfg, directory)
        if (epoch := state.get("epoch", 0)) > (last := self.cfg.OPTIM.MAX_EPOCH):
            raise GramError(f"{path}: expected at most the {last} epochs of OPTIM.MAX_EPOCH, found {epoch}")

    def resume_model_if_exist(self, directory: str) -> int:
        """Load the last checkpoint in `directory`; return the epoch to start with (0: from scratch)."""
        path = layout.last_checkpoint(directory)
        if path is None and not self.cfg.RESUME:
            print("No checkpoint found, train from scratch")
            return 0
        self.check_resume(directory)
        assert path is not None
        state = saved.read(path)
        print(f"Found checkpoint at {path} (will resume training from epoch {state['epoch'] + 1})")
        saved.load(self._models[LEARNER], state["state_dict"], path)
        self.meta_facts = state.get("meta_checkpoint")
        with restoring(path):
            self.optim.load_state_dict(state["optimizer"])
            self.sched.load_state_dict(state["scheduler"])
            self.scaler.load_state_dict(state["scaler"])
            self.record.curve = list(state["curve"])
            self.record.seconds["train"] = state.get("seconds", 0.0)
            self.load_saved_state(state)
            if self.cfg.TEST.FINAL_MODEL == "best_val":
                self._take_best(path.with_name(layout.BEST))
            set_random_state(state["random"])
        return state["epoch"]

    def _take_best(self, best: Path) -> None:
        """Go on from the best epoch so far, if there is one; bring it along from the folder of another run."""
        if not best.is_file():
            return
        self.best_result = saved.read(best)["val_result"]
        own = Path(self.cfg.OUTPUT_DIR, LEARNER, layout.BEST)
        if not (own.is_file() and own.samefile(best)):
            with atomic_write(own) as file, open(best, "rb") as source:
                shutil.copyfileobj(source, file)

    def load_model(self, directory: str, epoch: int | None = None) -> None:
        """Load the prompts in the output folder of a run of this trainer or its family; "" keeps the initial ones.

        Without an epoch, `layout.choose_checkpoint` chooses the checkpoint.
        """
        self.mode = RunMode(True, os.fspath(directory), epoch)
        if not directory:
            print("Note that load_model() is skipped as no pretrained model is given")
            return
        path, why = layout.choose_checkpoint(directory, epoch)
        if why:
            print(f"No epoch named (--load-epoch): {path.name} is taken, {why}")
        state = saved.read(path)
        learner = self._check_learner(path, state)
        self.check_loaded(path, state)
        saved.load(self._models[LEARNER], state["state_dict"], path)
        self.meta_facts = state.get("meta_checkpoint", NO_META)
        self.record.loaded = Loaded(os.fspath(directory), int(state.get("epoch") or 0), learner)
        print(f'Loading weights to {LEARNER} from "{path}" (epoch = {self.record.loaded.epoch})')

    def _check_learner(self, path: Path, state: dict[str, Any]) -> str:
        """Return the trainer that learned these prompts; print a note if it is another one; refuse other families."""
        own, learner = type(self).__name__, self.learned_by(state)
        if "trainer" not in state:
            print(f"Note: {path} does not say who learned these prompts; they are taken for {learner}'s")
        elif learner != own:
            if learner not in self.family:
                expected = " or ".join(self.family) or own
                raise GramError(f"{path}: expected prompts of {expected} (--trainer), found those of {learner}")
            print(f"Note: these prompts were learned by {learner}; {own} evaluates them")
        return learner

    def check_start(self, name: str) -> None:
        """Refuse a checkpoint for MODEL.INIT_WEIGHTS whose prompts do not fit CLIP's widths, before CLIP is loaded."""
        tensors = saved.read_start(name)["state_dict"]
        widths = {kind: tensors[key].shape[-1] for kind, key in STATE_NAMES.items() if key in tensors}
        check_name(name, "", self.cfg.MODEL.BACKBONE.NAME, widths)

    def load_start(self, name: str) -> None:
        """Load the initial prompts from the checkpoint that MODEL.INIT_WEIGHTS names."""
        state = saved.read_start(name)
        self._check_classes(Path(name), state)
        saved.load(self.model.prompt_learner, state["state_dict"], Path(name))
        made_for = state.get("backbone")
        if isinstance(made_for, dict) and made_for.get("fingerprint") != self.backbone.fingerprint:
            print(f"Note: {name} was learned for the backbone {made_for.get('name')}, here is {self.backbone.name}")
        print(f"Successfully loaded pretrained weights from {name}")
