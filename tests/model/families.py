"""Tiny random checkpoints of every family, written by transformers: the files and the oracle of the model tests."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

FAMILIES = ("llama", "mixtral", "qwen3_moe", "olmoe", "qwen2_moe", "phimoe", "granitemoe")

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
}

# For heads of 16. The two mscales are phimoe's own; the others work their factor out from the lengths.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.02, 1.05, 1.1, 1.3, 1.5, 2.0, 2.8],
    "long_factor": [1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 9.0, 15.0],
    "original_max_position_embeddings": 384,
}
PHI_LONGROPE = {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.24}

GRANITE_SCALES = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
}

# name -> (family, config overrides): the switches that change the arithmetic, each with a family that has it
VARIANTS = {
    "llama": ("llama", {}),
    "llama-linear-bias": ("llama", {"rope_parameters": ROPES["linear"], "attention_bias": True}),
    "llama-llama3-tied": ("llama", {"rope_parameters": ROPES["llama3"], "tie_word_embeddings": True}),
    "llama-longrope": ("llama", {"rope_parameters": LONGROPE}),
    "mixtral": ("mixtral", {}),
    "mixtral-yarn-tied": ("mixtral", {"rope_parameters": ROPES["yarn"], "tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_moe-yarn-bias-raw-topk": (
        "qwen3_moe",
        {"rope_parameters": ROPES["yarn"], "attention_bias": True, "norm_topk_prob": False},
    ),
    "olmoe": ("olmoe", {"norm_topk_prob": False}),
    "olmoe-clip-norm-topk": ("olmoe", {"clip_qkv": 0.5, "norm_topk_prob": True}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe-yarn-tied-norm-topk-no-bias": (
        "qwen2_moe",
        {"rope_parameters": ROPES["yarn"], "tie_word_embeddings": True, "norm_topk_prob": True, "qkv_bias": False},
    ),
    "phimoe-longrope-bias": (
        "phimoe",
        {"rope_parameters": PHI_LONGROPE, "attention_bias": True, "lm_head_bias": True},
    ),
    "phimoe-tied-wide-jitter": (
        "phimoe",
        {"tie_word_embeddings": True, "lm_head_bias": True, "router_jitter_noise": 0.3},
    ),
    "granitemoe": ("granitemoe", GRANITE_SCALES),
    "granitemoe-llama3-tied-bias": (
        "granitemoe",
        {**GRANITE_SCALES, "rope_parameters": ROPES["llama3"], "tie_word_embeddings": True, "attention_bias": True},
    ),
}

_COMMON = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # wide enough that greedy choices are not near ties
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_OWN = {
    "llama": {"intermediate_size": 96},
    "mixtral": {"head_dim": 16, "intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 24, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2},
    "olmoe": {"intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "phimoe": {"intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2},
    "granitemoe": {"intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2},
}


def make_tiny(family: str, folder: Path, seed: int = 0, **overrides):
    """Write a random fp32 checkpoint of `family` to `folder` and return the transformers model, in eval mode."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.for_model(family, **{**_COMMON, **_OWN[family], **overrides})
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        _stir(model)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def _stir(model) -> None:
    """Norm weights start at one and biases at zero: move them, so that a test can see one that is left out."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


CHAT_TEMPLATE = """\
{% for message in messages %}
{% if message['role'] not in ['system', 'user', 'assistant'] %}
{{ raise_exception('Unknown role: ' + message['role']) }}
{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant' }}
{% endif %}
"""

_CORPUS = """
A sheet of paper folded three times makes eight leaves, and a book of such sheets is called an octavo. The printer
sets the pages so that, folded and cut, they follow one another; whoever loses a leaf loses two pages of the story.
When one of eight workers goes away the others take its share, and the reader should never notice. Every request is
answered with the same words as before, because nothing but the words themselves has to be remembered by anybody.
The quick brown fox jumps over the lazy dog while five dozen liquor jugs are packed with some very old whiskey.
Paris is the capital of France, Rome is the capital of Italy, and Madrid is the capital of Spain; what about Norway?
"""


def make_tiny_tokenizer(folder: Path, vocab_size: int = 512) -> Tokenizer:
    """Train a byte-level BPE of `vocab_size` (at least 259) with a ChatML template and write it to `folder`.

    Ids 0, 1, 2 are `<|endoftext|>`, `<|im_start|>`, `<|im_end|>`: the end token is the tiny models' own.
    """
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in names],
    )
    tokenizer.train_from_iterator(_CORPUS.splitlines(), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[1],
        "eos_token": names[2],
        "unk_token": names[0],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return tokenizer
