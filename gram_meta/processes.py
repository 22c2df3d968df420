"""A group of processes that share one piece of work, as `torchrun` starts them; without `torchrun`, a group of one.

    torchrun --nproc_per_node 4 -m gram_meta embed ...

`process_group()` connects this process to the others. Values are exchanged through gloo on CPUs and nccl between GPUs.

When one process fails, it sets a flag that the others read at their next exchange. They then exit silently, so that the
user reads one error message.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from gram_meta.errors import GramError, in_one_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

# Rank 0 may join a large store for an hour while the others wait for it. torchrun ends all processes when one dies, so
# only a process that hangs ever waits this long.
TIMEOUT = timedelta(days=1)


@dataclass(frozen=True)
class ProcessGroup:
    """The rank of this process, and exchanges with the others."""

    rank: int = 0  # number of this process, 0 to size - 1
    size: int = 1  # number of processes
    local_rank: int = 0  # number of this process on this machine

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: list[T]) -> list[T]:
        """Return this process's part of a list: every size-th item, from the rank-th on."""
        return items[self.rank :: self.size]

    def share_range(self, count: int) -> range:
        """Return this process's part of range(count): consecutive numbers; sizes of parts differ by at most one."""
        each, rest = divmod(count, self.size)
        start = self.rank * each + min(self.rank, rest)
        return range(start, start + each + (self.rank < rest))

    def wait(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Wait until all processes have called this; call `meanwhile` a few times a second until then."""
        if self.size == 1:
            return
        with self._exchange():  # over gloo: a barrier of nccl would occupy a GPU that the towers do not use yet
            work = _dist().barrier(group=_on_cpu(), async_op=True)
            while meanwhile is not None and not work.is_completed():
                meanwhile()
                time.sleep(0.2)
            work.wait()

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in rank order. Values must be small, picklable and on the CPU."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._exchange():
            _dist().all_gather_object(values, value, group=_on_cpu())
        return values

    def from_first(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        with self._exchange():
            _dist().broadcast_object_list(box, src=0, group=_on_cpu())
        return box[0]

    def first(self, make: Callable[[], T]) -> T:
        """Run `make` on rank 0 and broadcast its result. If it raises there, every process exits."""
        return self.from_first(make() if self.is_first else None)  # type: ignore[return-value]

    def make_on_all_ranks(self, make: Callable[[], T]) -> T:
        """Run `make` on every rank. If any rank fails, the lowest failing rank raises and the others exit."""
        problem: GramError | None = None
        try:
            made = make()
        except GramError as error:
            problem = error
        failed = [rank for rank, has in enumerate(self.gather(problem is not None)) if has]
        if failed:
            raise problem if problem is not None and failed[0] == self.rank else SystemExit(STATUS)
        return made

    def fail(self, message: str) -> NoReturn:
        """End every rank, all of which call this: rank 0 raises a `GramError` with the message, the others exit."""
        raise GramError(message) if self.is_first else SystemExit(STATUS)

    def count(self, name: str, amount: int = 0) -> int:
        """Add to a counter that the processes share and return its value, without waiting for the others.

        If another process has failed, this process exits here; a process that works alone for long so learns of it.
        """
        if self.size == 1:
            _counters[name] = _counters.get(name, 0) + amount
            return _counters[name]
        with self._exchange():
            if _store.add(FAILED, 0):
                raise SystemExit(STATUS)
            return _store.add(name, amount)

    def add(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in one exchange. Shapes must be the same on every rank."""
        if self.size == 1 or not tensors:
            return
        import torch

        together = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self._exchange():
            _dist().all_reduce(together)
        parts = together.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Turn the loss of another process into an exit, silent where that process has reported why it ended."""
        try:
            yield
        except RuntimeError as error:  # gloo and the store promise no narrower type
            if _has_failed():
                raise SystemExit(STATUS) from None
            raise GramError(
                f"process {self.rank} of {self.size}: expected the others, found that one has ended "
                f"({_first_sentence(error)}); finished work is kept: run the same command again"
            ) from None


ALONE = ProcessGroup()


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count(wish: int = -1) -> int:
    """Return how many processes read images ahead: `wish`; for -1 one for each core, up to 8.

    Processes that `torchrun` has started on this machine share the cores.
    """
    share = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, share)) if wish < 0 else wish


def workers_for(device: torch.device) -> int:
    """Return the default of `--workers`: on a GPU that of `worker_count`, on a CPU, whose cores are busy, 0."""
    return 0 if device.type == "cpu" else worker_count()


def ranks() -> ProcessGroup:
    """Return this process's ranks from the environment that `torchrun` sets; connect to no other process yet."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        return ALONE
    rank = int(os.environ["RANK"])
    return ProcessGroup(rank, size, int(os.environ.get("LOCAL_RANK", rank)))


def device_for(group: ProcessGroup, name: str = "") -> str:
    """Return the device of a process: `name` if it is given, else the GPU of its local rank, else the CPU.

    With several processes on a machine, `cuda` is the GPU of the local rank as well.
    """
    import torch

    if name in ("", "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and group.size > 1:
        return f"cuda:{group.local_rank % max(torch.cuda.device_count(), 1)}"
    return name


@contextmanager
def process_group(device: str | torch.device = "cpu") -> Iterator[ProcessGroup]:
    """Connect to the processes that `torchrun` started with this one, and disconnect at the end.

    If the block fails in one process, the others exit silently at their next exchange, with status 2. All ranks but the
    first log warnings only. `device` is that of this process's tensors, as `device_for` takes it; a GPU uses nccl, and
    is CUDA's current device: until the end of the block for one process, and for good in a process of several.
    """
    group = ranks()
    if group.size == 1:
        with _current(str(device)):
            yield group
        return
    import torch
    import torch.distributed as dist

    global _store, _gloo
    device = torch.device(device_for(group, str(device)))
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    try:
        _store, rank, size = next(dist.rendezvous("env://", group.rank, group.size, timeout=TIMEOUT))
        _store.set_timeout(TIMEOUT)
        dist.init_process_group(
            backend, store=dist.PrefixStore("job", _store), rank=rank, world_size=size, timeout=TIMEOUT
        )
    except RuntimeError as error:
        raise GramError(
            f"process {group.rank} of {group.size}: expected to join the others, found {_first_sentence(error)}"
        ) from None
    muted = logging.root.manager.disable
    if not group.is_first:
        logging.disable(logging.INFO)
    try:
        yield group
    except BaseException:
        with suppress(RuntimeError):
            ended, until = _store.add(FAILED, 1), time.monotonic() + 2
            while group.is_first and ended < group.size and time.monotonic() < until:
                time.sleep(0.05)  # its process may hold the store, where the others see why theirs ends
                ended = _store.add(FAILED, 0)
        raise
    finally:
        logging.disable(muted)
        _gloo = None
        dist.destroy_process_group()


def _current(name: str) -> AbstractContextManager[Any]:
    """Return a context in which a GPU that is named by its number (cuda:1) is CUDA's current device.

    A GPU that this machine does not have changes nothing here; whoever loads the towers reports it.
    """
    kind, _, number = name.partition(":")
    if kind != "cuda" or not number.isdecimal():
        return nullcontext()
    import torch

    return torch.cuda.device(int(number)) if int(number) < torch.cuda.device_count() else nullcontext()


def _dist() -> Any:
    """Import torch's exchanges between processes; a process that works alone does without torch here."""
    import torch.distributed

    return torch.distributed


def _has_failed() -> bool:
    """Return whether a process has set the failure flag."""
    try:
        return bool(_store.add(FAILED, 0))
    except RuntimeError:  # the process that held the store is gone
        return False


def _first_sentence(error: RuntimeError) -> str:
    """Return the first sentence of an error of gloo or the store, without the place in its source."""
    text = in_one_line(error)
    return (text.partition("] ")[2] if text.startswith("[/") else text).partition(". ")[0]


def _on_cpu() -> Any:
    """Return the group for objects, which uses gloo also where tensors use nccl."""
    global _gloo
    if _dist().get_backend() == "gloo":
        return None
    if _gloo is None:
        _gloo = _dist().new_group(backend="gloo", timeout=TIMEOUT)
    return _gloo


FAILED = "gram/failed"
STATUS = 2  # exit status of a process that ends because another one has failed

_store: Any = None
_gloo: Any = None
_counters: dict[str, int] = {}  # of a group of one process
