"""Reading of published CLIP weights under OpenAI's key names, with a check that CLIP's code computes them correctly.

The formats are OpenAI's own files (TorchScript archives, plain state dicts), Hugging Face's (a folder written by
`save_pretrained`, or a file of it) and open_clip's (a folder or file of its hub, or a checkpoint of its training). The
architecture is OpenAI's: pre-norm blocks, an image tower that is read at its class token, a causal text tower that is
read at the end token. Weights do not show their activation, heads, epsilon or pixel statistics; the config beside them
does (`Design`). If the config describes another architecture, the weights are refused: they would load, and give wrong
features.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gram_meta.engine.checkpoints import Record, RestrictedUnpickler
from gram_meta.errors import GramError, in_one_line
from gram_meta.files import PathLike, read_json

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # RGB, of CLIP's training images
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

HEAD = 64  # channels of an attention head in OpenAI's builder
EPS = 1e-5  # of its layer norms
VOCABULARY = 49_408  # of its tokenizer
END = VOCABULARY - 1  # id of its end token
ACTIVATIONS = ("quick_gelu", "gelu")


class Tower(NamedTuple):
    """How a transformer computes, beyond its weights."""

    activation: str = ACTIVATIONS[0]
    head: int = HEAD  # channels of an attention head
    eps: float = EPS


@dataclass(frozen=True)
class Design:
    """What the weights of a CLIP do not show; the defaults are OpenAI's."""

    text: Tower = Tower()
    image: Tower = Tower()
    mean: tuple[float, ...] = PIXEL_MEAN
    std: tuple[float, ...] = PIXEL_STD


OPENAI = Design()

_START = "visual.class_embedding"  # a ViT has it, a ResNet does not
_KEPT = (torch.float32, torch.float16, torch.bfloat16, torch.int64)  # number types that are exact as float32

