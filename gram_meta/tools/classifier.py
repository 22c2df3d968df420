"""A classifier in scikit-learn's manner: learn prompts from a few labelled images, classify others; no dataset.

`fit` takes the steps of the few-shot trainers: their transforms, optimiser and schedule, cross-entropy, and R^phi
before `optimizer.step()`. Probabilities are those of Eq. 1.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from msgspec import Meta
from PIL import Image
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from gram_meta.backbone.clip import Backbone, load_backbone
from gram_meta.config import COMMAND_BOUNDS, META_BOUNDS, check_bounds, did_you_mean, stored_config
from gram_meta.corpus.sources import all_rows, open_source
from gram_meta.engine.checkpoints import check_finite
from gram_meta.errors import GramError, in_one_line
from gram_meta.files import ModelFacts, PathLike, atomic_write, check_type, to_json
from gram_meta.images import BROKEN, as_rgb, kept_images, read_rgb
from gram_meta.method.apply import Regulation, regulate
from gram_meta.method.checkpoint import FORMAT, MetaCheckpoint, check_fit, load_meta_checkpoint, read_facts
from gram_meta.method.prompts import TEMPLATE, PromptConfig, PromptedCLIP, initial_prompts, logits
from gram_meta.processes import ALONE, device_for, workers_for
from gram_meta.progress import progress_bar
from gram_meta.random_state import kept_random_state
from gram_meta.tools.predict import FEW, default_batch_size

Picture = str | os.PathLike[str] | Image.Image | np.ndarray

KEPT = 2e9  # bytes of decoded training images; if all take more, they are decoded in every epoch
_KEY = "gram-classifier"
_NOT_SAVED = ("backbone", "meta", "class_names", "device", "progress")


class _Facts(TypedDict):
    """The metadata of a saved classifier."""

    format: int
    backbone: ModelFacts
    is_named: bool  # whether the backbone's name stands for its weights
    class_names: Annotated[list[str], Meta(min_length=1)]
    has_numbers: bool  # whether labels are numbers
    template: str
    settings: dict[str, Any]


class GramClassifier(ClassifierMixin, BaseEstimator):
    """A few-shot classifier of images: frozen CLIP with learned prompts.

    The conventions are scikit-learn's. A clone shares the backbone and the meta-checkpoint.

    Args:
        backbone: a name, a weights file or a model, as for `load_backbone`.
        meta: a meta-checkpoint, its file, or the name of one in the package (`gram-small-text`), of this backbone. Its
            prompts are the start, and its regulator, if it has one, regulates the gradients. None: neither.
        class_names: the names of the classes 0, 1, ... of labels that are numbers; of labels that are names, all that
            `predict` chooses from, also those without an image. None: the labels' names, sorted.
        text_tokens, visual_tokens: M_t and M_v; 0: no such prompt. Like the next two, without effect beside `meta`.
        words: initialisation of the text prompt, of as many tokens; "": random.
        template: class prompt if there is no text prompt.
        epochs, lr, batch_size: of SGD with momentum 0.9, a first epoch at 1e-5 and then a cosine, as in CoOp.
        augment: random crops and flips in every epoch. False: without visual prompts each image is encoded once.
        seed: of everything that is drawn; torch's own generators stay where they are.
        device, precision: as for `load_backbone`; None: for a name, the GPU if there is one.
        progress: whether to show a bar.

    Attributes:
        classes_: (N,) labels, in the order of probabilities.
        model_: the learned `PromptedCLIP`.
        regulation_: what R^phi has done, or None without one; `regulation_.summary()`.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "gram-small",
        meta: PathLike | MetaCheckpoint | None = None,
        *,
        class_names: Sequence[str] | None = None,
        text_tokens: int = 4,
        visual_tokens: int = 0,
        words: str = "a photo of a",
        template: str = TEMPLATE,
        epochs: int = 10,
        lr: float = 0.002,
        batch_size: int = 32,
        augment: bool = True,
        seed: int = 1,
        device: str | None = None,
        precision: str | None = None,
        progress: bool = True,
    ) -> None:
        self.backbone = backbone
        self.meta = meta
        self.class_names = class_names
        self.text_tokens = text_tokens
        self.visual_tokens = visual_tokens
        self.words = words
        self.template = template
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.augment = augment
        self.seed = seed
        self.device = device
        self.precision = precision
        self.progress = progress

    def __sklearn_clone__(self) -> GramClassifier:
        return type(self)(**self.get_params(deep=False))

    @staticmethod
    def read_folder(folder: PathLike) -> tuple[list[str], list[str]]:
        """Return the image files in class folders and their labels, for `fit` and `score`.

        A class is called as its folder, with spaces for underscores, or as a `classnames.txt` names it.
        """
        source = open_source(folder, format="classes")
        rows = [row for row in all_rows(source) if not row.skip]
        return [str(source.path / row.location) for row in rows], [row.caption for row in rows]

    def fit(self, images: Iterable[Picture], labels: Iterable[str | int]) -> GramClassifier:
        """Learn the prompts.

        Args:
            images: n paths, PIL images or uint8 arrays (H, W, 3).
            labels: n class names, or n numbers from 0 that `class_names` names.

        Raises:
            GramError: an image that cannot be used, labels that do not fit, a meta-checkpoint of another backbone.
        """
        settings = {name: _plain(getattr(self, name)) for name in ("epochs", "lr", "batch_size", "seed")}
        for name, value in settings.items():
            if name != "lr" and not isinstance(value, int):
                raise GramError(f"{name}: expected a whole number, found {value!r}")
        check_bounds(settings, COMMAND_BOUNDS)
        pictures = _listed(images)
        names, has_numbers, targets = self._targets(labels, len(pictures))
        meta = self.meta
        if meta is not None and not isinstance(meta, MetaCheckpoint):
            meta = load_meta_checkpoint(meta)
        backbone = load_backbone(self.backbone, _device(self.backbone, self.device), self.precision)
        model, template = self._start(backbone, names, meta)
        cfg = _trainer_settings(self, backbone)
        self.regulation_ = self._learn(model, meta, cfg, pictures, targets)
        self.model_, self.template_ = model, template  # only now: a `fit` that fails changes nothing
        self._set_classes(names, has_numbers)
        return self

    def predict_proba(self, images: Iterable[Picture]) -> np.ndarray:
        """Return the probabilities (n, N), float32, of the classes `classes_` for n images as in `fit`."""
        check_is_fitted(self, "model_")
        pictures, model = _listed(images), self.model_
        rows = [np.zeros((0, len(self.classes_)), np.float32)]
        with torch.no_grad():
            for features in _features(model, pictures, self.progress):
                scores = logits(features, model.class_features(), model.backbone.logit_scale)
                rows.append(scores.float().softmax(dim=1).cpu().numpy())
        return np.concatenate(rows)

    def predict(self, images: Iterable[Picture]) -> np.ndarray:
        """Return the most probable label (n,) of each of n images as in `fit`."""
        probabilities = self.predict_proba(images)
        return self.classes_[probabilities.argmax(axis=1)]

    def save(self, path: PathLike) -> None:
        """Write the fitted classifier as a .safetensors file, without the weights of its CLIP."""
        from safetensors.torch import save

        check_is_fitted(self, "model_")
        backbone, params = self.model_.backbone, self.get_params(deep=False)
        facts: _Facts = {
            "format": FORMAT,
            "backbone": {"name": backbone.name, "fingerprint": backbone.fingerprint},
            "is_named": isinstance(self.backbone, str),
            "class_names": self.class_names_,
            "has_numbers": self.classes_.dtype.kind == "i",
            "template": self.template_,
            "settings": {name: _plain(value) for name, value in params.items() if name not in _NOT_SAVED},
        }
        prompts = {kind: value.detach().cpu().contiguous() for kind, value in self.model_.prompts().items()}
        with atomic_write(path) as file:
            file.write(save(prompts, metadata={_KEY: to_json(facts, str(path))}))

    @classmethod
    def load(cls, path: PathLike, backbone: str | nn.Module | None = None, device: str | None = None) -> GramClassifier:
        """Read a classifier that `save` wrote.

        Args:
            backbone: the CLIP it was fitted with, if that was no name; its weights are compared.
            device: of the CLIP.

        Raises:
            GramError: no such file, another or a damaged one, or another CLIP.
        """
        facts, prompts = read_facts(Path(path), _KEY, "classifier")
        check_type(facts, _Facts, f"{path}: metadata")
        name = facts["backbone"]["name"]
        if backbone is None and not facts["is_named"]:
            raise GramError(f"{path}: expected the model it was fitted with, {name}, as backbone=, found none")
        try:
            found = cls(backbone or name, class_names=facts["class_names"], device=device, **facts["settings"])
        except TypeError as error:
            raise GramError(
                f"{path}: expected the settings of a classifier, found others ({in_one_line(error)})"
            ) from None
        clip = load_backbone(found.backbone, _device(found.backbone, device), found.precision)
        clip.check_weights(path, name, facts["backbone"]["fingerprint"])
        widths = {"text": clip.text_width, "visual": clip.visual_width}
        expected = {kind: (*value.shape[:1], widths.get(kind, 0)) for kind, value in prompts.items()}
        check_fit(path, expected, {kind: value.shape for kind, value in prompts.items()})
        check_finite(path, prompts)
        check_bounds({"PROMPT.TEMPLATE": facts["template"]}, META_BOUNDS)
        _check_different(facts["class_names"], f"{path}: class_names")
        found._set_classes(facts["class_names"], facts["has_numbers"])
        found.template_, found.regulation_ = facts["template"], None
        found.model_ = PromptedCLIP(clip, found.class_names_, prompts, found.template_)
        return found

    def _targets(self, labels: Iterable[Any], count: int) -> tuple[list[str], bool, Tensor]:
        """Return the names of all classes, whether labels are numbers, and the number (n,) of each label."""
        if isinstance(labels, str) or not isinstance(labels, Iterable):
            raise GramError(f"labels: expected a list of names or whole numbers, found {labels!r}")
        values = list(map(_plain, labels))
        if len(values) != count:
            raise GramError(f"labels: expected one for each of {count} images, found {len(values)}")
        has_numbers = all(isinstance(value, int) for value in values)
        if others := [value for value in values if not isinstance(value, int if has_numbers else str)]:
            raise GramError(f"labels: expected names or whole numbers, found {others[0]!r}")
        if has_numbers and self.class_names is None and values:
            raise GramError(f"labels: expected names, or class_names beside numbers, found {values[0]}")
        if isinstance(self.class_names, str) or not isinstance(self.class_names, Iterable | None):
            raise GramError(f"class_names: expected a list of names, found {self.class_names!r}")
        names = sorted(set(values)) if self.class_names is None else list(map(_plain, self.class_names))
        _check_different(names, "class_names")
        known = {label: number for number, label in enumerate(range(len(names)) if has_numbers else names)}
        for value in values:
            if value not in known:
                expected = f"a number from 0 to {len(names) - 1}" if has_numbers else "one of class_names"
                hint = "" if has_numbers else did_you_mean(value, names)
                raise GramError(f"labels: expected {expected}, found {value!r}{hint}")
        if len(set(values)) < 2:
            raise GramError(
                f"labels: expected at least two classes, found {', '.join(map(repr, set(values))) or 'none'}"
            )
        return names, has_numbers, torch.tensor([known[value] for value in values])

    def _set_classes(self, names: list[str], has_numbers: bool) -> None:
        self.class_names_ = names
        self.classes_ = np.arange(len(names)) if has_numbers else np.array(names)

    def _start(self, backbone: Backbone, names: list[str], meta: MetaCheckpoint | None) -> tuple[PromptedCLIP, str]:
        """Return the classifier before its first step, and its template."""
        if meta is None:
            tokens = {"TEXT_TOKENS": _plain(self.text_tokens), "VISUAL_TOKENS": _plain(self.visual_tokens)}
            check_bounds({"PROMPT": {**tokens, "TEMPLATE": self.template}}, META_BOUNDS)
            prompt = PromptConfig(self.text_tokens, self.visual_tokens, self.words, self.template)
            prompts = initial_prompts(backbone, prompt.text_tokens, prompt.visual_tokens, prompt.words, int(self.seed))
            template = prompt.template
        else:
            meta.check_shallow()
            meta.check(backbone, meta.tokens)
            prompts, template = meta.prompts, stored_config(meta.config).PROMPT.TEMPLATE
        return PromptedCLIP(backbone, names, prompts, template), template

    def _learn(
        self, model: PromptedCLIP, meta: MetaCheckpoint | None, cfg: Any, pictures: list[Picture], targets: Tensor
    ) -> Regulation | None:
        """Move the prompts down the loss."""
        from gram_meta import engine

        device = model.backbone.device
        targets = targets.to(device)
        learner = model.prompt_learner
        optimizer = engine.build_optimizer(learner, cfg.OPTIM)
        schedule = engine.build_lr_scheduler(optimizer, cfg.OPTIM)
        regulation = None if meta is None else regulate(optimizer, model.prompts(), meta)
        paths = [os.fspath(picture) for picture in pictures if isinstance(picture, str | os.PathLike)]
        with kept_random_state(), kept_images(paths, KEPT, as_coop=False):
            torch.manual_seed(int(self.seed))
            loader = self._loader(model, cfg, pictures)
            with progress_bar(total=self.epochs * len(loader), desc="fit", unit=" steps", shown=self.progress) as bar:
                for epoch in range(self.epochs):
                    for inputs, rows in loader:
                        loss = F.cross_entropy(self._scores(model, inputs.to(device)), targets[rows.to(device)])
                        if not loss.isfinite():
                            raise GramError(f"fit: expected a finite loss, found {loss} in epoch {epoch + 1}; lower lr")
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
                        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                        bar.update()
                    schedule.step()
        return regulation

    def _loader(self, model: PromptedCLIP, cfg: Any, pictures: list[Picture]) -> DataLoader:
        """Return batches of (images, or their features where they never change; their numbers), in random order."""
        from gram_meta import engine

        workers = 0
        if self.augment:
            with redirect_stdout(io.StringIO()):  # it prints its steps
                data: Dataset = _Pictures(pictures, engine.build_transform(cfg, is_train=True))
            workers = workers_for(model.backbone.device) if len(pictures) > FEW else 0
        elif "visual" in model.prompts():
            data = _Pictures(pictures, model.backbone.preprocess())
        else:
            with torch.no_grad():
                features = torch.cat(list(_features(model, pictures, self.progress)))
            data = TensorDataset(features.cpu(), torch.arange(len(pictures)))
        order = torch.Generator().manual_seed(int(self.seed))
        return DataLoader(data, int(self.batch_size), shuffle=True, generator=order, num_workers=workers)

    def _scores(self, model: PromptedCLIP, inputs: Tensor) -> Tensor:
        if inputs.dim() == 4:
            return model(inputs)
        return logits(inputs, model.class_features(), model.backbone.logit_scale)


