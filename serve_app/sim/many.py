"""Many seeds, on all cores."""

import signal
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import msgspec

from serve_app.sim.simulation import SimulationError, simulate
from serve_app.sim.world import Tally

CHUNK = 10  # seeds that a process runs between two words to the one that counts


class Outcome(msgspec.Struct):
    """Of some seeds. `failures`: seed -> what did not hold."""

    tally: Tally
    failures: dict[int, str]


def run_chunk(seeds: range) -> Outcome:
    outcome = Outcome(Tally(), {})
    for seed in seeds:
        try:
            outcome.tally.add(simulate(seed))
        except SimulationError as error:
            outcome.tally.seeds += 1
            outcome.failures[seed] = error.text
    return outcome


def run_many(seeds: range, num_processes: int) -> Generator[Outcome, None, None]:
    """Outcomes of a few seeds each, as they come. Left early, it ends its processes within a chunk."""
    chunks = [seeds[i : i + CHUNK] for i in range(0, len(seeds), CHUNK)]
    if num_processes == 1 or len(chunks) == 1:
        yield from map(run_chunk, chunks)
        return
    pool = ProcessPoolExecutor(min(num_processes, len(chunks)), get_context("spawn"), _ignore_interrupts)
    try:
        for future in as_completed([pool.submit(run_chunk, chunk) for chunk in chunks]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches all processes of a terminal; the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
