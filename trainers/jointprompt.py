"""JointPrompt: CoOp's context and VPT's visual prompt, learned together; UniGRAM without GRAM (Table 6, row 5)."""

from torch import Tensor

from gram_meta.engine import register_trainer
from gram_meta.errors import GramError
from gram_meta.trainers.base import PromptTrainer


@register_trainer
class JointPrompt(PromptTrainer):
    """Text and visual prompts. TRAINER.JOINT.*: N_CTX_TEXT, N_CTX_VISION, CTX_INIT (start of the text prompt), PREC."""

    node = "JOINT"
    family = ("JointPrompt", "UniGRAM")

    def tokens(self) -> dict[str, int]:
        return {"text": self.options.N_CTX_TEXT, "visual": self.options.N_CTX_VISION}

    def initial_prompts(self) -> dict[str, Tensor]:
        options = self.options
        context = self.initial_context(options.N_CTX_TEXT)  # (M, d)
        if len(context) != options.N_CTX_TEXT:
            found = f"{options.CTX_INIT!r}, {len(context)} tokens"
            raise GramError(f"TRAINER.JOINT.CTX_INIT is {found}; expected {options.N_CTX_TEXT}, as N_CTX_TEXT says")
        return {"text": context, "visual": self.initial_visual_prompt()}
