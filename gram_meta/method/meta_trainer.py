"""Meta-training: Algorithm 1 over tasks from a hierarchy.

The loop is `MetaTrainer.run`. A step draws B tasks, adapts theta to each support set through R^phi (Eq. 7), and moves
theta and phi down the gradient of the query losses (Eq. 8, 9). Every few steps the same held-out tasks are evaluated;
the theta and phi with the lowest query loss after adaptation are kept as the best checkpoint.

Several processes (`torchrun`) share a step's tasks: each adapts its own, their gradients are summed in one exchange,
and then all of them take the same step. Rank 0 alone writes files (`meta_run`).
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from yacs.config import CfgNode

from gram_meta import __version__
from gram_meta.backbone.clip import Backbone, load_backbone
from gram_meta.clustering.hierarchy import Hierarchy
from gram_meta.corpus.store import PairStore
from gram_meta.engine.checkpoints import restoring
from gram_meta.errors import GramError
from gram_meta.locks import only_writer
from gram_meta.method.bilevel import InnerLoop
from gram_meta.method.episodes import Episode, Episodes, TimedIterator
from gram_meta.method.evaluation import evaluate
from gram_meta.method.memory_plan import MemoryConfig, plan
from gram_meta.method.meta_files import BEST, LAST, STATE
from gram_meta.method.meta_run import MetaLog, MetaRun, Sigterm, Stopped
from gram_meta.method.meta_state import MetaState
from gram_meta.method.outer import BatchResult, OuterLoop, add_meta_gradients, exchange, parameters_of
from gram_meta.method.recorded import RecordedSteps
from gram_meta.method.tasks import StepTasks, TaskConfig, TaskSampler, images_of, split_topics
from gram_meta.processes import ALONE, ProcessGroup

logger = logging.getLogger("gram")
READ_EVERY = 10  # steps on a GPU whose losses are read at once
BUCKET = 4  # tokens; recorded steps have class prompts of few lengths
OPTIMISER, EXCHANGE = "optimiser", "exchange"  # regions of a profile


class Seen(NamedTuple):
    """What a step leaves on the device."""

    step: int
    numbers: Tensor  # (2 + B,): mean loss, sum of the gradients' norms, each task's loss
    norms: Tensor  # of `BatchResult`


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
        group: ProcessGroup = ALONE,
        backbone: Backbone | None = None,
    ) -> None:
        self.config, self.progress, self.group = config, progress, group
        self.outer = OuterLoop.from_config(config)
        if self.outer.batch < group.size:
            expected = f"at least one task a step for each of {group.size} processes"
            raise GramError(f"OUTER.BATCH: expected {expected}, found {self.outer.batch}")
        self.backbone = backbone or load_backbone(config.BACKBONE.NAME, device, config.BACKBONE.PRECISION)
        self.backbone.checkpointing = config.MEMORY.CHECKPOINTING
        store.check_backbone(self.backbone)
        hierarchy.check_store(store)
        hierarchy.check_labelled(config.CHC.LABELLED)

        # Tasks (Sec. 3.3)
        tasks, seed = TaskConfig.from_config(config), config.SEED
        self.train_topics, self.held_topics = split_topics(hierarchy, config.TASKS.HELD_OUT, tasks.ways, seed)
        away = images_of(hierarchy, self.held_topics)
        self.train_tasks = TaskSampler(hierarchy, tasks, seed, self.train_topics, away, store.image_features)
        held = TaskSampler(hierarchy, tasks, seed + 1, self.held_topics, features=store.image_features)
        self.held_tasks = [held.draw(number) for number in group.share_range(config.EVAL.TASKS)]
        self.own = group.share_range(self.outer.batch)  # this process's tasks of a batch
        self.episodes = Episodes.from_config(self.backbone, store, [t.word for t in hierarchy.topics], config)
        memory = MemoryConfig.from_config(config)
        self.plan = plan(memory, self.backbone, len(self.own), memory.bytes_on(self.backbone.device))

        # Theta and phi
        self.state = state = MetaState(self.backbone, config, self.outer)
        self.theta, self.kinds = state.theta, state.kinds
        self.regulator, self.optimiser = state.regulator, state.optimiser
        self.inner = InnerLoop.from_config(config, self.regulator.regulate_known if self.regulator else None)

        # The folder
        self.saved = 0  # the step of the last saved state
        self.unread: list[Seen] = []  # of the steps since the last call of `read`
        self.add_gradients: Callable[[Episode], BatchResult] = self.add_gradients_plainly
        if self.records:
            self.episodes.bucket = BUCKET
            self.add_gradients = RecordedSteps(self.add_gradients_plainly, parameters_of(self.optimiser))
        self.read_every = 1 if self.backbone.device.type == "cpu" else READ_EVERY  # 1: before a step moves anything
        made_from = {"store": store.fingerprint, "hierarchy": hierarchy.fingerprint}
        topics = {"topics": len(hierarchy.topics), "held_out_topics": self.held_topics}
        self.facts = {"version": __version__, **made_from, **topics}
        self.folder = MetaRun(out, config, self.facts, group)
        self.sigterm = Sigterm()
        self.region: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext()  # `profile_steps` sets it

    def run(self, resume: bool = False) -> Path:
        """Train to the last step and return the path of the best checkpoint."""
        with only_writer(self.folder.out, self.group.is_first):
            return self._run(resume)

    def _run(self, resume: bool) -> Path:
        steps = self.outer.steps
        first = self.begin(resume)
        if self.episodes.reads_pixels or self.plan.lean:
            logger.info(f"meta-training: {self.plan} (MEMORY)")
        with self.sigterm, self.folder.log(first, steps, self.outer.batch, self.progress) as log:
            if first == 0:
                self.evaluate(0, log)
            episodes = TimedIterator(self.episodes_of(first, steps))
            coming = iter(episodes)
            for step in range(first + 1, steps + 1):
                taken, stop = self.step(step, self.sigterm.next_of(coming))
                if not taken:  # a reader of images received the signal too
                    self._stop(step - 1, log)
                self.record(step, log)
                if stop and step < steps:
                    self._stop(step, log)
        if self.episodes.reads_pixels and first < steps:
            share = 100 * episodes.waiting_share()
            logger.info(f"the towers waited {share:.1f} % of the time for images (LOADER.WORKERS)")
        return self.folder.out / BEST

    def begin(self, resume: bool) -> int:
        """Begin a new run, or restore the one in the folder; return the last finished step."""
        if not resume:
            self.folder.begin()
        elif state := self.folder.resume():
            with restoring(self.folder.out / STATE):
                self.saved = self.state.load_state_dict(state)
        return self.saved

    def record(self, step: int, log: MetaLog) -> None:
        """Log a step; evaluate and save the state when they are due."""
        log.bar.update(log.batch)
        last = step == self.outer.steps
        evaluates, saves = (last or step % node.EVERY == 0 for node in (self.config.EVAL, self.config.CHECKPOINT))
        if evaluates or saves or len(self.unread) >= self.read_every:
            self.read(log)
        if evaluates:
            self.evaluate(step, log)
        if saves:
            self.save(step)

    def read(self, log: MetaLog) -> None:
        """Check and log the steps since the last call. They are read at once, as reading makes a GPU wait.

        Raises `GramError` if a loss or a gradient is not finite.
        """
        unread, self.unread = self.unread, []
        if not unread:
            return
        numbers = torch.stack([seen.numbers for seen in unread]).tolist()
        for seen, (mean, size, *losses) in zip(unread, numbers, strict=True):
            self._check_finite(seen.step, mean, size, *losses)
            log.track(seen.step, {"meta_train/query_loss": mean})
        if len(unread[0].norms):
            self.state.norms.append(torch.cat([seen.norms.flatten(0, 1) for seen in unread]).cpu())

    def save(self, step: int) -> None:
        """Save the state after a step for --resume."""
        if step > self.saved:
            self.folder.save_state(self.state.state_dict(step))
            self.saved = step

    def episodes_of(self, first: int, last: int) -> Iterator[Episode]:
        """Yield this process's tasks of the steps after `first` up to `last`."""
        return self.episodes.of(StepTasks(self.train_tasks, self.outer.batch, first, last, self.own))

    def step(self, step: int, episode: Episode | None) -> tuple[bool, bool]:
        """Move theta and phi once in all processes; `episode` has this process's tasks of step `step`, from 1 on.

        If one is None, no process takes the step. Returns whether the step was taken, and whether to stop after it.
        """
        self.optimiser.zero_grad(set_to_none=True)
        parameters, given_up, stop = parameters_of(self.optimiser), episode is None, self.sigterm.received
        if episode is not None:
            result = self.add_gradients(episode)
        else:
            result = BatchResult.zeros(len(self.own), len(self.state.layers), self.backbone.device)
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        if self.group.size > 1:
            with self.region(EXCHANGE):
                shape = (self.inner.length * self.outer.meta, self.outer.batch, len(self.state.layers))
                result, (given_up, stop) = exchange(self.group, parameters, result, shape, self.own, (given_up, stop))
        if given_up:
            return False, True
        self.finish_step(step, result)
        return True, stop

    @property
    def records(self) -> bool:
        """Whether steps are recorded as CUDA graphs: on a GPU, if all tasks go through the towers at once."""
        on_gpu, at_once = self.backbone.device.type == "cuda", self.plan.tasks >= len(self.own) and not self.plan.images
        return on_gpu and at_once and self.config.MEMORY.CUDA_GRAPHS and not self.backbone.checkpointing

    def add_gradients_plainly(self, episode: Episode) -> BatchResult:
        """Add the meta-gradients of this process's tasks of a step to `.grad`."""
        parameters = parameters_of(self.optimiser)
        return add_meta_gradients(episode, self.theta, self.kinds, parameters, self.inner, self.outer, self.plan)

    def finish_step(self, step: int, result: BatchResult) -> None:
        """Move theta and phi along the gradients in `.grad`, and keep what `read` checks and logs."""
        gradients = [p.grad for p in parameters_of(self.optimiser) if p.grad is not None]
        size, mean = torch.stack(torch._foreach_norm(gradients)).sum(), result.losses.mean()
        self.unread.append(Seen(step, torch.cat([mean[None], size[None], result.losses]), result.norms))
        if self.read_every == 1:
            self._check_finite(step, *self.unread[-1].numbers.tolist())
        with self.region(OPTIMISER):
            self.state.update(self.outer, step)

    def scores(self) -> dict[str, float]:
        """Evaluate the held-out tasks."""
        tasks, images = self.episodes.at_a_time, 0
        if self.plan.lean or self.plan.tasks < self.outer.batch:
            tasks, images = min(tasks, self.plan.tasks), self.plan.images
        model = self.theta, self.regulator, self.inner
        return evaluate(self.episodes, self.held_tasks, *model, tasks, images, self.group)

    def evaluate(self, step: int, log: MetaLog) -> None:
        """Evaluate the held-out tasks, log the scores, and keep theta and phi if they are the best so far."""
        scores = self.scores()
        log.held_out(step, scores)
        if not math.isfinite(scores["loss_after"]):
            self._fail(f"a finite loss on the held-out tasks, found {scores['loss_after']} after step {step}")
        if step == 0 and scores["temperature"] > 2 * self.episodes.temperature:
            logger.info(
                f"held-out tasks: this CLIP is overconfident. Logits divided by {scores['temperature']:.2g} have "
                "the least loss, so meta-training would mostly learn to be less sure: set OUTER.TEMPERATURE to that"
            )
        checkpoint = self.state.checkpoint(self.facts | {"step": step, "held_out": dict(scores)})
        self.folder.save_checkpoint(LAST, checkpoint)
        best = self.state.best
        if not best or scores["loss_after"] < best["loss_after"]:
            self.state.best = {"step": step, **scores}
            self.folder.save_checkpoint(BEST, checkpoint)

    def _check_finite(self, step: int, mean: float, size: float, *losses: float) -> None:
        bad = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            number = (step - 1) * self.outer.batch + bad[0]
            words = ", ".join(self.train_tasks.draw(number).words)
            self._fail(f"a finite loss, found {losses[bad[0]]} at step {step} in task {number} ({words})")
        if not math.isfinite(size):
            scaled = f", under fp16 with losses scaled by {self.inner.scale:g}; lower BACKBONE.LOSS_SCALE, or take bf16"
            scaled = scaled if self.inner.scale != 1 else ""
            self._fail(f"finite gradients, found others at step {step}{scaled}")

    def _fail(self, expected: str) -> NoReturn:
        self.group.fail(f"meta-training: expected {expected}; the last good checkpoint is {self.folder.out / LAST}")

    def _stop(self, step: int, log: MetaLog) -> NoReturn:
        self.read(log)
        self.save(step)
        after = f"after step {step} of {self.outer.steps}"
        raise Stopped(f"{self.folder.out}: stopped by SIGTERM {after}; --resume goes on")
