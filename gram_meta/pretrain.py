"""Meta-training: Algorithm 1 over tasks from a hierarchy.

The loop is `MetaTrainer.run`. A step draws B tasks, adapts theta to each support set through R^phi (Eq. 7), and moves
theta and phi down the gradient of the query losses (Eq. 8, 9). Every few steps the same held-out tasks are looked at, and
the theta and phi with the lowest query loss after adaptation on them are the ones to keep.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from yacs.config import CfgNode

from gram_meta import __version__
from gram_meta.backbone import load_backbone
from gram_meta.bilevel import adapt, descend, for_each_task, inner_products, meta_losses, task_gradients
from gram_meta.checkpoint import MetaCheckpoint, save_meta_checkpoint
from gram_meta.clustering.hierarchy import Hierarchy
from gram_meta.config import INCIDENTAL, as_dict, stored_config
from gram_meta.corpus.store import PairStore
from gram_meta.episodes import Episode, Episodes, initial_theta
from gram_meta.errors import GramError
from gram_meta.files import PathLike, atomic_write, read_json, write_json
from gram_meta.prompts import KINDS
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
        self.config, self.out, self.progress = config, out, progress
        self.backbone = load_backbone(config.BACKBONE.NAME, device, config.BACKBONE.PRECISION)
        store.check_backbone(self.backbone)
        hierarchy.check_store(store)
        _check_labelled(hierarchy, config.CHC.LABELLED)
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
        self.episodes = Episodes(self.backbone, store, words, config)

        self.theta = initial_theta(self.backbone, config)
        self.kinds = sorted(set(self.theta) & set(KINDS))  # the prompts; the rest stays out of R^phi
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
            ahead = _Timed(self.episodes.of(_Steps(self.train_tasks, self.config.OUTER.BATCH, first, steps)))
            for step, episode in enumerate(ahead, start=first + 1):
                loss = self._step(step, episode)
                bar.update(self.config.OUTER.BATCH)
                scalars("meta_train/query_loss", loss, step)
                if step % self.config.EVAL.EVERY == 0 or step == steps:
                    self._watch(step, scalars, log, bar)
                if step % self.config.CHECKPOINT.EVERY == 0 or step == steps:
                    self._save_state(step)
            bar.close()
        if self.episodes.reads_pixels and first < steps:
            logger.info(f"the towers waited {100 * ahead.share():.1f} % of the time for images (LOADER.WORKERS)")
        return self.out / BEST

    def _step(self, step: int, episode: Episode) -> float:
        """One update of theta and phi; returns the mean query loss after adaptation."""
        config = self.config
        tasks, support, query = episode.tasks, episode.support, episode.query
        self._set_learning_rates(step)
        if config.OUTER.META:
            losses = meta_losses(
                support, query, self.theta, len(tasks), config.INNER.ALPHA, config.INNER.STEPS,
                self._recorded_regulate, config.INNER.FIRST_ORDER,
            )  # fmt: skip
        else:  # plain pre-training on the query sets, which hold all domains; no inner loop (Table 6, row 3)
            losses = query(for_each_task(self.theta, len(tasks)))
        self._check_finite(losses, step, tasks)
        self.optimiser.zero_grad(set_to_none=True)
        losses.mean().backward()
        if config.OUTER.CLIP_NORM:
            for group in self.optimiser.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], config.OUTER.CLIP_NORM)
        self.optimiser.step()
        return losses.mean().item()

    def _recorded_regulate(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        norms = [gradients[kind].detach().flatten(1).norm(dim=1) for kind in self.kinds]
        self.norms.append(torch.stack(norms, dim=1).cpu())  # (B, kinds)
        return {} if self.regulator is None else self.regulator.of_known(gradients)

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
        seen = evaluate(self.episodes, self.watched, self.theta, self.regulator, self.config)
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
                prompts={kind: self.theta[kind] for kind in self.kinds},
                extras={name: value for name, value in self.theta.items() if name not in self.kinds},
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
            for i, kind in enumerate(self.kinds)
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
        before, now = read_json(self.out / _FACTS), self._run_facts()
        if "config" in before:  # a key that is newer than the run had its default in it
            before["config"] = json.loads(json.dumps(as_dict(stored_config(before["config"]))))
        for facts in (before, now):
            facts.get("config", {}).pop(INCIDENTAL, None)
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
            "norms": torch.cat(self.norms) if self.norms else torch.empty(0, len(self.kinds)),
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
        widths = {kind: self.theta[kind].shape[-1] for kind in self.kinds}
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


class _Timed:
    """An iterator that knows which share of the time since its first item was spent waiting for the next one.

    The first item is not counted: worker processes have to start.
    """

    def __init__(self, items: Iterator[Episode]) -> None:
        self.items = items
        self.begun = self.waited = 0.0

    def __iter__(self) -> Iterator[Episode]:
        asked = 0.0
        for item in self.items:
            now = time.perf_counter()
            if self.begun:
                self.waited += now - asked
            else:
                self.begun = now
            yield item
            asked = time.perf_counter()

    def share(self) -> float:
        return self.waited / max(time.perf_counter() - self.begun, 1e-9)


class _Steps:
    """The batches of tasks of meta-training from after step `first` to step `last`, drawn when they are asked for."""

    def __init__(self, sampler: TaskSampler, batch: int, first: int, last: int) -> None:
        self.sampler, self.batch, self.first, self.last = sampler, batch, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> list[Task]:
        return self.sampler.draw_batch((self.first + index) * self.batch, self.batch)


def evaluate(
    episodes: Episodes,
    watched: Sequence[Task],
    theta: Mapping[str, Tensor],
    regulator: GradientRegulator | None,
    config: CfgNode,
) -> dict[str, float]:
    """What adaptation does on given tasks, averaged over them.

    Returns:
        `loss_before`, `accuracy_before`, `loss_after`, `accuracy_after` on the query sets; `alignment` and
        `alignment_raw`, the normalised inner product at theta of the query gradient with the regulated and with the raw
        support gradient (Fig. 3b, Eq. 12), over all prompts; and per kind of prompt the path lengths of both terms of
        Eq. 6 in one step (`path_gated_KIND`, `path_beta_KIND`), how much gamma and beta vary over tasks
        (`spread_gamma_KIND`, `spread_beta_KIND`: standard deviation over tasks, averaged over entries),
        `gradient_norm_KIND`.
    """
    kinds = sorted(set(theta) & set(KINDS))
    batch = episodes.at_a_time
    rows: list[dict[str, Tensor]] = []
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {kind: [] for kind in kinds}
    for episode in episodes.of([watched[i : i + batch] for i in range(0, len(watched), batch)]):
        support, query = episode.support, episode.query
        before = {
            name: value.detach().requires_grad_()
            for name, value in for_each_task(theta, len(episode.tasks)).items()
        }
        raw = task_gradients(support, before)
        query_scores = query.logits(before)
        query_gradient = task_gradients(lambda _: query.losses_of(query_scores), before)  # noqa: B023, used at once
        regulate = None if regulator is None else torch.no_grad()(regulator.of_known)
        regulated = raw if regulate is None else {**raw, **regulate(raw)}
        after = {
            name: value.requires_grad_()
            for name, value in descend(before, regulated, config.INNER.ALPHA).items()
        }
        if config.INNER.STEPS > 1:
            after = adapt(
                support, after, config.INNER.ALPHA, config.INNER.STEPS - 1, regulate, first_order=True
            )
        with torch.no_grad():
            after_scores = query.logits(after)
            row = {
                "loss_before": query.losses_of(query_scores),
                "accuracy_before": query.accuracies_of(query_scores),
                "loss_after": query.losses_of(after_scores),
                "accuracy_after": query.accuracies_of(after_scores),
                "alignment": inner_products(_only(regulated, kinds), _only(query_gradient, kinds)),
                "alignment_raw": inner_products(_only(raw, kinds), _only(query_gradient, kinds)),
            }
            for kind in kinds:
                row[f"gradient_norm_{kind}"] = raw[kind].flatten(1).norm(dim=1)
                if regulator is not None:
                    piece = regulator.parts(kind, raw[kind])
                    row[f"path_gated_{kind}"] = config.INNER.ALPHA * piece.gated.flatten(1).norm(dim=1)
                    row[f"path_beta_{kind}"] = config.INNER.ALPHA * piece.beta.flatten(1).norm(dim=1)
                    parts[kind].append((piece.gamma, piece.beta))
            rows.append({key: value.detach() for key, value in row.items()})
    seen = {key: torch.cat([row[key] for row in rows]).mean().item() for key in rows[0]}
    for kind, pieces in parts.items():
        if pieces:
            gammas, betas = (torch.cat(values) for values in zip(*pieces, strict=True))  # (tasks, M, d)
            seen[f"spread_gamma_{kind}"] = gammas.std(dim=0).mean().item()
            seen[f"spread_beta_{kind}"] = betas.std(dim=0).mean().item()
    return seen


def _only(gradients: Mapping[str, Tensor], kinds: Sequence[str]) -> dict[str, Tensor]:
    return {kind: gradients[kind] for kind in kinds}


def _check_labelled(hierarchy: Hierarchy, wanted: bool) -> None:
    """CHC.LABELLED goes into the checkpoint and says which row of Table 6 it belongs to, so it has to be true."""
    if bool(hierarchy.manifest.get("labelled")) != wanted:
        found = "labelled classes" if not wanted else "topics found by clustering"
        raise GramError(
            f"CHC.LABELLED is {wanted}: expected a hierarchy of "
            f"{'labelled classes' if wanted else 'topics found by clustering'}, found one of {found}"
        )


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
