"""`octavo drill`: load, strikes at random moments of it, and the proof that nobody lost anything."""

import asyncio
import itertools
import random
import signal
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from statistics import mean
from typing import Protocol

import msgspec

from serve_app.drill.ask import DrillError, Server
from serve_app.drill.load import Load, draw_asks
from serve_app.drill.report import Kill, Report, digests, phases_of, report
from serve_app.drill.targets import Target, census, strike_order, targets
from serve_app.errors import OctavoError
from serve_app.runtime.snapshot import ProcessView

RESTORE_S = 120.0  # that a cell may take to be whole again
LOOK_S = 0.25  # between two looks whether it is: they take their share of the machine, too
ANSWER_S = 30.0  # that a server which says that it is whole may take to list its processes

Say = Callable[[str], None]  # what is going on now


class Settings(msgspec.Struct, frozen=True):
    """What a user may choose."""

    url: str
    roles: list[str]
    freeze: bool  # instead of killing
    thaw_after_s: float | None  # None: at the end of the drill
    count: int  # strikes in each role
    every_s: float  # at least, from strike to strike
    seed: int
    num_streams: int
    num_tokens: int
    restore_s: float = RESTORE_S


class Hand(Protocol):
    """What strikes: `cluster.strike.Strikers`. Each method may raise an OctavoError."""

    def warm(self) -> None: ...

    def mortal_nodes(self) -> Collection[str]: ...

    def strike(self, node: str, pids: Sequence[int], sig: int) -> float: ...

    def fell(self, node: str, pids: Sequence[int]) -> float: ...


async def inspect(settings: Settings) -> list[ProcessView]:
    """The processes of a cell that can be drilled. DrillError if it cannot be."""
    async with Server(settings.url) as server:
        health = await server.health()
        processes = await server.processes()
    if health.status != "ready":
        raise DrillError(f"{settings.url} is {health.status} ({health.reason}): drill a cell that is whole")
    for role in settings.roles:
        if role != "node" and not targets(role, processes, ()):
            raise DrillError(f"there is no {role} among the processes of {settings.url}")
    return processes


