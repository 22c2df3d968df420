"""Reading checkpoints, whoever wrote them, without running code from the file.

A checkpoint of Dassl's holds more than tensors: its warm-up schedulers are saved with the scheduler that follows them
as an object, the optimiser inside. Such a file needs an unpickler, and an unpickler runs what the file says. The one
here calls a short list of functions that build tensors and containers; every other class or function in the file
becomes a `Record`: its name, its arguments and its attributes, which can be read and do nothing.

    state = read_checkpoint("output/prompt_learner/model.pth.tar-50")
    state["state_dict"]["ctx"]
"""

from __future__ import annotations

import collections
import os
import pickle
import struct
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gram_meta.errors import GramError, in_one_line
from gram_meta.files import PathLike


class Record:
    """An object of a checkpoint that was not built: `of` names its class or function, `state` holds its attributes."""

    of = ""
    args: tuple[Any, ...]  # it was to be called with
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        self = object.__new__(cls)
        self.args = args
        self.state = {}
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def _ignore(self, *values: Any) -> None:
        """What an unpickler adds to lists, sets and dicts is dropped."""

    append = extend = add = update = __setitem__ = _ignore

    def __repr__(self) -> str:
        return f"<record of {self.of}>"


def read_checkpoint(path: PathLike, map_location: Any = "cpu") -> dict[str, Any]:
    """The contents of a checkpoint: ours, CoOp's or Dassl's, old or new.

    Args:
        path: a file that `torch.save` wrote.
        map_location: where the tensors go, as in `torch.load`.

    Returns:
        A dict; what is neither a tensor nor a plain value in it is a `Record`. "state_dict", where there is one, holds
        tensors alone.

    Raises:
        GramError: no such file, or something else than a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise GramError(f"{path}: expected a checkpoint, found no such file")
    _refuse_other_archives(path)
    state = _load(path, map_location)
    if isinstance(state, Record):
        raise GramError(
            f"{path}: expected a checkpoint (a dict of tensors and plain values), found {state.of} as an object; "
            "objects are not built from files"
        )
    if not isinstance(state, dict):
        raise GramError(f"{path}: expected a checkpoint (a dict of tensors and plain values), found {_article(state)}")
    _check_tensors(path, state)
    return state


# ---------------------------------------------------------------------------------------------- learning-rate schedules


def schedule_state(scheduler: Any) -> dict[str, Any]:
    """What a learning-rate scheduler has to keep: its plain values, those of its `successor` (a warm-up's) nested."""
    state = schedule_numbers(scheduler)
    successor = getattr(scheduler, "successor", None)
    return state if successor is None else {**state, "successor": schedule_state(successor)}


def restore_schedule(scheduler: Any, saved: Any) -> None:
    """Take a schedule back from `schedule_state`, or from what Dassl saved.

    Dassl saves a warm-up's successor as an object, with a copy of the optimiser inside. Its numbers are taken; the
    successor goes on driving the optimiser that the scheduler was built for. Restore the optimiser too: a schedule
    multiplies the rates it finds there.
    """
    numbers = schedule_numbers(saved)
    own = {key for key in vars(scheduler) if key != "successor"}
    vars(scheduler).update({key: value for key, value in numbers.items() if key in own})
    successor = getattr(scheduler, "successor", None)
    if successor is not None:
        restore_schedule(successor, _part(saved, "successor"))


def schedule_numbers(state: Any) -> dict[str, Any]:
    """The plain values of a scheduler: of its state dict, of the object, or of the `Record` of one."""
    attributes = _attributes(state)
    return {key: value for key, value in attributes.items() if isinstance(key, str) and _is_plain(value)}


def _attributes(state: Any) -> Mapping[Any, Any]:
    if isinstance(state, Record):
        state = state.state
    if isinstance(state, Mapping):
        return state
    return getattr(state, "__dict__", {})


def _part(state: Any, name: str) -> Any:
    return _attributes(state).get(name)


# ------------------------------------------------------------------------------------------------------------ loading


def _load(path: Path, map_location: Any) -> Any:
    import torch

    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, UnicodeDecodeError):
        pass  # something else than tensors and plain values is in it, or it is no pickle at all
    except Exception as error:
        raise GramError(_unreadable(path, error)) from error
    try:
        # the second reading, with classes left out; latin1 reads what Python 2 wrote, and changes nothing else
        return torch.load(
            path, map_location=map_location, weights_only=False, pickle_module=_RESTRICTED, encoding="latin1"
        )
    except Exception as error:  # whatever a damaged or forged file makes the unpickler stumble over
        raise GramError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    found = in_one_line(error)
    return f"{path}: expected a checkpoint of tensors and plain values, found something that is not ({found})"


