"""Adaptation to held-out tasks with R^phi and with controls: the comparison of `gram eval-meta`.

`evaluate_adaptation` adapts to the same tasks from theta* and from the initialisation of meta-training, with the
regulated gradient and with controls that show what R^phi does: the raw gradient; the raw gradient scaled to the
regulated one's length (what it lacks is direction); R^phi with gamma and beta replaced by their means over tasks (what
it lacks is dependence on the gradient); and raw gradients from theta* moved by the mean beta (whether a better
initialisation has the same effect).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from yacs.config import CfgNode

from gram_meta.backbone.clip import Backbone, load_backbone
from gram_meta.clustering.hierarchy import Hierarchy
from gram_meta.config import stored_config
from gram_meta.corpus.store import PairStore
from gram_meta.errors import GramError
from gram_meta.files import Count, check_type
from gram_meta.intervals import half_width, mean
from gram_meta.method.bilevel import (
    InnerLoop,
    InnerStep,
    Prompts,
    for_each_task,
    inner_path,
    inner_products,
    norms_by_task,
    task_gradients,
)
from gram_meta.method.checkpoint import MetaCheckpoint
from gram_meta.method.episodes import Episode, Episodes, initial_theta
from gram_meta.method.evaluation import in_batches
from gram_meta.method.prompts import PromptConfig
from gram_meta.method.regulator import GradientRegulator
from gram_meta.method.tasks import Task, TaskConfig, TaskSampler
from gram_meta.progress import progress_bar

Form = Callable[[Prompts], Prompts] | None  # what a raw gradient passes through; None: nothing
Losses = tuple[Tensor, Tensor]  # losses and accuracies of tasks, (B,) each
Scores = dict[tuple[str, str, int], list[Losses]]  # by start, gradient and steps

SOLVED = 0.95  # accuracy before any step; tasks above it can show little
HOPELESS = 1.2  # times chance; tasks below it can show little
HELP, HARM, UNCLEAR = "helps", "does harm", "makes no clear difference"

# names in the table of `gram eval-meta`
LEARNED, MOVED = "theta*", "theta* moved by the mean beta"
ON, OFF, SAME_LENGTH, MEAN, RAW = "R on", "R off", "R off, same length", "R's mean", "raw"


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
    """The scores of one initialisation with one kind of gradient."""

    start: str
    gradient: str
    cells: list[Cell]


@dataclass(frozen=True)
class Adaptation:
    """The result of `evaluate_adaptation`."""

    topics: str  # a phrase for the topics of the tasks
    tasks: int
    ways: int
    alpha: float
    lines: list[Line]
    # by gradient, the normalised inner product at theta* with the query gradient (Fig. 3b), over tasks
    alignment: dict[str, float]
    # whether the meta-checkpoint helps on these tasks, and what is wrong with the tasks, in sentences
    verdict: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return plain dicts and lists, as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Return a table with a row for each initialisation and gradient."""
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
        return "\n".join([tabulate(rows, headers, disable_numparse=True), "", caption, *more, "", *self.verdict])


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
    backbone: Backbone | None = None,
) -> Adaptation:
    """Adapt to `tasks` tasks and score their query sets after each number of `steps`.

    Args:
        checkpoint: from `load_meta_checkpoint`.
        store, hierarchy: the source of the tasks. With the hierarchy of the meta-training, only its held-out topics are
            used; with another one, all topics.
        seed: of the tasks.
        opts: KEY VALUE settings that replace those of the meta-training (TASKS.WAYS, INNER.ALPHA, ...).
        backbone: the CLIP; None: the one that the settings name.

    Raises:
        GramError: a store of another backbone, a hierarchy of another store, too few topics for such tasks.
    """
    config = stored_config(checkpoint.config, opts)
    backbone = backbone or load_backbone(config.BACKBONE.NAME, device, config.BACKBONE.PRECISION)
    where = checkpoint.path or "meta-checkpoint"
    backbone.check_weights(where, checkpoint.backbone_name, checkpoint.backbone_fingerprint)
    store.check_backbone(backbone)
    hierarchy.check_store(store)
    if tasks < 1 or min(steps, default=-1) < 0:
        raise GramError(f"--tasks, --steps: expected at least one task and steps of 0 or more, found {tasks}, {steps}")
    held = _held_out_topics(checkpoint, hierarchy)
    sampler = TaskSampler(hierarchy, TaskConfig.from_config(config), seed, held, features=store.image_features)
    drawn = sampler.draw_batch(0, tasks)
    episodes = Episodes.from_config(backbone, store, [topic.word for topic in hierarchy.topics], config)
    inner = replace(InnerLoop.from_config(config), steps=max(steps), detached=0)
    before = _start_name(config.PROMPT.WORDS)
    starts, forms = _starts(checkpoint, before, backbone, config), _forms(checkpoint.regulator, backbone)
    if checkpoint.regulator is not None:
        others = sampler.draw_batch(tasks, tasks)
        gates = mean_gates(checkpoint.regulator, starts[LEARNED], episodes, others, inner)
        forms[MEAN] = lambda raw: {kind: gamma * raw[kind] + beta for kind, (gamma, beta) in gates.items()}
        starts[MOVED] = _moved(starts[LEARNED], gates, InnerLoop.from_config(config).path)
    rows = [(start, form) for start in starts for form in forms if start != MOVED or form == OFF]
    seen: Scores = {}
    alignment: dict[str, list[Tensor]] = {}
    with progress_bar(total=tasks, unit=" tasks", desc="adapting", shown=progress) as bar:
        for episode in episodes.of(in_batches(drawn, episodes.at_a_time)):
            for start, form in rows:
                scores, first = _adapt(episode, starts[start], replace(inner, regulate=forms[form]), steps)
                for number, values in scores.items():
                    seen.setdefault((start, form, number), []).append(values)
                if start == LEARNED and first is not None:
                    aligned = _alignment(episode, first, checkpoint.prompts, inner.scale)
                    alignment.setdefault(form, []).append(aligned)
            bar.update(len(episode.tasks))
    plain = (before, RAW if checkpoint.regulator is None else OFF)
    return Adaptation(
        topics="all topics of another hierarchy" if held is None else f"{len(held)} topics held out of meta-training",
        tasks=tasks,
        ways=config.TASKS.WAYS,
        alpha=config.INNER.ALPHA,
        lines=[Line(*row, [_cell(step, seen[row + (step,)]) for step in sorted(set(steps))]) for row in rows],
        alignment={form: torch.cat(values).mean().item() for form, values in alignment.items()},
        verdict=_verdict(seen, rows[0], plain, max(steps), config.TASKS.WAYS),
    )


