"""A Llama model in a GGUF file: its config, its weights as float32, its tokenizer."""

from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL

# canonical name (see `serve_app.model.files`) -> GGUF name, of the whole model and under `blk.{l}.`
_WHOLE = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
_LAYER = {
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "mlp_norm": "ffn_norm",
    "experts.0.gate": "ffn_gate",
    "experts.0.up": "ffn_up",
    "experts.0.down": "ffn_down",
}


class GgufLlama:
    """Reads a GGUF file of architecture `llama` with a byte-level BPE tokenizer, memory-mapped."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.tensor = lru_cache(maxsize=4)(self._tensor)  # experts ask for the same three matrices again and again

    def config(self) -> dict[str, Any]:
        """The model as a Hugging Face Llama config."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self._field("llama.vocab_size"),
            "hidden_size": self._field("llama.embedding_length"),
            "intermediate_size": self._field("llama.feed_forward_length"),
            "num_hidden_layers": self._field("llama.block_count"),
            "num_attention_heads": self._field("llama.attention.head_count"),
            "num_key_value_heads": self._field("llama.attention.head_count_kv"),
            "head_dim": self._field("llama.rope.dimension_count"),
            "hidden_act": "silu",
            "max_position_embeddings": self._field("llama.context_length"),
            "rms_norm_eps": float(f"{self._field('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # was rounded to f32
            "rope_theta": self._field("llama.rope.freq_base"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self._field("tokenizer.ggml.padding_token_id"),
            "torch_dtype": "bfloat16",
        }

    def _tensor(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor of a canonical name, dequantized. Matrices are (out, in)."""
        tensor = self._tensors[f"{_gguf_name(name)}.weight"]
        weights = cast(npt.NDArray[np.float32], gguf.dequantize(tensor.data, tensor.tensor_type))
        heads = {"q": "llama.attention.head_count", "k": "llama.attention.head_count_kv"}.get(name.rpartition(".")[2])
        return _unpermute(weights, self._field(heads)) if heads else weights

    def tokenizer(self) -> tokenizers.Tokenizer:
        """A byte-level BPE that takes digits one by one: llama.cpp's pre-tokenizer `smollm`."""
        assert self._field("tokenizer.ggml.pre") == "smollm"
        tokens = self._field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self._field("tokenizer.ggml.merges")]
        tokenizer = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        stages = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(stages)
        tokenizer.decoder = decoders.ByteLevel()
        kinds = self._field("tokenizer.ggml.token_type")
        control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
        tokenizer.add_special_tokens(
            [tokenizers.AddedToken(token, special=True, normalized=False) for token in control]
        )
        return tokenizer

    def tokenizer_config(self) -> dict[str, Any]:
        tokens = self._field("tokenizer.ggml.tokens")
        names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: tokens[self._field(f"tokenizer.ggml.{field}_token_id")] for name, field in names.items()},
            "clean_up_tokenization_spaces": False,
            "model_max_length": self._field("llama.context_length"),
            "chat_template": self._field("tokenizer.chat_template"),
        }

    def _field(self, name: str) -> Any:
        return self._fields[name].contents()


def _gguf_name(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    _, layer, part = name.split(".", 2)
    return f"blk.{layer}.{_LAYER[part]}"


def _unpermute(weights: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Undo what the conversion to GGUF does to q and k: it interleaves the two halves that rotary embedding pairs."""
    pairs = weights.reshape(num_heads, -1, 2, weights.shape[1])
    return pairs.swapaxes(1, 2).reshape(weights.shape)
