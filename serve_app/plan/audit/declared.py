"""Declared figures of a model, its hardware and its layout: what a document says, one key for each figure.

Nothing has to be declared: a check whose figures are missing says so. Shares are 0..1, rates decimal.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from serve_app.errors import PlanError

Count = Annotated[int, Field(ge=1, le=10**9, strict=True)]
Size = Annotated[int, Field(ge=1, le=10_000, strict=True)]  # what is gone through one by one
Number = Annotated[float, Field(ge=-1e18, le=1e18, strict=True)]
Positive = Annotated[float, Field(gt=0, le=1e18, strict=True)]
NotNegative = Annotated[float, Field(ge=0, le=1e18, strict=True)]
Share = Annotated[float, Field(ge=0, le=1, strict=True)]
PositiveShare = Annotated[float, Field(gt=0, le=1, strict=True)]
Dtype = Literal["fp32", "bf16", "fp16", "fp8", "int8", "int4", "fp4"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelFigures(_Section):
    total_params_b: Positive | None = None
    layers: Size | None = None
    experts_per_layer: Size | None = None
    total_experts: Count | None = None
    hidden: Count | None = None
    expert_hidden: Count | None = None
    dtype: Dtype | None = None
    vocab: Count | None = Field(None, description="default: 32,000, tied")
    heads: Count | None = Field(None, description="default: heads of 128")
    kv_heads: Count | None = Field(None, description="default: as many as heads")
    top_k: Size | None = Field(None, description="experts of a token; default: 1 and 2 are both tried")


class HardwareFigures(_Section):
    gpus: Count | None = None
    nodes: Count | None = None
    most_gpus_per_node: Count = Field(8, description="that a node of this kind can have")
    visible_devices: list[Annotated[int, Field(ge=0, strict=True)]] | None = Field(None, description="on one node")
    tflops: Positive | None = Field(None, description="peak of one GPU in model.dtype")
    tflops_8_bit: Positive | None = Field(None, description="peak of one GPU in fp8 or int8")
    mfu: PositiveShare = 0.6
    bandwidth_tb_s: Positive | None = None
    bandwidth_efficiency: PositiveShare = 0.8
    memory_gb: Positive | None = None
    intra_gb_s: Positive = Field(450.0, description="link of one GPU within its node; the default is a guess")
    inter_gb_s: Positive = Field(50.0, description="link of one GPU to other nodes; the default is a guess")


class WorkloadFigures(_Section):
    batch: Count | None = Field(None, description="sequences at a time, over all GPUs")
    min_sequence: Count | None = None
    max_sequence: Count | None = None


class LayoutFigures(_Section):
    tp: Size | None = None
    pp: Size | None = None
    dp: Size | None = None
    ep: Count | None = None
    modules: Count | None = None
    tp_groups: Count | None = None
    gpus_per_stage: Count | None = None
    gpus_per_replica: Count | None = None
    layers_per_stage: Count | None = None
    ep_groups: Count | None = None
    gpus_per_ep_group: Count | None = None
    experts_per_ep_group: Count | None = None
    experts_per_gpu: Count | None = None
    standby_experts_per_gpu: Annotated[int, Field(ge=0, le=10**9, strict=True)] | None = None


class MemoryFigures(_Section):
    """Of one GPU."""

    expert_gb: NotNegative | None = None
    attention_gb: NotNegative | None = None
    activation_gb: NotNegative | None = None
    optimizer_gb: NotNegative | None = None
    kv_gb: NotNegative | None = None
    total_gb: Positive | None = None
    peak_gb: Positive | None = None
    share: Share | None = Field(None, description="total_gb of hardware.memory_gb")
    headroom_share: Share | None = None


class PerformanceFigures(_Section):
    tokens_ms_gpu: Positive | None = None
    required_tokens_ms_gpu: Positive | None = None
    decode_tokens_ms_gpu: Positive | None = None
    total_tokens_ms: Positive | None = None
    margin: Number | None = Field(None, description="share by which the rate exceeds what is required")
    batch_s: Positive | None = Field(None, description="until all of a batch of the longest prompts are computed")
    ttft_s: Positive | None = None
    ttft_limit_s: Positive | None = None
    ttft_margin_s: Number | None = None


class LinkFigures(_Section):
    tp_group_tb_s: Positive | None = None
    sync_us: Positive | None = None


class TrainingFigures(_Section):
    gradient_sync_steps: Count | None = None
    checkpoint_layers: Count | None = None
    rollback: StrictBool | None = None


class ResilienceFigures(_Section):
    recovery_s: Positive | None = None
    redundancy_within_group: StrictBool | None = None
    capacity_after_loss: Share | None = Field(None, description="of throughput, one GPU lost")
    uniform_load: StrictBool | None = None


class AlertFigures(_Section):
    memory_gb: Positive | None = None
    memory_share: PositiveShare | None = None
    tokens_ms_gpu: Positive | None = Field(None, description="alert below")
    ttft_s: Positive | None = Field(None, description="alert above")
    ttft_target_s: Positive | None = Field(None, description="what the first token is to be kept under")
    expert_load_share: Positive | None = None
    expert_capacity_tokens_s: Positive | None = Field(None, description="what expert_load_share is a share of")
    gpu_utilization: tuple[Share, Share] | None = None


class GoalFigures(_Section):
    """What the same layout is said to go on to."""

    linear_to_gpus: Count | None = None
    experts: Count | None = None
    batch: Count | None = None
    params_b: Positive | None = None
    params_gpus: Count | None = None
    sequence: Count | None = None
    sequence_by_checkpointing: StrictBool = False
    dtype: Dtype | None = None


class LaunchFigures(_Section):
    """The command that is to start it."""

    gpus: Count | None = None
    nodes: Count | None = None
    tp: Count | None = None
    pp: Count | None = None
    dp: Count | None = None
    ep: Count | None = None
    experts: Count | None = None
    layers: Count | None = None
    hidden: Count | None = None
    batch: Count | None = None
    max_sequence: Count | None = None


class Declared(_Section):
    model: ModelFigures = ModelFigures()
    hardware: HardwareFigures = HardwareFigures()
    workload: WorkloadFigures = WorkloadFigures()
    layout: LayoutFigures = LayoutFigures()
    memory: MemoryFigures = MemoryFigures()
    performance: PerformanceFigures = PerformanceFigures()
    links: LinkFigures = LinkFigures()
    training: TrainingFigures = TrainingFigures()
    resilience: ResilienceFigures = ResilienceFigures()
    alerts: AlertFigures = AlertFigures()
    goals: GoalFigures = GoalFigures()
    launch: LaunchFigures = LaunchFigures()


def read_declared(path: Path) -> Declared:
    """The figures in a YAML file. PlanError names what is wrong with it."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: no UTF-8, or no date
        raise PlanError(f"{path} is not valid YAML.") from None
    if not isinstance(value, dict) or not value:
        raise PlanError(f"{path} declares nothing: it must be a mapping with sections {_sections()}.")
    return parse_declared(value)


def parse_declared(value: dict[str, Any]) -> Declared:
    """Checked figures. PlanError names every key that is unknown or out of its range."""
    try:
        return Declared.model_validate(value)
    except ValidationError as error:
        raise PlanError("the declared figures cannot be read: " + "; ".join(map(_sentence, error.errors()))) from None


def _sections() -> str:
    return ", ".join(Declared.model_fields)


def _sentence(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"`{key}` is no figure that is known"
    return f"`{key}` = {error['input']!r}: {error['msg']}"
