"""Tensors from a checkpoint folder, by canonical name: memory-mapped, so that a worker reads only what it asks for."""

from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open

from serve_app.model.files import Stored, locate_tensors
from serve_app.model.spec import ModelSpec


class Checkpoint:
    """A checked Hugging Face folder of safetensors. Any number of processes may have the same folder open."""

    def __init__(self, spec: ModelSpec, located: dict[str, Stored]) -> None:
        self.spec = spec
        self._located = located
        self._files: dict[Path, Any] = {}  # one mapping per shard, made when first needed

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Check the folder and open it. Raises CheckpointError as `check_folder` does."""
        return cls(*locate_tensors(folder))

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of a canonical name (see `files.expected_tensors`), in the dtype in which it is stored.

        A view of the mapped file: its bytes are read when they are first used. KeyError where this model has none.
        """
        stored = self._located[name]
        if stored.path not in self._files:
            self._files[stored.path] = safe_open(stored.path, framework="pt")
        tensor = cast(torch.Tensor, self._files[stored.path].get_tensor(stored.hf_name))
        if stored.cut is None:
            return tensor
        return tensor[stored.cut.expert, stored.cut.begin : stored.cut.end]
