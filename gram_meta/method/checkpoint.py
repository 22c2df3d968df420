"""The meta-checkpoint: theta* and R^phi* in one .safetensors file, with the facts that loading checks."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from gram_meta.backbone.clip import Backbone, check_name
from gram_meta.engine.checkpoints import check_finite
from gram_meta.errors import GramError, in_one_line
from gram_meta.files import (
    Count,
    ModelFacts,
    Number,
    PathLike,
    atomic_write,
    check_type,
    parse_json,
    sha256_file,
    to_json,
)
from gram_meta.method.regulator import GradientRegulator, RegulatorConfig

Shapes = Mapping[str, Sequence[int]]  # by the tensors' names
FORMAT = 1
_KEY = "gram-meta"  # where the facts stand in the file's metadata, as JSON


class _Regulator(TypedDict):
    widths: dict[str, Count]


class _Facts(TypedDict):
    """The metadata of the file."""

    format: int
    backbone: ModelFacts
    regulator: _Regulator | None
    config: dict[str, Any]
    provenance: dict[str, Any]
    gradient_norms: dict[str, dict[str, Number]]


@dataclass
class MetaCheckpoint:
    """The result of a meta-training, and its settings and inputs."""

    prompts: dict[str, Tensor]  # theta*, float32, (M, d) by kind; deep: (layers, M, d)
    regulator: GradientRegulator | None  # R^phi*, frozen; None if meta-training ran without one
    backbone_name: str  # of the CLIP it belongs to
    backbone_fingerprint: str
    config: dict[str, Any] = field(default_factory=dict)  # all settings of the meta-training
    # the origin of the tasks (store and hierarchy fingerprints, topics, step, held-out scores)
    provenance: dict[str, Any] = field(default_factory=dict)
    # by kind (and kind.1, kind.2, ... for further layers), quantiles of the raw support gradient's norm
    gradient_norms: dict[str, dict[str, float]] = field(default_factory=dict)
    # meta-learned parameters without a regulator, by name (CoCoOp's meta-net, MaPLe's coupling functions)
    extras: dict[str, Tensor] = field(default_factory=dict)
    path: str = ""
    sha256: str = ""  # of the file it was loaded from; "" before it is saved

    @property
    def tokens(self) -> dict[str, int]:
        """M by kind."""
        return {kind: value.shape[-2] for kind, value in self.prompts.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of prompts and extras, by the names that `check_fit` prints."""
        prompts = {f"a {kind} prompt": tuple(value.shape) for kind, value in self.prompts.items()}
        return prompts | {name: tuple(value.shape) for name, value in self.extras.items()}

    def check_name(self, name: str) -> None:
        """Raise a `GramError` for another backbone, by its name and widths, without its weights."""
        widths = {kind: value.shape[-1] for kind, value in self.prompts.items()}
        check_name(self.path or "meta-checkpoint", self.backbone_name, name, widths)

    def check_shallow(self) -> None:
        """Raise a `GramError` for deep prompts, which only trainers of checkouts learn."""
        if any(value.dim() == 3 for value in self.prompts.values()):
            where = "deep ones, with which MaPLeGRAM or PromptSRCGRAM starts in a checkout"
            raise GramError(f"{self.path}: expected prompts at the input alone, found {where}")

    def check(self, backbone: Backbone, tokens: Mapping[str, int], extras: Collection[str] = ()) -> None:
        """Raise a `GramError` for a trainer with another backbone, other prompts, token counts or extras."""
        backbone.check_weights(self.path or "meta-checkpoint", self.backbone_name, self.backbone_fingerprint)
        self._check_shapes(tokens, extras, self.shapes)

    def check_tokens(self, tokens: Mapping[str, int]) -> None:
        """Raise a `GramError` for a trainer with other prompts or token counts; needs no backbone."""
        self._check_shapes(tokens, (), {name: shape for name, shape in self.shapes.items() if name not in self.extras})

    def _check_shapes(self, tokens: Mapping[str, int], extras: Collection[str], held: Shapes) -> None:
        expected = {f"a {kind} prompt": (m, *held.get(f"a {kind} prompt", ())[-1:]) for kind, m in tokens.items()}
        number = "; GRAM defines no other number of tokens than that of the meta-training"
        where = self.path or "meta-checkpoint"
        check_fit(where, expected | {name: held.get(name, ()) for name in extras}, held, number)


