"""Training and test transforms from INPUT.*: which ones, in which order, and their lines in the log."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision.transforms
from torchvision.transforms import InterpolationMode, v2
from yacs.config import CfgNode

from gram_meta.engine import builtin

INTERPOLATION_MODES = {mode: InterpolationMode(mode) for mode in ("bilinear", "bicubic", "nearest")}

# center_crop is part of every test transform; naming it changes nothing
AVAI_CHOICES = ["random_flip", "random_resized_crop", "normalize", "instance_norm", "random_crop", "center_crop"]


class InstanceNormalization:
    """Normalise each channel of each image to mean 0 and deviation 1."""

    def __init__(self, eps: float = 1e-8) -> None:
        self.eps = eps

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        mean = img.mean((1, 2), keepdim=True)  # (C, 1, 1)
        std = img.flatten(1).std(1).view(-1, 1, 1)
        return (img - mean) / (std + self.eps)


def build_transform(cfg: CfgNode, is_train: bool = True, choices: Sequence[str] | None = None) -> Callable | None:
    """Return the transform that INPUT.* describes; `choices` replaces INPUT.TRANSFORMS. None for INPUT.NO_TRANSFORM."""
    if cfg.INPUT.NO_TRANSFORM:
        print("Note: no transform is applied!")
        return None
    choices = cfg.INPUT.TRANSFORMS if choices is None else choices
    for choice in choices:
        if choice not in AVAI_CHOICES:
            raise builtin.not_built_in("INPUT.TRANSFORMS", choice, AVAI_CHOICES)
    if cfg.INPUT.INTERPOLATION not in INTERPOLATION_MODES:
        raise builtin.not_built_in("INPUT.INTERPOLATION", cfg.INPUT.INTERPOLATION, INTERPOLATION_MODES)
    on_tensors = cfg.INPUT.CROP_ON != "images"
    T: Any = v2 if on_tensors else torchvision.transforms
    steps = _train_steps(T, cfg, choices) if is_train else _test_steps(T, cfg)
    if on_tensors:
        device = torch.device("cuda" if crops_on_gpu(cfg) else "cpu")
        steps.insert(0, (f"to torch tensor of bytes on {device}", ToBytes(device)))
    to_floats = v2.ToDtype(torch.float32, scale=True) if on_tensors else T.ToTensor()
    steps.append(("to torch tensor of range [0, 1]", to_floats))
    if "normalize" in choices:
        mean, std = cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD
        normalize = T.Normalize(mean=mean, std=std, inplace=True)  # the floats are new
        steps.append((f"normalization (mean={mean}, std={std})", normalize))
    if "instance_norm" in choices:
        steps.append(("instance normalization", InstanceNormalization()))
    print("Building transform_train" if is_train else "Building transform_test")
    for text, _ in steps:
        print(f"+ {text}")
    return T.Compose([transform for _, transform in steps])


def crops_on_gpu(cfg: CfgNode) -> bool:
    """Return whether INPUT.CROP_ON asks for the device and that is a GPU."""
    return bool(cfg.INPUT.CROP_ON == "device" and cfg.USE_CUDA and torch.cuda.is_available())


class ToBytes:
    """Turns an image into bytes (3, H, W) on a device; on a GPU, they stay there as long as the image is kept."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, image: Any) -> torch.Tensor:
        if self.device.type == "cpu":
            return v2.functional.pil_to_tensor(image)
        if not hasattr(image, "on_device"):
            image.on_device = v2.functional.pil_to_tensor(image).to(self.device)
        return image.on_device


class Normalise:
    """Turns bytes (B, 3, H, W) into normalised floats as `ToTensor` and `Normalize` do, on the device of the bytes."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.mean, self.std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))
        self.white = torch.tensor(255.0, device=device)  # CUDA multiplies by the reciprocal of a plain number

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().div_(self.white).sub_(self.mean).div_(self.std)


def split_transform(transform: Any, device: torch.device) -> tuple[Callable, Normalise] | None:
    """Return the part of a transform up to bytes, and its end for a batch on a device; None if it ends otherwise."""
    steps = list(getattr(transform, "transforms", ()))
    kinds = [type(step) for step in steps[-2:]]
    if kinds not in ([torchvision.transforms.ToTensor, torchvision.transforms.Normalize], [v2.ToDtype, v2.Normalize]):
        return None
    to_bytes = [v2.PILToTensor()] if kinds[1] is torchvision.transforms.Normalize else []
    return type(transform)([*steps[:-2], *to_bytes]), Normalise(steps[-1].mean, steps[-1].std, device)


class CropOnDevice:
    """Turns images as bytes, (3, h, w) each, into a batch (B, 3, H, W) on a device; `steps` crop and normalise one."""

    def __init__(self, steps: Callable, device: torch.device) -> None:
        self.steps, self.device = steps, device

    def __call__(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([self.steps(image.to(self.device, non_blocking=True)) for image in images])


def split_crops(transform: Any) -> tuple[Callable, CropOnDevice] | None:
    """Return what other processes can do of a transform that crops on a GPU, and the rest for a batch; None if neither.

    They decode, and leave an image's bytes uncropped.
    """
    steps = list(getattr(transform, "transforms", ()))
    if not steps or not isinstance(steps[0], ToBytes) or steps[0].device.type == "cpu":
        return None
    return ToBytes(torch.device("cpu")), CropOnDevice(type(transform)(steps[1:]), steps[0].device)


Steps = list[tuple[str, Callable]]  # (its line in the log, the transform)


def _train_steps(T: Any, cfg: CfgNode, choices: Sequence[str]) -> Steps:
    """Return the steps up to the crop, of the module T, in Dassl's order: equal seeds give the same crops."""
    given, size = cfg.INPUT, cfg.INPUT.SIZE
    mode = INTERPOLATION_MODES[given.INTERPOLATION]
    steps: Steps = []
    if "random_crop" not in choices and "random_resized_crop" not in choices:
        steps.append((f"resize to {size[0]}x{size[1]}", T.Resize(size, interpolation=mode)))
    if "random_crop" in choices:
        crop = T.RandomCrop(size, padding=given.CROP_PADDING)
        steps.append((f"random crop (padding = {given.CROP_PADDING})", crop))
    if "random_resized_crop" in choices:
        crop = T.RandomResizedCrop(size, scale=given.RRCROP_SCALE, interpolation=mode)
        steps.append((f"random resized crop (size={size}, scale={given.RRCROP_SCALE})", crop))
    if "random_flip" in choices:
        steps.append(("random flip", T.RandomHorizontalFlip()))
    return steps


def _test_steps(T: Any, cfg: CfgNode) -> Steps:
    size = cfg.INPUT.SIZE
    resize = T.Resize(max(size), interpolation=INTERPOLATION_MODES[cfg.INPUT.INTERPOLATION])
    return [
        (f"resize the smaller edge to {max(size)}", resize),
        (f"{size[0]}x{size[1]} center crop", T.CenterCrop(size)),
    ]
