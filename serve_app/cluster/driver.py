"""Ending `serve run` when what it was asked to run cannot run.

`serve run config.yaml` submits the config and then sleeps for ever, whether or not the application could be built
(Ray 2.60, `ray/serve/scripts.py`). Whoever finds out that it cannot, somewhere in the cluster, ends that command here,
so that it does not look alive: its exit status is then not 0.
"""

import logging
import os
import signal
import sys
import time
from pathlib import Path

import ray

from serve_app.cluster.node import own_address

log = logging.getLogger(__name__)

FORWARD_S = 1.0  # Ray carries what was printed here to the command's terminal within this time
END_S = 15.0


def end_serve_run(reason: str) -> None:
    """Say `reason` on stderr, and end the `serve run` on this machine that began this job, if there is one.

    A config deployed otherwise (`serve deploy`, KubeRay) has no such command; Serve's own status then holds the reason.
    """
    print(f"octavo cannot run: {reason}", file=sys.stderr, flush=True)
    pid = _driver_pid()
    if pid is not None and _is_serve_run(pid):
        time.sleep(FORWARD_S)
        os.kill(pid, signal.SIGTERM)
        time.sleep(END_S)  # the command takes its cluster along, this process too; what follows would only be noise


def _driver_pid() -> int | None:
    """The process that started this Ray job, if it is on this machine."""
    job_id = ray.get_runtime_context().get_job_id()
    for job in ray._private.state.jobs():  # type: ignore[no-untyped-call]
        if job["JobID"] == job_id and job["DriverIPAddress"] == own_address():
            return int(job["DriverPid"])
    return None


def _is_serve_run(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return "run" in words and any(Path(word).name in ("serve", "octavo") for word in words[:3])
