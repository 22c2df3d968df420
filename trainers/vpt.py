"""VPT: prompt tokens beside an image's patches, learned with cross-entropy (Jia et al., 2022, arXiv 2203.12119)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gram_meta.engine import register_trainer
from gram_meta.errors import GramError
from gram_meta.method.prompts import PromptedCLIP
from gram_meta.trainers.base import PromptTrainer


@register_trainer
class VPT(PromptTrainer):
    """Visual Prompt Tuning. TRAINER.VPT.*: N_CTX_VISION, CTX_INIT (words before the class name), PREC."""

    node = "VPT"
    family = ("VPT", "VPTGRAM")

    def check_cfg(self, cfg: Any) -> None:
        super().check_cfg(cfg)
        depth = cfg.TRAINER.VPT.PROMPT_DEPTH_VISION
        if depth != 1:
            raise GramError(f"TRAINER.VPT.PROMPT_DEPTH_VISION is {depth}; expected 1: prompts at the input alone")

    def tokens(self) -> dict[str, int]:
        return {"visual": self.options.N_CTX_VISION}

    def initial_prompts(self) -> dict[str, Tensor]:
        return {"visual": self.initial_visual_prompt()}

    def template(self) -> str:
        """The class prompt; nothing in it is learned."""
        words = self.options.CTX_INIT.replace("_", " ")
        return f"{words} {{}}." if words else "{}."

    def build_classifier(self, classnames: list[str], prompts: Mapping[str, Tensor]) -> PromptedCLIP:
        return PromptedCLIP(self.backbone, classnames, prompts, self.template())