def _held_out_topics(checkpoint: MetaCheckpoint, hierarchy: Hierarchy) -> list[int] | None:
    """Return the topics that meta-training held out, None if it had another hierarchy."""
    where = f"{checkpoint.path}: held_out_topics"
    held = check_type(checkpoint.provenance.get("held_out_topics", []), list[Count], where)
    if not held or checkpoint.provenance.get("hierarchy") != hierarchy.fingerprint:
        return None
    if max(held) >= len(hierarchy.topics):
        raise GramError(f"{where}: expected numbers below {len(hierarchy.topics)}, found {max(held)}")
    return held


def _starts(checkpoint: MetaCheckpoint, before: str, backbone: Backbone, config: CfgNode) -> dict[str, Prompts]:
    """Return theta* and the initialisation of its meta-training, which is named `before`."""
    initial = initial_theta(backbone, PromptConfig.from_config(config), config.SEED)
    learned = {**checkpoint.prompts, **checkpoint.extras}
    return {
        LEARNED: {name: value.to(backbone.device) for name, value in learned.items()},
        before: {name: value.detach() for name, value in initial.items()},
    }


def _moved(theta: Prompts, gates: Mapping[str, tuple[Tensor, ...]], path: float) -> Prompts:
    """Return theta moved by the mean beta along a path of this length."""
    return {**theta, **{kind: theta[kind] - path * beta for kind, (_, beta) in gates.items()}}


def _adapt(
    episode: Episode, theta: Prompts, inner: InnerLoop, steps: Sequence[int]
) -> tuple[dict[int, Losses], InnerStep | None]:
    """Return the scores of the query sets after each number of `steps`, and the first step."""
    prompts: Prompts = for_each_task(theta, len(episode.tasks))
    path, first = inner_path([episode.support], prompts, inner), None
    scores: dict[int, Losses] = {}
    for number in range(max(steps) + 1):
        if number in steps:
            with torch.no_grad():
                logits = episode.query.logits(prompts)
                scores[number] = episode.query.losses_of(logits), episode.query.accuracies_of(logits)
        if (step := next(path, None)) is None:
            break
        first, prompts = first or step, step.after
    return scores, first


def _alignment(episode: Episode, first: InnerStep, kinds: Mapping[str, Tensor], scale: float) -> Tensor:
    """Return the inner product of the first step's gradient with the query gradient, by task (B,): Fig. 3b."""
    ahead = task_gradients(episode.query, first.prompts, scale=scale)
    ours, theirs = ({kind: gradient[kind] for kind in kinds} for gradient in (first.regulated, ahead))
    return inner_products(ours, theirs)


