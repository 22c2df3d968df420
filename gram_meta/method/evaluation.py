"""What adapting from a meta-checkpoint does on tasks it has never seen, before anybody spends hours downstream.

The same tasks are adapted from theta* and from the start of meta-training, with the regulated gradient, with the raw one,
and with the raw one stretched to the regulated one's length: what is left between the first and the last is direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gram_meta.backbone.clip import load_backbone
from gram_meta.clustering.hierarchy import Hierarchy
from gram_meta.config import stored_config
from gram_meta.corpus.store import PairStore
from gram_meta.errors import GramError
from gram_meta.intervals import half_width
from gram_meta.method.bilevel import InnerLoop, for_each_task, inner_path, inner_products, norms_by_task, task_gradients
from gram_meta.method.checkpoint import MetaCheckpoint
from gram_meta.method.episodes import Episodes, initial_theta
from gram_meta.method.regulator import GradientRegulator
from gram_meta.method.tasks import TaskSampler

Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Cell:
    """Means over tasks on their query sets, and half the 95 % interval of each (Student's t over tasks)."""

    steps: int
    loss: float
    loss_half_width: float | None
    accuracy: float  # percent
    accuracy_half_width: float | None


@dataclass(frozen=True)
class Line:
    """One start with one kind of gradient."""

    start: str
    gradient: str
    cells: list[Cell]


@dataclass(frozen=True)
class Adaptation:
    """What `evaluate_adaptation` found.

    Attributes:
        topics: which topics the tasks are from, in words.
        alignment: by gradient, the normalised inner product at theta* with the query gradient (Fig. 3b), over tasks.
    """

    topics: str
    tasks: int
    ways: int
    alpha: float
    lines: list[Line]
    alignment: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, fit for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """A table with a row for each start and gradient."""
        from tabulate import tabulate

        steps = [cell.steps for cell in self.lines[0].cells]
        rows = [
            [line.start, line.gradient, *(_text(c.accuracy, c.accuracy_half_width, 1) for c in line.cells)]
            + [_text(c.loss, c.loss_half_width, 3) for c in line.cells]
            for line in self.lines
        ]
        headers = ["start", "gradient", *(f"acc. {s}" for s in steps), *(f"loss {s}" for s in steps)]
        caption = (
            f"{self.tasks} {self.ways}-way tasks from {self.topics}; query accuracy (percent) and loss after so many "
            f"inner steps of size {self.alpha:g}; ± is the 95 % interval over tasks (Student's t)."
        )
        aligned = ", ".join(f"{name} {value:.3f}" for name, value in self.alignment.items())
        more = [f"Inner product with the query gradient at theta* (Fig. 3b): {aligned}."] if aligned else []
        return "\n".join([tabulate(rows, headers, disable_numparse=True), "", caption, *more])


def evaluate_adaptation(
    checkpoint: MetaCheckpoint,
    store: PairStore,
    hierarchy: Hierarchy,
    tasks: int = 100,
    steps: Sequence[int] = (0, 1, 5, 20),
    seed: int = 1000,
    opts: Sequence[str] = (),
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Adaptation:
    """Adapt to `tasks` tasks and score their query sets after each number of `steps`.

    Args:
        checkpoint: from `load_meta_checkpoint`.
        store, hierarchy: where the tasks come from. With the hierarchy of the meta-training, only topics that it held
            out are used; with another one, all of them.
        seed: of the tasks.
        opts: KEY VALUE settings that replace the meta-training's (TASKS.WAYS, INNER.ALPHA, ...).

    Raises:
        GramError: a store of another backbone, a hierarchy of another store, too few topics for such tasks.
    """
    config = stored_config(checkpoint.config, opts)
    backbone = load_backbone(config.BACKBONE.NAME, device, config.BACKBONE.PRECISION)
    checkpoint.check(backbone, checkpoint.tokens, checkpoint.extras)
    store.check_backbone(backbone)
    hierarchy.check_store(store)
    if tasks < 1 or min(steps, default=-1) < 0:
        raise GramError(f"--tasks, --steps: expected at least one task and steps of 0 or more, found {tasks}, {steps}")
    held = checkpoint.provenance.get("held_out_topics") or []
    same = bool(held) and checkpoint.provenance.get("hierarchy") == hierarchy.fingerprint
    sampler = TaskSampler(
        hierarchy,
        config.TASKS.WAYS,
        config.TASKS.SUPPORT_SHOTS,
        config.TASKS.QUERY_SHOTS,
        seed,
        held if same else None,
        config.TASKS.DOMAIN_SHIFT,
    )
    drawn = sampler.draw_batch(0, tasks)
    episodes = Episodes(backbone, store, [topic.word for topic in hierarchy.topics], config)
    learnt = {**checkpoint.prompts, **checkpoint.extras}
    starts = {
        "theta*": {name: value.to(backbone.device) for name, value in learnt.items()},
        _start_name(config.PROMPT.WORDS): {n: v.detach() for n, v in initial_theta(backbone, config).items()},
    }
    regulator = None if checkpoint.regulator is None else checkpoint.regulator.to(backbone.device)
    forms = _forms(regulator)
    seen: dict[tuple[str, str, int], list[tuple[Tensor, Tensor]]] = {}
    alignment: dict[str, list[Tensor]] = {}
    batch = episodes.at_a_time
    with tqdm(total=tasks, unit=" tasks", desc="adapting", disable=not progress) as bar:
        for episode in episodes.of([drawn[i : i + batch] for i in range(0, tasks, batch)]):
            for start, theta in starts.items():
                for form, regulate in forms.items():
                    prompts: Gradients = for_each_task(theta, len(episode.tasks))
                    inner = InnerLoop(config.INNER.ALPHA, max(steps), regulate=regulate)
                    path = inner_path([episode.support], prompts, inner)
                    for number in range(max(steps) + 1):
                        if number in steps:
                            with torch.no_grad():
                                scores = episode.query.logits(prompts)
                                values = episode.query.losses_of(scores), episode.query.accuracies_of(scores)
                            seen.setdefault((start, form, number), []).append(values)
                        if (step := next(path, None)) is None:
                            break
                        if number == 0 and start == "theta*":
                            ahead = task_gradients(episode.query, step.prompts)
                            pair = ({kind: g[kind] for kind in checkpoint.prompts} for g in (step.regulated, ahead))
                            alignment.setdefault(form, []).append(inner_products(*pair))
                        prompts = step.after
            bar.update(len(episode.tasks))
    lines = [
        Line(start, form, [_cell(step, seen[start, form, step]) for step in sorted(set(steps))])
        for start in starts
        for form in forms
    ]
    return Adaptation(
        topics=f"{len(held)} topics held out of meta-training" if same else "all topics of another hierarchy",
        tasks=tasks,
        ways=config.TASKS.WAYS,
        alpha=config.INNER.ALPHA,
        lines=lines,
        alignment={form: torch.cat(values).mean().item() for form, values in alignment.items()},
    )


def _forms(regulator: GradientRegulator | None) -> dict[str, Callable[[Gradients], Gradients] | None]:
    """Gradients to compare, by what the table calls them."""
    if regulator is None:
        return {"raw": None}

    def stretched(raw: Gradients) -> Gradients:
        return {
            kind: raw[kind] * (norms_by_task(value) / norms_by_task(raw[kind]).clamp_min(1e-12))[:, None, None]
            for kind, value in regulator.of_known(raw).items()
        }

    return {"R on": regulator.of_known, "R off": None, "R off, same length": stretched}


def _start_name(words: str) -> str:
    return f'"{words}"' if words else "random"


def _cell(steps: int, parts: Sequence[tuple[Tensor, Tensor]]) -> Cell:
    losses, accuracies = (torch.cat(values).double().tolist() for values in zip(*parts, strict=True))
    accuracies = [100 * value for value in accuracies]
    return Cell(
        steps,
        math.fsum(losses) / len(losses),
        half_width(losses),
        math.fsum(accuracies) / len(accuracies),
        half_width(accuracies),
    )


def _text(mean: float, half_width: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" + (f" ± {half_width:.{digits}f}" if half_width is not None else "")
