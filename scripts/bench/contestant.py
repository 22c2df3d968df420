"""One contestant of checkouts.py, in a process of its own: a trainer of a checkout as it is, or one of this project.

checkouts.py starts it with a JSON file that names what to build. It answers each line on stdin with a line of JSON. The
trainer's own `forward_backward` and `test` do all the work. If a checkout cannot run with this machine's torch, this
script patches it at run time and lists each patch in the answer to `build`; no file of a checkout is changed.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Subset

BATCHES = 4  # prepared training batches, taken in turns
COMPARED = 4  # test images whose logits are compared

# --------------------------------------------------------------------------------------------------------- patches


def local_weights(path: str) -> str:
    """Make the checkout's `clip` read the weights of this benchmark instead of downloading OpenAI's."""
    from clip import clip

    clip._MODELS[path] = path
    clip._download = lambda url, root=None: url
    return "weights: clip._download answers with a local file (a plain state dict, the same for all contestants)"


def patched_for_prometar(device: str, precision: str, learn2learn: str) -> Iterator[str]:
    """Patch what ProMetaR needs on this machine; yield a sentence for each patch."""
    if learn2learn:
        package = Path(learn2learn, "learn2learn")
        for part in ("utils/__init__.py", "algorithms/base_learner.py"):
            if not (package / part).is_file():
                raise ValueError(f"--learn2learn {learn2learn}: expected learn2learn/{part} in it, found no such file")
        for name, path in (("learn2learn", package), ("learn2learn.algorithms", package / "algorithms")):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(path)]
        yield (
            "learn2learn: its utils/__init__.py and algorithms/base_learner.py alone, from its sources "
            "(its compiled modules do not build on Python 3.11 and later, and are not used)"
        )
    if device == "cpu":
        torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
        yield ".cuda() of tensors and modules is a no-op (on a CPU)"
    if precision != "fp16":
        torch.Tensor.half = lambda self, *args, **kwargs: self
        yield (
            ".half() of tensors is a no-op: in float32 its prompts, its zero-shot image tower and its class features "
            "would stay fp16 beside float32 towers, which stops with an error"
        )
    yield (
        "the training step runs under sdpa_kernel(SDPBackend.MATH): torch's fused attention has no second derivative, "
        "and the step stops with an error without it"
    )


# ---------------------------------------------------------------------------------------------------- one contestant


class Contestant:
    """A built trainer, prepared batches, and what is measured of it.

    Args:
        spec: see `Bench.spec` in checkouts.py.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec, self.device = spec, spec["device"]
        self.patches: list[str] = []
        self.around_step: Callable[[], AbstractContextManager[Any]] = nullcontext
        torch.set_num_threads(spec["threads"])
        torch.backends.cudnn.benchmark = self.device == "cuda"  # as everybody's train.py has it
        self.trainer = trainer = self._build()
        trainer.epoch = trainer.batch_idx = 0
        trainer.num_batches = 10**9  # no batch is an epoch's last
        self.prepared = self._prepare()
        self.prepared_batches = itertools.cycle(self.batches)
        self.decoded_batches = (batch for _ in itertools.count() for batch in trainer.train_loader_x)
        self.measures: dict[str, Callable[[int], Any]] = {
            "step": lambda count: self._steps(self.prepared_batches, count),
            "step_with_loader": lambda count: self._steps(self.decoded_batches, count),
            "test": lambda count: self._test(self.tests),
            "test_with_loader": lambda count: self._test(self.test_loader),
            "tower": lambda count: [
                self._images(batch) for batch in itertools.islice(itertools.cycle(self.batches), count)
            ],
            "tower_of_test": self._images_of_tests,
            "loader": lambda count: [next(self.decoded_batches) for _ in range(count)],
            "loader_of_test": lambda count: [None for _ in self.test_loader],
        }

    # ------------------------------------------------------------------------------------------------------- build

    def _build(self) -> Any:
        """Build the trainer: a checkout's through its own train.py's configuration, or this project's."""
        from gram_meta import engine

        spec, args = self.spec, argparse.Namespace()
        if spec["owner"] == "theirs":
            sys.path.insert(0, spec["checkout"])  # its clip, trainers and datasets, before any other of that name
            engine.backend()  # `dassl` can be imported from here on
            if spec["trainer"] == "ProMetaR":
                self.patches += patched_for_prometar(self.device, spec["precision"], spec["learn2learn"])
                self.around_step = lambda: sdpa_kernel(SDPBackend.MATH)
            self.patches.append(local_weights(spec["model"]))
            import train as launch  # the checkout's
        else:
            import gram_meta.plugin  # noqa: F401, registers the trainers
            from gram_meta.coop import launch

            args = launch.build_parser().parse_args([])
        for flag in ("resume", "head", "model_dir"):
            setattr(args, flag, "")
        for flag in ("source_domains", "target_domains", "transforms", "load_epoch"):
            setattr(args, flag, None)
        args.root, args.output_dir, args.seed = spec["root"], spec["folder"], 1
        args.config_file, args.dataset_config_file = spec["config"], spec["dataset_config"]
        args.trainer, args.backbone, args.opts = spec["trainer"], spec["model"], spec["opts"]
        args.eval_only = args.no_train = False
        cfg = launch.setup_cfg(args)
        engine.set_random_seed(1)
        return engine.build_trainer(cfg)

    def _prepare(self) -> dict[str, Any]:
        """Make batches with the trainer's own loaders, from one seed for all contestants; return facts and hashes."""
        from gram_meta import engine

        trainer = self.trainer
        engine.set_random_seed(1)
        self.batches = list(itertools.islice(trainer.train_loader_x, BATCHES))
        whole = trainer.test_loader
        count = min(self.spec["test_images"] or len(whole.dataset), len(whole.dataset))
        chosen = Subset(whole.dataset, [i * len(whole.dataset) // count for i in range(count)])
        self.test_loader = DataLoader(chosen, batch_size=whole.batch_size, pin_memory=whole.pin_memory)
        self.tests = list(self.test_loader)
        digest, names = hashlib.sha256(), trainer.dm.dataset.classnames
        for batch in (*self.batches, *self.tests):
            digest.update(batch["img"].numpy().data)
            digest.update(batch["label"].numpy().data)
        return {
            "sha256": digest.hexdigest(),
            "classes": len(names),
            "classnames_sha256": hashlib.sha256("\n".join(names).encode()).hexdigest(),
            "batch": len(self.batches[0]["label"]),
            "pixels": list(self.batches[0]["img"].shape[-2:]),
            "test_images": count,
        }

    def build(self) -> dict[str, Any]:
        """Return the facts by which checkouts.py verifies that all contestants do the same work."""
        from gram_meta import engine

        learned = sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)
        facts = {"patches": self.patches, "engine": engine.backend(), "learned_numbers": learned}
        return {**self.prepared, **facts, "resident_mb": common.status_bytes("VmRSS") / 1e6}

    # ----------------------------------------------------------------------------------------------------- measures

    def check(self) -> dict[str, Any]:
        """Return the loss of the first step, and a file with test logits at the start and the first step's gradients.

        The step and the evaluator are warm afterwards.
        """
        trainer, few = self.trainer, {key: value[:COMPARED] for key, value in self.tests[0].items()}
        trainer.set_model_mode("eval")
        with torch.no_grad():
            images, _ = trainer.parse_batch_test(few)
            arrays = {"logits": trainer.model_inference(images).float().cpu().numpy()}
        (loss,) = self._steps(iter(self.batches), 1)["losses"]
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                arrays[f"gradient:{name}"] = parameter.grad.float().cpu().numpy()
        self._test([few])
        path = Path(self.spec["folder"], "check.npz")
        np.savez(path, **arrays)
        return {"loss": loss, "arrays": str(path)}

    def timed(self, measure: str, count: int) -> dict[str, Any]:
        """Run a measure; return its seconds of processor time (all threads) and wall clock, and its results."""
        wall, cpu = common.wall_clock(), time.process_time()
        result = self.measures[measure](count)
        wall = common.wall_clock() - wall
        return {"cpu": time.process_time() - cpu, "wall": wall, **(result if isinstance(result, dict) else {})}

    def peak(self, measure: str, count: int) -> dict[str, Any]:
        """Return a measure's peak in MB above the level before: of the process (CPU), or allocated on the GPU."""
        return {"peak_mb": common.with_peak(lambda: self.measures[measure](count), self.device)[0]}

    def _steps(self, batches: Iterator[Any], count: int) -> dict[str, Any]:
        """Take `count` training steps; return their losses."""
        losses = []
        for batch in itertools.islice(batches, count):
            self.trainer.set_model_mode("train")
            with self.around_step():
                losses.append(self.trainer.forward_backward(batch)["loss"])
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss is {losses[-1]}")
        return {"losses": losses}

    def _test(self, batches: Any) -> dict[str, Any]:
        """Run the trainer's own test pass over these batches."""
        if hasattr(self.trainer.model, "_kept"):
            self.trainer.model._kept = None  # class features are part of every pass
        self.trainer.test_loader = batches
        return {"accuracy": float(self.trainer.test(split="test"))}

    def _images(self, batch: Any) -> None:
        """Run the image tower alone."""
        trainer, model = self.trainer, self.trainer.model
        images = batch["img"].to(trainer.device)
        amp = self.spec["precision"] == "amp" and trainer.device.type == "cuda"
        with torch.amp.autocast(trainer.device.type) if amp else nullcontext():
            if self.spec["owner"] == "theirs":
                model.image_encoder(images.type(model.dtype))
            else:
                model.image_features(images)

    @torch.no_grad()
    def _images_of_tests(self, count: int) -> None:
        for batch in self.tests:
            self._images(batch)


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
            contestant = contestant or Contestant(spec)
            answer = getattr(contestant, what)(**order)
        except Exception as error:  # noqa: BLE001, whatever stops a contestant is its result
            traceback.print_exc()
            words = str(error).strip() or traceback.extract_tb(error.__traceback__)[-1].line or ""
            answer = {"error": f"{type(error).__name__}: {words.splitlines()[0]}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
