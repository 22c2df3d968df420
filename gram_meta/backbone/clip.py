"""Loading CLIP, and `Backbone`: its frozen towers, callable around prompts.

CLIP's own code is the `clip` package (OpenAI's, a checkout's `clip/` folder, or PyPI's clip-anytorch). It builds the
modules and the tokenizer. The forward passes are this project's (`towers`), because prompt learning needs what the
original does not offer: texts cut at their last used position, a prompt shared by all classes of a task computed once,
a batch of tasks with a prompt each, visual prompts, and a second derivative. Nothing in the `clip` package is edited or
patched, and logits equal its own to rounding (tests/backbone/test_backbone.py).
"""

from __future__ import annotations

import copy
import hashlib
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gram_meta.backbone.recompute import recomputed
from gram_meta.backbone.towers import Packing, Rectangle, image_features, text_features
from gram_meta.backbone.weights import OPENAI, Design, build_clip, empty_clip, pass_over, read_clip, read_sizes
from gram_meta.errors import GramError, in_one_line
from gram_meta.files import PathLike

PACKAGED = "gram-small"  # the small CLIP in this package
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
PRECISIONS |= {"tf32": torch.float32}  # with a GPU's quick products of 10-bit fractions
RUN_PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "amp")  # of a run or a prediction; amp: float32 towers, autocast

# embed_dim, image px, vision layers, vision width, patch, context, vocabulary, text width, text heads, text layers
_SHAPES: dict[str, tuple[Any, ...]] = {
    "tiny": (64, 32, 2, 64, 8, 77, 49408, 64, 1, 2),
    "tiny-RN": (64, 32, (1, 1, 1, 1), 8, None, 77, 49408, 64, 1, 2),
    PACKAGED: (128, 64, 6, 128, 8, 77, 49408, 128, 2, 4),
    "ViT-B/32": (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12),
    "ViT-B/16": (512, 224, 12, 768, 16, 77, 49408, 512, 8, 12),
    "ViT-L/14": (768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12),
    "ViT-L/14@336px": (768, 336, 24, 1024, 14, 77, 49408, 768, 12, 12),
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 8, 12),
    "RN101": (512, 224, (3, 4, 23, 3), 64, None, 77, 49408, 512, 8, 12),
    "RN50x4": (640, 288, (4, 6, 10, 6), 80, None, 77, 49408, 640, 10, 12),
    "RN50x16": (768, 384, (6, 8, 18, 8), 96, None, 77, 49408, 768, 12, 12),
    "RN50x64": (1024, 448, (3, 15, 36, 10), 128, None, 77, 49408, 1024, 16, 12),
}


keeps_last = False  # whether `load_backbone` keeps the last CLIP for its next call: a process of `gram bench` does
_kept: dict[tuple[Any, ...], Backbone] = {}


def load_backbone(
    name: PathLike | nn.Module, device: str | torch.device | None = None, precision: str | None = None
) -> Backbone:
    """Load a frozen CLIP.

    Args:
        name: an OpenAI name (`"ViT-B/16"`, downloaded by the clip package to ~/.cache/clip), a path to a file or folder
            with weights in OpenAI's, Hugging Face's or open_clip's layout (see `backbone.weights`), `"gram-small"` for
            the model in this package, or `"random-SHAPE"` (`random-tiny`, `random-ViT-B/16`) for seeded random weights.
            Or a model: a `CLIPModel` of transformers, a `CLIP` of open_clip or of the clip package (see
            `backbone.objects`), which stays as it is and whose weights are shared where they can be. A `Backbone` is
            returned as it is.
        device: of the towers; None: that of a model, else the CPU.
        precision: `fp32`, `tf32`, `fp16`, `bf16` or `fp64` for the towers; None: that of a model, else `fp32`. Features
            and logits are float32 (float64 for `fp64`). `tf32` is float32 with the TF32 products of NVIDIA's GPUs
            (`use_tf32`). These are switches of the process, which every call sets: the precision of the last backbone
            holds.

    Raises:
        GramError: unknown name, device or precision, missing or unreadable file, or a CLIP of another architecture.
    """
    if isinstance(name, Backbone):
        return name
    if isinstance(name, nn.Module):
        return _backbone_of(name, device, precision)
    if not isinstance(name, str | os.PathLike):
        raise GramError(f"backbone: expected a name, a file of weights or a model, found {name!r}")
    name = os.fspath(name)
    device, precision = device or "cpu", precision or "fp32"
    _set_precision(precision)
    _check_device(device)
    files = sorted(file for file in (Path(name), *Path(name).glob("*")) if file.is_file())
    key = (name, str(device), precision, *((file.stat().st_mtime_ns, file.stat().st_size) for file in files))
    if kept := _kept.get(key):
        pass_over(getattr(kept.model, "draws", 0))  # a run draws the same after the first load and after later ones
        return copy.copy(kept)  # the weights are the same, the settings its own
    _kept.clear()
    design = OPENAI
    if name.startswith("random-"):
        model = _random_model(name.removeprefix("random-"))
    else:
        state, design = _state_dict_for(name)
        model = build_clip(clip_module(), state, name, design)
        del state
    backbone = Backbone(model, name, device, precision, design)
    if keeps_last:
        _kept[key] = copy.copy(backbone)
    return backbone


