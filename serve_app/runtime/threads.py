"""Shards that are threads of one process: they meet at a barrier and hand each other their tensors as they are."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import TypeVar

from torch import Tensor

from serve_app.model.shards import Shape

T = TypeVar("T")


class ThreadShards:
    """`Shards` of one thread; `ThreadGroup` makes them."""

    def __init__(self, group: "ThreadGroup", index: int) -> None:
        self._group = group
        self.index = index
        self.num = group.num

    def exchange(self, parts: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        self._group.table[self.index] = parts
        self._group.barrier.wait()
        given = [self._group.table[j][self.index] for j in range(self.num)]
        self._group.barrier.wait()  # nobody puts his next parts there before all have taken these
        assert [tuple(part.shape) for part in given] == list(shapes), "the shards disagree about the step"
        return given


class ThreadGroup:
    """`num` shards. `run` calls a function once for each, at the same time."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.barrier = Barrier(num)
        self.table: list[Sequence[Tensor]] = [()] * num
        self.shards = [ThreadShards(self, index) for index in range(num)]
        self._pool = ThreadPoolExecutor(num, "shard")

    def run(self, function: Callable[[int], T]) -> list[T]:
        """[function(0), ...]. The error of one shard is raised here, and leaves none of the others waiting."""
        calls = [self._pool.submit(self._guarded, function, index) for index in range(self.num)]
        errors = [error for call in calls if (error := call.exception()) is not None]
        if errors:
            self.barrier.reset()
            raise next((error for error in errors if not isinstance(error, BrokenBarrierError)), errors[0])
        return [call.result() for call in calls]

    def _guarded(self, function: Callable[[int], T], index: int) -> T:
        try:
            return function(index)
        except BaseException:
            self.barrier.abort()
            raise
