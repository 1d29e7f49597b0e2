"""Checks of parameters and numbers of experts, of the layout's products, and of the line that starts it all."""

from serve_app.plan.audit.facts import LARGEST_ERROR, Check, Facts, distinct
from serve_app.plan.audit.readings import Judgement, agrees, number
from serve_app.plan.counts import Params, count_params, expert_params

# -- parameters -----------------------------------------------------------------------------------------------------


def total_params(facts: Facts) -> Judgement:
    """Where it does not hold: the sizes, and the number of experts, with which it would."""
    declared = facts.number("model.total_params_b")
    params = count_params(facts.as_declared.spec)
    shown = f"{number(declared)} B"
    off = params.total / 1e9 / declared - 1
    if agrees(declared, params.total / 1e9):
        return Judgement(shown, _parts(params), "holds", f"active {_active(facts)} B")
    if abs(off) <= LARGEST_ERROR:
        return Judgement(shown, _parts(params), "holds only if", f"{off:+.1%} are left out; active {_active(facts)} B")
    sized = distinct([facts.scaled, *facts.others])
    readings = [f"{each.name} have {_parts(count_params(each.spec))}" for each in sized]
    if facts.launched:
        readings.append(f"{facts.launched.name} has {_parts(count_params(facts.launched.spec))}")
    per_layer = declared * 1e9 / (facts.count("model.layers") * expert_params(facts.as_declared.spec))
    readings.append(f"at the declared sizes it takes {round(per_layer):,} experts per layer")
    return Judgement(shown, _parts(params), "does not hold", "; ".join(readings))


def _parts(params: Params) -> str:
    experts, attention, embedding = (
        round(num / 1e9, 3) for num in (params.experts, params.attention, params.embedding)
    )
    return f"{params.total / 1e9:.4g} B (experts {experts}, attention {attention}, embedding {embedding})"


def _active(facts: Facts) -> str:
    return " / ".join(f"{count_params(spec).active / 1e9:.3g} top-{spec.top_k}" for spec in facts.specs)


# -- products of the layout -----------------------------------------------------------------------------------------


def _exactly(facts: Facts, field: str, right: float, remark: str) -> Judgement:
    """Counts: no tolerance."""
    declared = facts.count(field)
    if declared == right:
        return Judgement(number(declared), number(right), "holds", remark)
    return Judgement(number(declared), number(right), "does not hold", f"it would have to be {number(right)}: {remark}")


def total_experts(facts: Facts) -> Judgement:
    layers, per_layer = facts.count("model.layers"), facts.count("model.experts_per_layer")
    return _exactly(facts, "model.total_experts", layers * per_layer, f"{per_layer} per layer x {layers} layers")


def gpus(facts: Facts) -> Judgement:
    layout = facts.deployment
    return _exactly(facts, "hardware.gpus", layout.cell_gpus, f"TP {layout.tp} x PP {layout.pp} x DP {layout.dp}")


def modules(facts: Facts) -> Judgement:
    return _exactly(facts, "layout.modules", facts.deployment.cell_gpus, "one module for each GPU")


def tp_groups(facts: Facts) -> Judgement:
    layout = facts.deployment
    return _exactly(facts, "layout.tp_groups", layout.pp * layout.dp, f"one of {layout.tp} GPUs for each PP x DP")


def gpus_per_stage(facts: Facts) -> Judgement:
    return _exactly(facts, "layout.gpus_per_stage", facts.deployment.ep, "TP x DP")


def gpus_per_replica(facts: Facts) -> Judgement:
    return _exactly(facts, "layout.gpus_per_replica", facts.deployment.tp * facts.deployment.pp, "TP x PP")


def layers_per_stage(facts: Facts) -> Judgement:
    layers = facts.count("model.layers")
    return _exactly(facts, "layout.layers_per_stage", layers / facts.count("layout.pp"), f"{layers} layers / PP")


def expert_parallel(facts: Facts) -> Judgement:
    """tp x pp x dp = etp x ep x pp, where etp cuts single experts."""
    ep, layout = facts.count("layout.ep"), facts.deployment
    right = f"TP {layout.tp} x DP {layout.dp} = {layout.ep} GPUs in a stage"
    if ep == layout.ep and min(layout.tp, layout.dp) > 1:
        reading = f"EP spans TP x DP inside one stage: all {layout.dp} replicas share one copy of every expert"
        return Judgement(str(ep), right, "holds only if", reading)
    if ep == layout.ep:
        return Judgement(str(ep), right, "holds", "EP is all GPUs of a stage")
    if layout.ep % ep == 0:
        num = layout.ep // ep
        reading = f"each stage has {num} copies of its experts, or each expert is cut in {num}"
        return Judgement(str(ep), right, "holds only if", reading)
    reading = f"TP x DP = {layout.ep} GPUs of a stage cannot be made into groups of {ep}"
    return Judgement(str(ep), right, "does not hold", reading)


