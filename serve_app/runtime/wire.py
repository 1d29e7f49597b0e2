"""What processes of a cell say to each other: msgpack headers by msgspec, raw tensor frames behind them. No pickle.

Every message that acts on a membership carries its epoch; a receiver drops those of another epoch (see `worker`).
"""

import msgspec

from serve_app.engine.core import EngineStats
from serve_app.engine.plan import Cancel, Plan, StepDone, Submit
from serve_app.engine.request import Emission
from serve_app.model.timing import Span

MAX_PART_BYTES = 2**30  # of one frame: hidden states of 20,480 tokens x 8,192 in fp32 are two thirds of it


StageTable = list[list[list[int]]]  # [layer of the stage][expert] -> ranks in the expert group, the primary first


class Member(msgspec.Struct, frozen=True, array_like=True):
    """A worker and its seat. `address` is where its inbox is bound."""

    name: str
    address: str
    stage: int
    replica: int
    shard: int
    store: str = ""  # of shard 0, where shards exchange by collectives: see `collective_shards`


# -- membership ---------------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """A worker's first word to its engine: loaded, and listening at `address`."""

    name: str
    address: str
    num_pages: int  # KV pages that fit in its share of memory
    load_s: float
    resident_bytes: int
    store: str = ""  # see Member


class Join(msgspec.Struct, frozen=True, array_like=True, tag="join"):
    """A new epoch begins. `table[i][e]`: the ranks, in the stage's expert group, that host expert e of its i-th layer.

    The first of them is the primary, the others are live standbys.
    """

    epoch: int
    members: list[Member]
    table: StageTable
    router: str  # address of the router's inbox


class Leave(msgspec.Struct, frozen=True, array_like=True, tag="leave"):
    """A member was lost: whoever is in this epoch or an older one drops its steps and waits for the next Join."""

    epoch: int


class Joined(msgspec.Struct, frozen=True, array_like=True, tag="joined"):
    epoch: int
    name: str


class Lost(msgspec.Struct, frozen=True, array_like=True, tag="lost"):
    """The watcher's word that a worker died, or that it could not be started."""

    name: str
    why: str


class Form(msgspec.Struct, frozen=True, array_like=True, tag="form"):
    """The cell's word to its engine loop: these seats and tables (one per stage) make the next epoch."""

    epoch: int
    seats: list[tuple[str, int, int, int]]  # name, stage, replica, shard
    router: str  # address
    tables: list[StageTable]


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


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    pass


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


class From(msgspec.Struct, frozen=True, array_like=True, tag="from"):
    """A request or a cancellation, and the ingress replica it came from."""

    name: str
    event: Submit | Cancel


class Tokens(msgspec.Struct, frozen=True, array_like=True, tag="tokens"):
    """All that one step emitted to the requests of one ingress replica."""

    emissions: list[Emission]


class Status(msgspec.Struct, frozen=True, array_like=True, tag="status"):
    """The engine's state, sent to every ingress replica once a second and when readiness changes."""

    ready: bool
    reason: str
    epoch: int
    stats: EngineStats


Message = (
    Hello
    | Join
    | Leave
    | Joined
    | Lost
    | Form
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
    | Tokens
    | Status
)

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Message).decode