# Entries beside the weights in OpenAI's archives and in other checkpoints, which are not learned
_EXTRA = {
    *("input_resolution", "context_length", "vocab_size", "attn_mask"),
    *("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
}

# Names of files in a folder of weights: (the config that describes them, the weights, best first)
_HUGGING_FACE = (
    "config.json",
    ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_OPEN_CLIP = (
    "open_clip_config.json",
    ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
)

# Arguments that the `clip` of MaPLe's family requires; these build the plain CLIP of CoOp
_PLAIN_DESIGN = {"trainer": "CoOp", "vision_depth": 0, "vision_ctx": 0, "language_depth": 0, "language_ctx": 0}


def read_clip(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], Design]:
    """Return weights under OpenAI's names, and their design, from a file or folder of one of the three layouts.

    Files are mapped. `device`: "cpu" copies the weights from there, as a mapped file may change later; "meta" returns
    their shapes alone and reads none of them. Raises `GramError` for an unreadable file, or weights that CLIP's code
    would load but compute differently.
    """
    file = _file_of(path) if path.is_dir() else path
    state = {key: value.to(device, copy=True) for key, value in _plain_names(_read_file(file)).items()}
    _refuse_siglip(state, path)
    if any(key.startswith(("vision_model.", "text_model.")) for key in state):
        design = hugging_face_design(_config_beside(file, _HUGGING_FACE[0], path), path, file.parent)
        return from_hugging_face(state, path), design
    if _is_open_clip(file, state):
        design = _open_clip_design(_config_beside(file, _OPEN_CLIP[0], path), path)
        return from_open_clip(state), design
    return state, OPENAI


def read_sizes(path: Path) -> dict[str, int]:
    """Return the sizes of the CLIP in a file or folder, from shapes alone: nothing is read but headers.

    The sizes are the widths of the towers ("text", "visual", for a ViT) and of their joint space ("joint"), and the
    side of the images in pixels ("image"). What cannot be told is left out; loading says what is wrong with a file.
    """
    try:
        shapes = {key: tuple(value.shape) for key, value in read_clip(path, "meta")[0].items()}
    except (GramError, RuntimeError):
        return {}
    places = {"text": ("token_embedding.weight", 1), "joint": ("text_projection", 1), "visual": (_START, 0)}
    found = {part: shapes[key][axis] for part, (key, axis) in places.items() if len(shapes.get(key, ())) > axis}
    for key, patch in (("visual", (0, *shapes.get("visual.conv1.weight", ()))[-1]), ("visual.attnpool", 32)):
        if (positions := shapes.get(f"{key}.positional_embedding")) and patch:
            found["image"] = math.isqrt(max(positions[0] - 1, 0)) * patch
    return found


def build_clip(
    clip: ModuleType, state: Mapping[str, Tensor], name: str, design: Design = OPENAI, tower: ForeignTower | None = None
) -> Any:
    """Return CLIP's modules with these very tensors; raise `GramError` for no whole CLIP of OpenAI's kind.

    Nothing is copied: the modules are built without memory (device "meta"), and then hold the tensors of `state` in
    their own number types. The random generator ends where initial weights would have left it, as in CoOp's code, so
    that equal seeds give equal runs there and here. The modules' `draws` counts what was taken from it.

    Args:
        design: of the towers. tower: the image tower, if it is not one of OpenAI's; `state` then has none.
    """
    weights = {key: value if value.dtype in _KEPT else value.float() for key, value in state.items()}
    weights = {key: value for key, value in weights.items() if key not in _EXTRA}
    if "text_projection" not in weights or (tower is None and "visual.conv1.weight" not in weights):
        some = ", ".join(list(weights)[:3]) or "nothing"
        raise GramError(f"{name}: expected a CLIP with Hugging Face's, open_clip's or OpenAI's key names, found {some}")
    try:
        with _Draws() as draws, torch.device("meta"):
            shapes = {key: value.to("meta") for key, value in weights.items()}
            model = _plainly(clip.model.build_model, shapes | ({} if tower is None else _least_tower(shapes)))
        model.draws = draws.count
        pass_over(model.draws)
        if tower is not None:
            model.visual = tower
            weights |= {f"visual.{key}": value for key, value in tower.state_dict().items()}
        model.load_state_dict(weights, assign=True)
    except (KeyError, IndexError, RuntimeError) as error:
        found = f"no {error.args[0]}" if isinstance(error, KeyError) else in_one_line(error, 300)
        raise GramError(f"{name}: expected a whole CLIP of OpenAI's architecture, found {found}") from None
    vocabulary = model.token_embedding.weight.shape[0]
    if vocabulary < VOCABULARY:
        raise GramError(f"{name}: expected {VOCABULARY} tokens of CLIP's tokenizer, found {vocabulary}")
    for block in model.transformer.resblocks:
        block.attn_mask = model.build_attention_mask()  # no weight
    _apply(design.text, nn.ModuleList([model.transformer, model.ln_final]))
    if tower is None:
        _apply(design.image, model.visual)
    return model


class ForeignTower(nn.Module):
    """An image tower of another architecture, which is called as it is: text prompts work, visual ones do not.

    Its tensors are those of `tower`; its modules are copies, so that freezing or moving them leaves `tower` alone.
    """

    def __init__(self, tower: nn.Module, size: int) -> None:
        super().__init__()
        shared: dict[int, Any] = {id(one): nn.Parameter(one.detach(), False) for one in tower.parameters()}
        shared |= {id(one): one.detach() for one in tower.buffers()}
        self.tower, self.input_resolution = copy.deepcopy(tower, shared), size

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, D) of images (B, 3, H, W)."""
        return self.tower(images)


def _least_tower(shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the shapes of an image tower without layers, for CLIP's builder to begin with."""
    joint = shapes["text_projection"].shape[1]
    sizes = {"class_embedding": (HEAD,), "conv1.weight": (HEAD, 3, 1, 1), "positional_embedding": (2, HEAD)}
    sizes |= {f"ln_{which}.{leaf}": (HEAD,) for which in ("pre", "post") for leaf in ("weight", "bias")}
    return {f"visual.{key}": torch.empty(size) for key, size in (sizes | {"proj": (HEAD, joint)}).items()}


def _apply(tower: Tower, module: nn.Module) -> None:
    """Have a tower of CLIP's modules compute as its design describes."""
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = tower.eps
        elif isinstance(part, nn.MultiheadAttention):
            part.num_heads, part.head_dim = part.embed_dim // tower.head, tower.head
        elif tower.activation == "gelu" and hasattr(part, "gelu"):
            part.gelu = nn.GELU()


