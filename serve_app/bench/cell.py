"""A benchmark of a whole cell on this machine: worker processes, the mesh and the engine loop; no Ray, no HTTP.

What it measures beside `bench.local` is what cutting a model costs: dispatch, exchanges, bubbles.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Self

from serve_app.bench.measure import Advance, BenchError, Figures, Trace, Workload, figures
from serve_app.bench.settings import WARM_UP, bench_config, check_context, requests_of
from serve_app.bench.trace import write_trace
from serve_app.config import OctavoConfig
from serve_app.engine.members import Enroll, Spawn, Stop
from serve_app.engine.plan import Submit
from serve_app.errors import OctavoError
from serve_app.experts.layout import Seat
from serve_app.experts.placement import Pair
from serve_app.fetch.hub import resolve
from serve_app.fetch.progress import silent
from serve_app.model.checkpoint import Checkpoint
from serve_app.model.timing import Span
from serve_app.runtime.engine_loop import EngineLoop, Order, cell_core
from serve_app.runtime.load import load
from serve_app.runtime.mesh import Mesh
from serve_app.runtime.names import ENGINE
from serve_app.runtime.router import Registry
from serve_app.runtime.settings import check, layout_of, slots_of
from serve_app.runtime.wire import Attach, From, Message, Record, Report, Spans, Status, Tokens
from serve_app.runtime.worker import Worker

NAME = "bench"
READY_S = 600.0
ANSWER_S = 60.0  # for a worker's report: it sends one a second, but not in the middle of a step
SILENT_S = 60.0  # the engine says how it is once a second
BEAT_S = 2.0  # between two signs of life to the engine


class CellBench:
    """A running cell. Use as a context; `run` measures a workload. OctavoError where it cannot be."""

    def __init__(
        self, model: str, layout: dict[str, int], threads: int, workloads: Sequence[Workload], kv_gib: float = 1.0
    ) -> None:
        self._config = bench_config(model, layout, threads, workloads, kv_gib)
        self._spec = check(self._config)
        check_context(self._spec, workloads)
        self._stack = ExitStack()
        self._processes: dict[str, BaseProcess] = {}

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end()

    def _start(self) -> None:
        config, spec = self._config, self._spec
        layout, stages = layout_of(config, spec)
        registry = Registry(layout, stages, spec.num_experts, slots_of(config, spec))
        engine_mesh = self._stack.enter_context(Mesh())
        self._mesh = self._stack.enter_context(Mesh())
        self._router_mesh = self._stack.enter_context(Mesh())
        self._mesh.connect(ENGINE, engine_mesh.address)

        def order(order: Order) -> None:
            if isinstance(order, Spawn) and order.seat is not None and len(self._processes) < layout.num_workers:
                self._spawn(order.seat, stages[order.seat.stage], order.pairs, engine_mesh.address)

        cell = cell_core(config, spec)
        self.core = cell.core
        loop = EngineLoop(cell, engine_mesh, order)
        self._loop = Thread(target=loop.run, name="engine-loop", daemon=True)
        self._loop.start()
        self._mesh.send(ENGINE, Enroll(registry.tables(), self._router_mesh.address))
        self._await_ready()
        self.run(WARM_UP, lambda num_tokens: None)

    def _spawn(self, seat: Seat, layers: range, pairs: list[Pair], engine_address: str) -> None:
        name = f"w{seat.stage}.{seat.replica}.{seat.shard}"
        process = multiprocessing.get_context("spawn").Process(
            target=_work, args=(name, self._config, seat, layers, pairs, engine_address), name=name, daemon=True
        )
        process.start()
        self._processes[name] = process

    def _end(self) -> None:
        if self._processes:
            self._mesh.send(ENGINE, Stop())
            self._loop.join()
        for process in self._processes.values():
            process.join(5)
            process.kill()
        self._stack.close()

    def run(self, workload: Workload, advance: Advance) -> Figures:
        """One batch, from submission to its last token."""
        traces = {}
        requests = requests_of(workload, self._spec.vocab_size)
        for request in requests:
            traces[request.rid] = Trace(time.perf_counter())
            self._mesh.send(ENGINE, From(NAME, Submit(request)))
        num_left = len(requests)
        for message in self._messages():
            for emission in message.emissions if isinstance(message, Tokens) else ():
                traces[emission.rid].add(time.perf_counter(), len(emission.tokens))
                advance(len(emission.tokens))
                num_left -= emission.finish is not None
            if not num_left:
                break
        return figures(workload, list(traces.values()))

    def trace(self, workload: Workload, path: Path) -> None:
        """Run a workload while recording what every worker does, and write that as a Chrome trace."""
        self._mesh.send(ENGINE, Record(True))
        self.run(workload, lambda num_tokens: None)
        self._mesh.send(ENGINE, Record(False))
        spans: dict[str, list[Span]] = {}
        while len(spans) < len(self._processes):
            message = self._router_message()
            if isinstance(message, Spans):
                spans[message.name] = message.spans
        write_trace(path, spans)

    def resident_bytes(self) -> dict[str, int]:
        """Memory by worker, of reports that come after this call."""
        while self._router_mesh.receive(0) is not None:
            pass
        latest: dict[str, int] = {}
        while len(latest) < len(self._processes):
            message = self._router_message()
            if isinstance(message, Report):
                latest[message.name] = message.resident_bytes
        return latest

    def _router_message(self) -> Message:
        received = self._router_mesh.receive(ANSWER_S)
        self._check(time.monotonic())
        if received is None:
            raise BenchError(f"the workers have said nothing for {ANSWER_S:.0f} s")
        return received.message

    def _await_ready(self) -> None:
        reason = "the engine has not been heard"
        deadline_s = time.monotonic() + READY_S
        for message in self._messages():
            if isinstance(message, Status):
                reason = message.reason
                if message.ready:
                    return
            if time.monotonic() > deadline_s:
                raise BenchError(f"the workers were not ready within {READY_S:.0f} s: {reason}")

    def _messages(self) -> Iterator[Message]:
        """What the engine says to its clients, for ever. BenchError when it, or a worker, is gone."""
        heard_s = beaten_s = 0.0
        while True:
            now_s = time.monotonic()
            if now_s - beaten_s > BEAT_S:
                self._mesh.send(ENGINE, Attach(NAME, self._mesh.address))
                beaten_s, heard_s = now_s, heard_s or now_s
            received = self._mesh.receive(1.0)
            if received is not None:
                heard_s = time.monotonic()
                yield received.message
            self._check(heard_s)

    def _check(self, heard_s: float) -> None:
        for name, process in self._processes.items():
            if not process.is_alive():
                raise BenchError(f"worker {name} ended with status {process.exitcode}: see its words above")
        if time.monotonic() - heard_s > SILENT_S:
            raise BenchError(f"the engine has been silent for {SILENT_S:.0f} s")


def _work(name: str, config: OctavoConfig, seat: Seat, layers: range, pairs: list[Pair], engine_address: str) -> None:
    """A worker process, from its start to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that began this one, and ends it
    Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    try:
        weights = Checkpoint.open(resolve(config.model, silent, fetch=False))
        with Mesh() as mesh:
            mesh.connect(ENGINE, engine_address)
            Worker(name, lambda seat, pairs: load(weights, config, layers, seat.shard, pairs), mesh, seat, pairs).run()
    except OctavoError as error:
        sys.exit(f"worker {name}: {error}")


def _end_with_parent() -> None:
    """However the benchmark ends, its workers do not outlive it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
