"""The attention work of one step as tiles and levels: index tensors only, built once per stage and step.

A tile is up to Q consecutive queries of one sequence. It meets its keys in blocks of KV_BLOCK_TOKENS, aligned to
absolute positions, in order: level b is block b of every tile that reaches it. Tiles are sorted by the number of their
blocks, so that those that reach a level are a prefix. Pieces bound the scratch memory.

Shapes: T tokens, N tiles of a piece, A tiles that reach a level, Q queries per tile, B tokens per KV block,
G query heads per KV head.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from serve_app.model.batch import Batch, Ints

KV_BLOCK_TOKENS = 128  # part of the arithmetic: sums run block by block
SCRATCH_BYTES = 4 << 20  # of gathered K and V, and of scores, per piece: about what stays in cache


@dataclass(frozen=True)
class Heads:
    """The attention shape that the indices depend on."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group_size(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class Level:
    """One KV block of the first `num_tiles` tiles of a piece."""

    num_tiles: int
    kv_rows: Tensor  # A * kv_heads * pages per block: rows of the cache seen as (page, kv_head)
    bias_A1Q1B: Tensor | None  # 0 where the query may see the key, -inf where not; None where all see all


@dataclass(frozen=True)
class Piece:
    """Tiles that run together."""

    num_tiles: int
    tile_queries: int
    query_rows: Tensor  # N * Q: rows of the step's tokens; a short tile repeats its last
    levels: list[Level]


@dataclass(frozen=True)
class AttentionWork:
    """All pieces; `places_T` finds each token's row in their outputs laid end to end."""

    pieces: list[Piece]
    places_T: Tensor
    kv_slots: Tensor  # T * kv_heads: rows of the cache seen as (page, kv_head, offset), where K and V are written


@dataclass(frozen=True)
class _Tiles:
    """Tiles of one width, sorted by descending number of blocks."""

    slices: Ints  # N
    num_blocks: Ints  # N
    rows: Ints  # NQ
    num_queries: Ints  # N: those beyond repeat the last


def plan_attention(batch: Batch, heads: Heads) -> AttentionWork:
    """Single queries form tiles of one, so that all decoding sequences run in one call; longer slices are cut."""
    pieces: list[Piece] = []
    places = np.empty(len(batch.positions), dtype=np.int64)
    num_placed = 0
    for slices, tile_queries in _groups(batch):
        tiles = _cut(batch, slices, tile_queries)
        places[_own_rows(tiles)] = num_placed + np.flatnonzero(_is_own(tiles))
        num_placed += tiles.rows.size
        pieces.extend(_pieces(batch, heads, tiles))
    device = batch.positions_T.device
    return AttentionWork(pieces, torch.from_numpy(places).to(device), _kv_slots(batch, heads))


def _groups(batch: Batch) -> Iterator[tuple[Ints, int]]:
    """Slices by the width of their tiles."""
    single = batch.lengths == 1
    if single.any():
        yield np.flatnonzero(single), 1
    if not single.all():
        longest = int(batch.lengths.max())
        yield np.flatnonzero(~single), min(64, -(-longest // 16) * 16)


def _cut(batch: Batch, slices: Ints, tile_queries: int) -> _Tiles:
    num_tiles = -(-batch.lengths[slices] // tile_queries)
    of_tile = np.repeat(slices, num_tiles)
    ordinal = np.arange(len(of_tile)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
    offsets = ordinal * tile_queries
    num_queries = np.minimum(tile_queries, batch.lengths[of_tile] - offsets)
    num_blocks = -(-(batch.starts[of_tile] + offsets + num_queries) // KV_BLOCK_TOKENS)
    first_rows = (np.cumsum(batch.lengths) - batch.lengths)[of_tile] + offsets
    rows = first_rows[:, None] + np.minimum(np.arange(tile_queries), num_queries[:, None] - 1)
    order = np.argsort(-num_blocks, kind="stable")
    return _Tiles(of_tile[order], num_blocks[order], rows[order], num_queries[order])


def _is_own(tiles: _Tiles) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """NQ: False where a short tile repeats its last query."""
    own: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = np.arange(tiles.rows.shape[1]) < tiles.num_queries[:, None]
    return own


def _own_rows(tiles: _Tiles) -> Ints:
    return tiles.rows[_is_own(tiles)]


def _pieces(batch: Batch, heads: Heads, tiles: _Tiles) -> Iterator[Piece]:
    num_rows = tiles.rows.shape[1] * heads.group_size
    tile_bytes = 4 * heads.num_kv_heads * KV_BLOCK_TOKENS * (num_rows + heads.head_dim)
    step = max(1, SCRATCH_BYTES // tile_bytes)
    for begin in range(0, len(tiles.slices), step):
        cut = slice(begin, begin + step)
        part = _Tiles(tiles.slices[cut], tiles.num_blocks[cut], tiles.rows[cut], tiles.num_queries[cut])
        yield _piece(batch, heads, part)


def _piece(batch: Batch, heads: Heads, tiles: _Tiles) -> Piece:
    device = batch.positions_T.device
    query_rows = torch.from_numpy(tiles.rows.reshape(-1)).to(device)
    levels = [_level(batch, heads, tiles, block) for block in range(int(tiles.num_blocks[0]))]
    return Piece(len(tiles.slices), tiles.rows.shape[1], query_rows, levels)


def _level(batch: Batch, heads: Heads, tiles: _Tiles, block: int) -> Level:
    num_active = int(np.count_nonzero(tiles.num_blocks > block))
    device = batch.positions_T.device
    pages = _block_pages(batch, tiles.slices[:num_active], block)
    kv_rows = pages[:, None, :] * heads.num_kv_heads + np.arange(heads.num_kv_heads)[:, None]
    bias = _bias(batch.positions[tiles.rows[:num_active]], block)
    return Level(
        num_active, torch.from_numpy(kv_rows.reshape(-1)).to(device), None if bias is None else bias.to(device)
    )


def _block_pages(batch: Batch, slices: Ints, block: int) -> Ints:
    """Pages of a block, one row per slice; beyond the sequence's end its last page again, whose keys are masked."""
    per_block = KV_BLOCK_TOKENS // batch.page_tokens
    columns = np.minimum(np.arange(block * per_block, (block + 1) * per_block), batch.page_table.shape[1] - 1)
    pages: Ints = batch.page_table[slices[:, None], columns]
    return pages


def _bias(positions_AQ: Ints, block: int) -> Tensor | None:
    keys_B = np.arange(block * KV_BLOCK_TOKENS, (block + 1) * KV_BLOCK_TOKENS)
    if keys_B[-1] <= positions_AQ.min():
        return None
    bias_AQB = np.where(keys_B > positions_AQ[:, :, None], np.float32("-inf"), np.float32(0))
    return torch.from_numpy(bias_AQB)[:, None, :, None, :]


def _kv_slots(batch: Batch, heads: Heads) -> Tensor:
    pages, offsets = np.divmod(batch.slots, batch.page_tokens)
    rows = pages[:, None] * heads.num_kv_heads + np.arange(heads.num_kv_heads)
    slots = rows * batch.page_tokens + offsets[:, None]
    return torch.from_numpy(slots.reshape(-1)).to(batch.positions_T.device)
