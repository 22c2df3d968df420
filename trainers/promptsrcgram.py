"""PromptSRCGRAM: PromptSRC (Khattak et al., ICCV 2023) from a meta-learned start, with a gradient regulator."""

from typing import Any

from torch import Tensor

from gram_meta.engine import register_trainer
from gram_meta.method.apply import Prompts
from gram_meta.trainers.checkout import CheckoutGRAM


@register_trainer
class PromptSRCGRAM(CheckoutGRAM):
    """PromptSRC's options (TRAINER.PROMPTSRC.*) and TRAINER.GRAM.*; its losses and its averaged prompts stay."""

    trainer, checkout = "PromptSRC", "github.com/muzairkhattak/PromptSRC"

    def gram_prompts(self) -> Prompts:
        model = self.bare_model
        prompts = {"text": [model.prompt_learner.ctx, *further_layers(model.text_encoder)]}
        if model.image_encoder.VPT_shallow:  # PROMPT_DEPTH_VISION is not 0
            prompts["visual"] = [model.image_encoder.VPT, *further_layers(model.image_encoder)]
        return prompts


def further_layers(tower: Any) -> list[Tensor]:
    """Return the prompts (M, d) of a tower's layers after the first."""
    return [block.VPT_shallow for block in tower.transformer.resblocks if block.add_prompt]
