"""The hardware, as plain numbers: what a GPU can do at most, and which share of it this software gets.

Rates are decimal (1 GB = 1e9 bytes), as data sheets have them. Nothing here is measured on another GPU than the one
named: what is not known is a default that says so, until `octavo calibrate` has measured it.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Efficiency(_Part):
    """The few coefficients of the cost model: shares of the peaks, and what comes on top."""

    mfu: Share = Field(0.6, description="share of the peak FLOP/s that products reach")
    bandwidth: Share = Field(0.8, description="share of the memory's bandwidth")
    attention_mfu: Share | None = Field(None, description="the same of attention's products; default: mfu")
    attention_bandwidth: Share | None = Field(None, description="the same of reading KV; default: bandwidth")
    link: Share = Field(1.0, description="share of a link's bandwidth")
    collective_us: NotNegative = Field(10.0, description="microseconds that one exchange takes, however small")
    layer_us: NotNegative = Field(0.0, description="microseconds of a layer in a step, beside its work")
    step_us: NotNegative = Field(0.0, description="microseconds of a step on a stage, beside its layers")
    row_us: NotNegative = Field(0.0, description="microseconds of a sampled row")
    expert_us: NotNegative = Field(0.0, description="microseconds of an expert that is touched, in each layer")
    block_us: NotNegative = Field(
        0.0, description="microseconds of a block of KV of the longest sequence, in each layer; blocks as `kv_block`"
    )
    kv_block: NotNegative = Field(0.0, description="tokens of a block of KV, which is read as a whole; 0: no blocks")


class Recovery(_Part):
    """How long the phases of a failover take, beside what is loaded and computed again. Seconds.

    The defaults are medians of docs/resilience.md, «Measured»: CPU cells on two cores. No GPU has run a failover yet.
    """

    notice_s: NotNegative = Field(0.1, description="until a death is known (0.08 to 0.10 from the signal)")
    hung_s: NotNegative = Field(2.05, description="until a frozen worker is taken for dead")
    form_s: NotNegative = Field(0.02, description="repair and fence: until all have joined (32 workers)")
    collective_s: NotNegative = Field(
        1.0, description="on GPUs with tp above 1: until NCCL's groups are formed anew; a guess, not measured"
    )
    respawn_s: NotNegative = Field(
        2.1, description="start of a worker and its imports while its cell waits; a GPU's context is not in it"
    )
    respawn_serving_s: NotNegative = Field(
        5.6, description="the same while its cell serves, the second included by which it is put off"
    )
    replace_h: NotNegative = Field(4.0, description="hours until a broken GPU is replaced; a guess, it is yours to say")
    mtbf_h: Positive = Field(
        50_700.0, description="hours between failures of one GPU, node included (Llama 3, arXiv 2407.21783, table 5)"
    )


class Interval(_Part):
    """Measured over predicted: nine of ten measurements lay between."""

    low: Positive
    high: Positive


# Of hardware that nothing was measured on, with the defaults of `Efficiency`: what 2,353 public runs of other engines
# on Hopper and Blackwell GPUs came to, with what their servers add to the TTFT (`benchmarks/planner_accuracy.py`).
UNMEASURED_TTFT = Interval(low=1.8, high=32.0)
UNMEASURED_TPOT = Interval(low=0.93, high=2.8)
# The same with coefficients fitted to such runs on other models and engines: those of data/systems.yaml.
PUBLIC_TTFT = Interval(low=1.16, high=19.9)
PUBLIC_TPOT = Interval(low=0.61, high=1.49)


class System(_Part):
    """One kind of GPU and how they are wired. Raises pydantic's ValidationError for what is missing or no number."""

    name: str = Field(min_length=1)
    source: str = Field(min_length=1, description="where the numbers are from")
    kind: Literal["gpu", "cpu"] = "gpu"
    peak_tflops: dict[str, Positive] = Field(min_length=1, description="dense, by dtype of the product")
    memory_gb: Positive
    memory_gb_s: Positive = Field(description="bandwidth of the memory")
    gpus_per_node: Annotated[int, Field(ge=1)] = 8
    intra_gb_s: Positive = Field(description="of one GPU, one way, to others of its node")
    inter_gb_s: Positive = Field(description="of one GPU, one way, to other nodes")
    load_gb_s: Positive = Field(25.0, description="into one GPU from its host's memory")
    disk_gb_s: Positive = Field(1.0, description="into one node from where checkpoints are")
    runtime_gb: NotNegative = Field(4.0, description="what a worker process holds beside its tensors")
    memory_share: Share = Field(0.9, description="of the memory that may be filled")
    efficiency: Efficiency = Efficiency()
    contention: dict[int, Positive] = Field({}, description="how much longer steps take with so many workers at work")
    ttft_interval: Interval = UNMEASURED_TTFT
    tpot_interval: Interval = UNMEASURED_TPOT
    recovery: Recovery = Recovery()

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s. 16-bit types stand in for each other; ValueError for a dtype the hardware does not compute in."""
        twin = {"bf16": "fp16", "fp16": "bf16"}.get(dtype, dtype)
        found = self.peak_tflops.get(dtype) or self.peak_tflops.get(twin)
        if found is None:
            raise ValueError(f"system {self.name} has no peak_tflops for {dtype}: {', '.join(self.peak_tflops)} only.")
        return found * 1e12

    def slowdown(self, num_workers: int) -> float:
        """Of workers that share a machine and are at work at the same time: as measured with the next number."""
        known = [num for num in self.contention if num <= num_workers]
        return self.contention[max(known)] if known else 1.0


def is_calibrated(system: System) -> bool:
    """Whether predictions have intervals that were measured with this software on this hardware."""
    known = ((UNMEASURED_TTFT, UNMEASURED_TPOT), (PUBLIC_TTFT, PUBLIC_TPOT))
    return (system.ttft_interval, system.tpot_interval) not in known
