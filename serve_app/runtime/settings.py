"""From what a user set and what a model is, to what the pure parts need. No torch."""

from serve_app.config import OctavoConfig
from serve_app.engine.core import EngineConfig
from serve_app.errors import ConfigError
from serve_app.experts.layout import Layout, stage_layers
from serve_app.fetch.hub import resolve
from serve_app.fetch.progress import silent
from serve_app.model.files import check_folder
from serve_app.model.spec import ModelSpec


def engine_config(config: OctavoConfig, spec: ModelSpec, num_stages: int) -> EngineConfig:
    return EngineConfig(
        num_stages=num_stages,
        page_tokens=config.scheduler.page_tokens,
        max_running=config.scheduler.max_running,
        max_step_tokens=config.scheduler.max_step_tokens,
        max_context_tokens=max_context_tokens(config, spec),
        eos_token_ids=spec.eos_token_ids,
        prefix_cache=config.scheduler.prefix_cache,
    )


def max_context_tokens(config: OctavoConfig, spec: ModelSpec) -> int:
    """Prompt and answer together: what the model can, or less where the config says so."""
    return min(spec.max_positions, config.scheduler.max_context_tokens or spec.max_positions)


def layout_of(config: OctavoConfig, spec: ModelSpec) -> tuple[Layout, list[range]]:
    """The layout and the layers of each stage. ConfigError where the model cannot be cut so."""
    try:
        layout = Layout(config.layout.pp, config.layout.dp)
        return layout, stage_layers(spec.num_layers, layout.num_stages)
    except ValueError as error:
        raise ConfigError(f"the layout does not fit the model: {error}") from None


def check(config: OctavoConfig) -> ModelSpec:
    """Does the model exist, is its checkpoint whole, does the layout divide it? OctavoError says what does not.

    Everything that can be known before a worker starts, in a fraction of a second.
    """
    spec = check_folder(resolve(config.model, silent, fetch=False))
    layout_of(config, spec)
    return spec
