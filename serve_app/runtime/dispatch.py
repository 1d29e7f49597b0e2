"""Expert dispatch over the mesh: rows go from their home worker straight to the workers that the table names.

There is no collective: a worker that waits for its own rows serves the calls of its peers meanwhile, so replicas of
different pace, or an idle one, never hold each other up.

An expert with live standbys is run by all of its hosts: its rows are cut into as many consecutive parts, of
MIN_SPLIT_ROWS at least, and dealt to the hosts beginning with the caller itself where it is one, else with the one
that the caller's rank falls on.

An expert's weights are read once for all rows that are run together, and with few rows that reading is the time. So a
worker whose peers are in the same layer waits for their calls before it runs its own rows, no longer than those took
it last time, and runs all of them as one. Which ones came in time changes no bit of a row in bf16; in fp32, where it
would, everybody's rows are run by themselves.

Shapes: T tokens, D hidden size, K experts per token, N = T * K rows.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from serve_app.experts.layout import cut
from serve_app.model.moe import ExpertHost, group_by_expert
from serve_app.runtime.frames import read_tensor, tensor_frame, tensor_header
from serve_app.runtime.mesh import Mesh
from serve_app.runtime.wire import ExpertCall, ExpertReply

Pump = Callable[[float], bool]  # handles one incoming message; False if none came within so many seconds

MIN_SPLIT_ROWS = 16  # up to that many an expert's weights take the time, and reading them twice gains nothing
WAIT_LIMIT_S = 300.0  # for a peer's rows; whatever happened to it, the engine ends the epoch much sooner


class MeshExperts:
    """`Experts` of one epoch: runs rows on the workers that host their experts, itself among them."""

    def __init__(
        self,
        mesh: Mesh,
        host: ExpertHost,
        *,
        epoch: int,
        name: str,
        group: list[str],
        tables: dict[int, list[list[int]]],
        pump: Pump,
    ) -> None:
        """`group`: names by rank. `tables`: layer -> expert -> ranks."""
        self._mesh, self._host, self._pump = mesh, host, pump
        self._epoch, self._name, self._group, self._tables = epoch, name, group, tables
        self._own_rank = group.index(name)
        self._num_calls = 0
        self._awaited: dict[int, Tensor | None] = {}
        self._merges = host.dtype == torch.bfloat16 and host.device.type == "cpu"  # where it is known to hold
        self._merging: int | None = None  # the layer whose calls are being collected
        self._collected: list[_Rows] = []
        self._latest: dict[str, tuple[int, int]] = {}  # sender -> layer of its last call, layers in a row with one
        self._run_s = 0.0  # that own rows took last time
        self.loads: dict[tuple[int, int], int] = {}  # tokens run here, by (layer, expert), since last taken

    def __call__(self, layer: int, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
        """Rows of each token through its K experts, y_TKD, wherever they live."""
        num_tokens, top_k = ids_TK.shape
        order_N, experts, counts = group_by_expert(ids_TK)
        x_ND = x_TD[order_N // top_k]
        spans = self._spans(layer, experts, counts)
        calls = {rank: self._call(layer, rank, x_ND, span) for rank, span in spans.items() if rank != self._own_rank}
        y_ND = torch.empty_like(x_ND)
        if own := spans.get(self._own_rank):
            y_ND[own.rows] = self._run_own(layer, x_ND[own.rows], own.experts, own.counts)
        for rank, call in calls.items():
            y_ND[spans[rank].rows] = self._await(call, layer, rank)
        y_TKD = torch.empty_like(y_ND)
        y_TKD[order_N] = y_ND
        return y_TKD.view(num_tokens, top_k, -1)

    def serve(self, message: ExpertCall, frame: memoryview | None) -> None:
        """Take a peer's rows: run them and send them back, at once or with the own ones of their layer.

        ValueError or KeyError where call, frame and experts disagree.
        """
        x_ND = read_tensor(message, frame, self._host.device)
        if sum(message.counts) != len(x_ND):
            raise ValueError(f"{sum(message.counts)} rows announced, {len(x_ND)} sent")
        if not all(self._host.holds(message.layer, expert) for expert in message.experts):
            raise KeyError(f"an expert of layer {message.layer} that does not live here")
        before, num_in_row = self._latest.get(message.sender, (message.layer, 0))
        self._latest[message.sender] = (message.layer, num_in_row + 1 if message.layer == before + 1 else 1)
        rows = _Rows(x_ND, message.experts, message.counts, message)
        if message.layer == self._merging:
            self._collected.append(rows)
        else:
            self._reply(message, self._run(message.layer, x_ND, message.experts, message.counts))

    def accept(self, message: ExpertReply, frame: memoryview | None) -> None:
        """Take the rows of a call that this worker made. ValueError where header and frame disagree."""
        if message.call in self._awaited:
            self._awaited[message.call] = read_tensor(message, frame, self._host.device)

    def _run_own(self, layer: int, x_ND: Tensor, experts: list[int], counts: list[int]) -> Tensor:
        """Own rows, and with them those of the peers that are in this layer too."""
        peers = self._collect(layer) if self._merges and len(self._group) > 1 else []
        begun_s = time.perf_counter()
        own, *others = self._run_together(layer, [_Rows(x_ND, experts, counts, None), *peers])
        self._run_s = time.perf_counter() - begun_s
        for rows, y_ND in zip(peers, others, strict=True):
            assert rows.call is not None
            self._reply(rows.call, y_ND)
        return own

    def _collect(self, layer: int) -> list["_Rows"]:
        """The calls for `layer` that are here, or soon will be: their senders have called in the layers before."""
        self._merging, self._collected = layer, []
        deadline_s = time.perf_counter() + self._run_s
        try:
            while True:
                due = [sender for sender, latest in self._latest.items() if _is_due(latest, layer)]
                left_s = deadline_s - time.perf_counter() if due else 0.0
                if not self._pump(max(0.0, left_s)) and left_s <= 0:
                    for sender in due:  # waited for in vain: not again before it calls
                        del self._latest[sender]
                    return self._collected
        finally:
            self._merging = None

    def _run_together(self, layer: int, all_rows: list["_Rows"]) -> list[Tensor]:
        if len(all_rows) == 1:
            return [self._run(layer, all_rows[0].x_ND, all_rows[0].experts, all_rows[0].counts)]
        ids_N = torch.cat(
            [torch.tensor(rows.experts).repeat_interleave(torch.tensor(rows.counts)) for rows in all_rows]
        )
        order_N, experts, counts = group_by_expert(ids_N)
        x_ND = torch.cat([rows.x_ND for rows in all_rows])
        y_ND = torch.empty_like(x_ND)
        y_ND[order_N] = self._run(layer, x_ND[order_N], experts, counts)
        return list(torch.split(y_ND, [len(rows.x_ND) for rows in all_rows]))

    def _reply(self, call: ExpertCall, y_ND: Tensor) -> None:
        self._mesh.send(call.sender, ExpertReply(self._epoch, call.call, *tensor_header(y_ND)), tensor_frame(y_ND))

    def take_loads(self) -> list[tuple[int, int, int]]:
        loads, self.loads = self.loads, {}
        return [(layer, expert, count) for (layer, expert), count in loads.items()]

    def _run(self, layer: int, x_ND: Tensor, experts: list[int], counts: list[int]) -> Tensor:
        for expert, count in zip(experts, counts, strict=True):
            self.loads[layer, expert] = self.loads.get((layer, expert), 0) + count
        return self._host.forward(layer, x_ND, experts, counts)

    def _spans(self, layer: int, experts: list[int], counts: list[int]) -> "dict[int, _Span]":
        """Which rows of x_ND (sorted by expert) each rank takes."""
        table = self._tables[layer]
        spans: dict[int, _Span] = {}
        start = 0
        for expert, count in zip(experts, counts, strict=True):
            for rank, part in deal(table[expert], self._own_rank, count):
                span = spans.setdefault(rank, _Span())
                span.experts.append(expert)
                span.counts.append(len(part))
                span.pieces.append(range(start + part.start, start + part.stop))
            start += count
        return spans

    def _call(self, layer: int, rank: int, x_ND: Tensor, span: "_Span") -> int:
        self._num_calls += 1
        rows_ND = x_ND[span.rows]
        dtype, shape = tensor_header(rows_ND)
        call = ExpertCall(self._epoch, self._num_calls, self._name, layer, span.experts, span.counts, dtype, shape)
        self._awaited[self._num_calls] = None
        self._mesh.send(self._group[rank], call, tensor_frame(rows_ND))
        return self._num_calls

    def _await(self, call: int, layer: int, rank: int) -> Tensor:
        deadline = time.monotonic() + WAIT_LIMIT_S
        while (rows := self._awaited[call]) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{self._name} waited {WAIT_LIMIT_S:.0f} s for {self._group[rank]} to run experts of layer {layer}"
                    f" in epoch {self._epoch}"
                )
            self._pump(1.0)
        del self._awaited[call]
        return rows


def deal(hosts: list[int], caller: int, num_rows: int) -> list[tuple[int, range]]:
    """Which host runs which of an expert's rows, by the rule above. All ranks are those in the expert group."""
    num_parts = max(1, min(len(hosts), num_rows // MIN_SPLIT_ROWS))
    first = hosts.index(caller) if caller in hosts else caller % len(hosts)
    return [(hosts[(first + part) % len(hosts)], cut(num_rows, num_parts, part)) for part in range(num_parts)]


def _is_due(latest: tuple[int, int], layer: int) -> bool:
    """Whether who called so last will probably call for `layer`: one layer alone says little where tokens are few."""
    before, num_in_row = latest
    return before == layer - 1 and num_in_row > 1


class _Rows(NamedTuple):
    """Rows for experts that live here, sorted by expert as an ExpertCall has them."""

    x_ND: Tensor
    experts: list[int]
    counts: list[int]
    call: ExpertCall | None  # None: this worker's own


class _Span:
    """The experts that one rank runs, and where their rows lie in x_ND."""

    __slots__ = ("counts", "experts", "pieces")

    def __init__(self) -> None:
        self.experts: list[int] = []
        self.counts: list[int] = []
        self.pieces: list[range] = []

    @property
    def rows(self) -> Tensor | slice:
        """A slice where the pieces touch (a view, no copy), else an index."""
        first, last = self.pieces[0], self.pieces[-1]
        if last.stop - first.start == sum(self.counts):
            return slice(first.start, last.stop)
        return torch.cat([torch.arange(piece.start, piece.stop) for piece in self.pieces])
