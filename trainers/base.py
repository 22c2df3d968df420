"""Base classes of the trainers; the file of a trainer has only the code in which it differs.

`ClipTrainer` loads frozen CLIP and writes results.json. `PromptTrainer` learns prompts in it: build, one step, save,
load, resume (see `checkpointing`), and accuracy on base and new classes along the way.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gram_meta import engine
from gram_meta.backbone.clip import Backbone, load_backbone, sizes_of
from gram_meta.backbone.footprint import GB
from gram_meta.backbone.graphs import first_line
from gram_meta.backbone.weights import OPENAI
from gram_meta.config import as_dict, flatten
from gram_meta.engine import TrainerX, build_lr_scheduler, build_optimizer, compute_accuracy
from gram_meta.engine.options import complete_cfg
from gram_meta.errors import GramError, tensorboard_errors
from gram_meta.images import UnreadableImage, find_problems, is_read_otherwise, kept_images, list_problems
from gram_meta.locks import only_writer
from gram_meta.method.checkpoint import check_fit
from gram_meta.method.prompts import (
    STATE_NAMES,
    PromptedCLIP,
    context_from_words,
    count_tokens,
    initial_visual_prompt,
    logits,
    random_context,
)
from gram_meta.random_state import kept_random_state, make_deterministic
from gram_meta.runs import folder as run_folder
from gram_meta.runs import saved
from gram_meta.runs.folder import RunMode
from gram_meta.runs.layout import LEARNER
from gram_meta.runs.results import Loaded, RunRecord, write_results
from gram_meta.trackers import Trackers
from gram_meta.trainers import memory
from gram_meta.trainers.checkpointing import Checkpointing


class ClipTrainer(TrainerX):
    """Frozen CLIP, and one run for each output folder, with results.json beside log.txt."""

    node = "COOP"  # the trainer's options are TRAINER.<node>

    backbone: Backbone
    classnames: list[str]
    evaluator: Any
    _writer: Any  # `Trackers`, while a run trains

    def __init__(self, cfg: Any) -> None:
        self.record = RunRecord()
        self.mode = RunMode(eval_only=True)  # of the last call of load_model
        self.claimed: RunMode | None = None  # the mode for which the output folder was claimed
        self.images_checked = False
        self.time_start = time.time()  # until training begins
        complete_cfg(cfg)  # a checkout's train.py may have replaced a node
        run_folder.check_options(cfg)
        self.foreign = run_folder.foreign_run(Path(cfg.OUTPUT_DIR))
        if cfg.TRAIN.DETERMINISTIC:
            make_deterministic()
        super().__init__(cfg)
        self.evaluator = KeepingEvaluator(self.evaluator, self.record)

    @property
    def options(self) -> Any:
        """This trainer's node of the config."""
        return self.cfg.TRAINER[self.node]

    def load_clip(self) -> Backbone:
        """Load the backbone MODEL.BACKBONE.NAME on this trainer's device, in the precision PREC."""
        cfg = self.cfg
        print(f"Loading CLIP (backbone: {cfg.MODEL.BACKBONE.NAME})")
        if not cfg.MODEL.BACKBONE.NAME:
            raise GramError("MODEL.BACKBONE.NAME is empty; expected a CLIP such as 'ViT-B/16' or 'gram-small'")
        name, size = cfg.MODEL.BACKBONE.NAME, tuple(cfg.INPUT.SIZE)
        sizes = sizes_of(name)  # before the weights are read, or downloaded
        side = sizes.get("image", size[0])
        if size != (side, side):
            raise GramError(f"INPUT.SIZE is {size}; {name} expects ({side}, {side})")
        if sizes and "visual" not in sizes and "N_CTX_VISION" in self.options:
            raise GramError(f"{type(self).__name__}: visual prompts expect a ViT image tower, found the ResNet {name}")
        precision = "fp32" if self.options.PREC == "amp" else self.options.PREC
        backbone = load_backbone(name, self.device, precision)
        pixels, expected = [tuple(cfg.INPUT[f"PIXEL_{key}"]) for key in ("MEAN", "STD")], backbone.design
        if (expected.mean, expected.std) != (OPENAI.mean, OPENAI.std) and pixels != [expected.mean, expected.std]:
            wanted = f"expected {expected.mean} and {expected.std} for {name}"
            raise GramError(f"INPUT.PIXEL_MEAN, INPUT.PIXEL_STD: {wanted}, found {pixels[0]} and {pixels[1]}")
        if torch.cuda.device_count() > 1:
            used = "one of them" if self.device.type == "cuda" else "the CPU alone"
            advice = "run other seeds on the others (CUDA_VISIBLE_DEVICES, `gram bench --gpus`)"
            print(f"{torch.cuda.device_count()} GPUs are here: {used} is used, never nn.DataParallel; {advice}")
        return backbone

    def check_training(self) -> None:
        """Raise for a training that cannot begin, before a file is written."""
        if self.cfg.TRAIN.DETERMINISTIC and self.cfg.SEED < 0:
            raise GramError(f"TRAIN.DETERMINISTIC: expected --seed 0 or more, found {self.cfg.SEED}")
        if self.cfg.TEST.FINAL_MODEL == "best_val" and self.val_loader is None and not self.cfg.TEST.NO_TEST:
            expected = "expected a dataset with validation images, else test images would choose the epoch"
            raise GramError(f"TEST.FINAL_MODEL best_val: {expected}; {self.cfg.DATASET.NAME} has none")
        if self.cfg.RESUME:
            self.check_resume(self.cfg.RESUME)
        if not self.images_checked and hasattr(self.dm.dataset, "check_images"):
            self.dm.dataset.check_images()
            self.images_checked = True

    def check_resume(self, directory: str) -> None:
        raise GramError(f"--resume {directory}: {type(self).__name__} learns nothing that could be resumed")

    def train(self) -> None:
        """Train and test, unless this run is finished in the output folder already."""
        self.check_training()
        with only_writer(self.cfg.OUTPUT_DIR):
            folder = run_folder.begin(self.cfg, RunMode(), self.foreign)
            if folder is None:
                return
            self.claimed = RunMode()
            with tensorboard_errors(self.cfg.OUTPUT_DIR), folder.continued_log(), self._kept_images():
                try:
                    super().train()
                finally:
                    self.close_writer()
            folder.finish()

    @contextlib.contextmanager
    def _kept_images(self) -> Iterator[None]:
        """Keep the decoded training images for several epochs, if they fit (TRAINER.MEMORY.KEPT_IMAGES)."""
        most, as_coop = self.cfg.TRAINER.MEMORY.KEPT_IMAGES, self.cfg.DATALOADER.COOP_DECODING
        paths = [item.impath for item in self.dm.dataset.train_x]
        if not as_coop and (others := sum(map(is_read_otherwise, paths))):
            print(
                f"Note: CoOp would read {others} of {len(paths)} training images otherwise (EXIF turns, more than 8 "
                "bits, transparency, long strips); DATALOADER.COOP_DECODING True reads all as CoOp does"
            )
        with kept_images(paths if self.max_epoch > 1 else [], most * GB, as_coop) as fits:
            if not fits:
                print(f"The training images take more than {most} GB: decoded every epoch (TRAINER.MEMORY.KEPT_IMAGES)")
            yield

    def detect_anomaly(self, loss: Tensor) -> None:
        """Raise a `GramError` for a loss, or for losses (n,) of which one is not finite."""
        wrong = loss.flatten()[~loss.flatten().isfinite()]
        if len(wrong):
            found = f"found {wrong[0].item()} in epoch {self.epoch + 1}, by batch {self.batch_idx + 1}"
            raise GramError(f"{self.cfg.OUTPUT_DIR}: expected a finite loss, {found}; try a lower OPTIM.LR")

    def resume_model_if_exist(self, directory: str) -> int:
        """Return 0: a trainer that learns nothing has no checkpoint."""
        return 0

    def load_model(self, directory: str, epoch: int | None = None) -> None:
        """Print a note: a trainer that learns nothing has no prompts to load."""
        self.mode = RunMode(True, os.fspath(directory), epoch)
        if directory:
            print(f"Note: {type(self).__name__} learns nothing; --model-dir {directory} changes nothing")

    def parse_batch_test(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return images (B, 3, H, W) and labels (B,) on the trainer's device."""
        images, labels = (batch[key].to(self.device, non_blocking=True) for key in ("img", "label"))
        return images, labels

    parse_batch_train = parse_batch_test

    def init_writer(self, log_dir: str) -> None:
        """Open the trackers of the run: TensorBoard, and those that GRAM_TRACKERS names."""
        if self._writer is None:
            print(f"Initialize tensorboard (log_dir={log_dir})")
            first = self.start_epoch * len(self.train_loader_x)  # of training, whose steps count from 0
            self._writer = Trackers(Path(self.output_dir), flatten(as_dict(self.cfg)), first)

    def write_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        if self._writer is not None:
            self._writer.log(global_step, {tag: float(scalar_value)})

    def after_train(self) -> None:
        self.record.seconds["train"] += time.time() - self.time_start
        super().after_train()

    def test(self, split: str | None = None) -> float:
        """Evaluate; without a split, also write results.json.

        After this trainer's own training the result belongs to that run. Otherwise the evaluation is a separate run: it
        claims the output folder, and is not repeated if it is finished there.
        """
        if split is not None:
            return super().test(split)
        if self.claimed == RunMode():
            return self._test_and_record()
        with only_writer(self.cfg.OUTPUT_DIR):
            folder = run_folder.begin(self.cfg, self.mode, self.foreign, again=self.claimed is not None)
            if folder is None:
                return run_folder.stored_accuracy(self.cfg)
            self.claimed = self.mode
            with folder.continued_log():
                accuracy = self._test_and_record()
            folder.finish()
            return accuracy

    def _test_and_record(self) -> float:
        started = time.time()
        try:
            accuracy = super().test()
        except UnreadableImage as error:
            raise GramError(self._untested(error)) from None
        self.record.seconds["test"] = time.time() - started
        write_results(self)
        return accuracy

    def _untested(self, error: UnreadableImage) -> str:
        """Return which test images cannot be used, and how to test without training again."""
        paths = [item.impath for item in self.test_loader.dataset.data_source]
        base = Path(os.path.commonpath([os.path.dirname(path) for path in paths]))
        bad = list_problems(paths, find_problems(map(Path, paths)), base) or str(error)
        again = "restore or replace the images, then run the same command again"
        if self.claimed != RunMode():
            return f"{bad}; {again}"
        out = self.cfg.OUTPUT_DIR
        return (
            f"{bad}; what was trained is kept in {out}: {again}, or test with --eval-only --model-dir {out} and "
            "another --output-dir"
        )

    def facts(self) -> dict[str, Any]:
        """Return what a trainer adds to results.json."""
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
        """Return a trainer for classification only, without data, optimiser and evaluator.

        Its `model_inference` returns logits (B, N) of images (B, 3, H, W), as in an evaluation.

        Args:
            cfg: the run's configuration; TRAINER.<node> and DATASET.NAME are read.
            backbone: frozen CLIP, on the device and in the precision to use.
            classnames: N class names, which need not be those of training.
            state_dict: the learned tensors by their names in checkpoints; {} for a trainer that learns nothing.
            where: the name of the file in error messages.

        Raises:
            GramError: a state dict of other prompts.
        """
        trainer = cls.__new__(cls)
        trainer.cfg, trainer.backbone, trainer.device = cfg, backbone, backbone.device
        trainer.classnames = list(classnames)
        trainer.build_for_use(state_dict, where)
        return trainer

    def build_for_use(self, state_dict: Mapping[str, Tensor], where: str) -> None:
        """Build the frozen classifier from learned tensors."""
        raise NotImplementedError


class KeepingEvaluator:
    """Dassl's evaluator, which also keeps the results of the last evaluation in a record."""

    def __init__(self, evaluator: Any, record: RunRecord) -> None:
        self._evaluator, self._record = evaluator, record
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []  # unread, as reading makes a GPU wait

    def __getattr__(self, name: str) -> Any:
        return getattr(self._evaluator, name)

    def reset(self) -> None:
        self._batches.clear()
        self._evaluator.reset()

    def process(self, logits: Tensor, labels: Tensor) -> None:
        """Keep the predictions of a batch of logits (B, N) with labels (B,), and their softmax as confidences."""
        confidences = logits.softmax(1, dtype=torch.float32).amax(1)
        self._batches.append((labels, logits.max(1)[1], confidences))
        self._evaluator.process(logits, labels)

    def evaluate(self) -> Any:
        """Evaluate, and keep every metric in percent, the counts behind the accuracy, and the predictions."""
        results = self._evaluator.evaluate()
        columns = (torch.cat(column).cpu().numpy() for column in zip(*self._batches, strict=True))
        self._record.predictions = dict(zip(("label", "prediction", "confidence"), columns, strict=True))
        self._record.metrics = {name: float(value) for name, value in results.items()}
        self._record.metrics |= {"total": self._evaluator._total, "correct": self._evaluator._correct}
        return results


class PromptTrainer(Checkpointing, ClipTrainer):
    """Learns the prompts of a `PromptedCLIP`; everything else in it is frozen."""

    def tokens(self) -> dict[str, int]:
        """Return the number of prompt tokens of each kind that this trainer learns; the backbone is not needed."""
        raise NotImplementedError

    def initial_prompts(self) -> dict[str, Tensor]:
        """Return the initial prompts by kind, float32."""
        raise NotImplementedError

    def build_classifier(self, classnames: list[str], prompts: Mapping[str, Tensor]) -> PromptedCLIP:
        """Build the classifier over these classes; also called for classes that are evaluated during training."""
        return PromptedCLIP(self.backbone, classnames, prompts)

    def scores(self, model: PromptedCLIP, features: Tensor) -> Tensor:
        """Return the logits (B, N) of image features (B, D), without gradients."""
        return logits(features, model.class_features(), model.backbone.logit_scale)

    def context_tokens(self, tokens: int) -> int:
        """Return the number of tokens in CTX_INIT; `tokens` if it is empty."""
        words = self.options.CTX_INIT
        return count_tokens(words) if words else tokens

    def initial_context(self, tokens: int) -> Tensor:
        """Return the initial text prompt (M, d): the words of CTX_INIT, or `tokens` random tokens if it is empty."""
        words = self.options.CTX_INIT
        if words:
            context = context_from_words(self.backbone, words)
            print(f'Initial context: "{words}" ({len(context)} tokens)')
            return context
        print(f"Initial context: {tokens} random tokens")
        return random_context(self.backbone.text_width, tokens)

    def initial_visual_prompt(self) -> Tensor:
        """Return the initial visual prompt (M, d), as VISUAL_INIT says."""
        tokens, start = self.options.N_CTX_VISION, self.options.VISUAL_INIT
        kind = "random tokens" if start == "random" else "copies of the class token"
        print(f"Initial visual prompt: {tokens} {kind}")
        return initial_visual_prompt(self.backbone, tokens, start)

    def build_model(self) -> None:
        cfg = self.cfg
        self.classnames = self.dm.dataset.classnames
        if cfg.MODEL.INIT_WEIGHTS:
            self.check_start(cfg.MODEL.INIT_WEIGHTS)
        self.backbone = self.load_clip()
        print("Building custom CLIP")
        prompts = self.initial_prompts()
        self.model = self.build_classifier(self.classnames, prompts)
        self.model.requires_grad_(False)
        learner = self.model.prompt_learner.requires_grad_(True)
        if cfg.MODEL.INIT_WEIGHTS:
            self.load_start(cfg.MODEL.INIT_WEIGHTS)
        shapes = {kind: tuple(p.shape) for kind, p in learner.prompts().items()}
        beside = [name for name, _ in learner.named_parameters() if name not in STATE_NAMES.values()]
        learned = [f"a {kind} prompt of shape {shape}" for kind, shape in shapes.items()] + beside
        print(f"Learning {', '.join(learned)}")
        for sentence in memory.arrange(self.model, cfg.TRAINER.MEMORY, cfg.DATALOADER.TRAIN_X.BATCH_SIZE):
            print(sentence)
        self.optim = build_optimizer(learner, cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, cfg.OPTIM)
        self.register_model(LEARNER, learner, self.optim, self.sched)
        self._set_precision()
        self._groups: dict[str, _Group] = {}
        self._unchecked: list[Tensor] = []  # losses of the steps since the last printed line

    def build_for_use(self, state_dict: Mapping[str, Tensor], where: str) -> None:
        prompts = {kind: state_dict[name] for kind, name in STATE_NAMES.items() if name in state_dict}
        held = {STATE_NAMES[kind]: value.shape for kind, value in prompts.items()}
        width = {"text": self.backbone.text_width, "visual": self.backbone.visual_width}
        expected = {STATE_NAMES[kind]: (*held.get(STATE_NAMES[kind], ())[:-1], width[kind]) for kind in self.tokens()}
        check_fit(where, expected, held, f"; {self.backbone.name} may not be the backbone of training")
        self.model = self.build_classifier(self.classnames, prompts)
        self.model.requires_grad_(False).eval()
        saved.load(self.model.prompt_learner, state_dict, Path(where))
        self._set_precision()

    def _set_precision(self) -> None:
        """Set up amp (towers in float32 under autocast, scaled gradients; on a CPU plain float32), or no amp."""
        amp = self.options.PREC == "amp"
        if amp and self.device.type != "cuda":
            print("amp without a GPU: float32")
            amp = False
        self.autocast = torch.amp.autocast(self.device.type) if amp else contextlib.nullcontext()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp)

    def before_train(self) -> None:
        super().before_train()  # may load a checkpoint and set start_epoch
        self.num_batches = len(self.train_loader_x)
        if self.start_epoch >= self.max_epoch:
            self.epoch = self.max_epoch - 1  # only the test is left
        else:
            self.record_step()
        self.record.trained, self.record.loaded = True, Loaded()
        if self.start_epoch:
            self.write_again()
        elif self.cfg.TEST.PER_EPOCH or 0 in self.cfg.TEST.AT_STEPS:
            self.add_to_curve(step=0)

    def write_again(self) -> None:
        """Give the trackers of a resumed run what the earlier part measured after its last step.

        That step's number is also the first of the resumed training, from which on TensorBoard drops the earlier part.
        """
        for point in self.record.curve:
            if point["step"] == self.start_epoch * self.num_batches:
                self._write_point(point)

    def _write_point(self, point: Mapping[str, Any]) -> None:
        for name in ("base", "new"):
            self.write_scalar(f"curve/{name}", point[name], point["step"])

    def record_step(self) -> None:
        """Record the towers' passes of a training step as CUDA graphs, on a GPU, if TRAINER.MEMORY.CUDA_GRAPHS."""
        if self.device.type != "cuda" or not self.cfg.TRAINER.MEMORY.CUDA_GRAPHS:
            return
        loader = self.train_loader_x
        images = min(loader.batch_size or 1, len(loader.dataset))  # of every batch but perhaps the last
        pixels = torch.zeros(images, 3, *self.cfg.INPUT.SIZE, device=self.device)
        try:
            with torch.autocast(self.device.type, enabled=self.scaler.is_enabled(), cache_enabled=False):
                self.model.record(pixels)
        except RuntimeError as error:  # of a driver, or of a layer that cannot be recorded
            print(f"CUDA graphs: not used ({first_line(error)})")

    def forward_backward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Take one step; return loss (), and accuracy (1,) in percent, unread, as reading makes a GPU wait."""
        images, labels = self.parse_batch_train(batch)
        with self.autocast:
            output = self.model(images)  # (B, N)
            loss = F.cross_entropy(output, labels)
        self.model_zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optim)  # unscales first; a regulator hooks in between
        self.scaler.update()
        last = self.batch_idx + 1 == self.num_batches
        if last:
            self.update_lr()
        step = self.epoch * self.num_batches + self.batch_idx + 1
        tests = step in self.cfg.TEST.AT_STEPS or (last and self.cfg.TEST.PER_EPOCH)
        loss = loss.detach()
        self._unchecked.append(loss)
        if last or tests or (self.batch_idx + 1) % self.cfg.TRAIN.PRINT_FREQ == 0:
            self.detect_anomaly(torch.stack(self._unchecked))
            self._unchecked.clear()
        if tests:
            self.add_to_curve(step)
        return {"loss": loss, "acc": compute_accuracy(output.detach(), labels)[0]}

    def model_inference(self, images: Tensor) -> Tensor:
        with self.autocast:
            return self.scores(self.model, self.model.image_features(images))

    def add_to_curve(self, step: int) -> None:
        """Add accuracy on the test images of the base and of the new classes, for any DATASET.SUBSAMPLE_CLASSES.

        The random generators are restored, so training continues as without this evaluation. After the first step, an
        image that cannot be read costs this evaluation alone: the test at the end names all such images.
        """
        self.set_model_mode("eval")
        try:
            with kept_random_state(), torch.no_grad():
                point = {name: self._group(name).accuracy(self) for name in ("base", "new")}
        except UnreadableImage as error:
            if step == 0:
                raise
            print(f"step {step}: not evaluated: {error}")
            return
        finally:
            self.set_model_mode("train")
        self.record.curve.append({"step": step, "epoch": step / self.num_batches, **point})
        self._write_point(self.record.curve[-1])
        print(f"step {step}: base {point['base']:.1f}% new {point['new']:.1f}%")

    def _group(self, name: str) -> _Group:
        if name not in self._groups:
            self._groups[name] = _Group(self, name)
        return self._groups[name]

    def facts(self) -> dict[str, Any]:
        return {} if self.meta_facts is None else {"meta_checkpoint": self.meta_facts}


class _Group:
    """Test images and classifier of the base or of the new classes, for accuracy during training."""

    def __init__(self, trainer: PromptTrainer, name: str) -> None:
        cfg = trainer.cfg.clone()
        cfg.defrost()
        cfg.DATASET.SUBSAMPLE_CLASSES = name
        cfg.VERBOSE = False
        dataset = engine.build_dataset(cfg)
        transform, size = trainer.test_loader.dataset.transform, cfg.DATALOADER.TEST.BATCH_SIZE
        options = {"tfm": transform, "is_train": False}
        self.loader = engine.build_data_loader(cfg, "SequentialSampler", dataset.test, size, **options)
        learner = trainer.model.prompt_learner
        self.model = trainer.build_classifier(dataset.classnames, learner.prompts())
        self.model.prompt_learner = learner  # not a copy, as it learns
        self.kept: list[tuple[Tensor, Tensor]] = []  # image features (B, D) and labels (B,), where they never change

    def accuracy(self, trainer: PromptTrainer) -> float:
        """Return the present accuracy on the test images, in percent."""
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
