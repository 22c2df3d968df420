"""GRAM on a trainer of a checkout, whose class exists once the checkout's train.py has imported it."""

from typing import Any, ClassVar

from torch import Tensor

from gram_meta.engine import TRAINER_REGISTRY
from gram_meta.errors import GramError
from gram_meta.method.checkpoint import MetaCheckpoint
from gram_meta.method.dassl import WithGRAM


class CheckoutGRAM(WithGRAM):
    """A trainer of a checkout with theta* and R^phi*; a subclass names it and returns its prompts.

    The checkout's class is looked up in Dassl's registry when a trainer is built, and joins the bases then. Nothing of
    it is copied: losses, options, schedules and checkpoints are the checkout's.
    """

    trainer: ClassVar[str]  # name of the checkout's class
    checkout: ClassVar[str]  # address of the checkout
    model: Any

    def __new__(cls, *args: Any) -> "CheckoutGRAM":
        base = cls.checkout_class()
        both = cls if issubclass(cls, base) else type(cls.__name__, (cls, base), {"__module__": cls.__module__})
        return object.__new__(both)

    @classmethod
    def checkout_class(cls) -> type:
        """Return the checkout's class; raise a `GramError` where none is registered."""
        if cls.trainer not in TRAINER_REGISTRY.registered_names():
            expected = f"the trainer {cls.trainer} of a checkout ({cls.checkout}), in whose folder it runs"
            raise GramError(f"--trainer {cls.__name__}: expected {expected}, found none")
        return TRAINER_REGISTRY.get(cls.trainer)

    @property
    def bare_model(self) -> Any:
        """The model itself, where the checkout has wrapped it for several GPUs."""
        return getattr(self.model, "module", self.model)

    def check_meta(self, meta: MetaCheckpoint) -> None:
        super().check_meta(meta)
        for kind, layers in self.gram_prompts().items():
            depth = 1 if isinstance(layers, Tensor) else len(list(layers))
            shallow = kind in meta.prompts and meta.prompts[kind].dim() == 2
            if self.cfg.TRAINER.GRAM.INIT and shallow and depth > 1:
                found = f"found one of 1 layer (PROMPT.{kind.upper()}_DEPTH)"
                raise GramError(f"{meta.path}: expected a {kind} prompt of {depth} layers, {found}")
