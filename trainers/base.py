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
from torch import Tensor

from gram_meta import engine
from gram_meta.backbone.clip import RUN_PRECISIONS, Backbone, load_backbone
from gram_meta.engine import TrainerX, build_lr_scheduler, build_optimizer, compute_accuracy
from gram_meta.engine.options import complete_cfg
from gram_meta.errors import GramError
from gram_meta.method.prompts import PromptedCLIP, context_from_words, logits, random_context
from gram_meta.random_state import kept_random_state, make_deterministic, random_state, set_random_state
from gram_meta.runs import folder as run_folder
from gram_meta.runs import layout, saved
from gram_meta.runs.folder import Doing
from gram_meta.runs.layout import LEARNER
from gram_meta.runs.results import write_results
from gram_meta.trainers import memory

NO_META = {"path": "", "sha256": "", "settings": {}}  # facts of a meta-checkpoint where there is none


class ClipTrainer(TrainerX):
    """Frozen CLIP, and runs that own their output folder: one folder, one run, results.json beside log.txt."""

    node = "COOP"  # the trainer's options are TRAINER.<node>

    backbone: Backbone
    classnames: list[str]

    def __init__(self, cfg: Any) -> None:
        self.curve: list[dict[str, Any]] = []  # accuracy on base and new classes along the way
        self.metrics: dict[str, float] = {}  # of the last evaluation
        self.loaded: dict[str, Any] = {"model_dir": "", "epoch": 0, "learned_by": ""}
        self.asked = Doing(eval_only=True)  # what load_model was asked for
        self.claimed: Doing | None = None  # what the output folder is this trainer's for
        self.trained = False
        self.seconds = {"train": 0.0, "test": 0.0}
        complete_cfg(cfg)  # a checkout's train.py may have replaced a node that it shares with us
        run_folder.check_options(cfg)
        if cfg.TRAIN.DETERMINISTIC:
            make_deterministic()
        with run_folder.nothing_left(cfg):
            super().__init__(cfg)
        self._remember_metrics()

    @property
    def options(self) -> Any:
        """This trainer's node of the config."""
        return self.cfg.TRAINER[self.node]

    def check_cfg(self, cfg: Any) -> None:
        precision = cfg.TRAINER[self.node].PREC
        if precision not in RUN_PRECISIONS:
            raise GramError(f"TRAINER.{self.node}.PREC is {precision!r}; expected one of {', '.join(RUN_PRECISIONS)}")
        memory.check(cfg.TRAINER.MEMORY)
        for part in ("TRAIN_X", "TEST"):
            size = cfg.DATALOADER[part].BATCH_SIZE
            if size < 1:
                raise GramError(f"DATALOADER.{part}.BATCH_SIZE is {size}; expected at least 1")

    def load_clip(self) -> Backbone:
        """The backbone that MODEL.BACKBONE.NAME names, on this trainer's device, in the precision asked for."""
        cfg = self.cfg
        print(f"Loading CLIP (backbone: {cfg.MODEL.BACKBONE.NAME})")
        if not cfg.MODEL.BACKBONE.NAME:
            raise GramError("MODEL.BACKBONE.NAME is empty; expected a CLIP such as 'ViT-B/16' or 'gram-small'")
        precision = "fp32" if self.options.PREC == "amp" else self.options.PREC
        backbone = load_backbone(cfg.MODEL.BACKBONE.NAME, self.device, precision)
        size = tuple(cfg.INPUT.SIZE)
        if size != (backbone.image_size, backbone.image_size):
            raise GramError(
                f"INPUT.SIZE is {size}; {backbone.name} expects ({backbone.image_size}, {backbone.image_size})"
            )
        if torch.cuda.device_count() > 1:
            used = "one of them" if self.device.type == "cuda" else "the CPU alone"
            print(
                f"{torch.cuda.device_count()} GPUs are here: {used} is used, never nn.DataParallel; "
                "run other seeds on the others (CUDA_VISIBLE_DEVICES, `gram bench --gpus`)"
            )
        return backbone

    def check_training(self) -> None:
        """Refuse a training that cannot begin, before anything is written."""
        if self.cfg.TRAIN.DETERMINISTIC and self.cfg.SEED < 0:
            raise GramError(
                f"TRAIN.DETERMINISTIC: equal numbers take a fixed seed; expected --seed 0 or more, found {self.cfg.SEED}"
            )
        if self.cfg.RESUME:
            self.check_resume(self.cfg.RESUME)

    def check_resume(self, directory: str) -> None:
        raise GramError(f"--resume {directory}: {type(self).__name__} learns nothing that could go on")

    def train(self) -> None:
        """Train and test, where the output folder is free for it; a run that is finished there is not repeated."""
        with run_folder.nothing_left(self.cfg):
            self.check_training()
        folder = run_folder.begin(self.cfg, Doing())
        if folder is None:
            return
        self.claimed = Doing()
        super().train()
        folder.finish()

    def resume_model_if_exist(self, directory: str) -> int:
        """Nothing is learned, so there is nothing to go on from."""
        return 0

    def load_model(self, directory: str, epoch: int | None = None) -> None:
        """Nothing is learned, so there is nothing to load."""
        self.asked = Doing(True, os.fspath(directory), epoch)
        if directory:
            print(f"Note: {type(self).__name__} learns nothing; --model-dir {directory} changes nothing")

    def after_train(self) -> None:
        self.seconds["train"] = time.time() - self.time_start
        super().after_train()

    def test(self, split: str | None = None) -> float:
        """Evaluate; without a split named, this is the run's result and results.json is written.

        After a training of this trainer it is that run's. Else it is a run of its own, and the output folder has to be
        free for it; one that is finished there is not repeated.
        """
        if split is not None:
            return super().test(split)
        folder = None
        if self.claimed != Doing():
            folder = run_folder.begin(self.cfg, self.asked, again=self.claimed is not None)
            if folder is None:
                return run_folder.stored_accuracy(self.cfg)
            self.claimed = self.asked
        started = time.time()
        accuracy = super().test()
        self.seconds["test"] = time.time() - started
        write_results(self)
        if folder is not None:
            folder.finish()
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
    """Learns the prompts of a `PromptedCLIP`; everything else in it is frozen.

    family: trainers whose prompts can be evaluated by each other, the one without GRAM first.
    """

    family: tuple[str, ...] = ()
    meta_facts: dict[str, Any] | None = None  # of the meta-checkpoint behind prompts that were loaded

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
        for sentence in memory.arrange(self.model, cfg.TRAINER.MEMORY, cfg.DATALOADER.TRAIN_X.BATCH_SIZE):
            print(sentence)
        self.optim = build_optimizer(learner, cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, cfg.OPTIM)
        self.register_model(LEARNER, learner, self.optim, self.sched)
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
        saved.load(self.model.prompt_learner, state_dict, Path(where))
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
            "state_dict": self._models[LEARNER].state_dict(),
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
        saved.write(state, os.path.join(directory, LEARNER), is_best, model_name)

    def _belongs_to(self) -> dict[str, Any]:
        """Whose prompts a checkpoint holds, what reads them, and the classes they were learned on, in their order."""
        dataset = self.cfg.DATASET
        return {
            "trainer": type(self).__name__,
            "backbone": {"name": self.backbone.name, "fingerprint": self.backbone.fingerprint},
            "reads": self.reads(),
            "dataset": dataset.NAME,
            "folder": dataset.get("FOLDER", ""),  # which images, where the dataset's name does not say
            "subsample": dataset.SUBSAMPLE_CLASSES,
            "classnames": list(self.classnames),
        }

    def reads(self) -> dict[str, Any]:
        """Options by which the same tensors are another prompt, and which their shape does not show."""
        return {}

    def check_loaded(self, path: Path, state: dict[str, Any]) -> None:
        """Refuse prompts for another backbone, for other options, or of the same classes by other names or in another order.

        What CoOp itself has saved says none of this, and is taken.
        """
        here = self._belongs_to()
        there = {key: state.get(key, value) for key, value in here.items()}
        if there["backbone"]["fingerprint"] != here["backbone"]["fingerprint"]:
            old, new = there["backbone"]["name"], here["backbone"]["name"]
            weights = f"{new}, of other weights" if old == new else new
            raise GramError(
                f"{path}: was learned for the backbone {old}, found {weights} (MODEL.BACKBONE.NAME); to try it there "
                "none the less, name it as MODEL.INIT_WEIGHTS"
            )
        for key, value in here["reads"].items():
            if there["reads"].get(key, value) != value:
                raise GramError(f"{path}: was learned with {key} {there['reads'][key]!r}, found {value!r}")
        same = all(there[key] == here[key] for key in ("dataset", "folder", "subsample"))
        if same and there["classnames"] != here["classnames"]:
            raise GramError(f"{path}: {saved.difference(there['classnames'], here['classnames'])}")

    def learned_by(self, state: dict[str, Any]) -> str:
        """The trainer that learned what a checkpoint holds; one that does not say is of the trainer without GRAM."""
        return str(state.get("trainer", next(iter(self.family), type(self).__name__)))

    def state_to_save(self) -> dict[str, Any]:
        """What a trainer adds to its checkpoints: tensors and plain values."""
        return {}

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Take back what `state_to_save` gave."""

    def facts(self) -> dict[str, Any]:
        return {} if self.meta_facts is None else {"meta_checkpoint": self.meta_facts}

    def check_training(self) -> None:
        super().check_training()
        if self.cfg.OPTIM.MAX_EPOCH < 1:
            raise GramError(
                f"OPTIM.MAX_EPOCH is {self.cfg.OPTIM.MAX_EPOCH}; expected at least 1 (the start itself: --eval-only "
                "without --model-dir)"
            )

    def check_resume(self, directory: str) -> None:
        path = layout.last_checkpoint(directory)
        if path is None:
            there = layout.list_runs(Path(directory))
            raise GramError(
                f"--resume {directory}: expected {LEARNER}/checkpoint in it, found no such file"
                + (f"; {there}" if there else "")
            )
        state = saved.read(path)
        learner = self.learned_by(state)
        if learner != type(self).__name__:
            raise GramError(
                f"{path}: holds what {learner} has learned; {type(self).__name__} (--trainer) expects its own to go on from"
            )
        if "random" not in state:
            raise GramError(f"{path}: expected a checkpoint that training can go on from, found learned tensors only")
        self.check_loaded(path, state)
        saved.fit(self._models[LEARNER], state["state_dict"], path)

    def resume_model_if_exist(self, directory: str) -> int:
        """Go on from the last checkpoint under `directory`; the epoch to start with (0: from scratch)."""
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
        self.optim.load_state_dict(state["optimizer"])
        self.sched.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.curve = list(state["curve"])
        self.load_saved_state(state)
        best = path.with_name(layout.BEST)
        if self.cfg.TEST.FINAL_MODEL == "best_val" and best.is_file():
            self.best_result = saved.read(best)["val_result"]
        set_random_state(state["random"])
        return state["epoch"]

    def load_model(self, directory: str, epoch: int | None = None) -> None:
        """Load the prompts of an epoch of a run, of this trainer's or of its family's; without an epoch see `layout.choose_checkpoint`."""
        self.asked = Doing(True, os.fspath(directory), epoch)
        if not directory:
            print("Note that load_model() is skipped as no pretrained model is given")
            return
        with run_folder.nothing_left(self.cfg):
            self._load_epoch(directory, epoch)

    def _load_epoch(self, directory: str, epoch: int | None) -> None:
        path, why = layout.choose_checkpoint(directory, epoch)
        if why:
            print(f"No epoch named (--load-epoch): {path.name} is taken, {why}")
        state = saved.read(path)
        learner = self._look_whose(path, state)
        self.check_loaded(path, state)
        saved.load(self._models[LEARNER], state["state_dict"], path)
        self.meta_facts = state.get("meta_checkpoint", NO_META)
        reached = int(state.get("epoch") or 0)
        self.loaded = {"model_dir": os.fspath(directory), "epoch": reached, "learned_by": learner}
        print(f'Loading weights to {LEARNER} from "{path}" (epoch = {reached})')

    def _look_whose(self, path: Path, state: dict[str, Any]) -> str:
        """The trainer that learned these prompts; said where it is another than this one, refused where no relative."""
        own, learner = type(self).__name__, self.learned_by(state)
        if "trainer" not in state:
            print(f"Note: {path} does not say who learned these prompts; they are taken for {learner}'s")
        elif learner != own:
            if learner not in self.family:
                raise GramError(
                    f"{path}: holds what {learner} has learned; expected that of {' or '.join(self.family) or own} (--trainer)"
                )
            print(f"Note: these prompts were learned by {learner}; {own} evaluates them")
        return learner

    def _load_weights(self, name: str) -> None:
        """MODEL.INIT_WEIGHTS: start from the prompts in a checkpoint."""
        state = saved.read_start(name)
        saved.load(self.model.prompt_learner, state["state_dict"], Path(name))
        made_for = state.get("backbone")
        if isinstance(made_for, dict) and made_for.get("fingerprint") != self.backbone.fingerprint:
            print(f"Note: {name} was learned for the backbone {made_for.get('name')}, here is {self.backbone.name}")
        print(f"Successfully loaded pretrained weights from {name}")


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
        self.kept: list[tuple[Tensor, Tensor]] = []  # image features (B, D) and labels (B,), where they never change

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
