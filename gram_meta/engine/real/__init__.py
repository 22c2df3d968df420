"""The installed Dassl, imported with fixes of its known faults: as published in 2022, it trains no CoOp config today.

Each fix first tests whether its fault is there, and changes this process alone, no file. Where `dassl` has been
imported before, its classes are changed in place and its functions replaced in every module that holds them, so that
the order of imports does not matter. This is the hook `dassl-fixes`.
"""

from collections.abc import Callable
from typing import Any

from gram_meta.engine.real import imports
from gram_meta.engine.real.fix import Fix
from gram_meta.engine.real.fixes import fixes

__all__ = ["Fix", "import_as_it_is", "import_fixed"]


def import_fixed(restore: Callable[[str, str], Any]) -> list[Fix]:
    """Import `dassl.engine` and repair what is broken; return every known fix, with `applied` set where it was needed.

    `restore` makes an empty object of a class from module and name; spawned processes unpickle with it. Raises
    `GramError` if Dassl does not import; the message names the missing package.
    """
    found = [*imports.import_dassl(restore), *fixes()]
    for fix in found:
        fix.apply()
    return found


def import_as_it_is() -> list[Fix]:
    """Import `dassl.engine` without any fix; same errors as `import_fixed`."""
    with imports.clear_errors():
        imports.import_engine()
    return []
