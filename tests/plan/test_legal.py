"""Which layouts there are: what the code that runs them takes, and a sentence for each that it refuses."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.experts.layout import stage_layers
from serve_app.experts.placement import Slots, place
from serve_app.experts.repair import repair
from serve_app.plan.deployment import Deployment
from serve_app.plan.legal import Rejected, divisors, is_power_of_two, least_standby, legal, notes, why_not
from tests.plan.cases import BETTER, R10B, SEED

MIXED = replace(R10B, num_heads=16, num_kv_heads=4)
DENSE = replace(R10B, num_experts=1, top_k=1)


def fullest_after_a_loss(layers: range, num_experts: int, num_workers: int, slots: Slots) -> int:
    """Experts on a worker, at most, whichever one is lost."""
    placement = place(layers, num_experts, num_workers, slots)
    most = 0
    for lost in range(num_workers):
        mended = repair(placement, set(range(num_workers)) - {lost}, slots).placement
        assert all(ranks for table in mended.hosts for ranks in table)
        most = max(most, *(len(mended.held(rank)) + len(mended.standbys(rank)) for rank in range(num_workers)))
    return most


# -- all of them ----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 2), st.sampled_from([1, 4, 8]))
def test_each_uses_exactly_the_gpus_and_is_one_that_the_experts_can_be_placed_in(
    num_gpus: int, spares: int, gpus_per_node: int
) -> None:
    found, rejected = legal(R10B, num_gpus, gpus_per_node=gpus_per_node, spares=spares)
    for deployment in found:
        assert deployment.num_gpus == num_gpus
        deployment.layout.check_model(R10B.num_layers, R10B.num_heads)
        assert deployment.tp <= gpus_per_node
    for refusal in rejected:
        assert refusal.deployment.num_gpus == num_gpus
        assert refusal.reason.endswith(".")
    assert len({(d.tp, d.pp, d.dp, d.cells) for d in [*found, *(r.deployment for r in rejected)]}) == len(found) + len(
        rejected
    )


def test_nothing_is_left_out_but_odd_numbers_of_shards() -> None:
    found, rejected = legal(MIXED, 24, across_nodes=True)
    names = {(d.cells, d.tp, d.pp, d.dp) for d in [*found, *(refusal.deployment for refusal in rejected)]}
    ways = [
        (cells, tp, pp, 24 // cells // tp // pp)
        for cells in divisors(24)
        for tp in divisors(24 // cells)
        for pp in divisors(24 // cells // tp)
    ]
    assert names == {way for way in ways if is_power_of_two(way[1]) or 16 % way[1] == 0}


@pytest.mark.parametrize("num_gpus", [720, 840, 960, 1008, 1024])
def test_a_thousand_gpus_make_no_more_than_a_few_thousand(num_gpus: int) -> None:
    found, rejected = legal(replace(R10B, num_layers=96, num_heads=96, num_kv_heads=8), num_gpus)
    assert 100 < len(found) + len(rejected) < 3000


def test_the_layouts_of_the_document_are_among_those_of_32_gpus_with_the_slots_that_a_loss_takes() -> None:
    found, _ = legal(R10B, 32)
    assert SEED in found  # with its two standby slots, which are just the fewest
    assert replace(BETTER, standby=5) in found


def test_a_prime_number_of_gpus_is_cells_or_replicas() -> None:
    found, _ = legal(R10B, 31, across_nodes=True)
    assert [(d.tp, d.pp, d.dp, d.cells) for d in found] == [(1, 1, 31, 1), (1, 1, 1, 31)]


def test_whatever_the_number_there_is_a_layout_since_a_gpu_may_be_a_cell() -> None:
    assert all(Deployment(cells=num) in legal(R10B, num)[0] for num in range(1, 40))


def test_no_gpu_makes_no_layout() -> None:
    with pytest.raises(ValueError, match="num_gpus must be at least 1, not 0"):
        legal(R10B, 0)


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deployment", "reason"),
    [
        (Deployment(pp=32), "PP 32 must not exceed the model's 16 layers."),
        (Deployment(tp=32), "TP 32 must not exceed the model's 20 attention heads."),
        (Deployment(tp=16), "TP 16 does not fit on a node of 8 GPUs, and shards talk in every layer."),
        (
            Deployment(tp=5, dp=4),
            "TP 5 does not divide the 8 GPUs of a node, so that shards would lie on two.",
        ),
        (
            Deployment(tp=2, dp=8),
            "EP 16 exceeds the 8 GPUs of a node: rows would go to experts of other nodes in every layer, which nobody"
            " has measured; --across-nodes allows it.",
        ),
    ],
    ids=str,
)
def test_what_does_not_run_is_refused_with_its_reason(deployment: Deployment, reason: str) -> None:
    assert why_not(R10B, deployment, 8) == reason


def test_what_does_not_divide_the_node_is_fine_where_there_is_only_one() -> None:
    assert why_not(R10B, Deployment(tp=5), 8) is None


def test_refusals_come_with_the_legal_ones() -> None:
    _, rejected = legal(R10B, 32)
    assert Rejected(Deployment(pp=32), "PP 32 must not exceed the model's 16 layers.") in rejected
    assert {refusal.deployment.tp for refusal in rejected if refusal.reason.startswith("TP")} == {16, 32}


# -- standby slots --------------------------------------------------------------------------------------------------


def test_two_standby_slots_are_what_the_loss_of_one_of_eight_workers_takes() -> None:
    assert least_standby(R10B, SEED) == 2
    assert least_standby(R10B, Deployment(dp=1)) == 0  # nobody is left


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(2, 7))
def test_with_these_slots_a_stage_survives_any_loss_within_them_and_with_one_fewer_it_does_not(
    num_layers: int, num_experts: int, group: int
) -> None:
    spec = replace(R10B, num_layers=num_layers, num_experts=num_experts)
    deployment = Deployment(dp=group)
    slots = Slots(deployment.primary(spec), least_standby(spec, deployment))
    [layers] = stage_layers(num_layers, 1)
    assert fullest_after_a_loss(layers, num_experts, group, slots) <= slots.primary + slots.standby
    if slots.standby:
        fewer = Slots(slots.primary, slots.standby - 1)
        assert fullest_after_a_loss(layers, num_experts, group, fewer) > fewer.primary + fewer.standby


def test_who_asks_for_slots_gets_so_many() -> None:
    assert {deployment.standby for deployment in legal(R10B, 32, standby=3)[0]} == {3}


# -- what is legal but uneven ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "deployment", "said"),
    [
        (R10B, Deployment(pp=3, dp=2), ["stages of 5 and 6 layers"]),
        (R10B, Deployment(tp=8), ["shards of 2 and 3 heads"]),
        (MIXED, Deployment(tp=8), ["4 KV heads are held 2 times over 8 shards"]),
        (R10B, Deployment(dp=6), ["2 or 3 experts of a layer on each of 6 workers"]),
        (R10B, Deployment(pp=16, dp=20), ["16 experts of a stage for 20 workers: 4 of them hold none"]),
        (R10B, Deployment(dp=20), ["16 experts of a layer for 20 workers: in each layer 4 of them have none"]),
        (DENSE, Deployment(dp=2), ["dense: each layer's one expert runs on one of 2 workers, the others wait"]),
        (R10B, Deployment(), ["one worker in a stage: its loss stops the cell until it is replaced"]),
        (R10B, Deployment(dp=3, cells=8), ["some expert groups lie on two nodes: EP 3 does not divide 8 GPUs"]),
        (R10B, Deployment(dp=16), ["experts are exchanged between nodes: EP 16 over nodes of 8 GPUs"]),
    ],
    ids=str,
)
def test_what_does_not_come_out_evenly_is_said(spec, deployment: Deployment, said: list[str]) -> None:
    found = notes(spec, deployment, 8)
    assert all(phrase in found for phrase in said), found


def test_of_what_comes_out_evenly_nothing_is_said() -> None:
    assert notes(R10B, SEED, 8) == []


def test_more_workers_than_experts_are_legal_since_the_experts_can_be_placed() -> None:
    placement = place(range(1), 16, 20)
    assert sorted(len(placement.held(rank)) for rank in range(20)) == [0] * 4 + [1] * 16
    assert why_not(R10B, Deployment(pp=16, dp=20), 8, across_nodes=True) is None
