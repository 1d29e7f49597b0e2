"""What a model is made of: parameters by what they are for, bytes by the precision they are held in."""

from dataclasses import dataclass

from serve_app.model.spec import ModelSpec

# Bytes of one value. int4 and fp4: two values in a byte, and the scales of their groups of 32.
DTYPE_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5625, "fp4": 0.5625}


@dataclass(frozen=True)
class Precision:
    """The dtype of each class of tensors, a key of DTYPE_BYTES, and the one that products are computed in."""

    weights: str = "bf16"  # attention, gates, embedding, head
    experts: str = "bf16"
    kv: str = "bf16"
    compute: str = "bf16"  # a key of `System.peak_tflops`

    def __post_init__(self) -> None:
        """Raises ValueError for a dtype that is not known."""
        for name in ("weights", "experts", "kv", "compute"):
            if getattr(self, name) not in DTYPE_BYTES:
                raise ValueError(f"{name} = {getattr(self, name)!r}: known dtypes are {', '.join(DTYPE_BYTES)}.")

    @property
    def weight_bytes(self) -> float:
        return DTYPE_BYTES[self.weights]

    @property
    def expert_bytes(self) -> float:
        return DTYPE_BYTES[self.experts]

    @property
    def kv_bytes(self) -> float:
        return DTYPE_BYTES[self.kv]

    @property
    def activation_bytes(self) -> float:
        """Hidden vectors are in 16 bits where weights are in fewer."""
        return max(2.0, DTYPE_BYTES[self.compute])


@dataclass(frozen=True)
class Params:
    """Numbers of parameters. `embedding` counts a tied head once."""

    experts: int
    attention: int
    gates: int
    shared: int
    norms: int
    embedding: int
    active_experts: int  # those that one token goes through

    @property
    def total(self) -> int:
        return self.experts + self.attention + self.gates + self.shared + self.norms + self.embedding

    @property
    def active(self) -> int:
        """What one token is multiplied with in the layers: without embedding, head, gates and norms."""
        return self.active_experts + self.attention + self.shared


def expert_params(spec: ModelSpec) -> int:
    """Of one expert: gate, up and down projections."""
    return 3 * spec.hidden_size * spec.expert_size


def attention_params(spec: ModelSpec) -> int:
    """Of one layer: q, k, v, o, and their biases where there are some."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    biases = (q + 2 * kv) * spec.qkv_bias + spec.hidden_size * spec.output_bias
    return spec.hidden_size * (2 * q + 2 * kv) + biases


def count_params(spec: ModelSpec) -> Params:
    per_norm = spec.hidden_size * (2 if spec.norm == "layer" else 1)
    return Params(
        experts=spec.num_layers * spec.num_experts * expert_params(spec),
        attention=spec.num_layers * attention_params(spec),
        gates=0 if spec.is_dense else spec.num_layers * spec.num_experts * spec.hidden_size,
        shared=spec.num_layers * shared_params(spec),
        norms=(2 * spec.num_layers + 1) * per_norm,
        embedding=spec.vocab_size * spec.hidden_size * (1 if spec.tie_embeddings else 2),
        active_experts=spec.num_layers * spec.top_k * expert_params(spec),
    )


def shared_params(spec: ModelSpec) -> int:
    """Of one layer's shared expert and its gate."""
    return 0 if spec.shared_size is None else 3 * spec.hidden_size * spec.shared_size + spec.hidden_size


def kv_token_bytes(spec: ModelSpec, precision: Precision) -> float:
    """Of one token in all layers, all heads."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * precision.kv_bytes
