"""Where the time of a meta-training step goes: the towers, the regulator, the optimiser, waiting, and the rest.

A tower's backward pass, and the second one of exact second order, run inside autograd. So the prompt that enters a
tower and the features that leave it pass through identities. These record the time when values pass, when gradients
pass, and when gradients of gradients pass; the time between the two identities belongs to the tower. Autograd runs the
nodes of one tower in a row, as it takes the youngest first. The identities change no number.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gram_meta.files import write_json
from gram_meta.method.meta_files import PROFILE
from gram_meta.method.meta_trainer import EXCHANGE, OPTIMISER, MetaTrainer

IMAGE_TOWER, TEXT_TOWER, REGULATOR = "image tower", "text tower", "regulator"
WAITING, EVALUATION = "waiting for images", "held-out tasks"
OTHER = "loss and the rest"
TOWERS = (IMAGE_TOWER, TEXT_TOWER)
ORDER = (*TOWERS, REGULATOR, OTHER, OPTIMISER, EXCHANGE, WAITING, EVALUATION)


class Profile:
    """Seconds by region, summed over steps; a GPU is synchronised at every change of region.

    `clock` gives seconds; with one thread on a machine that others use too, it may be `time.process_time`.
    """

    def __init__(self, device: str | torch.device = "cpu", clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self.steps = 0
        self._cuda = torch.device(device) if torch.device(device).type == "cuda" else None
        self._clock = clock
        self._region: str | None = None  # None: nothing is measured
        self._fixed = False  # inside `region`, whose parts are not measured separately
        self._since = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure a step; time in no other region counts for `OTHER`."""
        self._go(OTHER)
        try:
            yield
        finally:
            self._go(None)
            self.steps += 1

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        """Count all time inside for `name`, also that of the towers."""
        before, fixed = self._region, self._fixed
        self._go(name)
        self._fixed = True
        try:
            yield
        finally:
            self._fixed = fixed
            self._go(before)

    @contextmanager
    def watching(self, backbone: Any, regulator: Any = None) -> Iterator[None]:
        """Measure the towers of this backbone, and this regulator."""
        watched = [(backbone, "encode_images", IMAGE_TOWER), (backbone, "encode_text", TEXT_TOWER)]
        if regulator is not None:
            watched.append((regulator, "forward", REGULATOR))
        for owner, method, name in watched:
            setattr(owner, method, self._measured(getattr(owner, method), name))
        try:
            yield
        finally:
            for owner, method, _ in watched:
                delattr(owner, method)  # the class's method is used again

    def share_outside_towers(self) -> float:
        """Return the share of the steps' time that was spent in no tower's forward or backward pass."""
        return 1 - sum(share for name, _, share in self.rows() if name in TOWERS)

    def rows(self) -> list[tuple[str, float, float]]:
        """Return region, seconds a step and share of a step, without the held-out tasks."""
        spent = {name: self.seconds[name] for name in dict.fromkeys((*ORDER, *self.seconds)) if name in self.seconds}
        spent.pop(EVALUATION, None)
        whole = max(sum(spent.values()), 1e-12)
        return [(name, seconds / max(self.steps, 1), seconds / whole) for name, seconds in spent.items()]

    def table(self) -> str:
        """Return a table in Markdown."""
        lines = [f"| {self.steps} steps | ms a step | share |", "| --- | ---: | ---: |"]
        lines += [f"| {name} | {1000 * each:.2f} | {100 * share:.1f} % |" for name, each, share in self.rows()]
        whole = sum(each for _, each, _ in self.rows())
        lines.append(f"| a step | {1000 * whole:.2f} | outside the towers {100 * self.share_outside_towers():.1f} % |")
        if EVALUATION in self.seconds:
            lines.append(f"| {EVALUATION}, once | {1000 * self.seconds[EVALUATION]:.0f} | |")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return the measurement as JSON values."""
        return {"steps": self.steps, "seconds": dict(self.seconds), "share_outside_towers": self.share_outside_towers()}

    def _go(self, region: str | None) -> None:
        """Count the time from now on for `region`."""
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
        now = self._clock()
        if self._region is not None:
            self.seconds[self._region] = self.seconds.get(self._region, 0.0) + now - self._since
        self._region, self._since = region, now

    def _cross(self, region: str) -> None:
        """Change the region where values or gradients enter a measured part, or leave it for `OTHER`."""
        if self._region is not None and not self._fixed:
            self._go(region)

    def _measured(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = self._marked((args, kwargs), name, OTHER)
            self._cross(name)
            out = self._marked(function(*args, **kwargs), OTHER, name)
            self._cross(OTHER)
            return out

        return measured

    def _marked(self, value: Any, onward: str, backward: str) -> Any:
        """Pass every tensor with a gradient, also in tuples and dicts, through an identity that records the time."""
        if isinstance(value, Tensor):
            return _Border.apply(value, self, onward, backward) if value.requires_grad else value
        if isinstance(value, tuple):
            return tuple(self._marked(item, onward, backward) for item in value)
        if isinstance(value, dict):
            return {key: self._marked(item, onward, backward) for key, item in value.items()}
        return value


def profile_steps(trainer: MetaTrainer, steps: int) -> Path:
    """Time some steps, after two that are not counted; print a table, write profile.json, and return its path."""
    profile, warm = Profile(trainer.backbone.device), 2
    recorded, trainer.add_gradients = trainer.add_gradients, trainer.add_gradients_plainly  # to see its parts
    coming = iter(trainer.episodes_of(0, steps + warm))
    for step in range(1, warm + 1):
        trainer.step(step, next(coming))
    with profile.watching(trainer.backbone, trainer.regulator):
        trainer.region = profile.region
        for step in range(warm + 1, warm + steps + 1):
            with profile.step():
                with profile.region(WAITING):
                    episode = next(coming)
                trainer.step(step, episode)
        with profile.region(EVALUATION):
            trainer.scores()
    path = trainer.folder.out / PROFILE
    if trainer.group.is_first:
        print(profile.table())
        if trainer.records:
            trainer.add_gradients = recorded
            print(f"a step as a CUDA graph, waiting for images included: {1000 * _seconds(trainer, steps):.2f} ms")
        write_json(path, profile.as_dict() | {"plan": str(trainer.plan), "processes": trainer.group.size})
    return path


def _seconds(trainer: MetaTrainer, steps: int) -> float:
    """Return the seconds of a step, of so many steps that have been taken before."""
    began = 0.0
    for _ in range(2):
        torch.cuda.synchronize(trainer.backbone.device)
        began = time.perf_counter()
        for number, episode in enumerate(trainer.episodes_of(0, steps), 1):
            trainer.step(number, episode)
    torch.cuda.synchronize(trainer.backbone.device)
    return (time.perf_counter() - began) / steps


class _Border(torch.autograd.Function):
    """The identity; it starts the next region of the profile, also for gradients and for gradients of gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, profile: Profile, onward: str, backward: str) -> Tensor:
        ctx.profile, ctx.onward, ctx.back = profile, onward, backward
        profile._cross(onward)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _Border.apply(grads[0], ctx.profile, ctx.back, ctx.onward), None, None, None
