"""What a plan is made from, read from what a user gives: names, files and plain numbers. Every fault is a PlanError."""

import math
from dataclasses import fields, replace

from serve_app.errors import CheckpointError, PlanError
from serve_app.model.spec import ModelSpec, parse_config, read_json, read_spec
from serve_app.plan.counts import DTYPE_BYTES, Precision
from serve_app.plan.files import find_path, one_line, shown, unknown
from serve_app.plan.lengths import read_lengths
from serve_app.plan.presets import find_preset, list_models
from serve_app.plan.system import System
from serve_app.plan.systems import list_systems, read_system
from serve_app.plan.workload import Objective, Workload

__all__ = [
    "choose_model",
    "list_models",
    "list_systems",
    "read_lengths",
    "read_model",
    "read_precision",
    "read_system",
    "read_workload",
]

# Beyond these a config is broken, and a plan for it would not end.
_MOST_OF = {"num_layers": 10_000, "num_experts": 100_000, "num_heads": 100_000, "num_kv_heads": 100_000}
_MOST = 1_000_000_000

# Each name is all four classes. int4: only held so, as GPTQ and AWQ do, products in 16 bits. KV is never below 8 bits.
PRECISIONS = {
    "fp32": Precision("fp32", "fp32", "fp32", "fp32"),
    "bf16": Precision("bf16", "bf16", "bf16", "bf16"),
    "fp16": Precision("fp16", "fp16", "fp16", "fp16"),
    "fp8": Precision("fp8", "fp8", "fp8", "fp8"),
    "int8": Precision("int8", "int8", "bf16", "int8"),
    "int4": Precision("int4", "int4", "bf16", "bf16"),
    "fp4": Precision("fp4", "fp4", "fp8", "fp4"),
}


def choose_model(model: str | None, preset: str | None) -> str:
    """Whichever of two options is given. PlanError where both are, or neither."""
    if model is not None and preset is not None:
        raise PlanError(f"--model {shown(model)} and --preset {shown(preset)} contradict: give one of them")
    chosen = preset if model is None else model
    if chosen is None:
        raise PlanError("no model is given: --preset names one of `octavo plan --list`, --model a folder or a file")
    return chosen


def read_model(text: str, *, top_k: int | None = None) -> ModelSpec:
    """A preset's name or repository, a folder with a config.json, or the path of one.

    `top_k` replaces how many experts a token goes through. Of a folder that is called as a preset, `./name` is the
    folder. Raises PlanError naming the field; nothing is ever fetched.
    """
    try:
        preset = find_preset(text)
        spec = _read_config(text) if preset is None else preset.spec
    except CheckpointError as error:
        raise PlanError(f"model {shown(text)}: {one_line(error)}") from None
    except (TypeError, OverflowError) as error:
        raise PlanError(f"model {shown(text)}: its config.json has a value of no use: {one_line(error)}") from None
    _check_sizes(spec, text)
    return spec if top_k is None else _with_top_k(spec, top_k)


def _read_config(text: str) -> ModelSpec:
    path = find_path(text)
    if path is None:
        raise unknown("model", text, [preset.name for preset in list_models()], files="a folder or file here")
    if path.is_dir():
        return read_spec(path)
    if not path.is_file():
        raise PlanError(f"model {shown(text)} is neither a folder nor a file")
    return parse_config(read_json(path))


def _check_sizes(spec: ModelSpec, text: str) -> None:
    for field in fields(spec):
        value = getattr(spec, field.name)
        most = _MOST_OF.get(field.name, _MOST)
        if isinstance(value, int) and value > most:
            raise PlanError(f"model {shown(text)}: {field.name} = {shown(value)} is beyond {most:,}")


def _with_top_k(spec: ModelSpec, top_k: int) -> ModelSpec:
    if not 1 <= top_k <= spec.num_experts:
        raise PlanError(f"top_k = {top_k} must be 1 to {spec.num_experts}, the experts of a layer")
    return replace(spec, top_k=top_k)


def read_precision(text: str, system: System | None = None) -> Precision:
    """A name of PRECISIONS, and what differs from it: `fp8`, or `bf16,experts=fp8,kv=fp8`.

    The classes are `weights` (attention, gates, embedding, head), `experts`, `kv` and `compute`. Raises PlanError for
    what is not known, and where the system has no peak for what products are computed in.
    """
    name, *changes = text.split(",")
    if name not in PRECISIONS:
        raise PlanError(f"precision {shown(name)} is not known: {', '.join(PRECISIONS)} are")
    given: dict[str, str] = {}
    for change in changes:
        key, _, dtype = change.partition("=")
        if key in given:
            raise PlanError(f"precision {shown(text)}: {key} is there twice")
        given[key] = _checked_dtype(key, dtype, text)
    precision = replace(PRECISIONS[name], **given)
    if system is not None:
        _check_compute(precision, system)
    return precision


def _checked_dtype(key: str, dtype: str, text: str) -> str:
    known = [field.name for field in fields(Precision)]
    if key not in known:
        raise PlanError(f"precision {shown(text)}: {shown(key)} is no class of tensors: {', '.join(known)} are")
    if dtype not in DTYPE_BYTES:
        raise PlanError(f"precision {shown(text)}: {key} = {shown(dtype)} is no known dtype: {', '.join(DTYPE_BYTES)}")
    return dtype


def _check_compute(precision: Precision, system: System) -> None:
    try:
        system.peak_flops(precision.compute)
    except ValueError as error:
        raise PlanError(f"{one_line(error)}; `compute=` names another dtype for products") from None


def read_workload(
    isl: str,
    osl: str,
    *,
    concurrency: int | None = None,
    rate: float | None = None,
    prefix_share: float = 0.0,
    burstiness: float = 1.0,
    chunk_tokens: int = 8192,
    objective: Objective | None = None,
) -> Workload:
    """Lengths as `read_lengths` takes them; 128 sequences at a time where neither they nor a rate are given.

    Raises PlanError naming the option.
    """
    objective = objective or Objective()
    _check_objective(objective)
    for name, value in {"rate": rate, "prefix_share": prefix_share, "burstiness": burstiness}.items():
        if value is not None and not math.isfinite(value):
            raise PlanError(f"{name} must be a number, not {value}")
    if concurrency is None and rate is None:
        concurrency = 128
    try:
        return Workload(
            isl=read_lengths(isl, name="--isl"),
            osl=read_lengths(osl, name="--osl"),
            concurrency=concurrency,
            rate=rate,
            prefix_share=prefix_share,
            burstiness=burstiness,
            chunk_tokens=chunk_tokens,
            objective=objective,
        )
    except ValueError as error:
        raise PlanError(one_line(error)) from None


def _check_objective(objective: Objective) -> None:
    for field in fields(objective):
        value = getattr(objective, field.name)
        if value is not None and not 0 < value < math.inf:
            raise PlanError(f"the objective {field.name} must be above 0, not {value}")
    if (share := objective.availability) is not None and share >= 1:
        raise PlanError(f"the objective availability must be a share below 1, such as 0.999, not {share}")
