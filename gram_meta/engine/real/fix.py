"""A fix of the installed Dassl, and how modules that have imported the broken object get the new one."""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("gram_meta.engine")


@dataclass
class Fix:
    """The fix of one fault that the published Dassl shows on current libraries.

    `found` tests whether the fault is there; `change` repairs it in this process. No file of Dassl is changed, and a
    Dassl without the fault is left alone.
    """

    id: str  # "B1", ...: see docs/reference/dassl.md
    summary: str  # what works after it
    found: Callable[[], bool]
    change: Callable[[], None]
    applied: bool = False

    def apply(self) -> None:
        """Repair the fault if it is there, and log that once at debug level."""
        try:
            found = self.found()
        except Exception as error:  # this Dassl lacks the part, or has another one
            logger.debug("Dassl, %s: not tested (%s: %s)", self.id, type(error).__name__, error)
            return
        if not found:
            return
        try:
            self.change()
        except Exception as error:  # a fork of Dassl that is broken in another way
            logger.warning("Dassl, %s could not be repaired (%s: %s)", self.id, type(error).__name__, error)
            return
        self.applied = True
        logger.debug("Dassl repaired, %s: %s", self.id, self.summary)


def rebind(old: Any, new: Any) -> None:
    """Put `new` wherever a module of this process holds the very object `old` under a name of its own."""
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        if not isinstance(names, dict):
            continue
        for name, value in list(names.items()):
            if value is old:
                names[name] = new
