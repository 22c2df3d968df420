"""UniGRAM: text and visual prompts from a joint meta-learned start, with a meta-learned gradient regulator."""

from gram_meta.engine import register_trainer
from gram_meta.trainers.jointprompt import JointPrompt
from gram_meta.trainers.regulated import Regulated


@register_trainer
class UniGRAM(Regulated, JointPrompt):
    """JointPrompt's options (TRAINER.JOINT.*) and TRAINER.GRAM.*."""