def _refuse_other_archives(path: Path) -> None:
    """`torch.load` also takes TorchScript, which is code, and archives of 2016, which it would unpack."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04":
        import torch

        try:
            names = torch._C.PyTorchFileReader(os.fspath(path)).get_all_records()
        except Exception as error:  # a damaged archive; of several kinds, a name that is no text among them
            raise GramError(_unreadable(path, error)) from error
        if "constants.pkl" in names:
            raise GramError(f"{path}: expected a checkpoint of tensors and plain values, found TorchScript code")
    elif tarfile.is_tarfile(path):
        raise GramError(f"{path}: expected a checkpoint of tensors and plain values, found a tar archive")


def _check_tensors(path: Path, state: dict[str, Any]) -> None:
    """A state dict with objects in it would fail much later, and less clearly."""
    tensors = state.get("state_dict")
    if not isinstance(tensors, Mapping):
        if tensors is None:
            return
        raise GramError(f"{path}: expected tensors by name as state_dict, found {_article(tensors)}")
    for name, value in tensors.items():
        if isinstance(value, Record):
            raise GramError(f"{path}: expected a tensor as {name} in state_dict, found {value.of} as an object")


def _article(value: Any) -> str:
    return value.of if isinstance(value, Record) else f"a {type(value).__name__}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, bool | int | float | str)


# ------------------------------------------------------------------------------------------- the restricted unpickler


class _Safe:
    """One function that a checkpoint may call. Not the function itself: a file could set attributes on that."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(self, "_function"):
            raise pickle.UnpicklingError("a function cannot be changed from a file")
        object.__setattr__(self, name, value)


def _safe_functions() -> dict[str, Callable[..., Any]]:
    """What may be called: rebuilding tensors, containers of plain values, NumPy's numbers."""
    import torch

    table: dict[str, Callable[..., Any]] = {
        "collections.OrderedDict": collections.OrderedDict,
        "collections.Counter": collections.Counter,  # the milestones of MultiStepLR
        "collections.defaultdict": lambda factory=None, *items: dict(*items),
        "torch.Size": torch.Size,
        "torch.device": torch.device,
        "torch._utils._rebuild_tensor": torch._utils._rebuild_tensor,
        "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
        "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
        "numpy.core.multiarray.scalar": _numpy_number,
        "numpy._core.multiarray.scalar": _numpy_number,
        "_codecs.encode": _encode,
    }
    for module in ("builtins", "__builtin__"):  # today's name, and Python 2's
        table |= {f"{module}.{kind.__name__}": kind for kind in (set, frozenset, complex)}
    return table


def _numpy_number(dtype: Any, data: Any = None) -> Any:
    """A NumPy number, such as a validation accuracy, as Python's."""
    kinds = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "u1": "B", "b1": "?"}
    kind = dtype.args[0] if isinstance(dtype, Record) and dtype.args else None
    if kind not in kinds or not isinstance(data, bytes):
        return Record(dtype, data)
    return struct.unpack(f"<{kinds[kind]}", data)[0]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How protocol 2 of pickle writes bytes."""
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Builds tensors and plain containers; everything else becomes a `Record`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._safe = _safe_functions()
        self._found: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        import torch

        path = f"{module}.{name}"
        if path not in self._found:
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                self._found[path] = getattr(torch, name)
            elif path in self._safe:
                self._found[path] = _Safe(self._safe[path])
            else:
                self._found[path] = type("Record", (Record,), {"of": path})
        return self._found[path]


def _unpickle(file: Any, **kwargs: Any) -> Any:
    return _Unpickler(file, **kwargs).load()


_RESTRICTED: Any = SimpleNamespace(__name__="gram_meta.engine.checkpoints", Unpickler=_Unpickler, load=_unpickle)
