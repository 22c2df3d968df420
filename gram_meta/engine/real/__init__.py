"""The installed Dassl, imported with its known breaks mended (last touched in 2022, it trains no CoOp config as published).

    repairs = import_repaired()
    [repair.id for repair in repairs if repair.applied]

Every repair first tries whether its break is there. All of them act on this process alone: no file is changed. Where
`dassl` has been imported before, its classes are mended in place and its functions replaced in every module that holds
them, so that it does not matter who comes first.
"""

from __future__ import annotations

from gram_meta.engine.real import files, imports, metrics, schedules, transforms
from gram_meta.engine.real.repair import Repair

__all__ = ["Repair", "import_repaired"]


def import_repaired() -> list[Repair]:
    """Import `dassl.engine` and mend what is broken; every known repair, with `applied` set where it was needed.

    Raises:
        GramError: Dassl does not import; the message names the missing package.
    """
    repairs = imports.import_dassl()
    for part in (schedules, files, transforms, metrics):
        repairs += part.repairs()
    for repair in repairs:
        repair.apply()
    return repairs