class _Draws(TorchDispatchMode):
    """Counts the 32-bit numbers that tensors filled at random inside would take from the generator of the CPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name in ("uniform_", "normal_", "randn"):
            normal = name != "uniform_"
            self.count += result.numel() + 16 * (normal and result.numel() % 16 > 0)  # normal ones: the last 16 twice
        return result


def pass_over(count: int) -> None:
    """Take `count` 32-bit numbers from the generator of the CPU."""
    scratch = torch.empty(2**20, dtype=torch.int32)
    for start in range(0, count, len(scratch)):
        scratch[: count - start].random_()


def empty_clip(clip: ModuleType, *shape: Any) -> Any:
    """Return CLIP's modules of a shape, with weights drawn by the package."""
    return _plainly(clip.model.CLIP, *shape)


def _plainly(function: Callable[..., Any], *args: Any) -> Any:
    """Call a builder of the `clip` package; those of MaPLe's family get the `design_details` of a plain CLIP."""
    if "design_details" in inspect.signature(function).parameters:
        return function(*args, design_details=dict(_PLAIN_DESIGN))
    return function(*args)


def _file_of(folder: Path) -> Path:
    for config, files in (_HUGGING_FACE, _OPEN_CLIP):
        beside = folder / config
        if beside.is_file() and (config == _OPEN_CLIP[0] or "model_type" in read_json(beside, dict[str, Any])):
            for file in files:
                if (folder / file).is_file():
                    return folder / file
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise GramError(
        f"{folder}: expected a Hugging Face model (config.json with model.safetensors or pytorch_model.bin) or an "
        f"open_clip model (open_clip_config.json with open_clip_model.safetensors or open_clip_pytorch_model.bin), "
        f"found {found}"
    )


def _read_file(path: Path) -> dict[str, Tensor]:
    """Return tensors by name from a .safetensors file, a TorchScript archive, or a plain torch file; run no code."""
    if path.name.endswith(".index.json"):
        return _read_parts(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:  # noqa: BLE001, safetensors raises errors of its own classes
            raise GramError(f"{path}: expected a .safetensors file, found {error}") from None
    expected = f"{path}: expected a TorchScript archive or a state dict of tensors, found"
    try:
        mapped = zipfile.is_zipfile(path)  # pickles of old kinds are read whole
        if mapped and "constants.pkl" in (archive := torch._C.PyTorchFileReader(str(path))).get_all_records():
            return dict(_tensors_of(_Archive(archive, path).load()))
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # noqa: BLE001, pickle, zip and torch each raise their own
        raise GramError(f"{expected} {in_one_line(error)}") from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise GramError(f"{expected} no tensors")
    return tensors


class _Archive(RestrictedUnpickler):
    """The unpickler of a TorchScript archive: modules become `Record`s, tensors are parts of the mapped file."""

    def __init__(self, archive: Any, path: Path) -> None:
        super().__init__(io.BytesIO(archive.get_record("data.pkl")))
        self.archive, self.file = archive, torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)

    def persistent_load(self, entry: Any) -> Any:
        _, kind, key, _, count = entry
        dtype = torch.storage._get_dtype_from_pickle_storage_type(kind.of.removeprefix("torch."))
        start = self.archive.get_record_offset(f"data/{key}")
        part = self.file[start : start + count * dtype.itemsize]
        return torch.storage.TypedStorage(wrap_storage=part, dtype=dtype, _internal=True)


