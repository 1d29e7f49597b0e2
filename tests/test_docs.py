"""The documents say what is there."""

import re
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from pydantic import BaseModel

from serve_app.config import OctavoConfig

ROOT = Path(__file__).parent.parent


def keys_of(model, prefix=""):
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.default


@pytest.mark.parametrize(("key", "default"), list(keys_of(OctavoConfig)))
def test_every_config_key_is_described_with_its_default(key, default):
    rows = [line for line in (ROOT / "docs/config.md").read_text().splitlines() if line.startswith(f"| `{key}` |")]
    assert len(rows) == 1
    if default is not None:
        shown = rows[0].split("|")[2].strip().strip("`")
        assert shown == (str(default).lower() if isinstance(default, bool) else str(default))


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    rows = [line for line in (ROOT / "docs/dependencies.md").read_text().splitlines() if line.startswith("| ")]
    cells = [row.split("|")[1].strip() for row in rows]
    explained = {name for cell in cells if cell not in {"package", "---"} for name in cell.split(", ")}
    assert explained == {re.split("[<>=~!;]", requirement)[0].strip() for requirement in requirements}
