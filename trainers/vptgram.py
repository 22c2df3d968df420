"""VPTGRAM: VPT from a meta-learned start, with a meta-learned gradient regulator."""

from gram_meta.engine import register_trainer
from gram_meta.method.checkpoint import MetaCheckpoint
from gram_meta.trainers.regulated import Regulated
from gram_meta.trainers.vpt import VPT


@register_trainer
class VPTGRAM(Regulated, VPT):
    """VPT's options (TRAINER.VPT.*) and TRAINER.GRAM.*."""

    def check_meta(self, meta: MetaCheckpoint) -> None:
        super().check_meta(meta)
        there = self.meta_setting("PROMPT.TEMPLATE")
        if there != self.template():
            here = f'the class sentence is "{self.template()}" here (TRAINER.VPT.CTX_INIT)'
            print(f'Note: {here}, but was "{there}" in meta-training')
