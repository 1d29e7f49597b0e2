"""Who sits where: stages (PP) x replicas (DP) x shards (TP), which layers a stage holds, and which heads a shard."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, product
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

    def check_model(self, num_layers: int, num_heads: int) -> None:
        """Raise ValueError with one sentence if a model of these sizes cannot be laid out so."""
        stage_layers(num_layers, self.num_stages)
        if self.num_shards > num_heads:
            raise ValueError(f"num_shards={self.num_shards} must not exceed the model's {num_heads} attention heads.")


def cut_at(num_layers: int, counts: Sequence[int]) -> list[range]:
    """Stages of these numbers of layers. Raises ValueError where they are not the model's, or one has none."""
    if sum(counts) != num_layers or min(counts) < 1:
        raise ValueError(f"stages of {list(counts)} layers do not make up the model's {num_layers}, each at least 1.")
    ends = list(accumulate(counts))
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def cut(num: int, num_parts: int, part: int) -> range:
    """The part [0, num_parts) of `num` things in a row: consecutive, sizes differing by at most one."""
    return range(num * part // num_parts, num * (part + 1) // num_parts)


@dataclass(frozen=True)
class HeadCut:
    """The attention heads of one shard: for each of its KV heads the same number of query heads.

    Query heads are cut evenly over the shards; a shard has each KV head that one of its query heads reads, so that
    KV heads are replicated where shards outnumber them. Where the cut goes through a KV head's group, the shard's
    smaller groups are padded: None is a query head of zeros, which adds nothing to the output.
    """

    queries: tuple[int | None, ...]  # group after group, in the order of `kv_heads`
    kv_heads: range
    counted_kv: range  # those that this shard is the first to have: what is summed over KV heads counts each once

    @property
    def num_heads(self) -> int:
        return len(self.queries)


def cut_heads(num_heads: int, num_kv_heads: int, num_shards: int, shard: int) -> HeadCut:
    """The heads of a shard. `num_shards` is at most `num_heads`, which is a multiple of `num_kv_heads`."""
    group_size = num_heads // num_kv_heads
    own = cut(num_heads, num_shards, shard)
    kv_heads = range(own.start // group_size, (own.stop - 1) // group_size + 1)
    groups = [range(max(own.start, j * group_size), min(own.stop, (j + 1) * group_size)) for j in kv_heads]
    width = max(map(len, groups))
    queries = tuple(head for group in groups for head in (*group, *[None] * (width - len(group))))
    first = kv_heads.start + (own.start % group_size != 0)
    return HeadCut(queries, kv_heads, range(first, kv_heads.stop))


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
