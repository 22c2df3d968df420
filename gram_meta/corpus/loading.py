"""Work that processes do ahead of the caller: reading images and shards."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from gram_meta.errors import GramError, in_one_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Item = TypeVar("Item")
T = TypeVar("T")


def run_ahead(
    make: Callable[[Item], T],
    items: Iterable[Item],
    workers: int,
    advice: str,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> Iterator[T]:
    """Yield `make(item)` for each item in order, computed ahead by worker processes.

    Args:
        make: can be pickled; its errors (`GramError`, `OSError`) are raised here.
        workers: number of processes; 0: each result is computed in this process when it is asked for.
        advice: the end of the message if a worker process dies.
        prefetch: results that each worker has ready. pin_memory: put tensors into pinned memory, for a GPU.

    Raises:
        GramError: a worker process died.
    """
    if not workers and not pin_memory:
        return map(make, items)
    from torch.utils.data import DataLoader

    loader: DataLoader[Any] = DataLoader(
        cast(Any, _Calls(make)),
        batch_size=None,
        sampler=items,
        num_workers=workers,
        collate_fn=_unchanged,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
    )
    return _results(loader, advice)


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on a device. A GPU copies it from pinned memory while this process goes on."""
    return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)


class _Calls(Generic[Item, T]):
    """Map-style data set whose items are results of `make`, or its errors: a loader would add a traceback to them."""

    def __init__(self, make: Callable[[Item], T]) -> None:
        self.make = make

    def __getitem__(self, item: Item) -> T | GramError | OSError:
        try:
            return self.make(item)
        except (GramError, OSError) as error:
            return error


def _unchanged(result: T) -> T:
    return result


def _results(loader: Iterable[Any], advice: str) -> Iterator[Any]:
    for result in iterate_loader(loader, advice):
        if isinstance(result, GramError | OSError):
            raise result
        yield result


def iterate_loader(loader: Iterable[T], advice: str) -> Iterator[T]:
    """Yield the items of a `DataLoader`; if a process of it dies (often of memory), raise `GramError` with `advice`."""
    try:
        yield from _without_signal(loader)
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        error.__traceback__ = None  # it holds the loader, which now may end its other processes
        raise GramError(f"reading images: a worker process died ({in_one_line(error)}); {advice}") from None


def _without_signal(loader: Iterable[T]) -> Iterator[T]:
    """Return an iterator of `loader` that reports a dead worker only when it is asked for the next item.

    torch also reports it by a signal handler, which would raise in whatever the main thread is doing at that moment.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    if getattr(handler, "__module__", "").startswith("torch."):  # an earlier loader has set it
        handler = signal.SIG_DFL
    iterator = iter(loader)
    signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    return iterator
