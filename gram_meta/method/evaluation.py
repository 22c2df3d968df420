"""Scores of adaptation on held-out tasks, which meta-training logs and chooses the checkpoint by."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

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
from gram_meta.method.episodes import Episode, Episodes, TaskSet
from gram_meta.method.prompts import KINDS
from gram_meta.method.regulator import GradientRegulator
from gram_meta.method.tasks import Task
from gram_meta.processes import ALONE, ProcessGroup

Row = dict[str, Tensor]  # of an episode: values by name, (B,) or (B, n)
Gates = dict[str, tuple[Tensor, Tensor]]  # kind -> gamma and beta, (B, M, d)

TEMPERATURES = tuple(2.0 ** (half / 2) for half in range(-2, 11))  # 0.5 to 32


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
    seen = [
        _scores_of(episode, theta, kinds, regulator, inner, images_at_a_time)
        for episode in episodes.of(in_batches(tasks, tasks_at_a_time))
    ]
    seen = [each for of_one in group.gather(seen) for each in of_one]
    rows, gates = [row for row, _ in seen], [of_kinds for _, of_kinds in seen]
    values = {key: torch.cat([row[key] for row in rows]).mean(dim=0) for key in rows[0]}
    best = TEMPERATURES[int(values.pop("calibration").argmin())]
    scores = {key: value.item() for key, value in values.items()} | {"temperature": episodes.temperature * best}
    for kind in gates[0]:
        for name, parts in zip(("gamma", "beta"), zip(*(each[kind] for each in gates), strict=True), strict=True):
            scores[f"spread_{name}_{kind}"] = _spread(torch.cat(parts))
    return scores


def _scores_of(
    episode: Episode,
    theta: Mapping[str, Tensor],
    kinds: Sequence[str],
    regulator: GradientRegulator | None,
    inner: InnerLoop,
    images_at_a_time: int,
) -> tuple[Row, Gates]:
    """Return the scores of each task of an episode, and the gates of R^phi at theta; on the CPU."""
    support, query = episode.support.parts(images_at_a_time), episode.query.parts(images_at_a_time)
    before = as_leaves(for_each_task(theta, len(episode.tasks)))
    scores_before, query_gradient = _scored_gradients(query, before, inner.scale)
    path = list(inner_path(support, before, inner))
    raw, first, after = path[0].raw, path[0].regulated, path[-1].after
    losses, accuracies = episode.query.losses_of, episode.query.accuracies_of
    with torch.no_grad():
        scores_after = torch.cat([part.logits(after) for part in query], dim=1)
        row = {
            "loss_before": losses(scores_before),
            "accuracy_before": accuracies(scores_before),
            "loss_after": losses(scores_after),
            "accuracy_after": accuracies(scores_after),
            "calibration": torch.stack([losses(scores_before / t) for t in TEMPERATURES], dim=1),  # (B, all)
            "alignment": inner_products(_only(first, kinds), _only(query_gradient, kinds)),
            "alignment_raw": inner_products(_only(raw, kinds), _only(query_gradient, kinds)),
        }
        gates: Gates = {}
        for kind in kinds:
            row[f"gradient_norm_{kind}"] = norms_by_task(raw[kind])
            if regulator is not None:
                parts = regulator.parts(kind, raw[kind])
                row[f"path_gated_{kind}"] = inner.alpha * parts.gated.flatten(1).norm(dim=1)
                row[f"path_beta_{kind}"] = inner.alpha * parts.beta.flatten(1).norm(dim=1)
                gates[kind] = parts.gamma.cpu(), parts.beta.cpu()
    return {key: value.detach().cpu() for key, value in row.items()}, gates


def _spread(values: Tensor) -> float:
    """Return the standard deviation over tasks of (tasks, M, d), averaged over entries; 0 for a single task."""
    return values.std(dim=0, correction=min(len(values) - 1, 1)).mean().item()


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


def in_batches(tasks: Sequence[Task], size: int) -> list[Sequence[Task]]:
    """Return the tasks in parts of at most `size`."""
    return [tasks[start : start + size] for start in range(0, len(tasks), size)]
