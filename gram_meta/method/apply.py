"""GRAM in few-shot learning ("Testing" in Sec. 3.3): start from theta*, pass every gradient through the frozen R^phi*.

`start_from` copies theta* into prompts. After `Regulation(prompts, meta.regulator).attach(optimizer)`, with any torch
optimiser, `optimizer.step()` sees R(g) instead of g. The hook runs at the beginning of `optimizer.step()`: after a grad
scaler has unscaled, before momentum and weight decay. It records path lengths, variation and norms, which show whether
a regulator changes the gradients. `gram_meta.method.dassl` does both in a Dassl trainer.
"""

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gram_meta.errors import GramError
from gram_meta.method.checkpoint import MetaCheckpoint, check_fit
from gram_meta.method.regulator import GradientRegulator, RegulatedGradient

# By kind ("text", "visual"): one parameter (M, d), one of all layers (layers, M, d), or a parameter for each layer
Prompts = Mapping[str, Tensor | Iterable[Tensor]]

FAR = 3.0  # factor outside the quantiles of meta-training from which on a warning is printed
ENOUGH = 10  # steps before the first such warning
POINTS = 40  # of statistics over steps, at most


class Regulation:
    """Replaces the gradients of named prompts by R^phi of them, and records statistics.

    Other parameters of the optimiser keep their raw gradients (see `raw_parameters`). A prompt of 16 bits is regulated
    in float32 and its gradient is cast back; it loses small steps, and a warning is printed.

    Args:
        prompts: by kind, the parameter of shape (M, d), one of shape (layers, M, d), or an iterable with a parameter
            for each layer. Each layer is regulated separately.
        regulator: R^phi; None keeps the raw gradients, and records them.
        step_scale: factor of the raw gradient if there is no regulator.
        gradient_norms: quantiles {"q05", "q50", "q95"} of the raw gradient's norm in meta-training, by the names of
            `prompts`; those of the kind hold for a layer that meta-training did not have.

    Attributes:
        prompts: the regulated parameters by name: "text", and "text.1", "text.2", ... for further ones of a list.
        counts: statistics by the same names.

    Raises:
        GramError: a kind or a width that the regulator does not know, or a value that is no learned prompt.
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
        for name, parameter in self.prompts.items():
            if parameter.dtype.itemsize < 4:
                _warn_of_16_bits(name, parameter)
                break

    def attach(self, *optimizers: Optimizer) -> list[Any]:
        """Register the hook before the optimisers' steps, and return handles whose `remove()` removes it.

        Raises `GramError` for a prompt that none of the optimisers holds.
        """
        held = {id(parameter) for optimizer in optimizers for parameter in _parameters(optimizer)}
        for name, parameter in self.prompts.items():
            if id(parameter) not in held:
                raise GramError(f"the {name} prompt: expected an optimiser that holds it, found it in none")
        return [optimizer.register_step_pre_hook(self._before_step) for optimizer in optimizers]

    def raw_parameters(self, module: nn.Module, *optimizers: Optimizer) -> list[str]:
        """Return the names of the parameters of `module` that the optimisers step with raw gradients."""
        known = {id(parameter) for parameter in self.prompts.values()}
        stepped = {id(p) for optimizer in optimizers for p in _parameters(optimizer) if p.requires_grad}
        return [name for name, p in module.named_parameters() if id(p) in stepped - known]

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("closure") is not None or any(callable(argument) for argument in args):
            raise GramError("optimizer.step(closure): expected no closure, found one; call backward() before step()")
        if getattr(optimizer, "grad_scale", None) is not None:
            raise GramError(
                "a fused optimiser unscales gradients inside its step, where they cannot be regulated; call "
                "scaler.unscale_(optimizer) before scaler.step(optimizer), or build it with fused=False"
            )
        self.regulate(optimizer)

    @torch.no_grad()
    def regulate(self, optimizer: Optimizer) -> None:
        """Replace g by R^phi(g) for every prompt in this optimiser that has a gradient."""
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in self.prompts.items():
            if parameter.grad is None or id(parameter) not in rates:
                continue
            count, parts = self.counts[name], None
            if self.regulator is None:
                raw = parameter.grad.to(torch.promote_types(parameter.grad.dtype, torch.float32))
                new = raw * self.step_scale
            else:
                raw = parameter.grad.to(next(self.regulator.parameters()).dtype)  # (M, d) or (layers, M, d)
                parts = self.regulator.parts(_kind(name), raw)
                new = parts.regulated
            count.add(raw, new, parts, float(rates[id(parameter)]))
            parameter.grad = new.to(parameter.grad.dtype)
            # After 10, 20, 40, ... steps only, as the median of all norms takes longer than a step
            times, rest = divmod(count.steps, ENOUGH)
            if not rest and times.bit_count() == 1:
                self._warn(name)

    def _check_widths(self, regulator: GradientRegulator) -> None:
        for name, parameter in self.prompts.items():
            kind, width = _kind(name), parameter.shape[-1]
            if kind not in regulator.widths:
                known = " and ".join(regulator.widths)
                raise GramError(f"regulator: was learned for {known} prompts, but is to regulate {kind!r}")
            if width != regulator.widths[kind]:
                learned = f"{kind} prompts of width {regulator.widths[kind]}"
                raise GramError(f"regulator: was learned for {learned}, but the {name} prompt has width {width}")

    def _warn(self, name: str) -> None:
        """Print a warning, once, if the gradients are of another size than those R^phi was learned on."""
        known, norms = self.gradient_norms.get(name, self.gradient_norms.get(_kind(name))), self.counts[name].norms
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
        """Return statistics of the steps so far, as JSON values, by the prompts' names.

        steps; gradient_norm: quantiles of |g|; mean_ratio: mean of |R(g)| / |g|;
        path_gated, path_beta: sum over steps of lr * norm (before momentum); net_*: norm of the sum of lr * value;
        *_mean: mean over steps and entries; *_variation: root mean square over entries of the deviation over steps;
        over_steps: means over at most `POINTS` equal parts of the steps, by the last step of each: |g|, |R(g)| / |g|,
        root mean square of gamma, |beta|; None where a part has no such value.
        """
        return {name: count.summary() for name, count in self.counts.items() if count.steps}

    def lines(self) -> list[str]:
        """Return the summary as lines for the log."""
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
        """Return all statistics, for a resumed run: tensors and plain values."""
        return {name: count.state() for name, count in self.counts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, values in state.items():
            if name in self.counts:
                self.counts[name].restore(values)


def regulate(optimizer: Optimizer, prompts: Prompts, meta: MetaCheckpoint) -> Regulation:
    """Let `optimizer.step()` see R^phi(g) instead of the gradient g of each prompt (Sec. 3.3, "Testing").

    Args:
        optimizer: any torch optimiser that holds the prompts.
        prompts: by kind, such as `PromptedCLIP.prompts()`.
        meta: a meta-checkpoint; without a regulator in it the gradients stay raw and are counted.

    Returns:
        The regulation; `summary()` says what it has done so far.
    """
    regulation = Regulation(prompts, meta.regulator, gradient_norms=meta.gradient_norms)
    if meta.regulator is not None:
        meta.regulator.to(next(iter(regulation.prompts.values())).device)
    regulation.attach(optimizer)
    return regulation


def start_from(checkpoint: MetaCheckpoint, prompts: Prompts, extras: Prompts | None = None) -> None:
    """Copy theta* into prompts, and into parameters that were meta-learned with them.

    Of a deep prompt every layer takes its own of theta*. Where theta* has one layer, the first layer alone takes it and
    the others keep their initialisation.

    Args:
        checkpoint: holds theta* of exactly these kinds.
        prompts: as for `Regulation`.
        extras: parameters by their names in `checkpoint.extras`, one for each or one for each layer.

    Raises:
        GramError: kinds, layers, token counts, widths or extras that differ from the checkpoint's. No prompt is changed
            then.
    """
    values = {**prompts, **(extras or {})}
    given = {name: value if isinstance(value, Tensor) else list(value) for name, value in values.items()}
    _named({kind: given[kind] for kind in prompts})  # refuses what is no prompt
    for kind in set(prompts) & set(checkpoint.prompts):
        if checkpoint.prompts[kind].dim() == 2 and len(_shape(given[kind])) != 2:
            given[kind] = given[kind][0]
    learned = {f"a {name} prompt" if name in prompts else name: _shape(value) for name, value in given.items()}
    check_fit(checkpoint.path or "meta-checkpoint", learned, checkpoint.shapes)
    with torch.no_grad():
        for name, value in {**checkpoint.prompts, **checkpoint.extras}.items():
            for target, source in zip(given[name], value, strict=True):  # layers, or rows
                target.copy_(source)


def _shape(value: Tensor | list[Tensor]) -> tuple[int, ...]:
    """Return the shape of a parameter, or of the parameters of all layers together; (layers,) if theirs differ."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    shapes = {tuple(layer.shape) for layer in value}
    return (len(value), *(shapes.pop() if len(shapes) == 1 else ()))


