"""What processes of a cell say to each other: msgpack headers by msgspec, raw tensor frames behind them. No pickle.

Every message that acts on a membership carries its epoch; a receiver drops those of another epoch (see `worker`).
"""

import msgspec

from serve_app.engine.core import EngineStats
from serve_app.engine.members import (
    Beat,
    CellStats,
    Deposed,
    Enroll,
    Formed,
    Hello,
    Join,
    Joined,
    Leave,
    Lost,
    Parted,
    Stop,
    Take,
)
from serve_app.engine.plan import Abort, Cancel, Plan, StepDone, Submit
from serve_app.engine.request import Emission, Refusal
from serve_app.model.timing import Span

MAX_PART_BYTES = 2**30  # of one frame: hidden states of 20,480 tokens x 8,192 in fp32 are two thirds of it


# -- membership ---------------------------------------------------------------------------------------------------


class Adopt(msgspec.Struct, frozen=True, array_like=True, tag="adopt"):
    """To a worker, from its own process: there is a new engine at this address. It says Hello to it."""

    address: str


class Ping(msgspec.Struct, frozen=True, array_like=True, tag="ping"):
    """The engine's sign of life to a worker, or to the router. One that hears none for long ends itself."""

    router: str = ""  # where the router listens now


class Fetch(msgspec.Struct, frozen=True, array_like=True, tag="fetch"):
    """To a worker: send the checkpoint's tensor of this canonical name to the inbox at `address`."""

    name: str
    address: str


class Weight(msgspec.Struct, frozen=True, array_like=True, tag="weight"):
    """The answer to a Fetch. One tensor frame; without one the sender does not have it."""

    name: str
    dtype: str = ""
    shape: tuple[int, ...] = ()


class Phase(msgspec.Struct, frozen=True, array_like=True, tag="phase"):
    """What a cell that is not ready is waiting for, in words."""

    reason: str


class Record(msgspec.Struct, frozen=True, array_like=True, tag="record"):
    """To a worker: begin to record spans (`on`), or send to the router those of the recording."""

    on: bool


class Spans(msgspec.Struct, frozen=True, array_like=True, tag="spans"):
    """What a worker did, span by span, while it recorded."""

    name: str
    spans: list[Span]


# -- a step -------------------------------------------------------------------------------------------------------


class Hidden(msgspec.Struct, frozen=True, array_like=True, tag="hidden"):
    """Hidden states of a step's tokens at home on one shard, to the same shard of the next stage.

    One tensor frame [tokens, hidden_size].
    """

    epoch: int
    step: int
    dtype: str
    shape: tuple[int, ...]


class ShardPart(msgspec.Struct, frozen=True, array_like=True, tag="shard_part"):
    """What one shard gives another in an exchange (`model.shards`). One tensor frame."""

    epoch: int
    round: int  # exchanges of the epoch, counted alike by all shards of a replica and stage
    shard: int  # the sender's
    dtype: str
    shape: tuple[int, ...]


class ExpertCall(msgspec.Struct, frozen=True, array_like=True, tag="expert_call"):
    """Rows for experts that the receiver hosts. One tensor frame; the first counts[0] rows are for experts[0], ..."""

    epoch: int
    call: int
    sender: str
    layer: int
    experts: list[int]
    counts: list[int]
    dtype: str
    shape: tuple[int, ...]


class ExpertReply(msgspec.Struct, frozen=True, array_like=True, tag="expert_reply"):
    """The rows of an ExpertCall, run through their experts, in the same order. One tensor frame."""

    epoch: int
    call: int
    dtype: str
    shape: tuple[int, ...]


class Report(msgspec.Struct, frozen=True, array_like=True, tag="report"):
    """What a worker tells the router once a second: its memory, and what it ran since its last report."""

    epoch: int
    name: str
    resident_bytes: int
    counts: list[tuple[int, int, int]]  # layer, expert, tokens run through it; only those with any


# -- ingress and engine -------------------------------------------------------------------------------------------


class Attach(msgspec.Struct, frozen=True, array_like=True, tag="attach"):
    """An ingress replica's first word, repeated as its heartbeat: emissions of its requests go to `address`."""

    name: str
    address: str
    pid: int = 0
    node: str = ""  # Ray's id of the node it is on


class From(msgspec.Struct, frozen=True, array_like=True, tag="from"):
    """A request or a cancellation, and the ingress replica it came from."""

    name: str
    event: Submit | Cancel | Abort


class Moved(msgspec.Struct, frozen=True, array_like=True, tag="moved"):
    """To an ingress replica: another one has this request now."""

    rid: str


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """To an ingress replica: this request is not let in."""

    refusal: Refusal


class Aborted(msgspec.Struct, frozen=True, array_like=True, tag="aborted"):
    """To an ingress replica: somebody ended this request by its name."""

    rid: str


class Tokens(msgspec.Struct, frozen=True, array_like=True, tag="tokens"):
    """All that one step emitted to the requests of one ingress replica."""

    emissions: list[Emission]


class Status(msgspec.Struct, frozen=True, array_like=True, tag="status"):
    """The engine's state, sent to every ingress replica once a second and when readiness changes."""

    ready: bool  # new traffic is welcome
    reason: str  # what is awaited, or, where the cell is degraded, what is missing
    epoch: int
    stats: EngineStats
    cell: CellStats | None = None


class Tally(msgspec.Struct, frozen=True, array_like=True, tag="tally"):
    """Rows of the metrics' ledger (`telemetry.ledger`), between an ingress replica and its engine, either way."""

    name: str  # the sender's
    rows: dict[str, dict[str, float]]
    pull: int = 0  # to the engine: answer at once, by this number; from it: what this answers; 0: nothing
    greets: bool = False  # the sender is new here, or lost us for a while: all that is known is to be told to it
    more: bool = False  # the rest follows, or cannot be said yet


Message = (
    Hello
    | Join
    | Leave
    | Joined
    | Beat
    | Lost
    | Parted
    | Deposed
    | Enroll
    | Formed
    | Take
    | Adopt
    | Ping
    | Fetch
    | Weight
    | Phase
    | Record
    | Spans
    | Stop
    | Plan
    | StepDone
    | Hidden
    | ShardPart
    | ExpertCall
    | ExpertReply
    | Report
    | Attach
    | From
    | Moved
    | Refused
    | Aborted
    | Tokens
    | Status
    | Tally
)

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Message).decode
