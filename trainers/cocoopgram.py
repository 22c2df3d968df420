"""CoCoOpGRAM: CoCoOp from a meta-learned context and meta-net, with a regulator of the context's gradient."""

from gram_meta.engine import register_trainer
from gram_meta.trainers.cocoop import CoCoOp
from gram_meta.trainers.regulated import Regulated


@register_trainer
class CoCoOpGRAM(Regulated, CoCoOp):
    """CoCoOp's options (TRAINER.COCOOP.*) and TRAINER.GRAM.*. The meta-net is no prompt: its gradients stay raw."""
