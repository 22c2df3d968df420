"""Evaluation of adaptation on held-out tasks: during meta-training (`evaluate`), and by `gram eval-meta`.

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

from gram_meta.backbone.clip import Backbone, load_backbone
from gram_meta.clustering.hierarchy import Hierarchy
from gram_meta.config import stored_config
from gram_meta.corpus.store import PairStore
from gram_meta.errors import GramError
from gram_meta.files import Count, check_type
from gram_meta.intervals import half_width, mean
from gram_meta.method.bilevel import (
    InnerLoop,
    as_leaves,
    for_each_task,
    inner_path,
    inner_products,
    norms_by_task,
    task_gradients,
    total_of,
)
from gram_meta.method.checkpoint import MetaCheckpoint
from gram_meta.method.episodes import Episodes, TaskSet, initial_theta
from gram_meta.method.prompts import KINDS, PromptConfig
from gram_meta.method.regulator import GradientRegulator
from gram_meta.method.tasks import Task, TaskConfig, TaskSampler
from gram_meta.processes import ALONE, ProcessGroup
from gram_meta.progress import progress_bar

Gradients = Mapping[str, Tensor]
Scores = dict[tuple[str, str, int], list[tuple[Tensor, Tensor]]]  # (start, gradient, steps): losses, accuracies by task

SOLVED = 0.95  # accuracy before any step; tasks above it can show little
HOPELESS = 1.2  # times chance; tasks below it can show little
HELP, HARM, UNCLEAR = "helps", "does harm", "makes no clear difference"
TEMPERATURES = tuple(2.0 ** (half / 2) for half in range(-2, 11))  # 0.5 to 32

MEAN, MOVED = "R's mean", "theta* moved by the mean beta"  # controls in the table of `gram eval-meta`


def evaluate(
    episodes: Episodes,
    tasks: Sequence[Task],
    theta: Mapping[str, Tensor],
    regulator: GradientRegulator | None,
    inner: InnerLoop,
    tasks_at_a_time: int,
    images_at_a_time: int = 0,
    group: ProcessGroup = ALONE,
) -> dict[str, float]:
    """Return the scores of adaptation on given tasks, averaged over them.

    Args:
        tasks: the tasks of this process.
        tasks_at_a_time, images_at_a_time: the content of one pass through the towers; 0 images: all of a task.
        group: the processes that the averages are over.

    Returns:
        `loss_before`, `accuracy_before`, `loss_after`, `accuracy_after` on the query sets; `alignment` and
        `alignment_raw`, the normalised inner product at theta of the query gradient with the regulated and with the raw
        support gradient (Fig. 3b, Eq. 12), over all prompts; and per kind of prompt the path lengths of both terms of
        Eq. 6 in one step (`path_gated_KIND`, `path_beta_KIND`), how much gamma and beta vary over tasks
        (`spread_gamma_KIND`, `spread_beta_KIND`: standard deviation over tasks, averaged over entries),
        `gradient_norm_KIND`. `temperature`, one of `TEMPERATURES` times that of the query loss, is what logits at theta
        must be divided by for the least loss.
    """
    kinds = sorted(set(theta) & set(KINDS))
    rows: list[dict[str, Tensor]] = []
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {kind: [] for kind in kinds}
    for episode in episodes.of(_batches(tasks, tasks_at_a_time)):
        support, query = episode.support.parts(images_at_a_time), episode.query.parts(images_at_a_time)
        before = as_leaves(for_each_task(theta, len(episode.tasks)))
        query_scores, query_gradient = _scored_gradients(query, before, inner.scale)
        path = list(inner_path(support, before, inner))
        raw, first, after = path[0].raw, path[0].regulated, path[-1].after
        with torch.no_grad():
            after_scores = torch.cat([part.logits(after) for part in query], dim=1)
            query_loss = episode.query.losses_of
            row = {
                "loss_before": query_loss(query_scores),
                "accuracy_before": episode.query.accuracies_of(query_scores),
                "loss_after": query_loss(after_scores),
                "accuracy_after": episode.query.accuracies_of(after_scores),
                "calibration": torch.stack([query_loss(query_scores / t) for t in TEMPERATURES], dim=1),  # (B, all)
                "alignment": inner_products(_only(first, kinds), _only(query_gradient, kinds)),
                "alignment_raw": inner_products(_only(raw, kinds), _only(query_gradient, kinds)),
            }
            for kind in kinds:
                row[f"gradient_norm_{kind}"] = norms_by_task(raw[kind])
                if regulator is not None:
                    piece = regulator.parts(kind, raw[kind])
                    row[f"path_gated_{kind}"] = inner.alpha * piece.gated.flatten(1).norm(dim=1)
                    row[f"path_beta_{kind}"] = inner.alpha * piece.beta.flatten(1).norm(dim=1)
                    parts[kind].append((piece.gamma.cpu(), piece.beta.cpu()))
            rows.append({key: value.detach().cpu() for key, value in row.items()})
    rows = [row for of_one in group.gather(rows) for row in of_one]
    values = {key: torch.cat([row[key] for row in rows]).mean(dim=0) for key in rows[0]}
    best = TEMPERATURES[int(values.pop("calibration").argmin())]
    scores = {key: value.item() for key, value in values.items()} | {"temperature": episodes.temperature * best}
    for kind in kinds:
        pieces = [piece for of_one in group.gather(parts[kind]) for piece in of_one]
        if pieces:
            gammas, betas = (torch.cat(values) for values in zip(*pieces, strict=True))  # (tasks, M, d)
            correction = min(len(gammas) - 1, 1)  # of a single task the spread is 0
            scores[f"spread_gamma_{kind}"] = gammas.std(dim=0, correction=correction).mean().item()
            scores[f"spread_beta_{kind}"] = betas.std(dim=0, correction=correction).mean().item()
    return scores


def _scored_gradients(
    parts: Sequence[TaskSet], prompts: Mapping[str, Tensor], scale: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits (B, K n, K) of all parts of a side, and the gradient of its loss."""
    scores: list[Tensor] = []

    def of(part: TaskSet) -> dict[str, Tensor]:
        def losses(at: Mapping[str, Tensor]) -> Tensor:
            logits = part.logits(at)
            scores.append(logits.detach())
            return part.losses_of(logits)

        return task_gradients(losses, prompts, scale=scale)

    gradient = total_of(of(part) for part in parts)
    return torch.cat(scores, dim=1), gradient


