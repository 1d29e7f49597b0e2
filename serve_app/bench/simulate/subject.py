"""What is simulated: a deployment of a model, what its steps cost, and what its engine is bound by."""

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from serve_app.bench.simulate.plan_costs import PlanCosts
from serve_app.config import IMPORT_PATH, OctavoConfig, octavo_args, parse_config
from serve_app.engine.bounds import EngineConfig
from serve_app.engine.pace import MIN_OBSERVED, Observed, fit
from serve_app.engine.request import Terms
from serve_app.engine.slo import SloConfig
from serve_app.errors import ConfigError, FetchError, PlanError
from serve_app.fetch.hub import resolve
from serve_app.fetch.progress import silent
from serve_app.model.spec import ModelSpec, read_spec
from serve_app.plan.deployment import Deployment
from serve_app.plan.estimate import Cost, estimate
from serve_app.plan.footprint import kv_gpu_token_bytes
from serve_app.plan.inputs import read_model, read_precision, read_system
from serve_app.plan.loss import after
from serve_app.plan.question import read_layout
from serve_app.plan.recovery import budget
from serve_app.plan.room import room
from serve_app.plan.workload import Lengths, Objective, Workload
from serve_app.runtime.settings import engine_config
from serve_app.sim.serving.cell import CellSetup
from serve_app.sim.serving.costs import PacedCosts, StepCosts, rehearse
from serve_app.sim.serving.losses import Phases

PAGE_TOKENS = 32
AIM = 0.85  # of the objective that may be predicted, as `config.SloConfig` has it


@dataclass(frozen=True)
class Wanted:
    """As it was given. Either `config`, or `model` and `layout`; either `system`, or `pace`."""

    config: Path | None
    model: str | None
    layout: str | None
    cells: int | None  # None: as the layout says
    system: str | None
    precision: str
    pace: Path | None
    num_cores: int  # that a measured cell shares; 0: each worker has its own
    isl: Lengths
    osl: Lengths
    ttft_s: float | None  # None: as the config says
    is_admitting: bool
    chunk_tokens: int
    max_running: int | None

    @property
    def objective_s(self) -> float:
        return self.ttft_s or 10.0


@dataclass(frozen=True)
class Subject:
    """What a simulation is about. `phases`: of a loss, where nothing else is said."""

    setup: CellSetup
    deployment: Deployment
    system: str  # its name, or the file that its pace is from
    objective_s: float
    phases: Phases
    terms: Terms
    planned_per_s: float | None = None  # requests/s of all cells within the objective; None: it was not planned

    @property
    def without_admission(self) -> CellSetup:
        return replace(self.setup, engine=msgspec.structs.replace(self.setup.engine, slo=SloConfig()), pace=())


def find_subject(wanted: Wanted) -> Subject:
    """Raises PlanError, ConfigError or FetchError for what is missing, contradicts, or cannot be read."""
    if (wanted.config is None) == (wanted.model is None):
        raise PlanError("give either --config, or --model (or --preset) and --layout")
    if (wanted.system is None) == (wanted.pace is None):
        raise PlanError("give either --system, whose costs are planned, or --pace, the costs that were measured")
    if wanted.config is not None:
        return _from_config(wanted, read_config(wanted.config))
    return _from_layout(wanted)


# -- a Serve config ----------------------------------------------------------------------------------------------------


def read_config(path: Path) -> OctavoConfig:
    """The one application in a Serve config file that is ours. ConfigError if there is none, or more than one."""
    found = octavo_args(path)
    if len(found) != 1:
        raise ConfigError(f"{path} has {len(found)} applications with the import_path {IMPORT_PATH}; it needs one")
    return parse_config(found[0])


def spec_of(config: OctavoConfig) -> ModelSpec:
    """Of the model that is there, or of a preset of that name. FetchError where it is neither."""
    try:
        return read_spec(resolve(config.model, silent, fetch=False))
    except FetchError as error:
        try:
            return read_model(config.model)
        except PlanError:
            raise error from None


def _from_config(wanted: Wanted, config: OctavoConfig) -> Subject:
    spec, layout = spec_of(config), config.layout
    if layout.stage_layers is not None:
        raise ConfigError("`layout.stage_layers`: the cost model knows stages as even as can be only")
    deployment = Deployment(
        layout.tp,
        layout.pp,
        layout.dp,
        wanted.cells or 1,
        standby=config.worker.standby_slots,
        spares=config.resilience.spares,
    )
    precision = read_precision(wanted.precision)
    page_bytes = config.scheduler.page_tokens * kv_gpu_token_bytes(spec, precision, deployment)
    num_pages = max(1, int(config.worker.kv_gib * 2**30 / page_bytes))
    engine = msgspec.structs.replace(engine_config(config, spec, layout.pp), eos_token_ids=())
    engine = msgspec.structs.replace(engine, prefix_cache=False, slo=_changed(engine.slo, wanted))
    terms = Terms(share=config.slo.priorities[config.slo.default_priority])
    subject = _subject(wanted, spec, deployment, engine, num_pages, engine.max_step_tokens)
    return replace(subject, terms=terms, objective_s=engine.slo.ttft_s or wanted.objective_s)


