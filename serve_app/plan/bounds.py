"""What the hardware allows at most, each from one number: no links, no fill but the pipeline's, no queue.

Such are the figures that documents declare (tokens/ms of one GPU). What a deployment is expected to do is `estimate`.
"""

from dataclasses import dataclass

from serve_app.model.spec import ModelSpec
from serve_app.plan.counts import Precision, attention_params, count_params, expert_params, kv_token_bytes
from serve_app.plan.deployment import Deployment
from serve_app.plan.routing import distinct_experts
from serve_app.plan.system import System


@dataclass(frozen=True)
class Bounds:
    """Of a model on a system in a deployment."""

    spec: ModelSpec
    precision: Precision
    system: System
    deployment: Deployment

    @property
    def gpu_flops(self) -> float:
        """FLOP/s that products reach."""
        return self.system.peak_flops(self.precision.compute) * self.system.efficiency.mfu

    @property
    def gpu_bytes(self) -> float:
        """Bytes/s of memory that are reached."""
        return self.system.memory_gb_s * 1e9 * self.system.efficiency.bandwidth

    @property
    def _weight_flops(self) -> float:
        params = count_params(self.spec)
        return 2.0 * (params.active + params.gates)

    @property
    def _pair_flops(self) -> float:
        """Of a token and a token that it attends to, all layers."""
        return 4.0 * self.spec.num_layers * self.spec.num_heads * self.spec.head_dim

    def prompt_flops(self, num_tokens: float) -> float:
        """Of a whole prompt; each token attends to half of it in the mean."""
        return num_tokens * (self._weight_flops + self._pair_flops * num_tokens / 2)

    def prefill_tokens_ms(self, num_tokens: float) -> float:
        """Prompt tokens/ms of one GPU, for prompts of this length."""
        return num_tokens * self.gpu_flops / self.prompt_flops(num_tokens) / 1e3

    def longest_prompt_at(self, tokens_ms: float) -> int:
        """The longest prompt that is computed at this rate; 0 where not even the shortest is."""
        flops = self.gpu_flops / (tokens_ms * 1e3)
        return max(0, int((flops - self._weight_flops) * 2 / self._pair_flops))

    def fill_of(self, num_prompts: float) -> float:
        """Share of the time in which all stages work while each replica runs so many prompts one after the other."""
        return num_prompts / (num_prompts + self.deployment.pp - 1)

    def alone_s(self, num_tokens: float) -> float:
        """One prompt on each replica at the same time, its stages one after the other."""
        return self.prompt_flops(num_tokens) / (self.gpu_flops * self.deployment.tp)

    def at_once_s(self, num_prompts: int, num_tokens: float) -> float:
        """Until the last of so many prompts that come together has its first token."""
        work = num_prompts * self.prompt_flops(num_tokens) / (self.gpu_flops * self._num_seats)
        return work / self.fill_of(num_prompts / self.deployment.num_replicas)

    def queued_tokens(self, ttft_s: float, num_prompts: int, num_tokens: float, replicas: int | None = None) -> float:
        """Prompt tokens that may wait so that the last of them has its first token in time."""
        share = 1.0 if replicas is None else replicas / self.deployment.num_replicas
        rate = self.prefill_tokens_ms(num_tokens) * 1e3 * self._num_seats * share
        fill = self.fill_of(num_prompts / self.deployment.num_replicas)
        return max(0.0, ttft_s - self.alone_s(num_tokens)) * rate * fill

    @property
    def _num_seats(self) -> int:
        return self.deployment.cells * self.deployment.cell_gpus

    def decode_round_s(self, concurrency: float, context: float) -> float:
        """One token for each of `concurrency` sequences, spread over all replicas: weights once for each microbatch of
        a cell, and all KV once."""
        spec, layout = self.spec, self.deployment
        rows = concurrency / layout.cells / layout.pp  # of all replicas of a cell that step together
        touched = distinct_experts(spec.num_experts, spec.top_k, spec.num_experts, rows)
        experts = touched * expert_params(spec) * self.precision.expert_bytes / layout.ep
        dense = attention_params(spec) * self.precision.weight_bytes / layout.tp
        weights = spec.num_layers * (experts + dense)  # pp microbatches x layers / pp
        kv = concurrency * context * kv_token_bytes(spec, self.precision) / self._num_seats
        return (weights + kv) / self.gpu_bytes

    def decode_tokens_ms(self, concurrency: float, context: float) -> float:
        """Answer tokens/ms of one GPU."""
        return concurrency / self._num_seats / self.decode_round_s(concurrency, context) / 1e3