def _only(gradients: Mapping[str, Tensor], kinds: Sequence[str]) -> dict[str, Tensor]:
    return {kind: gradients[kind] for kind in kinds}


def _batches(tasks: Sequence[Task], size: int) -> list[Sequence[Task]]:
    return [tasks[start : start + size] for start in range(0, len(tasks), size)]


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
    where = f"{checkpoint.path}: held_out_topics"
    held = check_type(checkpoint.provenance.get("held_out_topics", []), list[Count], where)
    same = bool(held) and checkpoint.provenance.get("hierarchy") == hierarchy.fingerprint
    if same and max(held) >= len(hierarchy.topics):
        raise GramError(f"{where}: expected numbers below {len(hierarchy.topics)}, found {max(held)}")
    topics, features = held if same else None, store.image_features
    sampler = TaskSampler(hierarchy, TaskConfig.from_config(config), seed, topics, features=features)
    drawn = sampler.draw_batch(0, tasks)
    episodes = Episodes.from_config(backbone, store, [topic.word for topic in hierarchy.topics], config)
    initial = initial_theta(backbone, PromptConfig.from_config(config), config.SEED)
    learned = {**checkpoint.prompts, **checkpoint.extras}
    starts = {
        "theta*": {name: value.to(backbone.device) for name, value in learned.items()},
        _start_name(config.PROMPT.WORDS): {name: value.detach() for name, value in initial.items()},
    }
    regulator = None if checkpoint.regulator is None else checkpoint.regulator.to(backbone.device)
    inner = replace(InnerLoop.from_config(config), steps=max(steps), detached=0)
    regulates = _forms(regulator)
    if regulator is not None:
        others = sampler.draw_batch(tasks, tasks)
        gates = mean_gates(regulator, starts["theta*"], episodes, others, inner)
        regulates[MEAN] = lambda raw: {kind: gamma * raw[kind] + beta for kind, (gamma, beta) in gates.items()}
        length = InnerLoop.from_config(config).path
        starts[MOVED] = starts["theta*"] | {k: starts["theta*"][k] - length * beta for k, (_, beta) in gates.items()}
    forms = {form: replace(inner, regulate=regulate) for form, regulate in regulates.items()}
    rows = [(start, form) for start in starts for form in forms if start != MOVED or form == "R off"]
    plain = "raw" if regulator is None else "R off"
    seen: Scores = {}
    alignment: dict[str, list[Tensor]] = {}
    with progress_bar(total=tasks, unit=" tasks", desc="adapting", shown=progress) as bar:
        for episode in episodes.of(_batches(drawn, episodes.at_a_time)):
            for start, form in rows:
                prompts: Gradients = for_each_task(starts[start], len(episode.tasks))
                path = inner_path([episode.support], prompts, forms[form])
                for number in range(max(steps) + 1):
                    if number in steps:
                        with torch.no_grad():
                            scores = episode.query.logits(prompts)
                            values = episode.query.losses_of(scores), episode.query.accuracies_of(scores)
                        seen.setdefault((start, form, number), []).append(values)
                    if (step := next(path, None)) is None:
                        break
                    if number == 0 and start == "theta*":
                        ahead = task_gradients(episode.query, step.prompts, scale=inner.scale)
                        pair = ({kind: g[kind] for kind in checkpoint.prompts} for g in (step.regulated, ahead))
                        alignment.setdefault(form, []).append(inner_products(*pair))
                    prompts = step.after
            bar.update(len(episode.tasks))
    lines = [Line(*row, [_cell(step, seen[row + (step,)]) for step in sorted(set(steps))]) for row in rows]
    return Adaptation(
        topics=f"{len(held)} topics held out of meta-training" if same else "all topics of another hierarchy",
        tasks=tasks,
        ways=config.TASKS.WAYS,
        alpha=config.INNER.ALPHA,
        lines=lines,
        alignment={form: torch.cat(values).mean().item() for form, values in alignment.items()},
        verdict=_verdict(seen, rows[0], (_start_name(config.PROMPT.WORDS), plain), max(steps), config.TASKS.WAYS),
    )


