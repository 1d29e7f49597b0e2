"""Weights from the memory of other workers: for one that is started when the checkpoint is gone from its disk.

The others have the checkpoint's files open still, removed or not, or have a copy of their own on another host.
"""

import time

import torch
from torch import Tensor

from serve_app.errors import CheckpointError
from serve_app.model.checkpoint import TOKENIZER
from serve_app.model.spec import ModelSpec
from serve_app.runtime.frames import read_tensor
from serve_app.runtime.mesh import Mesh
from serve_app.runtime.wire import Fetch, Weight

ANSWER_S = 10.0  # that a peer may take: it may be in the middle of a step


class PeerWeights:
    """Stands where a `Checkpoint` stands."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, peers: list[str]) -> None:
        """`mesh`: of its own, for the answers. `peers`: addresses of workers' inboxes."""
        self.spec = spec
        self._mesh = mesh
        self._peers = list(peers)
        for address in peers:
            mesh.connect(address, address)

    def tensor(self, name: str) -> Tensor:
        """The tensor of a canonical name, in the dtype in which it is stored. CheckpointError where nobody has it."""
        for address in list(self._peers):
            self._mesh.send(address, Fetch(name, self._mesh.address))
            tensor = self._answer(name)
            if tensor is not None:
                return tensor
            if name != TOKENIZER:  # which a checkpoint may lack
                self._peers.remove(address)  # dead, or as poor as we are
        raise CheckpointError(f"the checkpoint is gone from this disk, and no living worker has its tensor {name}")

    def _answer(self, name: str) -> Tensor | None:
        deadline_s = time.monotonic() + ANSWER_S
        while (left_s := deadline_s - time.monotonic()) > 0:
            received = self._mesh.receive(left_s)
            if received is None or not isinstance(received.message, Weight) or received.message.name != name:
                continue
            if received.frame is None:
                return None
            return read_tensor(received.message, received.frame, torch.device("cpu"))
        return None
