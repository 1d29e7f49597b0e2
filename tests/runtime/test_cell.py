"""A cell of many workers emits what one process emits. The workers are threads here; Ray comes in tests/cluster."""

import functools
import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config import OctavoConfig
from serve_app.engine.plan import StepDone
from serve_app.engine.request import Request, SamplingParams
from serve_app.experts.layout import Layout, Seat, stage_layers
from serve_app.model.checkpoint import Checkpoint
from serve_app.runtime import worker
from serve_app.runtime.dispatch import MIN_SPLIT_ROWS, deal
from serve_app.runtime.local import LocalEngine
from serve_app.runtime.mesh import Mesh
from serve_app.runtime.names import ENGINE
from serve_app.runtime.router import Registry
from serve_app.runtime.wire import ExpertCall, Hidden
from serve_app.runtime.worker import Worker
from tests.model.families import make_tiny
from tests.runtime.cell import WAIT_S, ThreadedCell, collect_local


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def weights(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_tiny(request.param, folder)
    return Checkpoint.open(folder)


def config_of(pp, dp, tp=1, dtype="bfloat16", standby_slots=0, resilience=None, **scheduler):
    """On a busy machine threads are slow, and nobody is to be held for dead for it: unless `resilience` says so."""
    return OctavoConfig.model_validate(
        {
            "model": "tiny",
            "dtype": dtype,
            "layout": {"pp": pp, "dp": dp, "tp": tp},
            "worker": {"kv_gib": 0.01, "standby_slots": standby_slots},
            "scheduler": {"page_tokens": 16, "max_step_tokens": 48} | scheduler,
            "resilience": {"hung_s": 60.0} | (resilience or {}),
        }
    )


def requests_of(weights, num, seed, temperature=0.0, max_new_tokens=24):
    draw = random.Random(seed)
    vocab_size = weights.spec.vocab_size
    return [
        Request(
            f"r{i}",
            [draw.randrange(vocab_size) for _ in range(draw.randrange(1, 90))],
            SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=i, ignore_eos=True),
        )
        for i in range(num)
    ]


@pytest.fixture(scope="module")
def one_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    make_tiny("mixtral", folder)
    return Checkpoint.open(folder)


@functools.cache
def undisturbed(weights, num_shards):
    """Sampled requests, and what one process makes of them."""
    requests = requests_of(weights, 8, seed=5, temperature=0.7, max_new_tokens=30)
    return requests, collect_local(LocalEngine.load(weights, config_of(1, 1, num_shards)), requests)


@pytest.mark.parametrize(
    ("pp", "dp", "tp", "temperature"),
    [(1, 1, 1, 0.8), (3, 1, 1, 0.0), (1, 2, 1, 0.8), (2, 3, 1, 0.0), (1, 1, 2, 0.8), (2, 2, 3, 0.8)],
)
def test_any_layout_emits_in_bf16_what_one_process_with_as_many_shards_does(weights, pp, dp, tp, temperature):
    requests = requests_of(weights, 12, seed=pp * 10 + dp, temperature=temperature)
    expected = collect_local(LocalEngine.load(weights, config_of(1, 1, tp)), requests)
    with ThreadedCell(weights, config_of(pp, dp, tp)) as cell:
        for request in requests:
            cell.submit(request)
        assert cell.collect(len(requests)) == expected
        assert cell.idle_stats().kv_usage == 0
        cell.core.check_integrity()


class Shuffled(Registry):
    """Experts live anywhere, some in several places: no balance, some workers host none of a layer."""

    def __init__(self, layout, stages, num_experts, seed):
        super().__init__(layout, stages, num_experts, None)
        self._draw = random.Random(seed)
        ranks = range(layout.group_size)
        self._tables = [
            [[self._draw.sample(ranks, self._draw.randint(1, 3)) for _ in range(num_experts)] for _ in layers]
            for layers in stages
        ]

    def tables(self):
        return self._tables


@pytest.mark.parametrize("seed", range(2))
def test_placement_and_copies_change_no_token(weights, seed):
    config = config_of(2, 2, 2, max_step_tokens=200)  # steps wide enough that copies share an expert's rows
    layout, spec = Layout(2, 2, 2), weights.spec
    registry = Shuffled(layout, stage_layers(spec.num_layers, 2), spec.num_experts, seed)
    requests = requests_of(weights, 8, seed=seed, temperature=0.7)
    expected = collect_local(LocalEngine.load(weights, config_of(1, 1, 2)), requests)
    with ThreadedCell(weights, config, registry) as cell:
        for request in requests:
            cell.submit(request)
        assert cell.collect(len(requests)) == expected


