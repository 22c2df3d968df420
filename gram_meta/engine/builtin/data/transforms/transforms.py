"""Training and test transforms from INPUT.*: which ones, in which order, and their lines in the log."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as F
from PIL import Image
from torchvision.transforms.functional import InterpolationMode
from yacs.config import CfgNode

from gram_meta.errors import GramError

INTERPOLATION_MODES = {
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
    "nearest": InterpolationMode.NEAREST,
}

# center_crop is part of every test transform; naming it changes nothing
AVAI_CHOICES = [
    *("random_flip", "random_resized_crop", "normalize", "instance_norm", "random_crop", "random_translation"),
    *("center_crop", "cutout", "gaussian_noise", "colorjitter", "randomgrayscale", "gaussian_blur"),
]
# Dassl has these too; no CoOp-style configuration uses them
NOT_BUILT_IN = [
    *("imagenet_policy", "cifar10_policy", "svhn_policy", "randaugment", "randaugment_fixmatch", "randaugment2")
]


class Random2DTranslation:
    """Enlarge by 1/8 and crop (height, width) at a random place, with probability p; else resize to that size."""

    def __init__(
        self, height: int, width: int, p: float = 0.5, interpolation: InterpolationMode = InterpolationMode.BILINEAR
    ) -> None:
        self.height, self.width, self.p, self.interpolation = height, width, p, interpolation

    def __call__(self, img: Image.Image) -> Image.Image:
        if random.uniform(0, 1) > self.p:
            return F.resize(img, [self.height, self.width], self.interpolation)
        height, width = round(self.height * 1.125), round(self.width * 1.125)
        img = F.resize(img, [height, width], self.interpolation)
        left = round(random.uniform(0, width - self.width))
        top = round(random.uniform(0, height - self.height))
        return F.crop(img, top, left, self.height, self.width)


class InstanceNormalization:
    """Normalise each channel of each image to mean 0 and deviation 1."""

    def __init__(self, eps: float = 1e-8) -> None:
        self.eps = eps

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        mean = img.mean((1, 2), keepdim=True)  # (C, 1, 1)
        std = img.flatten(1).std(1).view(-1, 1, 1)
        return (img - mean) / (std + self.eps)


class Cutout:
    """Set squares at random places to zero."""

    def __init__(self, n_holes: int = 1, length: int = 16) -> None:
        self.n_holes, self.length = n_holes, length

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        height, width = img.shape[-2:]
        mask = torch.ones(height, width)
        half = self.length // 2
        for _ in range(self.n_holes):
            y, x = np.random.randint(height), np.random.randint(width)
            mask[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = 0.0
        return img * mask


class GaussianNoise:
    """Add noise of this mean and deviation, with probability p."""

    def __init__(self, mean: float = 0.0, std: float = 0.15, p: float = 0.5) -> None:
        self.mean, self.std, self.p = mean, std, p

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        if random.uniform(0, 1) > self.p:
            return img
        return img + torch.randn(img.size()) * self.std + self.mean


def build_transform(cfg: CfgNode, is_train: bool = True, choices: Sequence[str] | None = None) -> Callable | None:
    """Return the transform that INPUT.* describes; `choices` replaces INPUT.TRANSFORMS. None for INPUT.NO_TRANSFORM."""
    if cfg.INPUT.NO_TRANSFORM:
        print("Note: no transform is applied!")
        return None
    choices = cfg.INPUT.TRANSFORMS if choices is None else choices
    for choice in choices:
        if choice in NOT_BUILT_IN:
            raise GramError(f"INPUT.TRANSFORMS: {choice!r} is not part of the built-in engine; install Dassl for it")
        if choice not in AVAI_CHOICES:
            raise GramError(f"INPUT.TRANSFORMS: {choice!r} is not known; known: {', '.join(sorted(AVAI_CHOICES))}")
    if cfg.INPUT.INTERPOLATION not in INTERPOLATION_MODES:
        known = ", ".join(INTERPOLATION_MODES)
        raise GramError(f"INPUT.INTERPOLATION is {cfg.INPUT.INTERPOLATION!r}; expected one of {known}")
    steps = _train_steps(cfg, choices) if is_train else _test_steps(cfg, choices)
    print("Building transform_train" if is_train else "Building transform_test")
    for text, _ in steps:
        print(f"+ {text}")
    return T.Compose([transform for _, transform in steps])


Steps = list[tuple[str, Callable]]  # (its line in the log, the transform)
TO_TENSOR = ("to torch tensor of range [0, 1]", T.ToTensor())


def _train_steps(cfg: CfgNode, choices: Sequence[str]) -> Steps:
    """Return the steps in Dassl's order, so that equal seeds give the same crops."""
    given, size = cfg.INPUT, cfg.INPUT.SIZE
    mode = INTERPOLATION_MODES[given.INTERPOLATION]
    steps: Steps = []
    if "random_crop" not in choices and "random_resized_crop" not in choices:
        steps.append((f"resize to {size[0]}x{size[1]}", T.Resize(size, interpolation=mode)))
    if "random_translation" in choices:
        steps.append(("random translation", Random2DTranslation(size[0], size[1])))
    if "random_crop" in choices:
        crop = T.RandomCrop(size, padding=given.CROP_PADDING)
        steps.append((f"random crop (padding = {given.CROP_PADDING})", crop))
    if "random_resized_crop" in choices:
        crop = T.RandomResizedCrop(size, scale=given.RRCROP_SCALE, interpolation=mode)
        steps.append((f"random resized crop (size={size}, scale={given.RRCROP_SCALE})", crop))
    if "random_flip" in choices:
        steps.append(("random flip", T.RandomHorizontalFlip()))
    if "colorjitter" in choices:
        b, c, s, h = given.COLORJITTER_B, given.COLORJITTER_C, given.COLORJITTER_S, given.COLORJITTER_H
        text = f"color jitter (brightness={b}, contrast={c}, saturation={s}, hue={h})"
        steps.append((text, T.ColorJitter(brightness=b, contrast=c, saturation=s, hue=h)))
    if "randomgrayscale" in choices:
        steps.append(("random gray scale", T.RandomGrayscale(p=given.RGS_P)))
    if "gaussian_blur" in choices:
        blur = T.RandomApply([T.GaussianBlur(given.GB_K)], p=given.GB_P)
        steps.append((f"gaussian blur (kernel={given.GB_K})", blur))
    steps.append(TO_TENSOR)
    if "cutout" in choices:
        text = f"cutout (n_holes={given.CUTOUT_N}, length={given.CUTOUT_LEN})"
        steps.append((text, Cutout(given.CUTOUT_N, given.CUTOUT_LEN)))
    if "normalize" in choices:
        steps.append(_normalize(cfg))
    if "gaussian_noise" in choices:
        text = f"gaussian noise (mean={given.GN_MEAN}, std={given.GN_STD})"
        steps.append((text, GaussianNoise(given.GN_MEAN, given.GN_STD)))
    return steps + _instance_norm(choices)


def _test_steps(cfg: CfgNode, choices: Sequence[str]) -> Steps:
    size = cfg.INPUT.SIZE
    resize = T.Resize(max(size), interpolation=INTERPOLATION_MODES[cfg.INPUT.INTERPOLATION])
    steps: Steps = [
        (f"resize the smaller edge to {max(size)}", resize),
        (f"{size[0]}x{size[1]} center crop", T.CenterCrop(size)),
        TO_TENSOR,
    ]
    if "normalize" in choices:
        steps.append(_normalize(cfg))
    return steps + _instance_norm(choices)


def _instance_norm(choices: Sequence[str]) -> Steps:
    return [("instance normalization", InstanceNormalization())] if "instance_norm" in choices else []


def _normalize(cfg: CfgNode) -> tuple[str, Callable]:
    mean, std = cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD
    return f"normalization (mean={mean}, std={std})", T.Normalize(mean=mean, std=std)
