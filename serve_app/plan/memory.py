"""What a worker of a CPU cell holds in memory: a cost model, checked by `benchmarks/memory.py`.

Weights, pages and tables are counted as `model.stage`, `model.block` and `model.moe` make them, byte by byte. Three
things are measured instead: what an idle process holds, what a kernel of oneDNN takes, and how much more than its
tensors a step holds. What is held is what the system calls resident: mapped pages of the checkpoint are in it.

Letters: T tokens of the largest step, S of them at home on one shard, N = S * top_k rows for experts, D hidden size,
F expert width, C head size, H query heads of a shard, J of its KV heads, V vocabulary of a shard.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from serve_app.experts.layout import HeadCut, Layout, Seat, cut, cut_heads
from serve_app.experts.placement import Slots
from serve_app.model.spec import ModelSpec

# A worker process of `bench.cell` that has loaded a model of next to nothing and run a step (torch 2.13, one thread):
# 162 MiB of its own and 105 MiB of libraries' pages, which processes of one machine share but each is charged for.
PROCESS_BYTES = 267 << 20
RAY_ACTOR_BYTES = 304 << 20  # the same imports and a product, in an actor of Ray 2.60

# oneDNN keeps a kernel for each shape of a product: 0.55 MiB each, whatever the shape (80 shapes measured). Which are
# met is a matter of the traffic. A batch of 256 and one long prompt made 120 on one worker of the reference model
# (ONEDNN_VERBOSE=profile_create), of 141 counted as `num_kernels` does. In a long life there can be MAX_KERNELS.
KERNEL_BYTES = 576_000
KERNELS_MET = 0.8
MAX_KERNELS = 1024  # ONEDNN_PRIMITIVE_CACHE_CAPACITY

# What a step holds at its peak over the tensors that are alive then: the allocator's pieces between them. Measured:
# 27 MiB for 17 in steps of 512 tokens, 137 MiB for 73 in those of 256 sampled rows (reference model, one worker).
ALLOCATOR_FACTOR = 1.8

_FP32_BYTES = 4
_STORED_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_PACKED_BYTES = 2  # of bf16, of which oneDNN takes a copy in its own layout

# As in `model.tiles`.
_KV_BLOCK_TOKENS = 128
_SCRATCH_BYTES = 4 << 20
_TILES_MET = {1: 16, 32: 8, 64: 8}  # width: how many different numbers of tiles of it come together; others are rare


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes by what they are for."""

    dense_bytes: int  # of its layers: projections of its heads, norms, gates, shared experts
    experts_bytes: int  # all of its slots full, primary and standby
    vocabulary_bytes: int  # its part of the embedding (first stage) and of the head (last stage: twice, see there)
    tables_bytes: int  # cosines and sines of all positions
    kv_bytes: int
    step_bytes: int  # at the peak of the largest step
    kernels_bytes: int
    process_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(astuple(self))


def worker_memory(
    spec: ModelSpec,
    layout: Layout,
    stages: Sequence[range],
    seat: Seat,
    slots: Slots,
    *,
    page_tokens: int,
    kv_gib: float,
    dtype_bytes: int,
    max_step_tokens: int,
    max_running: int,
    process_bytes: int = PROCESS_BYTES,
) -> WorkerMemory:
    """What the worker of `seat` holds once it has run its largest steps, on a CPU.

    `stages`: the layers of each. `dtype_bytes`: of what it computes in, 2 (bf16, packed for oneDNN) or 4 (fp32).
    `max_running`: sequences at a time in one replica, of which a step samples a share: as many steps are in flight as
    there are stages. Sampling is taken to be greedy: at a temperature the last stage holds up to three more copies of
    the logits.
    """
    worker = _Worker(spec, layout, stages[seat.stage], seat, dtype_bytes)
    num_pages = worker.num_pages(page_tokens, kv_gib)
    sampled = min(max_step_tokens, _ceil(max_running, layout.num_stages))
    return WorkerMemory(
        dense_bytes=worker.dense_bytes(),
        experts_bytes=worker.experts_bytes(slots),
        vocabulary_bytes=worker.vocabulary_bytes(),
        tables_bytes=worker.tables_bytes(num_pages * page_tokens),
        kv_bytes=num_pages * worker.page_bytes(page_tokens),
        step_bytes=int(ALLOCATOR_FACTOR * worker.step_bytes(max_step_tokens, sampled)),
        kernels_bytes=worker.kernels_bytes(max_step_tokens, sampled),
        process_bytes=process_bytes,
    )


