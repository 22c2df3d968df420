"""The gradient regulator R^phi (Eq. 5, 6): a small affine gate that regulates the gradient of a prompt.

    gamma = tanh(g W_gamma^T + b_gamma)        beta = tanh(g W_beta^T + b_beta)        R(g) = gamma * g + beta

for a gradient g of shape (M, d), per kind of prompt. W is (d, d) and b is (d,), shared by the M tokens, so one
regulator serves any number of tokens. The form is sensitive to the gradient's scale: beta is added to whatever size g
has, and a large g saturates tanh. `RegulatorConfig` holds the switches for that; the defaults are the paper's form,
started at a constant gate (W = 0, b_beta = 0, gamma = 0.9): near plain gradient descent, with slope to learn from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from gram_meta.config import META_BOUNDS, check_bounds
from gram_meta.errors import GramError

_TINY = 1e-24  # added to a mean square: a gradient of exactly zero stays zero under normalisation


@dataclass(frozen=True)
class RegulatorConfig:
    """Form and start of R^phi."""

    start: str = "gate"  # `gate` (W = 0, b_beta = 0, constant gamma) or `random` (Algorithm 1, line 1)
    gamma: float = 0.9  # the constant of a `gate` start, in (-1, 1)
    input: str = "raw"  # `raw` (g, Eq. 5) or `normalised` (g / rms(g), so that tanh sees entries of size 1)
    # `absolute` (Eq. 6), `relative` (beta * rms(g), which vanishes where the gradient does) or `none`
    beta: str = "absolute"

    @classmethod
    def from_config(cls, config: CfgNode) -> RegulatorConfig:
        """Read the REGULATOR node."""
        node = config.REGULATOR
        return cls(node.START, node.GAMMA, node.INPUT, node.BETA)

    def __post_init__(self) -> None:
        check_bounds({"REGULATOR": {key.upper(): value for key, value in vars(self).items()}}, META_BOUNDS)


class GradientRegulator(nn.Module):
    """R^phi for one or several kinds of prompt, whose widths d are given: `{"text": 512, "visual": 768}`."""

    def __init__(
        self, widths: Mapping[str, int], config: RegulatorConfig | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.config = config or RegulatorConfig()
        self.widths = dict(widths)
        self.gates = nn.ModuleDict({kind: _Gate(d, self.config, generator) for kind, d in self.widths.items()})

    def forward(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the regulated gradients, (..., M, d) by kind as given; leading axes are tasks or layers."""
        return {kind: self.parts(kind, gradient).regulated for kind, gradient in gradients.items()}

    def parts(self, kind: str, gradient: Tensor) -> RegulatedGradient:
        """Return gamma, beta (already scaled) and their use on one kind's gradient, for analysis."""
        if kind not in self.gates:
            raise GramError(f"regulator: expected a gradient of {' or '.join(self.widths)} prompts, found {kind!r}")
        if (width := gradient.shape[-1]) != self.widths[kind]:
            raise GramError(f"regulator: expected {kind} gradients of width {self.widths[kind]}, found {width}")
        return self.gates[kind](gradient)

    def regulate_known(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the regulated gradients of the kinds that this regulator has, and leave out the others."""
        return self({kind: gradient for kind, gradient in gradients.items() if kind in self.gates})

    def describe(self) -> dict[str, Any]:
        """Return what is needed to build it again, as JSON values."""
        return {"widths": self.widths, **asdict(self.config)}


@dataclass
class RegulatedGradient:
    """The pieces of Eq. 6, each (..., M, d): `regulated = gated + beta` with `gated = gamma * g`."""

    gamma: Tensor
    beta: Tensor
    gated: Tensor

    @property
    def regulated(self) -> Tensor:
        return self.gated + self.beta


class _Gate(nn.Module):
    """Eq. 5 and 6 for one kind of prompt."""

    def __init__(self, width: int, config: RegulatorConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        self.config = config
        self.weight_gamma = nn.Parameter(torch.zeros(width, width))
        self.bias_gamma = nn.Parameter(torch.full((width,), math.atanh(config.gamma)))
        self.weight_beta = nn.Parameter(torch.zeros(width, width))
        self.bias_beta = nn.Parameter(torch.zeros(width))
        if config.start == "random":
            bound = width**-0.5  # as torch draws a linear layer
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
        if config.beta == "none":  # not part of the function, so not learned
            self.weight_beta.requires_grad_(False).zero_()
            self.bias_beta.requires_grad_(False).zero_()

    def forward(self, g: Tensor) -> RegulatedGradient:
        normalised, relative = self.config.input == "normalised", self.config.beta == "relative"
        if normalised or relative:
            rms = g.square().mean(dim=(-2, -1), keepdim=True).add(_TINY).sqrt()  # (..., 1, 1), over M and d
        x = g / rms if normalised else g  # (..., M, d)
        gamma = torch.tanh(x @ self.weight_gamma.T + self.bias_gamma)
        beta = torch.tanh(x @ self.weight_beta.T + self.bias_beta)
        if relative:
            beta = beta * rms
        return RegulatedGradient(gamma, beta, gamma * g)
