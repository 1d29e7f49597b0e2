"""Writing a Hugging Face checkpoint: its configs, and its weights in bfloat16, in one file or in several."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.model.files import Expected

Tensors = Mapping[str, Expected]  # by canonical name, in the order in which they are written
Source = Callable[[str], npt.NDArray[np.float32]]  # the tensor of a canonical name
Advance = Callable[[int], None]  # so many more bytes are written

ITEM_BYTES = 2


def num_bytes(tensors: Tensors) -> int:
    """What the tensors take in bfloat16."""
    return sum(_tensor_bytes(expected) for expected in tensors.values())


def write_configs(config: Mapping[str, Any], folder: Path) -> None:
    """Write config.json, and generation_config.json with the tokens that begin and end a text."""
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2))


def header(tensors: Iterable[Expected]) -> bytes:
    """How a safetensors file begins that holds these tensors in bfloat16, one after another."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for expected in tensors:
        end = begin + _tensor_bytes(expected)
        entries[expected.hf_name] = {"dtype": "BF16", "shape": list(expected.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the format asks for aligned data
    return len(text).to_bytes(8, "little") + text


def write_file(path: Path, tensors: Tensors, source: Source, advance: Advance) -> None:
    """Write tensors one by one, so that no more than one is in memory. Raises OSError."""
    with path.open("wb") as file:
        file.write(header(tensors.values()))
        for name, expected in tensors.items():
            tensor = source(name)
            assert tensor.shape == expected.shape, name
            advance(file.write(_bfloat16(tensor).tobytes()))


def write_shards(folder: Path, tensors: Tensors, source: Source, advance: Advance, shard_bytes: int) -> None:
    """Write files of at most `shard_bytes` (or one tensor), and the index that says where each tensor is."""
    shards = _cut(tensors, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(folder / name, shard, source, advance)
        weight_map |= {expected.hf_name: name for expected in shard.values()}
    index = {"metadata": {"total_size": num_bytes(tensors)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _cut(tensors: Tensors, shard_bytes: int) -> list[dict[str, Expected]]:
    """Consecutive tensors, as many to a shard as it holds; at least one."""
    shards: list[dict[str, Expected]] = [{}]
    room_bytes = shard_bytes
    for name, expected in tensors.items():
        if shards[-1] and _tensor_bytes(expected) > room_bytes:
            shards.append({})
            room_bytes = shard_bytes
        shards[-1][name] = expected
        room_bytes -= _tensor_bytes(expected)
    return shards


def _tensor_bytes(expected: Expected) -> int:
    return ITEM_BYTES * math.prod(expected.shape)


def _bfloat16(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper halves of float32, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
