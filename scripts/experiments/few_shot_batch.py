"""Few-shot trainings of a text prompt from many starts at once, on the packaged CLIP: what meta_grid.py measures with.

`record` runs CoOp once and keeps what each of its steps saw. `adapt` repeats these steps for many prompts along a
leading axis, each with a regulator of its own.
"""

import json
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import Tensor

from gram_meta import load_backbone
from gram_meta.coop.launch import train
from gram_meta.method.prompts import ClassText, logits
from gram_meta.trainers.coop import CoOp

CONFIG = "gram_small_c4_ep10_batch32_ctxv1"
STEPS = 90  # ten epochs of 16 shots in 18 classes, batches of 32
MOMENTUM, DECAY = 0.9, 5e-4  # Dassl's defaults for SGD

Regulate = Callable[[Tensor], Tensor]  # a raw gradient (M, d) -> the gradient to step with
Scores = dict[int, tuple[float, float]]  # by step: accuracy on base and on new classes


@dataclass
class Recording:
    """What the steps of one CoOp run saw."""

    features: Tensor  # (steps, B, D)
    labels: Tensor  # (steps, B)
    rates: list[float]
    curve: list[dict]  # of the run itself


@dataclass
class TestSet:
    """Features of the test images."""

    features: Tensor  # (N, D)
    labels: Tensor  # (N,)
    names: list[str]  # of all classes; the first half are the base classes


def few_shot(root: str, dataset: str, trainer: str, out: Path, seed: int, opts: list[str]) -> list[dict]:
    """Train on 16 shots of the base classes, unless the run is finished; return its accuracies by step."""
    words = ["--trainer", trainer, "--root", root, "--seed", str(seed), "--output-dir", str(out)]
    words += ["--config-file", CONFIG, "--dataset-config-file", dataset, "DATASET.NUM_SHOTS", "16"]
    return train([*words, "DATASET.SUBSAMPLE_CLASSES", "base", *opts], quiet=True)["curve"]


def record(root: str, dataset: str, seed: int, epochs: int = 10) -> Recording:
    """Run CoOp in a temporary folder, and return what its steps saw."""
    seen: list[tuple[Tensor, Tensor, float]] = []
    step = CoOp.forward_backward

    def watched(trainer: CoOp, batch: dict) -> dict[str, float]:
        images, labels = trainer.parse_batch_train(batch)
        with torch.no_grad():
            seen.append((trainer.model.image_features(images), labels, trainer.optim.param_groups[0]["lr"]))
        return step(trainer, batch)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(CoOp, "forward_backward", watched):
        opts = ["TEST.AT_STEPS", str((0, STEPS)), "OPTIM.MAX_EPOCH", str(epochs)]
        curve = few_shot(root, dataset, "CoOp", Path(folder) / "run", seed, opts)
    features, labels, rates = zip(*seen, strict=True)
    return Recording(torch.stack(features), torch.stack(labels), list(rates), curve)


def test_set(root: str, dataset: str) -> TestSet:
    """Return the test images' features, of a dataset of the emoji world."""
    folder = Path(root) / dataset
    rows = json.loads(next(folder.glob("split_zhou_*.json")).read_text())["test"]
    backbone = load_backbone("gram-small")
    transform = backbone.preprocess()
    with torch.no_grad():
        pixels = torch.stack([transform(Image.open(folder / "images" / name)) for name, _, _ in rows])
        features = torch.cat([backbone.encode_images(part) for part in pixels.split(256)])
    names = {label: name for _, label, name in rows}
    return TestSet(features, torch.tensor([label for _, label, _ in rows]), [names[i] for i in range(len(names))])


def adapt(
    recording: Recording,
    test: TestSet,
    starts: Mapping[Any, tuple[Tensor, Regulate | None]],
    at: Collection[int] = (0, STEPS),
) -> dict[Any, Scores]:
    """Take the recorded steps from every start, a prompt (M, d) and what its gradients pass through (None: nothing).

    Returns the accuracies of each start before training and after the numbers of steps `at`.
    """
    backbone = load_backbone("gram-small")
    prompts = torch.stack([prompt for prompt, _ in starts.values()])  # (V, M, d)
    half, tokens = len(test.names) // 2, prompts.shape[1]
    base, new = (ClassText(backbone, names, tokens) for names in (test.names[:half], test.names[half:]))
    found: dict[Any, Scores] = {name: {} for name in starts}

    @torch.no_grad()
    def score(step: int) -> None:
        sides = []
        for text, rows, first in ((base, test.labels < half, 0), (new, test.labels >= half, half)):
            images = test.features[rows].expand(len(starts), -1, -1)
            guesses = logits(images, text.features(prompts), backbone.logit_scale).argmax(dim=2)  # (V, N)
            sides.append(100 * (guesses == test.labels[rows] - first).double().mean(dim=1))
        for name, *accuracies in zip(starts, *sides, strict=True):
            found[name][step] = (accuracies[0].item(), accuracies[1].item())

    score(0)
    velocity = torch.zeros_like(prompts)
    seen = zip(recording.features, recording.labels, recording.rates, strict=True)
    for step, (features, labels, rate) in enumerate(seen, start=1):
        leaf = prompts.requires_grad_()
        scores = logits(features.expand(len(starts), -1, -1), base.features(leaf), backbone.logit_scale)  # (V, B, K)
        targets = labels.expand(len(starts), -1)  # (V, B)
        losses = torch.nn.functional.cross_entropy(scores.transpose(1, 2), targets, reduction="sum")
        (raw,) = torch.autograd.grad(losses / len(labels), leaf)
        with torch.no_grad():
            rows = zip(raw, starts.values(), strict=True)
            steps = torch.stack([g if regulate is None else regulate(g) for g, (_, regulate) in rows])
            velocity = MOMENTUM * velocity + steps + DECAY * prompts
            prompts = (prompts - rate * velocity).detach()
        if step in at:
            score(step)
    return found
