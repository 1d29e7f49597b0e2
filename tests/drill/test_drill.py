"""A drill against the real application, whose cell is a list that the striking hand changes."""

import asyncio
import io
import json
import os
import signal
import time

import pytest
from rich.console import Console

from serve_app.cluster.strike import StrikeError
from serve_app.drill import show
from serve_app.drill.ask import DrillError
from serve_app.drill.drill import Drill, Settings, inspect
from serve_app.runtime.snapshot import EventView, ProcessView

pytestmark = pytest.mark.anyio

ROLES = ("worker", "router", "engine", "ingress")


def settings(url, *roles, **changes):
    chosen = {
        "url": url,
        "roles": list(roles) or ["worker"],
        "freeze": False,
        "thaw_after_s": None,
        "count": 1,
        "every_s": 0.0,
        "seed": 5,
        "num_streams": 4,
        "num_tokens": 12,
        "restore_s": 10.0,
    }
    return Settings(**chosen | changes)


class Hand:
    """Strikes a cell in name only: a successor takes the place of the dead, unless `heals` says no."""

    def __init__(self, world):
        self.engine = world.engine
        self.engine.family = [
            ProcessView(role, f"{role}-{i}", 100 + 10 * i + j, f"n{i}", "serving" if role == "worker" else "live")
            for i in range(2)
            for j, role in enumerate(ROLES)
        ]
        self.heals = True
        self.struck = []  # (node, pids, signal)
        self.num_warm = 0
        self.at_strike = lambda: None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def warm(self):
        self.num_warm += 1

    def mortal_nodes(self):
        return {"n1"}

    def strike(self, node, pids, sig):
        self.struck.append((node, list(pids), sig))
        at_unix_s = time.time()
        if sig != signal.SIGCONT:
            self._replace(node, pids)
            self.at_strike()
        return at_unix_s

    def fell(self, node, pids):
        return self.strike(node, pids, signal.SIGKILL)

    def _replace(self, node, pids):
        dead = [process for process in self.engine.family if process.node == node and process.pid in pids]
        assert len(dead) == len(pids)
        alive = [process for process in self.engine.family if process not in dead]
        if self.heals:
            alive += [ProcessView(p.role, p.name + "'", p.pid + 1000, p.node, p.state) for p in dead]
        self.engine.family = alive
        for kind, seconds in (("lost", {}), ("restored", {"fence": 0.5, "restored": 2.0})):
            self.engine.history.append(EventView(time.time(), kind, 2, "", seconds))


async def drilled(hand, *arguments, **changes):
    drill = Drill(settings(*arguments, **changes), hand, lambda text: None)
    await asyncio.wait_for(drill.run(), 60)
    return drill.report()


async def test_each_role_is_struck_and_nothing_is_lost(world, url):
    hand = Hand(world)
    found = await drilled(hand, url, *ROLES, count=2)
    assert found.problems == []
    assert sorted(kill.role for kill in found.kills) == sorted(2 * ROLES)
    assert all(kill.restored for kill in found.kills)
    assert [(kill.node, [kill.pid], signal.SIGKILL) for kill in found.kills] == hand.struck
    assert found.num_streams > 8
    assert found.phases.keys() == {"notice", "fence", "restored"}
    assert 0.0 <= found.phases["notice"].median <= found.phases["notice"].max < 5.0
    world.engine.assert_idle()


async def test_a_node_is_struck_with_all_that_is_on_it(world, url):
    hand = Hand(world)
    found = await drilled(hand, url, "node")
    assert found.passed
    assert hand.struck == [("n1", [110, 111, 112, 113], signal.SIGKILL)]


async def test_the_frozen_are_thawed_in_time_or_at_the_end(world, url):
    hand = Hand(world)
    assert (await drilled(hand, url, freeze=True, thaw_after_s=0.3)).passed
    (node, pids, first), thawed = hand.struck
    assert (first, thawed) == (signal.SIGSTOP, (node, pids, signal.SIGCONT))
    assert (await drilled(hand, url, freeze=True)).passed
    assert [sig for _, _, sig in hand.struck[2:]] == [signal.SIGSTOP, signal.SIGCONT]