class Drill:
    """One drill. What is known of it, at any time, is in `report`."""

    def __init__(self, settings: Settings, hand: Hand, say: Say) -> None:
        self._settings = settings
        self._hand = hand
        self._say = say
        self._draw = random.Random(f"targets {settings.seed}")
        self._asks = draw_asks(2 * settings.num_streams, settings.num_tokens, settings.seed)
        self._load = Load(settings.url, settings.num_streams, f"drill-{settings.seed}")
        self._reference: dict[int, str] = {}
        self._kills: list[Kill] = []
        self._problems: list[str] = []
        self._frozen: list[Target] = []

    async def run(self) -> None:
        """The undisturbed run, then the strikes. DrillError if there is nothing to compare with."""
        pace_s = await self._run_undisturbed()
        async with Server(self._settings.url) as server, asyncio.TaskGroup() as group:
            group.create_task(self._load.run(itertools.cycle(self._asks)))
            try:
                await self._strike_all(server, pace_s)
            except OctavoError as error:
                self._problems.append(str(error))
            self._say("the last streams")
            self._load.stop()
            await asyncio.to_thread(self.thaw)  # a frozen ingress would keep them waiting

    def thaw(self) -> None:
        """Whatever was frozen and is still alive goes on."""
        for target in self._frozen:
            with suppress(OctavoError):
                self._hand.strike(target.node, target.pids, signal.SIGCONT)
        self._frozen.clear()

    def report(self) -> Report:
        """Of all streams that ended, and all strikes so far."""
        now_s = time.time()
        kills = [
            kill if kill.until_unix_s else msgspec.structs.replace(kill, until_unix_s=now_s) for kill in self._kills
        ]
        return report(self._reference, self._load.records, kills, self._problems)

    async def _run_undisturbed(self) -> float:
        """The seconds that a stream takes."""
        self._say(f"the undisturbed run, {len(self._asks)} streams")
        name = f"drill-{self._settings.seed}"
        records = await Load(self._settings.url, self._settings.num_streams, name).run(self._asks)
        bad = next((record for record in records if record.error or record.changed), None)
        if bad is not None:
            raise DrillError(f"a stream failed before anything was struck: {bad.error or bad.changed}")
        self._reference = digests(records)
        return mean(record.ended_unix_s - record.sent_unix_s for record in records)

    # -- strikes --------------------------------------------------------------------------------------------------

    async def _strike_all(self, server: Server, pace_s: float) -> None:
        order = strike_order(self._settings.roles, self._settings.count, self._settings.seed)
        for number, role in enumerate(order, 1):
            self._say(f"{number} of {len(order)}: a moment to strike a {role}")
            await asyncio.sleep(self._draw.uniform(0.0, pace_s))
            before = await _processes(server)
            target = await self._choose(role, before)
            self._say(f"{number} of {len(order)}: {role} {target.name} was struck, the cell heals")
            struck_s = time.monotonic()
            if not await self._strike(server, target, before):
                if number < len(order):
                    self._problems.append(f"{len(order) - number} of {len(order)} strikes were left out")
                return
            if number < len(order):
                await asyncio.to_thread(self._hand.warm)
                await asyncio.sleep(self._settings.every_s - (time.monotonic() - struck_s))

    async def _choose(self, role: str, processes: Sequence[ProcessView]) -> Target:
        mortal_nodes = await asyncio.to_thread(self._hand.mortal_nodes) if role == "node" else ()
        able = targets(role, processes, mortal_nodes)
        if not able:
            raise DrillError(
                "no node that hosts workers can be spared: one is Ray's head, or this machine's"
                if role == "node"
                else f"there is no {role} to strike"
            )
        return self._draw.choice(able)

    async def _strike(self, server: Server, target: Target, before: Sequence[ProcessView]) -> bool:
        """Strike, and wait until the cell is whole: whether it became so in time."""
        at_unix_s = await asyncio.to_thread(self._send, target)
        kill = Kill(target.role, target.name, target.pid, target.node, self._settings.freeze, at_unix_s)
        self._kills.append(kill)
        restored = await self._await_whole(server, target, before)
        until_unix_s = time.time()
        phases: dict[str, float] = {}
        with suppress(DrillError):  # an engine that does not answer: then the cell is not whole either
            phases = phases_of(at_unix_s, await server.events(at_unix_s))
        if restored:
            phases.setdefault("restored", until_unix_s - at_unix_s)
        self._kills[-1] = msgspec.structs.replace(kill, until_unix_s=until_unix_s, restored=restored, phases=phases)
        return restored

    def _send(self, target: Target) -> float:
        if target.role == "node":
            return self._hand.fell(target.node, target.pids)
        if not self._settings.freeze:
            return self._hand.strike(target.node, target.pids, signal.SIGKILL)
        self._frozen.append(target)
        return self._hand.strike(target.node, target.pids, signal.SIGSTOP)

    async def _await_whole(self, server: Server, target: Target, before: Sequence[ProcessView]) -> bool:
        """Whether what was there before is there again in time, and what was struck is not, unless it was thawed."""
        now_s = time.monotonic()
        thaw_s = now_s + self._settings.thaw_after_s if self._frozen and self._settings.thaw_after_s else None
        deadline_s = (thaw_s or now_s) + self._settings.restore_s
        is_away = target.pids
        while time.monotonic() < deadline_s:
            await asyncio.sleep(LOOK_S)
            if thaw_s is not None and time.monotonic() >= thaw_s:
                await asyncio.to_thread(self.thaw)
                thaw_s, is_away = None, []
            if thaw_s is None and await _is_whole(server, before, target.node, is_away):
                return True
        return False


async def _processes(server: Server) -> list[ProcessView]:
    """Asked again for a while: a proxy may still send us to an ingress that is gone."""
    deadline_s = time.monotonic() + ANSWER_S
    while True:
        try:
            return await server.processes()
        except DrillError:
            if time.monotonic() > deadline_s:
                raise
        await asyncio.sleep(LOOK_S)


async def _is_whole(server: Server, before: Sequence[ProcessView], node: str, is_away: Collection[int]) -> bool:
    """The list is the engine's own; `/health` is what an ingress last heard of it, and may be a second old."""
    try:
        now = await server.processes()
        lingers = any(process.node == node and process.pid in is_away for process in now)
        return not lingers and not census(before) - census(now) and (await server.health()).status == "ready"
    except DrillError:
        return False
