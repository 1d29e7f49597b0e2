"""Tensors from a checkpoint folder, by canonical name: memory-mapped, so that a worker reads only what it asks for."""

import math
import os
import weakref
from pathlib import Path

import torch

from serve_app.model.files import Stored, locate_tensors
from serve_app.model.spec import ModelSpec

TOKENIZER = "tokenizer.json"  # a name beside those of the tensors: the file's bytes
_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8}


class Checkpoint:
    """A checked Hugging Face folder of safetensors. Any number of processes may have the same folder open.

    Its files are open for as long as it lives, so that a tensor can be had after the folder was removed.
    """

    def __init__(self, spec: ModelSpec, located: dict[str, Stored]) -> None:
        self.spec = spec
        self._located = located
        self._files: dict[Path, int] = {}
        weakref.finalize(self, _close, self._files)
        for path in {stored.path for stored in located.values()}:
            self._files[path] = os.open(path, os.O_RDONLY)

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Check the folder and open it. Raises CheckpointError as `check_folder` does."""
        spec, located = locate_tensors(folder)
        tokenizer = folder / TOKENIZER
        if tokenizer.is_file():
            located[TOKENIZER] = Stored(tokenizer, TOKENIZER, "U8", (tokenizer.stat().st_size,), 0)
        return cls(spec, located)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of a canonical name (see `files.expected_tensors`), in the dtype in which it is stored.

        A view of the mapped file: its bytes are read when they are first used. Each tensor has a mapping of its own,
        so that pages which were read leave this process's memory with the tensor that they were read for.
        KeyError where this model has none.
        """
        stored = self._located[name]
        dtype, num_values = _TORCH[stored.dtype], math.prod(stored.shape)
        mapped = _map(self._files[stored.path]).numpy()  # a buffer: in it a tensor may begin at any byte
        tensor = torch.frombuffer(mapped, dtype=dtype, count=num_values, offset=stored.offset_bytes).view(stored.shape)
        if stored.cut is None:
            return tensor
        return tensor[stored.cut.expert, stored.cut.begin : stored.cut.end]


def _map(file: int) -> torch.Tensor:
    """The bytes of an open file. Python's `mmap` would hold a descriptor for each mapping, and they are limited."""
    num_bytes = os.fstat(file).st_size
    return torch.from_file(f"/proc/self/fd/{file}", shared=False, size=num_bytes, dtype=torch.uint8)


def _close(files: dict[Path, int]) -> None:
    for file in files.values():
        os.close(file)