class _Pictures(Dataset):
    """Images by number, as (what a transform makes of it, its number)."""

    def __init__(self, pictures: list[Picture], transform: Any) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self.transform(_rgb(self.pictures[number], number)), number


def _features(model: PromptedCLIP, pictures: list[Picture], progress: bool) -> Iterable[Tensor]:
    """Yield the features (B, D) of images, batch by batch."""
    backbone, many = model.backbone, len(pictures) > FEW
    workers = workers_for(backbone.device) if many else 0
    loader = DataLoader(_Pictures(pictures, backbone.preprocess()), default_batch_size(backbone), num_workers=workers)
    for pixels, _ in progress_bar(loader, desc="images", unit=" batches", shown=progress and many):
        yield model.image_features(pixels.to(backbone.device))


def _listed(images: Iterable[Picture]) -> list[Picture]:
    if isinstance(images, str | os.PathLike | Image.Image) or not isinstance(images, Iterable):
        found = repr(images) if isinstance(images, str) else type(images).__name__
        raise GramError(f"images: expected a list of paths, PIL images or uint8 arrays, found {found}")
    return list(images)


def _rgb(picture: Picture, number: int) -> Image.Image:
    """Return an image as upright 8-bit RGB; raise a `GramError` that names its file or its number."""
    if isinstance(picture, str | os.PathLike):
        return read_rgb(picture)
    found = type(picture).__name__
    if isinstance(picture, np.ndarray):
        if picture.dtype == np.uint8 and picture.size and (picture.ndim == 2 or picture.shape[2:] in ((3,), (4,))):
            return as_rgb(Image.fromarray(picture))
        found = f"{picture.dtype} {picture.shape}"
    elif isinstance(picture, Image.Image):
        try:
            picture.load()
            return as_rgb(picture)
        except Exception:  # noqa: BLE001 - some pixels raise only when they are used
            raise GramError(f"images[{number}]: expected an image, found: {BROKEN}") from None
    raise GramError(f"images[{number}]: expected a path, a PIL image or uint8 (H, W, 3), found {found}")


