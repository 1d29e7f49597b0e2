"""Who sits where: stages (PP) x replicas (DP) x shards (TP), and which layers a stage holds."""

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple


class Seat(NamedTuple):
    """A place in the layout, given to one worker for one epoch."""

    stage: int
    replica: int
    shard: int


@dataclass(frozen=True)
class Layout:
    """A grid of seats, one worker each. Raises ValueError for a size below one."""

    num_stages: int
    num_replicas: int
    num_shards: int = 1

    def __post_init__(self) -> None:
        for name in ("num_stages", "num_replicas", "num_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")

    @property
    def num_workers(self) -> int:
        return self.num_stages * self.group_size

    @property
    def group_size(self) -> int:
        """Workers of one stage's expert group: EP = DP x TP."""
        return self.num_replicas * self.num_shards

    def seats(self) -> list[Seat]:
        """All seats, by stage, then replica, then shard."""
        return [
            Seat(*place) for place in product(range(self.num_stages), range(self.num_replicas), range(self.num_shards))
        ]

    def group_rank(self, seat: Seat) -> int:
        """The seat's rank [0, group_size) in the expert group of its stage."""
        return seat.replica * self.num_shards + seat.shard

    def check_model(self, num_layers: int, num_heads: int, num_kv_heads: int) -> None:
        """Raise ValueError with one sentence if a model of these sizes cannot be laid out so."""
        stage_layers(num_layers, self.num_stages)
        for name, num in (("attention heads", num_heads), ("key-value heads", num_kv_heads)):
            if num % self.num_shards:
                raise ValueError(f"num_shards={self.num_shards} must divide the model's {num} {name}.")


def stage_layers(num_layers: int, num_stages: int) -> list[range]:
    """The layers of each stage: consecutive, half-open, their numbers differing by at most one.

    Layers left over go to the inner stages first, the earlier ones first, then to the first stage and never to the
    last: that one also runs the head, a matrix product over the whole vocabulary, and the sampler; the first one only
    looks its embeddings up. Raises ValueError if a stage would have no layer.
    """
    if num_stages < 1 or num_layers < 1:
        raise ValueError(f"num_stages={num_stages} and num_layers={num_layers} must both be at least 1.")
    if num_stages > num_layers:
        raise ValueError(f"num_stages={num_stages} must not exceed the model's {num_layers} layers.")
    least, num_extra = divmod(num_layers, num_stages)
    favoured = [*range(1, num_stages - 1), 0][:num_extra]
    stages, start = [], 0
    for stage in range(num_stages):
        end = start + least + (stage in favoured)
        stages.append(range(start, end))
        start = end
    return stages
