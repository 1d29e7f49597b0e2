"""Whom a drill strikes."""

from collections import Counter

from serve_app.drill.targets import census, strike_order, targets
from serve_app.runtime.snapshot import ProcessView


def process(role, pid, node="n1", state="live"):
    return ProcessView(role, f"{role}{pid}", pid, node, state)


CELL = [
    process("worker", 1, state="serving"),
    process("worker", 2, "n2", "hosting"),
    process("spare", 3, "n3", "spare"),
    process("engine", 4, "n2"),
    process("worker", 5, "n2", "starting"),
]


def test_a_role_is_struck_wherever_it_is():
    assert [target.pid for target in targets("worker", CELL, ())] == [1, 2, 5]
    assert [(target.name, target.node, target.pids) for target in targets("engine", CELL, ())] == [
        ("engine4", "n2", [4])
    ]
    assert targets("router", CELL, ()) == []


def test_a_node_is_struck_if_it_has_workers_and_can_be_lost():
    (target,) = targets("node", CELL, {"n2", "n3", "n4"})
    assert (target.node, target.pids, target.pid) == ("n2", [2, 4, 5], 0)


def test_each_role_is_struck_as_often_in_an_order_of_the_seed():
    order = strike_order(["worker", "engine"], 20, 1)
    assert Counter(order) == {"worker": 20, "engine": 20}
    assert order == strike_order(["worker", "engine"], 20, 1) != strike_order(["worker", "engine"], 20, 2)
    assert order != sorted(order)


def test_who_is_on_the_way_is_not_there():
    assert census(CELL) == Counter(
        [("worker", "serving"), ("worker", "hosting"), ("spare", "spare"), ("engine", "live")]
    )
