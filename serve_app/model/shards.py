"""What the shards of one replica and stage say to each other in a step (tensor parallelism), and the sums over them.

Between its products a shard keeps only its own part of the step's tokens (Megatron's sequence parallelism, arXiv
2205.05198): the residual stream, the norms, the gate and the experts' dispatch are done once per token, and what an
all-reduce would send is sent as a gather before attention and a scatter of partial sums behind it: as many bytes.

Shapes: T tokens of the step, S of them at home on this shard, D any width.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from serve_app.experts.layout import cut

Shape = tuple[int, ...]


class Shards(Protocol):
    """The shards of one replica and stage, as one of them sees them."""

    @property
    def index(self) -> int: ...

    @property
    def num(self) -> int: ...

    def exchange(self, parts: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """Give `parts[j]` to shard j; return what each shard gave to this one, by shard.

        `shapes[j]`: what shard j gives, which every shard knows from the plan. All shards call in the same order.
        What is returned belongs to others too: it is read, never written to.
        """
        ...


class Alone:
    """One shard that is the whole replica."""

    index, num = 0, 1

    def exchange(self, parts: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        return list(parts)


def homes(num_rows: int, shards: Shards) -> list[range]:
    """Which rows are at home on each shard."""
    return [cut(num_rows, shards.num, j) for j in range(shards.num)]


def gather(x_SD: Tensor, counts: Sequence[int], shards: Shards) -> Tensor:
    """The rows of all shards, TD; shard j has `counts[j]` of them."""
    if shards.num == 1:
        return x_SD
    return torch.cat(shards.exchange([x_SD] * shards.num, [(count, *x_SD.shape[1:]) for count in counts]))


def add_partials(x_SD: Tensor, partial_TD: Tensor, shards: Shards, scale: float = 1.0) -> Tensor:
    """Add to this shard's rows what every shard has for them, `scale` times, in shard order. Writes over x_SD."""
    parts = [partial_TD[home.start : home.stop] for home in homes(len(partial_TD), shards)]
    for given_SD in shards.exchange(parts, [(len(x_SD), *x_SD.shape[1:])] * shards.num):
        x_SD += scaled(given_SD, scale)
    return x_SD


def scaled(x: Tensor, scale: float) -> Tensor:
    """`x` times `scale`, in fp32. A product of its own: fused with an addition, some elements are rounded otherwise."""
    return x if scale == 1.0 else x.float() * scale


def sum_over(x: Tensor, shards: Shards) -> Tensor:
    """The sum of every shard's `x`, in the order of the shards: the same bits on all of them."""
    first, *others = shards.exchange([x] * shards.num, [tuple(x.shape)] * shards.num)
    total = first.clone() if others else first
    for other in others:
        total += other
    return total


def embed(table_VD: Tensor, vocab: range, vocab_size: int, token_ids_T: Tensor, shards: Shards) -> Tensor:
    """Embeddings of this shard's tokens, SD in the table's dtype. `table_VD` holds the rows `vocab` of all."""
    if shards.num == 1:
        return table_VD[token_ids_T]
    owners_T = _owners(token_ids_T, vocab_size, shards.num)
    parts = []
    for home in homes(len(token_ids_T), shards):
        ids_S = token_ids_T[home.start : home.stop]
        parts.append(table_VD[ids_S[owners_T[home.start : home.stop] == shards.index] - vocab.start])
    own = cut(len(token_ids_T), shards.num, shards.index)
    own_owners_S = owners_T[own.start : own.stop]
    counts = torch.bincount(own_owners_S, minlength=shards.num).tolist()
    given = shards.exchange(parts, [(count, table_VD.shape[1]) for count in counts])
    x_SD = table_VD.new_empty(len(own), table_VD.shape[1])
    x_SD[torch.argsort(own_owners_S, stable=True)] = torch.cat(given)
    return x_SD


def _owners(token_ids_T: Tensor, vocab_size: int, num_shards: int) -> Tensor:
    """Which shard holds each token's embedding."""
    ends = torch.tensor([cut(vocab_size, num_shards, j).stop for j in range(num_shards)], device=token_ids_T.device)
    return torch.searchsorted(ends, token_ids_T, right=True)


def join_columns(part_RV: Tensor, num_columns: int, shards: Shards) -> Tensor:
    """On shard 0 the columns of all shards side by side, (R, num_columns); on the others no row of them."""
    if shards.num == 1:
        return part_RV
    num_rows, nothing = len(part_RV), part_RV[:0]
    parts = [part_RV, *[nothing] * (shards.num - 1)]
    widths = [len(cut(num_columns, shards.num, j)) for j in range(shards.num)]
    shapes = [(num_rows if shards.index == 0 else 0, width) for width in widths]
    given = shards.exchange(parts, shapes)
    return torch.cat(given, 1) if shards.index == 0 else part_RV.new_empty(0, num_columns)
