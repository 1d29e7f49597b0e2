"""The models and the hardware that the planner knows by name."""

from typing import Any

from rich.table import Table

from serve_app.plan.counts import count_params
from serve_app.plan.presets import list_models
from serve_app.plan.show import words
from serve_app.plan.show.tables import table
from serve_app.plan.systems import list_systems


def models_table() -> Table:
    return table(
        "Models: --preset",
        ("name", "parameters\nB", "active\nB", "layers", "experts\nof a layer", "top-k"),
        [
            (
                preset.name,
                words.digits((params := count_params(spec := preset.spec)).total / 1e9),
                words.digits(params.active / 1e9),
                str(spec.num_layers),
                str(spec.num_experts),
                str(spec.top_k),
            )
            for preset in list_models()
        ],
    )


def systems_table() -> Table:
    return table(
        "Hardware: --system",
        ("name", "memory\nGB", "memory\nGB/s", "GPUs\na node", "TFLOP/s, dense"),
        [
            (
                one.name,
                f"{one.system.memory_gb:g}",
                f"{one.system.memory_gb_s:,g}",
                str(one.system.gpus_per_node),
                ", ".join(f"{dtype} {peak:,g}" for dtype, peak in one.system.peak_tflops.items()),
            )
            for one in list_systems()
        ],
    )


def listing_figures() -> dict[str, Any]:
    return {
        "models": [
            {"name": preset.name, "hub_id": preset.hub_id, "source": preset.source, "params_b": preset.total_b}
            for preset in list_models()
        ],
        "systems": [
            {"name": one.name, "also": list(one.also), **one.system.model_dump(mode="json", exclude={"name"})}
            for one in list_systems()
        ],
    }
