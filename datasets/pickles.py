"""CoOp's few-shot pickles, read without running code from them, and written for CoOp's own code.

Such a file holds {"train": [Datum, ...], "val": [Datum, ...]} with absolute paths. Ordinary unpickling can run any
code; the reader here accepts only plain containers and these records.
"""

import pickle
from pathlib import Path
from typing import Any

from gram_meta.errors import GramError, in_one_line
from gram_meta.files import atomic_write

Record = tuple[str, int, str]  # absolute path of the image, label, class name

MAX_BYTES = 256 << 20  # 16 shots of ImageNet are 2 MB
DATUM_MODULES = ("dassl.data.datasets.base_dataset", "dassl.data.datasets", "dassl.data.datasets.build")


class _Datum:
    """Stands for Dassl's Datum while a file is read."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if module in DATUM_MODULES and name == "Datum":
            return _Datum
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside of itself")


def read_pickle(path: Path) -> dict[str, list[Record]]:
    """Return the records of a few-shot pickle by part ("train", "val"); raise `GramError` for any other content."""
    expected = f"{path}: expected CoOp's few-shot records (lists of dassl's Datum) and nothing else"
    if path.stat().st_size > MAX_BYTES:
        raise GramError(f"{expected}, found more than {MAX_BYTES >> 20} MB")
    try:
        with open(path, "rb") as file:
            contents = _Unpickler(file).load()
    except Exception as error:  # noqa: BLE001 - a damaged pickle can raise nearly anything
        raise GramError(f"{expected}; refused without running it: {in_one_line(error, 120)}") from None
    if not isinstance(contents, dict) or "train" not in contents:
        raise GramError(f'{expected}, found no list under "train"')
    for part, items in contents.items():
        if not isinstance(items, list):
            raise GramError(f"{expected}, found no list under {str(part)[:60]!r}")
    if others := set(contents) - {"train", "val"}:
        raise GramError(f"{expected}, found {', '.join(sorted(map(repr, others)))[:100]} beside them")
    return {part: [_record(item, expected) for item in items] for part, items in contents.items()}


def write_pickle(path: Path, parts: dict[str, list[Record]]) -> None:
    """Write the records as CoOp does, atomically; the images need not exist."""
    from gram_meta.engine import Datum

    def datum(record: Record) -> Any:
        item = Datum.__new__(Datum)  # its __init__ looks for the image
        item._impath, item._label, item._classname = record
        item._domain = 0
        return item

    contents = {part: [datum(record) for record in records] for part, records in parts.items()}
    with atomic_write(path) as file:
        pickle.dump(contents, file, protocol=pickle.HIGHEST_PROTOCOL)


def _record(item: Any, expected: str) -> Record:
    values = vars(item) if isinstance(item, _Datum) else {}
    record = values.get("_impath"), values.get("_label"), values.get("_classname")
    for value, kind in zip(record, (str, int, str), strict=True):
        if type(value) is not kind:
            raise GramError(f"{expected}, found a record without an image, a label or a class name")
    return record  # type: ignore[return-value]


def relative_to(path: str, known: Any) -> str | None:
    """Return the longest end of an absolute path that is one of the `known` relative paths, or None."""
    parts = path.replace("\\", "/").split("/")
    ends = ("/".join(parts[first:]) for first in range(len(parts)))
    return next((end for end in ends if end in known), None)
