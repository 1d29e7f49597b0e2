"""What one step costs on one GPU of a stage, operation by operation: a roofline (doi 10.1145/1498765.1498785).

An operation computes, moves bytes of memory, or sends bytes over a link. It takes as long as the slower of the first
two allow, or as its link does. Letters: S rows of the step, D hidden size, H query heads, J KV heads, C head size,
E experts of a layer, K experts of a token, F width of an expert, G workers of a stage, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

from serve_app.experts.layout import stage_layers
from serve_app.model.spec import ModelSpec
from serve_app.plan.counts import Precision, expert_params, shared_params
from serve_app.plan.deployment import Deployment
from serve_app.plan.footprint import shard_heads
from serve_app.plan.routing import busiest_touched, distinct_experts, expert_imbalance
from serve_app.plan.step import Step
from serve_app.plan.system import System

__all__ = ["Bound", "Op", "Stage", "Step", "distinct_experts", "expert_imbalance"]

Bound = Literal["compute", "memory", "link", "fixed"]


@dataclass(frozen=True)
class Op:
    """One kind of operation of a step, all layers of its stage together.

    Seconds are those of the busiest GPU, for which all others wait; work and bytes those of the mean one.
    """

    name: str
    seconds: float
    bound: Bound
    flops: float = 0.0
    memory_bytes: float = 0.0
    link_bytes: float = 0.0


class _Term(NamedTuple):
    """An operation whose work grows with one number, all layers of its stage together: per unit, and at any number."""

    name: str
    unit_flops: float
    fixed_bytes: float
    unit_bytes: float
    flops_s: float  # of one unit
    fixed_s: float
    bytes_s: float  # of one unit

    def op(self, units: float) -> Op:
        compute_s, memory_s = self.flops_s * units, self.fixed_s + self.bytes_s * units
        moved = self.fixed_bytes + self.unit_bytes * units
        bound: Bound = "compute" if compute_s >= memory_s else "memory"
        return Op(self.name, max(compute_s, memory_s), bound, self.unit_flops * units, moved)


class _Link(NamedTuple):
    """An exchange, all layers of its stage together."""

    name: str
    row_bytes: float
    fixed_s: float
    row_s: float

    def op(self, rows: float) -> Op:
        return Op(self.name, self.fixed_s + self.row_s * rows, "link", link_bytes=self.row_bytes * rows)


class _ExpertWork(NamedTuple):
    """Of one step on a GPU, all layers of its stage together; `busiest_touched`: experts in each layer."""

    flops: float
    memory_bytes: float
    busiest_flops: float
    busiest_bytes: float
    busiest_touched: float


@lru_cache
def layer_counts(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage."""
    return tuple(map(len, stage_layers(num_layers, num_stages)))


