"""The loss of one GPU, told: where it sits, what it has, who stops, where its experts go, and what when."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from serve_app.experts.layout import HeadCut, Seat, cut_heads, stage_layers
from serve_app.experts.placement import Pair, Placement
from serve_app.experts.repair import repair
from serve_app.plan.counts import expert_params
from serve_app.plan.degraded import State
from serve_app.plan.estimate import Cost, Estimate
from serve_app.plan.homes import group, placed
from serve_app.plan.loss import after
from serve_app.plan.recovery import Budget, Cause, budget
from serve_app.plan.seats import Place, gpu_of, group_nodes, place_of
from serve_app.plan.workload import Workload

# copy: a live standby takes over. slot: it lands in a free one, or in that of another's standby. beyond: on top of all
# slots. nowhere: not all fit, and the cell waits. waits: nothing moves, since no replica is whole.
MAX_LISTED = 12  # in a sentence; the data has all
Way = Literal["copy", "slot", "beyond", "nowhere", "waits"]


@dataclass(frozen=True)
class Move:
    """Of one expert of the lost GPU."""

    layer: int
    expert: int
    way: Way
    gpu: int | None  # its new home


@dataclass(frozen=True)
class Moment:
    """What is the case from `at_s` on."""

    at_s: float  # from the loss
    name: str
    capacity: float  # requests/s with the objective kept
    capacity_share: float  # of that of the whole deployment
    ttft_s: float | None  # mean of new requests at the same load, where somebody serves them; None: they wait
    text: str


@dataclass(frozen=True)
class Story:
    """Of a GPU with a seat, or of a spare: then there is nothing to tell but where it was."""

    place: Place
    layers: range | None
    heads: HeadCut | None
    experts: tuple[Pair, ...]  # primaries
    standbys: tuple[Pair, ...]  # live copies of others' experts
    survivors: tuple[int, ...]  # GPUs of its expert group
    stopped: tuple[int, ...]  # that stand still at once, itself not counted
    resting: tuple[int, ...]  # of these: that serve no replica until its seat is filled
    moves: tuple[Move, ...]
    loaded_bytes: dict[int, float]  # by survivor: what it takes from its host's memory, or from disk
    state: State
    budget: Budget
    moments: tuple[Moment, ...]


def story(cost: Cost, workload: Workload, healthy: Estimate, gpu: int, cause: Cause = "gpu") -> Story:
    """Raises PlanError for a GPU that the deployment does not have."""
    place = place_of(cost.deployment, cost.system.gpus_per_node, gpu)
    state = after(cost, workload, healthy, [gpu], "gpu" if place.seat is not None else "spare")
    spent = budget(state, cause)
    moments = tuple(_moments(state, spent))
    if place.seat is None:
        return Story(place, None, None, (), (), (), (), (), (), {}, state, spent, moments)
    spec, deployment, seat = cost.spec, cost.deployment, place.seat
    rank = deployment.layout.group_rank(seat)
    first = gpu_of(deployment, place.cell, Seat(seat.stage, 0, 0))
    placement = placed(group(spec, deployment, seat.stage, _nodes(cost, place)))
    moves = tuple(_moves(cost, state, place, placement))
    landed = Counter(move.gpu for move in moves if move.gpu is not None and move.way in ("slot", "beyond"))
    per_expert = expert_params(spec) * cost.precision.expert_bytes
    return Story(
        place=place,
        layers=stage_layers(spec.num_layers, deployment.pp)[seat.stage],
        heads=cut_heads(spec.num_heads, spec.num_kv_heads, deployment.tp, seat.shard),
        experts=tuple(placement.held(rank)),
        standbys=tuple(placement.standbys(rank)),
        survivors=tuple(first + other for other in range(deployment.ep) if other != rank),
        stopped=tuple(other for other in _cell_gpus(cost, place.cell) if other != gpu),
        resting=tuple(_resting(cost, state, place)),
        moves=moves,
        loaded_bytes={other: num * per_expert for other, num in sorted(landed.items())},
        state=state,
        budget=spent,
        moments=moments,
    )


def _nodes(cost: Cost, place: Place) -> tuple[int, ...]:
    assert place.seat is not None
    return group_nodes(cost.deployment, cost.system.gpus_per_node, place.cell, place.seat.stage)


def _cell_gpus(cost: Cost, cell: int) -> range:
    size = cost.deployment.cell_gpus
    return range(cell * size, (cell + 1) * size)


def _resting(cost: Cost, state: State, place: Place) -> Iterator[int]:
    """All of a cell that waits, else the broken replica."""
    assert place.seat is not None
    is_waiting = not state.cells[0].num_serving(cost.deployment.dp)
    for gpu in _cell_gpus(cost, place.cell):
        seat = place_of(cost.deployment, cost.system.gpus_per_node, gpu).seat
        assert seat is not None
        if gpu != place.gpu and (is_waiting or seat.replica == place.seat.replica):
            yield gpu


def _moves(cost: Cost, state: State, place: Place, placement: Placement) -> Iterator[Move]:
    """As `experts.repair` has it."""
    deployment, seat = cost.deployment, place.seat
    assert seat is not None
    rank = deployment.layout.group_rank(seat)
    first = place.gpu - rank
    held = placement.held(rank)
    if not state.cells[0].num_serving(deployment.dp):
        yield from (Move(*pair, "nowhere" if state.cells[0].num_homeless else "waits", None) for pair in held)
        return
    slots = deployment.slots(cost.spec)
    living = [other for other in range(deployment.ep) if other != rank]
    repaired = repair(placement, living, slots, [str(node) for node in _nodes(cost, place)])
    holds = Counter(rank for table in repaired.placement.hosts for ranks in table for rank in ranks)
    present = slots.primary + slots.standby
    beyond = _beyond(repaired.landed, {other: holds[other] - present for other in living})
    for pair in held:
        home = repaired.placement.table(pair[0])[pair[1]][0]
        way: Way = "copy" if pair not in repaired.landed else "beyond" if pair in beyond else "slot"
        yield Move(*pair, way, first + home)


def _beyond(landed: dict[Pair, int], too_many: dict[int, int]) -> set[Pair]:
    """The last ones to land on a rank are those beyond its slots. `too_many`: by rank, how many those are."""
    by_rank: dict[int, list[Pair]] = defaultdict(list)
    for pair, rank in landed.items():
        by_rank[rank].append(pair)
    return {pair for rank, pairs in by_rank.items() if too_many[rank] > 0 for pair in pairs[-too_many[rank] :]}


# -- what when ------------------------------------------------------------------------------------------------------


def _moments(state: State, spent: Budget) -> Iterator[Moment]:
    whole, whole_ttft_s = state.healthy.capacity or 0.0, state.healthy.ttft_s.value
    if not state.cells:
        yield Moment(0.0, "lost", whole, 1.0, whole_ttft_s, "It had no seat: nobody waits for it.")
        return
    others_ttft_s = state.degraded.ttft_s.value if spent.is_waiting and state.is_survivable else None
    yield Moment(0.0, "lost", state.capacity_at_once, state.share_at_once, others_ttft_s, "Nobody knows it yet.")
    ends = accumulate(phase.seconds for phase in spent.failover)
    now: tuple[float, float, float | None]
    for phase, end_s in zip(spent.failover, ends, strict=True):
        if spent.is_waiting and phase.name == "re-add":
            now = whole, 1.0, whole_ttft_s
        elif not spent.is_waiting and phase.name in ("step", "re-add"):
            now = state.capacity, state.share, state.degraded.ttft_s.value
        else:
            now = state.capacity_at_once, state.share_at_once, others_ttft_s
        yield Moment(end_s, phase.name, *now, _ENDS[phase.name])
    yield Moment(spent.whole_s, "restored", whole, 1.0, whole_ttft_s, "Its seat is filled again.")


_ENDS = {
    "notice": "Its death is known.",
    "replace": "The broken GPU has been replaced.",
    "respawn": "A new worker has started.",
    "load weights": "Whoever takes its seat has its weights.",
    "form": "The next epoch has begun.",
    "load": "The survivors have its experts.",
    "step": "The first stream has its next token.",
    "re-add": "The last stream has its next token.",
}


# -- sentences ------------------------------------------------------------------------------------------------------


def tell(told: Story) -> list[str]:
    """In plain sentences, one thing each."""
    place = told.place
    if place.seat is None:
        return [
            f"GPU {place.gpu} is a spare of cell {place.cell}, on node {place.node}: it has no seat and no experts.",
            "Nobody stops, no client sees it, and the next loss finds one spare less.",
        ]
    return [
        *_tell_where(told),
        *_tell_who_stops(told),
        *_tell_experts(told),
        *_tell_time(told),
        *_tell_capacity(told),
        _tell_clients(told),
    ]


def _tell_where(told: Story) -> Iterator[str]:
    place, layers, heads = told.place, told.layers, told.heads
    assert place.seat is not None
    assert layers is not None
    assert heads is not None
    seat = place.seat
    yield (
        f"GPU {place.gpu} is on node {place.node}, in cell {place.cell}: stage {seat.stage}, replica {seat.replica},"
        f" shard {seat.shard}."
    )
    queries = sum(head is not None for head in heads.queries)
    yield (
        f"It runs layers {named(layers)} with {_num(queries, 'query head')} and {_num(len(heads.kv_heads), 'KV head')}"
        f" of replica {seat.replica}, and holds {_num(len(told.experts), 'expert')}: {_pairs(told.experts)}."
    )
    if told.standbys:
        yield f"It also has live copies of {_num(len(told.standbys), 'expert')} of others: {_pairs(told.standbys)}."


def _tell_who_stops(told: Story) -> Iterator[str]:
    state, dp = told.state, told.state.cost.deployment.dp
    yield (
        f"When it is lost, all {state.blast_gpus} GPUs of cell {told.place.cell} stand still while the next epoch"
        f" forms: {100 * state.hit_share:.0f} % of tokens meet one of its experts."
    )
    if told.budget.is_waiting:
        why = "an expert has no room" if state.cells[0].num_homeless else "no replica is whole"
        yield f"They go on standing still until its seat is filled, since {why}."
    else:
        assert told.place.seat is not None
        yield (
            f"Then replica {told.place.seat.replica}, one of {dp}, rests until its seat is filled."
            + (f" Its other GPUs ({named(told.resting)}) hold experts for the others." if told.resting else "")
        )


_BEGINS: dict[Way, str] = {
    "copy": "where a live copy was, which takes over at once",
    "slot": "in slots of the survivors",
    "beyond": "beyond all slots, in memory that is taken from the KV",
    "nowhere": "without a home: the survivors have no room for all",
    "waits": "where they were: with whoever takes the seat",
}


def _tell_experts(told: Story) -> Iterator[str]:
    by_way: dict[Way, list[Move]] = defaultdict(list)
    for move in told.moves:
        by_way[move.way].append(move)
    for way, begin in _BEGINS.items():
        if moves := by_way.get(way):
            where = [f"{move.layer}.{move.expert} on GPU {move.gpu}" for move in moves if move.gpu is not None]
            listed = f": {_some(where)}" if where else ""
            yield f"{len(moves)} of its {_num(len(told.moves), 'expert')} are then {begin}{listed}."
    if told.loaded_bytes:
        most = max(told.loaded_bytes.values())
        yield (
            f"{len(told.loaded_bytes)} of its stage's {_num(len(told.survivors), 'survivor')}"
            f" ({named(told.survivors)}) load {sum(told.loaded_bytes.values()) / 1e9:.2f} GB together,"
            f" {most / 1e9:.2f} GB at most."
        )


def _tell_time(told: Story) -> Iterator[str]:
    spent = told.budget
    phases = ", ".join(f"{phase.name} {seconds(phase.seconds)}" for phase in spent.failover)
    yield (
        f"The first stream goes on after {seconds(spent.first_token_s)}, the last after {seconds(spent.all_streams_s)}"
        f" ({phases})."
    )
    phases = ", ".join(f"{phase.name} {seconds(phase.seconds)}" for phase in spent.restore)
    yield f"All is as before after {seconds(spent.whole_s)} ({phases})."
    limit_s = told.state.workload.objective.recovery_s
    if limit_s is not None:
        verdict = "in time" if spent.keeps(told.state.workload.objective) else "too late"
        yield f"Streams may stand still for {seconds(limit_s)}: that is {verdict}."


def _tell_capacity(told: Story) -> Iterator[str]:
    state = told.state
    yield (
        f"The capacity falls to {100 * state.share_at_once:.0f} % at once, and is {100 * state.share:.0f} %"
        f" of {state.healthy.capacity or 0.0:.1f} requests/s until its seat is filled."
    )
    if not state.is_survivable:
        yield "Nothing else serves: new requests wait, or are refused at the door."
        return
    kept = "kept" if state.keeps_objective else "not kept"
    yield (
        f"At the same load the time to first token is {seconds(state.degraded.ttft_s.value)} in the mean,"
        f" {seconds(state.degraded.ttft_p99_s.value)} for the slowest of a hundred"
        f" ({seconds(state.healthy.ttft_s.value)} and {seconds(state.healthy.ttft_p99_s.value)} before):"
        f" the objective is {kept}."
    )
    if (at_once_s := state.at_once_s) is not None:
        yield (
            f"{state.workload.concurrency} prompts that come all at once need {seconds(at_once_s)} at least until the"
            " last has its first token."
        )


def _tell_clients(told: Story) -> str:
    if told.budget.is_waiting:
        return (
            f"Clients of this cell wait {seconds(told.budget.first_token_s)} or longer, then have the same tokens;"
            " their requests are kept."
        )
    return (
        f"Clients see a pause: {seconds(told.budget.first_token_s)} on whole replicas,"
        f" up to {seconds(told.budget.all_streams_s)} on the broken one; then the same tokens. No request fails."
    )


def named(gpus: Sequence[int]) -> str:
    """Numbers in order, runs of three and more as «8 to 11»."""
    runs: list[list[int]] = []
    for gpu in gpus:
        if runs and gpu == runs[-1][-1] + 1:
            runs[-1].append(gpu)
        else:
            runs.append([gpu])
    told = [[f"{run[0]} to {run[-1]}"] if len(run) > 2 else list(map(str, run)) for run in runs]
    return ", ".join(text for texts in told for text in texts)


def seconds(value: float) -> str:
    """A time that is read at a glance."""
    if value >= 7200:
        return f"{value / 3600:.1f} h"
    if value >= 120:
        return f"{value / 60:.0f} min"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.3g} s"


def _some(listed: Sequence[str]) -> str:
    """The first of many."""
    more = len(listed) - MAX_LISTED
    return ", ".join(listed[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _num(num: int, what: str) -> str:
    return f"{num} {what}{'' if num == 1 else 's'}"


def _pairs(pairs: Sequence[Pair]) -> str:
    """Experts by layer: «layer 4: 5 13, layer 5: 7»."""
    by_layer: dict[int, list[int]] = defaultdict(list)
    for layer, expert in pairs:
        by_layer[layer].append(expert)
    return _some([f"layer {layer}: {' '.join(map(str, experts))}" for layer, experts in by_layer.items()])
