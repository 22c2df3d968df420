"""Meta-training: Algorithm 1 over tasks from a hierarchy.

The loop is `MetaTrainer.run`. A step draws B tasks, adapts theta to each support set through R^phi (Eq. 7), and moves
theta and phi down the gradient of the query losses (Eq. 8, 9). Every few steps the same held-out tasks are looked at, and
the theta and phi with the lowest query loss after adaptation on them are the ones to keep.

Several processes (`torchrun`) share a step's tasks: each adapts its own, and the sums of their gradients meet in one
exchange, after which all of them take the same step. Only the first process writes files.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from yacs.config import CfgNode

from gram_meta import __version__
from gram_meta.backbone.clip import load_backbone
from gram_meta.clustering.hierarchy import Hierarchy
from gram_meta.config import INCIDENTAL, as_dict, stored_config
from gram_meta.corpus.store import PairStore
from gram_meta.errors import GramError
from gram_meta.files import PathLike, atomic_write, read_json, write_json
from gram_meta.method.bilevel import (
    InnerLoop,
    MetaLosses,
    for_each_task,
    inner_path,
    inner_products,
    lean_backward,
    meta_losses,
    norms_by_task,
    task_gradients,
    total_of,
)
from gram_meta.method.checkpoint import MetaCheckpoint, save_meta_checkpoint
from gram_meta.method.episodes import Episode, Episodes, TaskSet, initial_theta
from gram_meta.method.memory_plan import Plan, budget_of, plan
from gram_meta.method.profiling import EVALUATION, EXCHANGE, OPTIMISER, WAITING, Profile
from gram_meta.method.prompts import KINDS
from gram_meta.method.regulator import GradientRegulator, RegulatorConfig
from gram_meta.method.tasks import Task, TaskSampler, images_of, split_topics
from gram_meta.processes import ALONE, ProcessGroup

logger = logging.getLogger("gram")

BEST = "best.safetensors"
LAST = "last.safetensors"
_STATE = "state.pt"
_FACTS = "run.json"
_LOG = "log.jsonl"
_PROFILE = "profile.json"


class Stopped(Exception):
    """SIGTERM came; the step was finished and the state saved, so that --resume goes on from there."""


def pretrain(
    store: PathLike,
    hierarchy: PathLike,
    out: PathLike,
    config: CfgNode,
    device: str | torch.device = "cpu",
    resume: bool = False,
    progress: bool = True,
    job: ProcessGroup = ALONE,
    profile: int = 0,
) -> Path:
    """Meta-train on a corpus and write the meta-checkpoint.

    Args:
        store, hierarchy: folders written by `gram embed` and `gram cluster`.
        out: folder for `best.safetensors`, `last.safetensors`, `log.jsonl`, TensorBoard scalars and the state to resume.
        config: settings (`gram_meta.config`).
        resume: go on from the state in `out`; the final weights equal an uninterrupted run's.
        job: the processes that share the tasks of each step (`processes.process_group`).
        profile: steps to take for `profile.json`, which says where their time goes; nothing else is written then.

    Returns:
        The path of `best.safetensors`, or of `profile.json`.

    Raises:
        GramError: inputs that do not belong together, too few topics, a folder that holds another run, or a loss that is
            not finite (the message names the step and the task).
        Stopped: after SIGTERM.
    """

    def made() -> MetaTrainer:
        opened = PairStore.open(store), Hierarchy.open(hierarchy)
        return MetaTrainer(*opened, Path(out), config, device, progress and job.is_first, job)

    trainer = job.make_on_all_ranks(made)
    return trainer.run_profile(profile) if profile else trainer.run(resume)


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
        job: ProcessGroup = ALONE,
    ) -> None:
        self.config, self.out, self.progress, self.job = config, out, progress, job
        if config.OUTER.BATCH < job.size:
            raise GramError(
                f"OUTER.BATCH: expected at least one task a step for each of {job.size} processes, found {config.OUTER.BATCH}"
            )
        self.backbone = load_backbone(config.BACKBONE.NAME, device, config.BACKBONE.PRECISION)
        self.backbone.checkpointing = config.MEMORY.CHECKPOINTING
        store.check_backbone(self.backbone)
        hierarchy.check_store(store)
        _check_labelled(hierarchy, config.CHC.LABELLED)
        self.store, self.hierarchy = store, hierarchy

        self.train_topics, self.held_topics = split_topics(
            hierarchy, config.TASKS.HELD_OUT, config.TASKS.WAYS, config.SEED
        )
        self.train_tasks = self._sampler(self.train_topics, config.SEED, images_of(hierarchy, self.held_topics))
        held = self._sampler(self.held_topics, config.SEED + 1, None)
        self.watched = [held.draw(number) for number in job.share_range(config.EVAL.TASKS)]
        words = [topic.word for topic in hierarchy.topics]
        self.episodes = Episodes(self.backbone, store, words, config)
        self.own = job.share_range(config.OUTER.BATCH)  # this process's tasks of a batch
        self.plan = plan(config, self.backbone, len(self.own), budget_of(config, self.backbone.device))

        self.theta = initial_theta(self.backbone, config)
        self.kinds = sorted(set(self.theta) & set(KINDS))  # the prompts; the rest stays out of R^phi
        self.regulator = self._regulator()
        self.inner = InnerLoop.from_config(config, None if self.regulator is None else self.regulator.of_known)
        self.optimiser = self._optimiser()
        self.norms: list[Tensor] = []  # raw support gradients' norms, (B, kinds) for each inner step
        self.best: dict[str, float] = {}
        self.profile: Profile | None = None
        self.asked = _Sigterm()

    # --- Algorithm 1 --------------------------------------------------------------------------------------------------

    def run(self, resume: bool = False) -> Path:
        """Train to the last step; returns the path of the best checkpoint."""
        steps = self.config.OUTER.STEPS
        first = self._resume() if resume else self._begin()
        if self.episodes.reads_pixels or self.plan.lean:
            logger.info(f"meta-training: {self.plan} (MEMORY)")
        with (
            self.asked,
            _scalar_writer(self.out / "tensorboard", first, self.job.is_first) as scalars,
            self._log_file(first) as log,
            self._bar(first) as bar,
        ):
            if first == 0:
                self._watch(0, scalars, log, bar)
            ahead = _Timed(self._episodes(first, steps))
            coming, saved = iter(ahead), first
            for step in range(first + 1, steps + 1):
                loss, stop = self._step(step, self._next(coming))
                if loss is None:  # a reader of images got the signal too
                    self._stop(step - 1, saved)
                bar.update(self.config.OUTER.BATCH)
                scalars("meta_train/query_loss", loss, step)
                if step % self.config.EVAL.EVERY == 0 or step == steps:
                    self._watch(step, scalars, log, bar)
                if step % self.config.CHECKPOINT.EVERY == 0 or step == steps:
                    self._save_state(step)
                    saved = step
                if stop and step < steps:
                    self._stop(step, saved)
        if self.episodes.reads_pixels and first < steps:
            logger.info(f"the towers waited {100 * ahead.share():.1f} % of the time for images (LOADER.WORKERS)")
        return self.out / BEST

    def run_profile(self, steps: int) -> Path:
        """Take some steps for their time alone, after two that are not counted; writes and prints where the time goes."""
        profile = Profile(self.backbone.device)
        warm = 2
        coming = iter(self._episodes(0, steps + warm))
        for step in range(1, warm + 1):
            self._step(step, next(coming))
        with profile.watching(self.backbone, self.regulator):
            self.profile = profile
            for step in range(warm + 1, warm + steps + 1):
                with profile.step():
                    with profile.region(WAITING):
                        episode = next(coming)
                    self._step(step, episode)
            with profile.region(EVALUATION):
                self._look()
        if self.job.is_first:
            print(profile.table())
            write_json(self.out / _PROFILE, profile.as_dict() | {"plan": str(self.plan), "processes": self.job.size})
        return self.out / _PROFILE

    def _episodes(self, first: int, last: int) -> Iterator[Episode]:
        batch = self.config.OUTER.BATCH
        return self.episodes.of(_Steps(self.train_tasks, batch, first, last, self.own))

    def _next(self, coming: Iterator[Episode]) -> Episode | None:
        """The next step's tasks; None where their readers have ended by the SIGTERM that came here as well."""
        try:
            return next(coming)
        except RuntimeError:
            if not self.asked.wanted:
                raise
            return None

    def _step(self, step: int, episode: Episode | None) -> tuple[float | None, bool]:
        """One update of theta and phi by all processes.

        Returns:
            The mean query loss after adaptation, None where the step was given up (in one process, so in all); and whether
            to stop behind it.
        """
        config = self.config
        self._set_learning_rates(step)
        self.optimiser.zero_grad(set_to_none=True)
        losses, norms = self._backward(episode) if episode is not None else self._nothing()
        losses, norms, given_up, stop = self._exchange(losses, norms, episode is None, self.asked.wanted)
        if given_up:
            return None, True
        self._check_finite(losses, step)
        if len(norms):
            self.norms.append(norms)
        with self._region(OPTIMISER):
            if config.OUTER.CLIP_NORM:
                for group in self.optimiser.param_groups:
                    torch.nn.utils.clip_grad_norm_(group["params"], config.OUTER.CLIP_NORM)
            self.optimiser.step()
        return losses.mean().item(), stop

    def _backward(self, episode: Episode) -> tuple[Tensor, Tensor]:
        """Add this process's part of the meta-gradient to `.grad`.

        Returns:
            The query losses (b,) of its tasks after adaptation, and the norms (inner steps, b, kinds) of their raw support
            gradients.
        """
        done = []
        for part in episode.parts(self.plan.tasks):
            if not self.config.OUTER.META:
                done.append(self._plain_losses(part))
            elif self.plan.lean:
                done.append(self._lean_losses(part))
            else:
                result = meta_losses(part.support, part.query, self.theta, len(part.tasks), self.inner)
                self._add_gradients(result.losses)
                done.append(result._replace(losses=result.losses.detach()))
        if self.inner.scale != 1 and not self.plan.lean:
            for parameter in self._parameters():
                if parameter.grad is not None:
                    parameter.grad /= self.inner.scale
        norms = [torch.stack([_by_kind(step, self.kinds) for step in each.norms]) for each in done if each.norms]
        losses = torch.cat([each.losses for each in done])
        return losses, torch.cat(norms, dim=1) if norms else losses.new_zeros(0, len(losses), len(self.kinds))

    def _lean_losses(self, part: Episode) -> MetaLosses:
        support, query = part.support.parts(self.plan.images), part.query.parts(self.plan.images)
        return lean_backward(support, query, self.theta, len(part.tasks), self.inner, 1 / self.config.OUTER.BATCH)

    def _plain_losses(self, part: Episode) -> MetaLosses:
        """Prompt pre-training on the query sets, which hold all domains; no inner loop (Table 6, row 3)."""
        pieces = []
        for some in part.query.parts(self.plan.images):
            losses = some(for_each_task(self.theta, len(part.tasks)))
            self._add_gradients(losses)
            pieces.append(losses.detach())
        return MetaLosses(torch.stack(pieces).sum(dim=0) if len(pieces) > 1 else pieces[0], [])

    def _add_gradients(self, losses: Tensor) -> None:
        """Add the gradients of the losses' sum over B, times the loss scale."""
        total = losses.sum() / self.config.OUTER.BATCH
        (total if self.inner.scale == 1 else total * self.inner.scale).backward()

    def _nothing(self) -> tuple[Tensor, Tensor]:
        """Gradients of zero, for a step that this process gives up, and no losses that anybody will look at."""
        for parameter in self._parameters():
            parameter.grad = torch.zeros_like(parameter)
        losses = torch.zeros(len(self.own), device=self.backbone.device)
        return losses, losses.new_zeros(0, len(self.own), len(self.kinds))

    def _exchange(self, losses: Tensor, norms: Tensor, given_up: bool, stop: bool) -> tuple[Tensor, Tensor, bool, bool]:
        """Sum the gradients over all processes; in the same exchange, everybody's losses, gradient norms and wishes.

        Returns:
            Losses (B,), norms (inner steps * B, kinds) on the CPU, whether anybody gives the step up, and whether anybody
            wants to stop.
        """
        if self.job.size == 1:
            return losses, norms.flatten(0, 1).cpu(), given_up, stop
        with self._region(EXCHANGE):
            gradients = [parameter.grad for parameter in self._parameters() if parameter.grad is not None]
            batch, steps = self.config.OUTER.BATCH, self.config.INNER.STEPS if self.config.OUTER.META else 0
            whole = gradients[0].new_zeros(2 + batch * (1 + steps * len(self.kinds)))
            wishes, theirs, all_norms = whole.split([2, batch, len(whole) - 2 - batch])
            all_norms = all_norms.view(steps, batch, len(self.kinds))
            mine = slice(self.own.start, self.own.stop)
            theirs[mine] = losses
            if len(norms):
                all_norms[:, mine] = norms
            wishes += torch.tensor([given_up, stop]).to(wishes)
            self.job.add([*gradients, whole])
            given_up, stop = (wishes > 0).tolist()
        return theirs, all_norms.flatten(0, 1).cpu(), given_up, stop

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimiser.param_groups for parameter in group["params"]]

    def _region(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.profile is None else self.profile.region(name)

    def _stop(self, step: int, saved: int) -> NoReturn:
        if step > saved:
            self._save_state(step)
        raise Stopped(
            f"{self.out}: stopped by SIGTERM after step {step} of {self.config.OUTER.STEPS}; --resume goes on"
        )

    def _set_learning_rates(self, step: int) -> None:
        """A function of the step alone, so that a resumed run has the same."""
        config = self.config.OUTER
        share = 0.5 * (1 + math.cos(math.pi * (step - 1) / config.STEPS)) if config.COSINE else 1.0
        for group in self.optimiser.param_groups:
            group["lr"] = share * group["full_lr"]

    def _check_finite(self, losses: Tensor, step: int) -> None:
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        if bad:
            number = (step - 1) * self.config.OUTER.BATCH + bad[0]
            self.job.fail(
                f"meta-training: expected a finite loss, found {losses[bad[0]].item()} at step {step} in task {number} "
                f"({', '.join(self.train_tasks.draw(number).words)}); the last good checkpoint is {self.out / LAST}"
            )
        if self.inner.scale != 1 and not all(p.grad.isfinite().all() for p in self._parameters() if p.grad is not None):
            self.job.fail(
                f"meta-training: expected finite gradients, found others at step {step}, under fp16 with losses scaled by "
                f"{self.inner.scale:g}; lower BACKBONE.LOSS_SCALE, or take BACKBONE.PRECISION bf16; the last good checkpoint is "
                f"{self.out / LAST}"
            )

    # --- held-out tasks -----------------------------------------------------------------------------------------------

    def _watch(self, step: int, scalars: Callable[[str, float, int], None], log: Any, bar: tqdm) -> None:
        """Look at the held-out tasks, log, and keep theta and phi if they are the best so far."""
        seen = self._look()
        for key, value in seen.items():
            scalars(f"held_out/{key}", value, step)
        log.write(json.dumps({"step": step, **seen}) + "\n")
        log.flush()
        bar.set_postfix(loss=f"{seen['loss_after']:.3f}", acc=f"{100 * seen['accuracy_after']:.1f}%")
        if not math.isfinite(seen["loss_after"]):
            self.job.fail(
                f"meta-training: expected a finite loss on the held-out tasks, found {seen['loss_after']} after step {step}; "
                f"the last good checkpoint is {self.out / LAST}"
            )
        self._save_checkpoint(LAST, step, seen)
        if not self.best or seen["loss_after"] < self.best["loss_after"]:
            self.best = {"step": step, **seen}
            self._save_checkpoint(BEST, step, seen)

    def _look(self) -> dict[str, float]:
        return evaluate(
            self.episodes, self.watched, self.theta, self.regulator, self.inner, self.config, self.plan, self.job
        )

    # --- files --------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, name: str, step: int, seen: Mapping[str, float]) -> None:
        if not self.job.is_first:
            return
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
        def begin() -> int:
            if (self.out / _FACTS).exists():
                raise GramError(
                    f"{self.out}: expected an empty folder, found a meta-training run; --resume goes on with it"
                )
            _clear_unfinished(self.out)
            write_json(self.out / _FACTS, self._run_facts())
            return 0

        return self.job.first(begin)

    def _resume(self) -> int:
        """Put back theta, phi, optimiser and records; returns the last finished step."""
        if not self.job.first((self.out / _FACTS).exists):
            logger.info(f"{self.out}: holds no meta-training yet; it begins")
            return self._begin()
        state = self.job.first(self._read_state)
        if state is None:
            return 0  # interrupted before the first state
        with torch.no_grad():
            for kind, value in state["theta"].items():
                self.theta[kind].copy_(value)
        if self.regulator is not None:
            self.regulator.load_state_dict(state["regulator"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.norms = [state["norms"]] if len(state["norms"]) else []
        self.best = state["best"]
        return int(state["step"])

    def _read_state(self) -> dict[str, Any] | None:
        _clear_unfinished(self.out)
        before, now = read_json(self.out / _FACTS), self._run_facts()
        if "config" in before:  # a key that is newer than the run had its default in it
            before["config"] = json.loads(json.dumps(as_dict(stored_config(before["config"]))))
        for facts in (before, now):
            for node in INCIDENTAL:
                facts.get("config", {}).pop(node, None)
        for key in now:
            if before.get(key) != now[key]:
                raise GramError(f"{self.out}: expected the same {_first_difference(key, before.get(key), now[key])}")
        if not (self.out / _STATE).exists():
            return None
        return torch.load(self.out / _STATE, map_location="cpu", weights_only=True)

    def _save_state(self, step: int) -> None:
        if not self.job.is_first:
            return
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
        if not self.job.is_first:
            return open(os.devnull, "w", encoding="utf-8")
        path = self.out / _LOG
        kept = []
        if first and path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= first]
        with atomic_write(path, "w") as file:
            file.writelines(line + "\n" for line in kept)
        return open(path, "a", encoding="utf-8")

    # --- parts --------------------------------------------------------------------------------------------------------

    def _bar(self, first: int) -> Any:
        batch = self.config.OUTER.BATCH
        return tqdm(
            total=self.config.OUTER.STEPS * batch,
            initial=first * batch,
            unit=" tasks",
            desc="meta-training",
            disable=not self.progress,
        )

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
        number = self.backbone.logit_scale.dtype  # float32; float64 with fp64 towers
        return GradientRegulator(widths, form, generator).to(self.backbone.device, number)

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


class _Sigterm:
    """Inside `with`, SIGTERM (Slurm sends it before the end of a job's time) is a wish to stop, kept in `wanted`."""

    wanted = False

    def __enter__(self) -> _Sigterm:
        self.here = threading.current_thread() is threading.main_thread()  # elsewhere signals cannot be caught
        if self.here:
            self.before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self.here:
            signal.signal(signal.SIGTERM, self.before)

    def _ask(self, *_: object) -> None:
        self.wanted = True


class _Steps:
    """What a process has of the batches of tasks from after step `first` to step `last`, drawn when they are asked for.

    Args:
        batch: B. own: which of a batch's tasks, of 0 to B - 1.
    """

    def __init__(self, sampler: TaskSampler, batch: int, first: int, last: int, own: range) -> None:
        self.sampler, self.batch, self.first, self.last, self.own = sampler, batch, first, last, own

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> list[Task]:
        return self.sampler.draw_batch((self.first + index) * self.batch + self.own.start, len(self.own))


def _by_kind(norms: Mapping[str, Tensor], kinds: Sequence[str]) -> Tensor:
    """Stack the norms (b,) of these kinds to (b, kinds)."""
    return torch.stack([norms[kind] for kind in kinds], dim=1)


def _step_of(line: str) -> float:
    """The step of a line of log.jsonl; one that was not written to its end comes after all steps."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def _clear_unfinished(out: Path) -> None:
    """Remove what a killed process had written of a file, beside its place."""
    for name in (BEST, LAST, _STATE, _FACTS, _LOG, _PROFILE):
        for path in out.glob(f".{name}.*.part"):
            path.unlink(missing_ok=True)


def evaluate(
    episodes: Episodes,
    watched: Sequence[Task],
    theta: Mapping[str, Tensor],
    regulator: GradientRegulator | None,
    inner: InnerLoop,
    config: CfgNode,
    plan: Plan | None = None,
    job: ProcessGroup = ALONE,
) -> dict[str, float]:
    """What adaptation does on given tasks, averaged over them.

    Args:
        watched: the tasks; with several processes, this one's.
        plan: how many tasks and images go through the towers at a time; None: `episodes.at_a_time` tasks.
        job: the processes that the averages are over.

    Returns:
        `loss_before`, `accuracy_before`, `loss_after`, `accuracy_after` on the query sets; `alignment` and
        `alignment_raw`, the normalised inner product at theta of the query gradient with the regulated and with the raw
        support gradient (Fig. 3b, Eq. 12), over all prompts; and per kind of prompt the path lengths of both terms of
        Eq. 6 in one step (`path_gated_KIND`, `path_beta_KIND`), how much gamma and beta vary over tasks
        (`spread_gamma_KIND`, `spread_beta_KIND`: standard deviation over tasks, averaged over entries),
        `gradient_norm_KIND`.
    """
    kinds = sorted(set(theta) & set(KINDS))
    batch, images = episodes.at_a_time, 0
    if plan is not None and (plan.lean or plan.tasks < config.OUTER.BATCH):
        batch, images = min(batch, plan.tasks), plan.images
    rows: list[dict[str, Tensor]] = []
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {kind: [] for kind in kinds}
    for episode in episodes.of([watched[i : i + batch] for i in range(0, len(watched), batch)]):
        support, query = episode.support.parts(images), episode.query.parts(images)
        before = {
            name: value.detach().requires_grad_() for name, value in for_each_task(theta, len(episode.tasks)).items()
        }
        query_scores, query_gradient = _scored_gradients(query, before, inner.scale)
        path = list(inner_path(support, before, inner))
        raw, first, after = path[0].raw, path[0].regulated, path[-1].after
        with torch.no_grad():
            after_scores = torch.cat([part.logits(after) for part in query], dim=1)
            row = {
                "loss_before": episode.query.losses_of(query_scores),
                "accuracy_before": episode.query.accuracies_of(query_scores),
                "loss_after": episode.query.losses_of(after_scores),
                "accuracy_after": episode.query.accuracies_of(after_scores),
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
    rows = [row for of_one in job.gather(rows) for row in of_one]
    seen = {key: torch.cat([row[key] for row in rows]).mean().item() for key in rows[0]}
    for kind in kinds:
        pieces = [piece for of_one in job.gather(parts[kind]) for piece in of_one]
        if pieces:
            gammas, betas = (torch.cat(values) for values in zip(*pieces, strict=True))  # (tasks, M, d)
            seen[f"spread_gamma_{kind}"] = gammas.std(dim=0).mean().item()
            seen[f"spread_beta_{kind}"] = betas.std(dim=0).mean().item()
    return seen


def _scored_gradients(
    parts: Sequence[TaskSet], prompts: Mapping[str, Tensor], scale: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (B, K n, K) of all parts of a side, and the gradient of its loss."""
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

    def __init__(self, folder: Path, purge_step: int, writes: bool) -> None:
        self.writer: Any = None
        if writes:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=purge_step or None)

    def __enter__(self) -> Callable[[str, float, int], None]:
        return (lambda *_: None) if self.writer is None else self.writer.add_scalar

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.close()
