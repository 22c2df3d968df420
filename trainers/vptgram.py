"""VPTGRAM: VPT from a meta-learned start, with a meta-learned gradient regulator."""

from __future__ import annotations

from gram_meta.engine import register_trainer
from gram_meta.method.checkpoint import MetaCheckpoint
from gram_meta.trainers.regulated import Regulated
from gram_meta.trainers.vpt import VPT


@register_trainer
class VPTGRAM(Regulated, VPT):
    """VPT's options (TRAINER.VPT.*) and TRAINER.GRAM.*."""

    def check_meta(self, meta: MetaCheckpoint) -> None:
        super().check_meta(meta)
        learnt_with = self.meta_setting("PROMPT.TEMPLATE")
        if learnt_with != self.template():
            print(
                f'Note: the class sentence is "{self.template()}" here (TRAINER.VPT.CTX_INIT), but was '
                f'"{learnt_with}" in meta-training'
            )
