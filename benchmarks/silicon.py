"""Measured serving runs of others: the sample that the wheel `aiconfigurator-core` 0.12.0 ships (Apache-2.0).

Each row is a model in a layout on a system under a closed loop of so many sequences, with the mean time to first token
and per output token. Which rows can be stated as a question to our planner is decided here, from their columns alone,
and every row that cannot is counted with its reason.
"""

import csv
import io
import re
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from serve_app.model.spec import Family, ModelSpec, RopeSpec
from serve_app.plan.counts import Precision
from serve_app.plan.deployment import Deployment
from serve_app.plan.system import System
from serve_app.plan.systems import read_system
from serve_app.plan.workload import Lengths, Workload

WHEEL = "aiconfigurator-core==0.12.0"
MEMBER = "aiconfigurator_core/systems/silicon_sample.csv"

MAX_TP = 8  # of one server; what is beyond in the sample divides neither heads nor nodes (72, 36, 28, 20 ...)
CHUNK_TOKENS = 8192  # prompt tokens of a step, as the engines were started with
DRIVER_GB = 1.068  # bytes that a driver reports over those of the data sheet (81,559 MiB of an H100 with 80 GB)


def _spec(
    vocab: int, hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, experts: int, top_k: int, width: int
) -> ModelSpec:
    family: Family = "llama" if experts == 1 else "qwen3_moe"
    return ModelSpec(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_experts=experts,
        top_k=top_k,
        expert_size=width,
        norm_topk=True,
        max_positions=131072,
        norm_eps=1e-6,
        rope=RopeSpec(),
        tie_embeddings=False,
    )


def _with_shared(spec: ModelSpec, width: int) -> ModelSpec:
    return ModelSpec(**{**vars(spec), "family": "qwen2_moe", "shared_size": width})


# From each model's config.json.
EXACT = {
    "Llama-3.1-8B": _spec(128256, 4096, 32, 32, 8, 128, 1, 1, 14336),
    "Llama-3.1-70B": _spec(128256, 8192, 80, 64, 8, 128, 1, 1, 28672),
    "Qwen3-32B": _spec(151936, 5120, 64, 64, 8, 128, 1, 1, 25600),
    "Qwen3-235B-A22B": _spec(151936, 4096, 94, 64, 4, 128, 128, 8, 1536),
    "MiniMax-M2.5": _spec(200064, 3072, 62, 48, 8, 128, 256, 8, 1536),
}
# Whose attention no ModelSpec can state. gpt-oss: every second layer looks back 128 tokens only, so that it has half
# the KV. DeepSeek and Kimi (MLA): one KV head of 576 values, as many query heads as make up the parameters of
# attention; their first layers (3, 1) are dense, of the width of the shared and the chosen experts together.
STANDS_FOR = {
    "gpt-oss-120b": _spec(201088, 2880, 36, 64, 4, 64, 128, 4, 2880),
    "DeepSeek-V3": _with_shared(_spec(129280, 7168, 61, 48, 1, 288, 256, 8, 2048), 2048),
    "Kimi-K2.5": _with_shared(_spec(163840, 7168, 61, 24, 1, 288, 384, 8, 2048), 2048),
}
SPECS = EXACT | STANDS_FOR

_MODELS = {
    "meta-llama/Llama-3.1-8B-Instruct": "Llama-3.1-8B",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B": "Llama-3.1-70B",
    "Qwen/Qwen3-32B": "Qwen3-32B",
    "nvidia/Qwen3-32B-NVFP4": "Qwen3-32B",
    "Qwen/Qwen3-235B-A22B-FP8": "Qwen3-235B-A22B",
    "MiniMaxAI/MiniMax-M2.5": "MiniMax-M2.5",
    "openai/gpt-oss-120b": "gpt-oss-120b",
    "deepseek-ai/DeepSeek-R1": "DeepSeek-V3",
    "deepseek-ai/DeepSeek-V3": "DeepSeek-V3",
    "nvidia/DeepSeek-R1-NVFP4": "DeepSeek-V3",
    "nvidia/DeepSeek-V3.1-NVFP4": "DeepSeek-V3",
    "moonshotai/Kimi-K2.5": "Kimi-K2.5",
}
_DTYPES = {"": "bf16", "fp8": "fp8", "fp8_block": "fp8", "nvfp4": "fp4", "int4_wo": "int4"}