@given(st.lists(st.integers(0, 15), min_size=1, max_size=5, unique=True), st.integers(0, 15), st.integers(1, 500))
def test_copies_share_an_expert_s_rows_evenly_each_row_once(hosts, caller, num_rows):
    dealt = deal(hosts, caller, num_rows)
    assert [row for _, part in dealt for row in part] == list(range(num_rows))
    assert len({rank for rank, _ in dealt}) == len(dealt)
    assert len(dealt) == 1 or min(len(part) for _, part in dealt) >= MIN_SPLIT_ROWS
    assert caller not in hosts or dealt[0][0] == caller


@pytest.mark.parametrize(
    ("layout", "standby_slots", "lost", "at"),
    [
        ((2, 2, 1), 0, Seat(1, 0, 0), 0),
        ((2, 2, 1), 2, Seat(0, 1, 0), 30),
        ((2, 2, 2), 0, Seat(0, 0, 1), 10),
        ((2, 2, 2), 2, Seat(1, 1, 0), 60),
        ((1, 3, 1), 0, Seat(0, 2, 0), 40),
        ((1, 3, 1), 2, Seat(0, 0, 0), 1),
        ((2, 1, 1), 0, Seat(1, 0, 0), 20),  # without a sibling: its streams wait for the respawn
        ((1, 1, 1), 2, Seat(0, 0, 0), 50),
    ],
)
def test_a_lost_worker_changes_no_token(one_model, layout, standby_slots, lost, at):
    requests, expected = undisturbed(one_model, layout[2])
    with ThreadedCell(one_model, config_of(*layout, standby_slots=standby_slots)) as cell:
        for request in requests:
            cell.submit(request)
        assert cell.collect(len(requests), lambda num: num == at and cell.lose(lost)) == expected
        assert cell.idle_stats().kv_usage == 0
        status = cell.status(lambda status: status.cell.phase == "whole" and status.epoch > 1)
        assert status.cell.lost_total == 1
        assert status.cell.workers["serving"] == cell.layout.num_workers
        cell.core.check_integrity()


@pytest.mark.parametrize(("layout", "standby_slots"), [((2, 2, 1), 0), ((2, 2, 2), 2)])
def test_while_a_seat_is_empty_its_sibling_serves_with_the_experts_of_the_lost(one_model, layout, standby_slots):
    requests, expected = undisturbed(one_model, layout[2])
    with ThreadedCell(one_model, config_of(*layout, standby_slots=standby_slots)) as cell:
        for request in requests:
            cell.submit(request)

        def lose_one(num):
            if num == 20:
                cell.held.clear()
                cell.lose(Seat(1, 0, 0))

        assert cell.collect(len(requests), lose_one) == expected
        status = cell.status(lambda status: not (status.stats.running or status.stats.waiting))
        assert (status.epoch, status.ready, status.cell.phase) == (2, True, "degraded")
        assert status.stats.kv_usage == 0
        assert status.stats.replayed_total > 0
        assert status.cell.experts_uncovered == 0
        hosts = [cell.workers[name]._loaded.hosted for seat, name in cell.names.items() if seat.stage == 1]
        pairs = {(layer, expert) for layer in cell.stages[1] for expert in range(one_model.spec.num_experts)}
        assert set.union(*hosts) == pairs, "the living host all experts of the stage"
        cell.held.set()
        whole = cell.status(lambda status: status.cell.phase == "whole")
        assert whole.cell.phase_seconds["restored"][0] == 1


def test_two_losses_in_a_row_change_no_token(one_model):
    requests, expected = undisturbed(one_model, 1)
    with ThreadedCell(one_model, config_of(2, 3)) as cell:
        for request in requests:
            cell.submit(request)

        def lose_two(num):
            if num == 15:
                cell.lose(Seat(1, 0, 0))
                cell.lose(Seat(1, 2, 0))

        assert cell.collect(len(requests), lose_two) == expected
        assert cell.idle_stats().kv_usage == 0
        assert cell.status(lambda status: status.cell.phase == "whole").cell.lost_total == 2
        cell.core.check_integrity()


