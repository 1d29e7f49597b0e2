"""Which GPU has which seat: GPUs are numbered by cell, stage, replica and shard; after all seats come the spares."""

from dataclasses import dataclass

from serve_app.errors import PlanError
from serve_app.experts.layout import Seat
from serve_app.plan.deployment import Deployment


@dataclass(frozen=True)
class Place:
    """Where a GPU is. `seat` is None for a spare."""

    gpu: int
    node: int
    cell: int
    seat: Seat | None


def num_seats(deployment: Deployment) -> int:
    """In all cells: without spares."""
    return deployment.cells * deployment.cell_gpus


def gpu_of(deployment: Deployment, cell: int, seat: Seat) -> int:
    rank = deployment.layout.group_rank(seat)
    return cell * deployment.cell_gpus + seat.stage * deployment.ep + rank


def place_of(deployment: Deployment, gpus_per_node: int, gpu: int) -> Place:
    """Raises PlanError for a GPU that the deployment does not have."""
    if not 0 <= gpu < deployment.num_gpus:
        raise PlanError(f"there is no GPU {gpu}: the deployment has {deployment.num_gpus}, numbered from 0.")
    node = gpu // gpus_per_node
    if gpu >= num_seats(deployment):
        return Place(gpu, node, (gpu - num_seats(deployment)) // deployment.spares, None)
    cell, within = divmod(gpu, deployment.cell_gpus)
    stage, rank = divmod(within, deployment.ep)
    return Place(gpu, node, cell, Seat(stage, *divmod(rank, deployment.tp)))


def group_nodes(deployment: Deployment, gpus_per_node: int, cell: int, stage: int) -> tuple[int, ...]:
    """The nodes of a stage's expert group, by rank."""
    first = gpu_of(deployment, cell, Seat(stage, 0, 0))
    return tuple(gpu // gpus_per_node for gpu in range(first, first + deployment.ep))