@dataclass(frozen=True)
class Row:
    """A measured run that can be asked about."""

    model: str
    system: str
    backend: str
    version: str
    dense_dtype: str
    expert_dtype: str
    tp: int
    dp: int
    moe_ep: int
    isl: int
    osl: int
    concurrency: int
    is_sweep: bool  # of InferenceX; how those were loaded is published
    ttft_s: float
    tpot_s: float

    @property
    def is_exact(self) -> bool:
        return self.model in EXACT

    @property
    def is_blackwell(self) -> bool:
        return self.system.startswith(("b", "gb"))

    @property
    def spec(self) -> ModelSpec:
        return SPECS[self.model]

    @property
    def deployment(self) -> Deployment:
        return Deployment(tp=self.tp, dp=self.dp)

    @property
    def hardware(self) -> System:
        """With default coefficients."""
        system = read_system(self.system)
        return system.model_copy(update={"memory_gb": system.memory_gb * DRIVER_GB})

    @property
    def precision(self) -> Precision:
        """Checkpoints in fp4 and int4 keep attention in 16 bits, but for the dense ones and MiniMax's."""
        experts, dense = self.expert_dtype, self.dense_dtype
        if dense == "int4" or (dense == "fp4" and self.model in STANDS_FOR):
            dense = "bf16"
        kv = "bf16" if self.dense_dtype in ("bf16", "int4") else "fp8"
        compute = experts if experts in ("fp8", "fp4") else "bf16"
        if compute == "fp4" and not self.is_blackwell:
            compute = "bf16"  # widened before the product
        elif self.model == "gpt-oss-120b" and compute == "fp4":
            compute = "fp8"  # weights in mxfp4, activations in mxfp8
        return Precision(weights=dense, experts=experts, kv=kv, compute=compute)

    @property
    def workload(self) -> Workload:
        """InferenceX draws lengths evenly from 0.8 to 1.0 of the nominal ones (`--random-range-ratio 0.8`)."""
        factor = 0.9 if self.is_sweep else 1.0
        isl, osl = (Lengths.fixed(round(factor * tokens)) for tokens in (self.isl, self.osl))
        return Workload(isl, osl, concurrency=self.concurrency, chunk_tokens=CHUNK_TOKENS)


def fetch(folder: Path) -> str:
    """The sample's text. The wheel (82 MB) is downloaded once into `folder`, as pip does it for anybody."""
    found = sorted(folder.glob("aiconfigurator_core-0.12.0-*.whl"))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL, "-d", str(folder)]
        subprocess.run(command, check=True)
        found = sorted(folder.glob("aiconfigurator_core-0.12.0-*.whl"))
    with zipfile.ZipFile(found[0]) as wheel:
        return wheel.read(MEMBER).decode()


def read_rows(text: str) -> tuple[list[Row], Counter[str]]:
    """The rows that can be asked about, each measurement once, and how many could not be, by reason."""
    rows: dict[Row, None] = {}
    left_out: Counter[str] = Counter()
    for line in csv.DictReader(io.StringIO(text)):
        row = _row(line)
        if isinstance(row, str):
            left_out[row] += 1
        elif row in rows:
            left_out["the same measurement again"] += 1
        else:
            rows[row] = None
    return list(rows), left_out


def _row(line: Mapping[str, str]) -> Row | str:
    """Or why not."""
    if line["mode"] != "agg":
        return "disaggregated: no such layout in ours"
    model = _MODELS.get(line["model_path"])
    if model is None:
        return "attention that no ModelSpec comes near to (Qwen3.5: linear; GLM-5: sparse)"
    tp, dp = _int(line["tp_size"], 1), _int(line["attention_dp_size"], 1)
    moe_tp, moe_ep = _int(line["moe_tp_size"], 1), _int(line["moe_ep_size"], 1)
    if SPECS[model].is_dense:
        moe_ep = 1
    elif why := _contradiction(tp, dp, moe_tp, moe_ep, is_noted=line["attention_dp_size"] != ""):
        return why
    if not tp or not dp:
        return "a size of the layout is 0"
    if tp > MAX_TP:
        return f"tp above {MAX_TP}"
    source = line["silicon_data_source"]
    noted = re.search(r"silicon_concurrency=(\d+)", source)
    concurrency = int(noted[1]) if noted else int(line["batch_size"]) * dp
    return Row(
        model=model,
        system=line["system"].removesuffix("_sxm"),
        backend=line["backend"],
        version=line["backend_version"],
        dense_dtype=_DTYPES[line["gemm_quant_mode"]],
        expert_dtype=_DTYPES[line["moe_quant_mode"]],
        tp=tp,
        dp=dp,
        moe_ep=moe_ep,
        isl=int(line["isl"]),
        osl=int(line["osl"]),
        concurrency=concurrency,
        is_sweep=source.startswith("db-dump") or re.match(r"source_file=[^/;]*\.csv;", source) is not None,
        ttft_s=float(line["silicon_ttft_ms"]) / 1e3,
        tpot_s=float(line["silicon_tpot_ms"]) / 1e3,
    )


def _contradiction(tp: int, dp: int, moe_tp: int, moe_ep: int, *, is_noted: bool) -> str | None:
    """Why the number of GPUs of an MoE row is not certain."""
    if tp * dp != moe_tp * moe_ep or not tp * dp:
        return "sizes contradict: tp x dp is not moe_tp x moe_ep"
    if is_noted and (moe_tp == moe_ep > 1 or tp == dp > 1):
        return "sizes are squares of what one server has (64 x 1 = 8 x 8): GPUs not certain"
    return None


def _int(text: str, default: int) -> int:
    return int(text) if text else default


def count_by(rows: Iterable[Row], name: str) -> Counter[str]:
    return Counter(str(getattr(row, name)) for row in rows)
