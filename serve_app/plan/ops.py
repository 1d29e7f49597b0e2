"""What one step costs on one GPU of a stage, operation by operation: a roofline (doi 10.1145/1498765.1498785).

An operation computes, moves bytes of memory, or sends bytes over a link. It takes as long as the slower of the first
two allow, or as its link does. Letters: S rows of the step, D hidden size, H query heads, J KV heads, C head size,
E experts of a layer, K experts of a token, F width of an expert, G workers of a stage, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from serve_app.experts.layout import stage_layers
from serve_app.model.spec import ModelSpec
from serve_app.plan.counts import Precision, expert_params, shared_params
from serve_app.plan.deployment import Deployment
from serve_app.plan.system import System

Bound = Literal["compute", "memory", "link", "fixed"]

# Mean of the largest of g independent normal values, in standard deviations (Harter, doi 10.1093/biomet/48.1-2.151).
_LARGEST = {1: 0.0, 2: 0.564, 3: 0.846, 4: 1.029, 5: 1.163, 6: 1.267, 7: 1.352, 8: 1.424, 10: 1.539, 12: 1.629}
_LARGEST |= {16: 1.766, 24: 1.948, 32: 2.070, 48: 2.232, 64: 2.343, 128: 2.594, 256: 2.822}


@dataclass(frozen=True)
class Step:
    """The rows of one microbatch of one replica. Means, so no whole numbers are needed."""

    prompt_tokens: float = 0.0
    pairs: float = 0.0  # (token of a prompt, token that it attends to)
    prompt_kv: float = 0.0  # tokens whose keys and values are read for prompts
    decode_rows: float = 0.0
    decode_kv: float = 0.0  # the same for answers: the sum of their contexts
    sampled: float = 0.0  # rows that go through the head

    @property
    def rows(self) -> float:
        return self.prompt_tokens + self.decode_rows

    @staticmethod
    def prompt(num_tokens: float, start: float = 0.0, *, sampled: float = 0.0) -> "Step":
        """A prompt's tokens [start, start + num_tokens), each of which attends to those before it and itself."""
        pairs = num_tokens * (start + num_tokens / 2)
        return Step(num_tokens, pairs, start + num_tokens, sampled=sampled)

    @staticmethod
    def decode(rows: float, context: float) -> "Step":
        """One token each of `rows` sequences of `context` tokens."""
        return Step(decode_rows=rows, decode_kv=rows * context, sampled=rows)

    def __add__(self, other: "Step") -> "Step":
        return Step(
            self.prompt_tokens + other.prompt_tokens,
            self.pairs + other.pairs,
            self.prompt_kv + other.prompt_kv,
            self.decode_rows + other.decode_rows,
            self.decode_kv + other.decode_kv,
            self.sampled + other.sampled,
        )


@dataclass(frozen=True)
class Op:
    """One kind of operation of a step on one GPU, all layers of its stage together."""

    name: str
    seconds: float
    bound: Bound
    flops: float = 0.0
    memory_bytes: float = 0.0
    link_bytes: float = 0.0


def distinct_experts(num_experts: float, top_k: float, all_experts: float, num_tokens: float) -> float:
    """How many of `num_experts` out of `all_experts` are touched by so many tokens: E (1 - (1 - k/E)^n), of uniform
    routing. Above zero for any number of tokens."""
    missed: float = (1.0 - min(1.0, top_k / all_experts)) ** num_tokens
    return num_experts * (1.0 - missed)


def expert_imbalance(group_size: int, num_rows: float) -> float:
    """Rows of the busiest of `group_size` workers over their mean, where `num_rows` are routed uniformly at random."""
    if group_size == 1 or num_rows <= 0:
        return 1.0
    known = max(size for size in _LARGEST if size <= group_size)
    return min(float(group_size), 1.0 + _LARGEST[known] * math.sqrt((group_size - 1) / num_rows))


