"""One contestant of checkouts.py, in a process of its own: a trainer of a checkout as it is, or one of this project.

checkouts.py starts it with a JSON file that names what to build; it answers each line on stdin with a line of JSON. The
trainer's own `forward_backward` and `test` do all the work. If a checkout cannot run with this machine's torch, this
script patches it at run time and lists each patch in the answer to `build`; no file of a checkout is changed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

BATCHES = 4  # prepared training batches, taken in turns

# --------------------------------------------------------------------------------------------------------- patches


def local_weights(path: str) -> str:
    """Make the checkout's `clip` read the weights of this benchmark instead of downloading OpenAI's."""
    from clip import clip

    clip._MODELS[path] = path
    clip._download = lambda url, root=None: url
    return "weights: clip._download answers with a local file (a plain state dict, the same for all contestants)"


def no_cuda() -> str:
    """Make `.cuda()` leave tensors and modules on their device."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    return ".cuda() of tensors and modules is a no-op (on a CPU)"


def no_half() -> str:
    """Make `.half()` leave tensors unchanged."""
    torch.Tensor.half = lambda self, *args, **kwargs: self
    return (
        ".half() of tensors is a no-op: in float32 its prompts, its zero-shot image tower and its class features would "
        "stay fp16 beside float32 towers, which stops with an error"
    )


def part_of_learn2learn(folder: str) -> str:
    """Make the two files of learn2learn that ProMetaR uses importable from its sources, without the compiled rest."""
    package = Path(folder, "learn2learn")
    for part in ("utils/__init__.py", "algorithms/base_learner.py"):
        if not (package / part).is_file():
            raise ValueError(f"--learn2learn {folder}: expected learn2learn/{part} in it, found no such file")
    for name, path in (("learn2learn", package), ("learn2learn.algorithms", package / "algorithms")):
        module = types.ModuleType(name)
        module.__path__ = [str(path)]
        sys.modules[name] = module
    return (
        "learn2learn: its utils/__init__.py and algorithms/base_learner.py alone, from its sources "
        "(its compiled modules do not build on Python 3.11 and later, and are not used)"
    )


def twice_differentiable() -> contextlib.AbstractContextManager[None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)


SECOND_ORDER = (
    "the training step runs under sdpa_kernel(SDPBackend.MATH): torch's fused attention has no second derivative, "
    "and the step stops with an error without it"
)


# ---------------------------------------------------------------------------------------------------- one contestant


