"""A running cell instead of this machine: the steps that its engine remembers mend a system that is known already."""

import httpx
import msgspec
import torch

from serve_app.bench.calibrate.run import precision_of
from serve_app.bench.measure import BenchError
from serve_app.config import parse_config
from serve_app.engine.pace import Observed
from serve_app.plan.closed_loop import Drift, drift, refit
from serve_app.plan.deployment import Deployment
from serve_app.plan.fit import Case, Fitted, rounded
from serve_app.plan.system import System
from serve_app.runtime.settings import check
from serve_app.runtime.snapshot import PaceView

TIMEOUT_S = 10.0


class Mended(msgspec.Struct, frozen=True):
    """What the steps say of the system as it was, and of the system that they make of it."""

    view: PaceView
    before: Drift
    after: Drift
    fitted: Fitted
    system: System


def mend(url: str, system: System, model: str | None) -> Mended:
    """`model`: where this machine has it, if not as the server calls it. OctavoError where there is no such server, or
    it has not been at work."""
    view = ask(url)
    case, observed = case_of(view, model), whole_cell(view)
    if not observed:
        raise BenchError(f"{url} has not observed a step yet: it must have been at work, with an objective (`slo`)")
    before = drift(system, case, observed)
    fitted = refit(system, case, observed)
    mended = rounded(fitted.system)
    return Mended(view, before, drift(mended, case, observed), fitted, mended)


def ask(url: str) -> PaceView:
    """BenchError if the server does not say."""
    try:
        answer = httpx.get(url.rstrip("/") + "/admin/pace", timeout=TIMEOUT_S, trust_env=False)
        if answer.status_code != httpx.codes.OK:
            raise BenchError(f"{url} does not tell its pace: it answers {answer.status_code}")
        return msgspec.json.decode(answer.content, type=PaceView)
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise BenchError(f"{url} does not answer: {str(error) or type(error).__name__}") from None
    except msgspec.MsgspecError as error:
        raise BenchError(f"{url} does not answer as an Octavo server does: {error}") from None


def case_of(view: PaceView, model: str | None) -> Case:
    """Steps are taken to be computed in the dtype that this machine would choose."""
    spec = check(parse_config({"model": model or view.model}))
    return Case(spec, precision_of(torch.device("cpu")), Deployment(view.tp, view.pp, view.dp))


def whole_cell(view: PaceView) -> list[Observed]:
    """Of the cell as it is laid out, all its replicas at work."""
    return [o for pace in view.paces if pace.num_replicas == view.dp for o in pace.observed]
