"""Shards that are worker processes with GPUs, over NCCL: the transport of a CUDA cell.

A process group belongs to one epoch: it is built under a prefix of its own in the store that shard 0 keeps, and what
is left of an older one is aborted, never destroyed or synchronised with: a member of it may be dead. The same class
runs over gloo, which is how it is tested where there is no GPU.
"""

import math
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore  # torch.distributed's own, which has no types

from serve_app.model.shards import Shape
from serve_app.runtime.dispatch import Pump

WAIT_LIMIT_S = 300.0  # for the peers; whatever happened to one, the engine ends the epoch much sooner
JOIN_LIMIT_S = 60.0  # for the peers to build their end of the group

Backend = Literal["nccl", "gloo"]


def open_store(host: str) -> tuple[TCPStore, str]:
    """The store by which the groups of a TP group's epochs find together, and its address. Its shard 0 keeps it."""
    limit = timedelta(seconds=JOIN_LIMIT_S)
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit)
    return store, f"{host}:{store.port}"


class CollectiveShards:
    """`Shards` of one worker in one epoch. While it waits it serves its peers, as everything in a worker does."""

    def __init__(
        self,
        *,
        epoch: int,
        index: int,
        num: int,
        store: str,
        backend: Backend,
        pump: Pump,
    ) -> None:
        """`store`: the address of shard 0's.

        Blocks until the other shards build theirs; RuntimeError where they do not within JOIN_LIMIT_S.
        """
        self.index, self.num = index, num
        self._epoch, self._pump = epoch, pump
        host, port = store.rsplit(":", 1)
        limit = timedelta(seconds=JOIN_LIMIT_S)
        base = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=limit)
        self._group = _build(backend, PrefixStore(f"epoch {epoch}", base), index, num)

    def exchange(self, parts: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """One all-to-all of bytes. It is polled, not waited for: a peer may need our experts before it can come.

        Without a pause between the polls: over NVLink an exchange takes 20 us, and the shortest sleep in the inbox
        is a millisecond.
        """
        dtype = parts[0].dtype
        given = torch.cat([_bytes(part) for part in parts])
        sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
        taken = given.new_empty(sum(sizes))
        work = self._group.alltoall_base(taken, given, sizes, [_num_bytes(part) for part in parts], _options())
        deadline = time.monotonic() + WAIT_LIMIT_S
        while not work.is_completed():
            if time.monotonic() > deadline:
                others = f"the other {self.num - 1} in epoch {self._epoch}"
                raise TimeoutError(f"shard {self.index} waited {WAIT_LIMIT_S:.0f} s for {others}")
            self._pump(0)
        work.wait()
        chunks = torch.split(taken, sizes)
        return [chunk.view(dtype).view(shape) for chunk, shape in zip(chunks, shapes, strict=True)]

    def leave(self) -> None:
        """The epoch is over: end what is under way, without asking the others."""
        if hasattr(self._group, "abort"):
            self._group.abort()


def _build(backend: Backend, store: PrefixStore, index: int, num: int) -> Any:
    limit = timedelta(seconds=JOIN_LIMIT_S)
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        return dist.ProcessGroupNCCL(store, index, num, options)
    return dist.ProcessGroupGloo(store, index, num, limit)


def _options() -> Any:
    return dist.AllToAllOptions()


def _bytes(part: Tensor) -> Tensor:
    return part.contiguous().view(-1).view(torch.uint8)


def _num_bytes(part: Tensor) -> int:
    return part.numel() * part.dtype.itemsize
