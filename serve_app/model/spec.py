"""The shape of a model, read from a Hugging Face `config.json`. No torch here: the planner reads specs too."""

from dataclasses import dataclass, field
from typing import Any, Literal

Family = Literal["llama", "mixtral", "qwen3_moe", "olmoe"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding: base and scaling. `params` holds the scaling type's own numbers under their config names."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and switches of one decoder-only transformer. A dense model is one with a single ungated expert."""

    family: Family
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int  # per layer; 1 for a dense model
    top_k: int
    expert_size: int  # inner width of one expert
    norm_topk: bool  # the k gate weights are rescaled to sum to one
    max_positions: int
    norm_eps: float
    rope: RopeSpec
    tie_embeddings: bool
    qk_norm: Literal["none", "head", "full"] = "none"  # RMSNorm on q and k: per head, or across all heads
    attention_bias: bool = False  # biases on q, k, v (and o where the family has it)
    clip_qkv: float | None = None  # olmoe: q, k, v are clamped to [-clip, clip]
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # as stored

    @property
    def is_dense(self) -> bool:
        return self.num_experts == 1
