"""What a user may set. Unknown keys are errors; every field says its unit."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve_app.errors import ConfigError

IMPORT_PATH = "serve_app.app:build"

Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayoutConfig(_Section):
    """How the model is cut. The experts of a stage are spread over its `tp` x `dp` workers (EP = TP x DP)."""

    tp: Count = Field(1, description="shards: attention heads and the vocabulary are cut into this many")
    pp: Count = Field(1, description="pipeline stages: consecutive layers are cut into this many")
    stage_layers: list[Count] | None = Field(
        None, description="layers of each stage, first to last; default: as even as can be"
    )
    dp: Count = Field(1, description="replicas of the attention weights, each with its own KV cache")


class WorkerConfig(_Section):
    """One worker process, and what Ray is to reserve for it."""

    num_threads: Count = Field(1, description="threads that compute in one worker")
    num_cpus: float = Field(0.1, ge=0, description="CPUs that Ray reserves for one worker")
    num_gpus: float = Field(0, ge=0, description="GPUs that Ray reserves for one worker")
    primary_slots: Count | None = Field(
        None, description="experts that one worker holds as their first home; default: as many as come out evenly"
    )
    standby_slots: int = Field(0, ge=0, description="further experts on one worker: live copies of its peers'")
    kv_gib: float = Field(1.0, gt=0, description="GiB of KV cache on one worker")
    ready_timeout_s: float = Field(600, gt=0, description="seconds that workers may take to start and load")


class SchedulerConfig(_Section):
    """How steps are made."""

    page_tokens: Literal[16, 32, 64, 128] = Field(32, description="tokens in one KV page")
    max_running: Count = Field(64, description="sequences that one replica runs at a time")
    max_step_tokens: Count = Field(512, description="tokens of one step, prefill and decode together")
    max_context_tokens: Count | None = Field(None, description="prompt + answer; default: what the model can")
    prefix_cache: bool = Field(True, description="reuse the KV of prompts that begin alike")


class LimitsConfig(_Section):
    """What the door refuses."""

    max_body_bytes: Count = Field(4 * 2**20, description="bytes of one HTTP request's body")
    max_prompts: Count = Field(256, description="prompts in one HTTP request, times the answers asked of each")
    max_queued: Count = Field(1024, description="sequences that wait for a place, at most")
    max_queued_tokens: Count = Field(1_000_000, description="prompt tokens that wait to be computed, at most")
    queued_tokens_by_replicas: dict[Count, Count] | None = Field(
        None, description="the same while only so many replicas serve; default: `max_queued_tokens`"
    )
    max_headers: Count = Field(100, description="header fields of one HTTP request")
    max_connections: Count = Field(2000, description="HTTP requests that one ingress replica has open at a time")


class SloConfig(_Section):
    """What is promised, and who shares in it."""

    ttft_s: float | None = Field(
        10.0, gt=0, description="seconds to the first token, promised to all who are let in; null: no admission"
    )
    alert_s: float | None = Field(
        None, gt=0, description="seconds to the first token from which on it is a close call; default: 95 % of `ttft_s`"
    )
    target_s: float | None = Field(
        None, gt=0, description="seconds predicted for a request, at most, to let it in; default: 85 % of `ttft_s`"
    )
    min_ttft_s: float = Field(0.1, gt=0, description="the lowest objective that a request may ask for")
    max_ttft_s: float = Field(600.0, gt=0, description="the highest objective that a request may ask for")
    itl_ms: float | None = Field(
        None, gt=0, description="milliseconds between two tokens of a running stream: prompts are cut finer to keep it"
    )
    refusal_status: Literal[429, 503, 529] = Field(429, description="HTTP status of a refusal")
    priorities: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        {"high": 1.0, "normal": 0.9, "low": 0.5},
        description="what share of the admission budget each priority may fill",
    )
    default_priority: str = Field("normal", description="of a request that names none")

    @property
    def alert_at_s(self) -> float | None:
        return self.alert_s or (None if self.ttft_s is None else 0.95 * self.ttft_s)

    @property
    def aim_s(self) -> float:
        """What is predicted at most; inf without admission."""
        return math.inf if self.ttft_s is None else self.target_s or 0.85 * self.ttft_s


class SecurityConfig(_Section):
    """Who may ask, and what."""

    keys_file: str | None = Field(
        None, min_length=1, description="file of hashed API keys (`octavo key`); without it nobody needs one"
    )
    cors_origins: list[str] = Field([], description="origins whose pages may call from a browser; none by default")
    log_prompts: bool = Field(False, description="write prompts into the log")


class ResilienceConfig(_Section):
    """What the cell does about those that die."""

    spares: int = Field(0, ge=0, description="warm workers without a seat: one takes the seat of a dead one at once")
    hung_s: float = Field(2.0, gt=0.5, description="seconds without a sign of life after which a worker is killed")
    stuck_s: float = Field(60.0, gt=1, description="seconds that a worker's loop may take for one turn")
    step_limit_s: float = Field(
        120.0, gt=1, description="seconds after which a step is held to wait for a lost message"
    )
    orphan_s: float = Field(60.0, gt=5, description="seconds that workers and router wait for a new engine")
    resume_s: float = Field(30.0, ge=0, description="seconds that a stream is kept for a client that lost its ingress")


class OctavoConfig(_Section):
    """The arguments of `serve_app.app:build`."""

    model: str = Field("demo", min_length=1, description="`demo`, `reference`, a folder, or a Hugging Face hub id")
    network: Literal["auto", "loopback", "cluster"] = Field(
        "auto",
        description="where the cell's sockets bind; auto: loopback while Ray has one node, else each node's own"
        " address, authenticated and encrypted with CURVE",
    )
    name: str | None = Field(None, min_length=1, description="the name that clients see; default: the model's")
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="auto: bf16 where the device has it")
    device: Literal["cpu", "cuda"] = "cpu"
    num_ingress: Count = Field(1, description="HTTP replicas")
    layout: LayoutConfig = LayoutConfig()
    worker: WorkerConfig = WorkerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    limits: LimitsConfig = LimitsConfig()
    slo: SloConfig = SloConfig()
    security: SecurityConfig = SecurityConfig()
    resilience: ResilienceConfig = ResilienceConfig()

    @property
    def served_name(self) -> str:
        return self.name or self.model.rstrip("/").rsplit("/", 1)[-1]


def parse_config(args: dict[str, Any]) -> OctavoConfig:
    """The arguments of a config file, checked. ConfigError names every offending key and says what it may be."""
    try:
        return OctavoConfig.model_validate(args)
    except ValidationError as error:
        raise ConfigError("the config cannot run: " + "; ".join(map(_sentence, error.errors()))) from None


def octavo_args(path: Path) -> list[dict[str, Any]]:
    """The `args` of each application in a Serve config file that is ours. ConfigError if there is none."""
    try:
        content = yaml.safe_load(path.read_bytes())
        ours = [entry for entry in content["applications"] if entry["import_path"] == IMPORT_PATH]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date such as 2026-99-99
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except (TypeError, KeyError):
        raise ConfigError(f"{path} is no Ray Serve config: it needs a list `applications`") from None
    if not ours:
        raise ConfigError(f"{path} has no application with the import_path {IMPORT_PATH}")
    found = [entry.get("args") or {} for entry in ours]
    if not all(isinstance(args, dict) for args in found):
        raise ConfigError(f"the `args` of {IMPORT_PATH} in {path} are no mapping of keys to values")
    return found


def _sentence(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"`{key}` is not a key of this config"
    return f"`{key}` = {error['input']!r}: {error['msg']}"