class Contestant:
    """A built trainer, prepared batches, and what is measured of it.

    Args:
        spec: see `Entry.spec` in checkouts.py.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.device = spec["device"]
        self.patches: list[str] = []
        self.around_step: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        torch.set_num_threads(spec["threads"])
        if self.device == "cuda":
            torch.backends.cudnn.benchmark = True  # as everybody's train.py has it
        self.trainer = self._theirs() if spec["owner"] == "theirs" else self._ours()
        trainer = self.trainer
        trainer.epoch = trainer.batch_idx = 0
        trainer.num_batches = 10**9  # no batch is an epoch's last
        self._prepare()
        self.steps = 0
        self.stream: Iterator[Any] = iter(())

    # ------------------------------------------------------------------------------------------------------- build

    def _theirs(self) -> Any:
        """Build the checkout's own trainer, through its own train.py's configuration."""
        spec = self.spec
        sys.path.insert(0, spec["checkout"])  # its clip, trainers and datasets, before any other of that name
        from gram_meta import engine

        engine.backend()  # `dassl` can be imported from here on
        if spec["trainer"] == "ProMetaR":
            self._patch_prometar()
        self.patches.append(local_weights(spec["model"]))
        import train  # the checkout's

        cfg = train.setup_cfg(self._flags(argparse.Namespace()))
        self._seed()
        return train.build_trainer(cfg)

    def _patch_prometar(self) -> None:
        spec = self.spec
        if spec["learn2learn"]:
            self.patches.append(part_of_learn2learn(spec["learn2learn"]))
        if self.device == "cpu":
            self.patches.append(no_cuda())
        if spec["precision"] != "fp16":
            self.patches.append(no_half())
        self.patches.append(SECOND_ORDER)
        self.around_step = twice_differentiable

    def _ours(self) -> Any:
        import gram_meta.plugin  # noqa: F401, registers the trainers
        from gram_meta.coop import launch
        from gram_meta.engine import build_trainer

        cfg = launch.setup_cfg(self._flags(launch.build_parser().parse_args([])))
        self._seed()
        return build_trainer(cfg)

    def _flags(self, args: argparse.Namespace) -> argparse.Namespace:
        """Set train.py's flags."""
        spec = self.spec
        for flag in ("resume", "head", "model_dir"):
            setattr(args, flag, "")
        for flag in ("source_domains", "target_domains", "transforms", "load_epoch"):
            setattr(args, flag, None)
        args.root, args.output_dir, args.seed = spec["root"], spec["folder"], 1
        args.config_file, args.dataset_config_file = spec["config"], spec["dataset_config"]
        args.trainer, args.backbone, args.opts = spec["trainer"], spec["model"], spec["opts"]
        args.eval_only = args.no_train = False
        return args

    def _seed(self) -> None:
        from gram_meta.engine import set_random_seed

        set_random_seed(1)

    def _prepare(self) -> None:
        """Make batches once with the trainer's own loaders, from one seed for all contestants; `prepared` has their hashes."""
        trainer = self.trainer
        self._seed()
        self.batches = []
        for batch in trainer.train_loader_x:
            self.batches.append(batch)
            if len(self.batches) == BATCHES:
                break
        whole = trainer.test_loader
        count = min(self.spec["test_images"] or len(whole.dataset), len(whole.dataset))
        chosen = Subset(whole.dataset, [i * len(whole.dataset) // count for i in range(count)])
        self.loader_of_tests = DataLoader(chosen, batch_size=whole.batch_size, pin_memory=whole.pin_memory)
        self.tests = list(self.loader_of_tests)
        digest = hashlib.sha256()
        for batch in (*self.batches, *self.tests):
            digest.update(batch["img"].numpy().data)
            digest.update(batch["label"].numpy().data)
        self.prepared = {
            "sha256": digest.hexdigest(),
            "classes": len(trainer.dm.dataset.classnames),
            "classnames_sha256": hashlib.sha256("\n".join(trainer.dm.dataset.classnames).encode()).hexdigest(),
            "batch": len(self.batches[0]["label"]),
            "batches": len(self.batches),
            "pixels": list(self.batches[0]["img"].shape[-2:]),
            "test_images": count,
            "test_batches": len(self.tests),
        }

    def build(self) -> dict[str, Any]:
        """Return the facts by which checkouts.py verifies that all contestants do the same work."""
        from gram_meta import engine

        learned = sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)
        return {
            **self.prepared,
            "patches": self.patches,
            "engine": engine.backend(),
            "learned_numbers": learned,
            "resident_mb": common.status_bytes("VmRSS") / 1e6,
        }

    # ----------------------------------------------------------------------------------------------------- measures

    def check(self) -> dict[str, Any]:
        """Return test logits at the start, then the first step's loss and gradients, for comparison between contestants.

        Warms up the step and the evaluator, too.
        """
        trainer = self.trainer
        trainer.set_model_mode("eval")
        with torch.no_grad():
            images, _ = trainer.parse_batch_test(self.tests[0])
            logits = trainer.model_inference(images[: self.spec["compared"]])
        arrays = {"logits": logits.float().cpu().numpy()}
        loss = self._step(self.batches[0])
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                arrays[f"gradient:{name}"] = parameter.grad.float().cpu().numpy()
        few = {key: value[: self.spec["compared"]] for key, value in self.tests[0].items()}
        self._test([few])
        path = Path(self.spec["folder"], "check.npz")
        np.savez(path, **arrays)
        return {"loss": loss, "arrays": str(path)}

    def step(self, count: int) -> dict[str, Any]:
        """Run training steps on prepared batches."""
        return {"losses": [self._step(self.batches[self.steps % len(self.batches)]) for _ in range(count)]}

    def step_with_loader(self, count: int) -> dict[str, Any]:
        """Run training steps; decode and augment each batch in this process."""
        return {"losses": [self._step(self._next()) for _ in range(count)]}

    def test(self, count: int) -> dict[str, Any]:
        """Run a full test pass over prepared batches; `count` has no effect."""
        return self._test(self.tests)

    def test_with_loader(self, count: int) -> dict[str, Any]:
        """Run a full test pass; decode and resize in this process."""
        return self._test(self.loader_of_tests)

    def tower(self, count: int) -> dict[str, Any]:
        """Run the image tower alone on `count` training batches."""
        for index in range(count):
            self._images(self.batches[index % len(self.batches)])
        return {}

    def tower_of_test(self, count: int) -> dict[str, Any]:
        """Run the image tower alone over the test batches."""
        with torch.no_grad():
            for batch in self.tests:
                self._images(batch)
        return {}

    def loader(self, count: int) -> dict[str, Any]:
        """Decode and augment `count` training batches."""
        for _ in range(count):
            self._next()
        return {}

    def loader_of_test(self, count: int) -> dict[str, Any]:
        """Decode and resize all test images."""
        for _ in self.loader_of_tests:
            pass
        return {}

    def _step(self, batch: Any) -> float:
        self.trainer.set_model_mode("train")
        self.steps += 1
        with self.around_step():
            loss = self.trainer.forward_backward(batch)["loss"]
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        return loss

    def _test(self, batches: Any) -> dict[str, Any]:
        trainer = self.trainer
        if hasattr(trainer.model, "_kept"):
            trainer.model._kept = None  # class features are part of every pass
        trainer.test_loader = batches
        return {"accuracy": float(trainer.test(split="test"))}

    def _next(self) -> Any:
        batch = next(self.stream, None)
        if batch is None:
            self.stream = iter(self.trainer.train_loader_x)
            batch = next(self.stream)
        return batch

    def _images(self, batch: Any) -> None:
        trainer, model = self.trainer, self.trainer.model
        images = batch["img"].to(trainer.device)
        amp = self.spec["precision"] == "amp" and trainer.device.type == "cuda"
        with torch.amp.autocast(trainer.device.type) if amp else contextlib.nullcontext():
            if self.spec["owner"] == "theirs":
                model.image_encoder(images.type(model.dtype))
            else:
                model.image_features(images)

    # -------------------------------------------------------------------------------------------------------- clocks

    def timed(self, measure: str, count: int) -> dict[str, Any]:
        """Run a measure; return its seconds of processor time (all threads) and wall clock, and its results."""
        common.synchronise(self.device)
        wall, cpu = time.perf_counter(), time.process_time()
        result = getattr(self, measure)(count)
        common.synchronise(self.device)
        return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, **result}

    def peak(self, measure: str, count: int) -> dict[str, Any]:
        """Return a measure's peak in MB above the level before: of the process (CPU), or allocated on the GPU."""
        megabytes, _ = common.with_peak(lambda: getattr(self, measure)(count), self.device)
        return {"peak_mb": megabytes}


# ------------------------------------------------------------------------------------------------------------ process


def main() -> None:
    """Answer on the original stdout; write what the trainers print to log.txt in the contestant's folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spec", type=Path, help="JSON file, which checkouts.py writes")
    spec = json.loads(parser.parse_args().spec.read_text(encoding="utf-8"))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    log = os.open(Path(spec["folder"], "log.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    warnings.simplefilter("ignore")
    contestant: Contestant | None = None
    for line in sys.stdin:
        order = json.loads(line)
        what = order.pop("do")
        try:
            if contestant is None:
                contestant = Contestant(spec)
            answer = getattr(contestant, what)(**order)
        except Exception as error:  # noqa: BLE001, whatever stops a contestant is its result
            traceback.print_exc()
            words = str(error).strip() or traceback.extract_tb(error.__traceback__)[-1].line or ""
            answer = {"error": f"{type(error).__name__}: {words.splitlines()[0]}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
