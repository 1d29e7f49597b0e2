"""The map of a deployment's GPUs: a line for each stage of a cell, in it its replicas, in these their shards."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from serve_app.experts.layout import Seat, stage_layers
from serve_app.plan.degraded import State
from serve_app.plan.report.fates import FATES, Taken
from serve_app.plan.report.figures import plural
from serve_app.plan.report.markup import Html, tag
from serve_app.plan.seats import Place, gpu_of, num_seats, place_of
from serve_app.plan.story import named

WHOLE = 256  # seats, up to which all are drawn
MOST = 1024  # GPUs that are drawn of a larger one
NUMBERED = 128  # GPUs of a map, up to which they have their numbers in them

Draw = Callable[[Place], Html]


@dataclass(frozen=True)
class Block:
    """A stage of a cell, and those of its replicas that are drawn."""

    cell: int
    stage: int
    replicas: tuple[int, ...]


def blocks(state: State) -> list[Block]:
    """Of a large deployment the cells that are hit; of these, up to MOST GPUs, what lost somebody before the rest."""
    deployment = state.cost.deployment
    if num_seats(deployment) <= WHOLE:
        everybody = tuple(range(deployment.dp))
        return [Block(cell, stage, everybody) for cell in range(deployment.cells) for stage in range(deployment.pp)]
    hit = {(cell.cell, seat.stage) for cell in state.cells for seat in cell.seats}
    broken = {seat.replica for cell in state.cells for seat in cell.seats}
    replicas = sorted(range(deployment.dp), key=lambda replica: (replica not in broken, replica))
    stages = [(cell.cell, stage) for cell in state.cells for stage in range(deployment.pp)]
    found, room = [], MOST // deployment.tp
    for cell, stage in sorted(stages, key=lambda block: (block not in hit, block)):
        if room:
            found.append(Block(cell, stage, tuple(sorted(replicas[:room]))))
            room -= len(found[-1].replicas)
    return sorted(found, key=lambda block: (block.cell, block.stage))


def draw_taken(state: State) -> Html:
    """Coloured by what the loss takes."""
    taken = Taken(state)

    def gpu(place: Place) -> Html:
        fate = taken.fate(place)
        return tag("span", str(place.gpu), class_=f"gpu {fate}", title=f"{where(place)}: {FATES[fate][0]}")

    return draw(state, gpu)


def draw(state: State, gpu: Draw) -> Html:
    """`gpu`: makes one of them."""
    found = blocks(state)
    num = sum(len(block.replicas) for block in found) * state.cost.deployment.tp
    cells = sorted({block.cell for block in found})
    left_out = num_seats(state.cost.deployment) - num
    note = f"Not drawn: {plural(left_out, 'GPU')}; the list says what becomes of them." if left_out else ""
    return tag(
        "div",
        *(_cell(state, cell, [block for block in found if block.cell == cell], gpu) for cell in cells),
        tag("p", note, class_="note") if note else "",
        class_="map" if num <= NUMBERED else "map small",
    )


def _cell(state: State, cell: int, stages: list[Block], gpu: Draw) -> Html:
    rows = [_stage(state, block, gpu) for block in stages]
    return tag("div", tag("h4", f"Cell {cell}"), *rows, *_spares(state, cell, gpu), class_="cell")


def _stage(state: State, block: Block, gpu: Draw) -> Html:
    cost, deployment = state.cost, state.cost.deployment
    replicas, nodes = [], set()
    for replica in block.replicas:
        first = gpu_of(deployment, block.cell, Seat(block.stage, replica, 0))
        places = [place_of(deployment, cost.system.gpus_per_node, first + shard) for shard in range(deployment.tp)]
        nodes |= {place.node for place in places}
        replicas.append(tag("span", tag("small", f"r{replica}"), *map(gpu, places), class_="replica"))
    layers = f"layers {named(stage_layers(cost.spec.num_layers, deployment.pp)[block.stage])}"
    on = f"node{'s' if len(nodes) > 1 else ''} {named(sorted(nodes))}"
    name = tag("span", tag("b", f"Stage {block.stage}"), tag("small", layers), tag("small", on), class_="name")
    return tag("div", name, tag("span", *replicas, class_="replicas"), class_="stage")


def _spares(state: State, cell: int, gpu: Draw) -> Iterator[Html]:
    deployment = state.cost.deployment
    if deployment.spares:
        first = num_seats(deployment) + cell * deployment.spares
        places = [place_of(deployment, state.cost.system.gpus_per_node, first + i) for i in range(deployment.spares)]
        name = tag("span", tag("b", "Spares"), class_="name")
        yield tag("div", name, tag("span", tag("span", *map(gpu, places), class_="replica")), class_="stage")


def where(place: Place) -> str:
    """A GPU and its seat."""
    if place.seat is None:
        return f"GPU {place.gpu}, node {place.node}, cell {place.cell}, no seat"
    seat = place.seat
    return (
        f"GPU {place.gpu}, node {place.node}, cell {place.cell}, stage {seat.stage}, replica {seat.replica},"
        f" shard {seat.shard}"
    )