def _backbone_of(model: nn.Module, device: str | torch.device | None, precision: str | None) -> Backbone:
    from gram_meta.backbone.objects import read_model

    found = read_model(model)
    sample = found.state["text_projection"]
    kinds = {kind: name for name, kind in reversed(PRECISIONS.items())}
    precision = precision or kinds.get(sample.dtype, "fp32")
    _set_precision(precision)
    _check_device(device or sample.device)
    built = build_clip(clip_module(), found.state, found.name, found.design, found.tower)
    return Backbone(built, found.name, device or sample.device, precision, found.design)


def _set_precision(precision: str) -> None:
    if precision not in tuple(PRECISIONS):  # a file may name a list
        raise GramError(f"precision: expected one of {', '.join(PRECISIONS)}, found {precision!r}")
    use_tf32(precision == "tf32")


def use_tf32(enabled: bool) -> None:
    """Let NVIDIA's GPUs compute float32 matrix products and convolutions with TF32's 10-bit fractions, or not.

    Both are switches of the process. torch's own default is TF32 for convolutions alone, such as the patch embedding.
    """
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled


def _check_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or none of this machine
        expected = "expected one of this machine, such as cpu or cuda"
        raise GramError(f"device: {expected}, found {str(device)!r} ({in_one_line(error)})") from None


def check_name(where: PathLike, made_with: str, name: str, widths: Mapping[str, int]) -> None:
    """Refuse a CLIP that cannot be the one a file was made with, before its weights are loaded or downloaded.

    Two names that stand for weights have to be equal. A weights file has to have the file's widths, as far as its
    shapes tell. `Backbone.check_weights` compares the weights themselves, once they are loaded.

    Args:
        where: the file. made_with: the name of its CLIP, "" if it is not known. widths: see `sizes_of`.
        name: as for `load_backbone`.

    Raises:
        GramError: it is another CLIP.
    """
    known = {PACKAGED, *getattr(clip_module().clip, "_MODELS", {})}
    if name != made_with and all(one in known or one.startswith("random-") for one in (name, made_with)):
        raise GramError(f"{where}: expected the backbone it was made with, {made_with}, found {name!r}")
    found = sizes_of(name)
    for part, width in widths.items():
        if found.get(part, width) != width:
            what = f"the backbone it was made with, {made_with or 'another CLIP'}, of {part} width {width}"
            raise GramError(f"{where}: expected {what}, found {name} of width {found[part]}")


def sizes_of(name: str) -> dict[str, int]:
    """Return the widths and the image size of a CLIP without its weights, as `read_sizes`; {} if they are unknown."""
    known = {PACKAGED, *getattr(clip_module().clip, "_MODELS", {})}
    if Path(name).exists() and name not in known:
        return read_sizes(Path(name))
    if not (shape := _SHAPES.get(name.removeprefix("random-"))):
        return {}
    found = {"joint": shape[0], "image": shape[1], "text": shape[7]}
    return found if isinstance(shape[2], tuple) else found | {"visual": shape[3]}


