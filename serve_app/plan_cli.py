"""The commands `octavo plan` and `octavo audit`: their options."""

import os
import re
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.markup import escape

from serve_app.errors import FetchError, PlanError

if TYPE_CHECKING:
    from serve_app.plan.answer import Answer
    from serve_app.plan.audit import Finding


class Rank(StrEnum):
    HEALTHY = "healthy"
    WORST = "worst"


class View(StrEnum):
    SERVING = "serving"
    TRAINING = "training"


@dataclass(frozen=True)
class _Files:
    """To be written."""

    save_dir: Path | None
    html: Path | None
    csv: Path | None


_WHAT, _LOAD, _HOW, _OUT = "What is planned", "Load and objective", "Layouts", "What is shown and written"

_Model = Annotated[
    str | None,
    typer.Option(help="a folder, a config.json, a preset, or a hub id that is on this machine", rich_help_panel=_WHAT),
]
_Preset = Annotated[str | None, typer.Option(help="a model by name: --list names all", rich_help_panel=_WHAT)]
_System = Annotated[
    str | None, typer.Option(help="hardware by name, or a YAML file: --list names all", rich_help_panel=_WHAT)
]
_Gpus = Annotated[int | None, typer.Option(help="plan for so many GPUs", rich_help_panel=_WHAT)]
_TargetRate = Annotated[
    float | None, typer.Option(help="or for the fewest that carry so many requests/s", rich_help_panel=_WHAT)
]
_TargetConcurrency = Annotated[
    int | None, typer.Option(help="or for the fewest that carry so many sequences at a time", rich_help_panel=_WHAT)
]
_Dtype = Annotated[
    str, typer.Option(help="of all tensors, and what differs: fp8, or bf16,experts=fp8,kv=fp8", rich_help_panel=_WHAT)
]
_TopK = Annotated[int | None, typer.Option(help="experts of a token, instead of the model's", rich_help_panel=_WHAT)]

_Isl = Annotated[
    str | None,
    typer.Option(help="tokens of prompts: 1024, 128:10240, or a histogram file; default: 1024", rich_help_panel=_LOAD),
]
_Osl = Annotated[str | None, typer.Option(help="tokens of answers, likewise; default: 128", rich_help_panel=_LOAD)]
_Prefix = Annotated[
    float | None, typer.Option(help="share of a prompt's tokens that are in the cache, 0 to 1", rich_help_panel=_LOAD)
]
_Concurrency = Annotated[
    int | None, typer.Option(help="sequences at a time, over all GPUs; default: 128", rich_help_panel=_LOAD)
]
_Rate = Annotated[float | None, typer.Option(help="or requests/s, over all GPUs", rich_help_panel=_LOAD)]
_Burstiness = Annotated[
    float | None,
    typer.Option(help="coefficient of variation between arrivals; default: 1, Poisson", rich_help_panel=_LOAD),
]
_Chunk = Annotated[
    int | None, typer.Option(help="prompt tokens of a step, at most; default: 8192", rich_help_panel=_LOAD)
]
_Ttft = Annotated[
    float | None, typer.Option(help="seconds in which 99 of 100 have their first token", rich_help_panel=_LOAD)
]
_Tpot = Annotated[float | None, typer.Option(help="milliseconds from token to token", rich_help_panel=_LOAD)]
_Recovery = Annotated[
    float | None, typer.Option(help="seconds in which all streams go on after a GPU is lost", rich_help_panel=_LOAD)
]
_Availability = Annotated[
    float | None, typer.Option(help="share of the time to keep the objective, such as 0.999", rich_help_panel=_LOAD)
]
_Prefill = Annotated[
    float | None, typer.Option(help="prompt tokens/ms of one GPU, without any load", rich_help_panel=_LOAD)
]

_Strict = Annotated[
    bool, typer.Option("--strict-sla", help="leave out what misses the objective", rich_help_panel=_HOW)
]
_Rank = Annotated[
    Rank, typer.Option(help="by throughput, or by capacity after the loss of a GPU", rich_help_panel=_HOW)
]
_Top = Annotated[int, typer.Option(help="layouts to show", rich_help_panel=_HOW)]
_Layout = Annotated[
    str | None, typer.Option(help="tell about this one: tp4,pp4,dp2, also cells, standby, spares", rich_help_panel=_HOW)
]
_Standby = Annotated[
    int | None,
    typer.Option(help="expert slots beyond the primaries; default: what one loss takes", rich_help_panel=_HOW),
]
_Spares = Annotated[int | None, typer.Option(help="warm GPUs of each cell without a seat", rich_help_panel=_HOW)]
_Across = Annotated[
    bool,
    typer.Option(
        "--across-nodes/--within-node",
        help="expert groups (EP = TP x DP) may be larger than a node",
        rich_help_panel=_HOW,
    ),
]

