"""The shape of a model, read from a Hugging Face `config.json`. No torch here: the planner reads specs too."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from serve_app.errors import CheckpointError

Family = Literal["llama", "mixtral", "qwen3_moe", "olmoe", "qwen2_moe", "phimoe", "granitemoe"]
RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding: base and scaling. `params` holds the scaling type's own numbers under their config names.

    linear: factor. llama3: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings.
    yarn: factor, original_max_position_embeddings and, where given, beta_fast, beta_slow, attention_factor, mscale,
    mscale_all_dim, truncate. longrope: factor, original_max_position_embeddings, short_factor (one number for each pair
    of a head) and, where given, attention_factor.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
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
    qkv_bias: bool = False
    output_bias: bool = False  # on o
    head_bias: bool = False
    norm: Literal["rms", "layer"] = "rms"  # layer: LayerNorm, with biases
    mixer_jitter: float | None = None  # phimoe: SparseMixer routing with this threshold; None: softmax
    shared_size: int | None = None  # qwen2_moe: inner width of an expert that every token goes through
    clip_qkv: float | None = None  # olmoe: q, k, v are clamped to [-clip, clip]
    attention_scale: float | None = None  # granitemoe: on q @ k; None: head_dim ** -0.5
    embedding_scale: float = 1.0  # this and the next two: granitemoe
    residual_scale: float = 1.0  # on what a layer adds
    logits_divisor: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # as stored

    @property
    def is_dense(self) -> bool:
        return self.num_experts == 1

    @property
    def score_scale(self) -> float:
        """The factor on q @ k."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale


# What transformers takes where a config is silent.
_NORM_EPS = {"mixtral": 1e-5, "olmoe": 1e-5, "phimoe": 1e-5}  # the others: 1e-6
_ROPE_THETA = {"mixtral": 1e6, "phimoe": 1e6}  # the others: 1e4

_WIDTH_OF_ITS_OWN = ("qwen2_moe", "qwen3_moe")  # an expert's, beside that of a dense layer
_ALWAYS_NORM_TOPK = ("mixtral", "granitemoe")  # granitemoe: the softmax of the k highest logits, which is the same

_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("factor", "original_max_position_embeddings"),
}
_ROPE_MAY = {
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
    "longrope": ("attention_factor",),
}

# Fields that change the arithmetic in a way that is not implemented, and the one value of each that is.
_ONLY: tuple[tuple[str, object], ...] = (
    ("hidden_act", "silu"),
    ("mlp_bias", False),
    ("decoder_sparse_step", 1),
    ("mlp_only_layers", []),
    ("quantization_config", None),
)
_ONLY_OF: dict[str, tuple[tuple[str, object], ...]] = {
    "qwen2_moe": (("use_sliding_window", False),),
    "phimoe": (("num_experts_per_tok", 2),),
    "granitemoe": (("position_embedding_type", "rope"),),
}


def read_spec(folder: Path) -> ModelSpec:
    """Read `config.json`, and the end tokens of `generation_config.json` where there is one.

    Raises CheckpointError where the folder or its config is missing, is not JSON, or describes what is not supported.
    """
    if not folder.is_dir():
        raise CheckpointError(f"the checkpoint folder {folder} does not exist")
    spec = parse_config(read_json(folder / "config.json"))
    generation = folder / "generation_config.json"
    if not generation.is_file():
        return spec
    more = _eos_token_ids(read_json(generation), spec.vocab_size)
    return replace(spec, eos_token_ids=tuple(dict.fromkeys(spec.eos_token_ids + more)))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint. Raises CheckpointError where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"the checkpoint folder {path.parent} has no {path.name}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not valid JSON") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value


