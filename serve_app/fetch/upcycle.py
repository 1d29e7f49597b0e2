"""Sparse upcycling (arXiv 2212.05055): a dense checkpoint becomes a mixture of experts that are copies of its MLP."""

import json
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.fetch.gguf_llama import GgufLlama
from serve_app.fetch.progress import Report, counted
from serve_app.fetch.write import num_bytes, write_configs, write_file
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
    write_configs(config, folder)
    write_tokenizer(source, folder)
    advance = counted(report, "writing the demo model", num_bytes(expected))
    tensor = partial(_tensor, source, expected)
    write_file(folder / "model.safetensors", expected, tensor, advance)


def write_tokenizer(source: GgufLlama, folder: Path) -> None:
    """Write the files that make a tokenizer, its chat template among them."""
    (folder / "tokenizer_config.json").write_text(json.dumps(source.tokenizer_config(), indent=2))
    source.tokenizer().save(str(folder / "tokenizer.json"))


def _tensor(source: GgufLlama, expected: Mapping[str, Expected], name: str) -> npt.NDArray[np.float32]:
    gate = re.fullmatch(r"layers\.(\d+)\.gate", name)
    if gate:
        return _gate(int(gate[1]), expected[name].shape)
    return source.tensor(re.sub(r"experts\.\d+", "experts.0", name))


def _gate(layer: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Random rows. RandomState, because numpy has frozen its streams for all versions to come."""
    rows = np.random.RandomState(_GATE_SEEDS[layer]).uniform(-1, 1, shape)
    return (rows * (_GATE_NORM * math.sqrt(3 / shape[1]))).astype(np.float32)