class Backbone(nn.Module):
    """Frozen CLIP towers, callable around prompts.

    Attributes:
        name: as given to `load_backbone`.
        is_vit: whether the image tower is OpenAI's transformer (only then are there visual prompts).
        text_width, visual_width, embed_dim: d_text, d_visual (0 without `is_vit`) and the width D of the joint space.
        design: what the weights do not show, such as the activation.
        image_size: side of the square input in pixels.
        context_length: positions of the text tower (77).
        logit_scale: 1 / tau of Eq. 1, float32 scalar.
        checkpointing: which towers recompute each layer's activations in the backward pass instead of keeping them:
            False (the default), True (both), "text" or "images". Values and gradients of every order stay the same.
        packs_texts: whether the text tower computes no padding (`Packing`), which is fast on a CPU, or one rectangle
            (`Rectangle`), which takes few launches on a GPU. By default the device decides. Results are equal.
    """

    logit_scale: Tensor
    pixel_mean: Tensor
    pixel_std: Tensor
    model: Any  # clip.model.CLIP, whose parts are declared in CLIP's code only

    def __init__(
        self, model: Any, name: str, device: str | torch.device, precision: str, design: Design = OPENAI
    ) -> None:
        super().__init__()
        self.name, self.design = name, design
        self._digest = _Digest(partial(fingerprint, design=design), model.state_dict())
        self.is_vit = hasattr(model.visual, "class_embedding")
        self.text_width = int(model.ln_final.weight.shape[0])
        self.visual_width = int(model.visual.conv1.weight.shape[0]) if self.is_vit else 0
        self.embed_dim = int(model.text_projection.shape[1])
        self.image_size = int(model.visual.input_resolution)
        self.context_length = int(model.positional_embedding.shape[0])
        self.precision = precision
        self.checkpointing: bool | str = False
        self.packs_texts = torch.device(device).type == "cpu"
        for name, value in (("pixel_mean", design.mean), ("pixel_std", design.std)):
            self.register_buffer(name, torch.tensor(value)[:, None, None], persistent=False)  # (3, 1, 1)
        tau = model.logit_scale.detach().float().exp()
        self.register_buffer("logit_scale", tau.to(_feature_dtype(precision)))
        self.model = _place(model.requires_grad_(False), device, PRECISIONS[precision])
        self.to(device).eval()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights as float32, so the same for every precision and device; a thread computes it."""
        return self._digest()

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the towers' matrix products."""
        return self.model.transformer.resblocks[0].mlp.c_fc.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: the towers are frozen, and so are a ResNet's batch statistics."""
        return super().train(False)

    def check_weights(self, where: PathLike, name: str, digest: str) -> None:
        """Raise a `GramError` if the file `where` was made with another CLIP: `name`, of fingerprint `digest`."""
        if digest != self.fingerprint:
            made, found = f"{name or 'another CLIP'} ({digest[:12]})", f"{self.name} ({self.fingerprint[:12]})"
            raise GramError(f"{where}: expected the backbone it was made with, {made}, found {found}")

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return token ids (n, 77); raise `GramError` for a text with more tokens than there are positions."""
        return tokenize(texts, self.context_length)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Return the embeddings (..., L, d_text) of token ids (..., L), in the towers' number type."""
        return self.model.token_embedding(tokens.to(self.device)).to(self.dtype)

    def encode_text(
        self,
        own: Tensor,
        ends: Tensor,
        shared: Tensor | None = None,
        packing: Packing | Rectangle | None = None,
        deeper: Tensor | None = None,
    ) -> Tensor:
        """Return L2-normalised features of texts given as token embeddings.

        The tower is causal. Positions after the end token change nothing, so `own` may be cut there. Tokens before the
        first one that differs between texts are the same for all of them. `packs_texts` chooses the layout. The last
        layer runs for the end tokens only.

        Args:
            own: (..., N, L, d) the texts' own tokens; leading axes are free (a batch of tasks).
            ends: (..., N) or (N,), index into the L positions of each text's end token.
            shared: (..., P, d) tokens that precede `own` in each of the N texts of a leading index, or None.
            packing: `packing(ends, L, P)`, if an earlier call made it.
            deeper: (..., layers - 1, M, d) deep prompts: what replaces the M shared tokens behind the first one at the
                input of each further layer.

        Returns:
            (..., N, D) float32 (float64 for an fp64 backbone).

        Raises:
            GramError: P + L is more than the tower's positions.
        """
        *lead, n, length, width = own.shape
        own = own.reshape(-1, n, length, width).to(self.dtype)  # (G, N, L, d)
        before = 0 if shared is None else shared.shape[-2]
        if before + length > self.context_length:
            raise GramError(f"text for CLIP: expected at most {self.context_length} tokens, found {before + length}")
        positions = self.model.positional_embedding.to(self.dtype)
        own = own + positions[before : before + length]
        if shared is not None:
            shared = shared.reshape(-1, before, width).to(self.dtype) + positions[:before]  # (G, P, d)
        packing = packing or self.packing(ends.expand(*lead, n), length, before)
        deeper = None if deeper is None else deeper.reshape(-1, *deeper.shape[-3:])  # (G, layers - 1, M, d)
        features = text_features(self.model, own, shared, packing, self._run("text"), deeper)  # (G N, D)
        return self._normalised(features).reshape(*lead, n, self.embed_dim)

    def packing(self, ends: Tensor, length: int, before: int) -> Packing | Rectangle:
        """Return how `encode_text` lays out texts with end positions `ends` (..., N); it depends on nothing else."""
        layout = Packing if self.packs_texts else Rectangle
        return layout(ends.to(self.device).reshape(-1, ends.shape[-1]), length, before)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Return the L2-normalised features (n, D) of plain strings; each batch is cut at its longest text."""
        parts = []
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenize(texts[start : start + batch_size])
            ends = end_positions(tokens)
            parts.append(self.encode_text(self.embed_tokens(tokens[:, : int(ends.max()) + 1]), ends))
        return torch.cat(parts) if parts else self.logit_scale.new_zeros(0, self.embed_dim)

    def encode_images(self, images: Tensor, prompt: Tensor | None = None, deeper: Tensor | None = None) -> Tensor:
        """Return L2-normalised features of images.

        Args:
            images: (B, 3, H, W), already resized and normalised (see `preprocess`).
            prompt: visual prompt tokens (M, d_visual), or (B, M, d_visual) with a prompt per image. They are appended
                to the patch tokens after the positional embedding and before `ln_pre` (shallow VPT).
            deeper: deep prompts, (layers - 1, M, d_visual) or (B, layers - 1, M, d_visual): what replaces these tokens
                at the input of each further layer (deep VPT).

        Returns:
            (B, D) float32 (float64 for an fp64 backbone).

        Raises:
            GramError: a prompt for a ResNet, or images of another size.
        """
        if images.shape[-2:] != (self.image_size, self.image_size):
            side, found = self.image_size, f"{images.shape[-2]} x {images.shape[-1]}"
            raise GramError(f"images for {self.name}: expected {side} x {side} pixels, found {found} (INPUT.SIZE)")
        images = images.to(self.device, self.dtype)
        if not self.is_vit:
            if prompt is not None:
                raise GramError(f"visual prompts: expected a ViT image tower of OpenAI's kind, found {self.name}")
            return self._normalised(self.model.visual(images))
        return self._normalised(image_features(self.model.visual, images, prompt, self._run("images"), deeper))

    def preprocess(self, as_bytes: bool = False, on_tensors: bool = False) -> Callable[[Any], Tensor]:
        """Return CLIP's evaluation transform: PIL image -> (3, H, W), resized (bicubic), centre-cropped, normalised.

        `as_bytes`: return uint8 pixels, which take a quarter of the memory, and leave the last step to `normalise`.
        `on_tensors`: resize tensors, which may come in batches (k, 3, h, w); six times as fast as Pillow, and a pixel
        differs by at most 1 of 255.
        """
        from torchvision import transforms as T
        from torchvision.transforms import v2

        cut: Any = v2 if on_tensors else T
        steps = [cut.Resize(self.image_size, T.InterpolationMode.BICUBIC), cut.CenterCrop(self.image_size)]
        steps.insert(0 if on_tensors else 2, cut.PILToTensor())
        if not as_bytes:  # v2 would multiply by 1 / 255, and round otherwise
            steps += [T.ConvertImageDtype(torch.float32), T.Normalize(self.design.mean, self.design.std)]
        return T.Compose(steps)

    def normalise(self, images: Tensor) -> Tensor:
        """Turn uint8 pixels (..., 3, H, W), on the towers' device, into the tower's float32 input."""
        return (images.float() / 255 - self.pixel_mean) / self.pixel_std

    def _run(self, tower: str) -> Callable[..., Any]:
        """Return how the layers of a tower are called: activations recomputed in the backward pass, or kept."""
        return recomputed if self.checkpointing in (True, tower) else lambda layer, *inputs: layer(*inputs)

    def _normalised(self, features: Tensor) -> Tensor:
        return F.normalize(features.to(_feature_dtype(self.precision)), dim=-1)


def tokenize(texts: Sequence[str], positions: int = 77) -> Tensor:
    """Return token ids (n, positions); raise `GramError` for a text with more tokens."""
    clip = clip_module()
    try:
        return clip.tokenize(list(texts), context_length=positions)
    except RuntimeError as error:
        raise GramError(f"text for CLIP: expected at most {positions} tokens; {error}") from None


def end_positions(tokens: Tensor) -> Tensor:
    """Return the index (n,) of the end token in each row of ids (n, L): its id is the highest of the vocabulary."""
    return tokens.argmax(dim=-1)


def clip_module() -> ModuleType:
    """Import the `clip` package: a checkout's own folder, else clip-anytorch; raise `GramError` if there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pkg_resources warns of its removal on every import
            import clip
    except ImportError as error:
        raise GramError(
            f"CLIP's code: expected an importable package `clip` with `clip.tokenize`, found none ({error}); "
            'install it with `pip install clip-anytorch "setuptools<82"`'
        ) from None
    if not hasattr(clip, "tokenize"):
        raise GramError(
            f"CLIP's code: expected OpenAI's package `clip`, found another of that name at {clip.__file__}; "
            'install it with `pip uninstall clip && pip install clip-anytorch "setuptools<82"`'
        )
    return clip