def _verdict(seen: Scores, learned: tuple[str, str], plain: tuple[str, str], steps: int, ways: int) -> list[str]:
    """Return sentences: whether theta* and R^phi help, and whether the tasks can show it."""
    _, accuracy = _values(seen[learned + (steps,)])
    does, by = _difference(seen, learned, plain, steps)
    words = f"{' with '.join(learned)} against {' with '.join(plain)} lowers the query loss after {steps} steps by {by}"
    sentences = [f"The meta-checkpoint {does} on these tasks: {words}."]
    if learned[1] == ON:
        does_r, by = _difference(seen, learned, (learned[0], OFF), steps)
        sentences.append(f"R^phi {does_r}: R on against R off, both from {learned[0]}, lowers it by {by}.")
        if does_r == HARM:
            sentences.append("Meta-train with a lower OUTER.LR_REGULATOR, or with more TASKS.SUPPORT_SHOTS.")
    if does == UNCLEAR:
        sentences.append("More tasks (--tasks) narrow the interval; more meta-training (OUTER.STEPS) may give a gain.")
    if 0 in [step for *_, step in seen] and mean(_values(seen[plain + (0,)])[1]) > SOLVED:
        sentences.append(
            f"Before any step {plain[0]} has more than {100 * SOLVED:.0f} % of them right: such tasks teach little. "
            "Raise TASKS.WAYS, or make finer topics (CHC.TOPICS.SELECTION leaf, a smaller CHC.TOPICS.MIN_CLUSTER_SIZE)."
        )
    if mean(accuracy) < HOPELESS / ways:
        sentences.append(
            f"The accuracy of {100 * mean(accuracy):.0f} % is near chance ({100 / ways:.0f} %): such tasks teach "
            "little. Topics or their words may not fit the images: look at `gram inspect`, and lower CHC.FILTER.KEEP."
        )
    return sentences


def _difference(seen: Scores, learned: tuple[str, str], plain: tuple[str, str], steps: int) -> tuple[str, str]:
    """Return what the first does against the second, and by how much it lowers the query loss, with an interval."""
    ours, theirs = (_values(seen[row + (steps,)])[0] for row in (learned, plain))
    gains = [b - a for a, b in zip(ours, theirs, strict=True)]
    gain, half = mean(gains), half_width(gains)
    half = math.inf if half is None else half
    return HELP if gain > half else HARM if gain < -half else UNCLEAR, _text(gain, half, 3)


def _values(parts: Sequence[Losses]) -> tuple[list[float], list[float]]:
    """Return the loss and the accuracy of each task."""
    losses, accuracies = (torch.cat(values).double().tolist() for values in zip(*parts, strict=True))
    return losses, accuracies


def _forms(regulator: GradientRegulator | None, backbone: Backbone) -> dict[str, Form]:
    """Return the gradients to compare, by their names in the table; R^phi moves to the backbone's device."""
    if regulator is None:
        return {RAW: None}
    regulator.to(backbone.device)

    def stretched(raw: Prompts) -> Prompts:
        known = regulator.regulate_known(raw)
        factors = {kind: norms_by_task(known[kind]) / norms_by_task(raw[kind]).clamp_min(1e-12) for kind in known}
        return {kind: torch.einsum("b,b...->b...", factor, raw[kind]) for kind, factor in factors.items()}

    return {ON: regulator.regulate_known, OFF: None, SAME_LENGTH: stretched}


def mean_gates(
    regulator: GradientRegulator, theta: Prompts, episodes: Episodes, tasks: Sequence[Task], inner: InnerLoop
) -> dict[str, tuple[Tensor, ...]]:
    """Return gamma and beta of each kind for the support gradients at theta, (M, d) each, averaged over tasks."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {kind: [] for kind in regulator.widths}
    inner = replace(inner, steps=1)  # the gradient at theta, also where no step is asked for
    for episode in episodes.of(in_batches(tasks, episodes.at_a_time)):
        raw = next(inner_path([episode.support], for_each_task(theta, len(episode.tasks)), inner)).raw
        for kind, pieces in seen.items():
            part = regulator.parts(kind, raw[kind])
            pieces.append((part.gamma.detach(), part.beta.detach()))
    return {
        kind: tuple(torch.cat(values).mean(dim=0) for values in zip(*pieces, strict=True))
        for kind, pieces in seen.items()
    }


def _start_name(words: str) -> str:
    return f'"{words}"' if words else "random"


def _cell(steps: int, parts: Sequence[Losses]) -> Cell:
    losses, accuracies = _values(parts)
    accuracies = [100 * value for value in accuracies]
    return Cell(steps, mean(losses), half_width(losses), mean(accuracies), half_width(accuracies))


def _text(mean: float, half_width: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" + (f" ± {half_width:.{digits}f}" if half_width is not None else "")