def test_a_spare_takes_the_seat_of_a_worker_without_a_sibling(one_model):
    requests, expected = undisturbed(one_model, 1)
    lost = Seat(1, 0, 0)
    with ThreadedCell(one_model, config_of(2, 1, resilience={"spares": 1})) as cell:
        cell.status(lambda status: status.ready and status.cell.workers["spare"])
        spare = cell.names[None]
        for request in requests:
            cell.submit(request)

        def lose_one(num):
            if num == 20:
                cell.held.clear()  # nobody else can come
                cell.lose(lost)

        assert cell.collect(len(requests), lose_one) == expected
        assert spare in cell.cell.members.workers_of(0)
        assert cell.idle_stats().kv_usage == 0
        cell.held.set()
        assert cell.status(lambda status: status.cell.workers["spare"]).cell.phase == "whole"
        assert cell.names[lost] == spare


class Freezer:
    """Freezes the first worker of a seat, thread of beats and all, just before it sends its n-th message of a kind."""

    def __init__(self, seat, kind, at):
        self._seat, self._kind, self._at = seat, kind, at
        self.name = None
        self.frozen, self.thaw = threading.Event(), threading.Event()

    def __call__(self, name, load, mesh, seat, pairs):
        if seat == self._seat and self.name is None:
            self.name = name
            mesh = _Gate(mesh, self)
        return Worker(name, load, mesh, seat, pairs)

    def passes(self, message):
        self._at -= isinstance(message, self._kind)
        if self._at < 0:
            self.frozen.set()
        if self.frozen.is_set():
            assert self.thaw.wait(WAIT_S), "nobody thawed it"


class _Gate:
    def __init__(self, mesh, freezer):
        self._mesh, self._freezer = mesh, freezer

    def send(self, name, message, frame=None):
        self._freezer.passes(message)
        return self._mesh.send(name, message, frame)

    def __getattr__(self, name):
        return getattr(self._mesh, name)


@pytest.mark.parametrize(
    ("seat", "kind"), [(Seat(1, 0, 0), StepDone), (Seat(0, 1, 0), Hidden), (Seat(0, 0, 0), ExpertCall)]
)
def test_a_frozen_worker_commits_nothing_when_it_wakes_and_leaves(one_model, seat, kind):
    requests, expected = undisturbed(one_model, 1)
    freezer = Freezer(seat, kind, at=7)
    config = config_of(2, 2, resilience={"hung_s": 2.0})
    with ThreadedCell(one_model, config, worker=freezer) as cell:
        for request in requests:
            cell.submit(request)

        def thaw(num):
            if freezer.frozen.is_set() and cell.core.epoch > 1:
                freezer.thaw.set()

        assert cell.collect(len(requests), thaw) == expected
        assert freezer.thaw.is_set(), "it never froze, or was never given up"
        assert cell.killed == [freezer.name]
        cell.runs[freezer.name].join(WAIT_S)
        assert not cell.runs[freezer.name].is_alive(), "it was not told to stop"
        cell.status(lambda status: status.stats.num_stale if kind is StepDone else status.cell.stale_total)
        assert cell.idle_stats().kv_usage == 0
        cell.core.check_integrity()


def test_a_worker_that_hears_no_engine_for_long_ends(monkeypatch):
    monkeypatch.setattr(worker, "IDLE_S", 0.1)
    with Mesh() as engine, Mesh() as mesh:
        mesh.connect(ENGINE, engine.address)
        orphan = Worker("orphan", None, mesh, orphan_s=0.5)
        run = threading.Thread(target=orphan.run, daemon=True)
        run.start()
        assert engine.receive(WAIT_S).message.name == "orphan"
        run.join(WAIT_S)
        assert not run.is_alive()


def test_cancelled_requests_free_their_pages(weights):
    requests = requests_of(weights, 10, seed=9, max_new_tokens=400)
    with ThreadedCell(weights, config_of(2, 2)) as cell:
        for request in requests:
            cell.submit(request)
        emissions = cell.emissions()
        for _ in range(20):
            next(emissions)
        for request in requests:
            cell.cancel(request.rid)
        finishes = []
        while len(finishes) < len(requests):
            if (finish := next(emissions).finish) is not None:
                finishes.append(finish)
        assert finishes == ["abort"] * len(requests)
        assert cell.idle_stats().kv_usage == 0
        cell.core.check_integrity()