_Kill = Annotated[int | None, typer.Option(help="tell what the loss of this GPU does", rich_help_panel=_OUT)]
_From = Annotated[
    str | None, typer.Option("--from", help="tell the way from this layout to the chosen one", rich_help_panel=_OUT)
]
_View = Annotated[View, typer.Option(help="what serving needs, or training, which is apart", rich_help_panel=_OUT)]
_Scaling = Annotated[
    bool, typer.Option("--scaling", help="vary GPUs, experts, batch, length, dtype", rich_help_panel=_OUT)
]
_Audit = Annotated[
    Path | None,
    typer.Option("--audit", help="declared figures to check beside, as `octavo audit`", rich_help_panel=_OUT),
]
_Save = Annotated[
    Path | None, typer.Option(help="write the Serve config of the chosen layout there", rich_help_panel=_OUT)
]
_Html = Annotated[Path | None, typer.Option(help="write a page with all of it", rich_help_panel=_OUT)]
_Csv = Annotated[Path | None, typer.Option(help="write the Pareto front", rich_help_panel=_OUT)]
_Json = Annotated[bool, typer.Option("--json", help="print all of it as JSON", rich_help_panel=_OUT)]
_List = Annotated[bool, typer.Option("--list", help="name presets and hardware, and end", rich_help_panel=_OUT)]


def plan(
    model: _Model = None,
    preset: _Preset = None,
    system: _System = None,
    total_gpus: _Gpus = None,
    target_request_rate: _TargetRate = None,
    target_concurrency: _TargetConcurrency = None,
    dtype: _Dtype = "bf16",
    top_k: _TopK = None,
    isl: _Isl = None,
    osl: _Osl = None,
    prefix: _Prefix = None,
    concurrency: _Concurrency = None,
    rate: _Rate = None,
    burstiness: _Burstiness = None,
    chunk_tokens: _Chunk = None,
    ttft: _Ttft = None,
    tpot: _Tpot = None,
    recovery: _Recovery = None,
    availability: _Availability = None,
    prefill_rate: _Prefill = None,
    strict_sla: _Strict = False,
    rank: _Rank = Rank.HEALTHY,
    top_n: _Top = 5,
    layout: _Layout = None,
    standby: _Standby = None,
    spares: _Spares = None,
    across_nodes: _Across = False,
    kill: _Kill = None,
    from_layout: _From = None,
    view: _View = View.SERVING,
    scaling: _Scaling = False,
    audit_file: _Audit = None,
    save_dir: _Save = None,
    html: _Html = None,
    csv: _Csv = None,
    json: _Json = False,
    list_names: _List = False,
) -> None:
    """From model, hardware and objective to a layout, with the loss of a GPU counted in.

    octavo plan --preset reference-10b --system reference
    octavo plan --preset qwen3-30b-a3b --system h100 --total-gpus 16 --ttft 2

    Offline, on no GPU. Takes less than a second for 32 GPUs. What nobody
    said is in the preset's case, or a default; the plan says which.

    Ends with status 0, or with one sentence and status 2 where the numbers
    are missing, contradict, or no layout holds or keeps them.
    """
    if list_names:
        _list(as_json=json)
        return
    from serve_app.plan.answer import answer
    from serve_app.plan.asking import Options, ask
    from serve_app.plan.show.shown import Extras, shown

    found = answer(
        ask(
            Options(
                model=model,
                preset=preset,
                system=system,
                total_gpus=total_gpus,
                target_request_rate=target_request_rate,
                target_concurrency=target_concurrency,
                isl=isl,
                osl=osl,
                prefix=prefix,
                concurrency=concurrency,
                rate=rate,
                burstiness=burstiness,
                chunk_tokens=chunk_tokens,
                ttft_s=ttft,
                tpot_ms=tpot,
                recovery_s=recovery,
                availability=availability,
                prefill_tokens_ms=prefill_rate,
                is_strict=strict_sla,
                rank=rank.value,
                top=top_n,
                layout=layout,
                standby=standby,
                spares=spares,
                dtype=dtype,
                top_k=top_k,
                across_nodes=across_nodes,
            ),
            _find_model,
        )
    )
    findings = None if audit_file is None else _findings(audit_file)
    told = shown(
        found,
        Extras(kill=kill, before=from_layout, is_training=view is View.TRAINING, is_scaling=scaling, findings=findings),
    )
    content = told.figures() if json else list(told.parts())  # all of it, so that nothing fails in the middle
    written = _write(found, _Files(save_dir, html, csv), findings, kill)
    _print(content, written)