def parse_config(config: Mapping[str, Any]) -> ModelSpec:
    """The spec in a Hugging Face config, as transformers 4 or 5 writes it.

    Raises CheckpointError naming the field and its value where the model is not one that this code computes exactly.
    """
    family = _family(config)
    _refuse_unsupported(config, family)
    num_heads = _size(config, "num_attention_heads")
    head_dim = _head_dim(config, num_heads)
    rope = _rope(config, family, head_dim)
    spec = ModelSpec(
        family=family,
        vocab_size=_size(config, "vocab_size"),
        hidden_size=_size(config, "hidden_size"),
        num_layers=_size(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(config, family, num_heads),
        head_dim=head_dim,
        num_experts=1 if family == "llama" else _size(config, "num_local_experts", "num_experts"),
        top_k=1 if family == "llama" else _size(config, "num_experts_per_tok"),
        expert_size=_size(config, "moe_intermediate_size" if family in _WIDTH_OF_ITS_OWN else "intermediate_size"),
        norm_topk=family in _ALWAYS_NORM_TOPK or _flag(config, "norm_topk_prob"),
        max_positions=_max_positions(config, family, rope),
        norm_eps=_number(config, "rms_norm_eps", _NORM_EPS.get(family, 1e-6)),
        rope=rope,
        tie_embeddings=_flag(config, "tie_word_embeddings"),
        eos_token_ids=_eos_token_ids(config, _size(config, "vocab_size")),
        bos_token_id=_bos_token_id(config),
        dtype=_dtype(config),
        **_switches(config, family),
    )
    if spec.top_k > spec.num_experts:
        raise CheckpointError(f"num_experts_per_tok is {spec.top_k} but there are {spec.num_experts} experts")
    return spec


def _switches(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The fields of a spec that only some families set."""
    has_bias = family not in ("mixtral", "qwen2_moe") and _flag(config, "attention_bias")
    fields: dict[str, Any] = {"qkv_bias": has_bias, "output_bias": has_bias}
    match family:
        case "qwen3_moe":
            fields["qk_norm"] = "head"
        case "olmoe":
            fields["qk_norm"] = "full"
            fields["clip_qkv"] = None if config.get("clip_qkv") is None else _number(config, "clip_qkv")
        case "qwen2_moe":
            fields["qkv_bias"] = _flag(config, "qkv_bias", default=True)
            fields["shared_size"] = _size(config, "shared_expert_intermediate_size")
        case "phimoe":
            fields["norm"] = "layer"
            fields["head_bias"] = _flag(config, "lm_head_bias")
            fields["mixer_jitter"] = _number(config, "router_jitter_noise", 0.01, or_zero=True)
        case "granitemoe":
            fields["attention_scale"] = _number(config, "attention_multiplier", 1.0)
            fields["embedding_scale"] = _number(config, "embedding_multiplier", 1.0)
            fields["residual_scale"] = _number(config, "residual_multiplier", 1.0)
            fields["logits_divisor"] = _number(config, "logits_scaling", 1.0)
    return fields


def _family(config: Mapping[str, Any]) -> Family:
    name = config.get("model_type")
    if name not in get_args(Family):
        raise CheckpointError(f"model_type {name!r} is not supported; supported are {', '.join(get_args(Family))}")
    return cast(Family, name)


def _refuse_unsupported(config: Mapping[str, Any], family: Family) -> None:
    for name, supported in (*_ONLY, *_ONLY_OF.get(family, ())):
        value = config.get(name)
        if value is not None and value != supported:
            only = f"; only {supported!r} is" if supported else ""
            raise CheckpointError(f"{name} {value!r} is not supported{only}")
    if family == "qwen2_moe" and set(config.get("layer_types") or ()) - {"full_attention"}:
        raise CheckpointError(f"layer_types {config['layer_types']!r} is not supported; only 'full_attention' is")


def _size(config: Mapping[str, Any], *names: str) -> int:
    """The first of `names` that the config has, as a positive integer."""
    name = next((name for name in names if config.get(name) is not None), None)
    if name is None:
        raise CheckpointError(f"the config has no {names[0]}")
    value = config[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{name} must be a positive integer, not {value!r}")
    return value


def _number(config: Mapping[str, Any], name: str, default: float | None = None, *, or_zero: bool = False) -> float:
    value = default if config.get(name) is None else config[name]
    if value is None:
        raise CheckpointError(f"the config has no {name}")
    if not (_is_positive(value) or (or_zero and value == 0)):
        raise CheckpointError(f"{name} must be a positive number, not {value!r}")
    return float(value)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _flag(config: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    value = default if config.get(name) is None else config[name]
    if not isinstance(value, bool):
        raise CheckpointError(f"{name} must be true or false, not {value!r}")
    return value


def _num_kv_heads(config: Mapping[str, Any], family: Family, num_heads: int) -> int:
    """Some families take a missing count for "as many as there are query heads"; the others must say."""
    if config.get("num_key_value_heads") is None and family in ("llama", "olmoe", "granitemoe"):
        return num_heads
    num_kv_heads = _size(config, "num_key_value_heads")
    if num_heads % num_kv_heads:
        raise CheckpointError(f"num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}")
    return num_kv_heads


def _head_dim(config: Mapping[str, Any], num_heads: int) -> int:
    hidden_size = _size(config, "hidden_size")
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise CheckpointError(f"hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}")
    head_dim = hidden_size // num_heads if config.get("head_dim") is None else _size(config, "head_dim")
    if head_dim % 2:
        raise CheckpointError(f"head_dim must be even for rotary embedding, not {head_dim}")
    return head_dim


def _max_positions(config: Mapping[str, Any], family: Family, rope: RopeSpec) -> int:
    """The length up to which a position's keys and values do not depend on what comes after.

    A sliding window caps it: up to there, full attention is the same function. So does longrope: a longer sequence has
    other angles from its first position on, so that a step run again would differ.
    """
    limits = [_size(config, "max_position_embeddings")]
    slides = family in ("mixtral", "phimoe") or (family == "qwen3_moe" and _flag(config, "use_sliding_window"))
    if slides and config.get("sliding_window") is not None:
        limits.append(_size(config, "sliding_window"))
    if rope.kind == "longrope":
        limits.append(int(rope.params["original_max_position_embeddings"]))
    return min(limits)


def _rope(config: Mapping[str, Any], family: Family, head_dim: int) -> RopeSpec:
    """Transformers 5 writes one dict `rope_parameters`; 4 wrote `rope_theta` beside a `rope_scaling` or null."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise CheckpointError(f"rope_parameters {given!r} is not supported; one flat object is")
    if (partial := given.get("partial_rotary_factor", config.get("partial_rotary_factor"))) not in (None, 1.0):
        raise CheckpointError(f"partial_rotary_factor {partial!r} is not supported; only 1.0 is")
    theta = _number(
        given if given.get("rope_theta") is not None else config, "rope_theta", _ROPE_THETA.get(family, 1e4)
    )
    kind = _rope_kind(given, family)
    given = {**given, "original_max_position_embeddings": _original_positions(config, given, family)}
    if family == "phimoe" and kind == "longrope":
        given["attention_factor"] = _number(given, "short_mscale")  # phimoe's own name, and no default
    params = _rope_params(kind, given, _size(config, "max_position_embeddings"))
    if kind == "longrope":
        params["short_factor"] = _short_factor(given, head_dim // 2)
    return RopeSpec(theta, kind, params)


def _rope_kind(given: Mapping[str, Any], family: Family) -> RopeKind:
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in get_args(RopeKind):
        why = ": it depends on the length, so that a step run again would differ" if kind == "dynamic" else ""
        raise CheckpointError(f"rope_type {kind!r} is not supported{why}")
    if family == "phimoe" and kind not in ("default", "longrope"):
        raise CheckpointError(f"rope_type {kind!r} is not supported for phimoe; 'default' and 'longrope' are")
    return cast(RopeKind, kind)


def _original_positions(config: Mapping[str, Any], given: Mapping[str, Any], family: Family) -> float:
    """Where a config gives it beside its rope parameters too, that is what transformers takes, but for phimoe."""
    name = "original_max_position_embeddings"
    source = given if family == "phimoe" or config.get(name) is None else config
    return _number(source, name, _size(config, "max_position_embeddings"))


def _short_factor(given: Mapping[str, Any], num_pairs: int) -> list[float]:
    value = given.get("short_factor")
    if not isinstance(value, list) or len(value) != num_pairs or not all(_is_positive(number) for number in value):
        raise CheckpointError(f"short_factor must be a list of {num_pairs} positive numbers")
    return [float(number) for number in value]


def _rope_params(kind: str, given: Mapping[str, Any], max_positions: int) -> dict[str, Any]:
    if kind in ("yarn", "longrope") and given.get("factor") is None:
        given = {**given, "factor": max_positions / given["original_max_position_embeddings"]}
    optional = [name for name in _ROPE_MAY.get(kind, ()) if given.get(name) is not None]
    params: dict[str, Any] = {name: _number(given, name) for name in (*_ROPE_NEEDS[kind], *optional)}
    return params | ({"truncate": _flag(given, "truncate")} if kind == "yarn" and "truncate" in given else {})


def _eos_token_ids(config: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """One id or a list. Ids outside the vocabulary are left out: no such token can ever be sampled."""
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise CheckpointError(f"eos_token_id must be an integer or a list of integers, not {value!r}")
    return tuple(token for token in ids if 0 <= token < vocab_size)


def _bos_token_id(config: Mapping[str, Any]) -> int | None:
    value = config.get("bos_token_id")
    if not isinstance(value, int | None) or isinstance(value, bool):
        raise CheckpointError(f"bos_token_id must be an integer or null, not {value!r}")
    return value


def _dtype(config: Mapping[str, Any]) -> Literal["bfloat16", "float16", "float32"]:
    value = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if value not in ("bfloat16", "float16", "float32"):
        raise CheckpointError(f"dtype {value!r} is not supported; bfloat16, float16 and float32 are")
    return cast(Literal["bfloat16", "float16", "float32"], value)
