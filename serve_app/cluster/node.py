"""What every actor needs from the machine that it finds itself on: an address to bind, and a log that people see."""

import logging
import os
from dataclasses import dataclass
from typing import Literal

import ray

from serve_app.runtime.mesh import CellKey, Mesh


@dataclass(frozen=True)
class Network:
    """How the sockets of one cell bind: on loopback, or on each node's own address with the cell's key."""

    key: CellKey | None

    def mesh(self) -> Mesh:
        return Mesh("127.0.0.1" if self.key is None else own_address(), self.key)


def own_address() -> str:
    """The address by which other nodes know this one."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def choose_network(wanted: Literal["auto", "loopback", "cluster"]) -> Network:
    """Loopback needs no key; what leaves the host does."""
    num_nodes = sum(node["Alive"] for node in ray.nodes())  # type: ignore[no-untyped-call]
    if wanted == "loopback" or (wanted == "auto" and num_nodes == 1):
        return Network(None)
    return Network(CellKey.make())


def log_to_stderr() -> None:
    """Ray carries an actor's stderr to the driver's terminal and to its own log files."""
    logger = logging.getLogger("serve_app")
    if not logger.handlers:
        # Not sys.stderr: with RAY_SERVE_LOG_TO_STDERR=0 Serve turns that into its log file.
        handler = logging.StreamHandler(os.fdopen(os.dup(2), "w"))
        handler.setFormatter(logging.Formatter("octavo %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
