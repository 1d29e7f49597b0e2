"""Hardware by name, from the table of data sheets (`data/systems.yaml`), or from a YAML file of plain numbers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from serve_app.errors import PlanError
from serve_app.plan.counts import DTYPE_BYTES
from serve_app.plan.files import find_path, load_table, load_yaml, shown, unknown
from serve_app.plan.system import System

FITTED_SHARES = "shares of the peaks fitted to public runs of other engines"
GUESSED_SHARES = "shares of the peaks are guesses until `octavo calibrate` has measured them"
_LEAST, _MOST = 1e-9, 1e12  # beyond these no number of any hardware lies, and arithmetic with it may overflow


@dataclass(frozen=True)
class Listed:
    """One entry of the table."""

    name: str
    also: tuple[str, ...]  # further names
    system: System


def list_systems() -> tuple[Listed, ...]:
    """All systems, in the table's order."""
    return tuple(Listed(name, _also(entry), _listed(name, entry)) for name, entry in load_table("systems").items())


def read_system(text: str) -> System:
    """A name of the table, in whichever case and with `-` or `_`, or the path of a YAML file.

    The file has the fields of `System`; `name` and `source` may be left out. With `base: NAME` it starts from an entry
    of the table and says what differs, and mappings in it are merged key by key. Raises PlanError naming the field.
    """
    if (found := find_system(text)) is not None:
        return found
    path = find_path(text)
    if path is None:
        raise unknown("system", text, _names(), files="a YAML file here")
    return _from_file(path)


def find_system(text: str) -> System | None:
    """Of the table; None where it has no such name."""
    wanted = text.casefold().replace("_", "-")
    for name, entry in load_table("systems").items():
        if wanted == name or wanted in _also(entry):
            return _listed(name, entry)
    return None


def _names() -> list[str]:
    return list(load_table("systems"))


def _also(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(entry.get("also", ()))


def _listed(name: str, entry: Mapping[str, Any]) -> System:
    fields = {key: value for key, value in entry.items() if key != "also"}
    if "efficiency" not in fields:
        fields["source"] += f"; {GUESSED_SHARES}"
    elif "tpot_interval" in fields:
        fields["source"] += f"; {FITTED_SHARES}"
    return System(name=name, **fields)


def _from_file(path: Path) -> System:
    fields = load_yaml(path)
    for name, value in _leaves(fields):
        if isinstance(value, bool):  # which pydantic would take for 1 or 0
            raise PlanError(f"{shown(path)}: `{name}` = {value!r} is no number")
    base = fields.pop("base", None)
    fields = {"name": path.stem, "source": path.name} | (fields if base is None else _based(path, base, fields))
    try:
        system = System.model_validate(fields)
    except ValidationError as error:
        raise PlanError(f"{shown(path)}: " + "; ".join(map(_sentence, error.errors()[:8]))) from None
    _check(path, system)
    return system


def _based(path: Path, base: object, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says, over the entry of the table that it starts from."""
    found = find_system(base) if isinstance(base, str) else None
    if found is None:
        raise PlanError(f"{shown(path)}: `base` = {shown(base)} is no name of the table: {', '.join(_names())}")
    merged = found.model_dump(exclude_unset=True) | {"name": path.stem}
    merged["source"] = f"{found.source}; {path.name} changes {', '.join(map(str, fields)) or 'nothing'}"
    for key, value in fields.items():
        old = merged.get(key)
        merged[key] = old | value if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _check(path: Path, system: System) -> None:
    """What pydantic's types do not say. Raises PlanError."""
    for dtype in system.peak_tflops:
        if dtype not in DTYPE_BYTES:
            raise PlanError(f"{shown(path)}: `peak_tflops.{dtype}` is of no known dtype: {', '.join(DTYPE_BYTES)}")
    for name, value in _leaves(system.model_dump()):
        if isinstance(value, int | float) and value != 0 and not _LEAST <= value <= _MOST:
            raise PlanError(f"{shown(path)}: `{name}` = {shown(value)} must be between {_LEAST:g} and {_MOST:g}")
    for name in ("ttft_interval", "tpot_interval"):
        interval = getattr(system, name)
        if interval.low > interval.high:
            raise PlanError(f"{shown(path)}: `{name}.low` = {interval.low:g} is above its `high` = {interval.high:g}")
    if any(num_workers < 1 for num_workers in system.contention):
        raise PlanError(f"{shown(path)}: `contention` must be of one worker at least")


def _leaves(value: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    """Names, with dots, and values. No System is deeper than two; an alias to itself is."""
    for key, inner in value.items():
        if isinstance(inner, dict) and depth < 3:
            yield from _leaves(inner, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", inner


def _sentence(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"] if part != "[key]")
    match error["type"]:
        case "missing":
            return f"`{name}` is missing"
        case "extra_forbidden":
            return f"`{name}` is no field of a system"
        case _:
            return f"`{name}` = {shown(error['input'])}: {error['msg']}"
