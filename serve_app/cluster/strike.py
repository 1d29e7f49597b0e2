"""Killing and freezing processes of a cell on whichever node they are, as `octavo drill` does.

On each node an actor waits that sends signals for us: it was started before, so that a strike takes milliseconds, and
it notes the moment. A pid is only struck while it is a process of Ray's: its own may have died, and a stranger have it.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_app.errors import OctavoError

WARM_S = 60.0  # that the actors may take to start
STRIKE_S = 10.0  # that one may take to strike
FELL_AFTER_S = 0.05
_HEAD = "node:__internal_head__"  # a resource of the node that the head is on
_MAX_DEPTH = 8  # of processes between a raylet and its workers' children


class StrikeError(OctavoError):
    """What was to be struck could not be."""


class Striker:
    """On one node. Times are `time.time()` just before the first signal."""

    def strike(self, pids: Sequence[int], sig: int) -> float:
        """Send `sig` to those that are alive. StrikeError if none is."""
        alive = [pid for pid in pids if is_of_ray(pid)]
        if not alive:
            raise StrikeError(f"there is no process {' or '.join(map(str, pids))} of Ray's on that node any more")
        return _send(alive, sig)

    def fell(self, pids: Sequence[int]) -> float:
        """Kill these, this node's raylet and all that it started: what the death of a machine is.

        It happens in a moment, and this process, which would be left over, ends when it finds its raylet gone: the
        answer must not be lost with it.
        """
        raylet = raylet_of(os.getpid())
        if raylet is None:
            raise StrikeError("the raylet of that node was not found")
        family = [pid for pid in descendants(raylet) if pid != os.getpid()]
        doomed = [*filter(is_of_ray, pids), raylet, *family]
        threading.Timer(FELL_AFTER_S, _send, (doomed, signal.SIGKILL)).start()
        return time.time() + FELL_AFTER_S


class Strikers:
    """One connection to the Ray cluster of this machine. Use as a context. StrikeError if there is none."""

    def __init__(self) -> None:
        self._strikers: dict[str, Any] = {}

    def __enter__(self) -> "Strikers":
        try:
            ray.init(address="auto", namespace="octavo-drill", logging_level=logging.ERROR, log_to_driver=False)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise StrikeError(
                f"no Ray cluster is reached from this machine, so nothing can be killed: {said}"
            ) from None
        return self

    def __exit__(self, *exc: object) -> None:
        ray.shutdown()

    def mortal_nodes(self) -> set[str]:
        """Those that a cluster can lose: not the head's, and not the one that this process speaks through."""
        own = ray.get_runtime_context().get_node_id()
        return {node for node, resources in _nodes().items() if _HEAD not in resources and node != own}

    def warm(self) -> None:
        """Have an actor on every node, ready. StrikeError if one does not start."""
        alive = _nodes()
        self._strikers = {node: striker for node, striker in self._strikers.items() if node in alive}
        fresh = {node: _start(node) for node in alive if node not in self._strikers}
        self._strikers |= fresh
        _get([striker.__ray_ready__.remote() for striker in fresh.values()], WARM_S)

    def strike(self, node: str, pids: Sequence[int], sig: int) -> float:
        """See Striker. StrikeError also if the node does not answer."""
        return _seconds(self._on(node).strike.remote(list(pids), int(sig)))

    def fell(self, node: str, pids: Sequence[int]) -> float:
        return _seconds(self._on(node).fell.remote(list(pids)))

    def _on(self, node: str) -> Any:
        if node not in self._strikers:
            raise StrikeError(f"node {node[:8]} is not in the Ray cluster of this machine")
        return self._strikers[node]


def _nodes() -> dict[str, dict[str, float]]:
    """Resources by Ray's id of those that are alive."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]


def _start(node: str) -> Any:
    actor: Any = ray.remote(Striker)
    where = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    return actor.options(num_cpus=0, scheduling_strategy=where).remote()


def _get(refs: Any, limit_s: float) -> Any:
    try:
        return ray.get(refs, timeout=limit_s)
    except ray.exceptions.RayTaskError as error:
        raise StrikeError(str(error.cause or error).strip().splitlines()[-1]) from None
    except ray.exceptions.GetTimeoutError:
        raise StrikeError(f"Ray has not reached a node within {limit_s:g} s") from None
    except ray.exceptions.RayError as error:
        raise StrikeError(f"a node could not be reached: {' '.join(str(error).split())}") from None


def _seconds(ref: Any) -> float:
    at_unix_s: float = _get(ref, STRIKE_S)
    return at_unix_s


# -- processes of this machine --------------------------------------------------------------------------------------


def is_of_ray(pid: int) -> bool:
    """Whether it is alive, and calls itself an actor or a worker of Ray's."""
    words = _command(pid)
    return words.startswith("ray::") or "default_worker.py" in words


def raylet_of(pid: int) -> int | None:
    """The raylet above a process."""
    for _ in range(_MAX_DEPTH):
        pid = _parent(pid)
        if pid <= 1:
            return None
        if Path(_command(pid).split("\0")[0]).name == "raylet":
            return pid
    return None


def descendants(pid: int) -> list[int]:
    """Children, their children, and so on."""
    parents = {child: _parent(child) for child in _pids()}
    family, youngest = [], [pid]
    for _ in range(_MAX_DEPTH):
        youngest = [child for child, parent in parents.items() if parent in youngest]
        family += youngest
    return family


def _send(pids: Sequence[int], sig: int) -> float:
    at_unix_s = time.time()
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, sig)
    return at_unix_s


def _pids() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal())


def _parent(pid: int) -> int:
    """0 where there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _command(pid: int) -> str:
    """Words, with a zero byte behind each; "" of what is dead."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""
