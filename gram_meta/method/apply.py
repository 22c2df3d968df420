"""GRAM in few-shot learning ("Testing" in Sec. 3.3): start from theta*, pass every gradient through the frozen R^phi*.

With any torch optimiser:

    meta = load_meta_checkpoint("best.safetensors")
    start_from(meta, {"text": prompt})                   # prompt <- theta*
    regulation = Regulation({"text": prompt}, meta.regulator)
    regulation.attach(optimizer)                         # from now on optimizer.step() sees R(g) instead of g

The hook runs at the beginning of `optimizer.step()`: after a grad scaler has unscaled, before momentum and weight decay.
It keeps what tells a regulator that regulates from one that does not: path lengths, variation, norms.
`gram_meta.method.dassl` does both in a Dassl trainer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gram_meta.errors import GramError
from gram_meta.method.checkpoint import MetaCheckpoint, check_fit
from gram_meta.method.regulator import GradientRegulator

# By kind ("text", "visual"): one parameter (M, d), one of all layers (layers, M, d), or a parameter for each layer
Prompts = Mapping[str, Tensor | Iterable[Tensor]]

FAR = 3.0  # times outside the quantiles of meta-training, from which on a run says so
ENOUGH = 10  # steps to see before saying it while training goes on


class Regulation:
    """Replaces the gradients of named prompts by R^phi of them, and keeps count of what that does.

    Args:
        prompts: by kind, the parameter of shape (M, d), one of shape (layers, M, d), or an iterable with a parameter
            for each layer. Every layer is regulated, each for itself.
        regulator: R^phi, or None to keep the raw gradients (still counted).
        step_scale: without a regulator, what to multiply the raw gradient with.
        gradient_norms: by kind, quantiles {"q05", "q50", "q95"} of the raw gradient's norm in meta-training.

    Attributes:
        prompts: the regulated parameters by name: "text", and "text.1", "text.2", ... for further ones of a list.
        counts: what happened, by the same names.

    Parameters of the optimiser that are not among `prompts` keep their raw gradients (see `raw_parameters`). A prompt
    of 16 bits is regulated in float32 and its gradient is cast back; it loses small steps, and a line says so.

    Raises:
        GramError: a kind or a width that the regulator does not know, or something that is no prompt.
    """

    def __init__(
        self,
        prompts: Prompts,
        regulator: GradientRegulator | None = None,
        step_scale: float = 1.0,
        gradient_norms: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        self.prompts = _named(prompts)
        self.regulator = regulator
        self.step_scale = step_scale
        self.gradient_norms = dict(gradient_norms or {})
        if regulator is not None:
            self._check_widths(regulator)
        self.counts = {name: _Count(parameter) for name, parameter in self.prompts.items()}
        self._warned = False
        self._warn_of_16_bits()

    def attach(self, *optimizers: Optimizer) -> list[Any]:
        """Put the hook before the optimisers' steps; returns handles whose `remove()` takes them away.

        Raises:
            GramError: a prompt that none of the optimisers holds.
        """
        held = {id(parameter) for optimizer in optimizers for parameter in _parameters(optimizer)}
        for name, parameter in self.prompts.items():
            if id(parameter) not in held:
                raise GramError(f"the {name} prompt: expected an optimiser that holds it, found it in none")
        return [optimizer.register_step_pre_hook(self._before_step) for optimizer in optimizers]

    def raw_parameters(self, module: nn.Module, *optimizers: Optimizer) -> list[str]:
        """Names of the parameters of `module` that the optimisers step with raw gradients, as R^phi does not know them."""
        known = {id(parameter) for parameter in self.prompts.values()}
        stepped = {id(p) for optimizer in optimizers for p in _parameters(optimizer) if p.requires_grad}
        return [name for name, p in module.named_parameters() if id(p) in stepped - known]

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("closure") is not None or any(callable(argument) for argument in args):
            raise GramError(
                "optimizer.step(closure): gradients that the closure computes inside the step cannot be regulated; "
                "call backward() before step()"
            )
        if getattr(optimizer, "grad_scale", None) is not None:
            raise GramError(
                "a fused optimiser unscales gradients inside its step, where they cannot be regulated; call "
                "scaler.unscale_(optimizer) before scaler.step(optimizer), or build it with fused=False"
            )
        self.regulate(optimizer)

    @torch.no_grad()
    def regulate(self, optimizer: Optimizer) -> None:
        """g <- R^phi(g) for every prompt in this optimiser that has a gradient."""
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in self.prompts.items():
            if parameter.grad is None or id(parameter) not in rates:
                continue
            raw = parameter.grad.to(self._dtype(parameter.grad))  # (M, d) or (layers, M, d)
            if self.regulator is None:
                gated, gamma, beta = raw * self.step_scale, None, None
                new = gated
            else:
                parts = self.regulator.parts(_kind(name), raw)
                gated, gamma, beta, new = parts.gated, parts.gamma, parts.beta, parts.regulated
            self.counts[name].add(raw, gated, gamma, beta, new, float(rates[id(parameter)]))
            parameter.grad = new.to(parameter.grad.dtype)
            # After 10, 20, 40, ... steps: the median of all norms at each of 160,000 steps would cost more than they do
            times, rest = divmod(len(self.counts[name].norms), ENOUGH)
            if not rest and times.bit_count() == 1:
                self._warn(name)

    def _dtype(self, gradient: Tensor) -> torch.dtype:
        """What to calculate in: the regulator's number type; without one, at least float32."""
        if self.regulator is None:
            return torch.promote_types(gradient.dtype, torch.float32)
        return next(self.regulator.parameters()).dtype

    def _check_widths(self, regulator: GradientRegulator) -> None:
        for name, parameter in self.prompts.items():
            kind, width = _kind(name), parameter.shape[-1]
            if kind not in regulator.widths:
                known = " and ".join(regulator.widths)
                raise GramError(f"regulator: was learned for {known} prompts, but is to regulate {kind!r}")
            if width != regulator.widths[kind]:
                raise GramError(
                    f"regulator: was learned for {kind} prompts of width {regulator.widths[kind]}, but the {name} "
                    f"prompt has width {width}"
                )

    def _warn_of_16_bits(self) -> None:
        for name, parameter in self.prompts.items():
            if parameter.dtype.itemsize < 4:
                size = parameter.detach().float().square().mean().sqrt().item()
                print(
                    f"Warning: the {name} prompt is {str(parameter.dtype).removeprefix('torch.')}: at its size of "
                    f"{size:.2g} it loses steps below about {torch.finfo(parameter.dtype).eps * size / 2:.1g}; a "
                    "float32 prompt, cast at the tower's input, keeps them"
                )
                return

    def _warn(self, name: str) -> None:
        """Once per run: the gradients are of another size than those R^phi was learned on."""
        known, norms = self.gradient_norms.get(_kind(name)), self.counts[name].norms
        if self._warned or self.regulator is None or not known:
            return
        median = _quantile(norms, 0.5)
        if known["q05"] / FAR <= median <= known["q95"] * FAR:
            return
        self._warned = True
        print(
            f"Warning: the {name} gradient's norm is {median:.3g} here (median of {len(norms)} steps), but was "
            f"{known['q05']:.3g} to {known['q95']:.3g} in meta-training (5 to 95 %): the regulator is used far from "
            "where it was learned"
        )

    def summary(self) -> dict[str, Any]:
        """What happened so far, by the prompts' names, fit for JSON; see `_Count.summary`."""
        return {name: count.summary() for name, count in self.counts.items() if count.norms}

    def lines(self) -> list[str]:
        """The summary for the log, at the end of a run."""
        lines = []
        for name, s in self.summary().items():
            self._warn(name)
            norms = s["gradient_norm"]
            line = f"{name} gradient norm {norms['q05']:.3g} / {norms['q50']:.3g} / {norms['q95']:.3g} (5, 50, 95 %)"
            if s["mean_ratio"] is not None:  # else every gradient was zero
                line += f", |R(g)|/|g| {s['mean_ratio']:.3g}"
            line += f", path of gamma*g {s['path_gated']:.3g} (net {s['net_gated']:.3g})"
            if "path_beta" in s:
                line += (
                    f", path of beta {s['path_beta']:.3g} (net {s['net_beta']:.3g}), gamma {s['gamma_mean']:.3g} "
                    f"varies by {s['gamma_variation']:.3g}, beta by {s['beta_variation']:.3g} over steps"
                )
            lines.append(line)
        return lines

    def state_dict(self) -> dict[str, Any]:
        """Everything counted, so that a resumed run goes on counting: tensors and plain values."""
        return {name: count.state() for name, count in self.counts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, values in state.items():
            if name in self.counts:
                self.counts[name].restore(values)


def start_from(checkpoint: MetaCheckpoint, prompts: Prompts, extras: Mapping[str, Tensor] | None = None) -> None:
    """Write theta* into prompts, and into parameters that were meta-learned with them. Data changes, parameters stay.

    Of a deep prompt the first layer takes theta*; the others keep their own start, as theta* has one layer.

    Args:
        checkpoint: holds theta* of exactly these kinds.
        prompts: as for `Regulation`.
        extras: parameters by the names they have in `checkpoint.extras`.

    Raises:
        GramError: kinds, token counts, widths or extras that differ from the checkpoint's; nothing is written then.
    """
    named, given = _named(prompts), dict(extras or {})
    first = {kind: named[kind] if named[kind].dim() == 2 else named[kind][0] for kind in prompts}  # (M, d) by kind
    learned = {f"a {kind} prompt": tuple(value.shape) for kind, value in first.items()}
    learned |= {name: tuple(value.shape) for name, value in given.items()}
    check_fit(checkpoint.path or "meta-checkpoint", learned, checkpoint.shapes)
    with torch.no_grad():
        for name, value in {**checkpoint.prompts, **checkpoint.extras}.items():
            {**first, **given}[name].copy_(value)


def _named(prompts: Prompts) -> dict[str, Tensor]:
    """One name for each parameter: the kind, then kind.1, kind.2, ... for the further ones of a list."""
    named: dict[str, Tensor] = {}
    for kind, value in prompts.items():
        parameters = [value] if isinstance(value, Tensor) else list(value)
        for index, parameter in enumerate(parameters):
            named[f"{kind}.{index}" if index else kind] = parameter
    for name, parameter in named.items():
        if not isinstance(parameter, Tensor):
            raise GramError(f"the {name} prompt: expected a parameter, found {type(parameter).__name__}")
        if not (parameter.is_leaf and parameter.requires_grad) or parameter.dim() not in (2, 3):
            found = f"shape {tuple(parameter.shape)}, " + ("learned" if parameter.requires_grad else "frozen")
            raise GramError(
                f"the {name} prompt: expected a learned parameter of shape (M, d) or (layers, M, d), found {found}"
            )
    if not named or len({id(parameter) for parameter in named.values()}) < len(named):
        raise GramError("prompts: expected parameters by kind, each of them once, found none or one twice")
    return named


def _kind(name: str) -> str:
    return name.partition(".")[0]


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


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
        self.sums = {key: (first.to(device), second.to(device)) for key, (first, second) in state["sums"].items()}


def _quantile(values: list[float], q: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()
