"""What the keeper says while resources are missing: every number in it is one that an operator can check."""

import re

from hypothesis import given
from hypothesis import strategies as st

from serve_app.cluster.resources import Demand, Held, Node, bundle_of, shortage

REFERENCE = Demand(num_groups=8, group_workers=4, bundle={"GPU": 1.0, "CPU": 0.5}, on_one_node=True)


def node(total, free=None):
    return Node(total, total if free is None else free)


def say(demand, num_groups, nodes, waited_s=35.2):
    return shortage(demand, Held(num_groups, num_groups * demand.group_workers), nodes, waited_s)


def test_a_cluster_that_is_too_small_is_told_by_how_much():
    full = node({"GPU": 4.0, "CPU": 64.0}, {"CPU": 62.0})
    assert say(REFERENCE, 3, [full] * 3) == (
        "waiting for resources: 3 of 8 TP groups have their place;"
        " 20 GPU are missing (32 needed, the cluster has 12); 35 s so far"
    )


def test_what_others_hold_is_in_use_elsewhere():
    mine = node({"GPU": 8.0, "CPU": 64.0}, {"CPU": 60.0})
    half_taken = node({"GPU": 8.0, "CPU": 64.0}, {"GPU": 4.0, "CPU": 64.0})
    assert "; 20 GPU are missing (32 needed, the cluster has 16, 4 of them in use elsewhere);" in say(
        REFERENCE, 2, [mine, half_taken]
    )


def test_every_unit_that_is_missing_is_named():
    sentence = say(REFERENCE, 0, [node({"GPU": 31.5, "CPU": 2.0})])
    assert "; 0.5 GPU is missing (32 needed, the cluster has 31.5); 14 CPU are missing (16 needed," in sentence


def test_a_group_that_fits_on_no_node_is_told_apart_from_a_cluster_that_is_full():
    small = node({"GPU": 2.0, "CPU": 64.0})
    assert "; a TP group needs 4 GPU on one node, and the largest node has 2;" in say(REFERENCE, 0, [small] * 16, 0), (
        "enough GPUs in all"
    )
    assert "24 GPU are missing (32 needed, the cluster has 8); a TP group needs 4 GPU on one node" in say(
        REFERENCE, 0, [small] * 4, 0
    ), "and too few"


def test_units_that_no_node_has_together_are_named_together():
    nodes = [node({"GPU": 32.0}), node({"CPU": 32.0})]
    assert "; a TP group needs 4 GPU and 2 CPU on one node, and no node has all of them;" in say(REFERENCE, 0, nodes)


def test_a_worker_is_the_piece_where_a_group_may_be_spread():
    spread = Demand(num_groups=2, group_workers=2, bundle={"CPU": 1.0}, on_one_node=False)
    assert "a worker needs 1 CPU on one node, and the largest node has 0.5;" in say(spread, 0, [node({"CPU": 0.5})] * 8)


def test_crumbs_are_not_room():
    nodes = [node({"GPU": 6.0, "CPU": 64.0}, {"GPU": free, "CPU": 64.0}) for free in (2.0, 2.0, 2.0, 2.0, 5.0)]
    demand = Demand(num_groups=6, group_workers=4, bundle={"GPU": 1.0}, on_one_node=True)
    assert "; a TP group needs 4 GPU on one node, and there is room for 1 of the 2 that have no place;" in say(
        demand, 4, nodes
    )


def test_where_all_is_there_the_delay_is_rays():
    assert say(REFERENCE, 7, [node({"GPU": 32.0, "CPU": 16.0}, {"GPU": 4.0, "CPU": 2.0})]) == (
        "waiting for resources: 7 of 8 TP groups have their place; Ray has not placed the rest yet; 35 s so far"
    )


def test_workers_of_a_group_that_lost_a_node_are_not_in_use_elsewhere():
    spread = Demand(num_groups=1, group_workers=6, bundle={"CPU": 0.9}, on_one_node=False)
    survivor = node({"CPU": 4.0}, {"CPU": 0.4})
    assert "; 1.4 CPU are missing (5.4 needed, the cluster has 4);" in shortage(spread, Held(0, 4), [survivor], 1)


def test_a_worker_that_asks_for_nothing_still_has_a_bundle():
    assert bundle_of(num_cpus=0, num_gpus=0) == {"CPU": 0.001}
    assert bundle_of(num_cpus=0.1, num_gpus=0) == {"CPU": 0.1}
    assert bundle_of(num_cpus=0, num_gpus=0.5) == {"GPU": 0.5}


TENTHS = st.integers(0, 80).map(lambda tenths: tenths / 10)
NODES = st.lists(st.tuples(TENTHS, TENTHS).map(lambda pair: node({"CPU": max(pair)}, {"CPU": min(pair)})), min_size=1)


@given(NODES, st.integers(1, 8), st.integers(1, 4), st.integers(1, 20), st.booleans())
def test_it_never_asks_for_more_than_would_do(nodes, num_groups, group_workers, tenths, on_one_node):
    """With what it says is missing as one more node there is enough in all, and the next sentence says so."""
    demand = Demand(num_groups, group_workers, {"CPU": tenths / 10}, on_one_node)
    missing = re.search(r"([\d.]+) CPU (?:is|are) missing", say(demand, 0, nodes))
    added = node({"CPU": float(missing[1])}) if missing else node({"CPU": 0.0})
    after = say(demand, 0, [*nodes, added])
    assert "missing" not in after
    enough = sum(node.free["CPU"] for node in [*nodes, added])
    assert enough >= demand.num_groups * demand.group_workers * tenths / 10 - 1e-6


@given(NODES, st.integers(1, 8), st.integers(1, 4), st.integers(1, 20), st.booleans())
def test_it_is_rays_turn_exactly_when_every_piece_has_room(nodes, num_groups, group_workers, tenths, on_one_node):
    demand = Demand(num_groups, group_workers, {"CPU": tenths / 10}, on_one_node)
    size, num_pieces = (tenths * group_workers, num_groups) if on_one_node else (tenths, num_groups * group_workers)
    room = sum(round(node.free["CPU"] * 10) // size for node in nodes)
    assert ("Ray has not placed" in say(demand, 0, nodes)) == (room >= num_pieces)
