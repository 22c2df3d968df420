"""Meta-trainings of one seed, or of several (SEEDS), whose tasks go through the towers as one batch.

Each seed is a meta-training of its own, in a folder of its own, and equals the run with that SEED to rounding: it has
its own tasks, held-out topics, theta, phi, optimiser, log and checkpoints. Only the passes through the frozen towers
are shared. On a GPU, where launches cost the time, a step of several seeds costs little more than a step of one.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from yacs.config import CfgNode

from gram_meta.backbone.clip import Backbone
from gram_meta.clustering.hierarchy import Hierarchy
from gram_meta.config import flatten
from gram_meta.corpus.store import PairStore
from gram_meta.files import PathLike
from gram_meta.locks import only_writer
from gram_meta.method.bilevel import Prompts, Regulate, adapted_losses, for_each_task
from gram_meta.method.episodes import Episode
from gram_meta.method.memory_plan import MemoryConfig, plan
from gram_meta.method.meta_files import BEST
from gram_meta.method.meta_run import MetaLog, Stopped
from gram_meta.method.meta_trainer import MetaTrainer
from gram_meta.method.outer import BatchResult, parameters_of, unscale
from gram_meta.method.recorded import RecordedSteps
from gram_meta.method.tasks import StepTasks
from gram_meta.processes import ALONE, ProcessGroup

logger = logging.getLogger("gram")


Trainer = TypeVar("Trainer", MetaTrainer, "SeedsTrainer")


def open_trainer(
    kind: type[Trainer],
    store: PathLike,
    hierarchy: PathLike,
    out: PathLike,
    config: CfgNode,
    device: str | torch.device = "cpu",
    progress: bool = True,
    group: ProcessGroup = ALONE,
    backbone: Backbone | None = None,
) -> Trainer:
    """Open a store and a hierarchy, and return a trainer for them.

    Args:
        kind: `MetaTrainer`, or `SeedsTrainer` for one run for each of SEEDS, in OUT/seed1, OUT/seed2, ...
        store, hierarchy: folders written by `gram embed` and `gram cluster`.
        out: the run folder (`meta_run`).
        config: settings; of the node CHC, those that made the hierarchy are used and recorded instead, with a note.
        group: the processes that share the tasks of each step.
        backbone: the CLIP that BACKBONE.NAME names, if it is loaded.

    Raises:
        GramError: inputs that do not belong together, or too few topics.
    """

    def make() -> Trainer:
        opened = open_inputs(store, hierarchy, config.BACKBONE.NAME)
        used = opened[1].settings_used(config)
        if group.is_first and used is not config:
            logger.info(_clustered_otherwise(hierarchy, config, used))
        shown = progress and group.is_first
        return kind(*opened, Path(out), used, device=device, progress=shown, group=group, backbone=backbone)

    return group.make_on_all_ranks(make)


def _clustered_otherwise(hierarchy: PathLike, given: CfgNode, used: CfgNode) -> str:
    """Return a line with the settings of CHC in which a hierarchy differs from those given."""
    there = flatten(given)
    others = [f"{key} {value!r}, not {there[key]!r}" for key, value in flatten(used).items() if value != there[key]]
    return f"{hierarchy}: was made with {'; '.join(others)}; the run records the settings of its hierarchy"


def open_inputs(store: PathLike, hierarchy: PathLike, backbone: str) -> tuple[PairStore, Hierarchy]:
    """Open a store and a hierarchy of it; raise a `GramError` for a backbone whose name or width does not fit."""
    opened = PairStore.open(store), Hierarchy.open(hierarchy)
    opened[0].check_backbone_name(backbone)
    opened[1].check_store(opened[0])
    return opened


class SeedsTrainer:
    """The meta-trainers of several seeds, which take each step together; arguments as for `MetaTrainer`."""

    def __init__(self, store: PairStore, hierarchy: Hierarchy, out: Path, config: CfgNode, **options: Any) -> None:
        self.out = out
        self.trainers: list[MetaTrainer] = []
        for seed in config.SEEDS:
            settings = config.clone()
            settings.defrost()
            settings.SEED, settings.SEEDS = seed, ()
            settings.freeze()
            self.trainers.append(MetaTrainer(store, hierarchy, out / f"seed{seed}", settings, **options))
            # one bar shows the progress of all, and all share the first one's backbone
            options |= {"progress": False, "backbone": self.trainers[0].backbone}
        self.recorded: RecordedSteps | None = None
        if self.trainers[0].records:
            parameters = [one for trainer in self.trainers for one in parameters_of(trainer.optimiser)]
            self.recorded = RecordedSteps(partial(self.add_gradients, self.trainers), parameters)

    def run(self, resume: bool = False) -> list[Path]:
        """Train all seeds to the last step and return the paths of their best checkpoints.

        Prompts that need pixels, runs on several processes, prompt pre-training and batches that do not fit in memory
        at once are trained one seed after the other.
        """
        with ExitStack() as locks:
            for trainer in self.trainers:
                locks.enter_context(only_writer(trainer.folder.out, trainer.group.is_first))
            return self._run(resume)

    def _run(self, resume: bool) -> list[Path]:
        if not self._fits_together():
            logger.info("meta-training: one seed after the other")
            return [trainer.run(resume) for trainer in self.trainers]
        lead = self.trainers[0]
        firsts = [trainer.begin(resume) for trainer in self.trainers]
        with lead.sigterm, ExitStack() as stack:
            logs = []
            for trainer, first in zip(self.trainers, firsts, strict=True):
                log = trainer.folder.log(first, trainer.outer.steps, trainer.outer.batch, trainer.progress)
                logs.append(stack.enter_context(log))
                if first == 0:
                    trainer.evaluate(0, logs[-1])
            for step in range(min(firsts) + 1, lead.outer.steps + 1):
                behind = [index for index, first in enumerate(firsts) if first < step]  # after a kill between two saves
                self.step(step, [self.trainers[index] for index in behind])
                for index in behind:
                    self.trainers[index].record(step, logs[index])
                if lead.sigterm.received and step < lead.outer.steps:
                    self._stop(step, logs)
        return [trainer.folder.out / BEST for trainer in self.trainers]

    def step(self, step: int, trainers: Sequence[MetaTrainer]) -> None:
        """Move theta and phi of these trainers once."""
        lead = trainers[0]
        batch = lead.outer.batch
        tasks = [task for it in trainers for task in StepTasks(it.train_tasks, batch, step - 1, step, lead.own)[0]]
        for trainer in trainers:
            trainer.optimiser.zero_grad(set_to_none=True)
        replays = self.recorded if len(trainers) == len(self.trainers) else None
        add_gradients = replays or partial(self.add_gradients, trainers)
        losses, norms = add_gradients(next(lead.episodes.of([tasks])))
        results = zip(losses.split(batch), norms.split(batch, dim=1), strict=True)
        for trainer, own in zip(trainers, results, strict=True):
            trainer.finish_step(step, BatchResult(*own))

    def add_gradients(self, trainers: Sequence[MetaTrainer], episode: Episode) -> BatchResult:
        """Add each trainer's meta-gradients to `.grad`; the episode has the tasks of one after those of the other."""
        lead = trainers[0]
        batch = lead.outer.batch
        starts = [for_each_task(trainer.theta, batch) for trainer in trainers]
        prompts = {kind: torch.cat([theta[kind] for theta in starts]) for kind in lead.theta}  # (V B, M, d)
        inner = replace(lead.inner, regulate=_by_seed(trainers, batch) if lead.regulator is not None else None)
        seen = adapted_losses(episode.support, episode.query, prompts, inner)
        total = seen.losses.sum() / batch  # seeds share no parameter: each has the gradient of its own mean
        (total * inner.scale).backward()
        unscale([one for trainer in trainers for one in parameters_of(trainer.optimiser)], inner.scale)
        return BatchResult.of(seen, lead.kinds)

    def _fits_together(self) -> bool:
        """Return whether one graph holds a step of all seeds."""
        lead, memory = self.trainers[0], MemoryConfig.from_config(self.trainers[0].config)
        tasks = len(self.trainers) * lead.outer.batch
        whole = plan(memory, lead.backbone, tasks, memory.bytes_on(lead.backbone.device))
        alone = lead.group.size == 1 and not lead.episodes.reads_pixels
        return alone and lead.outer.meta and not whole.lean and whole.tasks >= tasks

    def _stop(self, step: int, logs: Sequence[MetaLog]) -> None:
        for trainer, log in zip(self.trainers, logs, strict=True):
            trainer.read(log)
            trainer.save(step)
        raise Stopped(f"{self.out}: stopped by SIGTERM after step {step} of all seeds; --resume goes on")


def _by_seed(trainers: Sequence[MetaTrainer], batch: int) -> Regulate:
    """Return the function that passes each seed's gradients, `batch` rows of (V B, M, d), through its own R^phi."""

    def regulate(raw: Prompts) -> Prompts:
        rows = {kind: value.split(batch) for kind, value in raw.items()}
        parts = [
            trainer.regulator.regulate_known({kind: value[index] for kind, value in rows.items()})
            for index, trainer in enumerate(trainers)
            if trainer.regulator is not None
        ]
        return {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}

    return regulate
