"""What a repair of the installed Dassl is, and how one is made known to modules that have imported the broken thing."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("gram_meta.engine")


@dataclass
class Repair:
    """One break of the published Dassl on current libraries.

    `found` tries whether the break is there, `mend` repairs it in this process: no file of Dassl's is changed, and a
    Dassl without the break is left alone.
    """

    id: str  # "B1", ...: see docs/reference/dassl.md
    summary: str  # what works after it
    found: Callable[[], bool]
    mend: Callable[[], None]
    applied: bool = False

    def apply(self) -> None:
        """Mend the break if it is there; say so, once, at debug level."""
        try:
            found = self.found()
        except Exception as error:  # a Dassl that has no such part, or another one
            logger.debug("Dassl, %s: nothing to try (%s: %s)", self.id, type(error).__name__, error)
            return
        if not found:
            return
        try:
            self.mend()
        except Exception as error:  # a fork of Dassl that is broken in another way
            logger.warning("Dassl, %s could not be mended (%s: %s)", self.id, type(error).__name__, error)
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
