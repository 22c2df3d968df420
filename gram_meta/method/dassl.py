"""GRAM in a Dassl trainer ("Testing" in Sec. 3.3): the options TRAINER.GRAM.* choose theta* and R^phi*.

docs/guide/other-trainers.md shows how to add GRAM to a trainer.
"""

from typing import Any

from gram_meta.config import flatten, stored_config
from gram_meta.errors import GramError
from gram_meta.method.apply import FAR, Prompts, Regulation, start_from
from gram_meta.method.bilevel import InnerLoop
from gram_meta.method.checkpoint import MetaCheckpoint, load_meta_checkpoint


class WithGRAM:
    """GRAM for a Dassl prompt trainer: `class MyTrainerGRAM(WithGRAM, MyTrainer)`. Options: TRAINER.GRAM.*.

    `gram_prompts` returns the prompts. Every other learned parameter keeps its raw gradient and is
    listed in the log and in `raw_parameters`. The trainer's own code stays as it is: the prompts take theta* after its
    `build_model`, and every optimiser that it has registered passes their gradients through R^phi* before it steps.

    Attributes:
        meta: the meta-checkpoint; None if TRAINER.GRAM.CHECKPOINT is empty, as an evaluation allows.
        regulation: what regulates and counts.
        raw_parameters: names of learned parameters that R^phi does not know.
    """

    meta: MetaCheckpoint | None = None
    regulation: Regulation
    raw_parameters: list[str]

    # What the mixin uses of the trainer
    cfg: Any
    device: Any
    train_loader_x: Any
    _models: Any
    _optims: Any

    def gram_prompts(self) -> Prompts:
        """The prompts by kind: a parameter, or one for each layer (the first is nearest to the input)."""
        raise NotImplementedError

    def gram_extras(self) -> Prompts:
        """Return other parameters that start from the meta-checkpoint, by name: a meta-net, coupling functions."""
        return {}

    def check_meta_file(self, meta: MetaCheckpoint) -> None:
        """Refuse a meta-checkpoint by what its file says, before CLIP is loaded; a trainer may compare more."""
        meta.check_name(self.cfg.MODEL.BACKBONE.NAME)

    def check_meta(self, meta: MetaCheckpoint) -> None:
        """Refuse a meta-checkpoint of another backbone, by its name; a trainer that knows more can override this."""
        name = self.cfg.MODEL.BACKBONE.NAME
        if name != meta.backbone_name:
            found = f"found {name!r} (MODEL.BACKBONE.NAME)"
            raise GramError(f"{meta.path}: expected the backbone it was made with, {meta.backbone_name}, {found}")

    def check_cfg(self, cfg: Any) -> None:
        super().check_cfg(cfg)  # type: ignore[misc]
        if "GRAM" not in cfg.TRAINER:
            raise GramError(
                "TRAINER.GRAM: expected these options in the config tree, found none; call "
                "gram_meta.engine.options.extend_cfg(cfg) where the other options are added"
            )
        gram = cfg.TRAINER.GRAM
        if gram.REGULATE and gram.STEP_SCALE != 1.0:
            raise GramError("TRAINER.GRAM.STEP_SCALE scales raw gradients; it expects TRAINER.GRAM.REGULATE False")
        if gram.INIT and cfg.MODEL.INIT_WEIGHTS:
            raise GramError(
                "MODEL.INIT_WEIGHTS and TRAINER.GRAM.INIT both set the initial prompts; leave one empty (or INIT False)"
            )

    def build_model(self) -> None:
        gram = self.cfg.TRAINER.GRAM
        if gram.CHECKPOINT:
            self.meta = load_meta_checkpoint(gram.CHECKPOINT)
            if gram.REGULATE and self.meta.regulator is None:
                raise GramError(f"{gram.CHECKPOINT}: holds no regulator; set TRAINER.GRAM.REGULATE False")
            self.check_meta_file(self.meta)
        super().build_model()  # type: ignore[misc]
        regulator = None
        if self.meta is not None:
            self.check_meta(self.meta)
            print(f"Meta-checkpoint {gram.CHECKPOINT} (SHA-256 {self.meta.sha256[:12]})")
            if gram.INIT:
                start_from(self.meta, self.gram_prompts(), self.gram_extras())
                print("Initial prompts: theta* of the meta-checkpoint, instead of the above")
            if gram.REGULATE and self.meta.regulator is not None:
                regulator = self.meta.regulator.to(self.device)
                print("Every gradient of a prompt passes through the frozen regulator")
        norms = self.meta.gradient_norms if self.meta else None
        self.regulation = Regulation(self.gram_prompts(), regulator, gram.STEP_SCALE, norms)
        optimizers = [optimizer for optimizer in self._optims.values() if optimizer is not None]
        self.regulation.attach(*optimizers)
        self.raw_parameters = [
            name for model in self._models.values() for name in self.regulation.raw_parameters(model, *optimizers)
        ]
        if self.raw_parameters:
            print(f"Raw gradients, as the regulator does not know them: {', '.join(self.raw_parameters)}")

    def check_training(self) -> None:
        """Refuse to train, or to evaluate a start, without the meta-checkpoint that either needs."""
        gram = self.cfg.TRAINER.GRAM
        if (gram.INIT or gram.REGULATE) and self.meta is None:
            raise GramError(f"TRAINER.GRAM.CHECKPOINT is empty; {type(self).__name__} expects a meta-checkpoint")
        if hasattr(super(), "check_training"):  # the trainer has it
            super().check_training()  # type: ignore[misc]

    def before_train(self) -> None:
        self.check_training()
        if self.regulation.regulator is not None and self.meta is not None:
            optim = self.cfg.OPTIM
            mean_rate = optim.LR / 2 if optim.LR_SCHEDULER == "cosine" else optim.LR
            steps = optim.MAX_EPOCH * len(self.train_loader_x)
            warn_of_length(self.meta, steps * mean_rate / (1 - optim.MOMENTUM))
        super().before_train()  # type: ignore[misc]

    def load_model(self, directory: str, epoch: int | None = None) -> None:
        if not directory:  # the initial prompts are evaluated
            self.check_training()
        super().load_model(directory, epoch=epoch)  # type: ignore[misc]

    def after_train(self) -> None:
        for line in self.regulation.lines():
            print(f"regulator: {line}")
        super().after_train()  # type: ignore[misc]


def warn_of_length(meta: MetaCheckpoint, path: float) -> None:
    """Print a note if R^phi with an absolute beta is used in a training far longer than the one it was learned for.

    `path` is the sum of the training's learning rates, divided by 1 - momentum.
    """
    if flatten(meta.config).get("REGULATOR.BETA") != "absolute":
        return
    learned = InnerLoop.from_config(stored_config(meta.config)).path
    if path > FAR * learned:
        print(
            f"Note: the regulator was learned on steps that sum to {learned:.2g} (INNER.ALPHA x steps), and those of "
            f"this training sum to about {path:.2g}. Its beta does not shrink with the gradient, and may lead away; "
            "meta-training with REGULATOR.BETA relative avoids that"
        )
