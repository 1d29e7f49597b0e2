"""The rehearsal: it learns, ends, is remembered, and leaves nothing behind, whatever happens in its midst."""

import pytest

from serve_app.engine.plan import Cancel, Submit
from serve_app.engine.request import Request, SamplingParams
from serve_app.runtime.calibration import LIMIT_S, Calibration
from tests.engine.virtual import HIDDEN, Visit, World, dot, slo_config, work_of

VOCAB = 1_000


class Rehearsal:
    """A calibration over a cell in virtual time."""

    def __init__(self, path=None, config=None, **world):
        self.world = World(config or slo_config(keep_s=60.0), seeded=False, noise=0.0, **world)
        self.calibration = Calibration(self.world.core, VOCAB, self.world.core.num_replicas, path)
        self.sent = []
        emit = self.world._emit

        def take(emission):
            self.calibration.take(emission)
            emit(emission)

        self.world._emit = take

    def send(self, event):
        self.sent.append(event)
        if isinstance(event, Submit):
            self.world.visits[event.request.rid] = Visit(event.request, self.world.now)
        self.world.on(event)

    def look(self):
        self.calibration.look(self.send, self.world.now)

    def run(self, limit_s=60.0):
        """As the engine's loop does, ten times a second."""
        until_s = self.world.now + limit_s
        while not self.calibration.is_over and self.world.now < until_s:
            self.look()
            self.world.run(self.world.now + 0.1)
        assert self.calibration.is_over


def untouched(core):
    stats = core.stats()
    counted = (stats.prompt_tokens_total, stats.generation_tokens_total, stats.prefix_queries_total, stats.steps_total)
    assert counted == (0, 0, 0, 0)
    assert (stats.running, stats.waiting, stats.kv_usage, stats.finished_total) == (0, 0, 0.0, {})
    assert not core._kept
    core.check_integrity()


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_it_learns_the_pace_and_leaves_no_trace(num_replicas):
    it = Rehearsal(num_replicas=num_replicas)
    it.run()
    costs = it.world.core.paces.of(num_replicas).costs
    assert costs is not None
    seen = it.world.core.paces.of(num_replicas).observed
    assert all(dot(costs, o.work.row) == pytest.approx(dot(HIDDEN, o.work.row), rel=0.25) for o in seen)
    untouched(it.world.core)
    again = Request("again", it.sent[0].request.prompt, SamplingParams(max_new_tokens=1))
    it.send(Submit(again))
    it.world.run()
    assert it.world.core.stats().prefix_hits_total == 0, "what it computed is cached for nobody"


def test_the_next_start_remembers(tmp_path):
    path = tmp_path / "deep" / "pace.json"
    first = Rehearsal(path)
    first.run()
    second = Rehearsal(path)
    second.look()
    assert second.calibration.is_over and not second.sent
    assert second.world.core.paces.of(1).costs == pytest.approx(first.world.core.paces.of(1).costs)


@pytest.mark.parametrize("text", [b"", b"{", b'[["x"]]', b"[]"])
def test_a_broken_memory_is_none(tmp_path, text):
    path = tmp_path / "pace.json"
    path.write_bytes(text)
    it = Rehearsal(path)
    it.run()
    assert it.sent and len(path.read_bytes()) > 100


def test_without_an_objective_there_is_none():
    it = Rehearsal(config=slo_config(None))
    assert it.calibration.is_over


def test_a_cell_that_is_at_work_learns_from_that():
    it = Rehearsal()
    it.send(Submit(Request("client", [1] * 50, SamplingParams(max_new_tokens=50))))
    it.look()
    assert it.calibration.is_over and len(it.sent) == 1


def test_a_client_that_comes_in_its_midst_is_served():
    it = Rehearsal()
    it.look()
    client = Request("client", [1] * 50, SamplingParams(max_new_tokens=200, ignore_eos=True))
    it.send(Submit(client))
    it.run()
    it.world.run()
    assert it.world.visits["client"].num_tokens == 200
    assert it.world.core.is_idle
    it.world.core.check_integrity()


def test_cancelled_in_its_midst_it_goes_on():
    it = Rehearsal()
    it.look()
    for event in list(it.sent):
        it.world.on(Cancel(event.request.rid))
    assert not it.calibration.is_running
    it.run()
    it.world.run()
    it.world.core.check_integrity()


def test_a_worker_that_dies_in_its_midst_is_not_remembered_as_the_pace_of_the_whole(tmp_path):
    path = tmp_path / "pace.json"
    it = Rehearsal(path, num_replicas=2)
    it.look()
    it.world.run(0.1)
    assert it.world.core._live, "else it was too late"
    it.world.begin(2, resting=(1,), kept=(0,))
    it.run()
    untouched(it.world.core)
    assert not path.exists()


def test_steps_that_never_end_do_not_hold_the_cell_up():
    it = Rehearsal()
    it.world._issue = lambda plan: None
    it.run(LIMIT_S + 2)
    it.world.core.check_integrity()
    assert not it.world.core._live


def test_the_hidden_work_is_what_the_plans_say():
    it = Rehearsal()
    plans, issue = [], it.world._issue
    it.world._issue = lambda plan: (plans.append(plan), issue(plan))
    it.run()
    works = [work_of(plan.slices) for plan in plans]
    assert any(work.prompt_tokens >= 384 for work in works), "long prompts"
    assert any(work.decode_rows >= 4 and not work.prompt_tokens for work in works), "many that decode together"
