"""Sparse upcycling (arXiv 2212.05055): a dense checkpoint becomes a mixture of experts that are copies of its MLP."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from serve_app.fetch.gguf_llama import GgufLlama
from serve_app.fetch.progress import Report
from serve_app.model.files import Expected, expected_tensors
from serve_app.model.spec import parse_config

NUM_EXPERTS = 8
TOP_K = 2
# One seed a layer: of 0 to 255 the one whose gate spread a sample text (prose, chat, code) most evenly. Hidden states
# share a direction, so that an arbitrary gate sends 2.1 times its fair share to a layer's busiest expert (worst layer:
# 3.1); these, on another text, 1.5 (1.9).
_GATE_SEEDS = (
    *(42, 94, 39, 242, 123, 112, 162, 106, 47, 75, 147, 142, 249, 219, 142),
    *(142, 211, 249, 142, 142, 219, 224, 197, 158, 28, 22, 28, 38, 81, 41),
)
_GATE_NORM = 8.0  # of a gate's row, about: weights such as 0.64 and 0.36, so that their order matters


def mixtral_config(dense: Mapping[str, Any]) -> dict[str, Any]:
    """The Mixtral config of a dense Llama config, upcycled.

    Mixtral's weights of the chosen experts sum to one, so that equal experts add up to the dense MLP whatever the gate.
    """
    own = {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K, "sliding_window": None}
    return {**dense, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **own}


def write_checkpoint(source: GgufLlama, config: Mapping[str, Any], folder: Path, report: Report) -> None:
    """Write a Hugging Face checkpoint in bfloat16 of `source` as `config` says: dense (llama) or upcycled (mixtral)."""
    expected = expected_tensors(parse_config(config))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2))
    (folder / "tokenizer_config.json").write_text(json.dumps(source.tokenizer_config(), indent=2))
    source.tokenizer().save(str(folder / "tokenizer.json"))
    with (folder / "model.safetensors").open("wb") as file:
        _write_safetensors(file, expected, lambda name: _tensor(source, name, expected[name].shape), report)


def _tensor(source: GgufLlama, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    gate = re.fullmatch(r"layers\.(\d+)\.gate", name)
    if gate:
        return _gate(int(gate[1]), shape)
    tensor = source.tensor(re.sub(r"experts\.\d+", "experts.0", name))
    assert tensor.shape == shape
    return tensor


def _gate(layer: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Random rows. RandomState, because numpy has frozen its streams for all versions to come."""
    rows = np.random.RandomState(_GATE_SEEDS[layer]).uniform(-1, 1, shape)
    return (rows * (_GATE_NORM * math.sqrt(3 / shape[1]))).astype(np.float32)


def _write_safetensors(
    file: BinaryIO, expected: Mapping[str, Expected], tensor: Callable[[str], npt.NDArray[np.float32]], report: Report
) -> None:
    """Write tensors in bfloat16 one by one, so that no more than one is in memory."""
    header = _header(expected.values())
    file.write(len(header).to_bytes(8, "little") + header)
    total_bytes = sum(2 * math.prod(shape) for _, shape in expected.values())
    done_bytes = 0
    for name in expected:
        done_bytes += file.write(_bfloat16(tensor(name)).tobytes())
        report("writing the demo model", done_bytes, total_bytes)


def _header(expected: Iterable[Expected]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for hf_name, shape in expected:
        num_bytes = 2 * math.prod(shape)
        entries[hf_name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    text = json.dumps(entries).encode()
    return text + b" " * (-len(text) % 8)  # the format asks for aligned data


def _bfloat16(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper halves of float32, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
