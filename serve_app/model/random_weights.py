"""Random weights of any shape, made when asked for: benchmarks and tests need no file."""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from serve_app.model.files import expected_tensors
from serve_app.model.spec import ModelSpec


@dataclass(frozen=True)
class RandomWeights:
    """Stands where a `Checkpoint` stands. A tensor depends on its name and the seed only."""

    spec: ModelSpec
    seed: int

    def tensor(self, name: str) -> Tensor:
        """fp32: norms are near one, matrices scaled so that activations keep their size. KeyError as a checkpoint."""
        shape = expected_tensors(self.spec)[name].shape
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        values = torch.randn(shape, generator=generator)
        if name.endswith("norm"):
            return values.mul_(0.1).add_(1.0)
        return values if len(shape) == 1 else values.mul_(shape[1] ** -0.5)


def random_checkpoint(spec: ModelSpec, seed: int = 0) -> RandomWeights:
    """Random weights for `spec`, the same in every process."""
    return RandomWeights(spec, seed)
