"""Signals reach processes of Ray's, and no others. No cluster: what calls itself as Ray's processes do is a shell."""

import os
import signal
import subprocess
import time
from contextlib import contextmanager, suppress

import pytest
import ray

from serve_app.cluster import strike
from serve_app.cluster.strike import StrikeError, Striker, Strikers

LIMIT_S = 30.0
CHILDREN = 'bash -c "sleep 99 & wait" & echo; wait'  # two


@contextmanager
def process(name, script="read line"):
    """A shell that calls itself `name` and runs `script`; it ends when the test does."""
    command = ["bash", "-c", f"exec -a {name} bash -c '{script}' {name}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as started:
        try:
            wait(lambda: strike._command(started.pid).startswith(name))
            yield started
        finally:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)


def wait(wanted):
    deadline_s = time.monotonic() + LIMIT_S
    while not wanted():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_process_of_rays_is_killed():
    with process("ray::WorkerActor.run") as victim:
        before_s = time.time()
        at_unix_s = Striker().strike([victim.pid, 2**22 - 1], signal.SIGKILL)
        assert victim.wait(LIMIT_S) == -signal.SIGKILL
    assert before_s <= at_unix_s <= time.time()


def test_a_stranger_and_the_dead_are_left_alone():
    with process("stranger") as stranger, process("ray::Dead") as dead:
        dead.kill()
        wait(lambda: not strike._command(dead.pid))  # a zombie has no command
        with pytest.raises(StrikeError, match="no process"):
            Striker().strike([stranger.pid, dead.pid], signal.SIGKILL)
        assert stranger.poll() is None


def test_a_node_dies_with_all_that_its_raylet_started(monkeypatch):
    with process("/opt/ray/raylet", CHILDREN) as raylet, process("ray::Engine") as engine:
        raylet.stdout.readline()
        wait(lambda: len(strike.descendants(raylet.pid)) == 2)
        family = strike.descendants(raylet.pid)
        assert [strike.raylet_of(pid) for pid in family] == [raylet.pid] * 2
        monkeypatch.setattr(strike, "raylet_of", lambda pid: raylet.pid)
        at_unix_s = Striker().fell([engine.pid])
        assert at_unix_s > time.time() - strike.FELL_AFTER_S
        assert [raylet.wait(LIMIT_S), engine.wait(LIMIT_S)] == [-signal.SIGKILL] * 2
        wait(lambda: not any(map(strike._command, family)))


def test_who_has_no_raylet_is_told():
    with pytest.raises(StrikeError, match="raylet of that node"):
        Striker().fell([])


def test_without_a_cluster_there_is_one_sentence(monkeypatch):
    def refuse(**_):
        raise ConnectionError("Could not find any running\nRay instance.")

    monkeypatch.setattr(ray, "init", refuse)
    with (
        pytest.raises(StrikeError, match=r"no Ray cluster is reached from this machine.* any running Ray instance"),
        Strikers(),
    ):
        pass


def test_a_node_of_another_cluster_is_named():
    with pytest.raises(StrikeError, match="node abcdefgh is not in the Ray cluster"):
        Strikers().strike("abcdefghijkl", [1], signal.SIGKILL)
