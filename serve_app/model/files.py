"""What a checkpoint folder holds, read from its headers alone: fast enough to check before anything starts."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from serve_app.errors import CheckpointError
from serve_app.model.spec import ModelSpec, read_json, read_spec

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_DTYPES: dict[str, Literal["bfloat16", "float16", "float32"]] = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
}
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_PICKLES = ("*.bin", "*.pt", "*.pth")

# canonical name of a layer's part -> its Hugging Face name under `model.layers.{l}.`, without `.weight`
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
}
_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


class Naming(NamedTuple):
    """How a family names the parts of its mixture of experts, under `model.layers.{l}.`."""

    gate: str
    expert: str  # with a place for the expert's number
    parts: dict[str, str]


_MIXTRAL = Naming("block_sparse_moe.gate", "block_sparse_moe.experts.{}", {"gate": "w1", "up": "w3", "down": "w2"})
_QWEN = Naming("mlp.gate", "mlp.experts.{}", _MLP)
_NAMING = {
    "llama": Naming("", "mlp", _MLP),
    "mixtral": _MIXTRAL,
    "phimoe": _MIXTRAL,
    "qwen2_moe": _QWEN,
    "qwen3_moe": _QWEN,
    "olmoe": _QWEN,
    "granitemoe": Naming("block_sparse_moe.router.layer", "block_sparse_moe", {}),  # its experts are packed
}


class Cut(NamedTuple):
    """Where a matrix lies in a packed tensor of three dimensions: packed[expert, begin:end]."""

    expert: int
    begin: int
    end: int


class Expected(NamedTuple):
    """A tensor that a model of some spec must have."""

    hf_name: str
    shape: tuple[int, ...]
    cut: Cut | None = None  # it is this part of the tensor `hf_name`
    packed_shape: tuple[int, ...] = ()  # of the tensor `hf_name`, where it is a part

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the tensor `hf_name` in the file."""
        return self.packed_shape if self.cut else self.shape


class Stored(NamedTuple):
    """A tensor that a safetensors file says it has, or a part of one."""

    path: Path
    hf_name: str
    dtype: str  # as safetensors writes it: "BF16", "F32", ...
    shape: tuple[int, ...]  # of the whole
    offset_bytes: int  # of the whole, from the file's beginning
    cut: Cut | None = None


def check_folder(folder: Path) -> ModelSpec:
    """The spec of the checkpoint in `folder`, once every tensor that it needs is known to be there and whole.

    Reads headers only. Raises CheckpointError with one sentence that names the file, field or tensor at fault.
    """
    return locate_tensors(folder)[0]


def locate_tensors(folder: Path) -> tuple[ModelSpec, dict[str, Stored]]:
    """As `check_folder`, with where each tensor of the model is, by canonical name."""
    spec = read_spec(folder)
    stored = stored_tensors(folder)
    located = {}
    for name, expected in expected_tensors(spec).items():
        located[name] = _checked(folder, expected, stored.get(expected.hf_name))
    dtype = _DTYPES[located["embed"].dtype]  # what the file says, whatever the config says
    return replace(spec, dtype=dtype), located


def _checked(folder: Path, expected: Expected, found: Stored | None) -> Stored:
    name, shape = expected.hf_name, expected.stored_shape
    if found is None:
        raise CheckpointError(f"the checkpoint {folder} has no tensor {name}")
    if found.shape != shape:
        raise CheckpointError(
            f"tensor {name} in {found.path} has shape {list(found.shape)} where config.json asks for {list(shape)}"
        )
    if found.dtype not in _DTYPES:
        raise CheckpointError(
            f"tensor {name} in {found.path} has dtype {found.dtype}; supported are {', '.join(_DTYPES)}"
        )
    return found._replace(cut=expected.cut)


# -- what a spec asks for -----------------------------------------------------------------------------------------


def expected_tensors(spec: ModelSpec) -> dict[str, Expected]:
    """Canonical name -> Hugging Face name and shape, for every tensor of the model.

    Canonical names: `embed`, `norm`, `head` (absent where tied to `embed`), `head_bias` and, under `layers.{l}.`:
    `attn_norm`, `q`, `k`, `v`, `o`, `{q,k,v,o}_bias` and `q_norm`, `k_norm` where the model has them, `mlp_norm`,
    `gate` (absent where dense), `experts.{e}.gate`, `.up`, `.down` (dense: expert 0), and of a shared expert
    `shared.gate`, `.up`, `.down` and `shared_gate`. A LayerNorm has `{name}_bias` too. Matrices are (out, in).
    """
    vocabulary = (spec.vocab_size, spec.hidden_size)
    names = {"embed": Expected("model.embed_tokens.weight", vocabulary), **dict(_norm(spec, "norm", "model.norm"))}
    if not spec.tie_embeddings:
        names["head"] = Expected("lm_head.weight", vocabulary)
    if spec.head_bias:
        names["head_bias"] = Expected("lm_head.bias", (spec.vocab_size,))
    for layer in range(spec.num_layers):
        for name, expected in (*_attention(spec), *_experts(spec), *_shared(spec)):
            hf_name = f"model.layers.{layer}.{expected.hf_name}"
            names[f"layers.{layer}.{name}"] = expected._replace(hf_name=hf_name)
    return names


def _norm(spec: ModelSpec, name: str, hf_name: str) -> Iterator[tuple[str, Expected]]:
    yield name, Expected(f"{hf_name}.weight", (spec.hidden_size,))
    if spec.norm == "layer":
        yield f"{name}_bias", Expected(f"{hf_name}.bias", (spec.hidden_size,))