async def test_other_tokens_under_strikes_are_found(world, url):
    hand = Hand(world)
    hand.at_strike = world.engine._babble.reverse
    found = await drilled(hand, url)
    assert found.different > 0
    assert (found.failed, found.passed) == (0, False)


async def test_failed_streams_are_found(world, url):
    hand = Hand(world)
    hand.at_strike = lambda: setattr(world.engine, "failing_after", 3)
    found = await drilled(hand, url)
    assert found.failed > 0
    assert not found.passed


async def test_a_cell_that_does_not_heal_ends_the_drill(world, url):
    hand = Hand(world)
    hand.heals = False
    found = await drilled(hand, url, count=3, restore_s=0.3)
    assert len(hand.struck) == 1
    left_out, not_whole = found.problems
    assert left_out == "2 of 3 strikes were left out"
    assert not_whole.endswith(f"s after worker {found.kills[0].name} was struck the cell is not whole")


async def test_what_cannot_be_struck_ends_the_drill(world, url):
    hand = Hand(world)

    def refuse():
        raise StrikeError("there is no such process")

    hand.at_strike = refuse
    found = await drilled(hand, url)
    assert found.problems == ["there is no such process"]


async def test_strikes_keep_their_distance(world, url):
    found = await drilled(Hand(world), url, count=2, every_s=0.8)
    first, second = found.kills
    assert second.at_unix_s - first.at_unix_s >= 0.8


async def test_a_server_that_already_fails_is_not_drilled(world, url):
    hand = Hand(world)
    world.engine.failing_after = 1
    with pytest.raises(DrillError, match="before anything was struck: "):
        await drilled(hand, url)
    assert hand.struck == []


async def test_what_cannot_be_drilled_is_said(world, url):
    with pytest.raises(DrillError, match="there is no worker among the processes"):
        await inspect(settings(url))
    Hand(world)
    assert await inspect(settings(url)) == world.engine.family
    world.engine.broken = "gone"
    with pytest.raises(DrillError, match=r"/admin/processes answered 503: .*gone"):
        await inspect(settings(url))


# -- at the terminal ------------------------------------------------------------------------------------------------


@pytest.fixture
def hand(threaded, monkeypatch):
    world, url = threaded
    hand = Hand(world)
    hand.url = url
    monkeypatch.setattr(show, "Strikers", lambda: hand)
    return hand


def run_drill(hand, *roles, as_json=False, **changes):
    console = Console(stderr=True)
    return show.run_drill(settings(hand.url, *roles, **changes), yes=True, as_json=as_json, console=console)


def test_json_has_what_scripts_read(hand, capsys):
    assert run_drill(hand, "worker", "engine", as_json=True) == 0
    said = json.loads(capsys.readouterr().out)
    names = {"failed", "different", "max_gap_s", "p99_gap_s", "num_streams", "num_resumed", "phases", "kills"}
    assert names <= said.keys()
    assert said["phases"]["fence"] == {"max": 0.5, "median": 0.5}
    assert sorted(kill["role"] for kill in said["kills"]) == ["engine", "worker"]
    assert hand.num_warm >= 1


def test_people_get_a_table(hand, capsys):
    assert run_drill(hand) == 0
    printed = capsys.readouterr().out
    assert "fence" in printed
    assert "0 failed, 0 differ" in printed


def test_a_fault_is_an_error_behind_its_report(hand, capsys):
    hand.at_strike = lambda: setattr(hand.engine, "failing_after", 3)
    with pytest.raises(DrillError, match="streams failed, drill-5-"):
        run_drill(hand)
    assert " failed, 0 differ" in capsys.readouterr().out


def test_ctrl_c_prints_what_is_known(hand, capsys):
    processes, sent = hand.engine.processes, []

    async def interrupt():
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        return await processes()

    hand.heals = False
    hand.at_strike = lambda: setattr(hand.engine, "processes", interrupt)
    assert run_drill(hand, as_json=True) == 130
    (kill,) = json.loads(capsys.readouterr().out)["kills"]
    assert sent
    assert not kill["restored"]


def test_without_a_terminal_nobody_is_asked(hand, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(DrillError, match=r"This will kill, at .*: 1 x worker \(of 2\)\. Say --yes"):
        show.run_drill(settings(hand.url), yes=False, as_json=False, console=Console())
    assert hand.struck == []
