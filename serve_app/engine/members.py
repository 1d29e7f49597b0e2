"""What the engine and its workers say to each other about who is in the cell. Data only.

A worker that is loaded says `Hello`; `Join` calls it into an epoch, `Joined` is its answer, `Leave` takes it out of an
epoch that cannot go on. `Beat` is its sign of life. What the cell's keeper knows comes as `Enroll` and `Lost`.
"""

import msgspec

from serve_app.experts.layout import Seat

LayerTable = list[list[int]]  # [expert] -> ranks in the stage's expert group, the primary first
StageTable = list[LayerTable]  # [layer of the stage]


class Member(msgspec.Struct, frozen=True, array_like=True):
    """A worker and its seat. `address` is where its inbox is bound."""

    name: str
    address: str
    stage: int
    replica: int
    shard: int
    store: str = ""  # of shard 0, where shards exchange by collectives: see `collective_shards`


# -- from a worker --------------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """A worker's first word to an engine, and its answer when asked again: loaded, and listening at `address`."""

    name: str
    address: str
    seat: Seat | None  # None: a spare
    num_pages: int  # KV pages that fit in its share of memory; 0: a spare
    load_s: float
    resident_bytes: int
    epoch: int = 0  # the newest that it has joined: a new engine begins behind it
    pid: int = 0
    node: str = ""  # Ray's id of the node it is on
    store: str = ""  # see Member


class Joined(msgspec.Struct, frozen=True, array_like=True, tag="joined"):
    """The worker has left its old epoch, and has every expert that the table gives it."""

    epoch: int
    name: str
    load_s: float = 0.0  # that missing experts took


class Beat(msgspec.Struct, frozen=True, array_like=True, tag="beat"):
    """A sign of life, from a thread of its own: a long step is not a death.

    `stuck_s`: since the worker's loop last turned.
    """

    name: str
    stuck_s: float
    num_stale: int = 0  # messages of other epochs that it has dropped so far


# -- from the cell's keeper -----------------------------------------------------------------------------------------


class Enroll(msgspec.Struct, frozen=True, array_like=True, tag="enroll"):
    """The placement at full strength (a table for each stage), and where the router listens.

    The first one begins the cell: `found` are the seats of workers that outlived an earlier engine and will say Hello.
    Later ones change the placement that the next epoch is formed from.
    """

    tables: list[StageTable]
    router: str
    found: list[Seat] = []
    loading: list[Seat] = []  # of workers that an earlier engine started, and that have not said Hello yet
    num_spares_found: int = 0
    generation: int = 0  # how many engines there were before this one, or more


class Lost(msgspec.Struct, frozen=True, array_like=True, tag="lost"):
    """A worker died, or could not be started. The keeper knows it from Ray."""

    name: str
    why: str
    seat: Seat | None = None  # that it was meant for: it may have died before it said Hello


class Parted(msgspec.Struct, frozen=True, array_like=True, tag="parted"):
    """The connection to a worker was closed: the first that is heard of a process that died."""

    name: str


class Deposed(msgspec.Struct, frozen=True, array_like=True, tag="deposed"):
    """From a worker to the engine that it had before: there is another one now."""


class Tick(msgspec.Struct, frozen=True, array_like=True, tag="tick"):
    """Time has passed: what is due by time is looked at."""


# -- to a worker ----------------------------------------------------------------------------------------------------


class Join(msgspec.Struct, frozen=True, array_like=True, tag="join"):
    """A new epoch begins. `table[i][e]`: the ranks, in the stage's expert group, that host expert e of its i-th layer.

    The first of them is the primary, the others are live standbys. Where seats are empty, their replicas rest: their
    other workers are members that only host experts.
    """

    epoch: int
    members: list[Member]
    table: StageTable
    router: str  # address of the router's inbox


class Leave(msgspec.Struct, frozen=True, array_like=True, tag="leave"):
    """A member was lost: whoever is in this epoch or an older one drops its steps and waits for the next Join."""

    epoch: int


class Take(msgspec.Struct, frozen=True, array_like=True, tag="take"):
    """To a spare: load this seat's layers and these (layer, expert), and say Hello again."""

    seat: Seat
    pairs: list[tuple[int, int]]


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """End. Also for those who come back after they were given up."""


# -- commands of the membership ---------------------------------------------------------------------------------------


class Tell(msgspec.Struct, frozen=True, array_like=True, tag="tell"):
    """Send a worker a message."""

    name: str
    address: str
    message: Join | Leave | Take | Stop


class Spawn(msgspec.Struct, frozen=True, array_like=True, tag="spawn"):
    """Start a worker for a seat, holding these (layer, expert) from the beginning; or a spare."""

    seat: Seat | None
    pairs: list[tuple[int, int]]
    in_haste: bool = False  # streams wait for it


class Kill(msgspec.Struct, frozen=True, array_like=True, tag="kill"):
    """Make sure that a worker is dead: it was given up."""

    name: str
    why: str


class Formed(msgspec.Struct, frozen=True, array_like=True, tag="formed"):
    """An epoch has begun: for the router's records."""

    epoch: int
    seats: list[tuple[str, int, int, int]]  # name, stage, replica, shard
    tables: list[StageTable]


class Note(msgspec.Struct, frozen=True, array_like=True, tag="note"):
    """Something happened that people want to read of. `seconds`: of phases, by name."""

    kind: str
    epoch: int
    text: str
    seconds: dict[str, float] = {}


class CellStats(msgspec.Struct, frozen=True):
    """The membership at a moment. What ends in `_total` only ever grows."""

    phase: str  # "starting", "waiting", "forming", "degraded", "whole"
    reason: str  # what is awaited, or what is missing; "" where it is whole
    workers: dict[str, int]  # by state: "starting", "loaded", "serving", "hosting", "spare"
    experts_uncovered: int  # (layer, expert) that no living worker hosts in the present epoch
    stale_total: int  # messages of old epochs, dropped by workers
    lost_total: int  # workers
    phase_seconds: dict[str, tuple[int, float]]  # failover phase -> (how many, seconds together)