def check_fit(where: PathLike, expected: Shapes, found: Shapes, hint: str = "") -> None:
    """Raise a `GramError` unless a file holds tensors of exactly the names and shapes that a trainer learns.

    Args:
        where: the file, as messages call it.
        expected, found: what the trainer learns, and what the file holds.
        hint: end of the message about a shape.
    """
    if set(expected) != set(found):
        names = [", ".join(group) or "nothing" for group in (expected, found)]
        raise GramError(f"{where}: expected {names[0]}, which the trainer learns, found {names[1]}")
    for name, shape in expected.items():
        if tuple(shape) != tuple(found[name]):
            shapes = tuple(shape), tuple(found[name])
            raise GramError(f"{where}: expected {name} of shape {shapes[0]}, found {shapes[1]}{hint}")


def save_meta_checkpoint(path: PathLike, checkpoint: MetaCheckpoint) -> None:
    """Write the checkpoint, atomically."""
    from safetensors.torch import save

    tensors = {f"prompts.{kind}": value for kind, value in checkpoint.prompts.items()}
    tensors |= {f"extras.{name}": value for name, value in checkpoint.extras.items()}
    if checkpoint.regulator is not None:
        tensors |= {f"regulator.{key}": value for key, value in checkpoint.regulator.state_dict().items()}
    facts = {
        "format": FORMAT,
        "backbone": {"name": checkpoint.backbone_name, "fingerprint": checkpoint.backbone_fingerprint},
        "regulator": checkpoint.regulator.describe() if checkpoint.regulator is not None else None,
        "config": checkpoint.config,
        "provenance": checkpoint.provenance,
        "gradient_norms": checkpoint.gradient_norms,
    }
    plain = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in tensors.items()}
    with atomic_write(path) as file:
        file.write(save(plain, metadata={_KEY: to_json(facts, str(path))}))


def shipped() -> dict[str, Path]:
    """Return the meta-checkpoints that come with the package, by name; a card, NAME.md, lies beside each."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "shipped").glob("*.safetensors"))}


def load_meta_checkpoint(path: PathLike) -> MetaCheckpoint:
    """Read a checkpoint, by its path or the name of one in the package (`shipped`), to the CPU; R^phi is frozen.

    Raises `GramError` for no file, another file, or a damaged one.
    """
    if not isinstance(path, str | os.PathLike):
        raise GramError(f"meta-checkpoint: expected a file or a name, found {path!r}")
    path = shipped().get(os.fspath(path), Path(path))
    facts, tensors = read_facts(path, _KEY, "meta-checkpoint", f" or one of {', '.join(shipped())}")
    try:
        check_type(facts, _Facts, "metadata")
        prompts = _group(tensors, "prompts.")
        checkpoint = MetaCheckpoint(
            prompts=prompts,
            regulator=_regulator(facts["regulator"], tensors),
            backbone_name=facts["backbone"]["name"],
            backbone_fingerprint=facts["backbone"]["fingerprint"],
            **{key: facts[key] for key in ("config", "provenance", "gradient_norms")},
            extras=_group(tensors, "extras."),
            path=os.fspath(path),
            sha256=sha256_file(path),
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise GramError(f"{path}: expected a meta-checkpoint, found one with faults ({in_one_line(error)})") from None
    if not prompts or any(value.dim() not in (2, 3) for value in prompts.values()):
        raise GramError(f"{path}: expected prompts of shape (M, d) or (layers, M, d), found others or none")
    check_finite(path, tensors)
    return checkpoint


def read_facts(path: Path, key: str, what: str, others: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the JSON facts under `key` in the metadata of a .safetensors file of this `FORMAT`, and its tensors.

    Raises `GramError` for no file, another file, or one of another format; `what` names the kind of file in messages.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise GramError(f"{path}: expected a {what}{others}, found no such file")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(key, "null")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
    except (OSError, SafetensorError) as error:
        raise GramError(f"{path}: expected a {what} (.safetensors), found another file ({error})") from None
    facts = parse_json(text, str(path))
    if not isinstance(facts, dict):
        raise GramError(f"{path}: expected a {what}, found a .safetensors file of something else")
    if facts.get("format") != FORMAT:
        raise GramError(f"{path}: expected {what} format {FORMAT}, found {facts.get('format')}")
    return facts, tensors


def _regulator(description: dict[str, Any] | None, tensors: Mapping[str, Tensor]) -> GradientRegulator | None:
    if description is None:
        return None
    settings = dict(description)
    regulator = GradientRegulator(settings.pop("widths"), RegulatorConfig(**settings))
    regulator.load_state_dict(_group(tensors, "regulator."))
    return regulator.requires_grad_(False).eval()


def _group(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
