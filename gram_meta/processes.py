"""Several processes that share one job, as `torchrun` starts them; without it, a job of one process.

    torchrun --nproc_per_node 4 -m gram_meta embed ...

`job()` joins the others and says who is who. Results travel through gloo on CPUs and nccl between GPUs.

When one of them fails, it says so to the others, which then end as well, without a word: one sentence is enough.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from gram_meta.errors import GramError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

# Only a process that is stuck waits this long: torchrun ends all of them when one dies, and the first process may join a
# large store for an hour while the others wait for it.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Job:
    """Who this process is among those of its job.

    Attributes:
        rank: its number, 0 to size - 1. size: processes in all.
        local_rank: its number on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: list[T]) -> list[T]:
        """Every size-th item, from the rank-th on: what of a list is this process's."""
        return items[self.rank :: self.size]

    def run_of(self, count: int) -> range:
        """Which of `count` things are this process's: a run of them, as even as can be, in the order of ranks."""
        each, rest = divmod(count, self.size)
        start = self.rank * each + min(self.rank, rest)
        return range(start, start + each + (self.rank < rest))

    def wait(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Go on when all have come here; `meanwhile` is called a few times a second until then."""
        if self.size == 1:
            return
        import torch.distributed as dist

        with self._with_others():  # over gloo: a barrier of nccl would occupy a GPU that the towers do not use yet
            work = dist.barrier(group=_on_cpu(), async_op=True)
            while meanwhile is not None and not work.is_completed():
                meanwhile()
                time.sleep(0.2)
            work.wait()

    def gather(self, value: T) -> list[T]:
        """What each process brings, in the order of ranks; small picklable things, all on the CPU."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with self._with_others():
            dist.all_gather_object(values, value, group=_on_cpu())
        return values

    def from_first(self, value: T) -> T:
        """What the first process brings, in all of them."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        with self._with_others():
            dist.broadcast_object_list(box, src=0, group=_on_cpu())
        return box[0]

    def first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; where it fails, all end."""
        return self.from_first(make() if self.is_first else None)  # type: ignore[return-value]

    def count(self, name: str, amount: int = 0) -> int:
        """Add to a number that the processes share, and return its sum so far, without waiting for anybody.

        Also where a process that works by itself for long learns that another one has failed: then it ends.
        """
        if self.size == 1:
            _alone[name] = _alone.get(name, 0) + amount
            return _alone[name]
        with self._with_others():
            if _store.add(FAILED, 0):
                raise SystemExit(STATUS)
            return _store.add(name, amount)

    @contextmanager
    def _with_others(self) -> Iterator[None]:
        """An exchange with the others; when they are gone, why is known from them, or said here."""
        try:
            yield
        except RuntimeError as error:  # of gloo, of the store: no better kind is promised
            if _has_failed():
                raise SystemExit(STATUS) from None
            raise GramError(
                f"process {self.rank} of {self.size}: expected the others, found that one has ended "
                f"({_told(error)}); what is done is kept: run the same command again"
            ) from None

    def add(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in one exchange; same shapes everywhere."""
        if self.size == 1 or not tensors:
            return
        import torch
        import torch.distributed as dist

        together = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self._with_others():
            dist.all_reduce(together)
        parts = together.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


ALONE = Job()


def ranks() -> Job:
    """Who this process is, by the environment that `torchrun` sets; joins nobody yet."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        return ALONE
    rank = int(os.environ["RANK"])
    return Job(rank, size, int(os.environ.get("LOCAL_RANK", rank)))


def device_for(job: Job, name: str = "") -> str:
    """The device a process works on: `name` where it is given, else the GPU of its local rank, else the CPU.

    With several processes on a machine, `cuda` is the GPU of the local rank as well.
    """
    import torch

    if name in ("", "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and job.size > 1:
        return f"cuda:{job.local_rank % max(torch.cuda.device_count(), 1)}"
    return name


@contextmanager
def job(device: str | torch.device = "cpu") -> Iterator[Job]:
    """Join the processes that `torchrun` started with this one, and leave them at the end.

    Where the block fails here, the others end at their next exchange: with exit status 2 and without a word. All but
    the first log warnings only.

    Args:
        device: where this process's tensors live, as `device_for` takes it; a GPU is bound to nccl.
    """
    here = ranks()
    if here.size == 1:
        yield here
        return
    import torch
    import torch.distributed as dist

    global _store, _gloo
    device = torch.device(device_for(here, str(device)))
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    try:
        _store, rank, size = next(dist.rendezvous("env://", here.rank, here.size, timeout=PATIENCE))
        _store.set_timeout(PATIENCE)
        dist.init_process_group(
            backend, store=dist.PrefixStore("job", _store), rank=rank, world_size=size, timeout=PATIENCE
        )
    except RuntimeError as error:
        raise GramError(
            f"process {here.rank} of {here.size}: expected to join the others, found {_told(error)}"
        ) from None
    muted = logging.root.manager.disable
    if not here.is_first:
        logging.disable(logging.INFO)
    try:
        yield here
    except BaseException:
        with suppress(RuntimeError):
            _store.add(FAILED, 1)
        raise
    finally:
        logging.disable(muted)
        _gloo = None
        dist.destroy_process_group()


def _has_failed() -> bool:
    """Whether one of the processes has said that it ends."""
    try:
        return bool(_store.add(FAILED, 0))
    except RuntimeError:  # the store went with the process that held it
        return False


def _told(error: RuntimeError) -> str:
    """The first sentence of what gloo or the store says, without the place in its source."""
    text = " ".join(str(error).split())
    return text.partition("] ")[2].partition(". ")[0] if text.startswith("[/") else text.partition(". ")[0][:200]


def _on_cpu() -> Any:
    """The group for objects, over gloo also where tensors go over nccl."""
    import torch.distributed as dist

    global _gloo
    if dist.get_backend() == "gloo":
        return None
    if _gloo is None:
        _gloo = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _gloo


FAILED = "gram/failed"
STATUS = 2  # of a process that ends because another one has failed

_store: Any = None
_gloo: Any = None
_alone: dict[str, int] = {}  # the numbers of a job of one process
