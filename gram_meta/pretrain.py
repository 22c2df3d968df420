"""Meta-training: Algorithm 1 over tasks from a hierarchy.

The loop is `MetaTrainer.run`. A step draws B tasks, adapts theta to each support set through R^phi (Eq. 7), and moves
theta and phi down the gradient of the query losses (Eq. 8, 9). Every few steps the same held-out tasks are looked at, and
the theta and phi with the lowest query loss after adaptation on them are the ones to keep.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from yacs.config import CfgNode

from gram_meta import __version__
from gram_meta.backbone import Backbone, load_backbone
from gram_meta.bilevel import adapt, for_each_task, inner_products, meta_losses, task_gradients
from gram_meta.checkpoint import MetaCheckpoint, save_meta_checkpoint
from gram_meta.clustering.hierarchy import Hierarchy
from gram_meta.config import as_dict
from gram_meta.corpus.store import PairStore
from gram_meta.errors import GramError
from gram_meta.files import PathLike, atomic_write, read_json, write_json
from gram_meta.prompts import ClassText, initial_prompts, logits
from gram_meta.regulator import GradientRegulator, RegulatorConfig
from gram_meta.tasks import Task, TaskSampler, images_of, split_topics

logger = logging.getLogger("gram")

BEST = "best.safetensors"
LAST = "last.safetensors"
_STATE = "state.pt"
_FACTS = "run.json"
_LOG = "log.jsonl"


def pretrain(
    store: PathLike,
    hierarchy: PathLike,
    out: PathLike,
    config: CfgNode,
    device: str | torch.device = "cpu",
    resume: bool = False,
    progress: bool = True,
) -> Path:
    """Meta-train on a corpus and write the meta-checkpoint.

    Args:
        store, hierarchy: folders written by `gram embed` and `gram cluster`.
        out: folder for `best.safetensors`, `last.safetensors`, `log.jsonl`, TensorBoard scalars and the state to resume.
        config: settings (`gram_meta.config`).
        resume: go on from the state in `out`; the final weights equal an uninterrupted run's.

    Returns:
        The path of `best.safetensors`.

    Raises:
        GramError: inputs that do not belong together, too few topics, a folder that holds another run, or a loss that is
            not finite (the message names the step and the task).
    """
    trainer = MetaTrainer(
        PairStore.open(store), Hierarchy.open(hierarchy), Path(out), config, device, progress
    )
    return trainer.run(resume)


class FeatureTasks:
    """Losses of batches of tasks whose images are rows of stored features: the image tower never runs.

    Args:
        backbone: frozen CLIP.
        features: (n_images, D) L2-normalised image features of a store.
        words: label text of each topic.
        tokens: M_t.
    """

    def __init__(self, backbone: Backbone, features: np.ndarray, words: Sequence[str], tokens: int) -> None:
        self.backbone = backbone
        self.features = features
        self.class_text = ClassText(backbone, words, tokens)

    def losses(self, tasks: Sequence[Task]) -> tuple[TaskSet, TaskSet]:
        """The support and the query side of B tasks, as functions of their prompts."""
        topics = torch.from_numpy(np.stack([task.topics for task in tasks]))  # (B, K)
        text = self.class_text.select(topics.to(self.backbone.device))
        support, query = (
            self._images(np.stack([getattr(t, side) for t in tasks])) for side in ("support", "query")
        )
        return TaskSet(self.backbone, text, support), TaskSet(self.backbone, text, query)

    def _images(self, rows: np.ndarray) -> Tensor:
        """Features (B, K, n, D) of image rows (B, K, n)."""
        flat = np.ascontiguousarray(self.features[rows.reshape(-1)])
        return (
            torch.from_numpy(flat)
            .to(self.backbone.device, self.backbone.logit_scale.dtype)
            .unflatten(0, rows.shape)
        )


class TaskSet:
    """The support or the query side of B tasks: prompts -> one cross-entropy per task.

    Args:
        images: (B, K, n, D) features; `images[:, k]` belong to class k.
    """

    def __init__(self, backbone: Backbone, text: ClassText, images: Tensor) -> None:
        batch, ways, shots, width = images.shape
        self.scale = backbone.logit_scale
        self.text = text
        self.images = images.reshape(batch, ways * shots, width)  # (B, K n, D)
        self.labels = (
            torch.arange(ways, device=images.device).repeat_interleave(shots).expand(batch, -1)
        )  # (B, K n)

    def __call__(self, prompts: Mapping[str, Tensor]) -> Tensor:
        """Mean cross-entropy of each task, (B,)."""
        return self.losses_of(self.logits(prompts))

    def logits(self, prompts: Mapping[str, Tensor]) -> Tensor:
        """(B, K n, K) for text prompts (B, M, d)."""
        return logits(self.images, self.text.features(prompts["text"]), self.scale)

    def losses_of(self, scores: Tensor) -> Tensor:
        return F.cross_entropy(scores.transpose(1, 2), self.labels, reduction="none").mean(dim=1)

    def accuracies_of(self, scores: Tensor) -> Tensor:
        return (scores.argmax(dim=2) == self.labels).float().mean(dim=1)


class MetaTrainer:
    """Theta, phi, their optimiser, the tasks, and the loop over them."""

    def __init__(
        self,
        store: PairStore,
        hierarchy: Hierarchy,
        out: Path,
        config: CfgNode,
        device: str | torch.device = "cpu",
        progress: bool = True,
    ) -> None:
        if config.PROMPT.VISUAL_TOKENS or not config.PROMPT.TEXT_TOKENS:
            raise GramError(
                "PROMPT: expected TEXT_TOKENS > 0 and VISUAL_TOKENS 0 (meta-training of visual prompts is not part of "
                f"this version), found {config.PROMPT.TEXT_TOKENS} and {config.PROMPT.VISUAL_TOKENS}"
            )
        self.config, self.out, self.progress = config, out, progress
        self.backbone = load_backbone(config.BACKBONE.NAME, device, config.BACKBONE.PRECISION)
        store.check_backbone(self.backbone)
        hierarchy.check_store(store)
        self.store, self.hierarchy = store, hierarchy

        self.train_topics, self.held_topics = split_topics(
            hierarchy, config.TASKS.HELD_OUT, config.TASKS.WAYS, config.SEED
        )
        self.train_tasks = self._sampler(
            self.train_topics, config.SEED, images_of(hierarchy, self.held_topics)
        )
        held = self._sampler(self.held_topics, config.SEED + 1, None)
        self.watched = held.draw_batch(0, config.EVAL.TASKS)
        words = [topic.word for topic in hierarchy.topics]
        self.tasks = FeatureTasks(self.backbone, store.image_features, words, config.PROMPT.TEXT_TOKENS)

        self.theta = {
            kind: value.requires_grad_()
            for kind, value in initial_prompts(
                self.backbone,
                config.PROMPT.TEXT_TOKENS,
                config.PROMPT.VISUAL_TOKENS,
                config.PROMPT.WORDS,
                config.SEED,
            ).items()
        }
        self.regulator = self._regulator()
        self.optimiser = self._optimiser()
        self.norms: list[Tensor] = []  # raw support gradients' norms, (B, kinds) a step
        self.best: dict[str, float] = {}

    # --- Algorithm 1 --------------------------------------------------------------------------------------------------

    def run(self, resume: bool = False) -> Path:
        """Train to the last step; returns the path of the best checkpoint."""
        steps = self.config.OUTER.STEPS
        first = self._resume() if resume else self._begin()
        with _scalar_writer(self.out / "tensorboard", first) as scalars, self._log_file(first) as log:
            bar = tqdm(
                total=steps * self.config.OUTER.BATCH,
                initial=first * self.config.OUTER.BATCH,
                unit=" tasks",
                desc="meta-training",
                disable=not self.progress,
            )
            if first == 0:
                self._watch(0, scalars, log, bar)
            for step in range(first + 1, steps + 1):
                loss = self._step(step)
                bar.update(self.config.OUTER.BATCH)
                scalars("meta_train/query_loss", loss, step)
                if step % self.config.EVAL.EVERY == 0 or step == steps:
                    self._watch(step, scalars, log, bar)
                if step % self.config.CHECKPOINT.EVERY == 0 or step == steps:
                    self._save_state(step)
            bar.close()
        return self.out / BEST

    def _step(self, step: int) -> float:
        """One update of theta and phi; returns the mean query loss after adaptation."""
        config = self.config
        tasks = self.train_tasks.draw_batch((step - 1) * config.OUTER.BATCH, config.OUTER.BATCH)
        support, query = self.tasks.losses(tasks)
        self._set_learning_rates(step)
        if config.OUTER.META:
            losses = meta_losses(
                support, query, self.theta, len(tasks), config.INNER.ALPHA, config.INNER.STEPS,
                self._recorded_regulate, config.INNER.FIRST_ORDER,
            )  # fmt: skip
        else:  # plain pre-training on the same images, without an inner loop (Table 6, row 3)
            losses = query(for_each_task(self.theta, len(tasks)))
        self._check_finite(losses, step, tasks)
        self.optimiser.zero_grad(set_to_none=True)
        losses.mean().backward()
        if config.OUTER.CLIP_NORM:
            for group in self.optimiser.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], config.OUTER.CLIP_NORM)
        self.optimiser.step()
        return losses.mean().item()

    def _regulate(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.regulator(gradients) if self.regulator is not None else gradients

    def _recorded_regulate(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        norms = [gradients[kind].detach().flatten(1).norm(dim=1) for kind in sorted(gradients)]
        self.norms.append(torch.stack(norms, dim=1).cpu())  # (B, kinds)
        return self._regulate(gradients)

    def _set_learning_rates(self, step: int) -> None:
        """A function of the step alone, so that a resumed run has the same."""
        config = self.config.OUTER
        share = 0.5 * (1 + math.cos(math.pi * (step - 1) / config.STEPS)) if config.COSINE else 1.0
        for group in self.optimiser.param_groups:
            group["lr"] = share * group["full_lr"]

    def _check_finite(self, losses: Tensor, step: int, tasks: Sequence[Task]) -> None:
        bad = (~losses.detach().isfinite()).nonzero().flatten().tolist()
        if bad:
            number = (step - 1) * self.config.OUTER.BATCH + bad[0]
            raise GramError(
                f"meta-training: expected a finite loss, found {losses[bad[0]].item()} at step {step} in task {number} "
                f"({', '.join(tasks[bad[0]].words)}); the last good checkpoint is {self.out / LAST}"
            )

    # --- held-out tasks -----------------------------------------------------------------------------------------------

    def _watch(self, step: int, scalars: Callable[[str, float, int], None], log: Any, bar: tqdm) -> None:
        """Look at the held-out tasks, log, and keep theta and phi if they are the best so far."""
        seen = evaluate(self.tasks, self.watched, self.theta, self.regulator, self.config)
        for key, value in seen.items():
            scalars(f"held_out/{key}", value, step)
        log.write(json.dumps({"step": step, **seen}) + "\n")
        log.flush()
        bar.set_postfix(loss=f"{seen['loss_after']:.3f}", acc=f"{100 * seen['accuracy_after']:.1f}%")
        if not math.isfinite(seen["loss_after"]):
            raise GramError(
                f"meta-training: expected a finite loss on the held-out tasks, found {seen['loss_after']} after step {step}; "
                f"the last good checkpoint is {self.out / LAST}"
            )
        self._save_checkpoint(LAST, step, seen)
        if not self.best or seen["loss_after"] < self.best["loss_after"]:
            self.best = {"step": step, **seen}
            self._save_checkpoint(BEST, step, seen)

    # --- files --------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, name: str, step: int, seen: Mapping[str, float]) -> None:
        save_meta_checkpoint(
            self.out / name,
            MetaCheckpoint(
                prompts=dict(self.theta),
                regulator=self.regulator,
                backbone_name=self.backbone.name,
                backbone_fingerprint=self.backbone.fingerprint,
                config=as_dict(self.config),
                provenance=self._facts() | {"step": step, "held_out": dict(seen)},
                gradient_norms=self._norm_quantiles(),
            ),
        )

    def _norm_quantiles(self) -> dict[str, dict[str, float]]:
        if not self.norms:
            return {}
        norms = torch.cat(self.norms)  # (tasks so far, kinds)
        return {
            kind: {f"q{q:02d}": norms[:, i].quantile(q / 100).item() for q in (5, 25, 50, 75, 95)}
            for i, kind in enumerate(sorted(self.theta))
        }

    def _facts(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "store": self.store.fingerprint,
            "hierarchy": self.hierarchy.fingerprint,
            "topics": len(self.hierarchy.topics),
            "held_out_topics": self.held_topics,
        }

    def _run_facts(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        return json.loads(json.dumps({"config": as_dict(self.config), **self._facts()}))

    def _begin(self) -> int:
        if (self.out / _FACTS).exists():
            raise GramError(
                f"{self.out}: expected an empty folder, found a meta-training run; --resume goes on with it"
            )
        write_json(self.out / _FACTS, self._run_facts())
        return 0

    def _resume(self) -> int:
        """Put back theta, phi, optimiser and records; returns the last finished step."""
        before = read_json(self.out / _FACTS)
        now = self._run_facts()
        for key in now:
            if before.get(key) != now[key]:
                raise GramError(
                    f"{self.out}: expected the same {_first_difference(key, before.get(key), now[key])}"
                )
        if not (self.out / _STATE).exists():
            return 0  # interrupted before the first state
        state = torch.load(self.out / _STATE, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for kind, value in state["theta"].items():
                self.theta[kind].copy_(value)
        if self.regulator is not None:
            self.regulator.load_state_dict(state["regulator"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.norms = [state["norms"]] if len(state["norms"]) else []
        self.best = state["best"]
        return int(state["step"])

    def _save_state(self, step: int) -> None:
        state = {
            "step": step,
            "theta": {kind: value.detach() for kind, value in self.theta.items()},
            "regulator": self.regulator.state_dict() if self.regulator is not None else {},
            "optimiser": self.optimiser.state_dict(),
            "norms": torch.cat(self.norms) if self.norms else torch.empty(0, len(self.theta)),
            "best": self.best,
        }
        with atomic_write(self.out / _STATE) as file:
            torch.save(state, file)

    def _log_file(self, first: int) -> Any:
        """log.jsonl, without lines past the step that a resumed run starts from (they will be written again)."""
        path = self.out / _LOG
        kept = []
        if first and path.exists():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= first]
        with atomic_write(path, "w") as file:
            file.writelines(line + "\n" for line in kept)
        return open(path, "a", encoding="utf-8")

    # --- parts --------------------------------------------------------------------------------------------------------

    def _sampler(self, topics: Sequence[int], seed: int, without: np.ndarray | None) -> TaskSampler:
        tasks = self.config.TASKS
        return TaskSampler(
            self.hierarchy,
            tasks.WAYS,
            tasks.SUPPORT_SHOTS,
            tasks.QUERY_SHOTS,
            seed,
            topics,
            tasks.DOMAIN_SHIFT,
            without,
        )

    def _regulator(self) -> GradientRegulator | None:
        settings = self.config.REGULATOR
        if not (settings.ENABLED and self.config.OUTER.META):
            return None
        form = RegulatorConfig(settings.START, settings.GAMMA, settings.INPUT, settings.BETA)
        widths = {kind: value.shape[-1] for kind, value in self.theta.items()}
        generator = torch.Generator().manual_seed(self.config.SEED)
        return GradientRegulator(widths, form, generator).to(self.backbone.device)

    def _optimiser(self) -> torch.optim.Optimizer:
        config = self.config.OUTER
        kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        if config.OPTIMIZER not in kinds:
            raise GramError(f"OUTER.OPTIMIZER: expected {' or '.join(kinds)}, found {config.OPTIMIZER!r}")
        groups: list[dict[str, Any]] = [{"params": list(self.theta.values()), "full_lr": config.LR_PROMPT}]
        if self.regulator is not None:
            learnt = [p for p in self.regulator.parameters() if p.requires_grad]
            groups.append({"params": learnt, "full_lr": config.LR_REGULATOR})
        return kinds[config.OPTIMIZER](groups, lr=config.LR_PROMPT)


def evaluate(
    tasks: FeatureTasks,
    watched: Sequence[Task],
    theta: Mapping[str, Tensor],
    regulator: GradientRegulator | None,
    config: CfgNode,
    batch: int = 16,
) -> dict[str, float]:
    """What adaptation does on given tasks, averaged over them.

    Returns:
        `loss_before`, `accuracy_before`, `loss_after`, `accuracy_after` on the query sets; `alignment` and
        `alignment_raw`, the normalised inner product at theta of the query gradient with the regulated and with the raw
        support gradient (Fig. 3b, Eq. 12); and per kind of prompt the path lengths of both terms of Eq. 6 in one step
        (`path_gated_KIND`, `path_beta_KIND`), how much gamma and beta vary over tasks (`spread_gamma_KIND`,
        `spread_beta_KIND`: standard deviation over tasks, averaged over entries), `gradient_norm_KIND`.
    """
    rows: list[dict[str, Tensor]] = []
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {kind: [] for kind in theta}
    for start in range(0, len(watched), batch):
        support, query = tasks.losses(watched[start : start + batch])
        count = min(batch, len(watched) - start)
        before = {
            kind: value.detach().requires_grad_() for kind, value in for_each_task(theta, count).items()
        }
        raw = task_gradients(support, before)
        query_scores = query.logits(before)
        query_gradient = task_gradients(lambda _: query.losses_of(query_scores), before)  # noqa: B023, used at once
        with torch.no_grad():
            regulated = raw if regulator is None else regulator(raw)
        after = adapt(support, before, config.INNER.ALPHA, config.INNER.STEPS, regulator, first_order=True)
        with torch.no_grad():
            after_scores = query.logits(after)
            rows.append({
                "loss_before": query.losses_of(query_scores),
                "accuracy_before": query.accuracies_of(query_scores),
                "loss_after": query.losses_of(after_scores),
                "accuracy_after": query.accuracies_of(after_scores),
                "alignment": inner_products(regulated, query_gradient),
                "alignment_raw": inner_products(raw, query_gradient),
            })  # fmt: skip
            for kind, gradient in raw.items():
                rows[-1][f"gradient_norm_{kind}"] = gradient.flatten(1).norm(dim=1)
                if regulator is not None:
                    piece = regulator.parts(kind, gradient)
                    rows[-1][f"path_gated_{kind}"] = config.INNER.ALPHA * piece.gated.flatten(1).norm(dim=1)
                    rows[-1][f"path_beta_{kind}"] = config.INNER.ALPHA * piece.beta.flatten(1).norm(dim=1)
                    parts[kind].append((piece.gamma, piece.beta))
    seen = {key: torch.cat([row[key] for row in rows]).mean().item() for key in rows[0]}
    for kind, pieces in parts.items():
        if pieces:
            gammas, betas = (torch.cat(values) for values in zip(*pieces, strict=True))  # (tasks, M, d)
            seen[f"spread_gamma_{kind}"] = gammas.std(dim=0).mean().item()
            seen[f"spread_beta_{kind}"] = betas.std(dim=0).mean().item()
    return seen


def _first_difference(key: str, before: Any, now: Any) -> str:
    """Where two runs part, in words: the deepest key, with both values."""
    while isinstance(before, dict) and isinstance(now, dict):
        name = next((k for k in sorted({*before, *now}) if before.get(k) != now.get(k)), None)
        if name is None:
            break
        key, before, now = f"{key}.{name}", before.get(name), now.get(name)
    return f"{key} as in the run to resume, {before!r}, found {now!r}"


class _scalar_writer:
    """TensorBoard scalars where tensorboard is installed; `with` gives write(tag, value, step)."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=purge_step or None)

    def __enter__(self) -> Callable[[str, float, int], None]:
        return self.writer.add_scalar

    def __exit__(self, *_: object) -> None:
        self.writer.close()
