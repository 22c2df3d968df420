"""One contestant of checkouts.py, in a process of its own: a trainer of a checkout as it is, or one of this project.

The trainer's own `forward_backward` and `test` do all the work. What a checkout needs on today's torch is patched at
run time and listed among the facts; no file of a checkout is changed.
"""

import hashlib
import itertools
import math
import os
import sys
import traceback
import types
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Subset

from gram_meta import engine
from gram_meta.errors import GramError

BATCHES = 4  # prepared training batches, taken in turns
COMPARED = 4  # test images whose logits are compared

built: "list[Contestant]" = []  # at most one


def begin(folder: Path, dassl: str) -> None:
    """Prepare this process: what the trainers print goes to log.txt in the folder; `dassl` is "real" or "builtin"."""
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(folder)
    os.environ["GRAM_DASSL"] = dassl
    warnings.simplefilter("ignore")


def answer(spec: Namespace, what: str, *words: Any) -> Any:
    """Call a method of the contestant, which is built at the first call; raise what stops it as a GramError."""
    try:
        if not built:
            built.append(Contestant(spec))
        return getattr(built[0], what)(*words)
    except Exception as error:
        traceback.print_exc()
        text = str(error).strip() or traceback.extract_tb(error.__traceback__)[-1].line or ""
        raise GramError(f"{type(error).__name__}: {text.splitlines()[0]}") from None


def local_weights(path: str) -> str:
    """Make the checkout's `clip` read the weights of this benchmark instead of downloading OpenAI's."""
    from clip import clip

    clip._MODELS[path] = path
    clip._download = lambda url, root=None: url
    return "weights: clip._download answers with a local file (a plain state dict, the same for all contestants)"


def patched_for_prometar(spec: Namespace) -> Iterator[str]:
    """Patch what ProMetaR needs on this machine; yield a sentence for each patch."""
    if spec.learn2learn:
        package = spec.learn2learn / "learn2learn"
        if not (package / "algorithms" / "base_learner.py").is_file():
            raise GramError(f"--learn2learn {spec.learn2learn}: expected learn2learn's sources, found none")
        for name, path in (("learn2learn", package), ("learn2learn.algorithms", package / "algorithms")):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(path)]
        yield (
            "learn2learn: its utils/__init__.py and algorithms/base_learner.py alone, from its sources "
            "(its compiled modules do not build on Python 3.11 and later, and are not used)"
        )
    if spec.device == "cpu":
        torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
        yield ".cuda() of tensors and modules is a no-op (on a CPU)"
    if spec.precision != "fp16":
        torch.Tensor.half = lambda self, *args, **kwargs: self
        yield ".half() of tensors is a no-op (its prompts would stay fp16 beside float32 towers, which is an error)"
    yield "the training step runs under sdpa_kernel(SDPBackend.MATH): fused attention has no second derivative"


