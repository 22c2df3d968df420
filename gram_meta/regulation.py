"""Few-shot learning with a frozen regulator ("Testing" in Sec. 3.3), for any torch optimiser.

    regulation = Regulation({"text": prompt}, checkpoint.regulator)
    regulation.attach(optimizer)            # from now on optimizer.step() sees R(g) instead of g

The hook runs at the beginning of `optimizer.step()`: after a grad scaler has unscaled, before momentum and weight decay.
It keeps what tells a regulator that regulates from one that does not: path lengths, variation, norms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gram_meta.regulator import GradientRegulator

FAR = 3.0  # times outside the quantiles of meta-training, from which on a run says so
ENOUGH = 10  # steps to see before saying it


class Regulation:
    """Replaces the gradients of named prompts by R^phi of them, and keeps count of what that does.

    Args:
        prompts: by kind, the parameter of shape (M, d), or (layers, M, d) for deep prompts.
        regulator: R^phi, or None to keep the raw gradients (still counted).
        step_scale: without a regulator, what to multiply the raw gradient with.
        gradient_norms: by kind, quantiles {"q05", "q50", "q95"} of the raw gradient's norm in meta-training.

    Parameters of the optimiser that are not among `prompts` keep their raw gradients.
    """

    def __init__(
        self,
        prompts: Mapping[str, nn.Parameter],
        regulator: GradientRegulator | None = None,
        step_scale: float = 1.0,
        gradient_norms: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        self.prompts = dict(prompts)
        self.regulator = regulator
        self.step_scale = step_scale
        self.gradient_norms = dict(gradient_norms or {})
        self.counts = {kind: _Count(parameter) for kind, parameter in self.prompts.items()}
        self._warned = False

    def attach(self, optimizer: Optimizer) -> Any:
        """Put the hook before the optimiser's step; returns a handle whose `remove()` takes it away."""
        return optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: self.regulate(optimizer))

    @torch.no_grad()
    def regulate(self, optimizer: Optimizer) -> None:
        """g <- R^phi(g) for every prompt that has a gradient."""
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for kind, parameter in self.prompts.items():
            if parameter.grad is None:
                continue
            raw = parameter.grad  # (M, d) or (layers, M, d)
            if self.regulator is None:
                gated, gamma, beta = raw * self.step_scale, None, None
                new = gated
            else:
                parts = self.regulator.parts(kind, raw)
                gated, gamma, beta, new = parts.gated, parts.gamma, parts.beta, parts.regulated
            self.counts[kind].add(raw, gated, gamma, beta, new, rates.get(id(parameter), 0.0))
            parameter.grad = new.to(raw.dtype)
            self._warn(kind)

    def _warn(self, kind: str, enough: int = ENOUGH) -> None:
        """Once per run: the gradients are of another size than those R^phi was learnt on."""
        known, norms = self.gradient_norms.get(kind), self.counts[kind].norms
        if self._warned or self.regulator is None or not known or len(norms) < enough:
            return
        median = _quantile(norms, 0.5)
        if known["q05"] / FAR <= median <= known["q95"] * FAR:
            return
        self._warned = True
        print(
            f"Warning: the {kind} gradient's norm is {median:.3g} here (median of {len(norms)} steps), but was "
            f"{known['q05']:.3g} to {known['q95']:.3g} in meta-training (5 to 95 %): the regulator is used far from "
            "where it was learnt"
        )

    def summary(self) -> dict[str, Any]:
        """What happened so far, by kind, fit for JSON; see `_Count.summary`."""
        return {kind: count.summary() for kind, count in self.counts.items() if count.norms}

    def lines(self) -> list[str]:
        """The summary for the log, at the end of a run."""
        lines = []
        for kind, s in self.summary().items():
            self._warn(kind, enough=1)
            norms = s["gradient_norm"]
            line = f"{kind} gradient norm {norms['q05']:.3g} / {norms['q50']:.3g} / {norms['q95']:.3g} (5, 50, 95 %)"
            line += f", |R(g)|/|g| {s['mean_ratio']:.3g}, path of gamma*g {s['path_gated']:.3g} (net {s['net_gated']:.3g})"
            if "path_beta" in s:
                line += (
                    f", path of beta {s['path_beta']:.3g} (net {s['net_beta']:.3g}), gamma {s['gamma_mean']:.3g} "
                    f"varies by {s['gamma_variation']:.3g}, beta by {s['beta_variation']:.3g} over steps"
                )
            lines.append(line)
        return lines

    def state_dict(self) -> dict[str, Any]:
        """Everything counted, so that a resumed run goes on counting: tensors and plain values."""
        return {kind: count.state() for kind, count in self.counts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for kind, values in state.items():
            if kind in self.counts:
                self.counts[kind].restore(values)


class _Count:
    """Running sums over the steps of one prompt."""

    def __init__(self, parameter: Tensor) -> None:
        # float64: a gamma that varies in its fifth digit is a finding, not rounding
        zero = torch.zeros_like(parameter, dtype=torch.float64, requires_grad=False)
        self.norms: list[float] = []  # |g| per step
        self.ratios: list[float] = []  # |R(g)| / |g|
        self.paths = {"gated": 0.0, "beta": 0.0}  # sum of lr * norm
        self.nets = {"gated": zero.clone(), "beta": zero.clone()}  # sum of lr * value
        self.sums = {"gamma": (zero.clone(), zero.clone()), "beta": (zero.clone(), zero.clone())}  # x, x^2
        self.regulated = False

    def add(
        self, raw: Tensor, gated: Tensor, gamma: Tensor | None, beta: Tensor | None, new: Tensor, rate: float
    ) -> None:
        norm = raw.norm().item()
        self.norms.append(norm)
        self.ratios.append(new.norm().item() / norm if norm > 0 else math.nan)
        self._walk("gated", gated, rate)
        if gamma is None or beta is None:
            return
        self.regulated = True
        self._walk("beta", beta, rate)
        for name, value in (("gamma", gamma), ("beta", beta)):
            first, second = self.sums[name]
            first += value
            second += value.double().square()

    def _walk(self, name: str, value: Tensor, rate: float) -> None:
        self.paths[name] += rate * value.norm().item()
        self.nets[name] += rate * value

    def summary(self) -> dict[str, Any]:
        """
        steps; gradient_norm: quantiles of |g|; mean_ratio: mean of |R(g)| / |g|;
        path_gated, path_beta: sum over steps of lr * norm (before momentum); net_*: norm of the sum of lr * value;
        *_mean: mean over steps and entries; *_variation: root mean square over entries of the deviation over steps.
        """
        ratios = [ratio for ratio in self.ratios if not math.isnan(ratio)]
        result: dict[str, Any] = {
            "steps": len(self.norms),
            "gradient_norm": {f"q{q:02d}": _quantile(self.norms, q / 100) for q in (5, 50, 95)},
            "mean_ratio": sum(ratios) / len(ratios) if ratios else None,
            "path_gated": self.paths["gated"],
            "net_gated": self.nets["gated"].norm().item(),
        }
        if self.regulated:
            result |= {"path_beta": self.paths["beta"], "net_beta": self.nets["beta"].norm().item()}
            for name, (first, second) in self.sums.items():
                mean = first / len(self.norms)
                variance = (second / len(self.norms) - mean.square()).clamp_min(0)
                result[f"{name}_mean"] = mean.mean().item()
                result[f"{name}_variation"] = variance.mean().sqrt().item()
        return result

    def state(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        device = self.nets["gated"].device
        self.norms, self.ratios = list(state["norms"]), list(state["ratios"])
        self.paths, self.regulated = dict(state["paths"]), state["regulated"]
        self.nets = {key: value.to(device) for key, value in state["nets"].items()}
        self.sums = {
            key: (first.to(device), second.to(device)) for key, (first, second) in state["sums"].items()
        }


def _quantile(values: list[float], q: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()
