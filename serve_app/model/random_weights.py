"""Random weights of any shape, made when asked for: tests need no file."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from serve_app.model.files import Expected, expected_tensors
from serve_app.model.random_values import random_tensor
from serve_app.model.spec import ModelSpec


@dataclass(frozen=True)
class RandomWeights:
    """Stands where a `Checkpoint` stands. A tensor depends on its name and the seed only."""

    spec: ModelSpec
    seed: int

    def tensor(self, name: str) -> Tensor:
        """fp32, as `random_tensor` makes it. KeyError as a checkpoint."""
        return torch.from_numpy(random_tensor(name, self._expected[name].shape, self.seed))

    @cached_property
    def _expected(self) -> dict[str, Expected]:
        return expected_tensors(self.spec)


def random_checkpoint(spec: ModelSpec, seed: int = 0) -> RandomWeights:
    """Random weights for `spec`, the same in every process."""
    return RandomWeights(spec, seed)