class Contestant:
    """A built trainer, prepared batches, and what is measured of it; `Bench.start` in checkouts.py makes its `spec`."""

    def __init__(self, spec: Namespace) -> None:
        self.spec = spec
        self.second_order = spec.entry.trainer == "ProMetaR"
        torch.set_num_threads(spec.threads or torch.get_num_threads())
        torch.backends.cudnn.benchmark = spec.device == "cuda"  # as everybody's train.py has it
        self.trainer = trainer = self._build()
        trainer.epoch = trainer.batch_idx = 0
        trainer.num_batches = 10**9  # no batch is an epoch's last
        self._prepare()
        if not spec.checkout and hasattr(trainer, "record_step"):
            trainer.record_step()  # as before_train does
        prepared = itertools.cycle(self.batches)
        decoded = (batch for _ in itertools.count() for batch in trainer.train_loader_x)
        self.measures: dict[str, Callable[[int], Any]] = {
            "step": lambda count: self._steps(itertools.islice(prepared, count)),
            "step_with_loader": lambda count: self._steps(itertools.islice(decoded, count)),
            "test": lambda count: self._test(self.tests),
            "test_with_loader": lambda count: self._test(self.test_loader),
            "tower": lambda count: self._images(itertools.islice(prepared, count)),
            "tower_of_test": torch.no_grad()(lambda count: self._images(self.tests)),
            "loader": lambda count: list(itertools.islice(decoded, count)),
            "loader_of_test": lambda count: [None for _ in self.test_loader],
        }

    def _build(self) -> Any:
        """Build the trainer: a checkout's through its own train.py's configuration, or this project's."""
        from gram_meta.coop import launch

        spec, self.patches = self.spec, []
        flags = ["--root", spec.root, "--output-dir", spec.folder, "--seed", 1, "--trainer", spec.entry.trainer]
        flags += ["--backbone", spec.weights, "--config-file", spec.config, "--dataset-config-file", spec.dataset]
        args = launch.build_parser().parse_args([str(word) for word in (*flags, *spec.opts)])
        if spec.checkout:
            sys.path.insert(0, str(spec.checkout))  # its clip, trainers and datasets, before any other of that name
            engine.backend()  # `dassl` can be imported from here on
            if self.second_order:
                self.patches += patched_for_prometar(spec)
            self.patches.append(local_weights(str(spec.weights)))
            import train as launch  # the checkout's
        else:
            import gram_meta.plugin  # noqa: F401, registers the trainers
        cfg = launch.setup_cfg(args)
        engine.set_random_seed(1)
        return engine.build_trainer(cfg)

    def _prepare(self) -> None:
        """Make batches with the trainer's own loaders, from one seed for all contestants."""
        engine.set_random_seed(1)
        ready = itertools.islice(self.trainer.train_loader_x, BATCHES)
        self.batches = [{**batch, "img": batch["img"].cpu()} for batch in ready]  # a loader may leave them on the GPU
        if self.spec.device == "cuda":
            self.batches = [{**batch, "img": batch["img"].pin_memory()} for batch in self.batches]
        whole = self.trainer.test_loader
        count = min(self.spec.test_images or len(whole.dataset), len(whole.dataset))
        chosen = Subset(whole.dataset, [i * len(whole.dataset) // count for i in range(count)])
        self.test_loader = DataLoader(chosen, batch_size=whole.batch_size, pin_memory=whole.pin_memory)
        self.tests = list(self.test_loader)

    def facts(self) -> dict[str, Any]:
        """Return the facts by which checkouts.py verifies that all contestants do the same work."""
        digest, names = hashlib.sha256(), self.trainer.dm.dataset.classnames
        for batch in (*self.batches, *self.tests):
            digest.update(batch["img"].numpy().data)
            digest.update(batch["label"].numpy().data)
        return {
            "sha256": digest.hexdigest(),
            "classes": len(names),
            "classnames_sha256": hashlib.sha256("\n".join(names).encode()).hexdigest(),
            "batch": len(self.batches[0]["label"]),
            "pixels": list(self.batches[0]["img"].shape[-2:]),
            "test_images": len(self.test_loader.dataset),
            "patches": self.patches,
            "engine": engine.backend(),
            "learned_numbers": sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad),
        }

    def check(self) -> dict[str, np.ndarray]:
        """Return test logits at the start, and the first step's loss and gradients. All is warm afterwards."""
        trainer, few = self.trainer, {key: value[:COMPARED] for key, value in self.tests[0].items()}
        trainer.set_model_mode("eval")
        with torch.no_grad():
            images, _ = trainer.parse_batch_test(few)
            logits = trainer.model_inference(images)
        arrays = {"loss": np.array(self._steps(self.batches[:1])["losses"]), "logits": logits.float().cpu().numpy()}
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                arrays[f"gradient:{name}"] = parameter.grad.float().cpu().numpy()
        self._test([few])
        return arrays

    def timed(self, measure: str, count: int) -> dict[str, Any]:
        """Run a measure; return its seconds of each clock, and its results."""
        seconds, result = common.spent(lambda: self.measures[measure](count))
        return seconds | (result if isinstance(result, dict) else {})

    def peak(self, measure: str) -> float:
        """Return a measure's peak in MB above the level before: of the process (CPU), or allocated on the GPU."""
        return common.with_peak(lambda: self.measures[measure](1), self.spec.device)[0]

    def _steps(self, batches: Sequence[Any] | Iterator[Any]) -> dict[str, Any]:
        losses = []
        for batch in batches:
            self.trainer.set_model_mode("train")
            with sdpa_kernel(SDPBackend.MATH) if self.second_order else nullcontext():
                losses.append(float(self.trainer.forward_backward(batch)["loss"]))
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss is {losses[-1]}")
        return {"losses": losses}

    def _test(self, batches: Any) -> dict[str, Any]:
        if hasattr(self.trainer.model, "_kept"):
            self.trainer.model._kept = None  # class features are part of every pass
        self.trainer.test_loader = batches
        return {"accuracy": float(self.trainer.test(split="test"))}

    def _images(self, batches: Sequence[Any] | Iterator[Any]) -> None:
        device, model = self.trainer.device, self.trainer.model
        amp = self.spec.precision == "amp" and device.type == "cuda"
        theirs = self.spec.checkout and (lambda images: model.image_encoder(images.type(model.dtype)))
        for batch in batches:
            with torch.amp.autocast(device.type, enabled=amp):
                (theirs or model.image_features)(batch["img"].to(device))