@dataclass(frozen=True)
class Stage:
    """One stage of a deployment on a system: what all its GPUs have in common.

    What does not depend on the step is worked out once: `seconds` is called thousands of times in a search.
    """

    spec: ModelSpec
    precision: Precision
    system: System
    deployment: Deployment
    index: int
    by_all_reduce: bool = False  # experts exchange nothing, their sums are reduced: how others than Octavo do it

    @cached_property
    def num_layers(self) -> int:
        return layer_counts(self.spec.num_layers, self.deployment.pp)[self.index]

    @property
    def is_last(self) -> bool:
        return self.index == self.deployment.pp - 1

    @cached_property
    def hops_inside(self) -> bool:
        """Whether this stage and the next are on one node in all cells, GPUs numbered by cell, stage, replica and
        shard."""
        layout, per_node = self.deployment, self.system.gpus_per_node
        starts = {cell * layout.cell_gpus % per_node for cell in range(min(layout.cells, per_node))}
        first, end = self.index * layout.ep, (self.index + 2) * layout.ep
        return all((start + first) // per_node == (start + end - 1) // per_node for start in starts)

    def seconds(self, step: Step, *, num_peers: float | None = None) -> float:
        """Of one step. `num_peers`: replicas of the cell that run one like it at the same time; default: all."""
        peers = self.deployment.dp if num_peers is None else num_peers
        rows = step.prompt_tokens + step.decode_rows
        total = self._fixed_s
        for term in self._terms:
            compute_s, memory_s = term.flops_s * rows, term.fixed_s + term.bytes_s * rows
            total += compute_s if compute_s > memory_s else memory_s
        half, (pair_s, kv_s) = self._half_block, self._attention_s
        if pairs := step.pairs + step.prompt_tokens * half:
            total += max(pairs * pair_s, (step.prompt_kv + half) * kv_s)
        total += (step.decode_kv + step.decode_rows * half) * max(pair_s, kv_s)
        if self._block_s:
            total += self._num_blocks(step) * self._block_s
        if rows:
            work = self._expert_work(rows, peers)
            total += max(work.busiest_flops * self._flop_s, work.busiest_bytes * self._byte_s)
            total += work.busiest_touched * self._call_s
        for link in self._links:
            total += link.fixed_s + link.row_s * rows
        if self._exchange is not None:
            total += self._exchange.fixed_s + self._exchange.row_s * self._sent(peers) * rows
        if self._head is not None and step.sampled:
            head = self._head
            total += max(head.flops_s * step.sampled, head.fixed_s + head.bytes_s * step.sampled)
            total += self._row_s * step.sampled
        return total

    def ops(self, step: Step, *, num_peers: float | None = None) -> list[Op]:
        """What the step is made of, in the order it runs."""
        peers = self.deployment.dp if num_peers is None else num_peers
        ops = [term.op(step.rows) for term in self._terms]
        ops += self._attention_ops(step)
        if step.rows:
            ops += self._expert_ops(step.rows, peers)
        ops += [link.op(step.rows) for link in self._links if link.name != "hop"]
        if self._exchange is not None:
            ops.append(self._exchange.op(step.rows * self._sent(peers)))
        ops += [link.op(step.rows) for link in self._links if link.name == "hop"]
        fixed_s = self._fixed_s
        if self._head is not None and step.sampled:
            ops.append(self._head.op(step.sampled))
            fixed_s += self._row_s * step.sampled
        return [*ops, Op("overhead", fixed_s, "fixed")] if fixed_s else ops

    # -- what does not depend on the step ---------------------------------------------------------------------------

    @cached_property
    def _slowdown(self) -> float:
        return self.system.slowdown(min(self.deployment.cell_gpus, self.system.gpus_per_node))

    @cached_property
    def _flop_s(self) -> float:
        """Seconds of one floating point operation."""
        return self._slowdown / (self.system.peak_flops(self.precision.compute) * self.system.efficiency.mfu)

    @cached_property
    def _byte_s(self) -> float:
        """Seconds of one byte of memory."""
        return self._slowdown / (self.system.memory_gb_s * 1e9 * self.system.efficiency.bandwidth)

    @cached_property
    def _fixed_s(self) -> float:
        eff = self.system.efficiency
        return self._slowdown * (eff.layer_us * self.num_layers + eff.step_us) / 1e6

    @cached_property
    def _row_s(self) -> float:
        """Of a sampled row, beside the head's product."""
        return self._slowdown * self.system.efficiency.row_us / 1e6

    @cached_property
    def _terms(self) -> tuple[_Term, ...]:
        """Of one row each."""
        return tuple(self._dense())

    def _dense(self) -> Iterator[_Term]:
        spec, tp = self.spec, self.deployment.tp
        hidden, act = spec.hidden_size, self.precision.activation_bytes
        # a residual sum and a norm, twice: two vectors in, two out; nothing of it is cut
        yield self._term("add and norm", 0.0, 0.0, 2 * 4 * hidden * act)
        heads, kv_heads = shard_heads(spec, tp)
        q, kv = heads * spec.head_dim, kv_heads * spec.head_dim
        yield self._product("qkv", hidden, q + 2 * kv)
        yield self._product("attention out", q, hidden)
        if not spec.is_dense:
            yield self._product("gate", hidden, spec.num_experts, 1 / tp)
        if shared := shared_params(spec):
            yield self._product("shared expert", hidden, shared / hidden, 1 / tp)

    def _product(self, name: str, num_in: float, num_out: float, share: float = 1.0) -> _Term:
        """`share`: of the rows, that come here."""
        unit_bytes = share * (num_in + num_out) * self.precision.activation_bytes
        weight_bytes = num_in * num_out * self.precision.weight_bytes
        return self._term(name, share * 2 * num_in * num_out, weight_bytes, unit_bytes)

    def _term(self, name: str, flops: float, fixed: float, unit_bytes: float, times: int | None = None) -> _Term:
        """`times`: as often as there are layers, if not told otherwise."""
        num = self.num_layers if times is None else times
        flops, fixed, unit_bytes = num * flops, num * fixed, num * unit_bytes
        seconds = (flops * self._flop_s, fixed * self._byte_s, unit_bytes * self._byte_s)
        return _Term(name, flops, fixed, unit_bytes, *seconds)

    @cached_property
    def _head(self) -> _Term | None:
        """Of one sampled row; on the last stage only."""
        if not self.is_last:
            return None
        words = self.spec.vocab_size / self.deployment.tp
        weight_bytes = words * self.spec.hidden_size * self.precision.weight_bytes
        row_bytes = words * self.precision.activation_bytes
        return self._term("head", 2 * self.spec.hidden_size * words, weight_bytes, row_bytes, times=1)

    # -- attention --------------------------------------------------------------------------------------------------

    @cached_property
    def _attention_units(self) -> tuple[float, float]:
        """(FLOP of a pair, bytes of a token's keys and values)."""
        heads, kv_heads = shard_heads(self.spec, self.deployment.tp)
        pair_flops = self.num_layers * 4 * heads * self.spec.head_dim
        return pair_flops, self.num_layers * 2 * kv_heads * self.spec.head_dim * self.precision.kv_bytes

    @cached_property
    def _attention_s(self) -> tuple[float, float]:
        """Seconds of (a pair, a token's keys and values)."""
        eff = self.system.efficiency
        flops, kv_bytes = self._attention_units
        pair_s = flops * self._flop_s * eff.mfu / (eff.attention_mfu or eff.mfu)
        return pair_s, kv_bytes * self._byte_s * eff.bandwidth / (eff.attention_bandwidth or eff.bandwidth)

    @cached_property
    def _half_block(self) -> float:
        """Tokens that the last block of a sequence has in vain, in the mean."""
        return self.system.efficiency.kv_block / 2

    @cached_property
    def _block_s(self) -> float:
        """Of a block of KV in each layer, beside what is computed and read."""
        eff = self.system.efficiency
        return self._slowdown * self.num_layers * eff.block_us / 1e6 if eff.kv_block else 0.0

    def _num_blocks(self, step: Step) -> float:
        """That are met one after another: of answers and of prompts, each as long as they are in the mean."""
        block = self.system.efficiency.kv_block
        decode = step.decode_kv / step.decode_rows / block + 0.5 if step.decode_rows else 0.0
        return decode + (step.prompt_kv / block + 0.5 if step.prompt_tokens else 0.0)

    def _attention_ops(self, step: Step) -> Iterator[Op]:
        half, (flops, kv_bytes), (pair_s, kv_s) = self._half_block, self._attention_units, self._attention_s
        decode_kv = step.decode_kv + step.decode_rows * half
        for name, pairs, kv in (
            ("prompt attention", step.pairs + step.prompt_tokens * half, step.prompt_kv + half),
            ("decode attention", decode_kv, decode_kv),
        ):
            if pairs:
                bound: Bound = "compute" if pairs * pair_s >= kv * kv_s else "memory"
                yield Op(name, max(pairs * pair_s, kv * kv_s), bound, pairs * flops, kv * kv_bytes)
        if self._block_s and step.rows:
            yield Op("attention blocks", self._num_blocks(step) * self._block_s, "fixed")

    # -- experts ----------------------------------------------------------------------------------------------------

    def _expert_work(self, rows: float, peers: float) -> _ExpertWork:
        """Rows of all replicas that step together come to the experts of the group, K of each token."""
        spec, group = self.spec, self.deployment.ep
        tokens = rows * peers
        if self.by_all_reduce:
            here, touched = self._without_exchange(rows, tokens)
            return self._work(here, touched, here, max(touched, min(1.0, tokens)) if not spec.is_dense else touched)
        all_rows = tokens * spec.top_k
        touched = distinct_experts(spec.num_experts, spec.top_k, spec.num_experts, tokens)
        imbalance = expert_imbalance(min(group, spec.num_experts), all_rows)
        held = -(-spec.num_experts // group)
        busiest_rows = min(all_rows * held / spec.num_experts * imbalance, tokens * min(spec.top_k, held))
        busiest = busiest_touched(touched, spec.num_experts, group)
        return self._work(all_rows / group, touched / group, busiest_rows, busiest)

    def _without_exchange(self, rows: float, tokens: float) -> tuple[float, float]:
        """(rows, experts touched) of one GPU where a replica's shards have a part of each row's product."""
        spec, layout = self.spec, self.deployment
        if spec.is_dense:
            return rows / layout.tp, 1 / layout.tp
        held = spec.num_experts / layout.ep
        return rows * spec.top_k / layout.tp, distinct_experts(held, spec.top_k, spec.num_experts, tokens)

    def _work(self, rows: float, touched: float, busiest_rows: float, most_touched: float) -> _ExpertWork:
        flops, row_bytes, weight_bytes = self._expert_units
        return _ExpertWork(
            rows * flops,
            touched * weight_bytes + rows * row_bytes,
            busiest_rows * flops,
            most_touched * weight_bytes + busiest_rows * row_bytes,
            most_touched,
        )

    @cached_property
    def _expert_units(self) -> tuple[float, float, float]:
        """(FLOP of a row, its bytes, those of an expert), all layers."""
        size, num = expert_params(self.spec), self.num_layers
        row_bytes = (2 * self.spec.hidden_size + 3 * self.spec.expert_size) * self.precision.activation_bytes
        return num * 2.0 * size, num * row_bytes, num * size * self.precision.expert_bytes

    @cached_property
    def _call_s(self) -> float:
        """Of an expert that is touched in each layer, beside its product."""
        return self._slowdown * self.num_layers * self.system.efficiency.expert_us / 1e6

    def _expert_ops(self, rows: float, peers: float) -> Iterator[Op]:
        work = self._expert_work(rows, peers)
        compute_s, memory_s = work.busiest_flops * self._flop_s, work.busiest_bytes * self._byte_s
        bound: Bound = "compute" if compute_s >= memory_s else "memory"
        yield Op("experts", max(compute_s, memory_s), bound, work.flops, work.memory_bytes)
        if self._call_s:
            yield Op("expert calls", work.busiest_touched * self._call_s, "fixed")

    # -- what is sent -----------------------------------------------------------------------------------------------

    @cached_property
    def _links(self) -> tuple[_Link, ...]:
        """Of one row each."""
        layout = self.deployment
        links = []
        if layout.tp > 1:
            # sums over shards come home, and vectors go to all shards before the next layer: one all-reduce in two
            # halves. Others reduce once more, after the experts.
            num = 2 if self.by_all_reduce else 1
            sent = num * 2 * (layout.tp - 1) / layout.tp * self._vector_bytes
            links.append(self._link("all-reduce", sent, layout.tp, num))
        if not self.is_last:
            links.append(self._hop())
        return tuple(links)

    @cached_property
    def _exchange(self) -> _Link | None:
        """Of one row that goes to a random member of the expert group, and back."""
        layout = self.deployment
        if layout.ep == 1 or (self.by_all_reduce and (layout.dp == 1 or self.spec.is_dense)):
            return None
        return self._link("expert exchange", 2 * (layout.ep - 1) / layout.ep * self._vector_bytes, layout.ep, 2)

    def _sent(self, peers: float) -> float:
        """Rows that one GPU exchanges for each of its replica's: those that it sends, or those that come to it, where
        they are more because few have experts."""
        spec, layout = self.spec, self.deployment
        own = spec.top_k / layout.tp
        if self.by_all_reduce:
            return own
        return max(own, peers * spec.top_k * -(-spec.num_experts // layout.ep) / spec.num_experts)

    @property
    def _vector_bytes(self) -> float:
        return self.spec.hidden_size * self.precision.activation_bytes

    def _share_outside(self, group_size: int) -> float:
        """Of what goes to the other members of a group of consecutive GPUs: the share for other nodes, of the member
        that has the fewest beside it."""
        per_node = self.system.gpus_per_node
        if group_size == 1 or self.deployment.cells * self.deployment.cell_gpus <= per_node:  # spares come after them
            return 0.0
        return (group_size - math.gcd(group_size, per_node)) / (group_size - 1)

    def _link(self, name: str, sent: float, group_size: int, num: int) -> _Link:
        """`sent` bytes of a row in `num` exchanges of a layer. Links within and between nodes work at the same time."""
        system, eff = self.system, self.system.efficiency
        outside = self._share_outside(group_size)
        row_s = max((1 - outside) / system.intra_gb_s, outside / system.inter_gb_s) * sent / (1e9 * eff.link)
        times = self.num_layers * self._slowdown
        return _Link(name, self.num_layers * sent, times * num * eff.collective_us / 1e6, times * row_s)

    def _hop(self) -> _Link:
        """To the worker with the same replica and shard in the next stage: all of a row, by each shard."""
        system, eff = self.system, self.system.efficiency
        rate = (system.intra_gb_s if self.hops_inside else system.inter_gb_s) * 1e9 * eff.link
        fixed_s = self._slowdown * eff.collective_us / 1e6
        return _Link("hop", self._vector_bytes, fixed_s, self._slowdown * self._vector_bytes / rate)
