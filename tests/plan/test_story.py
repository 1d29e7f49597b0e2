"""The story of one GPU names what it had, who takes it over, and what when."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.errors import PlanError
from serve_app.experts.layout import Seat
from serve_app.plan.deployment import Deployment
from serve_app.plan.seats import gpu_of, place_of
from serve_app.plan.story import named, seconds, story, tell
from tests.plan.cases import SEED
from tests.plan.losing import case, deployments, spared

PER_EXPERT = 3 * 2560 * 5120 * 2


def test_gpu_13_of_the_document_has_eight_experts_and_seven_survivors():
    told = story(*case(SEED), 13)
    assert (told.place.node, told.place.cell, told.place.seat) == (1, 0, Seat(1, 1, 1))
    assert told.layers == range(4, 8)
    assert told.heads.queries == tuple(range(5, 10))
    assert len(told.experts) == len(told.moves) == 8
    assert told.survivors == (8, 9, 10, 11, 12, 14, 15)
    assert len(told.stopped) == 31
    assert told.resting == (4, 5, 6, 7, 12, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
    assert Counter(move.way for move in told.moves) == {"copy": 2, "slot": 6}
    assert sum(told.loaded_bytes.values()) == 6 * PER_EXPERT
    text = " ".join(tell(told))
    for fact in ("GPU 13", "node 1", "stage 1, replica 1, shard 1", "layers 4 to 7", "8 experts", "7 survivors"):
        assert fact in text
    assert all(f"{move.layer}.{move.expert} on GPU {move.gpu}" in text for move in told.moves)
    assert "all 32 GPUs" in text
    assert "41 %" in text
    assert "1.05 s" in text


def test_the_moments_follow_each_other_and_end_whole():
    told = story(*case(SEED), 13, "process")
    times = [moment.at_s for moment in told.moments]
    assert times == sorted(times)
    assert [moment.name for moment in told.moments][-2:] == ["re-add", "restored"]
    by_name = {moment.name: moment for moment in told.moments}
    assert by_name["form"].capacity == 0
    assert by_name["form"].ttft_s is None
    assert by_name["step"].capacity_share == 0.5
    assert by_name["step"].ttft_s > by_name["restored"].ttft_s
    assert by_name["restored"].capacity == told.state.healthy.capacity
    assert by_name["restored"].at_s == told.budget.whole_s


def test_a_cell_that_waits_keeps_its_experts_where_they_are():
    told = story(*case(Deployment(tp=4, cells=8)), 13, "process")
    assert {move.way for move in told.moves} == {"waits"}
    assert not told.loaded_bytes
    assert told.resting == told.stopped == (12, 14, 15)
    assert "no replica is whole" in " ".join(tell(told))
    assert {moment.capacity_share for moment in told.moments} == {7 / 8, 1.0}


def test_a_long_list_is_cut_in_the_sentence_and_whole_in_the_data():
    told = story(*case(Deployment(dp=4)), 1)
    beyond = [move for move in told.moves if move.way == "beyond"]
    assert len(beyond) == 64
    assert any("and 52 more" in line for line in tell(told))


def test_a_spare_has_no_story():
    told = story(*case(spared(SEED, 1)), 32)
    assert told.place.seat is None
    assert told.place.node == 4
    assert "spare of cell 0" in tell(told)[0]
    assert [moment.name for moment in told.moments] == ["lost"]


def test_a_gpu_that_there_is_not_is_refused():
    for gpu in (-1, 32):
        with pytest.raises(PlanError, match=f"no GPU {gpu}"):
            story(*case(SEED), gpu)


def test_numbers_and_times_are_read_at_a_glance():
    assert named([1, 2, 3, 5, 6, 9]) == "1 to 3, 5, 6, 9"
    assert [seconds(value) for value in (0.0071, 1.046, 30, 600, 14400)] == [
        "7 ms",
        "1.05 s",
        "30 s",
        "10 min",
        "4.0 h",
    ]


@settings(deadline=None, max_examples=20)
@given(deployments(), st.data())
def test_every_expert_of_any_gpu_has_one_new_home_among_its_survivors(deployment, data):
    cost, workload, healthy = case(deployment)
    gpu = data.draw(st.integers(0, deployment.num_gpus - 1))
    told = story(cost, workload, healthy, gpu)
    pairs = [(move.layer, move.expert) for move in told.moves]
    assert pairs == list(told.experts)
    assert len(set(pairs)) == len(pairs)
    for move in told.moves:
        assert (move.gpu in told.survivors) == (move.way in ("copy", "slot", "beyond"))
        assert move.layer in told.layers
    num_loaded = sum(move.way in ("slot", "beyond") for move in told.moves)
    assert sum(told.loaded_bytes.values()) == pytest.approx(num_loaded * PER_EXPERT)
    assert sum(told.loaded_bytes.values()) == pytest.approx(told.state.landed_bytes)
    assert max(told.loaded_bytes.values(), default=0) == pytest.approx(told.state.worker_bytes)
    assert len(told.resting) + 1 == told.state.blast_gpus_after
    assert len(told.stopped) + 1 == told.state.blast_gpus
    assert tell(told)


@settings(deadline=None)
@given(deployments(), st.integers(0, 2), st.integers(1, 9), st.data())
def test_every_gpu_has_one_place(deployment, spares, per_node, data):
    deployment = replace(deployment, spares=spares)
    gpu = data.draw(st.integers(0, deployment.num_gpus - 1))
    place = place_of(deployment, per_node, gpu)
    assert place.node == gpu // per_node
    assert 0 <= place.cell < deployment.cells
    if place.seat is None:
        assert gpu >= deployment.cells * deployment.cell_gpus
    else:
        assert gpu_of(deployment, place.cell, place.seat) == gpu