def expert_groups(facts: Facts) -> Judgement:
    """Number of groups, GPUs and experts of each, together."""
    layout, ep = facts.deployment, facts.count("layout.ep")
    num_groups = layout.cell_gpus / ep
    copies = max(1, layout.ep // ep)
    right = (num_groups, ep, facts.num_experts * facts.count("model.layers") * copies / num_groups)
    declared = [
        facts.count(f"layout.{name}") if facts.given(f"layout.{name}") else right[i]
        for i, name in enumerate(("ep_groups", "gpus_per_ep_group", "experts_per_ep_group"))
    ]
    shown, computed = _groups(*declared), _groups(*right)
    if tuple(declared) == right:
        return Judgement(shown, computed, "holds", f"one of {ep} GPUs for each of {layout.pp} stages")
    reading = f"EP {ep} makes {computed}"
    if declared[0] == ep != num_groups and layout.ep % declared[1] == 0:
        size = int(declared[1])
        per_gpu = facts.stage_experts // size
        reading += (
            f"; {number(declared[0])} takes EP for the number of groups: groups of {size} are EP {size}, each GPU then"
            f" holds {per_gpu} experts and every expert exists {layout.ep // size} times"
        )
    return Judgement(shown, computed, "does not hold", reading)


def _groups(num: float, gpus: float, experts: float) -> str:
    return f"{number(num)} groups x {number(gpus)} GPUs x {number(experts)} experts"


def experts_per_gpu(facts: Facts) -> Judgement:
    ep = facts.count("layout.ep") if facts.given("layout.ep") else facts.deployment.ep
    remark = f"{number(facts.num_experts / ep)} per layer x {facts.stage_layers} layers"
    return _exactly(facts, "layout.experts_per_gpu", -(-facts.stage_experts // ep), remark)


# -- how it is started ----------------------------------------------------------------------------------------------


def nodes(facts: Facts) -> Judgement:
    num_gpus, num_nodes = facts.count("hardware.gpus"), facts.count("hardware.nodes")
    most = facts.declared.hardware.most_gpus_per_node
    needed = -(-num_gpus // most)
    shown, right = (
        f"{num_gpus} GPUs on {num_nodes} node{'s' if num_nodes > 1 else ''}",
        f"at least {needed} nodes of {most}",
    )
    if num_nodes >= needed:
        return Judgement(shown, right, "holds")
    reading = f"{num_gpus / num_nodes:g} GPUs on a node, where {most} are usual: {needed} nodes"
    if facts.given("layout.tp") and facts.deployment.ep == most:
        reading += f", and a stage ({most} GPUs) is a node"
    return Judgement(shown, right, "does not hold", reading)


def visible_devices(facts: Facts) -> Judgement:
    """Each process sees the devices of its own node."""
    devices = facts.declared.hardware.visible_devices or []
    most = facts.declared.hardware.most_gpus_per_node
    shown, right = f"{len(devices)} devices of one node", f"{most} at most"
    if len(devices) <= most and max(devices, default=0) < most:
        return Judgement(shown, right, "holds")
    return Judgement(shown, right, "does not hold", f"a node has {most}: one process for each GPU, on {most} per node")


_LAUNCHED = {
    "gpus": "hardware.gpus",
    "nodes": "hardware.nodes",
    "tp": "layout.tp",
    "pp": "layout.pp",
    "dp": "layout.dp",
    "ep": "layout.ep",
    "experts": "model.total_experts",
    "layers": "model.layers",
    "hidden": "model.hidden",
    "batch": "workload.batch",
    "max_sequence": "workload.max_sequence",
}


def launch_line(facts: Facts) -> Judgement:
    """Every figure that it repeats."""
    pairs = [(name, field) for name, field in _LAUNCHED.items() if facts.given(f"launch.{name}") and facts.given(field)]
    wrong = [
        f"launch.{name} = {facts.count(f'launch.{name}')} is not {field} = {facts.count(field)}"
        for name, field in pairs
        if facts.count(f"launch.{name}") != facts.count(field)
    ]
    shown, right = f"{len(pairs)} figures", f"{len(pairs) - len(wrong)} of them"
    if not wrong:
        return Judgement(shown, right, "holds")
    return Judgement(shown, right, "does not hold", "; ".join(wrong))


CHECKS = (
    Check("total parameters", "model.total_params_b", total_params),
    Check("total experts", "model.total_experts", total_experts),
    Check("GPUs", "hardware.gpus", gpus),
    Check("modules", "layout.modules", modules),
    Check("TP groups", "layout.tp_groups", tp_groups),
    Check("GPUs per stage", "layout.gpus_per_stage", gpus_per_stage),
    Check("GPUs per replica", "layout.gpus_per_replica", gpus_per_replica),
    Check("layers per stage", "layout.layers_per_stage", layers_per_stage),
    Check("expert parallelism", "layout.ep", expert_parallel),
    Check(
        "expert groups",
        "layout.ep_groups",
        expert_groups,
        also=("layout.gpus_per_ep_group", "layout.experts_per_ep_group"),
    ),
    Check("experts per GPU", "layout.experts_per_gpu", experts_per_gpu),
    Check("nodes", "hardware.nodes", nodes),
    Check("visible devices", "hardware.visible_devices", visible_devices),
    Check("launch line", "launch", launch_line),
)
