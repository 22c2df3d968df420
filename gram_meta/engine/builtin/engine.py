"""The training loop: epochs, batches, log lines, checkpoints, tests."""

import datetime
import os
import time
from collections import OrderedDict
from typing import Any

import torch
from yacs.config import CfgNode

from gram_meta.engine.builtin import utils
from gram_meta.engine.builtin.config import check_options
from gram_meta.engine.builtin.data import DataManager, Loader
from gram_meta.engine.builtin.evaluation import build_evaluator
from gram_meta.progress import progress_bar

TRAINER_REGISTRY = utils.Registry("TRAINER")


def build_trainer(cfg: CfgNode) -> Any:
    """Build the trainer that TRAINER.NAME names."""
    return utils.build(TRAINER_REGISTRY, "Loading trainer", cfg.TRAINER.NAME, cfg.VERBOSE, cfg)


class TrainerX:
    """A trainer with labelled data, named models and an evaluator, from a config.

    `forward_backward(batch)` makes one step and returns numbers for the log. Numbers that are tensors are read once a
    printed line, as reading makes a GPU wait.
    """

    model: Any  # of `build_model`

    def __init__(self, cfg: CfgNode) -> None:
        self._models: OrderedDict[str, Any] = OrderedDict()
        self._optims: OrderedDict[str, Any] = OrderedDict()
        self._scheds: OrderedDict[str, Any] = OrderedDict()
        self._writer: Any = None
        check_options(cfg)
        self.check_cfg(cfg)
        self.device = torch.device("cuda" if torch.cuda.is_available() and cfg.USE_CUDA else "cpu")
        self.start_epoch = self.epoch = 0
        self.max_epoch = cfg.OPTIM.MAX_EPOCH
        self.output_dir = cfg.OUTPUT_DIR
        self.cfg = cfg
        self.build_data_loader()
        self.build_model()
        self.evaluator = build_evaluator(cfg, lab2cname=self.lab2cname)
        self.best_result = -float("inf")

    def register_model(self, name: str = "model", model: Any = None, optim: Any = None, sched: Any = None) -> None:
        """Make a model known by `name`: to checkpoints, train/eval mode and the learning-rate schedule."""
        if "_models" not in self.__dict__:
            raise AttributeError("Cannot assign model before super().__init__() call")
        assert name not in self._models, f"two models are named {name!r}"
        self._models[name], self._optims[name], self._scheds[name] = model, optim, sched

    def get_model_names(self, names: Any = None) -> list[str]:
        """Return `names` as a list, checked; all names for None."""
        known = list(self._models)
        if names is None:
            return known
        names = utils.tolist_if_not(names)
        for name in names:
            assert name in known, f"no model is named {name!r}; known: {known}"
        return names

    def set_model_mode(self, mode: str = "train", names: Any = None) -> None:
        """Set training mode ("train") or evaluation mode ("test", "eval")."""
        if mode not in ("train", "test", "eval"):
            raise KeyError(mode)
        for name in self.get_model_names(names):
            self._models[name].train(mode == "train")

    def save_model(
        self, epoch: int, directory: str, is_best: bool = False, val_result: Any = None, model_name: str = ""
    ) -> None:
        """Write each model to `<directory>/<name>/`; `epoch` counts from 0, its file from 1."""
        for name in self.get_model_names():
            optim, sched = self._optims[name], self._scheds[name]
            state = {
                "state_dict": self._models[name].state_dict(),
                "epoch": epoch + 1,
                "optimizer": None if optim is None else optim.state_dict(),
                "scheduler": None if sched is None else sched.state_dict(),
                "val_result": val_result,
            }
            utils.save_checkpoint(state, os.path.join(directory, name), is_best=is_best, model_name=model_name)

    def resume_model_if_exist(self, directory: str) -> int:
        """Load the last checkpoint of every model under `directory`; return the epoch to start with (0: none found)."""
        names = self.get_model_names()
        there = [os.path.exists(os.path.join(directory, name, "checkpoint")) for name in names]
        if not names or not all(there):
            print("No checkpoint found, train from scratch")
            return 0
        print(f"Found checkpoint at {directory} (will resume training)")
        start_epoch = 0
        for name in names:
            start_epoch = utils.resume_from_checkpoint(
                os.path.join(directory, name), self._models[name], self._optims[name], self._scheds[name]
            )
        return start_epoch

    def load_model(self, directory: str, epoch: int | None = None) -> None:
        """Load every model's `model.pth.tar-<epoch>`, or `model-best.pth.tar` without an epoch."""
        if not directory:
            print("Note that load_model() is skipped as no pretrained model is given")
            return
        file = "model-best.pth.tar" if epoch is None else f"model.pth.tar-{epoch}"
        for name in self.get_model_names():
            path = os.path.join(directory, name, file)
            if not os.path.exists(path):
                raise FileNotFoundError(f"No model at {path}")
            checkpoint = utils.load_checkpoint(path)
            result = checkpoint["val_result"]
            result = "None" if result is None else f"{result:.1f}"
            print(f"Load {path} to {name} (epoch={checkpoint['epoch']}, val_result={result})")
            self._models[name].load_state_dict(checkpoint["state_dict"])

    def model_zero_grad(self, names: Any = None) -> None:
        for name in self.get_model_names(names):
            if self._optims[name] is not None:
                self._optims[name].zero_grad()

    def model_backward(self, loss: torch.Tensor) -> None:
        self.detect_anomaly(loss)
        loss.backward()

    def model_update(self, names: Any = None) -> None:
        for name in self.get_model_names(names):
            if self._optims[name] is not None:
                self._optims[name].step()

    def model_backward_and_update(self, loss: torch.Tensor, names: Any = None) -> None:
        self.model_zero_grad(names)
        self.model_backward(loss)
        self.model_update(names)

    def update_lr(self, names: Any = None) -> None:
        for name in self.get_model_names(names):
            if self._scheds[name] is not None:
                self._scheds[name].step()

    def detect_anomaly(self, loss: torch.Tensor) -> None:
        if not torch.isfinite(loss).all():
            raise FloatingPointError("Loss is infinite or NaN!")

    def init_writer(self, log_dir: str) -> None:
        if self._writer is not None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("TensorBoard is not installed: no scalars are written")
            return
        print(f"Initialize tensorboard (log_dir={log_dir})")
        self._writer = SummaryWriter(log_dir=log_dir)

    def close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def write_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        if self._writer is not None:
            self._writer.add_scalar(tag, scalar_value, global_step)

    def check_cfg(self, cfg: CfgNode) -> None:
        """Raise an error for a config that this trainer cannot follow."""

    def build_data_loader(self) -> None:
        self.dm = dm = DataManager(self.cfg)
        self.train_loader_x, self.val_loader, self.test_loader = dm.train_loader_x, dm.val_loader, dm.test_loader
        self.num_classes, self.lab2cname = dm.num_classes, dm.lab2cname

    def build_model(self) -> None:
        """Build and register the model, its optimiser and its scheduler."""
        raise NotImplementedError

    def forward_backward(self, batch: Any) -> Any:
        raise NotImplementedError

    def train(self) -> None:
        """Train all epochs up to `max_epoch`."""
        self.before_train()  # may move start_epoch, when a run is resumed
        try:
            for epoch in range(self.start_epoch, self.max_epoch):
                self.epoch = epoch
                self.before_epoch()
                self.run_epoch()
                self.after_epoch()
        finally:
            if isinstance(self.train_loader_x, Loader):
                self.train_loader_x.end_workers()
        self.after_train()

    def before_epoch(self) -> None:
        pass

    def before_train(self) -> None:
        self.start_epoch = self.resume_model_if_exist(self.cfg.RESUME or self.cfg.OUTPUT_DIR)
        writer_dir = os.path.join(self.output_dir, "tensorboard")
        utils.mkdir_if_missing(writer_dir)
        self.init_writer(writer_dir)
        self.time_start = time.time()

    def after_train(self) -> None:
        print("Finish training")
        if not self.cfg.TEST.NO_TEST:
            if self.cfg.TEST.FINAL_MODEL == "best_val":
                print("Deploy the model with the best val performance")
                self.load_model(self.output_dir)
            else:
                print("Deploy the last-epoch model")
            self.test()
        print(f"Elapsed: {datetime.timedelta(seconds=round(time.time() - self.time_start))}")
        self.close_writer()

    def after_epoch(self) -> None:
        cfg = self.cfg
        if not cfg.TEST.NO_TEST and cfg.TEST.FINAL_MODEL == "best_val":
            result = self.test(split="val")
            if result > self.best_result:
                self.best_result = result
                self.save_model(self.epoch, self.output_dir, val_result=result, model_name="model-best.pth.tar")
        every = cfg.TRAIN.CHECKPOINT_FREQ
        if self.epoch + 1 == self.max_epoch or (every > 0 and (self.epoch + 1) % every == 0):
            self.save_model(self.epoch, self.output_dir)

    @torch.no_grad()
    def test(self, split: str | None = None) -> float:
        """Evaluate on `split` (default: TEST.SPLIT), print the evaluator's lines, and return its first result."""
        self.set_model_mode("eval")
        self.evaluator.reset()
        split = self.cfg.TEST.SPLIT if split is None else split
        loader = self.val_loader
        if split != "val" or loader is None:
            split, loader = "test", self.test_loader
        print(f"Evaluate on the *{split}* set")
        for batch in progress_bar(loader):
            input, label = self.parse_batch_test(batch)
            self.evaluator.process(self.model_inference(input), label)
        results = self.evaluator.evaluate()
        for name, value in results.items():
            self.write_scalar(f"{split}/{name}", value, self.epoch)
        return next(iter(results.values()))

    def model_inference(self, input: torch.Tensor) -> torch.Tensor:
        return self.model(input)

    def parse_batch_test(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return batch["img"].to(self.device, non_blocking=True), batch["label"].to(self.device, non_blocking=True)

    def get_current_lr(self, names: Any = None) -> float:
        name = self.get_model_names(names)[0]
        return self._optims[name].param_groups[0]["lr"]

    def run_epoch(self) -> None:
        self.set_model_mode("train")
        losses, batch_time, data_time = utils.MetricMeter(), utils.AverageMeter(), utils.AverageMeter()
        self.num_batches = len(self.train_loader_x)
        unread: list[tuple[Any, float]] = []  # what the steps since the last printed line return, and learning rates
        end = time.time()
        for batch_idx, batch in enumerate(self.train_loader_x):
            self.batch_idx = batch_idx
            data_time.update(time.time() - end)
            unread.append((self.forward_backward(batch), self.get_current_lr()))
            batch_time.update(time.time() - end)
            every = self.cfg.TRAIN.PRINT_FREQ
            prints = (self.batch_idx + 1) % every == 0 or self.num_batches < every
            if prints or self.batch_idx + 1 == self.num_batches:
                self._write(losses, unread)
            if prints:
                self._print_progress(losses, batch_time, data_time)
            end = time.time()

    def _write(self, losses: utils.MetricMeter, unread: list[tuple[Any, float]]) -> None:
        """Count and write what the last steps returned, up to the present one, and empty the list."""
        step = self.epoch * self.num_batches + self.batch_idx + 1 - len(unread)
        for summary, (_, rate) in zip(utils.as_floats([given for given, _ in unread]), unread, strict=True):
            losses.update(summary)
            for name, meter in losses.meters.items():
                self.write_scalar(f"train/{name}", meter.avg, step)
            self.write_scalar("train/lr", rate, step)
            step += 1
        unread.clear()

    def _print_progress(
        self, losses: utils.MetricMeter, batch_time: utils.AverageMeter, data_time: utils.AverageMeter
    ) -> None:
        left = self.num_batches - self.batch_idx - 1 + (self.max_epoch - self.epoch - 1) * self.num_batches
        print(
            f"epoch [{self.epoch + 1}/{self.max_epoch}] batch [{self.batch_idx + 1}/{self.num_batches}] "
            f"time {batch_time.val:.3f} ({batch_time.avg:.3f}) data {data_time.val:.3f} ({data_time.avg:.3f}) {losses} "
            f"lr {self.get_current_lr():.4e} eta {datetime.timedelta(seconds=int(batch_time.avg * left))}"
        )

    def parse_batch_train(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return tuple(batch[key].to(self.device, non_blocking=True) for key in ("img", "label", "domain"))