class _Digest:
    """The result of a function, which a thread computes; a call waits for it. The argument is freed meanwhile."""

    def __init__(self, function: Callable[[Any], str], argument: Any) -> None:
        self.function, self.held = function, [argument]
        self.found: list[str] = []
        self.thread = threading.Thread(target=self._compute)
        self.thread.start()

    def _compute(self) -> None:
        self.found.append(self.function(self.held[0]))
        self.held.clear()

    def __call__(self) -> str:
        self.thread.join()
        if not self.found:  # this process was forked meanwhile, and threads stay behind
            self._compute()
        return self.found[0]

    def __reduce__(self) -> tuple[Any, ...]:  # in a pickle: the result alone
        return partial, (str, self())


def fingerprint(state_dict: dict[str, Tensor], design: Design = OPENAI) -> str:
    """Return the SHA-256 of names, shapes and float32 values of a state dict, in the order of the names.

    A design other than OpenAI's counts too: the same weights with another activation are another CLIP.
    """
    digest = hashlib.sha256() if design == OPENAI else hashlib.sha256(repr(design).encode())
    for key in sorted(state_dict):
        value = state_dict[key].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()


def _state_dict_for(name: str) -> tuple[dict[str, Tensor], Design]:
    if name == PACKAGED:
        from gram_meta.backbone.packaged import load_packaged_state_dict

        return load_packaged_state_dict(), OPENAI
    known = {key: url for key, url in getattr(clip_module().clip, "_MODELS", {}).items() if key != PACKAGED}
    if name in known:
        root = os.path.expanduser("~/.cache/clip")
        try:
            return read_clip(Path(clip_module().clip._download(known[name], root)))
        except (OSError, RuntimeError) as error:  # RuntimeError: of a file whose checksum differs
            raise GramError(
                f"{name}: expected to download {known[name]} to {root}, found {error}; a file with these weights can "
                "be named by its path instead (MODEL.BACKBONE.NAME of `gram train`, BACKBONE.NAME of `gram pretrain`, "
                "--backbone of the other commands)"
            ) from None
    if Path(name).exists():
        return read_clip(Path(name))
    raise GramError(f"backbone {name!r}: expected {PACKAGED}, a path, or one of {', '.join(known)}, found none of them")


def _random_model(shape: str) -> nn.Module:
    if shape not in _SHAPES:
        raise GramError(f"backbone 'random-{shape}': expected random- and one of {', '.join(_SHAPES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return empty_clip(clip_module(), *_SHAPES[shape])


def _place(model: Any, device: str | torch.device, dtype: torch.dtype) -> Any:
    """Bring each weight to a device and to its number type at once: `dtype` for matrix products.

    With 16 bits everything else is float32, as in OpenAI's code; a ResNet runs its own forward pass, in one type.
    """
    whole = dtype in (torch.float32, torch.float64)
    low = set() if hasattr(model.visual, "class_embedding") else set(model.visual.modules())
    for module in model.modules():
        is_low = whole or module in low or isinstance(module, nn.Conv2d | nn.Linear | nn.MultiheadAttention)
        for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            kind = value.dtype if not value.is_floating_point() else dtype if is_low else torch.float32
            value.data = value.data.to(device, kind)
    return model


def _feature_dtype(precision: str) -> torch.dtype:
    return torch.float64 if precision == "fp64" else torch.float32
