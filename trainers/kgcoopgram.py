"""KgCoOpGRAM: KgCoOp (Yao et al., CVPR 2023) from a meta-learned start, with a meta-learned gradient regulator."""

from gram_meta.engine import register_trainer
from gram_meta.method.apply import Prompts
from gram_meta.trainers.checkout import CheckoutGRAM


@register_trainer
class KgCoOpGRAM(CheckoutGRAM):
    """KgCoOp's options (TRAINER.COOP.*) and TRAINER.GRAM.*."""

    trainer, checkout = "KgCoOp", "github.com/htyao89/KgCoOp"

    def gram_prompts(self) -> Prompts:
        return {"text": self.bare_model.prompt_learner.ctx}
