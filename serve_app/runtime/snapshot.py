"""What a cell shows of itself under `/admin`: who holds what, what has happened, which processes there are, and their
pace."""

import msgspec

from serve_app.engine.pace import Observed
from serve_app.experts.placement import Pair


class WorkerView(msgspec.Struct, frozen=True):
    """One worker and what it holds."""

    name: str  # "" where the seat is empty
    replica: int
    shard: int
    node: str  # Ray's id of the node it is on
    resident_bytes: int  # as last reported; 0 before
    tokens: int  # run through its experts in the window
    primary: list[Pair]
    standby: list[Pair]


class StageView(msgspec.Struct, frozen=True):
    """One stage's expert group."""

    stage: int
    first_layer: int
    end_layer: int  # exclusive
    imbalance: float  # max over mean of the workers' tokens in the window; 1.0 where there were none
    offered_imbalance: float  # what the placement offered for the next epoch would have made of it
    workers: list[WorkerView]  # by rank in the expert group


class CellView(msgspec.Struct, frozen=True):
    """One cell, as its router knows it: `GET /admin/placement`, and what `octavo status` draws."""

    epoch: int  # 0 before the first
    tp: int
    pp: int
    dp: int
    num_experts: int  # per layer
    primary_slots: int  # per worker
    standby_slots: int
    window_s: float  # what `tokens` and `imbalance` were counted over
    stages: list[StageView]


class EventView(msgspec.Struct, frozen=True):
    """One line of the cell's history, as `GET /admin/events` tells it."""

    at_unix_s: float
    kind: str  # "lost", "epoch", "failover", "restored", "formed again", "router", "adopted"
    epoch: int
    text: str
    seconds: dict[str, float]  # phases of a failover by name, where the event ends one


class ProcessView(msgspec.Struct, frozen=True):
    """One process of the cell, as `GET /admin/processes` lists it."""

    role: str  # "worker", "spare", "router", "engine", "ingress"
    name: str
    pid: int
    node: str  # Ray's id of the node it is on
    state: str  # of a worker: "serving", "hosting", "loaded", "starting", "spare"; else "live"


class ReplicasPace(msgspec.Struct, frozen=True):
    """What steps take while so many replicas are at work."""

    num_replicas: int
    costs: list[float]  # seconds of a step, a prompt token, a decoding row, a thousand attended pairs; [] while unknown
    observed: list[Observed]  # [[prompt tokens, decoding rows, thousands of attended pairs], seconds], the newest last


class PaceView(msgspec.Struct, frozen=True):
    """The pace that the engine foresees with, as `GET /admin/pace` tells it; `octavo calibrate --url` reads it."""

    model: str
    tp: int
    pp: int
    dp: int
    max_step_tokens: int
    paces: list[ReplicasPace]
