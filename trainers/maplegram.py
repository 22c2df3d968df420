"""MaPLeGRAM: MaPLe (Khattak et al., CVPR 2023) from a meta-learned start, with a meta-learned gradient regulator."""

from gram_meta.engine import register_trainer
from gram_meta.method.apply import Prompts
from gram_meta.trainers.checkout import CheckoutGRAM


@register_trainer
class MaPLeGRAM(CheckoutGRAM):
    """MaPLe's options (TRAINER.MAPLE.*) and TRAINER.GRAM.*; coupling functions take raw gradients."""

    trainer, checkout = "MaPLe", "github.com/muzairkhattak/multimodal-prompt-learning"

    def gram_prompts(self) -> Prompts:
        learner = self.bare_model.prompt_learner
        return {"text": [learner.ctx, *learner.compound_prompts_text]}

    def gram_extras(self) -> Prompts:
        learner = self.bare_model.prompt_learner
        layers = [learner.proj, *learner.compound_prompt_projections]
        return {f"coupling.{name}": [getattr(layer, name) for layer in layers] for name in ("weight", "bias")}
