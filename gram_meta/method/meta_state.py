"""The state of a meta-training: theta and phi, their optimiser, and records of the steps."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from yacs.config import CfgNode

from gram_meta.backbone.clip import Backbone
from gram_meta.config import as_dict
from gram_meta.method.checkpoint import MetaCheckpoint
from gram_meta.method.episodes import initial_theta
from gram_meta.method.outer import OuterLoop
from gram_meta.method.prompts import KINDS, PromptConfig, hold_size
from gram_meta.method.regulator import GradientRegulator, RegulatorConfig


class MetaState:
    """Theta, phi and their optimiser, at the initialisation of meta-training.

    Args:
        backbone: frozen CLIP.
        config: settings of the run.
        outer: those of the outer loop.

    Attributes:
        theta: prompts, and a meta-net's weights, by name.
        kinds: the names of the prompts in theta; R^phi does not regulate the rest.
        layers: the names of their layers, as `Regulation.prompts` has them: the kind, and kind.1, kind.2, ... if deep.
        regulator: R^phi; None without one.
        norms: of the raw support gradients, (inner steps * B, layers) for each step.
        best: the best scores on the held-out tasks, and their step.
    """

    def __init__(self, backbone: Backbone, config: CfgNode, outer: OuterLoop) -> None:
        self.backbone, self.config = backbone, config
        prompt = PromptConfig.from_config(config)
        self.visual_size = prompt.visual_size
        self.theta = initial_theta(backbone, prompt, config.SEED)
        self._hold_size()
        self.kinds = sorted(set(self.theta) & set(KINDS))
        counts = {kind: len(value) if (value := self.theta[kind]).dim() == 3 else 1 for kind in self.kinds}
        self.layers = [f"{kind}.{layer}" if layer else kind for kind in self.kinds for layer in range(counts[kind])]
        self.regulator = self._initial_regulator() if config.REGULATOR.ENABLED and outer.meta else None
        self.optimiser = outer.build_optimiser(self.theta, self.regulator)
        self.norms: list[Tensor] = []
        self.best: dict[str, float] = {}

    def _initial_regulator(self) -> GradientRegulator:
        widths = {kind: self.theta[kind].shape[-1] for kind in self.kinds}
        generator = torch.Generator().manual_seed(self.config.SEED)
        number = self.backbone.logit_scale.dtype  # float32; float64 with fp64 towers
        form = RegulatorConfig.from_config(self.config)
        return GradientRegulator(widths, form, generator).to(self.backbone.device, number)

    def update(self, outer: OuterLoop, step: int) -> None:
        """Take step number `step` of the outer loop along the gradients in `.grad`."""
        outer.update(self.optimiser, step)
        self._hold_size()

    def _hold_size(self) -> None:
        if self.visual_size and "visual" in self.theta:
            hold_size(self.theta["visual"], self.visual_size)

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return what a resumed run needs after a step: tensors and plain values."""
        return {
            "step": step,
            "theta": {kind: value.detach() for kind, value in self.theta.items()},
            "regulator": self.regulator.state_dict() if self.regulator is not None else {},
            "optimiser": self.optimiser.state_dict(),
            "norms": torch.cat(self.norms) if self.norms else torch.empty(0, len(self.layers)),
            "best": self.best,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> int:
        """Restore what `state_dict` returned, and return its step."""
        with torch.no_grad():
            for kind, value in self.theta.items():
                value.copy_(state["theta"][kind])
        if self.regulator is not None:
            self.regulator.load_state_dict(state["regulator"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.norms = [state["norms"]] if len(state["norms"]) else []
        self.best = state["best"]
        return int(state["step"])

    def checkpoint(self, provenance: Mapping[str, Any]) -> MetaCheckpoint:
        """Return theta and phi as a meta-checkpoint of this provenance."""
        norms = torch.cat(self.norms) if self.norms else torch.empty(0, 0)  # (tasks so far, layers)
        return MetaCheckpoint(
            prompts={kind: self.theta[kind] for kind in self.kinds},
            extras={name: value for name, value in self.theta.items() if name not in self.kinds},
            regulator=self.regulator,
            backbone_name=self.backbone.name,
            backbone_fingerprint=self.backbone.fingerprint,
            config=as_dict(self.config),
            provenance=dict(provenance),
            gradient_norms={
                layer: {f"q{q:02d}": column.quantile(q / 100).item() for q in (5, 25, 50, 75, 95)}
                for layer, column in zip(self.layers, norms.unbind(dim=1), strict=False)
            },
        )
