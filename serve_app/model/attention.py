"""Grouped-query attention over paged KV: an online softmax (arXiv 1805.02867, 2205.14135) whose sums have one order.

Keys are met in blocks of one fixed size, aligned to absolute positions, and merged in block order by elementwise
operations. So a row's result depends on its own keys only: not on the batch, on chunking, or on padding, whose keys
weigh exactly zero. (torch's SDPA picks its split by shape: up to 40 % of single rows differ from the same row in a
prefill.) In bf16 the products are bf16; the softmax and the sums across blocks are fp32.

Shapes: T tokens, H query heads, D head size, N tiles, A tiles that reach a level, Q queries per tile,
B tokens per KV block, X = tiles * kv heads, R = Q * query heads per KV head.
"""

import torch
from torch import Tensor

from serve_app.model.tiles import KV_BLOCK_TOKENS, AttentionWork, Heads, Level, Piece

SMALL_PRODUCTS = 16**3  # multiplications, see `_bmm`


class PagedKV:
    """The keys and values of a stage's layers, in pages that any sequence may hold.

    Layout per layer: (page, kv head, token in page, D), so that one row of a gather is page_tokens * D contiguous.
    """

    def __init__(
        self,
        heads: Heads,
        *,
        num_layers: int,
        num_pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if KV_BLOCK_TOKENS % page_tokens:
            raise ValueError(f"page_tokens must divide {KV_BLOCK_TOKENS}, not be {page_tokens}")
        self.heads = heads
        self.num_pages = num_pages
        shape = (2, num_layers, num_pages * heads.num_kv_heads, page_tokens * heads.head_dim)
        self._k, self._v = torch.zeros(shape, dtype=dtype, device=device)
        # gathered blocks, kept from call to call: fresh memory faults in slowly
        self._scratch = torch.empty(2, 0, shape[-1], dtype=dtype, device=device)

    def write(self, layer: int, work: AttentionWork, k_THD: Tensor, v_THD: Tensor) -> None:
        """Put the step's keys and values where its plan says. `layer` counts from the stage's first."""
        for cache, new_THD in ((self._k, k_THD), (self._v, v_THD)):
            rows = new_THD.reshape(-1, self.heads.head_dim)
            cache[layer].view(-1, self.heads.head_dim).index_copy_(0, work.kv_slots, rows)

    def gather(self, layer: int, level: Level) -> tuple[Tensor, Tensor]:
        """K and V of one block for each tile that reaches it, both XBD. Valid until the next gather."""
        num_rows = len(level.kv_rows)
        if self._scratch.shape[1] < num_rows:
            self._scratch = self._scratch.new_empty(2, num_rows, self._scratch.shape[2])
        k_rows = torch.index_select(self._k[layer], 0, level.kv_rows, out=self._scratch[0, :num_rows])
        v_rows = torch.index_select(self._v[layer], 0, level.kv_rows, out=self._scratch[1, :num_rows])
        shape = (-1, KV_BLOCK_TOKENS, self.heads.head_dim)
        return k_rows.view(shape), v_rows.view(shape)


def attend(kv: PagedKV, layer: int, work: AttentionWork, q_THD: Tensor) -> Tensor:
    """Attention of each token over its sequence up to itself, T(H*D). `q_THD` carries the factor 1 / sqrt(D).

    The step's own keys and values are already written.
    """
    outputs = [_run(kv, layer, piece, q_THD) for piece in work.pieces]
    rows = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return rows.index_select(0, work.places_T)


def _run(kv: PagedKV, layer: int, piece: Piece, q_THD: Tensor) -> Tensor:
    """One piece's output rows, (N*Q)(H*D)."""
    heads = kv.heads
    q_XRD = _to_groups(q_THD.index_select(0, piece.query_rows), piece, heads)
    state = _Softmax.begin(*_block(kv, layer, piece.levels[0], q_XRD))
    for level in piece.levels[1:]:
        num_active = level.num_tiles * heads.num_kv_heads
        state.merge(*_block(kv, layer, level, q_XRD[:num_active]))
    return _from_groups(state.result().to(q_THD.dtype), piece, heads)


def _block(kv: PagedKV, layer: int, level: Level, q_ARD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of one block and its values: (scores_XRB in fp32, their maxima_XR1, v_XBD)."""
    k_XBD, v_XBD = kv.gather(layer, level)
    scores_XRB = _bmm(q_ARD, k_XBD.transpose(1, 2)).float()
    if level.bias_A1Q1B is not None:
        bias = level.bias_A1Q1B
        scores_XRB.view(level.num_tiles, kv.heads.num_kv_heads, bias.shape[2], -1, KV_BLOCK_TOKENS).add_(bias)
    return scores_XRB, scores_XRB.amax(-1, keepdim=True), v_XBD


class _Softmax:
    """Running maximum, sum of weights and weighted sum of values of each row, all fp32."""

    def __init__(self, top_XR1: Tensor, total_XR1: Tensor, values_XRD: Tensor) -> None:
        self._top, self._total, self._values = top_XR1, total_XR1, values_XRD

    @classmethod
    def begin(cls, scores_XRB: Tensor, top_XR1: Tensor, v_XBD: Tensor) -> "_Softmax":
        return cls(top_XR1, *_weigh(scores_XRB, top_XR1, v_XBD))

    def merge(self, scores_XRB: Tensor, top_XR1: Tensor, v_XBD: Tensor) -> None:
        """Add a block to the first rows. One whose keys are all masked changes nothing: its factors are 1 and 0."""
        num_active = len(top_XR1)
        old_top, total, values = self._top[:num_active], self._total[:num_active], self._values[:num_active]
        new_top = torch.maximum(old_top, top_XR1)
        shrink = (old_top - new_top).exp_()
        old_top.copy_(new_top)
        block_total, block_values = _weigh(scores_XRB, new_top, v_XBD)
        total.mul_(shrink).add_(block_total)
        values.mul_(shrink).add_(block_values)

    def result(self) -> Tensor:
        return self._values.div_(self._total)


def _weigh(scores_XRB: Tensor, top_XR1: Tensor, v_XBD: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of the weights, weighted sum of the values) of one block, fp32. Overwrites the scores."""
    weights_XRB = scores_XRB.sub_(top_XR1).exp_()
    return weights_XRB.sum(-1, keepdim=True), _bmm(weights_XRB.to(v_XBD.dtype), v_XBD).float()


def _bmm(a_XIJ: Tensor, b_XJK: Tensor) -> Tensor:
    """Products of many matrices. Few small ones are repeated until they are enough for the kernel of the others.

    torch gives a bf16 product to oneDNN only above 16**3 multiplications, and its own kernel has other bits.
    """
    num_products = a_XIJ.numel() * b_XJK.shape[-1]
    if num_products > SMALL_PRODUCTS or a_XIJ.device.type != "cpu":
        return torch.bmm(a_XIJ, b_XJK)
    times = SMALL_PRODUCTS // num_products + 1
    return torch.bmm(a_XIJ.repeat(times, 1, 1), b_XJK.repeat(times, 1, 1))[: len(a_XIJ)]


def _to_groups(q: Tensor, piece: Piece, heads: Heads) -> Tensor:
    """(N*Q)HD -> XRD: the query heads of one KV head side by side."""
    kv_heads, group_size, head_dim = heads.num_kv_heads, heads.group_size, heads.head_dim
    split = q.view(piece.num_tiles, piece.tile_queries, kv_heads, group_size, head_dim)
    return split.transpose(1, 2).reshape(piece.num_tiles * kv_heads, -1, head_dim)


def _from_groups(out_XRD: Tensor, piece: Piece, heads: Heads) -> Tensor:
    """XRD -> (N*Q)(H*D)."""
    split = out_XRD.view(piece.num_tiles, heads.num_kv_heads, piece.tile_queries, heads.group_size, heads.head_dim)
    return split.transpose(1, 2).reshape(piece.num_tiles * piece.tile_queries, -1)
