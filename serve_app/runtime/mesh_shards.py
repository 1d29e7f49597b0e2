"""Shards that are worker processes, over the ZeroMQ mesh: the transport of a CPU cell."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from serve_app.model.shards import Shape
from serve_app.runtime.dispatch import Pump
from serve_app.runtime.frames import read_tensor, tensor_frame, tensor_header
from serve_app.runtime.mesh import Mesh
from serve_app.runtime.wire import ShardPart

WAIT_LIMIT_S = 300.0  # for a peer's part; whatever happened to it, the engine ends the epoch much sooner


class MeshShards:
    """`Shards` of one worker in one epoch. While it waits it serves its peers, as everything in a worker does."""

    def __init__(
        self,
        mesh: Mesh,
        *,
        epoch: int,
        peers: list[str],
        index: int,
        device: torch.device,
        pump: Pump,
    ) -> None:
        """`peers`: names by shard, this one among them."""
        self.index, self.num = index, len(peers)
        self._mesh, self._epoch, self._peers, self._device, self._pump = mesh, epoch, peers, device, pump
        self._round = 0  # exchanges so far: the same on all shards, for all run the same steps in the same order
        self._arrived: dict[tuple[int, int], Tensor] = {}  # (round, shard); a peer may be a round ahead

    def exchange(self, parts: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        self._round += 1
        for shard, part in enumerate(parts):
            if shard != self.index and part.numel():  # who gets nothing knows it
                header = ShardPart(self._epoch, self._round, self.index, *tensor_header(part))
                self._mesh.send(self._peers[shard], header, tensor_frame(part))
        own = parts[self.index]
        return [own if shard == self.index else self._from(shard, shapes[shard], own) for shard in range(self.num)]

    def accept(self, message: ShardPart, frame: memoryview | None) -> None:
        """Take a peer's part. ValueError where header and frame disagree, or it is of no shard or round to come."""
        if not 0 <= message.shard < self.num or message.round < self._round:
            raise ValueError(f"a part of shard {message.shard} in round {message.round}, after round {self._round}")
        self._arrived[message.round, message.shard] = read_tensor(message, frame, self._device)

    def _from(self, shard: int, shape: Shape, like: Tensor) -> Tensor:
        if 0 in shape:
            return like.new_empty(shape)
        deadline = time.monotonic() + WAIT_LIMIT_S
        while (part := self._arrived.pop((self._round, shard), None)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{self._peers[self.index]} waited {WAIT_LIMIT_S:.0f} s for the part of {self._peers[shard]}"
                    f" in round {self._round} of epoch {self._epoch}"
                )
            self._pump(1.0)
        if tuple(part.shape) != tuple(shape):
            raise ValueError(f"{self._peers[shard]} sent {tuple(part.shape)} where {tuple(shape)} was due")
        return part
