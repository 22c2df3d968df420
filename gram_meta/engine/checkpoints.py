"""Reading checkpoints of any origin without running code from the file.

Dassl's checkpoints hold more than tensors: a warm-up scheduler is saved with its successor as an object, and the
optimiser inside that. Such a file needs an unpickler, and Python's runs any code that the file names. The one here
calls only a short list of functions that build tensors and containers. Every other class or function in the file
becomes a `Record` with its name, arguments and attributes, which can be read and do nothing.
"""

from __future__ import annotations

import collections
import os
import pickle
import struct
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gram_meta.errors import GramError, as_gram_error, in_one_line
from gram_meta.files import PathLike


class Record:
    """An object of a checkpoint that was not built: `of` names its class or function, `state` holds its attributes."""

    of = ""
    args: tuple[Any, ...]  # of the call that would have built it
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
        """Drop what an unpickler adds to lists, sets and dicts."""

    append = extend = add = update = __setitem__ = _ignore

    def __repr__(self) -> str:
        return f"<record of {self.of}>"


def read_checkpoint(path: PathLike, map_location: Any = "cpu") -> dict[str, Any]:
    """Return the contents of a checkpoint of this project, CoOp or Dassl, of any version.

    Args:
        path: a file that `torch.save` wrote.
        map_location: device of the tensors, as in `torch.load`.

    Returns:
        A dict of tensors, plain values and `Record`s. Its "state_dict", if there is one, holds tensors only.

    Raises:
        GramError: no such file, or something else than a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise GramError(f"{path}: expected a checkpoint, found no such file")
    with as_gram_error(path, "cannot be read"):
        _refuse_other_archives(path)
    state = _load(path, map_location)
    if not isinstance(state, dict):
        hint = " as an object; objects are not built from files" if isinstance(state, Record) else ""
        raise GramError(
            f"{path}: expected a checkpoint (a dict of tensors and plain values), found {_kind(state)}{hint}"
        )
    _check_tensors(path, state)
    return state


def check_finite(path: PathLike, tensors: Mapping[str, Any]) -> None:
    """Raise a `GramError` for the first learned tensor with NaN, or a number that 16 bits have no form for."""
    import torch

    for name, value in tensors.items():
        if (
            isinstance(value, torch.Tensor)
            and not (fine := value.float().abs() <= torch.finfo(torch.float16).max).all()
        ):
            found = f"{int((~fine).sum())} of {value.numel()} that are not, or are above 65,504"
            raise GramError(f"{path}: expected finite numbers in {name}, found {found}")


@contextmanager
def restoring(path: PathLike) -> Iterator[None]:
    """Turn any error of restoring a state, such as a missing part, into a `GramError`."""
    try:
        yield
    except GramError:
        raise
    except Exception as error:
        raise GramError(
            f"{path}: expected a whole state that training can go on from, found another ({in_one_line(error)})"
        ) from error


def schedule_state(scheduler: Any) -> dict[str, Any]:
    """Return the plain values of a learning-rate scheduler, with those of its `successor` (after a warm-up) nested."""
    state = schedule_numbers(scheduler)
    successor = getattr(scheduler, "successor", None)
    return state if successor is None else {**state, "successor": schedule_state(successor)}


def restore_schedule(scheduler: Any, saved: Any) -> None:
    """Restore a schedule from `schedule_state`, or from what Dassl saved.

    Dassl saves a warm-up's successor as an object, with a copy of the optimiser inside. Only its numbers are taken; the
    successor still drives the optimiser that the scheduler was built for. Restore the optimiser too: a schedule
    multiplies the rates it finds there.
    """
    numbers = schedule_numbers(saved)
    own = {key for key in vars(scheduler) if key != "successor"}
    vars(scheduler).update({key: value for key, value in numbers.items() if key in own})
    successor = getattr(scheduler, "successor", None)
    if successor is not None:
        restore_schedule(successor, _attributes(saved).get("successor"))


def schedule_numbers(state: Any) -> dict[str, Any]:
    """Return the plain values of a scheduler: of its state dict, of the object, or of the `Record` of one."""
    return {key: value for key, value in _attributes(state).items() if isinstance(key, str) and _is_plain(value)}


def _attributes(state: Any) -> Mapping[Any, Any]:
    if isinstance(state, Record):
        state = state.state
    return state if isinstance(state, Mapping) else getattr(state, "__dict__", {})


def _load(path: Path, map_location: Any) -> Any:
    import torch

    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, UnicodeDecodeError):
        pass  # it holds more than tensors and plain values, or it is no pickle at all
    except Exception as error:
        raise _unreadable(path, error) from error
    options = {"weights_only": False, "pickle_module": _RESTRICTED, "encoding": "latin1"}  # latin1: Python 2's pickles
    try:
        return torch.load(path, map_location=map_location, **options)
    except Exception as error:  # a damaged or forged file may raise anything
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> GramError:
    return _other(path, f"something that is not ({in_one_line(error)})")


def _other(path: Path, found: str) -> GramError:
    return GramError(f"{path}: expected a checkpoint of tensors and plain values, found {found}")


def _refuse_other_archives(path: Path) -> None:
    """Raise for other files that `torch.load` takes: TorchScript, which is code, and tar archives of 2016."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04":
        import torch

        try:
            names = torch._C.PyTorchFileReader(os.fspath(path)).get_all_records()
        except Exception as error:  # a damaged archive raises errors of several classes
            raise _unreadable(path, error) from error
        if "constants.pkl" in names:
            raise _other(path, "TorchScript code")
    elif tarfile.is_tarfile(path):
        raise _other(path, "a tar archive")


