"""What the fullest GPU of a deployment holds: weights, standby slots, KV, what a step needs, and the process.

Of a CPU worker `plan.memory` knows more, down to oneDNN's kernels; that is for systems of kind `cpu`.
"""

import math
from dataclasses import astuple, dataclass
from functools import lru_cache

from serve_app.experts.layout import Seat, cut_heads, stage_layers
from serve_app.model.spec import ModelSpec
from serve_app.plan.counts import Precision, expert_params, shared_params
from serve_app.plan.deployment import Deployment
from serve_app.plan.memory import ALLOCATOR_FACTOR, RAY_ACTOR_BYTES, worker_memory
from serve_app.plan.system import System


@dataclass(frozen=True)
class Footprint:
    """Bytes on the fullest GPU."""

    experts_bytes: float
    dense_bytes: float  # attention, gates, norms, shared experts
    vocabulary_bytes: float
    standby_bytes: float
    kv_bytes: float
    step_bytes: float
    runtime_bytes: float

    @property
    def weights_bytes(self) -> float:
        return self.experts_bytes + self.dense_bytes + self.vocabulary_bytes

    @property
    def fixed_bytes(self) -> float:
        """All but the KV."""
        return self.total_bytes - self.kv_bytes

    @property
    def total_bytes(self) -> float:
        return float(sum(astuple(self)))


def footprint(
    spec: ModelSpec,
    precision: Precision,
    system: System,
    deployment: Deployment,
    *,
    kv_tokens: float,
    chunk_tokens: int,
    sampled: float = 1.0,
) -> Footprint:
    """`kv_tokens`: of all sequences that one replica holds. `sampled`: rows of a step that go through the head."""
    if system.kind == "cpu":
        return _of_cpu_worker(spec, precision, deployment, kv_tokens, chunk_tokens, sampled)
    layers = max(len(stage) for stage in stage_layers(spec.num_layers, deployment.pp))
    per_expert = expert_params(spec) * precision.expert_bytes
    vocabulary = spec.vocab_size * spec.hidden_size * precision.weight_bytes / deployment.tp
    num_vocabularies = 2 if deployment.pp == 1 and not spec.tie_embeddings else 1
    primary = deployment.primary(spec)
    standby = min(deployment.standby, layers * spec.num_experts - primary)
    return Footprint(
        experts_bytes=primary * per_expert,
        dense_bytes=layers * _dense_params(spec, deployment.tp) * precision.weight_bytes,
        vocabulary_bytes=num_vocabularies * vocabulary,
        standby_bytes=standby * per_expert,
        kv_bytes=kv_tokens * kv_gpu_token_bytes(spec, precision, deployment),
        step_bytes=_step_bytes(spec, precision, deployment, chunk_tokens, sampled),
        runtime_bytes=system.runtime_gb * 1e9,
    )


def kv_gpu_token_bytes(spec: ModelSpec, precision: Precision, deployment: Deployment) -> float:
    """Of one token of one sequence on one GPU of its replica, in the longest stage."""
    layers = max(len(stage) for stage in stage_layers(spec.num_layers, deployment.pp))
    _, kv_heads = shard_heads(spec, deployment.tp)
    return 2 * layers * kv_heads * spec.head_dim * precision.kv_bytes


def shard_heads(spec: ModelSpec, tp: int) -> tuple[int, int]:
    """(query heads, KV heads) of the fullest of `tp` shards: padded ones and replicated ones count."""
    return _most_heads(spec.num_heads, spec.num_kv_heads, tp)


@lru_cache
def _most_heads(num_heads: int, num_kv_heads: int, tp: int) -> tuple[int, int]:
    cuts = [cut_heads(num_heads, num_kv_heads, tp, shard) for shard in range(tp)]
    return max(cut.num_heads for cut in cuts), max(len(cut.kv_heads) for cut in cuts)


def max_kv_tokens(system: System, held: Footprint, token_bytes: float) -> int:
    """Tokens of KV that one replica has room for beside all else; 0 where there is none."""
    free = system.memory_share * system.memory_gb * 1e9 - held.fixed_bytes
    return max(0, math.floor(free / token_bytes))


def _dense_params(spec: ModelSpec, tp: int) -> float:
    """Of one layer on one GPU: its heads, and what is not cut."""
    heads, kv_heads = shard_heads(spec, tp)
    width = 2 * (heads + kv_heads) * spec.head_dim
    gate = 0 if spec.is_dense else spec.num_experts * spec.hidden_size
    return spec.hidden_size * width + gate + shared_params(spec) + 2 * spec.hidden_size


def _step_bytes(
    spec: ModelSpec, precision: Precision, deployment: Deployment, chunk_tokens: int, sampled: float
) -> float:
    """The residual stream, its norm and the sums over shards; and either attention's heads or the experts' rows."""
    act, hidden, tp = precision.activation_bytes, spec.hidden_size, deployment.tp
    common = 3 * chunk_tokens * hidden
    heads, kv_heads = shard_heads(spec, tp)
    attention = chunk_tokens * 2 * (heads + kv_heads) * spec.head_dim
    rows = chunk_tokens * spec.top_k / tp
    experts = rows * (2 * hidden + 3 * spec.expert_size)
    head = 2 * sampled * spec.vocab_size / tp
    return ALLOCATOR_FACTOR * act * (common + max(attention, experts, head))


def _of_cpu_worker(
    spec: ModelSpec,
    precision: Precision,
    deployment: Deployment,
    kv_tokens: float,
    chunk_tokens: int,
    sampled: float,
) -> Footprint:
    """The fullest of first and last stage."""
    token_bytes = kv_gpu_token_bytes(spec, precision, deployment)
    page_tokens = 32
    kv_gib = max(1.0, math.ceil(kv_tokens / page_tokens)) * page_tokens * token_bytes / 2**30
    stages = stage_layers(spec.num_layers, deployment.pp)
    held = max(
        (
            worker_memory(
                spec,
                deployment.layout,
                stages,
                Seat(stage, 0, 0),
                deployment.slots(spec),
                page_tokens=page_tokens,
                kv_gib=kv_gib,
                dtype_bytes=int(precision.activation_bytes),
                max_step_tokens=chunk_tokens,
                max_running=max(1, math.ceil(sampled * deployment.pp)),
                process_bytes=RAY_ACTOR_BYTES,
            )
            for stage in sorted({0, deployment.pp - 1})
        ),
        key=lambda memory: memory.total_bytes,
    )
    slots = deployment.slots(spec)
    standby = held.experts_bytes * slots.standby / (slots.primary + slots.standby)
    return Footprint(
        experts_bytes=held.experts_bytes - standby,
        dense_bytes=held.dense_bytes,
        vocabulary_bytes=held.vocabulary_bytes,
        standby_bytes=standby,
        kv_bytes=held.kv_bytes,
        step_bytes=held.step_bytes + held.kernels_bytes + held.tables_bytes,
        runtime_bytes=held.process_bytes,
    )