@dataclass(frozen=True)
class Stage:
    """One stage of a deployment on a system: what all its GPUs have in common."""

    spec: ModelSpec
    precision: Precision
    system: System
    deployment: Deployment
    index: int
    by_all_reduce: bool = False  # experts exchange nothing, their sums are reduced: how others than Octavo do it

    @property
    def num_layers(self) -> int:
        return len(stage_layers(self.spec.num_layers, self.deployment.pp)[self.index])

    @property
    def is_last(self) -> bool:
        return self.index == self.deployment.pp - 1

    @property
    def hops_inside(self) -> bool:
        """Whether this stage and the next are on one node, GPUs numbered by stage, replica and shard."""
        group, per_node = self.deployment.ep, self.system.gpus_per_node
        return self.index * group // per_node == ((self.index + 2) * group - 1) // per_node

    def seconds(self, step: Step, *, num_peers: int | None = None) -> float:
        """Of one step. `num_peers`: replicas of the cell that run one like it at the same time; default: all."""
        return sum(op.seconds for op in self.ops(step, num_peers=num_peers))

    def ops(self, step: Step, *, num_peers: int | None = None) -> list[Op]:
        """What the step is made of, in the order it runs."""
        peers = self.deployment.dp if num_peers is None else num_peers
        eff = self.system.efficiency
        ops = [*self._dense(step), *self._attention(step), *self._experts(step, peers), *self._links(step, peers)]
        if self.is_last and step.sampled:
            ops.append(self._head(step))
        fixed_s = (eff.layer_us * self.num_layers + eff.step_us + eff.row_us * self.is_last * step.sampled) / 1e6
        if fixed_s:
            ops.append(Op("overhead", fixed_s, "fixed"))
        slow = self.system.slowdown(min(self.deployment.cell_gpus, self.system.gpus_per_node))
        return (
            ops
            if slow == 1
            else [Op(o.name, o.seconds * slow, o.bound, o.flops, o.memory_bytes, o.link_bytes) for o in ops]
        )

    # -- parts of a layer -------------------------------------------------------------------------------------------

    def _dense(self, step: Step) -> Iterator[Op]:
        spec, rows, tp = self.spec, step.rows, self.deployment.tp
        hidden, act = spec.hidden_size, self.precision.activation_bytes
        # a residual sum and a norm, twice: two vectors in, two out; nothing of it is cut
        yield self._op("add and norm", 0.0, 2 * 4 * rows * hidden * act)
        q, kv = spec.num_heads * spec.head_dim / tp, self._kv_heads * spec.head_dim
        yield self._product("qkv", rows, hidden, q + 2 * kv)
        yield self._product("attention out", rows, q, hidden)
        if not spec.is_dense:
            yield self._product("gate", rows / tp, hidden, spec.num_experts)
        if shared := shared_params(spec):
            yield self._product("shared expert", rows / tp, hidden, shared / hidden)

    @property
    def _kv_heads(self) -> float:
        """KV heads of one shard: replicated where shards outnumber them."""
        return max(1.0, self.spec.num_kv_heads / self.deployment.tp)

    def _attention(self, step: Step) -> Iterator[Op]:
        spec, eff = self.spec, self.system.efficiency
        width = spec.num_heads * spec.head_dim / self.deployment.tp
        token_bytes = 2 * self._kv_heads * spec.head_dim * self.precision.kv_bytes
        mfu, bandwidth = eff.attention_mfu or eff.mfu, eff.attention_bandwidth or eff.bandwidth
        for name, pairs, kv in (
            ("prompt attention", step.pairs, step.prompt_kv),
            ("decode attention", step.decode_kv, step.decode_kv),
        ):
            if pairs:
                yield self._op(name, 4 * pairs * width, kv * token_bytes, mfu, bandwidth)

    def _experts(self, step: Step, peers: int) -> Iterator[Op]:
        """Rows of all replicas that step together come to the experts of the group, K of each token."""
        spec, group = self.spec, self.deployment.ep
        tokens = step.rows * peers
        if not tokens:
            return
        if spec.is_dense or self.by_all_reduce:
            rows, held, imbalance = step.rows * spec.top_k / self.deployment.tp, spec.num_experts / group, 1.0
            tokens = step.rows if spec.is_dense else tokens
            held = 1.0 / self.deployment.tp if spec.is_dense else held
        else:
            rows, held = tokens * spec.top_k / group, spec.num_experts / group
            imbalance = expert_imbalance(min(group, spec.num_experts), tokens * spec.top_k)
        touched = distinct_experts(held, spec.top_k, spec.num_experts, tokens)
        size, act = expert_params(spec), self.precision.activation_bytes
        moved = (
            touched * size * self.precision.expert_bytes + rows * (2 * spec.hidden_size + 3 * spec.expert_size) * act
        )
        yield self._op("experts", 2 * rows * size * imbalance, moved)

    def _head(self, step: Step) -> Op:
        words = self.spec.vocab_size / self.deployment.tp
        eff, act = self.system.efficiency, self.precision.activation_bytes
        flops = 2 * step.sampled * self.spec.hidden_size * words
        moved = words * self.spec.hidden_size * self.precision.weight_bytes + step.sampled * words * act
        return self._op("head", flops, moved, eff.mfu, eff.bandwidth, times=1)

    def _product(self, name: str, rows: float, num_in: float, num_out: float) -> Op:
        act = self.precision.activation_bytes
        moved = num_in * num_out * self.precision.weight_bytes + rows * (num_in + num_out) * act
        return self._op(name, 2 * rows * num_in * num_out, moved)

    def _op(
        self,
        name: str,
        flops: float,
        moved: float,
        mfu: float | None = None,
        bandwidth: float | None = None,
        times: int | None = None,
    ) -> Op:
        """`times`: as often as there are layers, if not told otherwise."""
        eff = self.system.efficiency
        times = self.num_layers if times is None else times
        compute_s = flops / (self.system.peak_flops(self.precision.compute) * (mfu or eff.mfu))
        memory_s = moved / (self.system.memory_gb_s * 1e9 * (bandwidth or eff.bandwidth))
        bound: Bound = "compute" if compute_s >= memory_s else "memory"
        return Op(name, times * max(compute_s, memory_s), bound, times * flops, times * moved)

    # -- what is sent -----------------------------------------------------------------------------------------------

    def _links(self, step: Step, peers: int) -> Iterator[Op]:
        spec, layout = self.spec, self.deployment
        row_bytes = spec.hidden_size * self.precision.activation_bytes
        if layout.tp > 1:
            # sums over shards come home, and vectors go to all shards before the next layer: one all-reduce in two
            # halves. Others reduce once more, after the experts.
            num = 2 if self.by_all_reduce or spec.is_dense else 1
            sent = num * 2 * (layout.tp - 1) / layout.tp * step.rows * row_bytes
            yield self._link("all-reduce", sent, self._share_outside(layout.tp), num)
        if layout.ep > 1 and not spec.is_dense and not (self.by_all_reduce and layout.dp == 1):
            away = (layout.ep - 1) / layout.ep
            sent = 2 * step.rows / layout.tp * spec.top_k * away * row_bytes  # to the experts, and back
            yield self._link("expert exchange", sent, self._share_outside(layout.ep), 2)
        if not self.is_last:
            yield self._hop(step.rows * row_bytes)

    def _share_outside(self, group_size: int) -> float:
        """Of what goes to the other members of a group of consecutive GPUs: the share for other nodes."""
        per_node = self.system.gpus_per_node
        return 0.0 if group_size <= per_node else (group_size - per_node) / (group_size - 1)

    def _link(self, name: str, sent: float, outside: float, num: int) -> Op:
        """The links within and between nodes work at the same time."""
        system, eff = self.system, self.system.efficiency
        inside_s = sent * (1 - outside) / (system.intra_gb_s * 1e9 * eff.link)
        outside_s = sent * outside / (system.inter_gb_s * 1e9 * eff.link)
        seconds = max(inside_s, outside_s) + num * eff.collective_us / 1e6
        return Op(name, self.num_layers * seconds, "link", link_bytes=self.num_layers * sent)

    def _hop(self, sent: float) -> Op:
        """To the worker with the same replica and shard in the next stage: all of a row, by each shard."""
        system, eff = self.system, self.system.efficiency
        rate = (system.intra_gb_s if self.hops_inside else system.inter_gb_s) * 1e9 * eff.link
        return Op("hop", sent / rate + eff.collective_us / 1e6, "link", link_bytes=sent)
