"""What all trainers here share; a trainer's own file shows only the lines in which it differs.

`ClipTrainer` loads frozen CLIP and writes results.json. `PromptTrainer` learns prompts in it: build, one step, save,
load, resume, and accuracy on base and new classes along the way.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gram_meta import engine
from gram_meta.backbone import Backbone, load_backbone
from gram_meta.engine import TrainerX, build_lr_scheduler, build_optimizer, compute_accuracy, load_checkpoint
from gram_meta.engine.options import complete_cfg
from gram_meta.engine.random_state import kept_random_state, random_state, set_random_state
from gram_meta.engine.results import write_results
from gram_meta.errors import GramError
from gram_meta.prompts import PromptedCLIP, context_from_words, logits, random_context

PRECISIONS = ("fp32", "fp16", "bf16", "amp")
NAME = "prompt_learner"  # CoOp's name for the registered model, and so for the checkpoints' folder


class ClipTrainer(TrainerX):
    """Frozen CLIP, and an evaluation that leaves results.json beside log.txt."""

    node = "COOP"  # the trainer's options are TRAINER.<node>

    backbone: Backbone
    classnames: list[str]

    def __init__(self, cfg: Any) -> None:
        self.curve: list[dict[str, Any]] = []  # accuracy on base and new classes along the way
        self.metrics: dict[str, float] = {}  # of the last evaluation
        self.loaded = {"model_dir": "", "epoch": 0}
        self.trained = False
        self.seconds = {"train": 0.0, "test": 0.0}
        complete_cfg(cfg)  # a checkout's train.py may have replaced a node that it shares with us
        super().__init__(cfg)
        self._remember_metrics()

    @property
    def options(self) -> Any:
        """This trainer's node of the config."""
        return self.cfg.TRAINER[self.node]

    def check_cfg(self, cfg: Any) -> None:
        precision = cfg.TRAINER[self.node].PREC
        if precision not in PRECISIONS:
            raise GramError(
                f"TRAINER.{self.node}.PREC is {precision!r}; expected one of {', '.join(PRECISIONS)}"
            )

    def load_clip(self) -> Backbone:
        """The backbone that MODEL.BACKBONE.NAME names, on this trainer's device, in the precision asked for."""
        cfg = self.cfg
        print(f"Loading CLIP (backbone: {cfg.MODEL.BACKBONE.NAME})")
        if not cfg.MODEL.BACKBONE.NAME:
            raise GramError(
                "MODEL.BACKBONE.NAME is empty; expected a CLIP such as 'ViT-B/16' or 'gram-small'"
            )
        precision = "fp32" if self.options.PREC == "amp" else self.options.PREC
        backbone = load_backbone(cfg.MODEL.BACKBONE.NAME, self.device, precision)
        size = tuple(cfg.INPUT.SIZE)
        if size != (backbone.image_size, backbone.image_size):
            raise GramError(
                f"INPUT.SIZE is {size}; {backbone.name} expects ({backbone.image_size}, {backbone.image_size})"
            )
        if torch.cuda.device_count() > 1 and self.device.type == "cuda":
            print(f"{torch.cuda.device_count()} GPUs are here, one is used; run other seeds on the others")
        return backbone

    def resume_model_if_exist(self, directory: str) -> int:
        """Nothing is learned, so there is nothing to go on from."""
        return 0

    def after_train(self) -> None:
        self.seconds["train"] = time.time() - self.time_start
        super().after_train()

    def test(self, split: str | None = None) -> float:
        """Evaluate; without a split named, this is the run's result and results.json is written."""
        started = time.time()
        accuracy = super().test(split)
        if split is None:
            self.seconds["test"] = time.time() - started
            write_results(self)
        return accuracy

    def facts(self) -> dict[str, Any]:
        """What a trainer adds to results.json."""
        return {}

    @classmethod
    def for_use(
        cls,
        cfg: Any,
        backbone: Backbone,
        classnames: Sequence[str],
        state_dict: Mapping[str, Tensor],
        where: str = "state dict",
    ) -> ClipTrainer:
        """A trainer that classifies and does nothing else: no data, no optimiser, no evaluator.

        Its `model_inference` gives logits (B, N) of images (B, 3, H, W), as in an evaluation.

        Args:
            cfg: the run's configuration; TRAINER.<node> and DATASET.NAME are read.
            backbone: frozen CLIP, on the device and in the precision to use.
            classnames: N class names, which need not be those of training.
            state_dict: what the trainer has learned, by its checkpoints' names; {} where it learns nothing.
            where: what error messages call it.

        Raises:
            GramError: a state dict of other prompts.
        """
        trainer = cls.__new__(cls)
        trainer.cfg, trainer.backbone, trainer.device = cfg, backbone, backbone.device
        trainer.classnames = list(classnames)
        trainer.build_for_use(state_dict, where)
        return trainer

    def build_for_use(self, state_dict: Mapping[str, Tensor], where: str) -> None:
        """Build the frozen classifier from what was learned."""
        raise NotImplementedError

    def _remember_metrics(self) -> None:
        evaluate = self.evaluator.evaluate

        def remembering() -> Any:
            results = evaluate()
            self.metrics = {name: float(value) for name, value in results.items()}
            self.metrics |= {"total": self.evaluator._total, "correct": self.evaluator._correct}
            return results

        self.evaluator.evaluate = remembering