def _verdict(seen: Scores, learned: tuple[str, str], plain: tuple[str, str], steps: int, ways: int) -> list[str]:
    """Return sentences: whether theta* and R^phi help, and whether the tasks can show it."""
    _, accuracy = _values(seen[learned + (steps,)])
    does, by = _difference(seen, learned, plain, steps)
    words = f"{' with '.join(learned)} against {' with '.join(plain)} lowers the query loss after {steps} steps by {by}"
    sentences = [f"The meta-checkpoint {does} on these tasks: {words}."]
    if learned[1] == "R on":
        does_r, by = _difference(seen, learned, (learned[0], "R off"), steps)
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


def _values(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[float], list[float]]:
    """Return the loss and the accuracy of each task."""
    losses, accuracies = (torch.cat(values).double().tolist() for values in zip(*parts, strict=True))
    return losses, accuracies


def _forms(regulator: GradientRegulator | None) -> dict[str, Callable[[Gradients], Gradients] | None]:
    """Return the gradients to compare, by their names in the table."""
    if regulator is None:
        return {"raw": None}

    def stretched(raw: Gradients) -> Gradients:
        known = regulator.regulate_known(raw)
        factors = {kind: norms_by_task(known[kind]) / norms_by_task(raw[kind]).clamp_min(1e-12) for kind in known}
        return {kind: torch.einsum("b,b...->b...", factor, raw[kind]) for kind, factor in factors.items()}

    return {"R on": regulator.regulate_known, "R off": None, "R off, same length": stretched}


def mean_gates(
    regulator: GradientRegulator, theta: Gradients, episodes: Episodes, tasks: Sequence[Task], inner: InnerLoop
) -> dict[str, tuple[Tensor, ...]]:
    """Return gamma and beta of each kind for the support gradients at theta, (M, d) each, averaged over tasks."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {kind: [] for kind in regulator.widths}
    inner = replace(inner, steps=1)  # the gradient at theta, also where no step is asked for
    for episode in episodes.of(_batches(tasks, episodes.at_a_time)):
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


def _cell(steps: int, parts: Sequence[tuple[Tensor, Tensor]]) -> Cell:
    losses, accuracies = _values(parts)
    accuracies = [100 * value for value in accuracies]
    return Cell(steps, mean(losses), half_width(losses), mean(accuracies), half_width(accuracies))


def _text(mean: float, half_width: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" + (f" ± {half_width:.{digits}f}" if half_width is not None else "")