def _tensors_of(module: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a module in an archive, and of the modules in it, by the names of a state dict."""
    for name, value in module.state.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, Record):
            yield from _tensors_of(value, f"{prefix}{name}.")


class _Index(TypedDict):
    weight_map: dict[str, str]


def _read_parts(index: Path) -> dict[str, Tensor]:
    """Return weights that Hugging Face has split over several files."""
    state: dict[str, Tensor] = {}
    for name in sorted(set(read_json(index, _Index)["weight_map"].values())):
        state |= _read_file(index.parent / Path(name).name)  # beside the index, never in another folder
    return state


def _plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without the prefixes that wrappers of a training put before every name."""
    for prefix in ("module.", "_orig_mod.", "module."):
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def _config_beside(file: Path, name: str, path: Path) -> dict[str, Any]:
    beside = file.parent / name
    if not beside.is_file():
        least = '{"model_type": "clip"}' if name == _HUGGING_FACE[0] else '{"model_cfg": {"quick_gelu": true}}'
        raise GramError(
            f"{path}: expected {name} beside it, which names the activation and the number of heads, found none; for a "
            f"model that computes as OpenAI's does, {least} is enough"
        )
    return read_json(beside, dict[str, Any])


def _refuse_siglip(state: Mapping[str, Tensor], path: Path) -> None:
    if "logit_bias" in state or any(key.startswith(("vision_model.head.", "visual.trunk.")) for key in state):
        raise GramError(f"{path}: expected a CLIP of OpenAI's architecture, found another (such as SigLIP or timm's)")


_HF_LAYER = re.compile(r"(text|vision)_model\.encoder\.layers\.(\d+)\.(.+)")
_HF_IN_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_HF_OUTSIDE = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "logit_scale": "logit_scale",
}
_HF_OUTSIDE |= {
    f"{theirs}.{leaf}": f"{ours}.{leaf}"
    for leaf in ("weight", "bias")
    for theirs, ours in (
        ("text_model.final_layer_norm", "ln_final"),
        ("vision_model.pre_layrnorm", "visual.ln_pre"),  # transformers' own spelling
        ("vision_model.post_layernorm", "visual.ln_post"),
    )
}
_HF_PROJECTIONS = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}


def from_hugging_face(state: Mapping[str, Tensor], path: PathLike) -> dict[str, Tensor]:
    """Rename the weights of transformers' CLIPModel: q, k, v become one matrix, projections are transposed."""
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        tower, number, rest = layer.groups() if (layer := _HF_LAYER.fullmatch(key)) else ("", "", "")
        block = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{number}"
        module, _, leaf = rest.rpartition(".")
        if key in _EXTRA or module in ("self_attn.k_proj", "self_attn.v_proj"):
            continue
        if key in _HF_OUTSIDE:
            ours[_HF_OUTSIDE[key]] = value
        elif key in _HF_PROJECTIONS:
            ours[_HF_PROJECTIONS[key]] = value.T  # a linear layer's (D, d) -> (d, D)
        elif module in _HF_IN_LAYER:
            ours[f"{block}.{_HF_IN_LAYER[module]}.{leaf}"] = value
        elif module == "self_attn.q_proj":
            names = [key.replace("q_proj", f"{which}_proj") for which in "qkv"]
            lacking = [name for name in names if name not in state]
            if lacking:
                raise GramError(f"{path}: expected {lacking[0]} beside {key}, found none")
            ours[f"{block}.attn.in_proj_{leaf}"] = torch.cat([state[name] for name in names])  # (3 d, d)
        else:
            raise GramError(f"{path}: expected the weights of Hugging Face's CLIPModel, found {key}")
    return ours


def hugging_face_design(config: Mapping[str, Any], path: PathLike, folder: Path | None) -> Design:
    """Return the design that a CLIPModel's config describes; raise `GramError` for another architecture.

    Args:
        folder: where the config of its images may lie.
    """
    kind = config.get("model_type", "clip")
    if kind != "clip":
        raise GramError(f"{path}: expected a Hugging Face model of model_type 'clip', found {kind!r}")
    text, image = (
        _hugging_face_tower({**usual, **(config.get(name) or {})}, name, path)
        for name, usual in (
            ("text_config", {"hidden_size": 512, "num_attention_heads": 8}),
            ("vision_config", {"hidden_size": 768, "num_attention_heads": 12}),
        )
    )
    end = (config.get("text_config") or {}).get("eos_token_id", END)
    if end not in (2, END):  # 2: of older configs, for the token of the highest id
        raise GramError(f"{path}: expected text_config.eos_token_id {END}, of CLIP's tokenizer, found {end}")
    beside = folder / "preprocessor_config.json" if folder else None
    pixels = read_json(beside, dict[str, Any]) if beside and beside.is_file() else {}
    return Design(text, image, *pixel_statistics(pixels.get("image_mean"), pixels.get("image_std"), path))


def _hugging_face_tower(config: Mapping[str, Any], name: str, path: PathLike) -> Tower:
    act, eps = config.get("hidden_act", ACTIVATIONS[0]), config.get("layer_norm_eps", EPS)
    return tower_of(path, name, act, config["hidden_size"], config["num_attention_heads"], eps)


