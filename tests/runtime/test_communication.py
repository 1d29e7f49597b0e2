"""What is sent for a step is what its plan and its routing ask for, to the byte. Figures: docs/architecture.md."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.communication import CARRIERS, account, by_carrier, expected_rows, replay, run
from serve_app.experts.layout import Layout, stage_layers
from serve_app.model.checkpoint import Checkpoint
from serve_app.runtime import wire
from serve_app.runtime.mesh import Mesh
from tests.model.families import make_tiny
from tests.runtime.test_cell import Shuffled, config_of, requests_of

LAYOUTS = [(1, 1, 1), (3, 1, 1), (1, 2, 1), (1, 1, 3), (2, 2, 3)]


@pytest.fixture(scope="module", params=["mixtral", "olmoe"])  # olmoe: norms over all shards
def weights(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_tiny(request.param, folder)
    return Checkpoint.open(folder)


def sent_and_account(weights, config, registry=None):
    """Frames sent, by message; what was due, and the least, by purpose: of two batches, the first without decoding."""
    batches = [requests_of(weights, 6, seed=1, max_new_tokens=1), requests_of(weights, 6, seed=2, max_new_tokens=8)]
    cell, phases = run(weights, config, batches, registry)
    routing = replay(weights, config, [plan for phase in phases for plan in phase.plans])
    return [(phase.sent.frame_bytes, *account(cell, phase.plans, routing)) for phase in phases]


@pytest.mark.parametrize(("pp", "dp", "tp"), LAYOUTS)
def test_frames_sent_are_those_that_plan_and_routing_ask_for_to_the_byte(weights, pp, dp, tp):
    for sent, due, _ in sent_and_account(weights, config_of(pp, dp, tp, standby_slots=2 * (dp > 1))):
        assert sent == by_carrier(due)
        assert {purpose for purpose in CARRIERS if due[purpose]} == purposes(weights.spec, pp, dp, tp)


def purposes(spec, pp, dp, tp):
    """What frames are sent for at all in a layout."""
    of_shards = ["gather", "scatter", "embedding", "sampled", "logits", *["norms"] * (spec.qk_norm == "full")]
    return {*of_shards * (tp > 1), *["stages"] * (pp > 1), *["out", "home"] * (dp * tp > 1)}


def test_that_holds_wherever_experts_live_and_however_many_copies_they_have(weights):
    config = config_of(2, 2, 2, max_step_tokens=200)
    registry = Shuffled(Layout(2, 2, 2), stage_layers(weights.spec.num_layers, 2), weights.spec.num_experts, seed=3)
    for sent, due, _ in sent_and_account(weights, config, registry):
        assert sent == by_carrier(due)


def test_attention_sends_the_least_there_is_and_nothing_sends_less(weights):
    for _, due, least in sent_and_account(weights, config_of(2, 2, 2)):
        assert all(due[purpose] >= least[purpose] for purpose in CARRIERS)
        assert [due["gather"], due["scatter"]] == [least["gather"], least["scatter"]]
        assert due["stages"] == 2 * least["stages"]  # fp32, by choice


@given(st.integers(1, 4), st.integers(2, 4), st.data())
def test_expected_rows_and_hosts_are_the_means_over_all_sets_of_experts(num_own, num_workers, data):
    num_experts = num_own * num_workers
    top_k = data.draw(st.integers(1, min(4, num_experts)))
    away = [
        [expert // num_own for expert in chosen if expert >= num_own]  # home is worker 0
        for chosen in combinations(range(num_experts), top_k)
    ]
    rows, hosts = expected_rows(num_experts, top_k, num_workers)
    assert rows == pytest.approx(sum(map(len, away)) / len(away))
    assert hosts == pytest.approx(sum(len(set(one)) for one in away) / len(away))


def test_a_mesh_counts_what_it_sent_and_nothing_that_it_dropped():
    leave, hidden = wire.Leave(7), wire.Hidden(1, 2, "float32", (3,))
    with Mesh() as mesh, Mesh() as peer:
        mesh.connect("peer", peer.address)
        mesh.send("peer", leave)
        mesh.send("peer", hidden, memoryview(bytes(12)))
        mesh.send("peer", hidden, memoryview(bytes(12)))
        mesh.send("nobody", hidden, memoryview(bytes(12)))
        header_bytes, frame_bytes = mesh.sent()
        assert header_bytes == {"Leave": len(wire.encode(leave)), "Hidden": 2 * len(wire.encode(hidden))}
        assert frame_bytes == {"Leave": 0, "Hidden": 24}
        assert not peer.sent().header_bytes