def _named(prompts: Prompts) -> dict[str, Tensor]:
    """Return the parameters by name: the kind, then kind.1, kind.2, ... for the further ones of a list."""
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


def _warn_of_16_bits(name: str, prompt: Tensor) -> None:
    size = prompt.detach().float().square().mean().sqrt().item()
    print(
        f"Warning: the {name} prompt is {str(prompt.dtype).removeprefix('torch.')}: at its size of {size:.2g} it loses "
        f"steps below about {torch.finfo(prompt.dtype).eps * size / 2:.1g}; a float32 prompt, cast at the tower's "
        "input, keeps them"
    )


def _kind(name: str) -> str:
    return name.partition(".")[0]


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class _Count:
    """Sums over the steps of one prompt. Norms stay on the device until `norms` or `summary` needs them."""

    def __init__(self, parameter: Tensor) -> None:
        # Sums of lr * gated, lr * beta, gamma, beta, gamma^2, beta^2; gamma may vary in its fifth digit
        self.totals = torch.zeros(6, *parameter.shape, dtype=torch.float64, device=parameter.device)
        self.nets = {"gated": self.totals[0], "beta": self.totals[1]}  # sum of lr * value
        self.sums = {name: (self.totals[2 + i], self.totals[4 + i]) for i, name in enumerate(("gamma", "beta"))}
        self._norms: list[float] = []  # |g| per step
        self.ratios: list[float] = []  # |R(g)| / |g|
        self.gammas: list[float] = []  # root mean square of gamma
        self.betas: list[float] = []  # |beta|
        self.paths = {"gated": 0.0, "beta": 0.0}  # sum of lr * norm
        self._unread: list[tuple[Tensor, float]] = []  # norms of g, R(g), gated, beta, gamma (5,) or (2,), and lr
        self.regulated = False

    @property
    def steps(self) -> int:
        return len(self._norms) + len(self._unread)

    @property
    def norms(self) -> list[float]:
        """|g| of every step so far."""
        self._read()
        return self._norms

    def add(self, raw: Tensor, new: Tensor, parts: RegulatedGradient | None, rate: float) -> None:
        """Add a step: its raw gradient, the gradient that replaces it, and the pieces of Eq. 6 where R^phi is used."""
        if parts is None:
            norms = torch._foreach_norm([raw, new])
            self.nets["gated"] += rate * new
        else:
            self.regulated = True
            walks = [parts.gated, parts.beta]
            norms = torch._foreach_norm([raw, new, *walks, parts.gamma])
            seen = torch.stack([*torch._foreach_mul(walks, rate), parts.gamma, parts.beta]).double()
            self.totals += torch.cat([seen, seen[2:].square()])
        self._unread.append((torch.stack(norms), rate))
        if len(self._unread) == 100:
            self._read()

    def _read(self) -> None:
        """Read the norms of all steps since the last call at once, as reading makes a GPU wait."""
        unread, self._unread = self._unread, []
        norms = torch.stack([norms for norms, _ in unread]).tolist() if unread else []
        for (norm, new, *parts), (_, rate) in zip(norms, unread, strict=True):
            self._norms.append(norm)
            self.ratios.append(new / norm if norm > 0 else math.nan)
            for name, walk in zip(self.paths, parts or [new], strict=False):
                self.paths[name] += rate * walk
            if parts:
                self.betas.append(parts[1])
                self.gammas.append(parts[2] / math.sqrt(self.totals[0].numel()))

    def summary(self) -> dict[str, Any]:
        """Return the statistics; see `Regulation.summary`."""
        self._read()
        result: dict[str, Any] = {
            "steps": len(self.norms),
            "gradient_norm": {f"q{q:02d}": _quantile(self.norms, q / 100) for q in (5, 50, 95)},
            "mean_ratio": _means(self.ratios, [self.steps])[0],
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
        size = -(-self.steps // POINTS)
        ends = [*range(size, self.steps, size), self.steps]
        columns = {"gradient_norm": self.norms, "ratio": self.ratios, "gamma": self.gammas, "beta": self.betas}
        means = {key: _means(values, ends) for key, values in columns.items() if values}
        return result | {"over_steps": {"step": ends, **means}}

    def state(self) -> dict[str, Any]:
        names = ("norms", "ratios", "gammas", "betas", "paths", "nets", "sums", "regulated")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: Mapping[str, Any]) -> None:
        unknown = [math.nan] * len(state["norms"])  # to earlier versions
        self._norms, self.ratios, self._unread = list(state["norms"]), list(state["ratios"]), []
        self.gammas, self.betas = (list(state.get(name, unknown)) for name in ("gammas", "betas"))
        self.paths, self.regulated = dict(state["paths"]), state["regulated"]
        firsts, seconds = zip(*(state["sums"][name] for name in self.sums), strict=True)
        self.totals.copy_(torch.stack([*(state["nets"][name] for name in self.nets), *firsts, *seconds]))


def _means(values: list[float], ends: list[int]) -> list[float | None]:
    """Return the mean of each part of `values` up to the next of `ends`, without NaN; None for a part of NaN alone."""
    parts = [torch.tensor(values[a:b], dtype=torch.float64) for a, b in pairwise([0, *ends])]
    return [None if part.isnan().all() else part.nanmean().item() for part in parts]


def _quantile(values: list[float], q: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()
