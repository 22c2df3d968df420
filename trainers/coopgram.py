"""CoOpGRAM: CoOp from a meta-learned start, with a meta-learned gradient regulator."""

from typing import Any

from gram_meta.engine import register_trainer
from gram_meta.errors import GramError
from gram_meta.trainers.coop import CoOp
from gram_meta.trainers.regulated import Regulated


@register_trainer
class CoOpGRAM(Regulated, CoOp):
    """CoOp's options (TRAINER.COOP.*) and TRAINER.GRAM.*."""

    def check_cfg(self, cfg: Any) -> None:
        super().check_cfg(cfg)
        options = cfg.TRAINER.COOP
        if options.CSC:
            raise GramError("TRAINER.COOP.CSC: GRAM defines no class-specific contexts; CoOpGRAM expects False")
        if options.CLASS_TOKEN_POSITION != "end":
            found = options.CLASS_TOKEN_POSITION
            raise GramError(f"TRAINER.COOP.CLASS_TOKEN_POSITION: GRAM defines 'end' alone, found {found!r}")