def _check_different(names: list[Any], what: str) -> None:
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise GramError(f"{what}: expected different names, found {names}")


def _plain(value: Any) -> Any:
    """Return a number or string of NumPy as Python's."""
    return value.item() if isinstance(value, np.generic) else value


def _device(backbone: str | nn.Module, device: str | None) -> str | None:
    """Return the device for `load_backbone`: by default a GPU for a name, and that of a model."""
    return device_for(ALONE, device or "") if isinstance(backbone, str) else device


def _trainer_settings(classifier: GramClassifier, backbone: Backbone) -> Any:
    """Return the INPUT and OPTIM nodes of the few-shot trainers' configs."""
    from gram_meta import engine
    from gram_meta.engine.options import extend_cfg

    cfg = engine.get_cfg_default().clone()
    cfg.defrost()
    extend_cfg(cfg)
    cfg.INPUT.SIZE, cfg.INPUT.INTERPOLATION = (backbone.image_size, backbone.image_size), "bicubic"
    cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD = list(backbone.design.mean), list(backbone.design.std)
    cfg.INPUT.TRANSFORMS = ("random_resized_crop", "random_flip", "normalize")
    cfg.OPTIM.NAME, cfg.OPTIM.LR, cfg.OPTIM.MAX_EPOCH = "sgd", float(classifier.lr), int(classifier.epochs)
    cfg.OPTIM.LR_SCHEDULER, cfg.OPTIM.WARMUP_TYPE, cfg.OPTIM.WARMUP_CONS_LR = "cosine", "constant", 1e-5
    cfg.OPTIM.WARMUP_EPOCH = min(1, int(classifier.epochs) - 1)  # a single epoch is to learn something
    return cfg
