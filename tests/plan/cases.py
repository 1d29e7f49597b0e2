"""The models, the hardware and the layout of the founding document, as the planner's objects."""

from dataclasses import replace

from serve_app.model.spec import ModelSpec, parse_config
from serve_app.plan.counts import Precision
from serve_app.plan.deployment import Deployment
from serve_app.plan.system import System

R10B: ModelSpec = parse_config(
    {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 2560,
        "num_hidden_layers": 16,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "intermediate_size": 5120,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
    }
)
"""The document's sizes times five, which is where its 10 B parameters are. Top-1."""
R10B_TOP2 = replace(R10B, top_k=2)
# Four query heads to a KV head. Heads of 160, not 128: of 5 KV heads, four shards would each hold two.
R10B_GQA = replace(R10B, num_heads=16, num_kv_heads=4, head_dim=160)
R_SMALL = replace(R10B, hidden_size=512, expert_size=1024, num_heads=4, num_kv_heads=4)
"""The document's sizes as it gives them."""

FP16 = Precision("fp16", "fp16", "fp16", "fp16")
REFERENCE = System(
    name="reference",
    source="parallel-strategy.md; links: READING.md, row 22",
    peak_tflops={"fp16": 400},
    memory_gb=64,
    memory_gb_s=1800,
    intra_gb_s=450,
    inter_gb_s=50,
)
SEED = Deployment(tp=4, pp=4, dp=2, standby=2)
BETTER = Deployment(tp=4, dp=2, cells=4)
"""The layout that the reading finds better, on as many GPUs."""