def tower_of(path: PathLike, name: str, activation: str, width: int, heads: int, eps: float) -> Tower:
    """Return a tower's design; raise `GramError` for one that CLIP's builder or the towers' passes do not know."""
    if activation not in ACTIVATIONS:
        raise GramError(f"{path}: expected an activation of {name} of {' or '.join(ACTIVATIONS)}, found {activation}")
    if width % HEAD or heads < 1 or width % heads:
        found = f"{width} with {heads}"
        raise GramError(f"{path}: expected a width of {name} that {HEAD} and its heads divide, found {found}")
    return Tower(activation, width // heads, eps)


def _is_open_clip(file: Path, state: Mapping[str, Tensor]) -> bool:
    """Return whether weights are from open_clip: by their config, by the name of the file, or by names of tensors."""
    own = ("text.", "attn_mask", "visual.ls_", "text_projection.")
    return (
        (file.parent / _OPEN_CLIP[0]).is_file()
        or file.name.startswith("open_clip")
        or any(key.startswith(own) for key in state)
    )


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename open_clip's weights: a custom text tower has the prefix `text.`, and may project by a linear layer."""
    ours = {key.removeprefix("text."): value for key, value in state.items()}
    if "text_projection.weight" in ours and "text_projection.bias" not in ours:
        ours["text_projection"] = ours.pop("text_projection.weight").T
    return {key: value for key, value in ours.items() if key not in _EXTRA}


def _open_clip_design(config: Mapping[str, Any], path: Path) -> Design:
    """Return the design that a config of open_clip describes; raise `GramError` for another architecture."""
    model = config.get("model_cfg", config)
    vision, text = model.get("vision_cfg") or {}, model.get("text_cfg") or {}
    for name, tower, key in (("vision_cfg", vision, "timm_model_name"), ("text_cfg", text, "hf_model_name")):
        if tower.get(key):
            found = f"{name}.{key} {tower[key]!r}"
            if tower is vision:
                found += "; gram_meta.load_backbone takes such a model as an object, for text prompts"
            raise GramError(f"{path}: expected towers of OpenAI's architecture, found {found}")
    width = vision.get("width", 768)
    heads = width // vision.get("head_width", HEAD)
    pixels = config.get("preprocess_cfg") or {}
    is_resnet = isinstance(vision.get("layers"), list)
    if is_resnet and vision.get("head_width", HEAD) != HEAD:
        raise GramError(f"{path}: expected vision_cfg.head_width {HEAD} of a ResNet, found {vision['head_width']}")
    return Design(
        _open_clip_tower(model, "text_cfg", text.get("width", 512), text.get("heads", 8), path),
        Tower() if is_resnet else _open_clip_tower(model, "vision_cfg", width, heads, path),
        *pixel_statistics(pixels.get("mean"), pixels.get("std"), path),
    )


def _open_clip_tower(model: Mapping[str, Any], name: str, width: int, heads: int, path: Path) -> Tower:
    node = model.get(name) or {}
    for key, usual in _OPEN_CLIP_USUAL[name].items():
        if (found := node.get(key, usual)) != usual:
            raise GramError(f"{path}: expected {name}.{key} {usual}, as OpenAI's CLIP has it, found {found}")
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"  # open_clip's own default
    return tower_of(path, name, activation, width, heads, (node.get("norm_kwargs") or {}).get("eps", EPS))


# Settings of open_clip that change the computation but not the shapes of weights
_OPEN_CLIP_USUAL: dict[str, dict[str, Any]] = {
    "vision_cfg": {"pool_type": "tok", "final_ln_after_pool": False, "no_ln_pre": False, "act_kwargs": None},
    "text_cfg": {"pool_type": "argmax", "no_causal_mask": False, "embed_cls": False, "act_kwargs": None},
}


def pixel_statistics(mean: Any, std: Any, path: PathLike) -> list[tuple[float, ...]]:
    """Return the mean and the standard deviation that images are normalised with; None stands for CLIP's."""
    found = []
    for given, usual in ((mean, PIXEL_MEAN), (std, PIXEL_STD)):
        given = usual if given is None else given
        if not isinstance(given, list | tuple) or [isinstance(one, int | float) for one in given] != [True] * 3:
            raise GramError(f"{path}: expected a mean and a standard deviation of three colours, found {given}")
        same = all(abs(a - b) < 1e-4 for a, b in zip(given, usual, strict=True))
        found.append(usual if same else tuple(map(float, given)))
    return found