def _changed(slo: SloConfig, wanted: Wanted) -> SloConfig:
    """As the command line has it."""
    if not wanted.is_admitting:
        return msgspec.structs.replace(slo, ttft_s=None)
    if wanted.ttft_s is None:
        return slo
    return msgspec.structs.replace(slo, ttft_s=wanted.ttft_s, target_s=AIM * wanted.ttft_s)


# -- a layout ----------------------------------------------------------------------------------------------------------


def _from_layout(wanted: Wanted) -> Subject:
    if wanted.layout is None:
        raise PlanError("--layout is missing: such as tp4,pp4,dp2")
    if wanted.system is None:
        raise PlanError("--pace is of one config: give that with --config, or a --system")
    assert wanted.model is not None
    spec, deployment = read_model(wanted.model), read_layout(wanted.layout)
    if wanted.cells:
        deployment = replace(deployment, cells=wanted.cells)
    cost = _cost(wanted, spec, deployment)
    workload = _workload(wanted, deployment, wanted.chunk_tokens)
    if workload.most_tokens > spec.max_positions:
        raise PlanError(f"a prompt and its answer have up to {workload.most_tokens} tokens, more than the model takes")
    places = room(cost, workload)
    engine = EngineConfig(
        num_stages=deployment.pp,
        max_context_tokens=workload.most_tokens,
        page_tokens=PAGE_TOKENS,
        max_running=wanted.max_running or places.max_running,
        max_step_tokens=wanted.chunk_tokens,
        prefix_cache=False,
        slo=SloConfig(ttft_s=wanted.objective_s, target_s=AIM * wanted.objective_s)
        if wanted.is_admitting
        else SloConfig(),
    )
    num_pages = max(1, places.kv_tokens // PAGE_TOKENS)
    subject = _subject(wanted, spec, deployment, engine, num_pages, wanted.chunk_tokens)
    return subject if wanted.max_running else replace(subject, planned_per_s=estimate(cost, workload).capacity)


def _cost(wanted: Wanted, spec: ModelSpec, deployment: Deployment) -> Cost:
    assert wanted.system is not None
    system = read_system(wanted.system)
    try:
        deployment.layout.check_model(spec.num_layers, spec.num_heads)
    except ValueError as error:
        raise PlanError(f"the layout does not fit the model: {error}") from None
    return Cost(spec, read_precision(wanted.precision, system), system, deployment)


def _workload(wanted: Wanted, deployment: Deployment, chunk_tokens: int) -> Workload:
    return Workload(
        wanted.isl,
        wanted.osl,
        concurrency=deployment.num_replicas,
        chunk_tokens=chunk_tokens,
        objective=Objective(ttft_s=wanted.objective_s),
    )


# -- both --------------------------------------------------------------------------------------------------------------


def _subject(
    wanted: Wanted, spec: ModelSpec, deployment: Deployment, engine: EngineConfig, num_pages: int, chunk_tokens: int
) -> Subject:
    costs: StepCosts
    if wanted.pace is not None:
        seen = read_pace(wanted.pace)
        costs = PacedCosts(fit(seen, [1.0] * len(seen)), deployment.pp, deployment.dp, wanted.num_cores)
        name, phases = wanted.pace.name, Phases()
    else:
        cost = _cost(wanted, spec, deployment)
        costs = PlanCosts(cost)
        seen = rehearse(costs, deployment.dp, chunk_tokens, -(-engine.max_running // deployment.pp))
        name, phases = cost.system.name, phases_of(cost, _workload(wanted, deployment, chunk_tokens))
    pace = tuple(seen) if engine.slo.ttft_s is not None else ()
    setup = CellSetup(engine, deployment.layout, min(num_pages, _most_pages(engine)), costs, pace)
    return Subject(setup, deployment, name, wanted.objective_s, phases, Terms())


def _most_pages(engine: EngineConfig) -> int:
    """More are never needed: all that run have their longest context, and one more page each is free."""
    return engine.max_running * (-(-engine.max_context_tokens // engine.page_tokens) + 1) + 1


def read_pace(path: Path) -> list[Observed]:
    """What an engine's calibration has seen, as `runtime.calibration` keeps it. PlanError if it is something else."""
    try:
        seen = msgspec.json.decode(path.read_bytes(), type=list[Observed])
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise PlanError(f"{path} is no calibration of an engine: {error}") from None
    if len(seen) < MIN_OBSERVED:
        raise PlanError(f"{path} has {len(seen)} steps: too few to tell what they cost")
    return seen


def phases_of(cost: Cost, workload: Workload) -> Phases:
    """As the planner reckons with for a worker whose process dies while its GPU is well."""
    found = budget(after(cost, workload, estimate(cost, workload), [0]), "process")
    refill_s = sum(phase.seconds for phase in found.restore if phase.name not in ("notice", "form"))
    return Phases(found.seconds("notice"), found.seconds("form"), found.seconds("load"), refill_s)
