"""Rounds of streams with a kill in them: what the failover tests and the sweep have in common."""

import asyncio
import os
import signal
import time
from itertools import pairwise

from serve_app.drill.load import Load, draw_asks
from serve_app.drill.report import digests

NUM_STREAMS = 16
NUM_TOKENS = 48
WHOLE_S = 120.0


class Rounds:
    """The same streams again and again on one server; what they say undisturbed is known."""

    def __init__(self, server, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS, seed=0):
        self.server = server
        self.asks = draw_asks(num_streams, num_tokens, seed)
        self.load = Load(server.url, num_streams, "round")
        begun_s = time.monotonic()
        records = asyncio.run(self.load.run(self.asks))
        self.round_s = time.monotonic() - begun_s
        assert not [record.error or record.changed for record in records if record.error or record.changed]
        self.reference = digests(records)

    def processes(self, role):
        listed = self.server.get("/admin/processes").json()["processes"]
        return sorted((p for p in listed if p["role"] == role), key=lambda p: p["name"])

    def run(self, pids, after_s, sig=signal.SIGKILL):
        """(streams that failed, indices of those that differ, longest gap of each around the kill) of one round."""

        async def disturbed():
            load = asyncio.create_task(self.load.run(self.asks))
            await asyncio.sleep(after_s)
            at_unix_s = time.time()
            for pid in pids:
                os.kill(pid, sig)
            return at_unix_s, await load

        at_unix_s, records = asyncio.run(disturbed())
        failed = [record.error for record in records if record.error]
        changed = [record.changed for record in records if record.changed]
        assert not changed, changed
        return failed, self.differing(records), self.gaps(records, at_unix_s)

    def differing(self, records):
        now = digests(records)
        return [i for i, known in self.reference.items() if now.get(i) != known]

    def gaps(self, records, since_unix_s=0.0):
        return [gap for record in records if (gap := longest_gap(record, since_unix_s)) is not None]

    def await_whole(self, num_workers, old_pids=()):
        """Until every seat is filled, and what was killed is gone from the list."""
        deadline_s = time.monotonic() + WHOLE_S
        health = None
        while time.monotonic() < deadline_s:
            health = self._health()
            if health and health["status"] == "ready" and health["cell"]["workers"]["serving"] == num_workers:
                listed = self.server.get("/admin/processes").json().get("processes", [])
                roles = {p["role"] for p in listed}
                num_serving = sum(p["state"] == "serving" for p in listed)  # what /health says may be a second old
                if (
                    num_serving == num_workers
                    and not {p["pid"] for p in listed} & set(old_pids)
                    and {"engine", "router", "ingress"} <= roles
                ):
                    return health
            time.sleep(0.2)
        raise AssertionError(f"not whole within {WHOLE_S} s: {health}")

    def events(self, since_unix_s):
        return self.server.get(f"/admin/events?after={since_unix_s}").json()["events"]

    def _health(self):
        answer = self.server.get("/health")
        return answer.json() if answer.status_code == 200 else None


def longest_gap(record, at_unix_s):
    """Seconds between two tokens of a stream, the longest that ends after the kill; None if none does."""
    gaps = [late - early for early, late in pairwise(record.token_unix_s) if late > at_unix_s]
    return max(gaps, default=None)
