"""From what a user set and what a model is, to what the pure parts need. No torch."""

from itertools import pairwise
from pathlib import Path

from serve_app.config import OctavoConfig
from serve_app.engine.core import EngineConfig
from serve_app.engine.membership import MembershipConfig
from serve_app.engine.slo import SloConfig
from serve_app.errors import CheckpointError, ConfigError
from serve_app.experts.layout import Layout, cut_at, stage_layers
from serve_app.experts.placement import Slots, primaries_per_worker
from serve_app.fetch.hub import resolve
from serve_app.fetch.progress import silent
from serve_app.model.files import check_folder
from serve_app.model.spec import ModelSpec
from serve_app.model.tokenizer import Tokenizer
from serve_app.runtime.wire import MAX_PART_BYTES

_ITEM_BYTES = 4  # the residual stream is fp32 between stages; rows for experts are at most that


def engine_config(config: OctavoConfig, spec: ModelSpec, num_stages: int) -> EngineConfig:
    return EngineConfig(
        num_stages=num_stages,
        page_tokens=config.scheduler.page_tokens,
        max_running=config.scheduler.max_running,
        max_step_tokens=config.scheduler.max_step_tokens,
        max_context_tokens=max_context_tokens(config, spec),
        eos_token_ids=spec.eos_token_ids,
        prefix_cache=config.scheduler.prefix_cache,
        slo=slo_config(config),
    )


def slo_config(config: OctavoConfig) -> SloConfig:
    wanted, limits = config.slo, config.limits
    return SloConfig(
        ttft_s=wanted.ttft_s,
        target_s=wanted.aim_s,
        itl_s=None if wanted.itl_ms is None else wanted.itl_ms / 1e3,
        max_queued=limits.max_queued,
        max_queued_tokens=limits.max_queued_tokens,
        queued_tokens_by_replicas=limits.queued_tokens_by_replicas or {},
        num_replicas=config.layout.dp,
    )


def membership_config(config: OctavoConfig) -> MembershipConfig:
    wanted = config.resilience
    return MembershipConfig(hung_s=wanted.hung_s, stuck_s=wanted.stuck_s, num_spares=wanted.spares)


def max_context_tokens(config: OctavoConfig, spec: ModelSpec) -> int:
    """Prompt and answer together: what the model can, or less where the config says so."""
    return min(spec.max_positions, config.scheduler.max_context_tokens or spec.max_positions)


def layout_of(config: OctavoConfig, spec: ModelSpec) -> tuple[Layout, list[range]]:
    """The layout and the layers of each stage. ConfigError where the model cannot be cut so."""
    try:
        layout = Layout(config.layout.pp, config.layout.dp, config.layout.tp)
        layout.check_model(spec.num_layers, spec.num_heads)
        if config.layout.stage_layers is None:
            return layout, stage_layers(spec.num_layers, layout.num_stages)
        if len(config.layout.stage_layers) != layout.num_stages:
            given = len(config.layout.stage_layers)
            raise ValueError(f"`layout.stage_layers` names {given} stages, `layout.pp` {layout.num_stages}.")
        return layout, cut_at(spec.num_layers, config.layout.stage_layers)
    except ValueError as error:
        raise ConfigError(f"the layout does not fit the model: {error}") from None


def slots_of(config: OctavoConfig, spec: ModelSpec) -> Slots:
    """Room for experts on each worker: what the config says, or what the largest stage needs.

    ConfigError where the config says too little.
    """
    layout, stages = layout_of(config, spec)
    num_layers = max(map(len, stages))
    needed = primaries_per_worker(num_layers, spec.num_experts, layout.group_size)
    primary = config.worker.primary_slots or needed
    if primary < needed:
        raise ConfigError(
            f"`worker.primary_slots` = {primary} is too few: a stage of {num_layers} layers x {spec.num_experts}"
            f" experts needs {needed} on each of its {layout.group_size} workers"
        )
    return Slots(primary, config.worker.standby_slots)


def check(config: OctavoConfig) -> ModelSpec:
    """Is the model there, its checkpoint and tokenizer whole, does the config fit it? OctavoError says what does not.

    Everything that can be known before a worker starts, in a fraction of a second.
    """
    folder = resolve(config.model, silent, fetch=False)
    spec = check_folder(folder)
    slots_of(config, spec)  # and with it the layout
    _check_slo(config)
    _check_limits(config)
    _check_step(config, spec)
    _check_tokenizer(folder)
    return spec


def _check_slo(config: OctavoConfig) -> None:
    slo = config.slo
    if slo.ttft_s is not None and max(slo.aim_s, slo.alert_at_s or 0.0) > slo.ttft_s:
        raise ConfigError(
            f"`slo.target_s` = {slo.aim_s:g} and `slo.alert_s` = {slo.alert_at_s:g} must not be above"
            f" `slo.ttft_s` = {slo.ttft_s:g}: what is aimed at comes before what is promised"
        )
    if slo.default_priority not in slo.priorities:
        raise ConfigError(f"`slo.default_priority` = {slo.default_priority!r} is not one of `slo.priorities`")


def _check_limits(config: OctavoConfig) -> None:
    """Fewer replicas are to let fewer tokens wait, and all of them as many as the limit of a whole cell says."""
    limits, key = config.limits, "`limits.queued_tokens_by_replicas`"
    rising = sorted((limits.queued_tokens_by_replicas or {}).items())
    if rising and rising[-1][0] >= config.layout.dp:
        raise ConfigError(
            f"{key} names {rising[-1][0]}, and `layout.dp` is {config.layout.dp}: it is for fewer replicas than all,"
            " for which there is `limits.max_queued_tokens`"
        )
    for (fewer, more_tokens), (more, tokens) in pairwise([*rising, (config.layout.dp, limits.max_queued_tokens)]):
        if more_tokens > tokens:
            raise ConfigError(
                f"{key} lets {more_tokens} tokens wait for {fewer} replicas and {tokens} for {more}: fewer replicas"
                " must not have the higher number"
            )


def _check_step(config: OctavoConfig, spec: ModelSpec) -> None:
    """A step's hidden states are one part of a message; so are rows for a worker's experts, `top_k` a token at most."""
    num_rows = spec.top_k if config.layout.dp * config.layout.tp > 1 else 1
    num_tokens, most = config.scheduler.max_step_tokens, MAX_PART_BYTES // (num_rows * spec.hidden_size * _ITEM_BYTES)
    if num_tokens > most:
        raise ConfigError(f"`scheduler.max_step_tokens` = {num_tokens} is too large: this model takes at most {most}")


def _check_tokenizer(folder: Path) -> None:
    try:
        Tokenizer.load(folder)
    except (OSError, ValueError) as error:  # such as a template that is no UTF-8
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}") from None
