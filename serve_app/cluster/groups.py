"""The resources of a cell in Ray's hands: placement groups, with one bundle in them for each worker.

A TP group exchanges the most, so with GPUs it is a placement group, which stays on one node, whose links are the fast
ones. Otherwise a replica is one, on as few nodes as can be: the loss of a node then breaks few replicas. Ray finds a
new place for what a dead node held; groups that somebody removed are asked for again. They outlive the engine, as the
workers in them do; the next engine finds them by their names. A worker that ends as an orphan gives its group back.
"""

from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serve_app.cluster.kin import Names
from serve_app.cluster.resources import Demand, Held, Node, bundle_of, shortage
from serve_app.config import WorkerConfig
from serve_app.experts.layout import Layout, Seat

_Key = tuple[int, int]  # (stage, replica) of a TP group, (-1, replica) of a whole replica, (-2, i) of the i-th spare


@dataclass(frozen=True)
class Places:
    """Where the seats are: `nodes` by Ray's id, of the seats whose whole group has its place."""

    demand: Demand
    nodes: dict[Seat, str]
    held: Held

    are_complete: bool  # every seat has its place; spares may lack theirs

    def shortage(self, waited_s: float) -> str:
        """What the others wait for."""
        return shortage(self.demand, self.held, _living_nodes(), waited_s)


class Groups:
    """The placement groups of one layout. Nothing is reserved before the first `look`."""

    def __init__(self, names: Names, layout: Layout, wants: WorkerConfig, num_spares: int = 0) -> None:
        """`names`: how the groups' names in Ray begin."""
        self._names = names
        self._spares = [(-2, i) for i in range(num_spares)]
        on_one_node = wants.num_gpus > 0 and layout.num_shards > 1
        self._keys = sorted({self._key(seat, on_one_node) for seat in layout.seats()})
        self._seats = {key: [s for s in layout.seats() if self._key(s, on_one_node) == key] for key in self._keys}
        self._seats |= {key: [Seat(*key, 0)] for key in self._spares}
        self._demand = Demand(
            num_groups=len(self._keys),
            group_workers=layout.num_workers // len(self._keys),
            bundle=bundle_of(wants.num_cpus, wants.num_gpus),
            on_one_node=on_one_node,
        )
        self._groups: dict[_Key, PlacementGroup] = {}

    def look(self) -> Places:
        """Ask for the groups that are not there, and see what those that are have got. Does not wait."""
        nodes: dict[Seat, str] = {}
        num_placed = num_held = 0
        for key in self._keys:
            state, places = self._see(key)
            num_held += sum(place != "" for place in places)
            if state == "CREATED":
                num_placed += 1
                nodes |= dict(zip(self._seats[key], places, strict=True))
        for key in self._spares:
            state, places = self._see(key)
            if state == "CREATED":
                nodes |= dict(zip(self._seats[key], places, strict=True))
        return Places(self._demand, nodes, Held(num_placed, num_held), num_placed == len(self._keys))

    def bundle(self, place: Seat) -> PlacementGroupSchedulingStrategy:
        """For the options of the actor that lives there. The place must be among those that the last look found."""
        key = self._key_of(place)
        return PlacementGroupSchedulingStrategy(self._groups[key], self._seats[key].index(place))

    def _key_of(self, place: Seat) -> _Key:
        return next(key for key, seats in self._seats.items() if place in seats)

    @staticmethod
    def _key(seat: Seat, on_one_node: bool) -> _Key:
        return (seat.stage, seat.replica) if on_one_node else (-1, seat.replica)

    def spare_places(self) -> list[Seat]:
        """Where spares live: seats that are none."""
        return [Seat(*key, 0) for key in self._spares]

    def name(self, place: Seat) -> str:
        """Of the group that a place is in, for `remove_group`."""
        return self._name(self._key_of(place))

    def _name(self, key: _Key) -> str:
        return f"{self._names.prefix}{key[0]}.{key[1]}"

    def remove(self) -> None:
        """Give all back. Ray ends the workers in them."""
        while self._groups:
            _, group = self._groups.popitem()
            ray.util.remove_placement_group(group)

    def remove_strangers(self) -> None:
        """Give back what another config of this application has left."""
        for table in ray.util.placement_group_table().values():
            name = table["name"]
            if name.startswith(self._names.family) and not name.startswith(self._names.prefix):
                remove_group(name)

    def _see(self, key: _Key) -> tuple[str, list[str]]:
        """Ray's word for the group's state, and the node of each of its bundles: "" where it has none."""
        if key not in self._groups:
            self._groups[key] = self._find(key) or self._reserve(key)
        table = ray.util.placement_group_table(self._groups[key])
        if not table or table["state"] == "REMOVED":
            self._groups.pop(key, None)  # the next look asks anew
            return "REMOVED", []
        places = table["bundles_to_node_id"]
        return table["state"], [places[shard] for shard in sorted(places)]

    def _find(self, key: _Key) -> PlacementGroup | None:
        """What an earlier engine has reserved."""
        return _group_named(self._name(key))

    def _reserve(self, key: _Key) -> PlacementGroup:
        bundles = [dict(self._demand.bundle) for _ in self._seats[key]]
        strategy = "STRICT_PACK" if self._demand.on_one_node else "PACK"
        group: PlacementGroup = ray.util.placement_group(bundles, strategy, name=self._name(key), lifetime="detached")
        return group


def remove_group(name: str) -> None:
    """Give a group back, if it is there still. Ray ends whoever lives in it."""
    group = _group_named(name)
    if group is not None:
        ray.util.remove_placement_group(group)


def _group_named(name: str) -> PlacementGroup | None:
    try:
        group: PlacementGroup = ray.util.get_placement_group(name)
    except ValueError:
        return None
    return group


def _living_nodes() -> list[Node]:
    free = ray._private.state.available_resources_per_node()  # type: ignore[no-untyped-call]
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return [Node(node["Resources"], free.get(node["NodeID"], {})) for node in alive]
