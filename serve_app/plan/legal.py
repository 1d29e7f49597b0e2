"""Which deployments a number of GPUs allows: all that Octavo runs, and why it does not run the others.

What does not divide evenly is no reason: layers, heads and experts are cut as evenly as can be, and `notes` say what
that means. What is refused is refused by the code that would run it (`experts.layout`), or cannot be wired.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from serve_app.experts.layout import cut, cut_heads, stage_layers
from serve_app.experts.placement import primaries_per_worker
from serve_app.model.spec import ModelSpec
from serve_app.plan.deployment import Deployment


class Rejected(NamedTuple):
    """A deployment that is not to be had, and why: one sentence."""

    deployment: Deployment
    reason: str


def legal(
    spec: ModelSpec,
    num_gpus: int,
    *,
    gpus_per_node: int = 8,
    standby: int | None = None,
    spares: int = 0,
    across_nodes: bool = False,
) -> tuple[list[Deployment], list[Rejected]]:
    """All deployments that use exactly `num_gpus`, `spares` warm ones of each cell among them.

    `standby`: slots of each worker beyond its primaries; None: the fewest with which a stage survives the loss of one
    of its workers. `across_nodes`: expert groups may be larger than a node. Raises ValueError for less than one GPU.
    """
    if num_gpus < 1:
        raise ValueError(f"num_gpus must be at least 1, not {num_gpus}.")
    found, rejected = [], []
    for deployment in _all(num_gpus, spec.num_heads, spares):
        reason = why_not(spec, deployment, gpus_per_node, across_nodes=across_nodes)
        if reason is None:
            num = least_standby(spec, deployment) if standby is None else standby
            found.append(replace(deployment, standby=num))
        else:
            rejected.append(Rejected(deployment, reason))
    return found, rejected


def _all(num_gpus: int, num_heads: int, spares: int) -> Iterator[Deployment]:
    """TP goes through powers of two and divisors of the heads; all else through what divides the GPUs."""
    for cells in divisors(num_gpus):
        cell_gpus = num_gpus // cells - spares
        for tp in divisors(cell_gpus) if cell_gpus > 0 else ():
            if is_power_of_two(tp) or num_heads % tp == 0:
                for pp in divisors(cell_gpus // tp):
                    yield Deployment(tp, pp, cell_gpus // tp // pp, cells, spares=spares)


@lru_cache
def divisors(num: int) -> tuple[int, ...]:
    """Ascending."""
    small = [part for part in range(1, int(num**0.5) + 1) if num % part == 0]
    return tuple(sorted({*small, *(num // part for part in small)}))


def is_power_of_two(num: int) -> bool:
    return num & (num - 1) == 0


def why_not(spec: ModelSpec, deployment: Deployment, gpus_per_node: int, *, across_nodes: bool = False) -> str | None:
    """One sentence where Octavo refuses this layout of this model, or it cannot be wired; None where it runs.

    `across_nodes`: expert groups may be larger than a node. What their exchange takes there has not been measured.
    """
    try:
        deployment.layout.check_model(spec.num_layers, spec.num_heads)
    except ValueError as error:
        return str(error).replace("num_shards=", "TP ").replace("num_stages=", "PP ")
    if deployment.tp > gpus_per_node:
        return f"TP {deployment.tp} does not fit on a node of {gpus_per_node} GPUs, and shards talk in every layer."
    if gpus_per_node % deployment.tp and deployment.num_gpus > gpus_per_node:
        return (
            f"TP {deployment.tp} does not divide the {gpus_per_node} GPUs of a node, so that shards would lie on two."
        )
    if deployment.ep > gpus_per_node and not across_nodes:
        return (
            f"EP {deployment.ep} exceeds the {gpus_per_node} GPUs of a node: rows would go to experts of other nodes in"
            " every layer, which nobody has measured; --across-nodes allows it."
        )
    return None


def least_standby(spec: ModelSpec, deployment: Deployment) -> int:
    """Slots beyond the primaries with which each stage has room for its experts after the loss of one worker.

    0 where a stage has only one: nobody is left to take them.
    """
    if deployment.ep == 1:
        return 0
    layers = len(_longest(spec.num_layers, deployment.pp))
    needed = primaries_per_worker(layers, spec.num_experts, deployment.ep - 1)
    return needed - deployment.primary(spec)


def _longest(num_layers: int, pp: int) -> range:
    return max(stage_layers(num_layers, pp), key=len)


def notes(spec: ModelSpec, deployment: Deployment, gpus_per_node: int) -> list[str]:
    """What does not come out evenly, or is not as one might think: one phrase each."""
    return [
        *_uneven_layers(spec, deployment.pp),
        *_uneven_heads(spec, deployment.tp),
        *_uneven_experts(spec, deployment),
        *_far(deployment, gpus_per_node),
    ]


def _uneven_layers(spec: ModelSpec, pp: int) -> Iterator[str]:
    sizes = sorted({len(layers) for layers in stage_layers(spec.num_layers, pp)})
    if len(sizes) > 1:
        yield f"stages of {sizes[0]} and {sizes[1]} layers"


def _uneven_heads(spec: ModelSpec, tp: int) -> Iterator[str]:
    sizes = sorted({len(cut(spec.num_heads, tp, shard)) for shard in range(tp)})
    if len(sizes) > 1:
        yield f"shards of {sizes[0]} and {sizes[1]} heads"
    cuts = [cut_heads(spec.num_heads, spec.num_kv_heads, tp, shard) for shard in range(tp)]
    if any(None in heads.queries for heads in cuts):
        yield "some shards' heads are padded, as they cut a KV head's group"
    held = sum(len(heads.kv_heads) for heads in cuts)
    if held > spec.num_kv_heads:
        yield f"{spec.num_kv_heads} KV heads are held {held / spec.num_kv_heads:.3g} times over {tp} shards"


def _uneven_experts(spec: ModelSpec, deployment: Deployment) -> Iterator[str]:
    group, num = deployment.ep, spec.num_experts
    pairs = len(_longest(spec.num_layers, deployment.pp)) * num
    if spec.is_dense and group > 1:
        yield f"dense: each layer's one expert runs on one of {group} workers, the others wait"
    elif group > pairs:
        yield f"{pairs} experts of a stage for {group} workers: {group - pairs} of them hold none"
    elif group > num:
        yield f"{num} experts of a layer for {group} workers: in each layer {group - num} of them have none"
    elif num % group:
        yield f"{num // group} or {num // group + 1} experts of a layer on each of {group} workers"
    if group == 1:
        yield "one worker in a stage: its loss stops the cell until it is replaced"


def _far(deployment: Deployment, gpus_per_node: int) -> Iterator[str]:
    if deployment.ep > gpus_per_node:
        yield f"experts are exchanged between nodes: EP {deployment.ep} over nodes of {gpus_per_node} GPUs"
    elif deployment.num_gpus > gpus_per_node and gpus_per_node % deployment.ep:
        yield f"some expert groups lie on two nodes: EP {deployment.ep} does not divide {gpus_per_node} GPUs"