def _attention(spec: ModelSpec) -> Iterator[tuple[str, Expected]]:
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    matrices = {
        "q": (q_size, spec.hidden_size),
        "k": (kv_size, spec.hidden_size),
        "v": (kv_size, spec.hidden_size),
        "o": (spec.hidden_size, q_size),
    }
    for name, shape in matrices.items():
        yield name, Expected(f"{_ATTENTION[name]}.weight", shape)
        if spec.output_bias if name == "o" else spec.qkv_bias:
            yield f"{name}_bias", Expected(f"{_ATTENTION[name]}.bias", shape[:1])
    for name in ("attn_norm", "mlp_norm"):
        yield from _norm(spec, name, _ATTENTION[name])
    if spec.qk_norm != "none":
        per_head = spec.qk_norm == "head"
        yield "q_norm", Expected(f"{_ATTENTION['q_norm']}.weight", (spec.head_dim if per_head else q_size,))
        yield "k_norm", Expected(f"{_ATTENTION['k_norm']}.weight", (spec.head_dim if per_head else kv_size,))


def _experts(spec: ModelSpec) -> Iterator[tuple[str, Expected]]:
    naming = _NAMING[spec.family]
    if naming.gate:
        yield "gate", Expected(f"{naming.gate}.weight", (spec.num_experts, spec.hidden_size))
    for expert in range(spec.num_experts):
        name, hf_name = f"experts.{expert}", naming.expert.format(expert)
        if naming.parts:
            yield from _mlp(spec.hidden_size, spec.expert_size, name, hf_name, naming.parts)
        else:
            yield from _packed_expert(spec, expert, name, hf_name)


def _mlp(
    hidden_size: int, width: int, name: str, hf_name: str, parts: dict[str, str]
) -> Iterator[tuple[str, Expected]]:
    for part, hf_part in parts.items():
        shape = (hidden_size, width) if part == "down" else (width, hidden_size)
        yield f"{name}.{part}", Expected(f"{hf_name}.{hf_part}.weight", shape)


def _packed_expert(spec: ModelSpec, expert: int, name: str, hf_name: str) -> Iterator[tuple[str, Expected]]:
    """One of the experts that share two tensors: (E, 2F, D) with the gate above the up part, and (E, D, F)."""
    hidden, width = spec.hidden_size, spec.expert_size
    wide, narrow = (spec.num_experts, 2 * width, hidden), (spec.num_experts, hidden, width)
    gate, up, down = Cut(expert, 0, width), Cut(expert, width, 2 * width), Cut(expert, 0, hidden)
    yield f"{name}.gate", Expected(f"{hf_name}.input_linear.weight", (width, hidden), gate, wide)
    yield f"{name}.up", Expected(f"{hf_name}.input_linear.weight", (width, hidden), up, wide)
    yield f"{name}.down", Expected(f"{hf_name}.output_linear.weight", (hidden, width), down, narrow)


def _shared(spec: ModelSpec) -> Iterator[tuple[str, Expected]]:
    if spec.shared_size is not None:
        yield from _mlp(spec.hidden_size, spec.shared_size, "shared", "mlp.shared_expert", _MLP)
        yield "shared_gate", Expected("mlp.shared_expert_gate.weight", (1, spec.hidden_size))


# -- what the files hold ------------------------------------------------------------------------------------------


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor in the folder's safetensors files, by its Hugging Face name.

    Raises CheckpointError where there are none, only pickles, a missing shard, or a damaged file.
    """
    if (folder / "model.safetensors").is_file():
        return _read_header(folder / "model.safetensors")
    if (folder / "model.safetensors.index.json").is_file():
        return _read_shards(folder, read_json(folder / "model.safetensors.index.json"))
    if any(any(folder.glob(pattern)) for pattern in _PICKLES):
        raise CheckpointError(f"{folder} holds a pickle checkpoint, which is refused: convert it to safetensors")
    raise CheckpointError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")


def _read_shards(folder: Path, index: dict[str, Any]) -> dict[str, Stored]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{folder / 'model.safetensors.index.json'} has no valid weight_map")
    headers: dict[str, dict[str, Stored]] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise CheckpointError(f"the shard {shard!r} that the index names is not in {folder}")
        headers[shard] = _read_header(folder / shard)
    return {name: headers[shard][name] for name, shard in weight_map.items() if name in headers[shard]}


def _read_header(path: Path) -> dict[str, Stored]:
    """Parse a safetensors header: its length in 8 bytes, then JSON. Checks the file's size against it."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > _MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} is not a safetensors file")
        if 8 + header_bytes > file_bytes or file_bytes < 8:
            raise CheckpointError(f"{path} is truncated: it ends within its header")
        header = _parse_header(path, file.read(header_bytes))
    data_bytes = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + header_bytes + data_bytes != file_bytes:
        what = "truncated" if file_bytes < 8 + header_bytes + data_bytes else "damaged"
        raise CheckpointError(
            f"{path} is {what}: its header describes {8 + header_bytes + data_bytes} bytes, the file has {file_bytes}"
        )
    return {
        name: Stored(path, name, entry["dtype"], tuple(entry["shape"]), 8 + header_bytes + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        sound = all(_is_sound(entry) for entry in header.values())
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path} has a damaged safetensors header")
    return header


def _is_sound(entry: dict[str, Any]) -> bool:
    begin, end = entry["data_offsets"]
    numbers = (begin, end, *entry["shape"])
    if not isinstance(entry["dtype"], str) or not all(isinstance(number, int) and number >= 0 for number in numbers):
        return False
    item_bytes = _ITEM_BYTES.get(entry["dtype"])
    return begin <= end and (item_bytes is None or end - begin == item_bytes * math.prod(entry["shape"]))