def _check_tensors(path: Path, state: dict[str, Any]) -> None:
    """Raise if the state dict holds something else than dense tensors of real numbers, which would fail later."""
    import torch

    tensors = state.get("state_dict", {})
    if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
        raise GramError(f"{path}: expected tensors by name as state_dict, found {_kind(tensors)}")
    for name, value in tensors.items():
        if isinstance(value, Record):
            raise GramError(f"{path}: expected a tensor as {name} in state_dict, found {value.of} as an object")
        if not isinstance(value, torch.Tensor):
            raise GramError(f"{path}: expected a tensor as {name} in state_dict, found {_kind(value)}")
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_complex():
            kind = f"{value.layout}, {value.dtype} on {value.device}"
            raise GramError(f"{path}: expected a dense tensor of real numbers as {name}, found {kind}")


def _kind(value: Any) -> str:
    return value.of if isinstance(value, Record) else f"a {type(value).__name__}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, bool | int | float | str)


class _Safe:
    """Wraps a function that a checkpoint may call, so that the file cannot set attributes of the function."""

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
    """Return the functions that a checkpoint may call; they build tensors, plain containers and NumPy's numbers."""
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
        "_codecs.encode": lambda text, encoding="latin1": text.encode("latin1"),  # protocol 2 writes bytes like this
    }
    for module in ("builtins", "__builtin__"):  # today's name, and Python 2's
        table |= {f"{module}.{kind.__name__}": kind for kind in (set, frozenset, complex)}
    return table


def _numpy_number(dtype: Any, data: Any = None) -> Any:
    """Return a NumPy number, such as a validation accuracy, as Python's."""
    kinds = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "u1": "B", "b1": "?"}
    kind = dtype.args[0] if isinstance(dtype, Record) and dtype.args else None
    if kind not in kinds or not isinstance(data, bytes):
        return Record(dtype, data)
    return struct.unpack(f"<{kinds[kind]}", data)[0]


class RestrictedUnpickler(pickle.Unpickler):
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
    return RestrictedUnpickler(file, **kwargs).load()


_RESTRICTED: Any = SimpleNamespace(__name__=__name__, Unpickler=RestrictedUnpickler, load=_unpickle)
