"""GRAM in a prompt trainer: start from theta*, and pass every few-shot gradient through R^phi ("Testing", Sec. 3.3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gram_meta.checkpoint import MetaCheckpoint, load_meta_checkpoint
from gram_meta.config import get_meta_config
from gram_meta.errors import GramError
from gram_meta.regulation import Regulation

# What a table of results needs to know of the meta-training
SETTINGS = (
    "TASKS.DOMAIN_SHIFT",
    "REGULATOR.ENABLED",
    "OUTER.META",
    "CHC.LABELLED",
    "PROMPT.TEXT_TOKENS",
    "PROMPT.VISUAL_TOKENS",
    "PROMPT.CONDITIONAL",
)


class Regulated:
    """Mixin before a `PromptTrainer`: `class CoOpGRAM(Regulated, CoOp)`. Options: TRAINER.GRAM.*."""

    meta: MetaCheckpoint | None = None

    def check_cfg(self, cfg: Any) -> None:
        super().check_cfg(cfg)
        gram = cfg.TRAINER.GRAM
        if (gram.INIT or gram.REGULATE) and not gram.CHECKPOINT:
            raise GramError(
                f"TRAINER.GRAM.CHECKPOINT is empty; {type(self).__name__} expects the meta-checkpoint of `gram pretrain`"
            )
        if gram.REGULATE and gram.STEP_SCALE != 1.0:
            raise GramError(
                "TRAINER.GRAM.STEP_SCALE scales raw gradients; it expects TRAINER.GRAM.REGULATE False"
            )

    def initial_prompts(self) -> dict[str, Tensor]:
        gram = self.cfg.TRAINER.GRAM
        if gram.CHECKPOINT:
            self.meta = load_meta_checkpoint(gram.CHECKPOINT)
            self.meta.check(self.backbone, self.tokens())
            print(f"Meta-checkpoint {gram.CHECKPOINT} (SHA-256 {self.meta.sha256[:12]})")
        if not gram.INIT:
            return super().initial_prompts()
        print("Initial prompts: theta* of the meta-checkpoint")
        return {kind: value.to(self.backbone.device) for kind, value in self.meta.prompts.items()}

    def build_model(self) -> None:
        super().build_model()
        gram, regulator = self.cfg.TRAINER.GRAM, None
        if gram.REGULATE:
            if self.meta.regulator is None:
                raise GramError(f"{gram.CHECKPOINT}: holds no regulator; set TRAINER.GRAM.REGULATE False")
            regulator = self.meta.regulator.to(self.device)
            print("Every gradient passes through the frozen regulator")
        self.regulation = Regulation(
            self.model.prompt_learner.prompts(),
            regulator,
            gram.STEP_SCALE,
            self.meta.gradient_norms if self.meta else None,
        )
        self.regulation.attach(self.optim)

    def after_train(self) -> None:
        for line in self.regulation.lines():
            print(f"regulator: {line}")
        super().after_train()

    def state_to_save(self) -> dict[str, Any]:
        return {**super().state_to_save(), "regulation": self.regulation.state_dict()}

    def load_saved_state(self, state: dict[str, Any]) -> None:
        super().load_saved_state(state)
        self.regulation.load_state_dict(state["regulation"])

    def facts(self) -> dict[str, Any]:
        facts = {**super().facts(), "regulator": self.regulation.summary()}
        if self.meta is not None:
            settings = {key: self.meta_setting(key) for key in SETTINGS} if self.meta.config else {}
            facts["meta_checkpoint"] = {
                "path": self.meta.path,
                "sha256": self.meta.sha256,
                "settings": settings,
            }
        return facts

    def meta_setting(self, key: str) -> Any:
        """A setting of the meta-training, such as "PROMPT.TEMPLATE"; its default where the file is older than it."""
        node, default = (self.meta.config if self.meta else {}), get_meta_config()
        for part in key.split("."):
            default = default[part]
            node = node.get(part, default)
        return node