@dataclass(frozen=True)
class _Worker:
    """The sizes that everything is counted in."""

    spec: ModelSpec
    layout: Layout
    layers: range
    seat: Seat
    dtype_bytes: int

    @property
    def is_first(self) -> bool:
        return self.layers.start == 0

    @property
    def is_last(self) -> bool:
        return self.layers.stop == self.spec.num_layers

    @property
    def heads(self) -> HeadCut:
        return cut_heads(self.spec.num_heads, self.spec.num_kv_heads, self.layout.num_shards, self.seat.shard)

    @property
    def num_heads(self) -> int:
        return self.heads.num_heads

    @property
    def num_kv_heads(self) -> int:
        return len(self.heads.kv_heads)

    @property
    def num_words(self) -> int:
        """Of the vocabulary, on this shard."""
        return len(cut(self.spec.vocab_size, self.layout.num_shards, self.seat.shard))

    # -- what is loaded ---------------------------------------------------------------------------------------------

    def dense_bytes(self) -> int:
        last_norm = self._norm_bytes() if self.is_last else 0
        return len(self.layers) * self._layer_bytes() + last_norm

    def _layer_bytes(self) -> int:
        spec, hidden = self.spec, self.spec.hidden_size
        num_rows = (self.num_heads + 2 * self.num_kv_heads) * spec.head_dim  # of q, k and v
        values = num_rows * hidden + num_rows * spec.qkv_bias
        values += hidden * self.num_heads * spec.head_dim + hidden * (spec.output_bias and self.seat.shard == 0)
        values += 0 if spec.is_dense else spec.num_experts * hidden
        values += 0 if spec.shared_size is None else 3 * hidden * spec.shared_size + hidden
        turned = 0 if spec.qk_norm == "none" else (self.num_heads + self.num_kv_heads) * spec.head_dim
        return values * self.dtype_bytes + turned * _FP32_BYTES + 2 * self._norm_bytes()

    def _norm_bytes(self) -> int:
        return self.spec.hidden_size * _FP32_BYTES * (2 if self.spec.norm == "layer" else 1)

    def experts_bytes(self, slots: Slots) -> int:
        """Of as many experts as there are slots, or as the stage has: two copies never are on one worker."""
        num_pairs = len(self.layers) * self.spec.num_experts
        num_held = min(slots.primary + slots.standby, num_pairs)
        return num_held * 3 * self.spec.hidden_size * self.spec.expert_size * self.dtype_bytes

    def vocabulary_bytes(self) -> int:
        """The head is held as it is multiplied with and as the checkpoint has it, for tied logits (`_sharpen`).

        Without packing and in one dtype they are one. What is tied to the embedding is another view of the same pages
        of the file, for which the process is charged again.
        """
        stored_bytes = _STORED_BYTES[self.spec.dtype]
        is_one = self.dtype_bytes == stored_bytes != _PACKED_BYTES
        head_bytes = stored_bytes + (0 if is_one else self.dtype_bytes)
        width = self.spec.hidden_size + self.spec.head_bias
        embedding_bytes = self.num_words * self.spec.hidden_size * self.dtype_bytes
        return self.is_first * embedding_bytes + self.is_last * self.num_words * width * head_bytes

    def tables_bytes(self, num_positions: int) -> int:
        return 2 * min(self.spec.max_positions, num_positions) * self.spec.head_dim * _FP32_BYTES

    def page_bytes(self, page_tokens: int) -> int:
        return 2 * len(self.layers) * page_tokens * self.num_kv_heads * self.spec.head_dim * self.dtype_bytes

    def num_pages(self, page_tokens: int, kv_gib: float) -> int:
        return max(1, int(kv_gib * 2**30) // self.page_bytes(page_tokens))

    # -- a step -----------------------------------------------------------------------------------------------------

    def step_bytes(self, num_tokens: int, num_sampled: int) -> int:
        """Of the tensors that are alive at the peak of a step of T tokens: the residual stream, and the widest part."""
        num_own = _ceil(num_tokens, self.layout.num_shards)
        residual_bytes = num_own * self.spec.hidden_size * _FP32_BYTES
        in_flight = 1 if self.is_first else 1 + self.layout.num_stages  # those of later steps may have come already
        part_bytes = max(
            self._attention_bytes(num_tokens, num_own),
            self._experts_step_bytes(num_own),
            self._head_step_bytes(num_sampled) if self.is_last else 0,
        )
        return in_flight * residual_bytes + part_bytes

    def _attention_bytes(self, num_tokens: int, num_own: int) -> int:
        """Normed rows, q, k, v, turned, gathered, attended twice (in tiles, in order), and the partial sums."""
        num_turned = self.num_heads + self.num_kv_heads
        width = num_turned * 2 + self.num_kv_heads + 2 * self.num_heads
        tokens_bytes = num_tokens * (width * self.spec.head_dim + 2 * self.spec.hidden_size) * self.dtype_bytes
        return num_own * self.spec.hidden_size * self.dtype_bytes + tokens_bytes + 2 * _SCRATCH_BYTES

    def _experts_step_bytes(self, num_own: int) -> int:
        """Rows in order, twice through gate and up (by expert, joined), once more inside, twice back, and combined.

        The rows that peers send are as many as those that are sent to them.
        """
        num_rows = num_own * self.spec.top_k
        rows_bytes = num_rows * (3 * self.spec.hidden_size + 5 * self.spec.expert_size) * self.dtype_bytes
        return rows_bytes + num_own * self.spec.hidden_size * (self.dtype_bytes + 2 * _FP32_BYTES)

    def _head_step_bytes(self, num_sampled: int) -> int:
        """Logits of this shard as they come and in fp32; on shard 0 those of all shards as well, sent and joined."""
        own_bytes = num_sampled * self.num_words * (self.dtype_bytes + _FP32_BYTES)
        joins = self.layout.num_shards > 1 and self.seat.shard == 0
        return own_bytes + 2 * joins * num_sampled * self.spec.vocab_size * _FP32_BYTES

    # -- kernels ----------------------------------------------------------------------------------------------------

    def kernels_bytes(self, num_tokens: int, num_sampled: int) -> int:
        if self.dtype_bytes != _PACKED_BYTES:
            return 0  # fp32 products are not oneDNN's
        return int(min(KERNELS_MET * self.num_kernels(num_tokens, num_sampled), MAX_KERNELS)) * KERNEL_BYTES

    def num_kernels(self, num_tokens: int, num_sampled: int) -> int:
        """Steps are full, or they decode: any number of rows up to those that are sampled.

        Projections, gate and shared expert see these; an expert up to twice its fair share, of all replicas' rows.
        """
        spec, num_replicas = self.spec, self.layout.num_replicas
        num_products = 2 + (not spec.is_dense) + 3 * (spec.shared_size is not None)
        fair_rows = _ceil(num_replicas * num_tokens * spec.top_k, spec.num_experts)
        return (
            num_products * (num_row_sizes(num_sampled) + 1)
            + 2 * num_row_sizes(min(2 * fair_rows, num_replicas * num_tokens))
            + self.is_last * num_row_sizes(num_sampled)
            + 2 * sum(self._num_tile_counts(width, num_tokens, num_sampled) for width in _TILES_MET)
        )

    def _num_tile_counts(self, width: int, num_tokens: int, num_sampled: int) -> int:
        """How many tiles of `width` queries come together: a piece is cut as `model.tiles` does it."""
        num_rows = width * self.num_heads // self.num_kv_heads
        tile_bytes = 4 * self.num_kv_heads * _KV_BLOCK_TOKENS * (num_rows + self.spec.head_dim)
        num_there = num_sampled if width == 1 else _ceil(num_tokens, width)
        return min(max(1, _SCRATCH_BYTES // tile_bytes), num_there, _TILES_MET[width])


def num_row_sizes(max_rows: int) -> int:
    """How many numbers of rows products of up to `max_rows` are computed with: see `padded_rows` in `model.layers`."""
    num_small = sum(size // 2 < max_rows for size in (1, 2, 4, 8, 16))
    return (
        num_small
        + _ceil(min(max(max_rows, 16), 64) - 16, 16)
        + _ceil(min(max(max_rows, 64), 256) - 64, 32)
        + _ceil(max(max_rows, 256) - 256, 128)
    )


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)
