"""Shapes of models that come with the planner, so that a plan needs no checkpoint. The table: `data/models.yaml`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.model.spec import ModelSpec, parse_config
from serve_app.plan.files import load_table


@dataclass(frozen=True)
class Preset:
    """One entry of the table."""

    name: str
    source: str
    hub_id: str | None  # the repository whose config.json it is
    serve: str | None  # what `model:` of a deployment config says to serve it
    total_b: float  # declared, in billions of parameters
    active_b: float  # the same of those that one token goes through
    config: Mapping[str, Any]

    @property
    def spec(self) -> ModelSpec:
        return parse_config(self.config)


def list_models() -> tuple[Preset, ...]:
    """All presets, in the table's order."""
    return tuple(_preset(name, entry) for name, entry in load_table("models").items())


def find_preset(text: str) -> Preset | None:
    """By its name or its repository's, in whichever case; None where there is none."""
    wanted = text.casefold()
    for name, entry in load_table("models").items():
        if wanted in (name, entry.get("hub", name).casefold()):
            return _preset(name, entry)
    return None


def _preset(name: str, entry: Mapping[str, Any]) -> Preset:
    hub_id, declared = entry.get("hub"), entry["declared_b"]
    return Preset(
        name=name,
        source=entry["source"],
        hub_id=hub_id,
        serve=entry.get("serve", hub_id),
        total_b=declared["total"],
        active_b=declared["active"],
        config=entry["config"],
    )