class PromptTrainer(ClipTrainer):
    """Learns the prompts of a `PromptedCLIP`; everything else in it is frozen."""

    # ----------------------------------------------------------------------- what a trainer may say differently

    def tokens(self) -> dict[str, int]:
        """How many prompt tokens of each kind this trainer is set to learn."""
        raise NotImplementedError

    def initial_prompts(self) -> dict[str, Tensor]:
        """The start, by kind, float32."""
        raise NotImplementedError

    def build_classifier(self, classnames: list[str], prompts: Mapping[str, Tensor]) -> PromptedCLIP:
        """The classifier over these classes; also built for classes that are evaluated along the way."""
        return PromptedCLIP(self.backbone, classnames, prompts)

    def scores(self, model: PromptedCLIP, features: Tensor) -> Tensor:
        """Logits (B, N) of image features (B, D), without gradients."""
        return logits(features, model.class_features(), model.backbone.logit_scale)

    # ------------------------------------------------------------------------------- what several of them say alike

    def context_tokens(self, tokens: int) -> int:
        """How many tokens the words of CTX_INIT have; `tokens` where there are none."""
        words = self.options.CTX_INIT
        return len(context_from_words(self.backbone, words)) if words else tokens

    def initial_context(self, tokens: int) -> Tensor:
        """Start (M, d) of a text prompt: the words of CTX_INIT; `tokens` random ones where there are none."""
        words = self.options.CTX_INIT
        if words:
            context = context_from_words(self.backbone, words)
            print(f'Initial context: "{words}" ({len(context)} tokens)')
            return context
        print(f"Initial context: {tokens} random tokens")
        return random_context(self.backbone.text_width, tokens)

    def initial_visual_prompt(self) -> Tensor:
        """Start (M, d) of a visual prompt: random tokens."""
        tokens = self.options.N_CTX_VISION
        print(f"Initial visual prompt: {tokens} random tokens")
        return random_context(self.backbone.visual_width, tokens)

    def check_count(self, cfg: Any, key: str) -> None:
        """A number of tokens is at least 1."""
        count = cfg.TRAINER[self.node][key]
        if count < 1:
            raise GramError(f"TRAINER.{self.node}.{key} is {count}; expected at least 1")

    # ----------------------------------------------------------------------------------------------------- build

    def check_cfg(self, cfg: Any) -> None:
        super().check_cfg(cfg)
        steps = cfg.TEST.AT_STEPS
        if any(not isinstance(step, int) or step < 0 for step in steps):
            raise GramError(f"TEST.AT_STEPS is {steps}; expected numbers of steps, such as (0,1,5,20)")

    def build_model(self) -> None:
        cfg = self.cfg
        self.classnames = self.dm.dataset.classnames
        self.backbone = self.load_clip()
        if "visual" in self.tokens() and not self.backbone.is_vit:
            raise GramError(
                f"{type(self).__name__}: visual prompts expect a ViT image tower, found the ResNet {self.backbone.name}"
            )
        print("Building custom CLIP")
        prompts = self.initial_prompts()
        self.model = self.build_classifier(self.classnames, prompts)
        self.model.requires_grad_(False)
        learner = self.model.prompt_learner.requires_grad_(True)
        if cfg.MODEL.INIT_WEIGHTS:
            self._load_weights(cfg.MODEL.INIT_WEIGHTS)
        shapes = {kind: tuple(p.shape) for kind, p in learner.prompts().items()}
        beside = [name for name, _ in learner.named_parameters() if name not in ("ctx", "visual_ctx")]
        learned = [f"a {kind} prompt of shape {shape}" for kind, shape in shapes.items()] + beside
        print(f"Learning {', '.join(learned)}")
        self.optim = build_optimizer(learner, cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, cfg.OPTIM)
        self.register_model(NAME, learner, self.optim, self.sched)
        self._set_precision()
        self._groups: dict[str, _Group] = {}

    def build_for_use(self, state_dict: Mapping[str, Tensor], where: str) -> None:
        names = {"text": "ctx", "visual": "visual_ctx"}
        prompts = {kind: state_dict[name] for kind, name in names.items() if name in state_dict}
        if set(prompts) != set(self.tokens()):
            raise GramError(
                f"{where}: expected the {' and '.join(self.tokens())} prompt that {type(self).__name__} learns, found "
                f"{', '.join(state_dict) or 'nothing'}"
            )
        width = self.backbone.text_width, self.backbone.visual_width
        for kind, expected in zip(("text", "visual"), width, strict=True):
            if kind in prompts and prompts[kind].shape[-1] != expected:
                raise GramError(
                    f"{where}: holds a {kind} prompt of width {prompts[kind].shape[-1]}, but {self.backbone.name} has "
                    f"{expected}; expected the backbone of training (MODEL.BACKBONE.NAME)"
                )
        self.model = self.build_classifier(self.classnames, prompts)
        self.model.requires_grad_(False).eval()
        _copy_prompts(self.model.prompt_learner, state_dict, Path(where))
        self._set_precision()

    def _set_precision(self) -> None:
        """amp: towers in float32 under autocast, gradients scaled; on a CPU, plain float32."""
        amp = self.options.PREC == "amp"
        if amp and self.device.type != "cuda":
            print("amp without a GPU: float32")
            amp = False
        self.autocast = torch.amp.autocast(self.device.type) if amp else contextlib.nullcontext()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp)

    # ----------------------------------------------------------------------------------------------------- train

    def before_train(self) -> None:
        super().before_train()  # may load a checkpoint and set start_epoch
        self.num_batches = len(self.train_loader_x)
        if self.start_epoch >= self.max_epoch:
            self.epoch = self.max_epoch - 1  # nothing left but the test
        self.trained = True
        if self.start_epoch == 0 and (self.cfg.TEST.PER_EPOCH or 0 in self.cfg.TEST.AT_STEPS):
            self.add_to_curve(step=0)

    def forward_backward(self, batch: dict[str, Any]) -> dict[str, float]:
        """One step."""
        images, labels = self.parse_batch_train(batch)
        with self.autocast:
            output = self.model(images)  # (B, N)
            loss = F.cross_entropy(output, labels)
        self.detect_anomaly(loss)
        self.model_zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optim)  # unscales first; a regulator hooks in between
        self.scaler.update()
        last = self.batch_idx + 1 == self.num_batches
        if last:
            self.update_lr()
        step = self.epoch * self.num_batches + self.batch_idx + 1
        if step in self.cfg.TEST.AT_STEPS or (last and self.cfg.TEST.PER_EPOCH):
            self.add_to_curve(step)
        return {"loss": loss.item(), "acc": compute_accuracy(output, labels)[0].item()}

    def parse_batch_train(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return batch["img"].to(self.device), batch["label"].to(self.device)

    def model_inference(self, images: Tensor) -> Tensor:
        with self.autocast:
            return self.scores(self.model, self.model.image_features(images))

    # --------------------------------------------------------------------------- base and new along the way

    def add_to_curve(self, step: int) -> None:
        """Accuracy on the base and on the new classes' test images, whatever DATASET.SUBSAMPLE_CLASSES is.

        Draws nothing from the random generators: training goes on as if it had not been watched.
        """
        with kept_random_state(), torch.no_grad():
            self.set_model_mode("eval")
            point = {name: self._group(name).accuracy(self) for name in ("base", "new")}
            self.set_model_mode("train")
        self.curve.append({"step": step, "epoch": step / self.num_batches, **point})
        print(f"step {step}: base {point['base']:.1f}% new {point['new']:.1f}%")

    def _group(self, name: str) -> _Group:
        if name not in self._groups:
            self._groups[name] = _Group(self, name)
        return self._groups[name]

    # ----------------------------------------------------------------------------------------------- checkpoints

    def save_model(
        self, epoch: int, directory: str, is_best: bool = False, val_result: Any = None, model_name: str = ""
    ) -> None:
        """CoOp's checkpoint (learned tensors only), and what it takes to go on as if nothing had happened."""
        state = {
            "state_dict": self._models[NAME].state_dict(),
            "epoch": epoch + 1,
            "optimizer": self.optim.state_dict(),
            "scheduler": self.sched.state_dict(),
            "val_result": val_result,
            "scaler": self.scaler.state_dict(),
            "random": random_state(),
            "curve": self.curve,
            **self._belongs_to(),
            **self.state_to_save(),
        }
        engine.save_checkpoint(state, os.path.join(directory, NAME), is_best=is_best, model_name=model_name)

    def _belongs_to(self) -> dict[str, Any]:
        """Whose prompts a checkpoint holds, and the classes they were learned on, in their order."""
        dataset = self.cfg.DATASET
        return {
            "trainer": type(self).__name__,
            "dataset": dataset.NAME,
            "folder": dataset.get("FOLDER", ""),  # which images, where the dataset's name does not say
            "subsample": dataset.SUBSAMPLE_CLASSES,
            "classnames": list(self.classnames),
        }

    def look_at_loaded(self, path: Path, state: dict[str, Any]) -> None:
        """Refuse the prompts of another trainer, or of the same classes under other names or in another order.

        What CoOp itself has saved does not say whose it is, and is taken.
        """
        here = self._belongs_to()
        there = {key: state[key] for key in here if key in state}
        if there.get("trainer", here["trainer"]) != here["trainer"]:
            raise GramError(
                f"{path}: holds what {there['trainer']} has learned; expected that of {here['trainer']} (--trainer)"
            )
        same = [there.get(key, here[key]) == here[key] for key in ("dataset", "folder", "subsample")]
        if all(same) and there.get("classnames", here["classnames"]) != here["classnames"]:
            raise GramError(f"{path}: {_difference(there['classnames'], here['classnames'])}")

    def state_to_save(self) -> dict[str, Any]:
        """What a trainer adds to its checkpoints: tensors and plain values."""
        return {}

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Take back what `state_to_save` gave."""

    def resume_model_if_exist(self, directory: str) -> int:
        """Go on from the last checkpoint under `directory`; the epoch to start with (0: from scratch)."""
        pointer = Path(directory, NAME, "checkpoint")
        if not pointer.is_file():
            if self.cfg.RESUME:
                raise GramError(f"--resume {directory}: expected {pointer}, found no such file")
            print("No checkpoint found, train from scratch")
            return 0
        path = pointer.with_name(pointer.read_text(encoding="utf-8").strip())
        state = _read_checkpoint(path)
        if "random" not in state:
            raise GramError(
                f"{path}: expected a checkpoint that training can go on from, found learned tensors only"
            )
        print(f"Found checkpoint at {path} (will resume training from epoch {state['epoch'] + 1})")
        self._load_prompts(path, state)
        self.optim.load_state_dict(state["optimizer"])
        self.sched.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.curve = list(state["curve"])
        self.load_saved_state(state)
        best = pointer.with_name("model-best.pth.tar")
        if self.cfg.TEST.FINAL_MODEL == "best_val" and best.is_file():
            self.best_result = _read_checkpoint(best)["val_result"]
        set_random_state(state["random"])
        return state["epoch"]

    def load_model(self, directory: str, epoch: int | None = None) -> None:
        """Load the prompts of an epoch; without one the best by validation where there is one, else the last."""
        if not directory:
            print("Note that load_model() is skipped as no pretrained model is given")
            return
        path = _checkpoint_path(Path(directory, NAME), epoch)
        state = _read_checkpoint(path)
        self._load_prompts(path, state)
        self.loaded = {"model_dir": os.fspath(directory), "epoch": state["epoch"]}
        print(f'Loading weights to {NAME} from "{path}" (epoch = {state["epoch"]})')

    def _load_prompts(self, path: Path, state: dict[str, Any]) -> None:
        self.look_at_loaded(path, state)
        _copy_prompts(self._models[NAME], state["state_dict"], path)

    def _load_weights(self, path: str) -> None:
        """MODEL.INIT_WEIGHTS: start from the prompts in a checkpoint."""
        state = _read_checkpoint(Path(path))
        _copy_prompts(self.model.prompt_learner, state.get("state_dict", state), Path(path))
        print(f"Successfully loaded pretrained weights from {path}")


class _Group:
    """Test images and classifier of the base or of the new classes, for accuracy along the way."""

    def __init__(self, trainer: PromptTrainer, name: str) -> None:
        cfg = trainer.cfg.clone()
        cfg.defrost()
        cfg.DATASET.SUBSAMPLE_CLASSES = name
        cfg.VERBOSE = False
        dataset = engine.build_dataset(cfg)
        self.loader = engine.build_data_loader(
            cfg,
            "SequentialSampler",
            dataset.test,
            cfg.DATALOADER.TEST.BATCH_SIZE,
            tfm=trainer.test_loader.dataset.transform,
            is_train=False,
        )
        learner = trainer.model.prompt_learner
        self.model = trainer.build_classifier(dataset.classnames, learner.prompts())
        self.model.prompt_learner = learner  # not a copy: it is watched while it learns
        self.kept: list[
            tuple[Tensor, Tensor]
        ] = []  # image features (B, D) and labels (B,), where they never change

    def accuracy(self, trainer: PromptTrainer) -> float:
        """Percent of test images classified correctly, now."""
        self.model.eval()
        correct = total = 0
        with trainer.autocast:
            for features, labels in self._images(trainer):
                scores = trainer.scores(self.model, features)  # (B, N)
                correct += int((scores.argmax(1) == labels).sum())
                total += len(labels)
        return 100.0 * correct / total

    def _images(self, trainer: PromptTrainer) -> Any:
        fixed = self.model.prompt_learner.visual_ctx is None
        if self.kept:
            yield from self.kept
            return
        for batch in self.loader:
            images, labels = trainer.parse_batch_test(batch)
            pair = self.model.image_features(images), labels
            if fixed:
                self.kept.append(pair)
            yield pair


# ------------------------------------------------------------------------------------------------- checkpoint files


def _difference(there: list[str], here: list[str]) -> str:
    """In what two lists of class names differ, in one sentence."""
    what = "was learned on other classes of this dataset than are here now"
    if len(there) != len(here):
        return f"{what}: {len(there)} there, {len(here)} here"
    index = next(i for i, (old, new) in enumerate(zip(there, here, strict=True)) if old != new)
    return f"{what}: class {index} is {there[index]!r} there and {here[index]!r} here"


def _checkpoint_path(folder: Path, epoch: int | None) -> Path:
    """The file of that epoch, or the sensible default; a `GramError` lists the epochs that are there."""
    if not folder.is_dir():
        there = sorted(p.name for p in folder.parent.iterdir()) if folder.parent.is_dir() else []
        raise GramError(
            f"--model-dir {folder.parent}: expected {folder.name}/ in it, found {', '.join(there) or 'nothing'}"
        )
    epochs = sorted(
        int(suffix) for p in folder.glob("model.pth.tar-*") if (suffix := p.name.rpartition("-")[2]).isdigit()
    )
    best = folder / "model-best.pth.tar"
    if epoch is None and best.is_file():
        return best
    if not epochs or (epoch is not None and epoch not in epochs):
        asked = "any" if epoch is None else epoch
        there = ", ".join(map(str, epochs)) or "none"
        raise GramError(f"{folder}: expected a checkpoint of epoch {asked}, found epochs {there}")
    return folder / f"model.pth.tar-{epochs[-1] if epoch is None else epoch}"


def _read_checkpoint(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise GramError(f"{path}: expected a checkpoint, found no such file")
    return load_checkpoint(os.fspath(path))


def _copy_prompts(learner: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load learned tensors, names and shapes checked. CoOp also saves the class names' tokens: these are left."""
    given = {key: value for key, value in tensors.items() if key not in ("token_prefix", "token_suffix")}
    own = learner.state_dict()
    if set(given) != set(own):
        raise GramError(
            f"{path}: expected {', '.join(own)}, as this trainer learns it, found {', '.join(given) or 'nothing'}"
        )
    for key, value in given.items():
        if value.shape != own[key].shape:
            raise GramError(
                f"{path}: holds {key} of shape {tuple(value.shape)}, but the trainer is set to {tuple(own[key].shape)}"
            )
    learner.load_state_dict(given)