def audit(
    file: Annotated[Path, typer.Argument(help="declared figures, a YAML file")],
    json: Annotated[bool, typer.Option("--json", help="print findings as JSON")] = False,
) -> None:
    """Check the declared figures of a model, its hardware and its layout against each other.

    Each is computed again from the others; what does not hold comes with the
    reading that would make it true, as far as one is found.

    Ends with status 0 if all of them hold, 1 if one does not, 2 if the file
    cannot be read.
    """
    from serve_app.plan.show.audited import audit_figures, audit_sentence, audit_table
    from serve_app.plan.show.paper import to_json

    findings = _findings(file)
    if json:
        sys.stdout.write(to_json(audit_figures(findings)))
    else:
        console = _console()
        console.print(audit_table(findings))
        console.print(escape(audit_sentence(findings)), soft_wrap=True)
    raise typer.Exit(int(any(found.is_flagged for found in findings)))


def _findings(file: Path) -> "list[Finding]":
    from serve_app.plan.audit import audit as audit_declared
    from serve_app.plan.audit import read_declared

    return audit_declared(read_declared(file))


def _find_model(text: str) -> str:
    """A folder for what is no preset: of a hub id, or of a model that we make, only if it is on this machine."""
    path = Path(text).expanduser()
    if path.exists() or (text not in ("demo", "reference") and not _is_hub_id(text)):
        return str(path) if text else text
    from serve_app.fetch.hub import resolve
    from serve_app.fetch.progress import silent

    try:
        return str(resolve(text, silent, fetch=False))
    except FetchError:
        raise PlanError(f"--model {text!r} is not on this machine: `octavo fetch {text}` gets it") from None


def _is_hub_id(text: str) -> bool:
    """«organisation/name», and no path that is mistyped."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) is not None and not text.endswith((".json", ".yaml"))


def _list(*, as_json: bool) -> None:
    from serve_app.plan.show.listing import listing_figures, models_table, systems_table
    from serve_app.plan.show.paper import to_json

    if as_json:
        sys.stdout.write(to_json(listing_figures()))
        return
    console = _console()
    console.print(models_table())
    console.print(systems_table())


def _write(found: "Answer", files: _Files, findings: "list[Finding] | None", kill: int | None) -> list[Path]:
    """What was asked for, before anything is printed. Raises PlanError."""
    from serve_app.plan.show.paper import pareto_csv, write

    written = []
    if files.save_dir is not None:
        written.append(_save(found, files.save_dir))
    if files.csv is not None:
        write(files.csv, pareto_csv(found), "--csv")
        written.append(files.csv)
    if files.html is not None:
        from serve_app.plan.html import write_report

        write_report(files.html, found, findings or (), killed=kill)
        written.append(files.html)
    return written


def _save(found: "Answer", folder: Path) -> Path:
    from serve_app.plan.emit import emit, file_name, write

    name = _served(found)
    text = emit(found.cost, found.question.workload, found.estimate, found.budgets, model=name)
    return write(folder, file_name(found.cost, found.question.model), text)


def _served(found: "Answer") -> str:
    """What a config's `model` is to be."""
    from serve_app.plan.presets import find_preset

    text = found.question.model
    preset = find_preset(text)
    if preset is None:
        path = Path(text).expanduser()
        return str(path.parent if path.is_file() else path) if path.exists() else text
    if preset.serve is None:
        raise PlanError(
            f"--save-dir writes what can be started, and {text} is a shape without weights: plan with --model and a"
            " folder that has some"
        )
    return preset.serve


def _print(content: dict[str, Any] | list[RenderableType], written: list[Path]) -> None:
    from serve_app.plan.show.paper import to_json

    if isinstance(content, dict):
        sys.stdout.write(to_json(content | {"written": [str(path) for path in written]}))
        return
    console = _console()
    for part in content:
        console.print(part, soft_wrap=isinstance(part, str) and not console.is_terminal)
    for path in written:
        console.print(f"written: {escape(str(path))}", soft_wrap=True)


def _console() -> Console:
    from serve_app.plan.show.paper import console

    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    return console(is_terminal=sys.stdout.isatty(), has_columns="COLUMNS" in os.environ)
