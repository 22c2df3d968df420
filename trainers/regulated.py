"""GRAM in this project's prompt trainers: checks, facts for results.json, and resumed runs."""

from typing import TYPE_CHECKING, Any

from torch import nn

from gram_meta.config import flatten, get_meta_config
from gram_meta.method.checkpoint import MetaCheckpoint
from gram_meta.method.dassl import WithGRAM
from gram_meta.trainers.checkpointing import NO_META

if TYPE_CHECKING:
    from gram_meta.trainers.base import PromptTrainer
else:
    PromptTrainer = object  # the class that follows the mixin

# Settings of the meta-training that tables of results use
SETTINGS = (
    *("TASKS.DOMAIN_SHIFT", "REGULATOR.ENABLED", "OUTER.META", "CHC.LABELLED"),
    *("PROMPT.TEXT_TOKENS", "PROMPT.VISUAL_TOKENS", "PROMPT.VISUAL_START", "PROMPT.CONDITIONAL"),
)


class Regulated(WithGRAM, PromptTrainer):
    """Mixin before a `PromptTrainer`: `class CoOpGRAM(Regulated, CoOp)`. Options: TRAINER.GRAM.*."""

    def gram_prompts(self) -> dict[str, nn.Parameter]:
        return self.model.prompt_learner.prompts()

    def gram_extras(self) -> dict[str, nn.Parameter]:
        prompts = {id(prompt) for prompt in self.gram_prompts().values()}
        named = self.model.prompt_learner.named_parameters()
        return {name: parameter for name, parameter in named if id(parameter) not in prompts}

    def check_meta_file(self, meta: MetaCheckpoint) -> None:
        super().check_meta_file(meta)
        meta.check_tokens(self.tokens())

    def check_meta(self, meta: MetaCheckpoint) -> None:
        meta.check(self.backbone, self.tokens(), self.gram_extras())

    def state_to_save(self) -> dict[str, Any]:
        facts = {"regulation": self.regulation.state_dict(), "meta_checkpoint": self._meta_facts()}
        return {**super().state_to_save(), **facts}

    def load_saved_state(self, state: dict[str, Any]) -> None:
        super().load_saved_state(state)
        self.regulation.load_state_dict(state["regulation"])

    def after_epoch(self) -> None:
        """Also track what R did, up to this epoch's last step."""
        super().after_epoch()
        self._write_regulation()

    def write_again(self) -> None:
        super().write_again()
        self._write_regulation()

    def _write_regulation(self) -> None:
        for prompt, did in self.regulation.summary().items():
            for name, values in did["over_steps"].items():
                if name != "step" and values[-1] is not None:
                    self.write_scalar(f"regulator/{prompt}_{name}", values[-1], did["steps"])

    def facts(self) -> dict[str, Any]:
        return {
            **super().facts(),
            "regulator": self.regulation.summary(),
            "raw_parameters": self.raw_parameters,
            "meta_checkpoint": self._meta_facts(),
        }

    def _meta_facts(self) -> dict[str, Any]:
        """Return the origin of the prompts: their meta-checkpoint and its settings (as stored with loaded ones)."""
        if self.meta_facts is not None:
            return self.meta_facts
        if self.meta is None:
            return NO_META
        settings = {key: self.meta_setting(key) for key in SETTINGS} if self.meta.config else {}
        return {"path": self.meta.path, "sha256": self.meta.sha256, "settings": settings}

    def meta_setting(self, key: str) -> Any:
        """Return a setting of the meta-training, such as "PROMPT.TEMPLATE"; its default if the file is older."""
        stored = flatten(self.meta.config) if self.meta else {}
        return stored.get(key, flatten(get_meta_config())[key])
